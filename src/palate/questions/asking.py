"""The loop of questions to simulated users, everybody at once, and what it has taught after every answer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from palate.errors import DataError
from palate.models.base import RewardModel
from palate.questions.belief import Belief, Pool
from palate.questions.choosing import pick
from palate.questions.people import Answers, noisy
from palate.questions.rules import Question, Random
from palate.questions.unsure import said_of


@dataclass(frozen=True, eq=False)
class Asked:
    """What a loop of T questions to U users left behind.

    Attributes:
        question: (U, T) rows of the pool, in the order asked.
        answer: (U, T) 1, 0 or 1/2; NaN where the user could not say.
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
    allowed: Tensor | None = None,
    at_once: int = 1,
    unsure: float = 0.0,
    seed: int = 0,
) -> Asked:
    """Ask simulated users one question after another, everybody at once, and re-solve their weights after every answer.

    Args:
        model: a fitted model; `model.inference` re-solves the weights from all answers so far.
        pool: the pairs that can be asked, common or users' own; nobody is asked one twice.
        truth: (U, Q) true margins of the pool's pairs, natural log-odds.
        question: how to choose. Ties of scores go to the earlier pair.
        n_questions: T, at most Q.
        test: pairs with their true margins (U, n) to measure accuracy and regret on; by default the pool itself.
        answers: true margins to answers: `certain`, `noisy`, `twice`, or people who cannot always say, `Undecided` and
            `Distracted`.
        user_ids: (U,) for methods that start at random by user.
        first_random: ask a random first question, as the published loop does.
        allowed: (U, Q) bool, the pairs that each user can be asked (those that a person has an answer to); by default all.
        at_once: questions that are asked together, chosen without the answers to one another (`next_questions`).
        unsure: weight of an "I can't say" as a tie. By default it is no evidence, and only not asked again: which of the two is
            right depends on why people cannot say, and `evidence_of_unsure` tells it from their answers.
        seed: of answers and of random choices. The t-th draw of answers is the same whatever is asked.

    Raises:
        DataError: more questions than pairs, shapes that disagree, a model without weights, a number outside its range.
    Cost: per question one pool of scores, O(U Q K^2), and one batched solve of U users with t pairs.
    """
    users, n_pairs, k = len(truth), pool.n_pairs, pool.n_weights
    if truth.shape != (users, n_pairs) or pool.offset.shape not in ((n_pairs,), (users, n_pairs)):
        raise DataError(f"truth has shape {tuple(truth.shape)}; expected (users, {n_pairs}), a margin for each pair of the pool")
    closed = torch.zeros(users, n_pairs, dtype=torch.bool, device=truth.device) if allowed is None else ~allowed
    if closed.shape != truth.shape:
        raise DataError(f"allowed has shape {tuple(closed.shape)}; expected that of truth, {tuple(truth.shape)}")
    most = int((~closed).sum(1).min()) if users else n_pairs
    if not 0 <= n_questions <= most:
        raise DataError(f"n_questions is {n_questions}; expected 0 to {most}, the number of pairs of the pool")
    if at_once < 1 or not 0 <= unsure < float("inf"):
        raise DataError(f"at_once is {at_once} and unsure {unsure}; expected at least 1, and a finite weight of at least 0")
    if k == 0 or k != model.n_weights:
        raise DataError(f"the pool has {k} weights and the model {model.n_weights}; expected the same number, at least 1")
    ids = tuple(str(u) for u in range(users)) if user_ids is None else user_ids
    if len(ids) != users:
        raise DataError(f"{len(ids)} user ids for {users} rows of truth; expected one each")
    tested, expected = (pool, truth) if test is None else test
    if tested.n_weights != k or expected.shape != (users, tested.n_pairs):
        raise DataError(
            f"test pairs have slopes {tuple(tested.slopes.shape)} and true margins {tuple(expected.shape)}; "
            f"expected (n, {k}) and ({users}, n)"
        )
    if not bool(torch.isfinite(truth).all()) or not bool(torch.isfinite(expected).all()):
        raise DataError("a true margin is NaN or infinite; expected a finite number for every user and pair")
    answering, choosing = (torch.Generator().manual_seed(2 * seed + side) for side in (0, 1))
    belief = nothing = Belief.before(model, pool, ids)
    everyone = torch.arange(users, device=truth.device)
    rows: list[Tensor] = []
    given: list[Tensor] = []
    weights = [belief.mean]
    while len(rows) < n_questions:
        first = first_random and not rows
        together = 1 if first else min(at_once, n_questions - len(rows))
        for row in pick(belief, pool, Random() if first else question, together, closed, choosing).unbind(1):
            if bool((row < 0).any()):
                raise DataError(f"no more than {len(rows)} of the pairs are different to the model; ask fewer than {n_questions}")
            closed = closed.index_put((everyone, row), torch.ones_like(row, dtype=torch.bool))
            rows.append(row)
            given.append(answers(truth[everyone, row], answering))
            said = said_of(pool, torch.stack(rows, 1), torch.stack(given, 1), unsure)
            belief = nothing.after(model, said, ids)
            weights.append(belief.mean)
    path = torch.stack(weights, dim=1)
    accuracy, regret = _measured(tested, expected.to(path), path)
    none = torch.zeros(users, 0, dtype=torch.int64, device=truth.device)
    questions = torch.stack(rows, 1) if rows else none
    return Asked(questions, torch.stack(given, 1) if given else none.to(truth), path, accuracy, regret)


def _measured(test: Pool, truth: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy and regret (U, T + 1) of weights (U, T + 1, K) on test pairs with true margins (U, n)."""
    margin = test.offset.unsqueeze(-2) + weights @ test.slopes.mT  # (U, T + 1, n)
    right = (truth.sign()[:, None] * margin.sign() + 1) / 2  # 1, 0, or 1/2 at a predicted tie
    strict = (truth != 0).to(margin)
    size = truth.abs()
    accuracy = (right * strict[:, None]).sum(2) / strict.sum(1, keepdim=True)
    return accuracy, ((1 - right) * size[:, None]).mean(2)
