"""Live profiles: against `adapt`, against scipy on a flat loop, and against a planted truth that moves or errs."""

import json
import math
import tracemalloc
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save
from scipy.optimize import minimize
from scipy.special import expit, logsumexp

import palate
from palate.data.pairs import EmbeddedPairs
from palate.data.planted import Planted, two_groups
from palate.errors import DataError, MismatchError, ModelFileError
from palate.living import solver
from palate.living.flips import Flips
from palate.living.learning import _log_probability, _User, learn_flip_rate, learn_half_life
from palate.living.population import Population
from palate.living.problem import Components, Problem
from palate.living.profile import LiveProfile
from palate.living.rows import Rows
from palate.living.solver import Posterior
from palate.living.terms import Terms
from palate.models.base import RewardModel
from palate.models.factored import BradleyTerry, LoRe
from palate.models.hierarchical import Hierarchical
from palate.models.pal import PAL
from palate.priors import Prior
from palate.solvers import Batch, posterior

Floats = NDArray[np.float64]


def made(means: Any, factors: Any, share: Any = (1.0,), **options: Any) -> Hierarchical:
    """A model in float64 that reads K + 1 features: the crowd's margin, then one for each weight."""
    means, factors = torch.as_tensor(means, dtype=torch.float64), torch.as_tensor(factors, dtype=torch.float64)
    k = means.shape[1]
    whole = torch.eye(k + 1, dtype=torch.float64)
    numbers = {"direction": whole[0], "bases": whole[:, 1:], "means": means, "factors": factors}
    numbers |= {"share": torch.as_tensor(share, dtype=torch.float64), "frequencies": torch.zeros(k + 1, 0)}
    return Hierarchical(**options).like(numbers)


def gaussian(k: int = 3, seed: int = 0) -> Hierarchical:
    rng = np.random.default_rng(seed)
    return made(rng.standard_normal((1, k)), np.tril(rng.standard_normal((1, k, k))) + 1.5 * np.eye(k))


def types(k: int = 3, seed: int = 0) -> Hierarchical:
    rng = np.random.default_rng(seed)
    factors = np.tril(rng.standard_normal((3, k, k))) / 2 + np.eye(k)
    return made(2 * rng.standard_normal((3, k)), factors, (0.5, 0.3, 0.2))


def blend(k: int = 3) -> Hierarchical:
    prior = Prior.blend(torch.full((k,), 1 / k, dtype=torch.float64))
    return made(prior.means, prior.factors, blend=True)


def sharp(k: int = 3) -> Hierarchical:
    prior = Prior.blend(torch.full((k,), 1 / k, dtype=torch.float64))
    return made(prior.means, prior.factors, blend=True, sharpness=2.5)


MODELS: dict[str, Callable[[], Hierarchical]] = {"gaussian": gaussian, "types": types, "blend": blend, "sharp": sharp}


def choices(n: int, k: int = 3, seed: int = 0, user: str = "ada", ties: bool = True) -> EmbeddedPairs:
    rng = np.random.default_rng(seed)
    table = torch.from_numpy(rng.standard_normal((2 * n, k + 1)))
    tie = rng.random(n) < 0.2 * ties
    return EmbeddedPairs(table, range(0, 2 * n, 2), range(1, 2 * n, 2), [user] * n, tie=tie, weight=rng.uniform(0.3, 2, n))


def ranked(k: int = 3, seed: int = 0, sizes: tuple[int, ...] = (3, 2, 5, 1, 4)) -> Terms:
    """Terms of several sizes with soft targets."""
    rng = np.random.default_rng(seed)
    start = np.cumsum((0, *sizes[:-1]))
    target = np.concatenate([rng.dirichlet(np.ones(m)) for m in sizes])
    target[: sizes[0]] = np.eye(sizes[0])[1]
    pulls = rng.standard_normal((2, k)), rng.standard_normal(2), np.array([0.5, 2.0])
    rows = rng.standard_normal((sum(sizes), k)), rng.standard_normal(sum(sizes)), target
    return Terms(*rows, start, rng.uniform(0.2, 2, len(sizes)), *pulls)


# -- the likelihood, term by term


def flat_loss(terms: Terms, w: Floats, flip: float = 0.0, weight: Floats | None = None) -> float:
    """Term by term and response by response, as the formulas have it."""
    total, edges = 0.0, [*terms.start.tolist(), len(terms.offset)]
    for t in range(len(terms.start)):
        rows = range(edges[t], edges[t + 1])
        u = [terms.offset[j] + float(terms.slopes[j] @ w) for j in rows]
        for j, of in zip(rows, u, strict=True):
            q = (1 - 2 * flip) * math.exp(of - float(logsumexp(u))) + 2 * flip / len(u)
            total -= terms.weight[t] * (1 if weight is None else weight[t]) * terms.target[j] * math.log(q)
    away = (terms.pulls @ w - terms.level) / terms.std
    return total + float(away @ away) / 2


@pytest.mark.parametrize("flip", [0.0, 0.2])
def test_loss_and_derivatives_of_terms(flip: float) -> None:
    terms, model = Terms.concat([ranked(), Terms.pairs([0.3, -1], [[1, 2, 0], [0, -1, 1]], tie=[False, True])]), gaussian()
    assert model.prior is not None
    prior = Components.of(model.prior)
    lapse = np.array([2 * flip]) if flip else None
    problem, rng = Problem(Rows.of(terms), prior, lapse=lapse), np.random.default_rng(1)

    def value(u: Floats) -> float:
        return flat_loss(terms, prior.means[0] + prior.factors[0] @ u, flip) + float(u @ u) / 2

    for u in rng.standard_normal((3, 3)):
        here = problem.at(u[None, None])
        assert here.value[0, 0] == pytest.approx(value(u), rel=1e-12)
        h, steps = 1e-5, 1e-5 * np.eye(3)
        slope = [(value(u + d) - value(u - d)) / (2 * h) for d in steps]
        np.testing.assert_allclose(here.gradient[0, 0], slope, rtol=1e-7, atol=1e-8)
        ahead, behind = (problem.at((u + sign * steps)[:, None, :].reshape(3, 1, 3)) for sign in (1, -1))
        np.testing.assert_allclose(here.hessian[0, 0], (ahead.gradient - behind.gradient)[:, 0] / (2 * h), rtol=1e-6, atol=1e-7)


def test_pairs_are_the_likelihood_of_the_library() -> None:
    rng = np.random.default_rng(0)
    offset, slopes, tie, weight = rng.standard_normal(5), rng.standard_normal((5, 3)), rng.random(5) < 0.5, rng.uniform(1, 2, 5)
    w = rng.standard_normal(3)
    margin = torch.from_numpy(offset + slopes @ w)
    ours = (palate.likelihood.nll(margin, torch.from_numpy(tie)) * torch.from_numpy(weight)).sum()
    assert flat_loss(Terms.pairs(offset, slopes, weight=weight, tie=tie), w) == pytest.approx(float(ours), rel=1e-12)


def test_rows_keep_what_terms_say() -> None:
    terms = ranked()
    again, w = Rows.of(terms).terms(), np.array([0.3, -1, 2.0])
    assert again.n_terms == terms.n_terms - 1  # the term of one response says nothing
    assert flat_loss(again, w) - flat_loss(terms, w) == pytest.approx(0, abs=1e-12)
    two = Terms.pairs([0.3, -1], [[1, 2, 0], [0, -1, 1]], tie=[False, True])
    offset, slopes, weight = Rows.of(two).broken()
    assert flat_loss(Terms.pairs(offset, slopes, weight=weight), w) == pytest.approx(flat_loss(two, w), rel=1e-12)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"target": np.full(15, 0.5)}, "sum to 1"),
        ({"weight": np.array([1, -1, 1, 1, 1.0])}, "at least 0"),
        ({"offset": np.full(15, np.nan)}, "finite"),
        ({"start": np.array([1, 3, 5, 10, 11])}, "start"),
        ({"std": np.zeros(2)}, "above 0"),
        ({"slopes": np.zeros((15, 4))}, "shapes"),
    ],
)
def test_what_no_term_can_be(change: dict[str, Any], says: str) -> None:
    live = Population.of(gaussian()).start("ada")
    with pytest.raises(DataError, match=says):
        live.update(ranked()._replace(**change))


# -- the batch answer


@pytest.mark.parametrize("kind", MODELS)
def test_one_choice_after_another_is_adapt(kind: str) -> None:
    model, data = MODELS[kind](), choices(30, seed=4)
    live = Population.of(model).start("ada")
    for row in np.random.default_rng(0).permutation(30).tolist():
        live = live.update(data[row : row + 1])
    batch = palate.adapt(model, data)["ada"]
    assert batch.covariance is not None
    np.testing.assert_allclose(live.mean, batch.mean, atol=1e-6)
    np.testing.assert_allclose(live.profile.mean, batch.mean, atol=1e-6)
    np.testing.assert_allclose(live.covariance, batch.covariance, atol=1e-6)
    assert (live.n_terms, live.n_events, live.converged, live.profile.model) == (30, 30, True, batch.model)


def test_a_fitted_model_in_float32() -> None:
    data, model = fitted()
    population, profiles = Population.of(model), palate.adapt(model, data.support)
    for user in data.support.user_ids[:20]:
        live = population.start(user).update(data.support.of_users([user]))
        np.testing.assert_allclose(live.mean, profiles[user].mean, atol=1e-5)  # adapt stops at 1e-5 standard deviations


@cache
def fitted() -> tuple[Planted, RewardModel]:
    data = two_groups(0, n_users=40, n_train=20, n_test=1, dim=16)
    return data, palate.fit(data.train, Hierarchical(4, bend=0, types=(), blend=False), seed=0)


def mode_by_scipy(terms: Terms, prior: Prior, flip: float = 0.0, start: Floats | None = None) -> Floats:
    """(K,) where a Gaussian posterior is highest: BFGS on the flat loop, from the prior's mean."""
    mean, precision = prior.means[0].numpy(), np.linalg.inv((prior.factors[0] @ prior.factors[0].T).numpy())

    def value(w: Floats) -> float:
        return flat_loss(terms, w, flip) + float((w - mean) @ precision @ (w - mean)) / 2

    first = mean if start is None else start
    found = minimize(value, first, method="BFGS", options={"gtol": 1e-9, "maxiter": 1000})
    return np.asarray(found.x)


@pytest.mark.parametrize("flip", [0.0, 0.1])
def test_several_responses_pulls_and_flips_against_scipy(flip: float) -> None:
    model, terms = gaussian(), Terms.concat([ranked(seed=1), ranked(seed=2)])
    assert model.prior is not None
    live = Population.of(model, flip_rate=flip).start("ada").update(terms)
    straight = mode_by_scipy(terms, model.prior)
    expected = mode_by_scipy(terms, model.prior, flip, straight)
    np.testing.assert_allclose(live.mean, expected, atol=1e-6)
    assert live.converged


class Step:
    """One thing that happens to a history: a choice, taking one back, or correcting one."""

    def __init__(self, kind: str, row: int, which: int):
        self.kind, self.row, self.which = kind, row, which


HISTORIES = st.lists(
    st.builds(
        Step, st.sampled_from(["update", "update", "update", "undo", "correct"]), st.integers(0, 39), st.integers(0, 10**6)
    ),
    min_size=1,
    max_size=25,
)


def lived(live: LiveProfile, data: Terms, steps: list[Step]) -> tuple[LiveProfile, list[int]]:
    """The profile after these steps, and the rows that are in it then."""
    inside: dict[str, int] = {}
    for step in steps:
        row = one(data, step.row)
        if step.kind == "update" or not inside:
            live = live.update(row)
            inside[live.event_ids[-1]] = step.row
            continue
        name = list(inside)[step.which % len(inside)]
        if step.kind == "undo":
            live = live.undo(name)
            del inside[name]
        else:
            live = live.correct(name, row)
            inside[name] = step.row
    return live, list(inside.values())


def one(terms: Terms, row: int) -> Terms:
    return Terms.pairs(terms.offset[2 * row : 2 * row + 1], terms.slopes[2 * row : 2 * row + 1], tie=terms.target[2 * row] == 0.5)


@given(HISTORIES, st.sampled_from(list(MODELS)), st.integers(0, 3))
@settings(max_examples=120)
def test_any_history_is_the_batch_of_what_is_left(steps: list[Step], kind: str, seed: int) -> None:
    model = MODELS[kind]()
    population = Population.of(model)
    data = population.terms(choices(40, seed=seed))
    live, rows = lived(population.start("ada"), data, steps)
    assert live.n_terms == len(rows)
    if not rows:
        np.testing.assert_array_equal(live.mean, model.crowd_weights)
        return
    rows.sort(reverse=True)  # another order than any in which they came
    assert model.prior is not None
    slopes, offset, target = (torch.from_numpy(column[::2][rows])[None] for column in data[:3])
    batch = Batch(slopes, offset, torch.ones_like(offset), target == 0.5)
    if kind == "sharp":
        batch = batch._replace(slopes=(slopes - 1.5 * offset[..., None]) / 2.5)
    solved = posterior(batch, model.prior, tolerance=1e-9)
    np.testing.assert_allclose(live.mean, solved.mean[0], atol=1e-6)
    assert solved.covariance is not None
    np.testing.assert_allclose(live.covariance, solved.covariance[0], atol=1e-6)


def test_an_event_comes_once_and_goes_once() -> None:
    live = Population.of(gaussian()).start("ada")
    blank = live.mean
    said = live.update(choices(3), event_id="a", at=5.0).update(Terms.empty(3), event_id="silence")
    assert (said.event_ids, said.n_terms) == (("a", "silence"), 3)
    with pytest.raises(DataError, match="came already"):
        said.update(choices(1), event_id="a")
    with pytest.raises(DataError, match="no event 'b'"):
        said.undo("b")
    with pytest.raises(DataError, match=r"choices of \['bob'\]"):
        said.update(choices(1, user="bob"))
    np.testing.assert_array_equal(said.undo("a").mean, blank)
    np.testing.assert_allclose(said.undo("a").update(choices(3), event_id="a").mean, said.mean, atol=1e-9)
    assert live.n_events == 0  # a value: nothing above changed it
    assert live.update(choices(1), event_id="event-1").update(choices(1)).event_ids == ("event-1", "event-2")


# -- other methods


def test_methods_without_a_prior_solve_as_adapt_does() -> None:
    data = fitted()[0]
    user = data.support.user_ids[3]
    mine = data.support.of_users([user])
    for method in (LoRe(3), BradleyTerry()):
        model = palate.fit(data.train, method, seed=0)
        live, expected = Population.of(model).start(user), palate.adapt(model, mine)[user]
        for row in range(len(mine)):
            live = live.update(mine[row : row + 1])
        np.testing.assert_allclose(live.mean, expected.mean, atol=1e-4)
        with pytest.raises(DataError, match="prior"):
            Population.of(model, flip_rate=0.1)
        with pytest.raises(DataError, match="prior"):
            live.change()


def test_what_has_no_live_profiles() -> None:
    with pytest.raises(DataError, match="not fitted"):
        Population.of(Hierarchical())
    data = fitted()[0]
    few = data.train.of_users(data.train.user_ids[:6])
    with pytest.raises(DataError, match="not linear"):
        Population.of(palate.fit(few, PAL(2), seed=0))


# -- forgetting


def test_old_choices_weigh_less_by_count_and_by_time() -> None:
    model, data = gaussian(), choices(6, ties=False)
    times = np.array([50.0, 0, 20, 20, 35, 10])
    terms = Population.of(model).terms(data)
    by_count = Population.of(model, half_life_choices=2.0).start("ada")
    by_time = Population.of(model, half_life=15.0).start("ada")
    both = Population.of(model, half_life=15.0, half_life_choices=2.0).start("ada")
    for row in range(6):
        by_count, by_time, both = (
            live.update(data[row : row + 1], at=times[row], event_id=f"{row}") for live in (by_count, by_time, both)
        )
    later = np.array([0, 5, 3, 2, 1, 4])  # how many came after each, by time and then by name
    for live, share in [
        (by_count, 2 ** (-later / 2.0)),
        (by_time, 2 ** ((times - 50) / 15)),
        (both, 2 ** (-later / 2.0 + (times - 50) / 15)),
        (by_time.at(65), 2 ** ((times - 65) / 15)),
        (by_time.at(3), 2 ** ((times - 50) / 15)),  # a clock that went back
    ]:
        assert model.prior is not None
        expected = mode_by_scipy(terms._replace(weight=terms.weight * share), model.prior)
        np.testing.assert_allclose(live.mean, expected, atol=2e-6)
    far = by_time.at(1e6)
    np.testing.assert_allclose(far.mean, model.prior.mean, atol=1e-9)
    np.testing.assert_allclose(far.covariance, model.prior.covariance, rtol=1e-9)
    with pytest.raises(DataError, match="has no time"):
        by_time.update(data[:1])
    silent = by_time.update(Terms.empty(3), event_id="silence")  # nothing of it is forgotten, so it needs no time
    np.testing.assert_allclose(silent.mean, by_time.mean, atol=1e-9)


def test_a_rating_of_ten_terms_ages_what_came_before_as_one_choice() -> None:
    population, rng = Population.of(gaussian(), half_life_choices=10.0), np.random.default_rng(0)
    rating = Terms.pairs(rng.standard_normal(10), rng.standard_normal((10, 3)))
    live = population.start("ada").update(choices(1)).update(rating, event_id="rating").update(Terms.empty(3))
    live = live.update(choices(2, seed=1))

    def shares(one: LiveProfile) -> Floats | None:
        return one.history.remembered(population.forgetting, None)

    expected = 2.0 ** -(np.array([3] + [2] * 10 + [1, 0]) / 10)
    again = population.from_bytes(live.to_bytes())
    for one in (live, again, live.undo("rating").update(rating, event_id="rating", at=None).correct("rating", choices(1))):
        assert one.n_choices == one.profile.n_pairs == 4
        if one.n_terms == live.n_terms:
            np.testing.assert_allclose(shares(one), expected)
        else:  # the rating came again at the end, and was a choice after all
            np.testing.assert_allclose(shares(one), 2.0 ** -(np.arange(4)[::-1] / 10))
    assert live.n_terms == 13
    one = Terms(np.ones((1, 3)), np.ones(1), np.ones(1), np.array([0]), np.ones(1), np.zeros((0, 3)), np.zeros(0), np.zeros(0))
    events, at_once, by_one = [rating, Terms.empty(3), one, rating], live.undo("rating"), live.undo("rating")
    for said in events:
        by_one = by_one.update(said)
    at_once = at_once.after(events)
    assert at_once.event_ids == by_one.event_ids
    assert at_once.n_choices == by_one.n_choices == 5
    np.testing.assert_allclose(shares(at_once), shares(by_one))
    np.testing.assert_allclose(at_once.mean, by_one.mean, atol=1e-8)


@pytest.mark.parametrize("wrong", [{"half_life": 0.0}, {"half_life_choices": -1.0}, {"flip_rate": 0.5}])
def test_numbers_outside_their_range(wrong: dict[str, float]) -> None:
    with pytest.raises(DataError, match="expected"):
        Population.of(gaussian(), **wrong)  # type: ignore[arg-type]


# -- erring


def contradictory(n: int) -> Terms:
    """The same pair, n times one way and n times the other."""
    slopes = np.tile([[1.0, 0.5, 0.0], [-1.0, -0.5, 0.0]], (n, 1))
    return Terms.pairs(np.zeros(2 * n), slopes)


def test_contradictory_choices_widen_what_is_known() -> None:
    flips, along = Flips.beta(0.05, 5.0), np.array([1.0, 0.5, 0.0])
    sure, wary = (Population.of(gaussian(), flip_rate=rate).start("ada") for rate in (0.0, flips))

    def deviation(live: LiveProfile) -> float:
        assert live.covariance is not None
        return float(np.sqrt(along @ live.covariance @ along))

    thin, wide = [], []
    rates = []
    for n in (2, 20, 200):
        thin.append(deviation(sure.update(contradictory(n))))
        wary_now = wary.update(contradictory(n))
        wide.append(deviation(wary_now))
        rates.append(wary_now.flip_rate)
    assert thin[2] < thin[0] / 4  # one over the root of the number of choices
    assert wide[2] > wide[0] / 2
    assert all(b > a for a, b in zip(thin, wide, strict=True))
    assert flips.mean < rates[0] < rates[1]


def test_an_outlier_moves_the_mean_less() -> None:
    rng, w = np.random.default_rng(0), np.array([2.0, -1.0, 0.5])
    slopes = rng.standard_normal((40, 3)) * 2
    slopes *= np.sign(slopes @ w)[:, None]  # never errs
    odd = 4 * -w[None]  # and then once, badly
    moved = []
    for rate in (0.0, 0.05, Flips.beta(0.05, 10.0)):
        live = Population.of(gaussian(), flip_rate=rate).start("ada").update(Terms.pairs(np.zeros(40), slopes))
        moved.append(float(np.linalg.norm(live.update(Terms.pairs([0.0], odd)).mean - live.mean)))
    assert moved[1] < moved[0] / 5
    assert moved[2] < moved[0] / 5


def test_flip_rates_of_a_population() -> None:
    flips = Flips.beta(0.1, 5.0)
    assert flips.mean == pytest.approx(0.98 * 0.1 + 0.02 * 0.49, abs=0.01)
    assert sum(flips.shares) == pytest.approx(1)
    assert Flips.of(0.2) == Flips((0.2,), (1.0,))
    for wrong in (
        lambda: Flips.beta(0.6, 1),
        lambda: Flips.of(Flips((0.1,), (0.5,))),
        lambda: Flips.of(Flips((0.1, 0.2), (1.0,))),
    ):
        with pytest.raises(DataError, match="expected"):
            wrong()


def test_flipped_solutions_do_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(3)
    parts = [Terms.pairs(rng.standard_normal(1), 3 * rng.standard_normal((1, 3))) for _ in range(15)]
    population, means = Population.of(types(), flip_rate=Flips.beta(0.15, 4.0)), []
    for order in (range(15), range(14, -1, -1), rng.permutation(15).tolist()):
        live = population.start("ada")
        for number in order:
            live = live.update(parts[number])
        means.append(live.mean)
    np.testing.assert_allclose(means[1], means[0], atol=1e-6)
    np.testing.assert_allclose(means[2], means[0], atol=1e-6)


# -- learned from seen users


def seen_users(n_users: int, n: int, *, moves: bool, errs: float, seed: int) -> EmbeddedPairs:
    """Users of `gaussian()` who choose; half-way everybody may become somebody else."""
    model, rng = gaussian(), np.random.default_rng(seed)
    table = rng.standard_normal((2 * n * n_users, 4)) * 2
    factor, mean = model.factors[0].numpy(), model.means[0].numpy()
    tastes = mean + rng.standard_normal((n_users, 2, 3)) @ factor.T
    part = (np.arange(n) >= n // 2) & moves
    w = tastes[:, part.astype(int)].reshape(-1, 3)
    margin = (table[::2, 0] - table[1::2, 0]) + ((table[::2, 1:] - table[1::2, 1:]) * w).sum(1)
    left = (rng.random(len(margin)) < 1 / (1 + np.exp(-margin))) ^ (rng.random(len(margin)) < errs)
    first, second = np.arange(0, len(table), 2), np.arange(1, len(table), 2)
    users = np.repeat([f"u{number:03d}" for number in range(n_users)], n)
    return EmbeddedPairs(torch.from_numpy(table), np.where(left, first, second), np.where(left, second, first), users)


def test_half_lives_are_learned_where_tastes_move() -> None:
    still = learn_half_life(gaussian(), seen_users(25, 40, moves=False, errs=0, seed=0), half_lives=(5.0, 20.0))
    assert still.value is None
    data = seen_users(25, 40, moves=True, errs=0, seed=0)
    moving = learn_half_life(gaussian(), data, half_lives=(8.0, 1e6))
    assert moving.value == 8.0
    assert moving.curve[2].gain == pytest.approx(0, abs=1e-4)  # so long that it is never
    # The same in time, a day a choice, whatever the order of the rows.
    shuffled = np.random.default_rng(0).permutation(len(data))
    at = 86_400.0 * np.tile(np.arange(40.0), 25)
    timed = learn_half_life(gaussian(), data[shuffled], at=at[shuffled], half_lives=(8 * 86_400.0,))
    assert (timed.value, timed.in_time) == (8 * 86_400.0, True)
    assert timed.forgetting.seconds == 8 * 86_400.0
    assert timed.curve[0].log_loss == pytest.approx(moving.curve[0].log_loss, rel=1e-9)
    with pytest.raises(DataError, match="none of the"):
        learn_half_life(gaussian(), choices(2))


def test_flip_rates_are_learned_where_people_err() -> None:
    clean = learn_flip_rate(gaussian(), seen_users(12, 30, moves=False, errs=0, seed=1))
    assert clean.flips.mean < 0.03
    noisy = learn_flip_rate(gaussian(), seen_users(12, 30, moves=False, errs=0.15, seed=1))
    assert 0.08 <= noisy.flips.mean <= 0.22


def test_later_choices_are_predicted_from_their_stage_without_a_covariance_each() -> None:
    """G = 2 rates, H = 3 versions, S = 5 stages, M = 2 components, C = 4 distributions of rates; 300 choices, one at a time."""
    rng, k = np.random.default_rng(0), 32
    stages, rates, shares = np.array([100, 130, 190, 250, 390, 400]), np.array([0.0, 0.2]), rng.dirichlet(np.ones(2), 4)
    choices = Terms.pairs(rng.standard_normal(400), rng.standard_normal((400, k)) / 4, tie=rng.random(400) < 0.3)
    user = _User("ada", Rows.of(choices), np.arange(400.0), stages, False)
    factor = np.tril(rng.standard_normal((2, 15, 2, k, k))) / 4
    covariance = factor @ factor.swapaxes(-1, -2)
    mean, evidence = rng.standard_normal((2, 15, 2, k)), rng.standard_normal((2, 15, 2))
    found = Posterior(mean, covariance, evidence, np.zeros_like(mean), np.ones((2, 15, 2), dtype=np.bool_))
    tracemalloc.start()
    said = _log_probability(user, found, rates, shares)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 3 * 300 * 2 * k**2 * 8 / 10  # a tenth of a covariance for every choice
    assert said.shape == (4, 3, 300)
    for choice in range(100, 400):
        z, target = user.rows.slopes[choice], user.rows.target[choice]
        versions = np.arange(3) * 5 + int(np.searchsorted(stages, choice, side="right")) - 1
        spread = np.einsum("ghmkl,k,l->ghm", covariance[:, versions], z, z)
        margin = (user.rows.offset[choice] + mean[:, versions] @ z) / np.sqrt(1 + np.pi / 8 * spread)
        share = shares[:, :, None, None] * np.exp(evidence[:, versions])
        share /= share.sum((1, 3), keepdims=True)
        e = rates[:, None, None]
        won, lost = ((share * (e + (1 - 2 * e) * expit(side))).sum((1, 3)) for side in (margin, -margin))
        np.testing.assert_allclose(said[..., choice - 100], target * np.log(won) + (1 - target) * np.log(lost), rtol=1e-9)


# -- a change of taste


def test_a_change_is_seen_and_dated() -> None:
    data = seen_users(6, 60, moves=True, errs=0, seed=5)
    still = seen_users(6, 60, moves=False, errs=0, seed=5)
    population, found, alarms = Population.of(gaussian()), [], 0
    for user in data.user_ids:
        live, other = population.start(user), population.start(user)
        mine, theirs = data.of_users([user]), still.of_users([user])
        for row in range(60):
            live = live.update(mine[row : row + 1], event_id=str(row), at=float(row))
            other = other.update(theirs[row : row + 1])
        change = live.change()
        alarms += other.change().moved
        if change.moved:
            assert change.when is not None
            assert change.at == float(change.when)
            found.append(int(change.when))
            fresh = live.since(change.when)
            assert fresh.n_events == 60 - int(change.when)
    assert len(found) >= 5
    assert np.median(np.abs(np.array(found) - 30)) <= 4
    assert alarms == 0
    nothing = population.start("ada").update(choices(1)).change()
    assert (nothing.moved, nothing.when) == (False, None)


def test_the_evidence_of_a_change_is_that_of_two_people() -> None:
    model, terms = types(), Population.of(types()).terms(choices(6, seed=2))
    live = Population.of(model).start("ada")
    for row in range(6):
        live = live.update(one(terms, row))
    factors = []
    assert model.prior is not None

    def evidence(rows: slice) -> float:
        slopes, offset, target = (torch.from_numpy(column[::2][rows])[None] for column in terms[:3])
        found = posterior(Batch(slopes, offset, torch.ones_like(offset), target == 0.5), model.prior, tolerance=1e-9)
        assert found.log_evidence is not None
        return float(found.log_evidence[0])

    for t in range(1, 6):
        factors.append(evidence(slice(0, t)) + evidence(slice(t, 6)) - evidence(slice(0, 6)))
    change = live.change()
    assert change.evidence == pytest.approx(float(logsumexp(factors)), abs=1e-8)
    assert change.when == f"event-{1 + int(np.argmax(factors))}"
    assert change.log_bayes_factor == pytest.approx(max(factors), abs=1e-8)


def test_people_who_err_have_not_moved() -> None:
    """The evidence of a change is that under the flip rates, of each part on its own."""
    flips = Flips((0.05, 0.3), (0.6, 0.4))
    population = Population.of(gaussian(), flip_rate=flips)
    terms, prior = population.terms(choices(6, seed=2)), population.components("ada")
    live = population.start("ada")
    for row in range(6):
        live = live.update(one(terms, row))

    def evidence(*rows: int) -> float:
        found = solver.erring(Rows.of(Terms.concat([one(terms, row) for row in rows])), prior, np.array(flips.rates))
        return float(logsumexp(found.log_evidence[:, 0] + np.log(flips.shares)))

    factors = [evidence(*range(t)) + evidence(*range(t, 6)) - evidence(*range(6)) for t in range(1, 6)]
    assert live.change().evidence == pytest.approx(float(logsumexp(factors)), abs=1e-8)


# -- on disk


def test_bytes_bring_back_everything() -> None:
    population = Population.of(types(), half_life_choices=9.0, flip_rate=Flips.beta(0.1, 5.0))
    live = population.start("ada\u00e9").update(ranked(), event_id="r", at=3.5).update(choices(4, user="ada\u00e9")).at(99.0)
    again = population.from_bytes(live.to_bytes())
    assert (again.user_id, again.event_ids, again.now, again.converged) == ("ada\u00e9", ("r", "event-1"), 99.0, True)
    for ours, theirs in zip(again.solved[:4], live.solved[:4], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(again.undo("r").mean, live.undo("r").mean, atol=1e-9)
    assert again.update(choices(1, user="ada\u00e9")).event_ids[-1] == "event-2"
    for name, column in live.history.rows._asdict().items():  # a file of safetensors as its own reader has it
        np.testing.assert_array_equal(load(live.to_bytes())[f"rows.{name}"], column)
    blank = population.start("bob")
    np.testing.assert_array_equal(population.from_bytes(blank.to_bytes()).mean, blank.mean)
    # Under other settings of the same model the rows are solved again.
    plain = Population.of(types())
    np.testing.assert_allclose(plain.from_bytes(live.to_bytes()).mean, plain.start("a").update(live.terms).mean, atol=1e-6)


def test_profiles_of_another_order_of_arrays_are_read() -> None:
    population = Population.of(gaussian())
    live = population.start("ada\u00e9").update(choices(3, user="ada\u00e9"))
    good = live.to_bytes()
    head = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])["__metadata__"]
    table, data = {"__metadata__": head}, b""
    for name, value in reversed(load(good).items()):  # an order of its own, and text as it is
        part = value.tobytes()
        kind = "I64" if value.dtype.kind == "i" else "F64"
        table[name] = {"dtype": kind, "shape": value.shape, "data_offsets": (len(data), len(data) + len(part))}
        data += part
    text = json.dumps(table, ensure_ascii=False).encode()
    old = len(text).to_bytes(8, "little") + text + data
    again, light = population.from_bytes(old), population.weights_of(old)
    assert again.event_ids == live.event_ids
    for ours, theirs in zip(again.solved[:4], live.solved[:4], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert light is not None
    np.testing.assert_array_equal(light.mean, live.mean)


def test_bytes_that_are_no_profile() -> None:
    population = Population.of(gaussian())
    good = population.start("ada").update(choices(3)).to_bytes()
    with pytest.raises(MismatchError, match="another model"):
        Population.of(types()).from_bytes(good)
    with pytest.raises(ModelFileError, match="no live profile"):
        population.from_bytes(b"nothing of the kind")
    size = int.from_bytes(good[:8], "little")
    head = json.loads(good[8 : 8 + size])

    def forged(**changes: str) -> bytes:
        text = json.dumps({**head, "__metadata__": {**head["__metadata__"], **changes}}).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + size :]

    for changes, says in [
        ({"version": "2"}, "version 2"),
        ({"format": "other"}, "other"),
        ({"ids": '["a", "b"]'}, "complete"),
        ({"ids": "["}, "complete"),
        ({"count": "x"}, "complete"),
    ]:
        with pytest.raises(ModelFileError, match=says):
            population.from_bytes(forged(**changes))
    for cut in range(0, len(good), 97):
        with pytest.raises(ModelFileError):
            population.from_bytes(good[:cut])


def test_bytes_with_numbers_that_cannot_be() -> None:
    population = Population.of(gaussian())
    good = population.start("ada").update(choices(3)).update(choices(2, seed=1)).to_bytes()
    size = int.from_bytes(good[:8], "little")
    meta = json.loads(good[8 : 8 + size])["__metadata__"]
    nan = float("nan")
    for name, value in [
        ("mean", np.full(3, nan)),
        ("covariance", np.full((3, 3), np.inf)),
        ("modes", np.full((1, 3), nan)),
        ("at", np.array([nan, np.inf])),
        ("n_terms", np.array([6, -1])),
        ("n_terms", np.array([3.0, 2.0])),
        ("n_pulls", np.array([1, -1])),
        ("n_choices", np.array([3, -2])),
        ("n_choices", np.array([4, 2])),
        ("rows.size", np.array([1, 1, 1, 2, 0])),
    ]:
        bad = save(load(good) | {name: value}, meta)
        with pytest.raises(ModelFileError, match="complete"):
            population.from_bytes(bad)
        assert (population.weights_of(bad) is None) == (name == "mean")
    older = load(good)
    del older["n_choices"]  # of a profile written before there were any
    assert population.from_bytes(save(older, meta)).n_choices == 5
