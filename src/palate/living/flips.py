"""People err: with some probability a choice is turned round, and nobody knows whose are.

P(chosen) = e + (1 - 2 e) sigma(m) with flip rate e (a choice made blindly with probability 2 e). A population has a distribution
of flip rates on a grid; a user's own is a posterior over it, weighed by the evidence of the choices like the types of a mixture
(MacKay 2003, ch. 28). That is what contradictory choices do: they raise the probability of a high flip rate, under which every
choice says less.
"""

import math
from typing import NamedTuple, Self

import numpy as np
from scipy.stats import beta

from palate.errors import DataError

RATES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.49)
NEGLIGIBLE = 1e-3


class Flips(NamedTuple):
    """G flip rates in [0, 1/2) with the share of the users who have each of them."""

    rates: tuple[float, ...] = (0.0,)
    shares: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, rate: "float | Flips") -> Self:
        """A rate that everybody has, or a distribution as it is. Raises `DataError` outside [0, 1/2)."""
        out = cls(*rate) if isinstance(rate, Flips) else cls((float(rate),), (1.0,))
        if len(out.rates) != len(out.shares) or not out.rates or not all(0 <= e < 0.5 for e in out.rates):
            raise DataError(f"flip rates are {out.rates}; expected numbers from 0 to below 0.5, with a share for each")
        if not (all(share > 0 for share in out.shares) and math.isclose(sum(out.shares), 1, abs_tol=1e-6)):
            raise DataError(f"shares of flip rates are {out.shares}; expected positive numbers that sum to 1")
        return out

    @classmethod
    def beta(cls, mean: float, strength: float, *, careless: float = 0.02) -> Self:
        """2 e ~ Beta(2 mean strength, (1 - 2 mean) strength) as the mass around each of `RATES`, and some who hardly look.

        Args:
            mean: of e, for those who look.
            strength: how many choices that are known to be flipped or not this belief about a user's own rate is worth.
            careless: share of the users who choose nearly at random, with the last of `RATES`. Without them a user whose choices
                contradict each other for ever would end as one who surely finds everything equally good.

        Raises:
            DataError: a number outside its range.
        """
        if not 0 < mean < 0.5 or not strength > 0 or not 0 <= careless < 1:
            raise DataError(
                f"flip rates of mean {mean}, strength {strength} and {careless} careless; expected a mean between 0 and 0.5, a "
                "strength above 0 and a share below 1"
            )
        rates = np.asarray(RATES)
        edges = np.concatenate([[0.0], (rates[1:] + rates[:-1]) / 2, [0.5]])
        mass = np.diff(beta.cdf(2 * edges, 2 * mean * strength, (1 - 2 * mean) * strength))
        mass *= 1 - careless
        mass[-1] += careless
        kept = mass > NEGLIGIBLE
        return cls(tuple(rates[kept].tolist()), tuple((mass[kept] / mass[kept].sum()).tolist()))

    @property
    def mean(self) -> float:
        return float(np.dot(self.rates, self.shares))
