"""The next questions to one living user, or to many: the best pairs by a way of choosing, several at once without repeating."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from palate.errors import DataError
from palate.living.profile import LiveProfile
from palate.priors import Prior
from palate.questions.belief import Belief, Pool
from palate.questions.rules import MutualInformation, Question
from palate.solvers import Batch

SAME = 1e-6  # pairs whose slopes and offsets differ by less, relative to their length, are one question


class Known(Protocol):
    """What `palate.Profile` and a living profile have: numbers of one user."""

    @property
    def mean(self) -> Any: ...  # (K,)

    @property
    def covariance(self) -> Any: ...  # (K, K) or None


def belief_of(known: Known) -> Belief:
    """The belief about one user: U = 1; of a living profile with what was said and the prior, else without.

    What was said is pairs, each with what is left of its weight: a choice among m is broken into pairs (`Rows.broken`), and an
    axis that was set by hand, which is no answer, is left out. Raises `DataError` for shapes that disagree.
    """
    mean = torch.as_tensor(known.mean)
    covariance = None if known.covariance is None else torch.as_tensor(known.covariance).to(mean)
    if mean.ndim != 1 or (covariance is not None and covariance.shape != (len(mean), len(mean))):
        shape = None if covariance is None else tuple(covariance.shape)
        raise DataError(f"a profile has mean {tuple(mean.shape)} and covariance {shape}; expected (K,) and (K, K)")
    said, prior = (_said(known), _prior(known)) if isinstance(known, LiveProfile) else (None, None)
    return Belief(mean[None], None if covariance is None else covariance[None], said, prior)


def _said(live: LiveProfile) -> Batch:
    """The pairs that a living profile is made from, (1, t, K). Only what they were about counts, and not how they came out."""
    rows = live.history.rows.weighted(live.history.remembered(live.population.forgetting, live.now))
    pairs = len(rows.offset) == rows.n_terms  # each term is one row, as for most users: nothing is to be broken
    offset, slopes, weight = (rows.offset, rows.slopes, rows.weight) if pairs else rows.broken()
    return Batch(torch.tensor(slopes)[None], torch.tensor(offset)[None], torch.tensor(weight)[None], None)


def _prior(live: LiveProfile) -> Prior | None:
    """The prior over this user's weights; None for a method without one."""
    if live.population.prior is None:
        return live.population.model.prior
    log_share, means, factors, walls = live.population.components(live.user_id)
    share = torch.tensor(log_share).softmax(0)
    return Prior(share, torch.tensor(means), torch.tensor(factors), None if walls is None else torch.tensor(walls))


@torch.no_grad()
def next_questions(
    known: Known | Belief,
    pool: Pool,
    question: Question | None = None,
    n: int = 1,
    *,
    asked: Sequence[int] = (),
    similarity: float = 0.95,
    seed: int = 0,
) -> list[int]:
    """The next `n` pairs to ask one user: rows of the pool, the most telling first; fewer where the pool has no more.

    Several at once are chosen one after another, each as if the earlier ones had been answered: the covariance shrinks as is
    expected of their answers (`Belief.expecting`), the mean stays. So a batch needs no answer in between and says little twice.

    Args:
        known: a profile. Ways of choosing that look at what was answered need a living one, or a `Belief` of one user.
        pool: the pairs, such as `Pool.of(model, pairs)` or `pairs_among` the responses at hand.
        question: how to choose; `MutualInformation()` by default.
        n: at least 1.
        asked: rows that are not to be asked again, nor any pair that is the same to the model.
        similarity: of a batch, the largest correlation of two margins under what is known (1 for no limit). Where no pair is
            left below it the limit yields: under a single weight all margins are one.
        seed: for ways that draw.

    Raises:
        DataError: numbers outside their ranges, shapes that disagree, a pool or profile with a number that is not finite.
    Cost: O(Q K^2) a question; about 1 ms for 1,000 pairs and 16 weights.
    """
    belief = known if isinstance(known, Belief) else belief_of(known)
    k = belief.mean.shape[1]
    if len(belief.mean) != 1 or pool.slopes.ndim != 2:
        raise DataError(f"{len(belief.mean)} users and slopes {tuple(pool.slopes.shape)}; expected one user and one pool, (Q, K)")
    if k == 0 or pool.n_weights != k:
        raise DataError(f"the pool has {pool.n_weights} weights and the profile {k}; expected the same number, at least 1")
    if n < 1:
        raise DataError(f"n is {n}; expected at least 1 question")
    if not 0 < similarity <= 1:
        raise DataError(f"similarity is {similarity}; expected a correlation above 0 and at most 1")
    wrong = [row for row in asked if not 0 <= row < pool.n_pairs]
    if wrong:
        raise DataError(f"asked holds row {wrong[0]} of a pool of {pool.n_pairs} pairs; expected rows of this pool")
    for name, numbers in (
        ("pool", (*pool,)),
        ("profile", (belief.mean, *([] if belief.covariance is None else [belief.covariance]))),
    ):
        if not all(bool(torch.isfinite(part).all()) for part in numbers):
            raise DataError(f"the {name} holds a number that is NaN or infinite; expected finite ones: embed or adapt again")
    if not pool.n_pairs:
        return []
    pool = pool.to(belief.mean)
    closed = _asked(pool, torch.tensor(sorted(set(asked)), dtype=torch.int64))
    generator = torch.Generator().manual_seed(seed)
    rows = pick(belief, pool, MutualInformation() if question is None else question, n, closed, generator, similarity)
    return [row for row in rows[0].tolist() if row >= 0]


def pick(
    belief: Belief, pool: Pool, question: Question, n: int, closed: Tensor, generator: torch.Generator, similarity: float = 0.95
) -> Tensor:
    """Rows (U, n) of the best `n` pairs for each user that are not `closed` (U, Q), chosen without answers in between.

    -1 where nothing is left. As `next_questions`, for everybody at once. Ties of scores go to the earlier pair.
    """
    expected, near, rows = belief, torch.zeros_like(closed), []
    spread = None if n == 1 or belief.covariance is None else belief.spread(pool)
    for place in range(n):
        score = question.score(expected, pool, generator)
        free = ~(closed | near)
        free |= ~closed & ~free.any(1, keepdim=True)  # the limit yields
        best, row = score.masked_fill(~free, -torch.inf).max(1)
        row = torch.where(free.any(1), row, -1)
        if bool(torch.isnan(best).any()):
            raise DataError(f"{question} gave a score that is NaN; expected a number for every pair")
        rows.append(row)
        if place == n - 1:
            break
        chosen = row.clamp(min=0)
        closed = closed | same(pool, chosen)
        if spread is not None and belief.covariance is not None:
            towards = torch.bmm(belief.covariance, pool.at(chosen[:, None]).slopes.mT)[..., 0]
            scale = (spread * spread.gather(1, chosen[:, None])).sqrt()
            near = near | (pool.along(towards).abs() > similarity * scale)
        expected = expected.expecting(pool, chosen)
    return torch.stack(rows, dim=1)


def same(pool: Pool, rows: Tensor) -> Tensor:
    """(U, Q) the pairs that are to the model the pair `rows` (U,) of each user, either way round."""
    one = pool.at(rows[:, None])  # (U, 1, K) and (U, 1)
    size = one.slopes.abs().amax(-1) + one.offset.abs()
    apart = [
        torch.maximum((pool.slopes - side * one.slopes).abs().amax(-1), (pool.offset - side * one.offset).abs())
        for side in (1, -1)
    ]
    return torch.minimum(*apart) <= SAME * size


def _asked(pool: Pool, rows: Tensor) -> Tensor:
    """(1, Q) the pairs that are one of `rows` (t,), or the same to the model as one of them. O(Q (K + t))."""
    closed = torch.zeros(1, pool.n_pairs, dtype=torch.bool)
    closed[0, rows] = True
    # What two such pairs have in common is one number, up to its sign; few others share it, and these are compared in full.
    direction = torch.cos(torch.arange(pool.n_weights)).to(pool.slopes)
    key, size = (pool.slopes @ direction + pool.offset).abs(), pool.slopes.abs().sum(1) + pool.offset.abs()
    alike = (key[:, None] - key[rows]).abs() <= 2 * pool.n_weights * SAME * size[rows]
    for row in rows[(alike & ~closed[0, :, None]).any(0)]:
        closed |= same(pool, row[None])
    return closed
