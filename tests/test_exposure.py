"""Exposure: positions and depths that were planted are found, tastes learned through them are the people's own, and what cannot
be told apart is refused."""

import numpy as np
import pytest
import torch

import palate
from palate.errors import ConvergenceError, DataError
from palate.living.events import Picked
from palate.living.exposure import Exposure
from palate.living.population import Population
from palate.living.positions import _Picks, _slope
from palate.living.reading import Level
from palate.living.terms import Floats, Rewards, Terms

LOG_ODDS = np.array([0.0, -0.7, -1.2, -1.5])
GOES_ON = 0.75
SHOWN = len(LOG_ODDS)
Said = list[tuple[Picked, Rewards]]


def planted() -> tuple[Population, Level]:
    """Rewards x . w of embeddings x, w ~ N(0, I)."""
    eye = torch.eye(3)
    numbers = {
        "direction": torch.zeros(3),
        "bases": eye,
        "share": torch.ones(1),
        "means": torch.zeros(1, 3),
        "factors": eye[None],
    }
    model = palate.Hierarchical().like(numbers)
    assert isinstance(model, palate.Hierarchical)
    return Population.of(model), Level.of(model, torch.zeros(1, 3))


def picks(w: Floats, n: int, rng: np.random.Generator, *, known: float = 1.0, ordered: float = 1.5) -> Said:
    """Picks of lists that more or less follow their first coordinate; a share `known` of them says how far was looked."""
    out: Said = []
    for i in range(n):
        x = rng.standard_normal((SHOWN, 3))
        x = x[np.argsort(-(ordered * x[:, 0] + rng.standard_normal(SHOWN)))]
        depth = min(int(rng.geometric(1 - GOES_ON)), SHOWN)
        odds = np.exp((x @ w + LOG_ODDS)[:depth])
        picked = int(rng.choice(depth, p=odds / odds.sum()))
        shown = tuple(f"{i}: {j}" for j in rng.integers(10**12, size=SHOWN))
        examined = depth if rng.random() < known else None
        out.append((Picked(prompt="", shown=shown, picked=picked, examined=examined), Rewards(np.zeros(SHOWN), x)))
    return out


@pytest.mark.slow
def test_planted_positions_are_found_and_tastes_freed_of_them() -> None:
    """The errors of six seeds, and of more picks: `python -m benchmarks.exposure`."""
    population, level = planted()
    rng = np.random.default_rng(1)
    histories = {str(u): picks(rng.standard_normal(3), 12, rng, known=0.7) for u in range(80)}
    exposure = Exposure.fit(histories, population, level)
    error, std = np.array(exposure.log_odds) - LOG_ODDS, np.array(exposure.std)
    assert exposure.n_picks == 960
    assert exposure.log_odds[0] == exposure.std[0] == 0
    assert (np.abs(error[1:]) < 3 * std[1:]).all()
    assert std.max() < 0.25
    np.testing.assert_allclose(exposure.reach, GOES_ON ** np.arange(SHOWN), atol=0.05)

    taste, many = np.array([0.0, 1.0, -0.5]), picks(np.array([0.0, 1.0, -0.5]), 1000, rng)

    def learned(how: Exposure, *, examined: bool) -> Floats:
        said = [(p if examined else p.model_copy(update={"examined": None}), r) for p, r in many]
        terms = Terms.concat([p.terms(r, exposure=how, level=level) for p, r in said])
        return population.start("one").update(terms).mean

    biased = learned(Exposure(), examined=False)
    assert biased[0] > 0.6  # what stands on top looks liked
    assert biased[1] < 0.8  # and what is liked less so
    np.testing.assert_allclose(learned(exposure, examined=True), taste, atol=0.2)
    np.testing.assert_allclose(learned(exposure, examined=False), taste, atol=0.35)  # less is known, and less is claimed


def test_the_slope_is_that_of_the_marginal_likelihood_of_one_draw() -> None:
    """With one draw only depths are integrated out: score and information against finite differences of the mixture itself."""
    rng = np.random.default_rng(2)
    said = picks(rng.standard_normal(3), 7, rng, known=0.5)
    data = _Picks.of({"ada": said}, 3)
    reach = GOES_ON ** np.arange(SHOWN)
    odds, w = data.depth_odds(reach), rng.standard_normal(3)
    utilities = data.offset + data.slopes @ w

    def log_likelihood(bias: Floats) -> float:
        total = 0.0
        stops = reach - np.append(reach[1:], 0)
        for (pick, _), u in zip(said, utilities, strict=True):
            depths = [pick.examined] if pick.examined else range(pick.picked + 1, SHOWN + 1)
            v = np.exp(u + bias)
            of_depth = [1.0 if pick.examined else stops[d - 1] for d in depths]
            total += np.log(sum(s * v[pick.picked] / v[:d].sum() for s, d in zip(of_depth, depths, strict=True)))
        return total

    bias, h = np.array([0.0, -0.3, 0.2, -0.9]), 1e-4
    steps = np.eye(SHOWN)[1:] * h
    score = [(log_likelihood(bias + s) - log_likelihood(bias - s)) / (2 * h) for s in steps]
    bend = [
        [
            sum(i * j * log_likelihood(bias + i * s + j * t) for i in (-1, 1) for j in (-1, 1)) / (4 * h * h)
            for t in steps
        ]
        for s in steps
    ]  # fmt: skip
    twice = np.stack([utilities, utilities], axis=2)  # the same draw twice: nothing varies over draws
    slope = _slope(twice, data, odds, bias)
    np.testing.assert_allclose(slope.score, score, atol=1e-6)
    np.testing.assert_allclose(slope.observed, -np.array(bend), atol=1e-5)
    assert np.linalg.eigvalsh(slope.complete - slope.observed)[0] > -1e-9


def test_how_far_people_look_is_a_product_limit() -> None:
    """By hand: of four who could go on after the first place three do; of two of these (one list ended) one does."""
    population, level = planted()
    rng = np.random.default_rng(3)

    def of(shown: int, examined: int | None) -> tuple[Picked, Rewards]:
        texts = tuple(str(j) for j in rng.integers(10**12, size=shown))
        return Picked(prompt="", shown=texts, picked=0, examined=examined), Rewards(
            np.zeros(shown), rng.standard_normal((shown, 3))
        )

    said = [of(3, 1), of(3, 2), of(3, 3), of(2, 2), of(3, None)]
    assert Exposure.fit({"ada": said}, population, level).reach == pytest.approx((1, 3 / 4, 3 / 4 * 1 / 2))
    assert Exposure.fit({"ada": said[4:]}, population, level).reach == ()


def test_depths_follow_from_what_was_picked() -> None:
    exposure = Exposure(log_odds=(0.0, -0.5), reach=(1.0, 0.5, 0.25))
    assert Exposure().depths(np.zeros(4), 1) == [(4, 1.0)]
    assert exposure.depths(np.zeros(4), 1, examined=3) == [(3, 1.0)]
    found = dict(exposure.depths(np.zeros(4), 1))  # P(D) = 1/2, 1/4, 0, 1/4, and a pick of m has 1 / m
    assert found == pytest.approx({2: 2 / 3, 4: 1 / 3})
    assert dict(exposure.depths(np.array([9.0, 0, 0, 0]), 1)) == pytest.approx({2: 0.5, 4: 0.5}, abs=1e-3)
    assert Exposure(reach=(1.0, 0.0)).depths(np.zeros(3), 2) == [(3, 1.0)]  # from where, as far as was learned, nobody looks
    np.testing.assert_array_equal(exposure.bias(4), [0.0, -0.5, -0.5, -0.5])


def test_an_order_that_never_varies_is_refused() -> None:
    population, level = planted()
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3, 3))

    def always(order: list[int]) -> tuple[Picked, Rewards]:
        return Picked(prompt="", shown=tuple("abc"[i] for i in order), picked=0), Rewards(np.zeros(3), x[order])

    with pytest.raises(DataError, match="each of 3 responses was always shown at one place"):
        Exposure.fit({str(u): [always([0, 1, 2])] for u in range(9)}, population, level)
    varied = Exposure.fit({str(u): [always([0, 1, 2]), always([2, 0, 1])] for u in range(9)}, population, level)
    assert varied.log_odds[2] < varied.log_odds[1] < 0  # always the first
    crowd = level.model_copy(update={"crowd": (1.0, 0.0, 0.0)})
    by_reward = picks(np.zeros(3), 30, rng, ordered=1e9)
    with pytest.raises(DataError, match="100% of neighbours were shown in the order of the crowd's reward"):
        Exposure.fit({"ada": by_reward}, population, crowd)
    with pytest.raises(DataError, match="0 picks"):
        Exposure.fit({"ada": []}, population, level)
    with pytest.raises(DataError, match=r"pick 0 has rewards \(4, 2\)"):
        Exposure.fit({"ada": [(by_reward[0][0], Rewards(np.zeros(4), np.zeros((4, 2))))]}, population, level)
    with pytest.raises(ConvergenceError, match="after 1 rounds"):
        Exposure.fit({"ada": by_reward}, population, level, max_rounds=1)
