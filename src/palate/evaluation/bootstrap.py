"""How sure: bootstrap intervals over users who recur from split to split.

The same person is tested under several seeds, so the users of different seeds are not independent and pooling them would make
every interval too narrow. Users and seeds are crossed and resampled each for itself, a resampled person keeping their place in
every seed: the pigeonhole bootstrap of Owen (2007, Annals of Applied Statistics 1, 386-411), which errs on the wide side.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from palate.errors import DataError
from palate.evaluation.metrics import Floats, Ints, n_worst

RESAMPLES = 2000
LEVEL = 0.95

# (users' draws (B, U), the values of the seed's users (U,)) -> statistic (B,)
Statistic = Callable[[Floats, Floats], Floats]


class Estimate(NamedTuple):
    """A figure with its percentile interval."""

    value: float
    low: float
    high: float
    n_users: int  # distinct
    n_seeds: int
    level: float = LEVEL

    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


class Seed(NamedTuple):
    """The users of one seed: their numbers among all users, and one or two columns of values to compare, (U,) each."""

    users: Ints
    values: Floats
    baseline: Floats | None


def mean(draws: Floats, values: Floats) -> Floats:
    """Mean over the resampled users, (B,); NaN where none of the seed's users was drawn."""
    with np.errstate(invalid="ignore"):
        return np.asarray((draws @ values) / draws.sum(1))


def worst(share: float) -> Statistic:
    """Mean over the worst `share` of the resampled users."""

    def statistic(draws: Floats, values: Floats) -> Floats:
        order = np.argsort(values, kind="stable")
        drawn = draws[:, order]
        upto = np.cumsum(drawn, axis=1)
        k = np.asarray([n_worst(int(n), share) for n in upto[:, -1]], dtype=np.float64)
        taken = np.clip(k[:, None] - (upto - drawn), 0, drawn)
        with np.errstate(invalid="ignore"):
            return np.asarray((taken @ values[order]) / taken.sum(1))

    return statistic


def interval(seeds: Sequence[Seed], statistic: Statistic, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean over seeds of `statistic`, or of its difference to the baseline's, with a 95 % percentile interval.

    With one seed it is the ordinary bootstrap over users. Raises `DataError` without users. O(resamples x users x seeds).
    """
    if not seeds or not all(len(one.users) for one in seeds):
        raise DataError("no users to resample; expected at least one user in every seed")
    known, place = np.unique(np.concatenate([one.users for one in seeds]), return_inverse=True)
    places = np.split(place, np.cumsum([len(one.users) for one in seeds])[:-1])

    def per_seed(draws: Floats, number: int) -> Floats:
        one, mine = seeds[number], draws[:, places[number]]
        value = statistic(mine, one.values)
        return value if one.baseline is None else value - statistic(mine, one.baseline)

    everybody = np.ones((1, len(known)))
    value = float(np.mean([per_seed(everybody, s)[0] for s in range(len(seeds))]))
    rng = np.random.default_rng([seed, len(known), len(seeds)])
    step = max(1, 2**22 // len(known))
    found = []
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        picked = rng.integers(len(known), size=(size, len(known))) + len(known) * np.arange(size)[:, None]
        draws = np.bincount(picked.ravel(), minlength=size * len(known)).reshape(size, -1).astype(np.float64)
        of_seed = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=size).astype(np.float64)
        values = np.stack([per_seed(draws, s) for s in range(len(seeds))], axis=1)
        of_seed[np.isnan(values)] = 0  # a seed of very few users, none of whom was drawn
        with np.errstate(invalid="ignore"):
            found.append((np.nan_to_num(values) * of_seed).sum(1) / of_seed.sum(1))
    low, high = np.nanquantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), len(known), len(seeds))
