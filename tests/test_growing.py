"""Growing a fitted model, and carrying profiles: planted new tastes are found, nothing else is, and nobody's profile is lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

import palate
from palate.adaptation import Profiles, adapt, margins, pair_design
from palate.carrying import carry, linear
from palate.data.embeddings import Dense
from palate.data.pairs import EmbeddedPairs
from palate.data.planted import two_groups
from palate.errors import DataError, MismatchError
from palate.growing import _Growth, grow
from palate.models.base import RewardModel
from palate.models.meta import ExactSolve, Outer
from palate.priors import Prior
from palate.solvers import newton, whitened

Floats = NDArray[np.float64]
DIM = 12
MU, FIRST, SECOND = np.linalg.qr(np.random.default_rng(5).standard_normal((DIM, 3)))[0].T


def choices(seed: int, n_users: int, n_pairs: int, spread: tuple[float, float], *, dim: int = DIM) -> EmbeddedPairs:
    """Users with reward MU + a FIRST + b SECOND, a and b normal with these standard deviations, and logistic choices."""
    rng = np.random.default_rng(seed)
    frame = np.zeros((3, dim))
    frame[:, :DIM] = MU, FIRST, SECOND
    table = rng.standard_normal((2 * n_users * n_pairs, dim)).astype(np.float32)
    weights = np.column_stack([np.ones(n_users), rng.standard_normal((n_users, 2)) * spread])
    left, right = table[::2], table[1::2]
    margin = ((left - right) * (np.repeat(weights, n_pairs, axis=0) @ frame)).sum(1)
    wins = rng.random(len(margin)) < 1 / (1 + np.exp(-margin))
    rows = np.arange(len(table)).reshape(-1, 2)
    users = np.repeat([f"u{u:03d}" for u in range(n_users)], n_pairs)
    return EmbeddedPairs(table, np.where(wins, *rows.T), np.where(wins, *rows.T[::-1]), users, encoder="enc")


def accuracy(model: RewardModel, data: EmbeddedPairs, n_support: int) -> float:
    place = torch.arange(len(data)) % (len(data) // len(data.user_ids))
    told = margins(model, data[place >= n_support], adapt(model, data[place < n_support]))
    return float((told > 0).double().mean())


def hierarchical(bases: Floats, prior: Prior, direction: Floats = MU, users: int | None = 60) -> RewardModel:
    numbers = {"direction": torch.from_numpy(direction).float(), "bases": torch.from_numpy(bases).float()}
    if bases.shape[1]:
        numbers |= {"share": prior.share, "means": prior.means, "factors": prior.factors}
    out = palate.Hierarchical(4, bend=0).like(numbers)
    out.encoder = "enc"
    if users is not None:
        out.record["n_users"] = users
    return out


def gaussian(*variances: float, mean: tuple[float, ...] | None = None) -> Prior:
    return Prior.gaussian(torch.diag(torch.tensor(variances)), None if mean is None else torch.tensor(mean))


def one_base() -> RewardModel:
    return hierarchical(FIRST[:, None], gaussian(1.44))


def pref() -> RewardModel:
    numbers = {"direction": MU, "bases": FIRST[:, None], "mean": np.zeros(1), "factor": np.full((1, 1), 1.2)}
    out = palate.PReF(2).like({name: torch.from_numpy(value).float() for name, value in numbers.items()})
    out.encoder, out.record["n_users"] = "enc", 60
    return out


def mrm() -> RewardModel:
    numbers = {"direction": MU, "bases": FIRST[:, None], "start": np.zeros(1), "spread": np.full(1, 1.2)}
    out = palate.MRM(2, inner=ExactSolve(), outer=Outer()).like({k: torch.from_numpy(v).float() for k, v in numbers.items()})
    out.encoder, out.record["n_users"] = "enc", 60
    return out


def mixture() -> RewardModel:
    prior = Prior(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), torch.full((2, 1, 1), 0.7))
    return hierarchical(FIRST[:, None], prior)


MAKERS: dict[str, Callable[[], RewardModel]] = {"hierarchical": one_base, "mixture": mixture, "pref": pref, "mrm": mrm}
EVERY = pytest.mark.parametrize("name", MAKERS)


class Grown(NamedTuple):
    old: RewardModel
    new: RewardModel
    data: EmbeddedPairs


CACHE: dict[str, Grown] = {}


def grown(name: str) -> Grown:
    """A model that knows FIRST, grown on people who differ about SECOND too."""
    if name not in CACHE:
        old, data = MAKERS[name](), choices(2, 120, 24, (1.2, 1.2))
        CACHE[name] = Grown(old, grow(old, data), data)
    return CACHE[name]


def steps(model: RewardModel) -> list[dict[str, Any]]:
    last: list[dict[str, Any]] = model.record["grown"][-1]["steps"]
    return last


# -- a new base reward


@EVERY
def test_a_new_taste_becomes_a_base_and_pays_for_people_never_seen(name: str) -> None:
    old, new, _ = grown(name)
    bases = new.state_dict()["bases"]
    assert torch.equal(bases[:, :1], old.state_dict()["bases"])  # untouched
    assert torch.equal(new.state_dict()["direction"], old.state_dict()["direction"])
    assert bases.shape[1] == 2
    found = bases[:, 1].double().numpy()
    assert abs(found @ SECOND) / np.linalg.norm(found) > 0.95
    unseen = choices(77, 150, 50, (1.2, 1.2))
    assert accuracy(new, unseen, 25) > accuracy(old, unseen, 25) + 0.04
    prior = new.prior
    assert prior is not None
    # The planted standard deviation along the new base, whose margins have mean square one: 1.2 times sqrt(2).
    assert float(prior.covariance[1, 1]) ** 0.5 == pytest.approx(1.2 * 2**0.5, rel=0.2)
    kept = [step["step"] for step in steps(new) if step["kept"]]
    assert kept.count("base") == 1
    assert steps(new)[-1]["kept"] is False


def test_people_like_the_old_ones_add_no_base() -> None:
    added = 0
    for seed in range(6):
        model = grow(one_base(), choices(20 + seed, 60, 20, (1.2, 0.0)))
        added += model.n_weights - 1
    assert added == 0


def test_a_model_without_bases_gets_its_first_one_and_a_crowd_none() -> None:
    nobody = hierarchical(np.zeros((DIM, 0)), gaussian(1.0))
    one = grow(nobody, choices(3, 120, 24, (0.0, 1.5)))
    assert one.n_weights == 1
    found = one.state_dict()["bases"][:, 0].double().numpy()
    assert abs(found @ SECOND) / np.linalg.norm(found) > 0.95
    crowd = grow(nobody, choices(4, 120, 24, (0.0, 0.0)))
    assert crowd.n_weights == 0
    assert crowd.fingerprint() == nobody.fingerprint()


def test_two_new_tastes_become_two_bases_unless_one_is_enough() -> None:
    nobody = hierarchical(np.zeros((DIM, 0)), gaussian(1.0))
    data = choices(5, 150, 30, (1.5, 1.2))
    both = grow(nobody, data)
    assert both.n_weights == 2
    span = np.linalg.qr(both.state_dict()["bases"].double().numpy())[0]
    assert np.linalg.norm(span.T @ np.stack([FIRST, SECOND], axis=1)) ** 2 == pytest.approx(2, abs=0.15)
    assert grow(nobody, data, most=1).n_weights == 1
    assert grow(one_base(), choices(20, 60, 20, (1.2, 0.0)), most=1).n_weights == 1  # the one that it may add does not pay
    assert grow(nobody, data, most=0).n_weights == 0


def test_the_new_base_is_scaled_and_uncorrelated_with_the_old_ones() -> None:
    _, new, data = grown("hierarchical")
    slopes = pair_design(new, data)[1].double()
    moment = slopes.T @ slopes / len(slopes)
    assert float(moment[1, 1]) == pytest.approx(1, abs=1e-4)
    assert abs(float(moment[0, 1])) < 1e-4
    prior = new.prior
    assert prior is not None
    assert float(prior.covariance[0, 1]) == pytest.approx(0, abs=1e-6)


def test_the_direction_is_the_leading_one_of_the_formula() -> None:
    """The operator against the sum written out user by user, in few features and, by Lanczos, in many."""
    for dim in (DIM, 150):
        data = choices(6, 20, 6, (1.0, 2.0), dim=dim)
        bases, direction = np.zeros((dim, 1)), np.zeros(dim)
        bases[:DIM, 0], direction[:DIM] = FIRST, MU
        model = hierarchical(bases, gaussian(1.0), direction)
        growth = _Growth(model, linear(model), data, 0)
        rng = np.random.default_rng(0)
        slope = torch.from_numpy(rng.standard_normal(len(data)))
        found = growth._leading(slope, growth.states[-1], 3).numpy()
        scale = growth.scale.numpy()
        z = (data.embeddings.rows(data.chosen) - data.embeddings.rows(data.rejected)).double().numpy() * scale
        held = bases[:, 0] / scale
        out = np.eye(dim) - np.outer(held, held) / (held @ held)
        total = np.zeros((dim, dim))
        for u in range(20):
            mine = (data.user_index == u).numpy()
            g = z[mine] * slope.numpy()[mine, None]
            total += np.outer(g.sum(0), g.sum(0)) - g.T @ g
        values, vectors = np.linalg.eigh(out @ total @ out)
        assert np.abs((found * vectors[:, :-4:-1]).sum(0)) == pytest.approx(np.ones(3), abs=1e-4)
        assert values[-3] > 0


# -- the population


def test_one_round_of_the_population_is_the_pooled_moments() -> None:
    """Against scipy, user by user: modes, Laplace covariances, and the old prior as seven users."""
    prior = Prior.gaussian(torch.tensor([[1.0, 0.3], [0.3, 0.5]]), torch.tensor([0.4, -0.2]))
    model = hierarchical(np.stack([FIRST, SECOND], axis=1), prior)
    data = choices(8, 15, 9, (1.0, 1.0))
    offset, slopes = (part.double().numpy() for part in pair_design(model, data))
    s, m = prior.covariance.double().numpy(), prior.mean.double().numpy()
    inverse, first, second = np.linalg.inv(s), 7 * m, 7 * (s + np.outer(m, m))
    for u in range(15):
        mine = (data.user_index == u).numpy()
        a, b = slopes[mine], offset[mine]

        def loss(w: Floats, a: Floats = a, b: Floats = b) -> float:
            return float(np.logaddexp(0, -(b + a @ w)).sum() + (w - m) @ inverse @ (w - m) / 2)

        w = minimize(loss, m, method="BFGS", options={"gtol": 1e-9}).x
        p = 1 / (1 + np.exp(-(b + a @ w)))
        c = np.linalg.inv((a * (p * (1 - p))[:, None]).T @ a + inverse)
        first, second = first + w, second + np.outer(w, w) + c
    mean = first / 22
    import palate.growing

    growth = _Growth(model, linear(model), data, 0)
    rounds, palate.growing.ROUNDS = palate.growing.ROUNDS, 1
    try:
        found = growth.population(growth.folds, 7.0)
    finally:
        palate.growing.ROUNDS = rounds
    assert found is not None
    assert found.prior is not None
    assert found.prior.mean.numpy() == pytest.approx(mean, abs=2e-3)
    assert found.prior.covariance.numpy() == pytest.approx(second / 22 - np.outer(mean, mean), abs=2e-3)


def test_the_old_users_hold_the_prior_by_their_number() -> None:
    """A wide population after a narrow prior. With as many old users as new it moves less than half way, because the new users
    are themselves drawn in by what they are believed to be; with very many it does not move."""
    model = hierarchical(FIRST[:, None], gaussian(0.04))
    data = choices(9, 100, 30, (2.0, 0.0))
    variance = {}
    for n_old in (0.0, 100.0, 1e6):
        prior = grow(model, data, n_old=n_old, most=0).prior
        assert prior is not None
        variance[n_old] = float(prior.covariance[0, 0])
    assert variance[0.0] > 2
    assert 0.2 < variance[100.0] / variance[0.0] < 0.5
    assert variance[1e6] == pytest.approx(0.04, abs=0.01)


def test_the_population_learns_where_the_new_people_are() -> None:
    """People who all want SECOND: the prior's mean goes there, and one choice of a new person is worth more."""
    model = hierarchical(SECOND[:, None], gaussian(0.3), MU)
    rng = np.random.default_rng(0)
    table = rng.standard_normal((6000, DIM)).astype(np.float32)
    margin = (table[::2] - table[1::2]) @ (MU + 2 * SECOND)
    wins = rng.random(3000) < 1 / (1 + np.exp(-margin))
    rows = np.arange(6000).reshape(-1, 2)
    users = np.repeat([f"n{u}" for u in range(100)], 30)
    data = EmbeddedPairs(table, np.where(wins, *rows.T), np.where(wins, *rows.T[::-1]), users, encoder="enc")
    prior = grow(model, data, n_old=1.0, most=0).prior
    assert prior is not None
    assert float(prior.mean[0]) == pytest.approx(2, abs=0.3)
    assert float(prior.covariance[0, 0]) < 0.3


def test_old_users_are_counted_from_the_record() -> None:
    model = one_base()
    data = choices(2, 60, 20, (1.2, 1.2))
    once = grow(model, data, most=0)
    assert len(once.record["grown"]) == 1
    twice = grow(once, choices(3, 30, 20, (1.2, 1.2)), most=0)
    assert [step["n_users"] for step in twice.record["grown"]] == [60, 30]
    assert "grown" not in model.record
    with pytest.raises(DataError, match="n_old is None and the model's record has no number of users"):
        grow(hierarchical(FIRST[:, None], gaussian(1.0), users=None), data)
    assert grow(hierarchical(FIRST[:, None], gaussian(1.0), users=None), data, n_old=5, most=0).n_weights == 1


# -- what growing is held to


@EVERY
def test_a_grown_model_is_saved_loaded_and_repeated_to_the_bit(name: str, tmp_path: Path) -> None:
    old, new, data = grown(name)
    before = old.fingerprint()
    again = grow(old, data)
    assert again.fingerprint() == new.fingerprint() != before == old.fingerprint()
    new.save_pretrained(tmp_path / "model")
    loaded = palate.load_model(tmp_path / "model")
    assert loaded.fingerprint() == new.fingerprint()
    assert loaded.record["grown"] == new.record["grown"]
    assert margins(loaded, data).equal(margins(new, data))
    assert new.encoder == "enc"


def test_what_cannot_grow_says_why() -> None:
    data = choices(1, 12, 6, (1.0, 1.0))
    lore = palate.fit(data, palate.LoRe(2, steps=5))
    with pytest.raises(DataError, match="LoRe mixes its base rewards on a simplex"):
        grow(lore, data)
    with pytest.raises(DataError, match="BradleyTerry cannot grow; expected a Hierarchical, PReF or MRM"):
        grow(palate.fit(data, palate.BradleyTerry(1e-3)), data)
    with pytest.raises(DataError, match="this MRM has hidden layers, or users without a prior"):
        grow(palate.fit(data, palate.MRM.faithful(epochs=1)), data)
    with pytest.raises(DataError, match=r"this PReF .* without a prior \(Descent\)"):
        grow(palate.fit(data, palate.PReF.faithful(2, few_shot_steps=3)), data)
    with pytest.raises(DataError, match=r"this Hierarchical is not fitted; call palate\.fit"):
        grow(palate.Hierarchical(), data)
    with pytest.raises(DataError, match="9 users with 54 choices that are no ties; expected 10 users or more"):
        grow(one_base(), data.of_users(data.user_ids[:9]))
    with pytest.raises(DataError, match="most is -1; expected a number of base rewards"):
        grow(one_base(), data, most=-1)
    stranger = one_base()
    stranger.encoder = "another"
    with pytest.raises(MismatchError, match="embeddings of encoder enc given to a model fitted on encoder another"):
        grow(stranger, data)


# -- profiles


def added(old: RewardModel, column: Floats, variance: float) -> RewardModel:
    """The model with one more base and the same population otherwise."""
    prior = old.prior
    assert prior is not None
    m, k = prior.means.shape
    factors = torch.zeros(m, k + 1, k + 1)
    factors[:, :k, :k], factors[:, k, k] = prior.factors, variance**0.5
    wider = Prior(prior.share, torch.cat([prior.means, torch.zeros(m, 1)], dim=1), factors)
    return hierarchical(np.column_stack([old.state_dict()["bases"].double().numpy(), column]), wider)


@pytest.mark.parametrize("make", [one_base, mixture])
def test_with_one_more_base_nobody_changes(make: Callable[[], RewardModel]) -> None:
    old, data = make(), choices(11, 30, 10, (1.2, 1.0))
    new, profiles = added(old, SECOND, 0.8), adapt(old, data)
    carried = carry(profiles, old, new)
    assert (margins(new, data, carried) - margins(old, data, profiles)).abs().max() < 1e-5
    assert carried.model == new.fingerprint()
    assert carried.user_ids == profiles.user_ids
    assert torch.equal(carried.n_pairs, profiles.n_pairs)
    assert torch.equal(carried.mean[:, 1], torch.zeros(30))
    assert carried.covariance is not None
    assert profiles.covariance is not None
    assert carried.covariance[:, 0, 0].numpy() == pytest.approx(profiles.covariance[:, 0, 0].numpy())
    assert carried.covariance[:, 1, 1].numpy() == pytest.approx(np.full(30, 0.8))
    assert not bool(carried.covariance[:, 0, 1].any())


@EVERY
def test_profiles_of_a_grown_model_are_carried(name: str) -> None:
    """Where the population was kept, to the same margins; otherwise nearer to those of adapting again than leaving them."""
    old, new, _ = grown(name)
    data = choices(12, 40, 12, (1.2, 1.2))
    profiles = adapt(old, data)
    carried = carry(profiles, old, new)
    away = (margins(new, data, carried) - margins(old, data, profiles)).abs()
    moved = any(step["kept"] for step in steps(new) if step["step"] == "population")
    assert moved or float(away.max()) < 1e-5
    assert carried.mean.shape == (40, 2)
    told = margins(new, data, carried)
    assert float((told > 0).double().mean()) > 0.65


def test_carried_and_adapted_again_is_adapted_from_scratch() -> None:
    """The posterior is one point: from the carried weights, Newton's method ends where it ends from nothing."""
    old, new, _ = grown("hierarchical")
    data = choices(13, 30, 15, (1.2, 1.2))
    carried, scratch = carry(adapt(old, data), old, new), adapt(new, data)
    growth = _Growth(new, linear(new), data, 0)
    prior = growth.states[-1].prior
    assert prior is not None
    [part] = growth._parts(growth.states[-1], torch.ones(30, dtype=torch.bool))
    start = torch.linalg.solve_triangular(prior.factors[0], (carried.mean.double() - prior.mean).T, upper=False).T
    mode, _, done = newton(whitened(part, prior, 0), start=start)
    assert bool(done.all())
    assert (prior.mean + mode @ prior.factors[0].T).numpy() == pytest.approx(scratch.mean.double().numpy(), abs=1e-4)
    assert not torch.allclose(carried.mean, scratch.mean, atol=0.1)


@pytest.mark.parametrize("wide", [False, True], ids=["same span", "wider"])
def test_a_change_of_bases_keeps_every_reward(wide: bool) -> None:
    """Rotated, skewed and rescaled bases, and a crowd's direction that has taken a step along one of them."""
    old_bases = np.stack([FIRST, SECOND], axis=1)
    old = hierarchical(old_bases, Prior.gaussian(torch.tensor([[1.0, 0.4], [0.4, 0.7]]), torch.tensor([0.2, 0.1])))
    turn = np.array([[2.0, 0.5], [-1.0, 0.3]])
    step = np.array([0.3, -0.6])
    inverse = np.linalg.inv(turn)
    s, m = np.array([[1.0, 0.4], [0.4, 0.7]]), np.array([0.2, 0.1])
    mean, spread = inverse @ m - inverse @ step, inverse @ s @ inverse.T
    bases = old_bases @ turn
    if wide:
        bases = np.column_stack([bases, np.random.default_rng(0).standard_normal(DIM)])
        mean, spread = np.append(mean, 0), np.block([[spread, np.zeros((2, 1))], [np.zeros((1, 2)), np.full((1, 1), 2.0)]])
    prior = Prior.gaussian(torch.from_numpy(spread).float(), torch.from_numpy(mean).float())
    new = hierarchical(bases, prior, MU + old_bases @ step)
    data = choices(14, 30, 10, (1.2, 1.0))
    profiles = adapt(old, data)
    carried = carry(profiles, old, new)
    assert (margins(new, data, carried) - margins(old, data, profiles)).abs().max() < 2e-4
    again = adapt(new, data)
    assert carried.covariance is not None
    assert again.covariance is not None
    if not wide:  # the same posterior in other coordinates
        assert carried.mean.numpy() == pytest.approx(again.mean.numpy(), abs=2e-3)
        assert carried.covariance.numpy() == pytest.approx(again.covariance.numpy(), abs=2e-3)


def test_another_population_is_put_in_the_old_ones_place() -> None:
    """Exact where the likelihood is Gaussian in the weights: with many choices each and a prior that moves little."""
    data = choices(15, 40, 30, (1.2, 0.0))
    old, new = hierarchical(FIRST[:, None], gaussian(1.0)), hierarchical(FIRST[:, None], gaussian(2.0, mean=(0.5,)))
    profiles, again = adapt(old, data), adapt(new, data)
    carried = carry(profiles, old, new)
    assert carried.covariance is not None
    assert again.covariance is not None
    left, moved = (profiles.mean - again.mean).abs().mean(), (carried.mean - again.mean).abs().mean()
    assert float(moved) < 0.2 * float(left)
    assert profiles.covariance is not None
    left, moved = (abs(c - again.covariance).mean() for c in (profiles.covariance, carried.covariance))
    assert float(moved) < 0.75 * float(left)
    one = torch.ones(1)
    nothing = Profiles(("x",), 0 * one[:, None], one[:, None, None], torch.zeros(1).long(), one.bool(), profiles.model)
    there = carry(nothing, old, new)  # of whom nothing is known gets the new prior
    assert there.covariance is not None
    assert (float(there.mean[0, 0]), float(there.covariance[0, 0, 0])) == pytest.approx((0.5, 2.0), rel=1e-4)
    without = carry(adapt(old, data, covariance=False), old, new)
    assert without.covariance is None
    assert torch.equal(without.mean, profiles.mean)


def test_the_first_base_gives_profiles_their_first_weight() -> None:
    old = hierarchical(np.zeros((DIM, 0)), gaussian(1.0))
    new = hierarchical(FIRST[:, None], gaussian(0.7))
    data = choices(16, 12, 4, (1.0, 0.0))
    carried = carry(adapt(old, data), old, new)
    assert torch.equal(carried.mean, torch.zeros(12, 1))
    assert margins(new, data, carried).numpy() == pytest.approx(margins(old, data).numpy(), abs=1e-6)


def test_on_a_simplex_a_new_base_has_weight_zero() -> None:
    data = choices(17, 12, 8, (1.0, 0.0))
    old = palate.fit(data, palate.LoRe(2, steps=20))
    bases = old.state_dict()["bases"]
    more = torch.cat([bases, torch.from_numpy(SECOND)[:, None].float()], dim=1)
    wider = old.like({"bases": more, "mean_weights": torch.ones(3) / 3})
    wider.encoder = old.encoder
    profiles = adapt(old, data)
    carried = carry(profiles, old, wider)
    assert margins(wider, data, carried).numpy() == pytest.approx(margins(old, data, profiles).numpy(), abs=1e-5)
    assert torch.equal(carried.mean[:, 2], torch.zeros(12))
    other = old.like({"bases": bases.flip(1), "mean_weights": torch.ones(2) / 2})
    other.encoder = old.encoder
    with pytest.raises(DataError, match="does not begin with the base rewards of the old one"):
        carry(profiles, old, other)


def test_what_cannot_be_carried_says_why() -> None:
    old, data = hierarchical(np.stack([FIRST, SECOND], axis=1), gaussian(1.0, 0.5)), choices(18, 12, 5, (1.0, 1.0))
    profiles = adapt(old, data)
    with pytest.raises(DataError, match=r"9\d\.\d% of base 2 of the old model lies outside the new bases"):
        carry(profiles, old, hierarchical(FIRST[:, None], gaussian(1.0)))
    with pytest.raises(DataError, match=r"of the crowd's direction of the old model lies outside the new bases"):
        carry(profiles, old, hierarchical(np.stack([FIRST, SECOND], axis=1), gaussian(1.0, 0.5), MU + np.eye(DIM)[0]))
    with pytest.raises(MismatchError, match="profiles of model"):
        carry(profiles, one_base(), old)
    with pytest.raises(MismatchError, match="profiles of a Hierarchical carried to a PReF"):
        carry(profiles, old, pref())
    bend = {"amplitudes": torch.ones(3), "phases": torch.ones(3), "frequencies": torch.ones(12, 3)}
    bent = old.like(dict(old.state_dict()) | bend)
    with pytest.raises(DataError, match="differ in their phases, amplitudes, frequencies"):
        carry(profiles, old, bent)
    bradley = palate.fit(data, palate.BradleyTerry(1e-3))
    with pytest.raises(DataError, match="BradleyTerry cannot grow"):
        carry(adapt(bradley, data), bradley, bradley)


def test_single_and_double_precision_grow_alike() -> None:
    data = choices(2, 60, 12, (1.2, 1.2))
    half = EmbeddedPairs(
        Dense(data.embeddings.rows(torch.arange(len(data.embeddings))).double()),
        data.chosen,
        data.rejected,
        data.users,
        encoder="enc",
    )
    single, double = grow(one_base(), data), grow(one_base(), half)
    assert single.n_weights == double.n_weights
    assert margins(single, data).numpy() == pytest.approx(margins(double, half).numpy(), abs=1e-4)


def test_new_users_of_one_choice_each_bring_no_base() -> None:
    planted = two_groups(0, n_users=40, n_train=20, n_test=1, dim=8)
    model = palate.fit(planted.train)
    one = planted.support[torch.unique(planted.support.user_index) * 20]
    assert palate.grow(model, one).n_weights == model.n_weights
