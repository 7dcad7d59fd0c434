"""Questions: scores against one pair and one user at a time, the loop against itself without a batch, and whether they pay."""

from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import palate
from palate import questions
from palate.data.attributes import Attributes, attributes
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.models.base import Newton
from palate.models.pref import PReF
from palate.priors import Prior
from palate.questions import Belief, DOptimal, HessianUncertainty, InformationGain, Pool, Random, ask, certain, noisy, twice
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
    monkeypatch.setattr(questions, "BLOCK", 12)
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
    with pytest.raises(DataError, match="D-optimal design needs a prior"):
        DOptimal().score(belief._replace(prior=None), pool, ANY)


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
    for how in (Random(), HessianUncertainty(), InformationGain(), DOptimal()):
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
            for name, how in (("random", Random()), ("fixed", InformationGain()), ("published", HessianUncertainty()))
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
