"""How `Exposure.fit` learns what positions do, from picks of many people whose tastes are not known either."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from palate.errors import ConvergenceError, DataError
from palate.living.terms import Floats, Ints, Rewards

if TYPE_CHECKING:
    from palate.living.events import Picked
    from palate.living.exposure import Exposure
    from palate.living.population import Population
    from palate.living.reading import Level

DRAWS = 8  # of a person's weights, and as many mirror images
SORTED = 0.99  # of neighbours by the crowd's reward: an order that says nothing of positions
NOWHERE = -1e30  # utility of a response that is not there
LOWEST = -300.0  # log-odds below the best one: nothing, and the exponential of twice its negative is still a number

Histories = Mapping[str, "Sequence[tuple[Picked, Rewards]]"]


class _Picks(NamedTuple):
    """N picks of up to P shown, padded."""

    user: Ints  # (N,)
    offset: Floats  # (N, P), NOWHERE beyond what was shown
    slopes: Floats  # (N, P, K)
    shown: Ints  # (N,)
    picked: Ints  # (N,)
    examined: Ints  # (N,), 0 where it is not known

    @classmethod
    def of(cls, histories: Histories, k: int) -> "_Picks":
        events = [(u, *event) for u, history in enumerate(histories.values()) for event in history]
        n, p = len(events), max((len(pick.shown) for _, pick, _ in events), default=0)
        offset, slopes = np.full((n, p), NOWHERE), np.zeros((n, p, k))
        for row, (_, pick, rewards) in enumerate(events):
            m = len(pick.shown)
            if rewards.offset.shape != (m,) or rewards.slopes.shape != (m, k):
                raise DataError(f"pick {row} has rewards {rewards.slopes.shape}; expected ({m}, {k}), a row for each shown")
            offset[row, :m], slopes[row, :m] = rewards.offset, rewards.slopes
        columns = ((u, len(pick.shown), pick.picked, pick.examined or 0) for u, pick, _ in events)
        user, shown, picked, examined = np.array(list(columns), dtype=np.int64).reshape(n, 4).T
        return cls(user, offset, slopes, shown, picked, examined)

    def depth_odds(self, reach: Floats) -> Floats:
        """(N, P) log P(D = d + 1), before the pick is seen: certain where it is known, no deeper than what was shown."""
        n, p = self.offset.shape
        place = np.arange(1, p + 1)
        looked = np.broadcast_to(reach - np.append(reach[1:], 0.0), (n, p)).copy()
        last = place == self.shown[:, None]
        looked[last] = reach[self.shown - 1]
        looked[place > self.shown[:, None]] = 0
        known = self.examined > 0
        looked[known] = place == self.examined[known, None]
        looked[np.arange(1, p + 1) <= self.picked[:, None]] = 0  # what was picked was looked at
        lost = looked.sum(1) == 0
        looked[lost] = last[lost]
        with np.errstate(divide="ignore"):
            odds: Floats = np.log(looked)
        return odds


def fitted(
    kind: "type[Exposure]",
    histories: Histories,
    population: "Population",
    level: "Level",
    *,
    std: float,
    max_rounds: int,
    tolerance: float,
    seed: int,
) -> "Exposure":
    """See `Exposure.fit`."""
    picks = _Picks.of(histories, len(level.slopes))
    if not len(picks.user):
        raise DataError("0 picks to learn positions from; expected some hundred of them, of lists in varying orders")
    _check_varied(histories, picks, level)
    p = picks.offset.shape[1]
    reach = _reach(picks)
    odds = picks.depth_odds(np.ones(p) if reach is None else reach)
    normal = np.random.default_rng(seed).standard_normal((len(histories), DRAWS, len(level.slopes)))
    normal = np.concatenate([normal, -normal], axis=1)
    own = np.eye(p - 1) / std**2
    bias, near = np.zeros(p), np.tile(np.array(level.crowd), (len(histories), 1))
    for _ in range(max_rounds):
        exposure = kind(log_odds=tuple(bias.tolist()), reach=() if reach is None else tuple(reach.tolist()))
        weights = _draws(histories, population, exposure, level, normal, near)
        near = weights.mean(1)
        slope = _slope(picks.offset[..., None] + np.einsum("npk,nsk->nps", picks.slopes, weights[picks.user]), picks, odds, bias)
        information = slope.observed + own
        if np.linalg.eigvalsh(information)[0] <= np.diag(own).min(initial=0.0) / 2:  # far from the answer: the safe step of EM
            information = slope.complete + own
        step = np.linalg.solve(information, slope.score - own @ bias[1:])
        bias = bias + np.append(0.0, np.clip(step, -1.0, 1.0))
        if np.abs(step).max(initial=0.0) < tolerance:
            break
    else:
        raise ConvergenceError(
            f"the positions still move by {np.abs(step).max():.2g} log-odds after {max_rounds} rounds; "
            "give more picks, or a larger tolerance"
        )
    error = (0.0, *np.sqrt(np.diag(np.linalg.inv(information))).tolist())
    return kind(log_odds=tuple(bias.tolist()), std=error, reach=exposure.reach, n_picks=len(picks.user))


def _check_varied(histories: Histories, picks: _Picks, level: "Level") -> None:
    places: dict[tuple[object, str], set[int]] = {}
    for pick, _ in (event for history in histories.values() for event in history):
        for place, text in enumerate(pick.shown):
            places.setdefault((pick.prompt, text), set()).add(place)
    if len(places) < picks.shown.sum() and all(len(found) == 1 for found in places.values()):
        raise DataError(
            f"each of {len(places)} responses was always shown at one place, so position and taste cannot be told apart; "
            "expected the order to vary: shuffle it for some people"
        )
    crowd = picks.offset + picks.slopes @ np.array(level.crowd)
    there = np.arange(1, crowd.shape[1]) < picks.shown[:, None]
    falls = np.diff(crowd, axis=1)[there]
    falling, rising = float((falls <= 0).mean()), float((falls >= 0).mean())
    if max(falling, rising) >= SORTED and falling != rising:
        raise DataError(
            f"{max(falling, rising):.0%} of neighbours were shown in the order of the crowd's reward, so position and taste "
            "cannot be told apart; expected the order to vary: shuffle it for some people"
        )


def _reach(picks: _Picks) -> Floats | None:
    """(P,) product-limit estimate of how far people look, from those who are known to; None where nobody is."""
    known = picks.examined > 0
    if not known.any():
        return None
    looked, shown = picks.examined[known, None], picks.shown[known, None]
    place = np.arange(1, picks.offset.shape[1])
    could = ((looked >= place) & (shown > place)).sum(0)  # had the next one before them
    went = ((looked > place) & (shown > place)).sum(0)
    on = np.where(could > 0, went / np.maximum(could, 1), 1.0)
    return np.concatenate([[1.0], np.cumprod(on)])


def _draws(
    histories: Histories, population: "Population", exposure: "Exposure", level: "Level", normal: Floats, near: Floats
) -> Floats:
    """(U, S, K) weights from every person's posterior under this exposure; depths are judged at the weights `near` (U, K)."""
    out = np.empty_like(normal)
    for u, (user, history) in enumerate(histories.items()):
        said = [pick.terms(rewards, exposure=exposure, level=level, near=near[u]) for pick, rewards in history]
        live = population.start(user).after(said)
        if live.covariance is None:
            raise DataError("the method has no uncertainty of its weights; learn positions with one that has a prior")
        values, vectors = np.linalg.eigh(live.covariance)
        out[u] = live.mean + normal[u] * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
    return out


class _Slope(NamedTuple):
    """Of the marginal log-likelihood by the log-odds of all positions but the first."""

    score: Floats  # (P - 1,)
    observed: Floats  # (P - 1, P - 1) information, of what is seen
    complete: Floats  # (P - 1, P - 1) information, had the people's weights and depths been seen too


def _slope(utilities: Floats, picks: _Picks, odds: Floats, bias: Floats) -> _Slope:
    """At `bias` (P,), with utilities (N, P, S) under S draws of the people's weights.

    With C_d = log sum_{i <= d} exp(v_i) and responsibilities r_d of the depths, both by cumulative sums: pbar_i = exp(v_i)
    sum_{d >= i} r_d exp(-C_d) is how likely each would have been picked, and the score of a pick is 1(i = picked) - pbar_i
    (Fisher's identity). The complete information is diag(pbar) - sum_d r_d p_d p_d^T; Louis's identity takes from it the
    covariance of the complete data's score: over depths within a pick, and over draws within a person.
    """
    n, p, draws = utilities.shape
    value = utilities + bias[:, None]
    value = np.maximum(value - value.max(1, keepdims=True), LOWEST)
    norm = np.logaddexp.accumulate(value, axis=1)
    share = odds[..., None] - norm
    share = np.exp(share - share.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    there = np.exp(value)
    expected = there * _from_here_on(share * np.exp(-norm))  # pbar (N, P, S)
    twice = _from_here_on(share * np.exp(-2 * norm))
    score = -expected
    score[np.arange(n), picks.picked] += 1
    outer = np.empty((p, p))
    for i in range(p):  # r_d p_d p_d^T has depths d >= max(i, k)
        outer[i, : i + 1] = outer[: i + 1, i] = ((there[:, i] * twice[:, i])[:, None] * there[:, : i + 1]).sum((0, 2)) / draws
    complete = np.diag(expected.sum((0, 2)) / draws) - outer
    over_depths = outer - np.einsum("nis,nks->ik", expected, expected) / draws
    by_person = np.zeros((int(picks.user.max()) + 1, p, draws))
    np.add.at(by_person, picks.user, score)
    away = by_person - by_person.mean(2, keepdims=True)
    over_draws = np.einsum("uis,uks->ik", away, away) / (draws - 1)
    observed = complete - over_depths - over_draws
    return _Slope((score.sum((0, 2)) / draws)[1:], observed[1:, 1:], complete[1:, 1:])


def _from_here_on(depths: Floats) -> Floats:
    """Sums over all depths from each one on, (N, P, S)."""
    sums: Floats = np.cumsum(depths[:, ::-1], axis=1)[:, ::-1]
    return sums
