"""The baselines (individual, group, nearest-neighbour Bradley-Terry) against flat loops, other optimisers and planted worlds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.cluster import KMeans

import palate
from palate.data.embeddings import OneHot
from palate.data.pairs import EmbeddedPairs
from palate.data.planted import Planted, one_crowd, two_groups
from palate.errors import DataError
from palate.models import crowd, individual, trials
from palate.models.groups import GroupBT, grouped, membership
from palate.models.individual import IndividualBT
from palate.models.neighbours import KEPT, Neighbours, agreement, kept, mixed
from palate.models.people import Meeting
from palate.models.validation import edge, surely_below
from palate.solvers import Batch, newton

Floats = NDArray[np.float64]
Make = Callable[[], palate.RewardModel]

FEW: dict[str, Make] = {
    "individual": lambda: IndividualBT(ridge=0.3),
    "individual-around": lambda: IndividualBT(around_crowd=True, ridge=0.3),
    "groups": lambda: GroupBT(3),
    "neighbours": lambda: Neighbours(4, temperature=2.0),
}
EVERY = pytest.mark.parametrize("name", FEW)


def small(
    seed: int = 0, *, users: int = 12, pairs: int = 120, dim: int = 4, texts: int = 30, ties: float = 0.15
) -> EmbeddedPairs:
    """Random choices over few texts in double precision, with ties and weights; every user has two at least."""
    rng = np.random.default_rng(seed)
    sides = np.array([rng.permutation(texts)[:2] for _ in range(pairs)])
    who = np.concatenate([np.tile(np.arange(users), 2), rng.integers(users, size=pairs - 2 * users)])
    return EmbeddedPairs(
        rng.standard_normal((texts, dim)),
        sides[:, 0],
        sides[:, 1],
        [f"u{u:02d}" for u in who],
        tie=rng.random(pairs) < ties,
        weight=rng.choice([0.5, 1, 2], pairs),
    )


def differences(data: EmbeddedPairs) -> Floats:
    return np.asarray((data.embeddings.rows(data.chosen) - data.embeddings.rows(data.rejected)).double().numpy())


def loss_of(margin: Floats, tie: NDArray[np.bool_]) -> Floats:
    return np.asarray(np.logaddexp(0, -margin) + np.where(tie, margin / 2, 0))


def accuracy(model: palate.RewardModel, support: EmbeddedPairs | None, test: EmbeddedPairs, shots: int | None = None) -> float:
    return float(np.mean([row["accuracy"] for row in palate.evaluate(model, support, test, shots=shots).rows()]))


@pytest.fixture(scope="module")
def groups() -> Planted:
    return two_groups(5, n_users=100, n_train=20, n_test=30, dim=16)


@pytest.fixture(scope="module")
def alike() -> Planted:
    return one_crowd(5, n_users=60, n_train=20, n_test=20, dim=16)


# -- judging on held-out users


def test_a_trial_is_a_flat_loop_over_users_and_shots() -> None:
    data, users = small(3), [1, 4, 7, 11]
    z = differences(data)
    trial = trials.Trial(data, seed=2)
    slopes, offset = torch.from_numpy(z), torch.from_numpy(0.3 * z[:, 0])

    def solve(batch: Batch, who: torch.Tensor) -> list[torch.Tensor]:
        assert set(who.tolist()) <= set(users)
        return [newton(batch, tolerance=1e-8)[0], torch.zeros(len(who), 4, dtype=torch.float64)]

    found = trial.losses(torch.tensor(users), offset, slopes.__getitem__, 4, solve)
    alone = trial.alone(torch.tensor(users), offset)
    tie, weight, user = data.tie.numpy(), data.weight.numpy(), data.user_index.numpy()
    for u in range(12):
        asked = trial.query.numpy() & (user == u)
        if u not in users or not asked.any():
            assert torch.isnan(found[:, u]).all()
            continue
        expected = []
        for shot in (1, 2, 5, 10**9):
            told = (user == u) & (trial.place.numpy() < shot)
            assert not (told & asked).any()
            assert told.sum() == min(shot, (trial.support.numpy() & (user == u)).sum())

            def objective(w: Floats, told: NDArray[np.bool_] = told) -> float:
                return float(weight[told] @ loss_of(0.3 * z[told, 0] + z[told] @ w, tie[told]) + w @ w / 2)

            w = minimize(objective, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x
            expected.append(weight[asked] @ loss_of(0.3 * z[asked, 0] + z[asked] @ w, tie[asked]) / weight[asked].sum())
        assert float(found[0, u]) == pytest.approx(np.mean(expected), abs=1e-5)
        crowd_alone = weight[asked] @ loss_of(0.3 * z[asked, 0], tie[asked]) / weight[asked].sum()
        assert float(found[1, u]) == pytest.approx(crowd_alone)
        assert float(alone[u]) == pytest.approx(crowd_alone)


def test_the_edge_of_the_smoothed_error_follows_the_scale_of_the_margins() -> None:
    margins = torch.tensor([-3.0, 0.3, 6.0])
    assert float(edge(margins)) == 1.0  # a third of the median size, 3
    torch.testing.assert_close(edge(1e4 * margins), 1e4 * edge(margins))
    assert float(edge(torch.zeros(3))) > 0  # nothing is divided by nothing
    assert float(edge(margins[:0])) == 1.0


def test_surely_below_is_by_a_standard_error_of_paired_users() -> None:
    nobody = torch.full((9,), torch.nan)
    base = torch.arange(9.0)
    assert surely_below(base - 0.1, base)
    assert not surely_below(base, base)
    assert not surely_below(base + torch.tensor([-1.0, 1, -1, 1, -1, 1, -1, 1, -0.1]), base)
    assert not surely_below(nobody, base)
    assert np.isnan(trials.mean(nobody))


# -- individual


@pytest.mark.parametrize("around", [False, True], ids=["alone", "around the crowd"])
def test_every_individual_is_its_own_convex_problem(around: bool) -> None:
    data, ridge = small(1), 0.2
    model = palate.fit(data, IndividualBT(around_crowd=around, ridge=ridge))
    scale = crowd.standard_scale(data)[1].numpy()
    z = differences(data)
    plain = palate.margins(palate.fit(data, palate.BradleyTerry()), data).numpy() if around else np.zeros(len(data))
    profiles = palate.adapt(model, data)
    found = palate.margins(model, data, profiles).numpy()
    tie, weight = data.tie.numpy(), data.weight.numpy()
    assert profiles.converged.all()
    assert profiles.covariance is not None
    for u in range(len(data.user_ids)):
        mine = data.user_index.numpy() == u
        x, base = z[mine] * scale, plain[mine]

        def objective(w: Floats, x: Floats = x, base: Floats = base, mine: NDArray[np.bool_] = mine) -> float:
            return float(weight[mine] @ loss_of(base + x @ w, tie[mine]) + ridge / 2 * w @ w)

        w = minimize(objective, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x
        np.testing.assert_allclose(found[mine], base + x @ w, atol=1e-4)
        np.testing.assert_allclose(profiles.mean[u].numpy() / ridge**0.5, w, atol=1e-4)
        p = 1 / (1 + np.exp(-(base + x @ w)))
        hessian = (x * (weight[mine] * p * (1 - p))[:, None]).T @ x + ridge * np.eye(4)
        np.testing.assert_allclose(profiles.covariance[u].numpy() / ridge, np.linalg.inv(hessian), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("dim", "kept_one"), [(64, True), (65, False)])
def test_a_covariance_up_to_64_features(dim: int, kept_one: bool) -> None:
    data = small(2, users=3, pairs=20, dim=dim)
    model = palate.fit(data, IndividualBT(ridge=1.0))
    assert (palate.adapt(model, data).covariance is not None) == kept_one
    assert (model.prior is not None) == kept_one


def test_nothing_is_ever_as_large_as_features_squared() -> None:
    """200,000 features: their square is 160 GB. One user, three choices; the answer moves only the six texts' columns."""
    items = OneHot(torch.arange(8), 200_000)
    data = EmbeddedPairs(items, [0, 2, 4], [1, 3, 5], ["ada"] * 3)
    model = palate.fit(data, IndividualBT(ridge=1.0))
    profile = palate.adapt(model, data, covariance=False)["ada"]
    assert profile.mean[:6].sign().tolist() == [1, -1] * 3
    assert not profile.mean[6:].any()


def test_the_ridge_is_the_one_that_tells_choices_of_seen_users() -> None:
    rng = np.random.default_rng(0)
    sure = two_groups(1, n_users=30, n_train=40, n_test=1, dim=4, separation=6.0).train
    turn = torch.from_numpy(rng.random(len(sure)) < 0.5)
    chosen, rejected = torch.where(turn, sure.rejected, sure.chosen), torch.where(turn, sure.chosen, sure.rejected)
    noise = EmbeddedPairs(sure.embeddings, chosen, rejected, sure.users)
    weak, strong = (palate.fit(data, IndividualBT()).record["selection"] for data in (sure, noise))
    assert weak["ridge"] <= 0.1
    assert strong["ridge"] == max(individual.RIDGES)
    for record in (weak, strong):
        assert record["ridge"] == record["ridges"][int(np.argmin(record["log_loss"]))]
    assert min(strong["log_loss"]) > 0.69  # nothing can be told: a coin's loss at best


def test_individuals_learn_from_their_own_choices_alone(groups: Planted) -> None:
    model = palate.fit(groups.train, IndividualBT(ridge=0.3))
    assert accuracy(model, groups.support, groups.test_unseen, 0) == 0.5  # margins of zero are ties
    alone = groups.support.of_users(groups.support.user_ids[:1])
    ours, among = palate.adapt(model, alone), palate.adapt(model, groups.support)
    torch.testing.assert_close(ours.mean[0], among[alone.user_ids[0]].mean)
    assert accuracy(model, groups.support, groups.test_unseen) > 0.6


def test_around_a_crowd_personal_rewards_have_to_gain(groups: Planted, alike: Planted) -> None:
    same = palate.fit(alike.train, IndividualBT(around_crowd=True))
    plain = palate.fit(alike.train, palate.BradleyTerry())
    assert same.n_weights == 0
    assert not same.record["selection"]["personal"]
    torch.testing.assert_close(palate.margins(same, alike.test_unseen), palate.margins(plain, alike.test_unseen))
    assert len(palate.adapt(same, alike.support)) == 60
    differ = palate.fit(groups.train, IndividualBT(around_crowd=True))
    assert differ.n_weights == 16
    assert accuracy(differ, groups.support, groups.test_unseen) > accuracy(differ, None, groups.test_unseen) + 0.01


def test_users_are_judged_around_a_crowd_that_has_not_seen_them() -> None:
    data = two_groups(1, n_users=600, n_train=4, n_test=1, dim=4).train
    record = palate.fit(data, IndividualBT(around_crowd=True), seed=2).record["selection"]
    fold = crowd.user_folds(600, 2)
    assert int((fold >= 0).sum()) == 120  # with so many users a fifth of them is enough
    rest = torch.nonzero(fold[data.user_index] < 0)[:, 0]
    scale = crowd.standard_scale(data)[1]
    z = (data.differences().rows(torch.arange(len(data))) * scale).double().numpy()

    def objective(mu: Floats) -> float:
        return float(np.logaddexp(0, -z[rest] @ mu).mean() + record["crowd"]["ridge"] / 2 * mu @ mu)

    margins = z @ minimize(objective, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x
    asked = trials.Trial(data, 2).query.numpy()
    user = data.user_index.numpy()
    expected = [
        np.logaddexp(0, -margins[asked & (user == u)]).mean() for u in np.flatnonzero(fold >= 0) if (asked & (user == u)).any()
    ]
    assert record["crowd_alone"] == pytest.approx(np.mean(expected), abs=1e-4)


# -- groups


def batch_of(seed: int, users: int, n: int, k: int) -> Batch:
    rng = np.random.default_rng(seed)
    weight = rng.choice([0.0, 0.5, 1.0], (users, n))
    weight[0] = 0  # somebody who said nothing
    arrays = rng.standard_normal((users, n, k)), 0.5 * rng.standard_normal((users, n)), weight, rng.random((users, n)) < 0.2
    return Batch(*(torch.from_numpy(array) for array in arrays))


def test_membership_is_bayes_rule_one_choice_at_a_time() -> None:
    batch, share = batch_of(0, 4, 5, 3), np.array([0.5, 0.3, 0.2])
    found = membership(batch, torch.from_numpy(share))
    slopes, offset, weight, tie = (part.numpy() for part in batch)  # type: ignore[union-attr]
    for u in range(4):
        posterior = share.copy()
        for j in range(5):
            p = 1 / (1 + np.exp(-(offset[u, j] + slopes[u, j])))
            posterior *= np.where(tie[u, j], np.sqrt(p * (1 - p)), p) ** weight[u, j]
            posterior /= posterior.sum()
        np.testing.assert_allclose(found[u], posterior, atol=1e-12)
    np.testing.assert_allclose(found[0], share)


def test_a_groups_reward_is_its_members_bradley_terry_with_the_populations_prior() -> None:
    data = small(4, users=15, pairs=200)
    meeting = Meeting(data, seed=0)
    people = meeting.people(-1)
    assert people.users.tolist() == list(range(15))
    weights, share = grouped(data, people, 3, seed=0)
    mean, cov = people.prior.means[0].numpy(), people.prior.covariance.numpy()
    white = np.linalg.solve(np.linalg.cholesky(cov), (people.modes.numpy() - mean).T).T
    np.testing.assert_allclose(people.white().numpy(), white, atol=1e-6)
    label = KMeans(3, n_init=4, random_state=0).fit(people.white().double().numpy()).labels_
    sizes = np.bincount(label)
    np.testing.assert_allclose(share.numpy(), np.sort(sizes)[::-1] / 15)
    slopes, offset = people.view.slopes.numpy(), people.view.offset.numpy()
    tie, weight = data.tie.numpy(), data.weight.numpy()
    for g, old in enumerate(np.argsort(-sizes, kind="stable")):
        mine = (label == old)[data.user_index.numpy()]

        def objective(w: Floats, mine: NDArray[np.bool_] = mine) -> float:
            away = w - mean
            prior = away @ np.linalg.solve(cov, away) / 2
            return float(weight[mine] @ loss_of(offset[mine] + slopes[mine] @ w, tie[mine]) + prior)

        w = minimize(objective, mean, method="BFGS", options={"gtol": 1e-7}).x
        np.testing.assert_allclose(weights[g], w, atol=2e-4)


def test_a_persons_mode_is_that_persons_own_problem() -> None:
    data = small(4, users=15, pairs=200)
    people = Meeting(data, seed=0).people(-1)
    mean, cov = people.prior.means[0].numpy(), people.prior.covariance.numpy()
    for u in (0, 7, 14):
        mine = data.user_index.numpy() == u
        x, base = people.view.slopes.numpy()[mine], people.view.offset.numpy()[mine]

        def objective(w: Floats, x: Floats = x, base: Floats = base, mine: NDArray[np.bool_] = mine) -> float:
            prior = (w - mean) @ np.linalg.solve(cov, w - mean) / 2
            return float(data.weight.numpy()[mine] @ loss_of(base + x @ w, data.tie.numpy()[mine]) + prior)

        np.testing.assert_allclose(people.modes[u], minimize(objective, mean, method="BFGS").x, atol=2e-3)


def test_two_planted_groups_are_found(groups: Planted) -> None:
    model = palate.fit(groups.train, GroupBT())
    assert model.record["selection"]["chosen"] == 2
    assert sum(model.record["selection"]["share"]) == pytest.approx(1)
    assert accuracy(model, groups.support, groups.test_unseen) > groups.oracle_unseen - 0.03
    assert accuracy(model, groups.support, groups.test_unseen, 0) < groups.crowd_unseen + 0.02
    weights = palate.adapt(model, groups.support).mean
    side = weights[:, 0] > 0.5
    planted = groups.weights_unseen[:, 0] > 0
    assert float((side == planted).float().mean()) in (pytest.approx(1, abs=0.05), pytest.approx(0, abs=0.05))


@pytest.mark.parametrize("make", [GroupBT, Neighbours, lambda: GroupBT(1)], ids=["groups", "neighbours", "one group"])
def test_where_nobody_differs_the_model_is_bradley_terry(make: Make, alike: Planted) -> None:
    model, plain = palate.fit(alike.train, make()), palate.fit(alike.train, palate.BradleyTerry())
    assert model.n_weights == 0
    torch.testing.assert_close(
        palate.margins(model, alike.test_unseen, palate.adapt(model, alike.support)), palate.margins(plain, alike.test_unseen)
    )


def test_people_who_are_alike_make_one_group() -> None:
    one = small(5, users=1, pairs=12)
    twins = EmbeddedPairs(
        one.embeddings, one.chosen.repeat(6), one.rejected.repeat(6), [f"u{i // 12}" for i in range(72)], tie=one.tie.repeat(6)
    )
    model = palate.fit(twins, GroupBT(4))
    assert model.n_weights == 0
    assert model.record["selection"]["chosen"] == 1


def test_never_more_groups_than_people() -> None:
    data = small(5, users=3, pairs=30)
    assert palate.fit(data, GroupBT(16)).n_weights == 3
    assert palate.fit(data, GroupBT()).n_weights == 0  # nobody can be held out, so one group


# -- neighbours


@pytest.mark.parametrize(("k", "sharpness"), [(2, 0.7), (2, 0.0), (6, 0.7), (99, 0.0)])
def test_neighbours_are_a_flat_loop(k: int, sharpness: float) -> None:
    batch = batch_of(1, 5, 4, 6)
    found = mixed(agreement(batch), (batch.weight > 0).any(1), k, sharpness)
    slopes, offset, weight, tie = (part.numpy() for part in batch)  # type: ignore[union-attr]
    for u in range(5):
        told = [-(weight[u] @ loss_of(offset[u] + slopes[u, :, v], tie[u])) for v in range(6)]
        near = sorted(range(6), key=lambda v: -told[v])[:k] if weight[u].any() else []
        expected = np.full(6, 0.0 if near else 1 / 6)
        total = sum(np.exp(sharpness * told[v]) for v in near)
        for v in near:
            expected[v] = np.exp(sharpness * told[v]) / total
        np.testing.assert_allclose(found[u], expected, atol=1e-12)


@given(st.integers(0, 99), st.integers(1, 8), st.floats(0, 5))
def test_weights_of_neighbours_are_a_mixture_of_at_most_k(seed: int, k: int, sharpness: float) -> None:
    batch = batch_of(seed, 4, 3, 7)
    said = (batch.weight > 0).any(1)
    weights = mixed(agreement(batch), said, k, sharpness)
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(1), torch.ones(4, dtype=torch.float64))
    assert bool(((weights > 0).sum(1)[said] <= k).all())
    assert torch.equal(weights[~said], torch.full_like(weights[~said], 1 / 7))


def test_neighbours_know_two_planted_groups_and_say_whom_they_hold(groups: Planted) -> None:
    model = palate.fit(groups.train, Neighbours())
    record = model.record["selection"]
    assert record["users_kept"] == model.n_weights == 100
    assert record["holds"] == KEPT
    assert accuracy(model, groups.support, groups.test_unseen) > groups.crowd_unseen + 0.05
    near = palate.adapt(model, groups.support).mean > 0
    assert int(near.sum(1).max()) <= record["k"]
    # Nobody's place in the model is their place in the data, and no id is in what is saved.
    assert kept(100, 1000, 0).tolist() != list(range(100))
    assert "seen0" not in str(model.options()) + str(model.record)


def test_the_seen_users_are_the_personal_fits_in_another_order(groups: Planted) -> None:
    model = palate.fit(groups.train, Neighbours(3, temperature=1.0, most=10), seed=2)
    meeting = Meeting(groups.train, seed=2)
    people = meeting.people(-1)
    z = groups.train.differences().rows(torch.arange(40))
    expected = people.view.offset[:40, None] + people.view.slopes[:40] @ people.modes[kept(100, 10, 2)].T
    torch.testing.assert_close(z @ model.state_dict()["rewards"], expected, atol=1e-4, rtol=1e-4)
    assert model.n_weights == 10


def test_an_infinite_temperature_is_the_mean_of_the_nearest_and_survives_json(groups: Planted, tmp_path: Path) -> None:
    model = palate.fit(groups.train, Neighbours(5, temperature=float("inf")))
    weights = palate.adapt(model, groups.support).mean
    assert weights.unique().tolist() == pytest.approx([0, 0.2])
    model.save_pretrained(tmp_path)
    assert palate.load_model(tmp_path).fingerprint() == model.fingerprint()


# -- what every one of them keeps


@EVERY
def test_swapping_negates_and_nothing_said_is_the_crowd(name: str) -> None:
    data = small(6)
    model = palate.fit(data, FEW[name]())
    profiles = palate.adapt(model, data)
    torch.testing.assert_close(palate.margins(model, data.swapped(), profiles), -palate.margins(model, data, profiles))
    crowd_only = palate.margins(model, data)
    nobody = palate.adapt(model, data[torch.arange(0)])
    assert torch.equal(palate.margins(model, data, nobody), crowd_only)
    offset, slopes = palate.adaptation.pair_design(model, data)
    torch.testing.assert_close(crowd_only, offset + slopes @ model.crowd_weights)
    if name == "individual":
        assert not crowd_only.any()
    if name == "individual-around":
        torch.testing.assert_close(crowd_only, palate.margins(palate.fit(data, palate.BradleyTerry()), data))
    silent = data.grouped().counts * 0
    empty = Batch(slopes.new_zeros(12, 1, model.n_weights), slopes.new_zeros(12, 1), slopes.new_zeros(12, 1), None)
    assert not silent.any()
    solved = model.inference.solve(empty, model.prior, data.user_ids)
    torch.testing.assert_close(solved.mean, model.crowd_weights.expand(12, -1))


@EVERY
def test_a_batch_is_a_loop_and_order_does_not_matter(name: str) -> None:
    data = small(7)
    model = palate.fit(data, FEW[name]())
    together = palate.adapt(model, data)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    shuffled = palate.adapt(model, data[order])
    for row, user in enumerate(data.user_ids):
        alone = palate.adapt(model, data.of_users([user]))
        torch.testing.assert_close(alone.mean[0], together.mean[row], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(shuffled[user].mean, together.mean[row], atol=1e-6, rtol=1e-6)


@EVERY
def test_the_same_bits_again_and_from_disk(name: str, groups: Planted, tmp_path: Path) -> None:
    model, again = (palate.fit(groups.train, FEW[name](), seed=3) for _ in range(2))
    assert model.fingerprint() == again.fingerprint()
    model.save_pretrained(tmp_path)
    loaded = palate.load_model(tmp_path)
    ours, theirs = (palate.margins(m, groups.test_unseen, palate.adapt(m, groups.support)) for m in (model, loaded))
    assert torch.equal(ours, theirs)
    assert loaded.record == model.record
    assert loaded.options() == model.options()
    with pytest.raises(palate.MismatchError):
        palate.margins(palate.fit(groups.train, palate.BradleyTerry()), groups.test_unseen, palate.adapt(loaded, groups.support))


def test_neighbours_keep_nobody_unless_held_out_people_are_surely_better_off_or_it_is_asked_for() -> None:
    few = two_groups(0, n_users=6, n_train=20, dim=8).train  # too few to hold anybody out
    assert palate.fit(few, Neighbours()).n_weights == 0
    assert palate.fit(few, Neighbours(2)).n_weights == 0
    assert palate.fit(few, Neighbours(2, temperature=1.0)).n_weights == 6


@pytest.mark.parametrize("make", [IndividualBT, lambda: IndividualBT(around_crowd=True), GroupBT, Neighbours])
def test_few_users_few_choices_and_ties_are_no_obstacle(make: Make) -> None:
    one = EmbeddedPairs(np.eye(4), [0, 1, 2], [1, 2, 3], ["ada", "ada", "bo"], tie=[False, True, False])
    model = palate.fit(one, make())
    assert bool(torch.isfinite(palate.margins(model, one, palate.adapt(model, one))).all())


def test_at_one_unit_a_user_nobody_has_a_query_and_defaults_stand() -> None:
    data = small(8, users=20, pairs=60)
    single = EmbeddedPairs(data.embeddings, data.chosen, data.rejected, data.users, unit=data.user_index.numpy())
    selection: dict[str, Any] = palate.fit(single, IndividualBT()).record["selection"]
    assert selection["ridge"] == individual.RIDGES[len(individual.RIDGES) // 2]
    assert palate.fit(single, GroupBT()).n_weights == 0
    assert palate.fit(single, Neighbours()).n_weights == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IndividualBT(ridge=0.0), r"ridge is 0\.0; expected a positive number"),
        (lambda: IndividualBT(ridge=float("inf")), "ridge is inf; expected a positive number"),
        (lambda: GroupBT(0), "n_groups is 0; expected a positive number of groups"),
        (lambda: GroupBT(()), r"n_groups is \(\)"),
        (lambda: Neighbours(0), "k is 0; expected at least one neighbour"),
        (lambda: Neighbours(temperature=0.0), r"temperature is 0\.0; expected a number above 0"),
        (lambda: Neighbours(most=1), "most is 1; expected at least two users to keep"),
    ],
)
def test_arguments_that_make_no_model(make: Make, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()
