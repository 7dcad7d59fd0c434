"""Questions: scores against one pair and one user at a time, the loop against itself without a batch, and whether they pay."""

import itertools
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.stats import norm

import palate
from palate import questions
from palate.adaptation import Profile
from palate.data.attributes import Attributes, attributes
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.living.population import Population
from palate.living.terms import Rewards, Terms
from palate.models.base import Newton
from palate.models.pref import PReF
from palate.priors import Prior
from palate.questions import (
    Belief,
    Distracted,
    DOptimal,
    HessianUncertainty,
    InformationGain,
    MutualInformation,
    Pool,
    Random,
    Targeted,
    Thompson,
    Undecided,
    ask,
    certain,
    evidence_of_unsure,
    next_questions,
    noisy,
    pairs_among,
    ranking,
    settled,
    should_stop,
    twice,
)
from palate.questions import belief as belief_module
from palate.solvers import Batch, posterior

Floats = NDArray[np.float64]
ANY = torch.Generator()


@cache
def world(seed: int = 0) -> tuple[Attributes, PReF]:
    data = attributes(seed, n_pairs=150, n_pool=120, n_test=150)
    model = palate.fit(data.train, PReF(7, strength=0.1, kappa=4.0), seed=seed)
    assert isinstance(model, PReF)
    return data, model


def pool_of(data: Attributes, model: PReF, rows: torch.Tensor) -> Pool:
    return Pool.of(model, EmbeddedPairs(data.embeddings, rows[:, 0], rows[:, 1], ["nobody"] * len(rows)))


def random_belief(users: int = 3, said: int = 4, k: int = 2, q: int = 7, seed: int = 0) -> tuple[Belief, Pool]:
    rng = np.random.default_rng(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(size))

    factor = torch.tril(draw(k, k)) + 2 * torch.eye(k, dtype=torch.float64)
    prior = Prior.gaussian(factor @ factor.T)
    weight = torch.ones(users, said, dtype=torch.float64)
    weight[1, 2:] = 0  # somebody who has said less
    batch = Batch(draw(users, said, k), draw(users, said), weight, None)
    solved = posterior(batch, prior)
    return Belief(solved.mean, solved.covariance, batch, prior), Pool(draw(q, k), draw(q))


def dsigma(margin: float) -> float:
    return float(np.exp(-margin) / (1 + np.exp(-margin)) ** 2)


# -- scores


def naive(belief: Belief, pool: Pool, way: str) -> Floats:
    """Pair by pair and user by user, with matrices inverted as the formulas have them."""
    out, k = np.zeros((len(belief.mean), len(pool.slopes))), pool.slopes.shape[1]
    assert belief.prior is not None
    for u, w in enumerate(belief.mean.numpy()):
        precision = np.linalg.inv(belief.prior.covariance.numpy())
        matrix = 0.001 * np.eye(k) if way == "hessian" else precision
        for v, offset, weight in zip(belief.said.slopes[u], belief.said.offset[u], belief.said.weight[u], strict=True):
            size = 0.25 if way == "d-optimal" else dsigma(float(offset + v @ torch.from_numpy(w)))
            matrix = matrix + float(weight) * size * np.outer(v, v)
        for q, (v, offset) in enumerate(zip(pool.slopes.numpy(), pool.offset.numpy(), strict=True)):
            size = {"hessian": dsigma(offset + v @ w) ** 2, "gain": dsigma(offset + v @ w), "d-optimal": 1.0}[way]
            out[u, q] = size * v @ np.linalg.inv(matrix) @ v
    return out


@pytest.mark.parametrize(
    ("way", "how"), [("hessian", HessianUncertainty()), ("gain", InformationGain()), ("d-optimal", DOptimal())]
)
def test_scores_are_what_the_formulas_say_for_every_pair(way: str, how: questions.Question) -> None:
    belief, pool = random_belief()
    np.testing.assert_allclose(how.score(belief, pool, ANY), naive(belief, pool, way), rtol=1e-5)


def test_the_pool_in_blocks_is_the_pool_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    belief, pool = random_belief(q=23)
    whole = InformationGain().score(belief, pool, ANY)
    monkeypatch.setattr(belief_module, "BLOCK", 12)
    torch.testing.assert_close(InformationGain().score(belief, pool, ANY), whole)


def test_the_gain_is_the_growth_of_the_determinant() -> None:
    """det(H + sigma' v v^T) = det(H) (1 + sigma' v^T H^-1 v): the score is what one more answer multiplies it by, less 1."""
    belief, pool = random_belief()
    assert belief.covariance is not None
    score = InformationGain().score(belief, pool, ANY)
    for u in range(3):
        precision = np.linalg.inv(belief.covariance[u].numpy())
        for q in range(7):
            v = pool.slopes[q].numpy()
            curvature = dsigma(float(pool.offset[q] + pool.slopes[q] @ belief.mean[u]))
            grown = np.linalg.det(precision + curvature * np.outer(v, v)) / np.linalg.det(precision)
            assert float(score[u, q]) == pytest.approx(grown - 1, rel=1e-6)


def test_random_questions_come_from_their_generator() -> None:
    belief, pool = random_belief()
    first, again, other = (Random().score(belief, pool, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_methods_without_what_a_score_needs_are_refused() -> None:
    belief, pool = random_belief()
    with pytest.raises(DataError, match="information gain needs a covariance"):
        InformationGain().score(belief._replace(covariance=None), pool, ANY)
    with pytest.raises(DataError, match="Thompson sampling needs a covariance"):
        Thompson().score(belief._replace(covariance=None), pool, ANY)
    with pytest.raises(DataError, match="looks at the pairs that were answered"):
        HessianUncertainty().score(belief._replace(said=None), pool, ANY)
    with pytest.raises(DataError, match="0 targets"):
        Targeted(Pool(torch.zeros(0, 2), torch.zeros(0)))
    with pytest.raises(DataError, match="D-optimal design needs a prior"):
        DOptimal().score(belief._replace(prior=None), pool, ANY)


# -- what an answer is expected to say, against integrals


def sigma(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-x)))


def h(p: float) -> float:
    return 0.0 if p in (0.0, 1.0) else -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_mutual_information_is_the_integral() -> None:
    belief, pool = random_belief(users=2, q=4)
    score = MutualInformation().score(belief, pool, ANY)
    margin, std = pool.margins(belief.mean), belief.spread(pool).sqrt()
    for u in range(2):
        for q in range(4):
            m, s = float(margin[u, q]), float(std[u, q])

            def of(f, m: float = m, s: float = s) -> float:  # type: ignore[no-untyped-def]
                value: float = quad(lambda z: f(float(sigma(m + s * z))) * norm.pdf(z), -12, 12, epsabs=1e-12)[0]
                return value

            assert float(score[u, q]) == pytest.approx(h(of(float)) - of(h), abs=2e-6)
    assert bool((score < math.log(2)).all())
    none = MutualInformation().score(belief._replace(covariance=torch.zeros(2, 2, 2).double()), pool, ANY)
    torch.testing.assert_close(none, torch.zeros_like(none))


class Grid(NamedTuple):
    """Two weights on a grid: the density of N(mean, covariance), and sums under it."""

    points: Floats  # (G, 2)
    density: Floats  # (G,), sums to one

    @classmethod
    def of(cls, mean: Floats, covariance: Floats) -> "Grid":
        z = np.stack(np.meshgrid(*[np.linspace(-6, 6, 241)] * 2), axis=-1).reshape(-1, 2)
        density = np.exp(-(z**2).sum(1) / 2)
        return cls(mean + z @ np.linalg.cholesky(covariance).T, density / density.sum())


def test_while_an_answer_is_out_the_covariance_is_the_expected_one() -> None:
    """E_y Cov(w | y) on a grid of weights; the mean of the means is the mean."""
    belief, pool = random_belief()
    assert belief.covariance is not None
    rows = torch.tensor([0, 3, 6])
    after = belief.expecting(pool, rows)
    assert after.covariance is not None
    for u, row in enumerate(rows.tolist()):
        points, density = Grid.of(belief.mean[u].numpy(), belief.covariance[u].numpy())
        first = sigma(points @ pool.slopes[row].numpy() + float(pool.offset[row]))
        expected = np.zeros((2, 2))
        for likelihood in (first, 1 - first):
            weight = density * likelihood
            away = points - (weight / weight.sum()) @ points
            expected += (weight[:, None] * away).T @ away
        np.testing.assert_allclose(after.covariance[u].numpy(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(after.mean, belief.mean)
    assert after.said is not None
    assert after.said.offset.shape == (3, 5)


def test_a_sure_answer_explains_as_little_on_either_side() -> None:
    """Of a narrow margin sigma'(m) s^2, however small; of the widest 2 / pi, and never more."""
    margin = torch.tensor([-300.0, -50.0, -40.0, 40.0, 50.0, 300.0], dtype=torch.float64)
    found = belief_module.explained(margin, torch.full_like(margin, 1e-4))
    np.testing.assert_allclose(found.numpy(), 1e-4 * np.exp(-margin.abs().numpy()), rtol=1e-3)
    sure = torch.tensor([-1e4, 1e4], dtype=torch.float64)
    assert belief_module.explained(sure, torch.ones_like(sure)).tolist() == [0, 0]
    wide = torch.linspace(-30.0, 30.0, 601, dtype=torch.float64)
    for std in (1e2, 1e4, 1e8):
        assert 0.6 < float(belief_module.explained(std * wide / 100, torch.full_like(wide, std**2)).max()) <= 2 / math.pi


def test_targeted_information_is_that_of_the_sides() -> None:
    """I(answer; side of the target) on a grid, for answers that say little, where the second order is all there is."""
    belief, pool = random_belief()
    assert belief.covariance is not None
    small = pool._replace(slopes=0.1 * pool.slopes)
    targets = Pool(torch.tensor([[1.0, 0.3], [-0.4, 1.0]], dtype=torch.float64), torch.tensor([0.2, -0.5], dtype=torch.float64))
    score = Targeted(targets).score(belief, small, ANY)
    points, density = Grid.of(belief.mean[0].numpy(), belief.covariance[0].numpy())
    side = points @ targets.slopes.numpy().T + targets.offset.numpy() > 0
    for q in range(7):
        first = sigma(points @ small.slopes[q].numpy() + float(small.offset[q]))
        information = 0.0
        for t in range(2):
            told = density @ side[:, t]
            for likelihood in (first, 1 - first):
                p = density @ likelihood
                information += (h(told) / 2) - p * h(density * likelihood @ side[:, t] / p)
            # h(told) was taken in halves: once for each answer
        assert float(score[0, q]) == pytest.approx(information, rel=0.05)
    far = Targeted(Pool(targets.slopes, torch.tensor([1e4, -1e4], dtype=torch.float64))).score(belief, pool, ANY)
    assert bool(((far >= 0) & (far < 1e-6)).all())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_targets_that_are_certain_leave_the_rest_as_it_is(kind: torch.dtype) -> None:
    """g rho^2 phi(z)^2 / (2 Phi(z) Phi(-z)) of the one target that is open, by scipy; of the others the side is certain."""
    mean, covariance = torch.tensor([[0.5, -0.2, 1.0]]), torch.tensor([[2.0, 0.6, 0.0], [0.6, 1.0, 0.0], [0.0, 0.0, 0.0]])
    belief = Belief(mean.to(kind), covariance[None].to(kind), None, None)
    asked = torch.tensor([[0.8, 0.3, 0.0], [-0.1, 1.2, 5.0], [0.0, 0.0, 2.0]])
    pool = Pool(asked, torch.tensor([0.1, -4.0, 0.3])).to(mean.to(kind))
    slopes = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0], [1e-18, 0, 0]]).to(kind)
    score = Targeted(Pool(slopes, torch.tensor([3.0, 0, -8, 0, 5]).to(kind))).score(belief, pool, ANY)
    z = 0.5 / math.sqrt(2)
    doubt = norm.pdf(z) ** 2 / (norm.cdf(z) * norm.cdf(-z))
    for v, offset, told in zip(pool.slopes.double().numpy(), pool.offset.tolist(), score[0].tolist(), strict=True):
        variance, along = float(v @ covariance.double().numpy() @ v), float(v @ covariance[:, 0].double().numpy())
        if not variance:
            assert told == 0
            continue
        m, s = float(offset + v @ mean[0].double().numpy()), math.sqrt(variance)
        p, pull = (quad(lambda x, n=n, m=m, s=s: x**n * sigma(m + s * x) * norm.pdf(x), -12, 12)[0] for n in (0, 1))
        assert told == pytest.approx(pull**2 / (p * (1 - p)) * along**2 / (2 * variance) * doubt / 2, rel=1e-4)


def test_targeted_questions_are_about_what_will_be_predicted() -> None:
    """Eight weights, the last two of which matter: the widest are asked about by those who want to know the weights."""
    covariance = torch.diag(torch.tensor([16.0, 16, 16, 16, 16, 16, 4, 4], dtype=torch.float64))
    known = Profile("ada", torch.zeros(8, dtype=torch.float64), covariance, 0, True, "")
    pool = Pool(torch.eye(8, dtype=torch.float64).repeat(3, 1), torch.zeros(24, dtype=torch.float64))
    pool = pool._replace(slopes=pool.slopes * torch.linspace(0.5, 1.0, 24)[:, None])
    targets = Pool(torch.eye(8, dtype=torch.float64)[6:], torch.zeros(2, dtype=torch.float64))
    assert {row % 8 for row in next_questions(known, pool, Targeted(targets), 4, similarity=1.0)} == {6, 7}
    assert {row % 8 for row in next_questions(known, pool, MutualInformation(), 4, similarity=1.0)}.isdisjoint({6, 7})


def test_thompson_is_the_difference_of_two_guesses() -> None:
    """The mean score over draws against two independent normal draws of the margin; the same generator draws the same."""
    pool = Pool(torch.tensor([[1.0], [0.2]], dtype=torch.float64), torch.tensor([0.3, -1.0], dtype=torch.float64))
    users = 20_000
    belief = Belief(torch.full((users, 1), 0.5).double(), torch.full((users, 1, 1), 4.0).double(), None, None)
    score = Thompson().score(belief, pool, torch.Generator().manual_seed(0))
    z = np.random.default_rng(0).standard_normal((2, 200_000))
    for q, (v, offset) in enumerate(((1.0, 0.3), (0.2, -1.0))):
        guesses = sigma(offset + v * (0.5 + 2 * z))
        assert float(score[:, q].mean()) == pytest.approx(np.abs(guesses[0] - guesses[1]).mean(), rel=0.02)
    assert torch.equal(score, Thompson().score(belief, pool, torch.Generator().manual_seed(0)))


# -- the next questions


def known_of(belief: Belief, user: int = 0) -> Profile:
    assert belief.covariance is not None
    return Profile("ada", belief.mean[user], belief.covariance[user], 4, True, "")


def test_the_next_question_is_the_highest_score_not_asked() -> None:
    belief, pool = random_belief(q=40)
    for how in (MutualInformation(), InformationGain(), Thompson()):
        score = how.score(Belief(belief.mean[:1], belief.covariance[:1], None, None), pool, torch.Generator().manual_seed(0))  # type: ignore[index]
        best = score[0].argsort(descending=True).tolist()
        assert next_questions(known_of(belief), pool, how) == best[:1]
        assert next_questions(known_of(belief), pool, how, asked=best[:3]) == [best[3]]

    class Living(NamedTuple):  # float64 numpy, as a living profile has
        mean: Floats
        covariance: Floats

    living = Living(belief.mean[0].numpy(), belief.covariance[0].numpy())  # type: ignore[index]
    single = Pool(pool.slopes.float(), pool.offset.float())
    assert next_questions(living, single, n=3) == next_questions(known_of(belief), pool, MutualInformation(), 3)
    one = Belief(belief.mean[:1], belief.covariance[:1], belief.said.at(torch.tensor([0])), belief.prior)  # type: ignore[index,union-attr]
    for rule in (HessianUncertainty(), DOptimal()):
        assert next_questions(one, pool, rule) == [int(rule.score(one, pool, ANY).argmax())]


def test_a_living_profile_knows_what_it_was_asked() -> None:
    """A pair, a tie, a pick of three that is broken into pairs and an axis set by hand, which is none; all have aged."""
    model = world()[1]
    population, rng = Population.of(model, half_life_choices=3.0), np.random.default_rng(0)
    k = model.n_weights
    v, b = rng.standard_normal((7, k)), rng.standard_normal(7)
    three = Terms(v[2:5], b[2:5], np.array([0.0, 1, 0]), np.array([0]), np.ones(1), np.zeros((0, k)), np.zeros(0), np.zeros(0))
    pull = Terms.empty(k)._replace(pulls=v[:1], level=np.ones(1), std=np.ones(1))
    live = population.start("ada").update(Terms.pairs(b[:2], v[:2], weight=[1.0, 0.7], tie=[False, True]))
    live = live.update(three).update(pull).update(Terms.pairs(b[5:6], v[5:6]))
    told = [(v[0], b[0], 2 ** (-2 / 3)), (v[1], b[1], 0.7 * 2 ** (-2 / 3)), (v[5], b[5], 1.0)]
    told += [(v[3] - v[other], b[3] - b[other], 2 / 3 * 2 ** (-1 / 3)) for other in (2, 4)]
    prior = np.linalg.inv(population.components("ada").factors[0] @ population.components("ada").factors[0].T)
    linear = prior + sum(weight / 4 * np.outer(slope, slope) for slope, _, weight in told)
    curved = 1e-3 * np.eye(k) + sum(w * dsigma(float(o + s @ live.mean)) * np.outer(s, s) for s, o, w in told)
    slopes, offset = rng.standard_normal((30, k)), rng.standard_normal(30)
    pool, again = Pool(torch.from_numpy(slopes), torch.from_numpy(offset)), population.from_bytes(live.to_bytes())
    bend = np.array([dsigma(float(m)) for m in offset + slopes @ live.mean])
    for rule, expected in [
        (DOptimal(), np.einsum("qi,ij,qj->q", slopes, np.linalg.inv(linear), slopes)),
        (HessianUncertainty(), bend**2 * np.einsum("qi,ij,qj->q", slopes, np.linalg.inv(curved), slopes)),
    ]:
        for known in (live, again):
            score = rule.score(questions.belief_of(known), pool, ANY)[0].numpy()
            np.testing.assert_allclose(score, expected, rtol=1e-6)
            assert next_questions(known, pool, rule) == [int(expected.argmax())]
    with pytest.raises(DataError, match="give a living profile, or a Belief"):
        next_questions(live.profile, pool, DOptimal())


def test_a_batch_says_nothing_twice() -> None:
    """Eight directions with ten near copies each, of which the first has the highest scores: one of each is asked."""
    rng = np.random.default_rng(0)
    frame = np.linalg.qr(rng.standard_normal((8, 8)))[0] * np.linspace(3, 2, 8)[:, None]
    slopes = np.repeat(frame, 10, axis=0) + 0.01 * rng.standard_normal((80, 8))
    pool = Pool(torch.from_numpy(slopes), torch.zeros(80, dtype=torch.float64))
    known = Profile("ada", torch.zeros(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64), 0, True, "")
    batch = next_questions(known, pool, n=8)
    assert sorted(row // 10 for row in batch) == list(range(8))
    highest = MutualInformation().score(questions.belief_of(known), pool, ANY)[0].argsort(descending=True)[:8]
    assert len(set((highest // 10).tolist())) == 1
    # The expected answers alone would come back to the first direction before the last ones were asked about.
    wide = Pool(torch.from_numpy(slopes * np.repeat([4.0] + [0.3] * 7, 10)[:, None]), pool.offset)
    assert sorted(row // 10 for row in next_questions(known, wide, n=8)) == list(range(8))
    assert [row // 10 for row in next_questions(known, wide, n=8, similarity=1.0)].count(0) > 1
    none = torch.zeros(1, 0, dtype=torch.float64)
    nothing = Belief(known.mean[None], None, Batch(none.reshape(1, 0, 8), none, none, None), None)
    asked = next_questions(nothing, pool, HessianUncertainty(), 8)  # without a covariance, what was asked tells
    assert sorted(row // 10 for row in asked) == list(range(8))


def test_the_same_pair_is_never_asked_twice_whichever_way_round() -> None:
    v = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pool = Pool(torch.cat([v, v, -v]), torch.cat([torch.arange(5.0), torch.arange(5.0), -torch.arange(5.0)]).double())
    known = Profile("ada", torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64), 0, True, "")
    every = next_questions(known, pool, n=15)
    assert sorted(row % 5 for row in every) == list(range(5))
    assert {row % 5 for row in next_questions(known, pool, n=15, asked=[1, 8])} == {0, 2, 4}
    assert next_questions(known, pool, asked=range(5)) == []
    line = Pool(torch.linspace(1, 2, 4, dtype=torch.float64)[:, None], torch.zeros(4, dtype=torch.float64))
    alone = Profile("ada", torch.zeros(1).double(), torch.eye(1).double(), 0, True, "")
    assert next_questions(alone, line, n=4) == [3, 2, 1, 0]  # one weight: the limit on similarity yields


def test_questions_among_the_responses_at_hand() -> None:
    rng = np.random.default_rng(0)
    rewards = Rewards(rng.standard_normal(6), rng.standard_normal((6, 2)))
    pool, rows = pairs_among(rewards)
    assert rows.tolist() == [[i, j] for i in range(6) for j in range(i + 1, 6)]
    weights = rng.standard_normal(2)
    value = rewards.offset + rewards.slopes @ weights
    np.testing.assert_allclose(pool.margins(torch.from_numpy(weights)[None])[0], value[rows[:, 0]] - value[rows[:, 1]])
    with pytest.raises(DataError, match="m at least 2"):
        pairs_among(Rewards(np.zeros(1), np.zeros((1, 2))))


def test_questions_that_cannot_be() -> None:
    belief, pool = random_belief()
    known = known_of(belief)
    with pytest.raises(DataError, match="the pool has 3 weights and the profile 2"):
        next_questions(known, Pool(torch.zeros(7, 3), torch.zeros(7)))
    with pytest.raises(DataError, match="n is 0"):
        next_questions(known, pool, n=0)
    with pytest.raises(DataError, match="asked holds row 7 of a pool of 7"):
        next_questions(known, pool, asked=[0, 7])
    with pytest.raises(DataError, match="the pool holds a number that is NaN"):
        next_questions(known, pool._replace(offset=pool.offset * torch.nan))
    with pytest.raises(DataError, match="similarity is 0"):
        next_questions(known, pool, similarity=0.0)
    with pytest.raises(DataError, match="expected one user"):
        next_questions(belief, pool)
    assert next_questions(known, Pool(torch.zeros(0, 2), torch.zeros(0))) == []


# -- when to stop


def test_two_candidates_are_settled_as_their_margin_says() -> None:
    """P(wrong) = Phi(-m / s) and E max - max E = s phi(m / s) - m Phi(-m / s)."""
    belief, _ = random_belief()
    known = known_of(belief)
    rewards = Rewards(np.array([0.4, 0.0]), np.array([[1.0, -0.5], [0.0, 0.5]]))
    d = rewards.slopes[0] - rewards.slopes[1]
    m, s = float(0.4 + d @ known.mean.numpy()), math.sqrt(d @ known.covariance.numpy() @ d)  # type: ignore[union-attr]
    found = settled(known, rewards, draws=100_000)
    assert found.best == int(m < 0)
    wrong = norm.cdf(-abs(m) / s)
    assert found.wrong_pairs == pytest.approx(wrong, rel=1e-9)
    assert found.wrong_best == found.wrong_order == pytest.approx(wrong, abs=0.005)
    assert found.regret == pytest.approx(s * norm.pdf(m / s) - abs(m) * wrong, abs=0.01 * s)
    at = found.wrong_best
    assert should_stop(known, rewards, error=at + 0.03)
    assert not should_stop(known, rewards, error=at - 0.03)
    assert should_stop(known, rewards, error=0.0, regret=found.regret * 1.1)
    copies = Rewards(np.repeat(rewards.offset[:1], 3), np.repeat(rewards.slopes[:1], 3, axis=0))
    assert settled(known, copies)[1:] == (0.0, 0.0, 0.0, 0.0)
    assert should_stop(known, copies, what="order", error=0.0)


def test_stopping_errs_as_often_as_it_says() -> None:
    """150 planted users drawn from the prior, asked by fives until the best of six is settled but for a tenth."""
    rng, k, users, most = np.random.default_rng(0), 3, 150, 30
    model, prior = gaussian_model(k, 4.0)
    weights = torch.from_numpy(2.0 * rng.standard_normal((users, k))).float()
    pool = Pool(torch.from_numpy(rng.standard_normal((60, k))).float(), torch.zeros(60))
    rewards = Rewards(np.zeros(6), rng.standard_normal((6, k)))
    found = ask(model, pool, pool.margins(weights), MutualInformation(), most)
    best = (weights.double().numpy() @ rewards.slopes.T).argmax(1)
    going, wrong, asked = list(range(users)), [], []
    for t in range(0, most + 1, 5):
        sign = torch.where(found.answer[:, :t] < 0.5, -1.0, 1.0)
        said = Batch(pool.slopes[found.question[:, :t]] * sign[..., None], torch.zeros(users, t), torch.ones(users, t), None)
        solved = posterior(said, prior)
        assert solved.covariance is not None
        for u in list(going):
            known = Profile(str(u), solved.mean[u], solved.covariance[u], t, True, "")
            if should_stop(known, rewards, error=0.1):
                going.remove(u)
                wrong.append(settled(known, rewards).best != best[u])
                asked.append(t)
    assert len(wrong) > 80
    assert np.mean(wrong) < 0.1 + 2 * math.sqrt(0.09 / len(wrong))
    assert np.mean(wrong) > 0.01  # and it does stop early
    assert 2 < np.median(asked) < 30


def gaussian_model(k: int, variance: float) -> tuple[palate.Hierarchical, Prior]:
    """K weights for K features, w ~ N(0, variance I), no crowd."""
    numbers = {"direction": torch.zeros(k), "bases": torch.eye(k), "share": torch.ones(1), "means": torch.zeros(1, k)}
    model = palate.Hierarchical().like(numbers | {"factors": math.sqrt(variance) * torch.eye(k)[None]})
    assert model.prior is not None
    return model, model.prior


def test_a_ranking_says_how_sure_each_place_is() -> None:
    rng = np.random.default_rng(3)
    root = rng.standard_normal((3, 3))
    mean, offset, slopes = rng.standard_normal(3), rng.standard_normal(6), rng.standard_normal((6, 3))
    offset[5], slopes[5] = offset[2], slopes[2]  # a copy of another: for certain no better and no worse
    known = Profile("ada", torch.from_numpy(mean), torch.from_numpy(root @ root.T), 0, True, "")
    found = ranking(known, Rewards(offset, slopes))
    order = [place.candidate for place in found]
    assert order == np.argsort(-(offset + slopes @ mean), kind="stable").tolist()
    np.testing.assert_allclose([place.reward for place in found], (offset + slopes @ mean)[order])
    drawn = offset + rng.multivariate_normal(mean, root @ root.T, size=200_000) @ slopes.T
    for place, after in itertools.pairwise(found):
        apart = drawn[:, place.candidate] - drawn[:, after.candidate]
        share = 0.5 if {place.candidate, after.candidate} == {2, 5} else float((apart > 0).mean())
        assert place.above_next == pytest.approx(share, abs=0.005)
    assert found[-1].above_next is None


def test_what_cannot_be_settled() -> None:
    belief, _ = random_belief()
    known, rewards = known_of(belief), Rewards(np.zeros(2), np.eye(2))
    with pytest.raises(DataError, match="needs a covariance"):
        settled(Profile("ada", known.mean, None, 0, True, ""), rewards)
    with pytest.raises(DataError, match="m at least 1"):
        settled(known, Rewards(np.zeros(0), np.zeros((0, 2))))
    with pytest.raises(DataError, match="NaN or infinite"):
        settled(known, Rewards(np.array([0.0, np.nan]), np.eye(2)))
    with pytest.raises(DataError, match="error is 2"):
        should_stop(known, rewards, error=2.0)
    with pytest.raises(DataError, match="what is 'all'"):
        should_stop(known, rewards, what="all")  # type: ignore[arg-type]


# -- "I can't say"


def test_people_who_cannot_always_say() -> None:
    """Rao and Kupper's three probabilities; and silence that has nothing to do with the pair."""
    margin, generator = torch.full((100_000,), 0.8), torch.Generator().manual_seed(0)
    said = Undecided(1.0)(margin, generator)
    assert float((said == 1).float().mean()) == pytest.approx(float(sigma(np.array(-0.2))), abs=0.006)
    assert float((said == 0).float().mean()) == pytest.approx(float(sigma(np.array(-1.8))), abs=0.006)
    silent = Distracted(0.3)(margin, generator)
    assert float(torch.isnan(silent).float().mean()) == pytest.approx(0.3, abs=0.006)
    heard = silent[~torch.isnan(silent)]
    assert float(heard.mean()) == pytest.approx(float(sigma(np.array(0.8))), abs=0.006)
    with pytest.raises(DataError, match="threshold is -1"):
        Undecided(-1.0)
    with pytest.raises(DataError, match="rate is 2"):
        Distracted(2.0)


@pytest.mark.parametrize("unsure", [0.0, 0.7])
def test_what_could_not_be_said_is_a_tie_of_its_weight(unsure: float) -> None:
    data, model = world()
    pool, truth = pool_of(data, model, data.pool), data.margins(data.pool)[:5]
    found = ask(model, pool, truth, MutualInformation(), 8, answers=Distracted(0.5), unsure=unsure)
    nothing = torch.isnan(found.answer)
    assert nothing.any()
    assert model.prior is not None
    for u in range(5):
        rows = found.question[u]
        kept = torch.ones(8, dtype=torch.bool) if unsure else ~nothing[u]
        sign = torch.where(found.answer[u] < 0.5, -1.0, 1.0)
        weight = torch.where(nothing[u], unsure, 1.0)
        parts = (pool.slopes[rows] * sign[:, None])[kept], (pool.offset[rows] * sign)[kept], weight[kept], nothing[u][kept]
        alone = posterior(Batch(*(part[None] for part in parts)), model.prior)
        torch.testing.assert_close(found.weights[u, -1], alone.mean[0], atol=1e-4, rtol=1e-4)
        assert len(set(rows.tolist())) == 8  # and is not asked again


def test_who_has_said_nothing_is_still_who_they_were() -> None:
    """The crowd's weights are 0 and the prior's mean is not, so that a belief from no evidence under the prior is another."""
    numbers = {"direction": torch.zeros(2), "bases": torch.eye(2), "share": torch.ones(1), "means": torch.tensor([[0.7, -0.2]])}
    model = palate.Hierarchical().like(numbers | {"factors": torch.tensor([[[1.0, 0.0], [0.4, 0.8]]])})
    pool = Pool(torch.tensor([[1.0, 0.5], [-0.3, 2.0], [1.5, 0.2]]), torch.tensor([0.4, -0.6, 0.1]))
    truth = pool.margins(torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.3, 0.3]]))

    def silent(margin: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.tensor([torch.nan, 1.0, torch.nan])

    found = ask(model, pool, truth, MutualInformation(), 3, answers=silent)
    assert model.prior is not None
    assert not found.weights[[0, 2]].any()
    said = pool.at(found.question[1:2])
    alone = posterior(Batch(*said, torch.ones(1, 3), None), model.prior)
    torch.testing.assert_close(found.weights[1, 3], alone.mean[0])
    tied = ask(model, pool, truth, MutualInformation(), 3, answers=silent, unsure=0.5)
    assert bool(tied.weights[[0, 2], 1:].all())  # a tie is evidence

    spread = model.prior.covariance + torch.outer(model.prior.mean, model.prior.mean)  # about the crowd
    margin = pool.offset[2] / torch.sqrt(1 + math.pi / 8 * pool.slopes[2] @ spread @ pool.slopes[2])
    evidence = evidence_of_unsure(model, pool, torch.tensor([[0, 2]]), torch.tensor([[torch.nan, 1.0]]), weights=(0.0,))
    assert evidence[0.0] == pytest.approx(float(torch.nn.functional.logsigmoid(margin)), abs=1e-6)


def test_the_answers_tell_what_silence_means() -> None:
    """Of people who were asked what would tell most, so that what they were asked depends on what they said."""
    rng = np.random.default_rng(0)
    model, _ = gaussian_model(3, 4.0)
    weights = torch.from_numpy(2.0 * rng.standard_normal((300, 3))).float()
    pool = Pool(torch.from_numpy(rng.standard_normal((100, 3))).float(), torch.zeros(100))
    best = {}
    for name, people in (("close", Undecided(1.5)), ("by chance", Distracted(0.4))):
        found = ask(model, pool, pool.margins(weights), InformationGain(), 15, answers=people)
        evidence = evidence_of_unsure(model, pool, found.question, found.answer, weights=(0.0, 0.5, 1.0))
        best[name] = max(evidence, key=lambda weight: evidence[weight])
    assert best == {"close": 1.0, "by chance": 0.0}
    with pytest.raises(DataError, match="0 of 4500 answers"):
        evidence_of_unsure(model, pool, found.question, torch.ones(300, 15))


# -- pools of one's own, and several at once


def test_pools_of_ones_own_are_the_common_pool() -> None:
    """The same pairs for each user as an array of their own, with some that nobody may be asked."""
    data, model = world()
    pool, truth = pool_of(data, model, data.pool[:30]), data.margins(data.pool[:30])[:6]
    own = Pool(pool.slopes.expand(6, -1, -1), pool.offset.expand(6, -1))
    allowed = torch.arange(30).expand(6, -1) % 3 != 0
    test = pool_of(data, model, data.test), data.margins(data.test)[:6]
    mine = Pool(test[0].slopes.expand(6, -1, -1), test[0].offset.expand(6, -1)), test[1]
    for how in (MutualInformation(), HessianUncertainty(), Targeted(pool)):
        together = ask(model, pool, truth, how, 10, test=test, answers=certain, allowed=allowed, at_once=3)
        apart = ask(model, own, truth, how, 10, test=mine, answers=certain, allowed=allowed, at_once=3)
        assert torch.equal(together.question, apart.question)
        torch.testing.assert_close(together.accuracy, apart.accuracy)
        assert bool((together.question % 3 != 0).all())


def test_several_at_once_are_the_next_questions() -> None:
    data, model = world()
    pool, truth = pool_of(data, model, data.pool), data.margins(data.pool)[:4]
    found = ask(model, pool, truth, MutualInformation(), 6, answers=certain, at_once=3)
    assert model.prior is not None
    for u in range(4):
        start = Profile("ada", model.crowd_weights, model.prior.covariance, 0, True, "")
        assert found.question[u, :3].tolist() == next_questions(start, pool, n=3)
        rows, sign = found.question[u, :3], truth[u, found.question[u, :3]].sign()
        said = Batch((pool.slopes[rows] * sign[:, None])[None], (pool.offset[rows] * sign)[None], torch.ones(1, 3), None)
        after = posterior(said, model.prior)
        assert after.covariance is not None
        known = Profile("ada", after.mean[0], after.covariance[0], 3, True, "")
        assert found.question[u, 3:].tolist() == next_questions(known, pool, n=3, asked=rows.tolist())


# -- the benchmark


@pytest.fixture(scope="module")
def benchmark_module(root: Path) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        from benchmarks import questions as module

        yield module


def test_answers_are_counted_between_whole_ones_with_an_interval_over_users(benchmark_module: ModuleType) -> None:
    curve = np.array([0.5, 0.6, 0.8, 0.9])
    assert benchmark_module.answers_needed(curve, 0.7) == pytest.approx(1.5)
    assert benchmark_module.answers_needed(curve, 0.5) == 0
    assert benchmark_module.answers_needed(curve, 0.95) == 4
    rng = np.random.default_rng(0)
    slow = [np.linspace(0.5, 0.8, 13) + 0.05 * rng.standard_normal((100, 1)) for _ in range(4)]
    fast = [way + np.linspace(0, 0.3, 13) + 0.02 * rng.standard_normal((100, 13)) for way in slow]
    value, low, high = benchmark_module.needed_with_interval(fast, slow)
    assert low <= 5.0 <= high  # twice the slope
    assert 4.5 < low < value < high < 5.5


# -- simulated people


def test_people_answer_as_their_margins_say() -> None:
    margin = torch.tensor([-2.0, 0.0, 3.0])
    assert certain(margin, ANY).tolist() == [0.0, 0.5, 1.0]
    many, generator = torch.full((100_000,), 0.8), torch.Generator().manual_seed(0)
    p = 1 / (1 + np.exp(-0.8))
    assert float(noisy(many, generator).mean()) == pytest.approx(p, abs=0.006)
    both = twice(many, generator)
    assert float((both == 0.5).float().mean()) == pytest.approx(2 * p * (1 - p), abs=0.006)
    assert float((both == 1).float().mean()) == pytest.approx(p * p, abs=0.006)


# -- the loop


def test_the_loop_is_the_loop_over_users() -> None:
    """Answers without chance, so that a user's path depends on nobody else; each user alone, one Newton solve at a time."""
    data, model = world()
    pool, truth = pool_of(data, model, data.pool), data.margins(data.pool)[:5]
    test = (pool_of(data, model, data.test), data.margins(data.test)[:5])
    together = ask(model, pool, truth, InformationGain(), 6, test=test, answers=certain)
    assert model.prior is not None
    for u in range(5):
        rows: list[int] = []
        mean, covariance = model.crowd_weights, model.prior.covariance
        for t in range(6):
            m = pool.offset + pool.slopes @ mean
            score = torch.sigmoid(m) * torch.sigmoid(-m) * torch.einsum("qi,ij,qj->q", pool.slopes, covariance, pool.slopes)
            score[rows] = -1
            rows.append(int(score.argmax()))
            sign = truth[u, rows].sign()[:, None]
            said = Batch((pool.slopes[rows] * sign)[None], (pool.offset[rows] * sign[:, 0])[None], torch.ones(1, t + 1), None)
            solved = posterior(said, model.prior)
            assert solved.covariance is not None
            mean, covariance = solved.mean[0], solved.covariance[0]
            torch.testing.assert_close(together.weights[u, t + 1], mean, atol=1e-4, rtol=1e-4)
        assert together.question[u].tolist() == rows
        margin, true = test[0].margins(mean[None])[0], test[1][u]
        right = (margin > 0) == (true > 0)
        assert float(together.accuracy[u, 6]) == pytest.approx(float(right.float().mean()), abs=1e-6)
        assert float(together.regret[u, 6]) == pytest.approx(float((true.abs() * ~right).mean()), abs=1e-5)
    alone = ask(model, pool, truth[2:3], InformationGain(), 6, test=(test[0], test[1][2:3]), answers=certain)
    assert torch.equal(alone.question[0], together.question[2])


def test_weights_after_the_last_answer_are_those_of_adapt() -> None:
    data, model = world()
    pool, truth = pool_of(data, model, data.pool), data.margins(data.pool)
    found = ask(model, pool, truth, Random(), 8, answers=twice, seed=3)
    assert (found.answer == 0.5).any()
    rows, answer = data.pool[found.question], found.answer.flatten()
    first, second = rows[..., 0].flatten(), rows[..., 1].flatten()
    users = np.repeat([f"{u:02d}" for u in range(len(truth))], 8)
    chosen, rejected = torch.where(answer == 0, second, first), torch.where(answer == 0, first, second)
    said = EmbeddedPairs(data.embeddings, chosen, rejected, users, tie=(answer == 0.5).numpy())
    torch.testing.assert_close(palate.adapt(model, said).mean, found.weights[:, -1], atol=1e-4, rtol=1e-4)


def test_nobody_is_asked_twice_and_the_whole_pool_can_be_asked() -> None:
    data, model = world()
    pool, truth = pool_of(data, model, data.pool[:9]), data.margins(data.pool[:9])[:4]
    for how in (Random(), HessianUncertainty(), InformationGain(), DOptimal(), MutualInformation(), Thompson(), Targeted(pool)):
        found = ask(model, pool, truth, how, 9)
        assert (found.question.sort(1).values == torch.arange(9)).all()
        assert found.weights.shape == (4, 10, model.n_weights)
    nothing = ask(model, pool, truth, InformationGain(), 0)
    assert nothing.question.shape == (4, 0)
    torch.testing.assert_close(nothing.weights[:, 0], model.crowd_weights.expand(4, -1))


def test_the_same_seed_asks_the_same_and_another_does_not() -> None:
    data, model = world()
    pool, truth = pool_of(data, model, data.pool), data.margins(data.pool)
    first, again, other = (ask(model, pool, truth, HessianUncertainty(), 5, first_random=True, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.question[:, 0], other.question[:, 0])
    assert len(torch.unique(first.question[:, 0])) > 1  # a first question of everybody's own


def test_a_method_without_a_prior_can_be_asked_too() -> None:
    data, _ = world()
    model = palate.fit(data.train, PReF.faithful(3, few_shot_steps=50))
    rows = data.pool[:30]
    pool = Pool.of(model, EmbeddedPairs(data.embeddings, rows[:, 0], rows[:, 1], ["nobody"] * 30))
    found = ask(model, pool, data.margins(rows), HessianUncertainty(), 4, first_random=True)
    assert torch.isfinite(found.weights).all()
    assert isinstance(world()[1].inference, Newton)


def test_well_chosen_questions_beat_random_ones_on_the_84_users() -> None:
    """Two worlds of 24 unseen users here; twenty in `python -m benchmarks questions`."""
    gained: dict[str, list[float]] = {"fixed": [], "published": []}
    for seed in (0, 1):
        data, model = world(seed)
        pool, truth = pool_of(data, model, data.pool), data.margins(data.pool)
        test = (pool_of(data, model, data.test), data.margins(data.test))
        curves = {
            name: ask(model, pool, truth, how, 15, test=test, answers=twice, seed=seed).accuracy.mean(0)
            for name, how in (("random", Random()), ("fixed", MutualInformation()), ("published", HessianUncertainty()))
        }
        for name in gained:
            gained[name].append(float(curves[name][15] - curves["random"][15]))
        assert float(curves["fixed"][8]) > float(curves["random"][8]) + 0.02
        assert float(curves["fixed"][0]) < float(curves["fixed"][15]) - 0.2
    assert min(gained["fixed"]) > 0.03
    assert min(gained["published"]) > 0.02


def test_loops_that_cannot_be() -> None:
    data, model = world()
    pool, truth = pool_of(data, model, data.pool), data.margins(data.pool)
    with pytest.raises(DataError, match=r"truth has shape \(24, 119\); expected \(users, 120\)"):
        ask(model, pool, truth[:, 1:], Random(), 3)
    with pytest.raises(DataError, match="n_questions is 121; expected 0 to 120"):
        ask(model, pool, truth, Random(), 121)
    with pytest.raises(DataError, match="n_questions is 4; expected 0 to 3"):
        ask(model, pool, truth, Random(), 4, allowed=torch.arange(120).expand(24, -1) < 3)
    with pytest.raises(DataError, match=r"allowed has shape \(24, 119\)"):
        ask(model, pool, truth, Random(), 3, allowed=torch.ones(24, 119, dtype=torch.bool))
    with pytest.raises(DataError, match="at_once is 0"):
        ask(model, pool, truth, Random(), 3, at_once=0)
    with pytest.raises(DataError, match="2 user ids for 24 rows of truth"):
        ask(model, pool, truth, Random(), 3, user_ids=("a", "b"))
    with pytest.raises(DataError, match="the pool has 2 weights and the model"):
        ask(model, Pool(pool.slopes[:, :2], pool.offset), truth, Random(), 3)


def test_what_is_measured_on_has_to_fit() -> None:
    numbers = {"direction": torch.zeros(3), "bases": torch.eye(3), "share": torch.ones(1), "means": torch.zeros(1, 3)}
    model = palate.Hierarchical().like(numbers | {"factors": torch.eye(3)[None]})
    pool, narrow, truth = Pool(torch.eye(3), torch.zeros(3)), Pool(torch.eye(2), torch.zeros(2)), torch.ones(2, 3)
    for test, word in (((pool, torch.ones(2, 1)), "true margins"), ((narrow, truth), "slopes")):
        with pytest.raises(DataError, match=word):
            ask(model, pool, truth, Random(), 1, test=test)
    with pytest.raises(DataError, match="NaN"):
        ask(model, pool, truth * torch.nan, Random(), 1)
    with pytest.raises(DataError, match="floor is 0"):
        HessianUncertainty(0.0)
