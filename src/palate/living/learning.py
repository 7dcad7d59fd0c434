"""How fast tastes move and how often people err, learned from seen users' own later choices. A test split never comes here.

Every user's choices are gone through in their order. At a few stages the weights are solved from what came before, under every
half-life or flip rate that is tried, side by side, and predict the choices up to the next stage (prequential log loss, Dawid
1984). Never forgetting, and never erring, are left only for something that is better by more than one standard error over users.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit, logsumexp

from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.living import solver
from palate.living.flips import RATES, Flips
from palate.living.history import Forgetting
from palate.living.population import Population
from palate.living.rows import Rows
from palate.living.solver import Posterior
from palate.living.terms import Floats, Ints
from palate.models.base import RewardModel

STAGES = 10  # of a user, evenly spaced
MOST = 200  # users, evenly spaced among all: enough to see what pays
FEWEST = 4  # choices of a user who says anything about it
HALF_LIVES = (5.0, 10.0, 20.0, 40.0, 80.0, 160.0)  # in choices
OF_A_HISTORY = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)  # half-lives in time, as shares of the users' median span
MEANS, STRENGTHS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3), (3.0, 12.0)


class Tried(NamedTuple):
    """One candidate: its log loss of later choices, in nats, mean over users, and by how much it beats the plain one."""

    candidate: float | Flips
    log_loss: float
    gain: float
    error: float  # standard error of the gain, over users


class HalfLife(NamedTuple):
    """What `learn_half_life` chose: None is never. `in_time`: whether it is in seconds or in later choices."""

    value: float | None
    in_time: bool
    curve: tuple[Tried, ...]

    @property
    def forgetting(self) -> Forgetting:
        return Forgetting(self.value, None) if self.in_time else Forgetting(None, self.value)


class FlipRate(NamedTuple):
    """What `learn_flip_rate` chose."""

    flips: Flips
    curve: tuple[Tried, ...]


def learn_half_life(
    model: RewardModel,
    data: EmbeddedPairs,
    *,
    at: Any = None,
    half_lives: Sequence[float] | None = None,
    flip_rate: float | Flips = 0.0,
) -> HalfLife:
    """After how long a choice should weigh half as much, by how well users' earlier choices then predict their later ones.

    Args:
        model: a fitted model with a prior.
        data: choices of seen users, each user's in their order where `at` is None.
        at: (P,) unix seconds of the choices. Then half-lives are in seconds, else in later choices of the same user.
        half_lives: what is tried beside never; by default `HALF_LIVES`, or shares of the users' median time from first to last.
        flip_rate: as for `Population.of`.

    Raises:
        DataError: no user with `FEWEST` choices, a method without a prior, times that are not finite, or a half-life not above 0.
    Cost: about 30 ms a user of 40 choices and 8 weights and type of the mixture, for at most `MOST` users.
    """
    population = Population.of(model, flip_rate=flip_rate)
    users = list(_users(population, data, at))
    if half_lives is None:
        half_lives = HALF_LIVES if at is None else _spans([user.age[-1] - user.age[0] for user in users])
    for value in half_lives:
        Forgetting(value).check()
    tried = (np.inf, *(float(value) for value in half_lives))
    losses = np.asarray([_forgetting_losses(population, user, np.asarray(tried)) for user in users])
    curve = _curve(tried, losses)
    best = _best(curve)
    return HalfLife(None if best is curve[0] else float(np.asarray(best.candidate)), at is not None, curve)


def learn_flip_rate(
    model: RewardModel,
    data: EmbeddedPairs,
    *,
    at: Any = None,
    forgetting: Forgetting | None = None,
) -> FlipRate:
    """How often people err, by how well earlier choices then predict later ones: one rate for everybody, or a distribution.

    Args:
        model, data, at: as for `learn_half_life`.
        forgetting: how choices age, where they do.

    Raises:
        DataError: as `learn_half_life`.
    Cost: as `learn_half_life`.
    """
    population, ageing = Population.of(model), Forgetting() if forgetting is None else forgetting
    ageing.check()
    candidates = [Flips(), *(Flips.of(rate) for rate in RATES[1:])]
    candidates += [Flips.beta(mean, strength) for mean in MEANS for strength in STRENGTHS]
    shares = np.zeros((len(candidates), len(RATES)))
    for row, flips in zip(shares, candidates, strict=True):
        row[[RATES.index(rate) for rate in flips.rates]] = flips.shares
    losses = np.asarray([_flip_losses(population, user, shares, ageing) for user in _users(population, data, at)])
    curve = _curve(candidates, losses)
    best = _best(curve).candidate
    return FlipRate(best if isinstance(best, Flips) else Flips.of(best), curve)


# -- one user's later choices


class _User(NamedTuple):
    """The choices of one user from the first to the last."""

    user_id: str
    rows: Rows  # a pair each
    age: Floats  # (n,) seconds or numbers of choices, ascending
    stages: Ints  # (S,) how many choices are known at each stage; the last ends the last block
    timed: bool  # whether ages are seconds

    def known(self) -> Floats:
        """(S - 1, n) 1 for the choices before each stage."""
        return (np.arange(len(self.age)) < self.stages[:-1, None]).astype(np.float64)

    def block(self) -> Ints:
        """(n - first stage,) the stage from which each later choice is predicted."""
        return np.repeat(np.arange(len(self.stages) - 1), np.diff(self.stages))

    def passed(self) -> Floats:
        """(S - 1, n) how old each choice is at each stage: when the next one is made, or counted from the last that is known."""
        now = self.age[self.stages[:-1] - (0 if self.timed else 1), None]
        return np.maximum(now - self.age, 0.0)


def _users(population: Population, data: EmbeddedPairs, at: Any) -> Iterator[_User]:
    times = None if at is None else np.asarray(at, dtype=np.float64)
    if times is not None and (times.shape != (len(data),) or not np.isfinite(times).all()):
        raise DataError(f"at has shape {times.shape} for {len(data)} choices; expected finite unix seconds, one a choice")
    rows, grouped = Rows.of(population.terms(data)), data.grouped()
    order, edges = grouped.order.cpu().numpy(), grouped.offsets.tolist()
    told = [user for user, (first, last) in enumerate(pairwise(edges)) if last - first >= FEWEST]
    if not told:
        raise DataError(f"none of the {len(data.user_ids)} users has {FEWEST} choices; expected some with earlier and later ones")
    for place in np.unique(np.linspace(0, len(told) - 1, MOST).round().astype(np.int64)).tolist():
        user = told[place]
        mine = order[edges[user] : edges[user + 1]]
        if times is not None:
            mine = mine[np.argsort(times[mine], kind="stable")]
        n = len(mine)
        stages = np.unique(np.linspace(n // 4, n, min(STAGES, n - n // 4) + 1).round().astype(np.int64))
        age = np.arange(n, dtype=np.float64) if times is None else times[mine]
        yield _User(data.user_ids[user], rows.only(mine, slice(0, 0)), age, stages[stages > 0], times is not None)


def _spans(lengths: Sequence[float]) -> tuple[float, ...]:
    typical = float(np.median(lengths))
    if not typical > 0:
        raise DataError("the choices of a typical user are all of one moment; expected times that differ, or at=None")
    return tuple(share * typical for share in OF_A_HISTORY)


def _forgetting_losses(population: Population, user: _User, half_lives: Floats) -> Floats:
    """(H,) mean log loss of the user's later choices under each half-life."""
    known, passed = user.known(), user.passed()
    weight = (known * np.exp2(-passed / half_lives[:, None, None])).reshape(-1, known.shape[1])  # (H S, n)
    rates, shares = np.asarray(population.flips.rates), np.asarray(population.flips.shares)
    found = _solved(population, user, rates, weight)
    return np.asarray(-_log_probability(user, found, rates, shares[None])[0].mean(-1))


def _flip_losses(population: Population, user: _User, shares: Floats, forgetting: Forgetting) -> Floats:
    """(C,) mean log loss of the user's later choices under each distribution of flip rates (C, G)."""
    weight, rates = user.known(), np.asarray(RATES)
    if forgetting.seconds is not None:
        weight = weight * np.exp2(-user.passed() / forgetting.seconds)
    if forgetting.choices is not None:
        count = np.arange(weight.shape[1])
        weight = weight * np.exp2(-np.maximum(user.stages[:-1, None] - 1 - count, 0) / forgetting.choices)
    found = _solved(population, user, rates, weight)
    return np.asarray(-_log_probability(user, found, rates, shares)[:, 0].mean(-1))


def _solved(population: Population, user: _User, rates: Floats, weight: Floats) -> Posterior:
    """Posteriors (G, V, M, ...) for V versions of the weights."""
    prior = population.components(user.user_id)
    found = solver.erring(population.view.rows(user.rows), prior, rates, weight)
    return found.split(len(rates))


def _log_probability(user: _User, found: Posterior, rates: Floats, shares: Floats) -> Floats:
    """(C, H, choices) log probability of later choices, under C distributions of flip rates, from H versions of every stage.

    Under a component and a rate e it is e + (1 - 2 e) sigma(`likelihood.damped` margin); they are mixed by their posterior.
    """
    first, stages = int(user.stages[0]), len(user.stages) - 1
    offset, slopes, target = user.rows.offset[first:], user.rows.slopes[first:], user.rows.target[first:]
    mean, spread, log_evidence = (  # (G, H, S, M ...)
        column.reshape(len(rates), -1, stages, *column.shape[2:]) for column in (found.mean, found.covariance, found.log_evidence)
    )
    along, across = [], []
    for stage, (start, stop) in enumerate(pairwise((user.stages - first).tolist())):  # no covariance is copied for its choices
        z = slopes[start:stop]
        along.append(np.einsum("ghmk,nk->ghnm", mean[:, :, stage], z))
        across.append(np.einsum("ghmkl,nk,nl->ghnm", spread[:, :, stage], z, z))
    margin, variance = offset[:, None] + np.concatenate(along, axis=2), np.concatenate(across, axis=2)
    damped = margin / np.sqrt(1 + np.pi / 8 * np.maximum(variance, 0))
    rate = rates[:, None, None, None]
    won, lost = rate + (1 - 2 * rate) * expit(damped), rate + (1 - 2 * rate) * expit(-damped)
    with np.errstate(divide="ignore"):
        log_share = np.log(shares)[:, :, None, None, None] + log_evidence[:, :, user.block()]  # (C, G, H, n, M)
        said = np.log(np.maximum((won, lost), 1e-300))
    norm = logsumexp(log_share, axis=(1, 4))
    t = target[:, None]
    of_won, of_lost = (logsumexp(log_share + side, axis=(1, 4)) - norm for side in said)
    return np.asarray(t[:, 0] * of_won + (1 - t[:, 0]) * of_lost)


# -- the choice


def _curve(candidates: Sequence[Any], losses: Floats) -> tuple[Tried, ...]:
    """From losses (U, C) whose first column is the plain candidate."""
    gain = losses[:, :1] - losses
    error = gain.std(0, ddof=1) / len(losses) ** 0.5 if len(losses) > 1 else np.full(losses.shape[1], np.inf)
    columns = losses.mean(0).tolist(), gain.mean(0).tolist(), error.tolist()
    return tuple(Tried(*row) for row in zip(candidates, *columns, strict=True))


def _best(curve: Sequence[Tried]) -> Tried:
    """The lowest loss, if it beats the first candidate by more than one standard error."""
    best = min(curve, key=lambda tried: tried.log_loss)
    return best if best.gain > best.error else curve[0]
