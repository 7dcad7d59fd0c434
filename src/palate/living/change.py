"""Whether a user's taste has moved, and since when.

For a choice t of n, the Bayes factor of "another taste since t" against "one taste" is

    BF_t = Z(1 .. t - 1) Z(t .. n) / Z(1 .. n),

with Z the (Laplace) evidence of choices under the prior and the population's flip rates: two people drawn from the population
explain the two parts better than one explains both. Their sum over t is the Shiryaev-Roberts statistic. While nothing moves, it
less n is a martingale, so an alarm at a sum of A comes, on average, no earlier than after A choices (Pollak 1985). Where only
some t are tried the sum is smaller and the bound still holds; it is as good as the prior and Laplace's method.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.special import logsumexp

from palate.errors import DataError
from palate.living import solver
from palate.living.flips import Flips
from palate.living.history import History
from palate.living.problem import Components

if TYPE_CHECKING:
    from palate.living.population import View

CANDIDATES = 32


class Change(NamedTuple):
    """What a history says about a change of taste.

    Attributes:
        moved: whether `evidence` reached the logarithm of the run length that was asked for.
        evidence: log of the sum of Bayes factors over all candidates, in nats; -inf where there is none.
        when: the event with which another taste most likely began, None where there is no candidate.
        at: its time in unix seconds, None where it has none.
        log_bayes_factor: of a change at `when` against none.
    """

    moved: bool
    evidence: float
    when: str | None
    at: float | None
    log_bayes_factor: float


def changed(
    history: History, prior: Components, view: "View", flips: Flips, run_length: float = 1000.0, candidates: int = CANDIDATES
) -> Change:
    """See `LiveProfile.change`. At most so many candidates are tried: all of the latest choices, then ever fewer.

    Cost: 2 solves a candidate and flip rate, side by side: about 10 ms for 200 choices of people who do not err.
    """
    if not run_length >= 1:
        raise DataError(f"run_length is {run_length}; expected a number of choices of at least 1")
    order = history.in_order()
    event = history.event[order]
    first = np.flatnonzero(np.diff(event)) + 1  # an event is one decision: what it says is not divided
    if not len(first):
        return Change(False, -math.inf, None, None, -math.inf)
    if len(first) > candidates:  # a change is found soonest if looked for near the end
        back = np.unique(np.geomspace(1, len(first), candidates).round().astype(np.int64))
        first = first[len(first) - back]
    place = np.arange(len(order))
    later = np.zeros((len(first), len(order)))
    later[:, order] = place >= first[:, None]
    rows = view.rows(history.rows)
    rates, shares = np.asarray(flips.rates), np.log(flips.shares)[:, None]
    whole = solver.erring(rows, prior, rates)
    versions = np.concatenate([later, 1 - later, np.zeros((1, len(order)))])
    start = np.repeat(whole.u[:1], len(versions), axis=0)  # nearer to most of them than the prior's means
    evidence = solver.erring(rows, prior, rates, versions, start).split(len(rates)).log_evidence  # (G, V, M)
    parts = logsumexp(evidence + shares[..., None], axis=(0, 2))
    one = logsumexp(whole.log_evidence + shares)
    since, before, none = np.split(parts, [len(first), 2 * len(first)])
    factor = since + before - one - none
    best, total = int(factor.argmax()), float(logsumexp(factor))
    name = int(event[first[best]])
    at = float(history.at[name])
    return Change(total >= math.log(run_length), total, history.ids[name], None if math.isnan(at) else at, float(factor[best]))
