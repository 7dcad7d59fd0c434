"""The probability that a profile is worth using: against a grid, against planted truth, and where nobody differs."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import norm

import palate
from palate.adaptation import Profile, Profiles, adapt, no_pairs
from palate.data.embeddings import Dense
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError, MismatchError, ModelFileError
from palate.living.floor import KAPPAS, Floor
from palate.living.population import Population
from palate.models.base import RewardModel
from palate.priors import Prior

Floats = NDArray[np.float64]
K, DIM = 3, 6


class World(NamedTuple):
    """A model that knows the truth about the directions, and says of everybody that w ~ N(0, I)."""

    model: RewardModel
    data: EmbeddedPairs
    profiles: Profiles
    weights: dict[str, Floats]
    crowd: Floats
    bases: Floats
    pool: Floats

    def gain(self, user: str) -> float:
        """What the personal ranking gains in expected accuracy over the crowd's, by the person's true weights."""
        truth = self.pool @ (self.crowd + self.bases @ self.weights[user])
        mine = np.sign(self.pool @ (self.crowd + self.bases @ self.profiles[user].mean.double().numpy()))
        return float(((mine - np.sign(self.pool @ self.crowd)) / 2 * (2 * expit(truth) - 1)).mean())


@cache
def world(n_choices: int, like_crowd: float, n_users: int = 400, seed: int = 7) -> World:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((n_users, K)) * (rng.random((n_users, 1)) >= like_crowd)
    crowd, bases = np.eye(DIM)[:, 0], 0.7 * np.eye(DIM)[:, 1 : 1 + K]
    person = np.repeat(np.arange(n_users), n_choices)
    table = rng.standard_normal((2 * len(person), DIM))
    margin = ((table[::2] - table[1::2]) * (crowd + weights @ bases.T)[person]).sum(1)
    wins, left = rng.random(len(margin)) < expit(margin), np.arange(0, len(table), 2)
    ids = [f"u{p}" for p in person]
    data = EmbeddedPairs(
        Dense(torch.from_numpy(table).float()), np.where(wins, left, left + 1), np.where(wins, left + 1, left), ids
    )
    prior = Prior.gaussian(torch.eye(K))
    numbers = {"direction": torch.from_numpy(crowd).float(), "bases": torch.from_numpy(bases).float()}
    model = palate.Hierarchical(K).like(numbers | {"share": prior.share, "means": prior.means, "factors": prior.factors})
    true = {f"u{u}": weights[u] for u in range(n_users)}
    pool = rng.standard_normal((1000, DIM)) * 2**0.5
    return World(model, data, adapt(model, data), true, crowd, bases, pool)


def stated_and_true(w: World) -> tuple[Floor, Floats, Floats]:
    """The floor of one half of the people, and of the others what it states and what is true."""
    ids = w.data.user_ids
    floor = Floor.fit(w.model, w.data.of_users(ids[::2]))
    stated = np.array([floor.better_than_crowd(w.profiles[user]) for user in ids[1::2]])
    return floor, stated, np.array([w.gain(user) for user in ids[1::2]])


def test_the_probability_is_right_where_half_of_the_people_are_the_crowd() -> None:
    _, stated, gain = stated_and_true(world(30, 0.5, 1200, 10))
    better = gain > 0
    assert stated.mean() == pytest.approx(better.mean(), abs=0.07)
    for low, high, within in ((0, 0.35, 0.06), (0.35, 0.75, 0.18), (0.75, 1, 0.08)):  # it leans to the crowd in the middle
        inside = (stated >= low) & (stated < high)
        assert inside.sum() > 100
        assert stated[inside].mean() == pytest.approx(better[inside].mean(), abs=within)
    floored = np.where(stated >= 0.5, gain, 0)
    assert floored.mean() > gain.mean() + 0.002


def test_where_everybody_differs_the_floor_costs_nothing_and_the_kind_is_found() -> None:
    floor, stated, gain = stated_and_true(world(10, 0.0))
    assert floor.share[list(KAPPAS).index(1.0)] > 0.7
    assert stated.mean() == pytest.approx((gain > 0).mean(), abs=0.1)
    assert np.where(stated >= 0.5, gain, 0).mean() > gain.mean() - 0.002


def test_where_nobody_differs_the_crowd_is_used() -> None:
    floor, stated, gain = stated_and_true(world(10, 1.0))
    assert gain.mean() < -0.02
    assert floor.share[0] > 0.5
    assert stated.max() < 0.3


def test_one_weight_against_a_grid() -> None:
    """The profile's likelihood by division of Gaussians, the kinds' mixture over it, and the gain's sign, on a fine grid."""
    crowd, mean, variance = 0.4, -0.3, 1.7  # the crowd is not where the prior's mean is
    rng = np.random.default_rng(3)
    offset, slopes = rng.standard_normal(40), rng.standard_normal(40)
    share = np.array([0.3, 0.1, 0.1, 0.1, 0.3, 0.1])
    floor = Floor(share, offset, slopes[:, None], np.array([crowd]), np.array([mean]), np.array([[variance]]), 50, "m")
    own, spread = 1.1, 0.35
    precision = 1 / spread - 1 / variance
    centre = (own / spread - mean / variance) / precision
    w = np.linspace(-12, 12, 240_001)
    likelihood = norm.pdf(w, centre, precision**-0.5)
    width = variance + (mean - crowd) ** 2
    side, theirs = np.sign(offset + slopes * own), np.sign(offset + slopes * crowd)
    apart = side != theirs
    assert 3 < apart.sum() < 40
    gain = np.zeros(len(w))
    for o, s, d in zip(offset[apart], slopes[apart], side[apart], strict=True):
        gain += d * (2 * expit(o + s * w) - 1)
    better = whole = 0.0
    for kappa, of_kind in zip(KAPPAS, share, strict=True):
        if kappa == 0:
            whole += of_kind * norm.pdf(crowd, centre, precision**-0.5)
            continue
        density = of_kind * norm.pdf(w, crowd, (kappa * width) ** 0.5) * likelihood * (w[1] - w[0])
        better, whole = better + density[gain > 0].sum(), whole + density.sum()
    profile = Profile(
        "ada", torch.tensor([own], dtype=torch.float64), torch.tensor([[spread]], dtype=torch.float64), 5, True, "m"
    )
    assert 0.2 < better / whole < 0.9
    assert floor.better_than_crowd(profile) == pytest.approx(better / whole, abs=0.02)


def test_a_floor_gives_the_profile_or_the_crowd() -> None:
    w = world(10, 0.0)
    floor = Floor.fit(w.model, w.data.of_users(w.data.user_ids[::2]))
    profile = w.profiles["u1"]
    chance = floor.better_than_crowd(profile)
    assert 0 < chance < 1
    assert floor.floored(profile, chance) is profile
    assert floor.floored(profile, chance + 1e-9) is None
    assert floor.better_than_crowd(no_pairs(w.model, ["new"])["new"]) == 0.5  # the same ranking
    with pytest.raises(DataError, match=r"at_least is 1\.5; expected a probability"):
        floor.floored(profile, 1.5)


def test_a_live_profile_has_the_probability_of_the_batch() -> None:
    w = world(10, 0.0)
    floor = Floor.fit(w.model, w.data)
    live = Population.of(w.model).start("u3").update(w.data.of_users(["u3"]))
    assert floor.better_than_crowd(live) == pytest.approx(floor.better_than_crowd(w.profiles["u3"]), abs=0.01)
    assert floor.floored(live, 0.0) is live


def test_a_floor_is_saved_beside_its_model(tmp_path: Path) -> None:
    w = world(10, 0.0)
    floor = Floor.fit(w.model, w.data)
    floor.save(tmp_path)
    again = Floor.load(tmp_path, w.model)
    assert again.better_than_crowd(w.profiles["u1"]) == floor.better_than_crowd(w.profiles["u1"])
    assert (again.n_users, again.model) == (400, w.model.fingerprint())
    with pytest.raises(MismatchError, match="belongs to model"):
        Floor.load(tmp_path, palate.Hierarchical(K).like(dict(w.model.state_dict()) | {"direction": torch.zeros(DIM)}))
    path = tmp_path / "floor.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ModelFileError, match="cannot be read as a floor"):
        Floor.load(tmp_path)
    with pytest.raises(ModelFileError, match="cannot be read as a floor"):
        Floor.load(tmp_path / "nowhere")


def test_what_has_no_floor_is_refused() -> None:
    w = world(10, 0.0)
    floor = Floor.fit(w.model, w.data.of_users(["u1", "u2"]))
    profile = w.profiles["u1"]
    with pytest.raises(MismatchError, match="given to the floor of model"):
        floor.better_than_crowd(Profile("u1", profile.mean, profile.covariance, 3, True, "another"))
    with pytest.raises(DataError, match="has no covariance"):
        floor.better_than_crowd(Profile("u1", profile.mean, None, 3, True, profile.model))
    with pytest.raises(DataError, match="no posterior under one prior"):
        Floor.fit(palate.fit(w.data, palate.BradleyTerry()), w.data)
    with pytest.raises(DataError, match="0 choices"):
        Floor.fit(w.model, w.data.of_users(["u1"])[torch.zeros(0, dtype=torch.int64)])
    with pytest.raises(DataError, match="expected 6 numbers"):
        floor.with_share([1.0])
