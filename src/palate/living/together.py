"""A reward for several people at once: a household or a team that has to take one response between them.

The rule is stated and has an author, because there is no neutral one. All rules here read how each response stands with each
member between the worst and the best that is on offer, value = (r - min r) / (max r - min r), and not the rewards themselves:
a reward is in log-odds, and somebody whose log-odds are twice as large is twice as decided, not twice as happy. That is
relative utilitarianism (Dhillon and Mertens 1999) for the mean, and for the worst-off member the solution of Kalai and
Smorodinsky (1975). Its price is that values depend on what else is on offer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from palate.errors import DataError
from palate.living.terms import Rewards

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DIGITS = 9  # of a value that count; what differs by less is a tie, so that rounding breaks none

# Values (M, n) of n responses for M members -> (J, n): the group's reward, then what decides between equal ones.
Rule = Callable[[Floats], Floats]


def mean(values: Floats) -> Floats:
    """The mean of the members' values (utilitarian)."""
    return np.asarray(values.mean(axis=0, keepdims=True))


def worst_off(values: Floats) -> Floats:
    """The value of the member who is worst off; between equals of the next one, and so on (leximin; Sen 1970)."""
    return np.sort(values, axis=0)


def nash(values: Floats) -> Floats:
    """The geometric mean of the values, 0 at one's own worst response (Nash 1950); between equals their mean."""
    return np.stack([values.prod(axis=0) ** (1 / len(values)), values.mean(axis=0)])


def borda(values: Floats) -> Floats:
    """The mean share of the other responses that a member has it above, ties counting half (Borda 1781)."""
    above = rankdata(values, axis=1) - 1
    return np.asarray(above.mean(axis=0, keepdims=True) / max(1, values.shape[1] - 1))


@dataclass(frozen=True, eq=False)
class Together:
    """What a group makes of n responses.

    Attributes:
        members: (M,) names, in the order given.
        rewards: (n,) the group's, in [0, 1] by every rule of this module.
        order: (n,) rows of the responses, best first; equal ones keep the order in which they came.
        values: (M, n) each member's own, 0 for their worst response and 1 for their best.
        worst_off: (n,) who is worst off with each response, the first of equals.
    """

    members: tuple[str, ...]
    rewards: Floats
    order: Ints
    values: Floats
    worst_off: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the responses best first, each with the group's reward, every member's value and who is worst off."""
        ranked = [
            {
                "corpus_id": int(row),
                "score": float(self.rewards[row]),
                "values": {member: float(self.values[m, row]) for m, member in enumerate(self.members)},
                "worst_off": self.worst_off[row],
            }
            for row in self.order
        ]
        return {"members": list(self.members), "ranked": ranked}


def together(candidates: Rewards, members: Mapping[str, Any], crowd: Any, *, rule: Rule = mean) -> Together:
    """The ranking of n responses for a group of people by a stated rule.

    Every rule of this module treats members alike, ranks a response that nobody likes less and somebody likes more above the
    other (Pareto; within 1e-9 of a member's range), is not moved by a change of scale of anybody's rewards, and gives a group of
    one that person's own ranking. A member to whom all responses are equal has the value 1 for each, and so no say.

    Args:
        candidates: the responses, offset (n,) and slopes (n, K), as the population's model has them.
        members: name -> weights (K,), the mean of a profile of that model; None for somebody unknown, who counts as the crowd.
        crowd: (K,) the crowd's weights.
        rule: `mean`, `worst_off`, `nash`, `borda`, or a function like them.

    Raises:
        DataError: nobody, nothing to rank, weights of another length, or a number that is not finite.
    Cost: M n K multiplications; tens of microseconds for a household and 16 responses.
    """
    slopes, unknown = np.asarray(candidates.slopes, dtype=np.float64), np.asarray(crowd, dtype=np.float64)
    if not members or not len(slopes):
        raise DataError(f"{len(members)} members and {len(slopes)} responses; expected at least one of each")
    found = {name: unknown if given is None else np.asarray(given, dtype=np.float64) for name, given in members.items()}
    wrong = [name for name, weights in found.items() if weights.shape != slopes.shape[1:]]
    if wrong:
        raise DataError(
            f"member {wrong[0]!r} has weights of shape {found[wrong[0]].shape}; expected {slopes.shape[1:]}, one for each slope"
        )
    rewards = candidates.offset + np.stack(list(found.values())) @ slopes.T
    if not np.isfinite(rewards).all():
        member = list(found)[int(np.argmin(np.isfinite(rewards).all(axis=1)))]
        raise DataError(f"a reward of member {member!r} is not finite; expected finite weights, offsets and slopes")
    values = _values(rewards)
    keys = rule(values)
    order = np.lexsort(-np.round(keys[::-1], DIGITS))  # the last key counts first, and equal ones keep their order
    names = tuple(found)
    lowest = tuple(names[m] for m in values.argmin(axis=0).tolist())
    return Together(names, keys[0], order.astype(np.int64), values, lowest)


def _values(rewards: Floats) -> Floats:
    """(M, n) rewards -> where each stands between the member's worst and best; all 1 for a member to whom they are equal."""
    low = rewards.min(axis=1, keepdims=True)
    span = rewards.max(axis=1, keepdims=True) - low
    flat = span <= 1e-12 * np.abs(rewards).max(axis=1, keepdims=True)
    return np.asarray(np.where(flat, 1.0, np.round((rewards - low) / np.where(flat, 1.0, span), DIGITS)))
