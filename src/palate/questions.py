"""The next question: which pair of texts a user should be asked to compare.

A user's next answer is a Bernoulli draw with the margin m = offset + w . v of the pair, v its slopes. What is known of w is a
Gaussian N(w_MAP, C) (`Belief`), and a way of choosing is an object that scores every pair of a pool for every user, (U, Q); the
highest score that has not been asked is the question. `ask` runs the loop for all users at once against simulated people.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from palate import likelihood
from palate.adaptation import pair_design
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.models.base import Inference, RewardModel
from palate.priors import Prior
from palate.solvers import Batch

BLOCK = 2**24  # numbers of a block of outer products


class Pool(NamedTuple):
    """Q pairs that can be asked, the same for everybody, as a model sees them: margin = offset + slopes . w."""

    slopes: Tensor  # (Q, K)
    offset: Tensor  # (Q,)

    @classmethod
    def of(cls, model: RewardModel, pairs: EmbeddedPairs) -> "Pool":
        """The pairs of `pairs`, one a row; who answered them, and how, is not looked at. One pass over their texts."""
        model.check(pairs.embeddings, pairs.encoder)
        offset, slopes = pair_design(model, pairs)
        return cls(slopes, offset)

    def margins(self, weights: Tensor) -> Tensor:
        """(U, Q) for weights (U, K): one matrix product."""
        return torch.addmm(self.offset, weights, self.slopes.T)

    def spread(self, matrices: Tensor) -> Tensor:
        """v^T A v for every pair and every user's symmetric A (U, K, K): (U, Q).

        As the inner product of v v^T with A, so that the whole pool is one matrix product, (U, K K) x (K K, Q), in blocks of
        pairs. O(U Q K^2).
        """
        users, k = matrices.shape[:2]
        flat, step = matrices.reshape(users, k * k), max(1, BLOCK // max(1, k * k))
        blocks = []
        for start in range(0, len(self.slopes), step):
            v = self.slopes[start : start + step]
            blocks.append(flat @ (v[:, :, None] * v[:, None, :]).reshape(len(v), k * k).T)
        return torch.cat(blocks, dim=1) if blocks else matrices.new_zeros(users, 0)


class Belief(NamedTuple):
    """What is known of U users: their weights, how surely, and what they have said."""

    mean: Tensor  # (U, K)
    covariance: Tensor | None  # (U, K, K); None where the method has none
    said: Batch  # (U, t, K) slopes of the t pairs that each was asked
    prior: Prior | None

    def information(self, curvature: Tensor | None = None) -> Tensor:
        """(U, K, K): sum over the answered pairs of curvature v v^T; sigma'(m) at the current weights by default."""
        if curvature is None:
            curvature = likelihood.curvature(self.said.margins(self.mean))
        weighted = self.said.slopes * (curvature * self.said.weight)[..., None]
        return self.said.slopes.mT @ weighted


class Question(Protocol):
    """A way of choosing: a score of every pair for every user. `generator` is for those that draw."""

    def score(self, belief: Belief, pool: Pool, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class HessianUncertainty:
    """sigma'(m)^2 v^T H^-1 v with H = floor I + sum_answered sigma'(m_s) v_s v_s^T: as PReF's published code scores.

    H knows of no prior, so `floor` stands for one, whatever the scale of the weights. With sigma' squared outside, the pairs that
    the current weights call even are preferred twice over.
    """

    floor: float = 1e-3

    def __post_init__(self) -> None:
        if not self.floor > 0:
            raise DataError(f"floor is {self.floor}; expected a positive number: it stands for the prior")

    def score(self, belief: Belief, pool: Pool, generator: torch.Generator) -> Tensor:
        hessian = belief.information()
        hessian.diagonal(dim1=1, dim2=2).add_(self.floor)
        inverse = torch.linalg.inv(hessian.double()).to(hessian)
        return likelihood.curvature(pool.margins(belief.mean)).square() * pool.spread(inverse)


@dataclass(frozen=True)
class InformationGain:
    """sigma'(m) v^T C v, C the posterior covariance with the prior's precision in it.

    One more answer about v multiplies the determinant of the Laplace precision by 1 + sigma'(m) v^T C v, so half the logarithm of
    it is the information to be gained, in nats, and this score puts the pairs in the same order (MacKay 1992, Neural Computation
    4: 590-604). Raises `DataError` for a method without a covariance.
    """

    def score(self, belief: Belief, pool: Pool, generator: torch.Generator) -> Tensor:
        if belief.covariance is None:
            raise DataError("information gain needs a covariance of the weights, and this method has none; use one with a prior")
        return likelihood.curvature(pool.margins(belief.mean)) * pool.spread(belief.covariance)


@dataclass(frozen=True)
class DOptimal:
    """v^T (S^-1 + 1/4 sum_answered v_s v_s^T)^-1 v: the linear D-optimal design, which never looks at an answer.

    Every answer counts as if its margin were 0, where the curvature is 1/4. Raises `DataError` for a method without a prior.
    """

    def score(self, belief: Belief, pool: Pool, generator: torch.Generator) -> Tensor:
        if belief.prior is None:
            raise DataError("a D-optimal design needs a prior of the weights, and this method has none; use one with a prior")
        precision = torch.linalg.inv(belief.prior.covariance.double())
        information = belief.information(torch.full_like(belief.said.offset, 0.25)).double()
        return pool.spread(torch.linalg.inv(precision + information).to(pool.slopes))


@dataclass(frozen=True)
class Random:
    """Any pair, each as likely as another."""

    def score(self, belief: Belief, pool: Pool, generator: torch.Generator) -> Tensor:
        return torch.rand(len(belief.mean), len(pool.slopes), generator=generator).to(belief.mean)


Answers = Callable[[Tensor, torch.Generator], Tensor]  # true margins (U,) to answers (U,): 1, 0 or 1/2


def certain(margin: Tensor, generator: torch.Generator) -> Tensor:
    """1 where the true margin (U,) is positive, 0 where it is negative, 1/2 at 0: people who never err."""
    return (margin > 0).to(margin) + 0.5 * (margin == 0).to(margin)


def noisy(margin: Tensor, generator: torch.Generator) -> Tensor:
    """1 with probability sigma(margin), else 0: Bradley-Terry."""
    draw = torch.rand(margin.shape, generator=generator, dtype=torch.float64).to(margin.device)
    return (draw < likelihood.probability(margin)).to(margin)


def twice(margin: Tensor, generator: torch.Generator) -> Tensor:
    """Two `noisy` answers, one for each order of the sides, that count if they agree and else are a tie (1/2): PReF's judge."""
    return (noisy(margin, generator) + noisy(margin, generator)) / 2


@dataclass(frozen=True, eq=False)
class Asked:
    """What a loop of T questions to U users left behind.

    Attributes:
        question: (U, T) rows of the pool, in the order asked.
        answer: (U, T) 1, 0 or 1/2.
        weights: (U, T + 1, K) before the first answer, and after each.
        accuracy: (U, T + 1) share of the test pairs told rightly, a predicted tie counting half, true ties left out.
        regret: (U, T + 1) mean true margin lost on the test pairs by taking the predicted side (half of it at a predicted tie).
    """

    question: Tensor
    answer: Tensor
    weights: Tensor
    accuracy: Tensor
    regret: Tensor


@torch.no_grad()
def ask(
    model: RewardModel,
    pool: Pool,
    truth: Tensor,
    question: Question,
    n_questions: int,
    *,
    test: tuple[Pool, Tensor] | None = None,
    answers: Answers = noisy,
    user_ids: tuple[str, ...] | None = None,
    first_random: bool = False,
    seed: int = 0,
) -> Asked:
    """Ask simulated users one question after another, everybody at once, and re-solve their weights after every answer.

    Args:
        model: a fitted model; `model.inference` re-solves the weights from all answers so far.
        pool: the pairs that can be asked; nobody is asked one twice.
        truth: (U, Q) true margins of the pool's pairs, natural log-odds.
        question: how to choose. Ties of scores go to the earlier pair.
        n_questions: T, at most Q.
        test: pairs with their true margins (U, n) to measure accuracy and regret on; by default the pool itself.
        answers: true margins to answers, `certain`, `noisy` or `twice`.
        user_ids: (U,) for methods that start at random by user.
        first_random: ask a random first question, as the published loop does.
        seed: of answers and of random choices. The t-th draw of answers is the same whatever is asked.

    Raises:
        DataError: more questions than pairs, shapes that disagree, a model without weights.
    Cost: per question one pool of scores, O(U Q K^2), and one batched solve of U users with t pairs.
    """
    users, (n_pairs, k) = len(truth), pool.slopes.shape
    if truth.shape != (users, n_pairs):
        raise DataError(f"truth has shape {tuple(truth.shape)}; expected (users, {n_pairs}), a margin for each pair of the pool")
    if not 0 <= n_questions <= n_pairs:
        raise DataError(f"n_questions is {n_questions}; expected 0 to {n_pairs}, the number of pairs of the pool")
    if k == 0 or k != model.n_weights:
        raise DataError(f"the pool has {k} weights and the model {model.n_weights}; expected the same number, at least 1")
    ids = tuple(str(u) for u in range(users)) if user_ids is None else user_ids
    if len(ids) != users:
        raise DataError(f"{len(ids)} user ids for {users} rows of truth; expected one each")
    tested, expected = (pool, truth) if test is None else test
    if tested.slopes.shape[1] != k or expected.shape != (users, len(tested.slopes)):
        raise DataError(
            f"test pairs have slopes {tuple(tested.slopes.shape)} and true margins {tuple(expected.shape)}; "
            f"expected (n, {k}) and ({users}, n)"
        )
    if not bool(torch.isfinite(truth).all()) or not bool(torch.isfinite(expected).all()):
        raise DataError("a true margin is NaN or infinite; expected a finite number for every user and pair")
    answering, choosing = (torch.Generator().manual_seed(2 * seed + side) for side in (0, 1))
    belief = _prior_belief(model, pool, users)
    asked = torch.zeros(users, n_pairs, dtype=torch.bool, device=truth.device)
    everyone = torch.arange(users, device=truth.device)
    rows, given, weights = [], [], [belief.mean]
    for t in range(n_questions):
        how = Random() if first_random and t == 0 else question
        score = how.score(belief, pool, choosing).masked_fill(asked, -torch.inf)
        row = score.argmax(1)
        asked[everyone, row] = True
        answer = answers(truth[everyone, row], answering)
        rows.append(row)
        given.append(answer)
        belief = _updated(model.inference, model.prior, pool, torch.stack(rows, 1), torch.stack(given, 1), ids)
        weights.append(belief.mean)
    path = torch.stack(weights, dim=1)
    accuracy, regret = _measured(tested, expected.to(path), path)
    none = torch.zeros(users, 0, dtype=torch.int64, device=truth.device)
    questions = torch.stack(rows, 1) if rows else none
    return Asked(questions, torch.stack(given, 1) if given else none.to(truth), path, accuracy, regret)


def _prior_belief(model: RewardModel, pool: Pool, users: int) -> Belief:
    """Before any answer: the crowd's weights, with the prior's covariance where there is one."""
    k = pool.slopes.shape[1]
    nothing = Batch(pool.slopes.new_zeros(users, 0, k), pool.slopes.new_zeros(users, 0), pool.slopes.new_zeros(users, 0), None)
    crowd, covariance = model.crowd_weights.to(pool.slopes), None
    if model.prior is not None:  # about the crowd's weights, from which the prior's mean may be away (as `adaptation.no_pairs`)
        away = model.prior.mean.to(pool.slopes) - crowd
        covariance = (model.prior.covariance.to(pool.slopes) + torch.outer(away, away)).expand(users, k, k)
    return Belief(crowd.expand(users, k), covariance, nothing, model.prior)


def _updated(
    inference: Inference, prior: Prior | None, pool: Pool, rows: Tensor, answers: Tensor, users: tuple[str, ...]
) -> Belief:
    """The belief after answers (U, t) to the pairs `rows` (U, t) of the pool: the same solve as `adapt`, from all answers."""
    sign = torch.where(answers < 0.5, -1.0, 1.0).to(pool.slopes)
    tie = answers == 0.5
    said = Batch(
        pool.slopes[rows] * sign[..., None], pool.offset[rows] * sign, torch.ones_like(sign), tie if bool(tie.any()) else None
    )
    solved = inference.solve(said, prior, users, covariance=prior is not None)
    return Belief(solved.mean, solved.covariance, said, prior)


def _measured(test: Pool, truth: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy and regret (U, T + 1) of weights (U, T + 1, K) on test pairs with true margins (U, n)."""
    margin = test.offset + weights @ test.slopes.T  # (U, T + 1, n)
    right = (truth.sign()[:, None] * margin.sign() + 1) / 2  # 1, 0, or 1/2 at a predicted tie
    strict = (truth != 0).to(margin)
    size = truth.abs()
    accuracy = (right * strict[:, None]).sum(2) / strict.sum(1, keepdim=True)
    return accuracy, ((1 - right) * size[:, None]).mean(2)
