"""When to stop asking: how likely it is that more answers would change the ranking of candidates, and what that would gain."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from palate.errors import DataError
from palate.living.terms import Rewards
from palate.questions.choosing import Known, belief_of

DRAWS = 4096
TIED = 1e-9  # rewards that are closer are equal, so that a candidate and its copy do not keep a user answering


class Settled(NamedTuple):
    """How settled the ranking of m candidates is, under what is known of one user.

    Attributes:
        best: the candidate with the highest expected reward.
        wrong_best: probability that another one is better for this user: what any number of answers can still change.
        wrong_order: probability that the order of all m is not the expected one.
        wrong_pairs: expected share of the pairs of candidates that stand in the wrong order.
        regret: E max_j reward_j - max_j E reward_j, in log-odds: the most that all further answers together can be expected to
            add to the reward of the candidate that is taken (the expected value of perfect information).
    """

    best: int
    wrong_best: float
    wrong_order: float
    wrong_pairs: float
    regret: float


class Place(NamedTuple):
    """A candidate in its place.

    Attributes:
        candidate: its row in what was ranked.
        reward: expected, in log-odds.
        above_next: probability that the user likes it more than the next one; None of the last.
    """

    candidate: int
    reward: float
    above_next: float | None


@torch.no_grad()
def ranking(known: Known, rewards: Rewards) -> list[Place]:
    """The candidates, best first, with how sure each is of its place: Phi(margin / s), s^2 = (v_i - v_j)^T C (v_i - v_j).

    Equal rewards keep their order. O(m K^2). Raises: as `settled`.
    """
    mean, covariance, offset, slopes = _numbers(known, rewards)
    expected = offset + slopes @ mean
    order = expected.argsort(descending=True, stable=True)
    apart = slopes[order][:-1] - slopes[order][1:]
    std = ((apart @ covariance) * apart).sum(1).clamp(min=0).sqrt()
    sure = torch.special.ndtr((expected[order][:-1] - expected[order][1:]) / std.clamp(min=TIED))
    return [Place(*of) for of in zip(order.tolist(), expected[order].tolist(), [*sure.tolist(), None], strict=True)]


@torch.no_grad()
def settled(known: Known, rewards: Rewards, *, draws: int = DRAWS, seed: int = 0) -> Settled:
    """`Settled` of the candidates `rewards` (m of them), by draws of the weights from N(mean, covariance).

    `wrong_pairs` needs no draw: Phi(-|margin| / s) for every pair. With 4096 draws a probability of .05 has a standard error of
    .003; the same seed gives the same numbers. O(draws m K); about 2 ms for 16 candidates and 16 weights.

    Raises:
        DataError: a profile without a covariance, no candidate, shapes that disagree, numbers that are not finite.
    """
    if draws < 1:
        raise DataError(f"draws is {draws}; expected at least 1")
    mean, covariance, offset, slopes = _numbers(known, rewards)
    expected = offset + slopes @ mean
    order = expected.argsort(descending=True, stable=True)
    offset, slopes, expected = offset[order], slopes[order], expected[order]
    values, vectors = torch.linalg.eigh(covariance)
    normal = torch.randn(draws, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = expected + (normal * values.clamp(min=0).sqrt()) @ (vectors.T @ slopes.T)  # (draws, m), the expected best first
    size = TIED * (1 + drawn.abs().amax(1))
    lost = drawn.amax(1) - drawn[:, 0]
    fell = (drawn[:, 1:] - drawn[:, :-1] > size[:, None]).any(1)
    return Settled(
        int(order[0]),
        float((lost > size).double().mean()),
        float(fell.double().mean()),
        _wrong_pairs(expected, slopes, covariance),
        float(lost.mean()),
    )


def should_stop(
    known: Known,
    rewards: Rewards,
    *,
    what: Literal["best", "order"] = "best",
    error: float = 0.05,
    regret: float = 0.0,
    seed: int = 0,
) -> bool:
    """Whether more answers cannot be expected to change the ranking of these candidates.

    Args:
        known: a profile with a covariance.
        rewards: the candidates to be ranked.
        what: `best` stops once the first of the ranking is the user's best but for a probability of `error`, `order` once all
            are in the user's order but for it. Where the population is what the model believes it to be, so many of the rankings
            that are stopped at are wrong, however often one looks (a posterior probability knows of no optional stopping).
        error: in [0, 1].
        regret: stops, too, once the best candidate's reward can gain no more than so much, in log-odds, from all further
            answers; 0 for never. Two candidates that are equally good for a user are a reason to stop, and only this one sees it.
        seed: of the draws.

    Raises: as `settled`, and `DataError` for an error or a regret outside its range.
    """
    if what not in ("best", "order"):
        raise DataError(f"what is {what!r}; expected 'best' or 'order'")
    if not 0 <= error <= 1 or not 0 <= regret < float("inf"):
        raise DataError(f"error is {error} and regret {regret}; expected a probability and a finite number of at least 0")
    found = settled(known, rewards, seed=seed)
    wrong = found.wrong_best if what == "best" else found.wrong_order
    return wrong <= error or (regret > 0 and found.regret <= regret)


def _numbers(known: Known, rewards: Rewards) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean (K,) and covariance (K, K) of one user, offset (m,) and slopes (m, K) of the candidates, checked, in float64."""
    belief = belief_of(known)
    if belief.covariance is None:
        raise DataError(
            "how settled a ranking is needs a covariance of the weights, and this method has none; use one with a prior"
        )
    mean, covariance = belief.mean[0].double(), belief.covariance[0].double()
    offset, slopes = (torch.from_numpy(np.asarray(column, dtype=np.float64)) for column in (rewards.offset, rewards.slopes))
    if not len(offset) or offset.ndim != 1 or slopes.shape != (len(offset), len(mean)):
        raise DataError(
            f"candidates have offset {tuple(offset.shape)} and slopes {tuple(slopes.shape)}; "
            f"expected (m,) and (m, {len(mean)}), m at least 1"
        )
    if not all(bool(torch.isfinite(part).all()) for part in (mean, covariance, offset, slopes)):
        raise DataError(
            "a profile or a candidate holds a number that is NaN or infinite; expected finite ones: adapt or embed again"
        )
    return mean, covariance, offset, slopes


def _wrong_pairs(expected: Tensor, slopes: Tensor, covariance: Tensor) -> float:
    """Mean of Phi(-|margin| / s) over the pairs of candidates; pairs that are tied for certain count as right. O(m^2 + m K^2)."""
    m = len(expected)
    if m == 1:
        return 0.0
    inner = slopes @ covariance @ slopes.T
    own = inner.diagonal()
    variance = (own[:, None] + own[None, :] - 2 * inner).clamp(min=0)
    first, second = torch.triu_indices(m, m, offset=1)
    away, std = (expected[:, None] - expected[None, :])[first, second].abs(), variance[first, second].sqrt()
    wrong = torch.special.ndtr(-away / std.clamp(min=TIED)).masked_fill((std <= TIED) & (away <= TIED), 0.0)
    return float(wrong.mean())
