"""What the place on the page does to a choice: a position has log-odds of its own, and what was never seen is no rejection.

Of the responses 1..n shown in this order, a person looks at the first D, and picks among these with

    P(pick j | D = d) = exp(u_j + b_j) / sum_{i <= d} exp(u_i + b_i),    j <= d,

the multinomial logit (McFadden 1974) with log-odds b of the positions; P(D >= d) is `reach`. That is the position-based model
of clicks in its conditional form, with the cascade's "from the top, and no further" (Craswell, Zoeter, Taylor and Ramsey 2008).
Where it is known how far somebody looked (`examined`), D is known. Where it is not, ln sum_d P(D = d) P(pick | d) is bounded
from below by the mean of the logarithms under responsibilities r_d (Jensen), which makes the event several softmax terms with
weights r_d: convex in the rewards like all the others. They are taken at the crowd's rewards, so that what an event says does
not depend on what was known when it came.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from palate.living.terms import Floats, Rewards

if TYPE_CHECKING:
    from palate.living.events import Picked
    from palate.living.population import Population
    from palate.living.reading import Level

Number = Annotated[float, Field(allow_inf_nan=False)]
Numbers = Annotated[tuple[Number, ...], BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given)]

NEGLIGIBLE = 1e-3  # a depth less likely than this is left out of an event's terms


class Exposure(BaseModel):
    """Log-odds of the positions and how far people look. `Exposure()` is no bias, and everybody sees everything.

    Positions after the last one learned count as the last one.

    Attributes:
        log_odds: (P,) of being picked at each position, all else equal, against the first, whose own is 0.
        std: (P,) their standard errors.
        reach: (P,) probability that somebody looks at least so far; 1 at the first, never rising.
        n_picks: how many picks they were learned from.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    log_odds: Numbers = ()
    std: Numbers = ()
    reach: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)], ...],
        BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given),
    ] = ()
    n_picks: int = Field(default=0, ge=0)

    @classmethod
    def fit(
        cls,
        histories: "Mapping[str, Sequence[tuple[Picked, Rewards]]]",
        population: "Population",
        level: "Level",
        *,
        std: float = 2.0,
        max_rounds: int = 60,
        tolerance: float = 2e-3,
        seed: int = 0,
    ) -> "Exposure":
        """Learn both from picks of many people, each with weights of their own.

        `reach` is the product-limit estimate (Kaplan and Meier 1958) from picks that say how far somebody looked, which a list
        that was looked at whole censors; without such picks, everything counts as seen, and the log-odds hold what stands too far
        down. The log-odds maximise the likelihood of all picks with the people's weights and unknown depths integrated out, by
        Newton's method: score and information come from draws from each person's Laplace posterior, by the identities of Fisher
        and of Louis (1982), so that the standard errors know what is not known of the people.

        Args:
            histories: of each person, what they picked, each with the rewards of its `responses()`.
            population: of the model that gave the rewards; without forgetting.
            level: of the same model.
            std: of the log-odds' own prior, N(0, std^2) about the first position's.
            tolerance: of a round's step in the log-odds.

        Raises:
            DataError: no picks; or the order never varies, so that position and taste cannot be told apart: every response always
                at one place, or always by the crowd's reward.
            ConvergenceError: more than `max_rounds` rounds.
        Cost: a round is a solve of each person and O(N P^2) for N picks of P shown; about 6 rounds.
        """
        from palate.living.positions import fitted

        return fitted(cls, histories, population, level, std=std, max_rounds=max_rounds, tolerance=tolerance, seed=seed)

    def bias(self, n: int) -> Floats:
        """(n,) log-odds of the first n positions."""
        return _lengthened(self.log_odds, n, 0.0)

    def depths(self, utilities: Floats, picked: int, examined: int | None = None) -> list[tuple[int, float]]:
        """(how many were looked at, probability) given what was picked; those below `NEGLIGIBLE` are left out.

        Args:
            utilities: (n,) rewards plus the log-odds of the positions, in the order shown.
            picked: row of the pick.
            examined: how many were looked at, where that is known.
        """
        n = len(utilities)
        if examined is not None:
            return [(examined, 1.0)]
        reach = _lengthened(self.reach, n, 1.0)
        looked = (reach - np.append(reach[1:], 0.0))[picked:]
        with np.errstate(divide="ignore"):
            log = np.log(looked) - np.logaddexp.accumulate(utilities)[picked:]
        if not np.isfinite(log).any():  # a pick from where, by what was learned, nobody looks: they saw it all
            return [(n, 1.0)]
        share = np.exp(log - log.max())
        share /= share.sum()
        kept = np.flatnonzero(share >= NEGLIGIBLE)
        total = share[kept].sum()
        return [(picked + 1 + int(d), float(share[d] / total)) for d in kept]


def _lengthened(values: Sequence[float], n: int, otherwise: float) -> Floats:
    """The first n of `values`, its last one repeated where it is shorter."""
    out = np.full(n, values[-1] if len(values) else otherwise)
    out[: len(values)] = values[:n]
    return out
