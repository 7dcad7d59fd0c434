"""PReF: the fixed estimation against independent optimisers and planted truths, the faithful one against flat numpy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

import palate
from palate.data.attributes import attributes
from palate.data.embeddings import Dense
from palate.data.pairs import EmbeddedPairs
from palate.data.planted import one_crowd, two_groups
from palate.errors import DataError
from palate.models import crowd, imputation
from palate.models.bilinear import Joint, by_pair, wide_first
from palate.models.imputation import Descent, Regulariser, impute
from palate.models.pref import PReF
from palate.solvers import Batch
from palate.training import fit_with_profiles

Floats = NDArray[np.float64]


def small(seed: int = 0, *, users: int = 5, pairs: int = 60, dim: int = 4, texts: int = 9, ties: float = 0.15) -> EmbeddedPairs:
    """Random choices over few texts, so that users share pairs, with ties and weights."""
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((texts, dim))
    sides = np.array([rng.permutation(texts)[:2] for _ in range(pairs)])
    who = np.concatenate([np.arange(users), rng.integers(users, size=pairs - users)])
    return EmbeddedPairs(
        table,
        sides[:, 0],
        sides[:, 1],
        [f"u{u}" for u in who],
        tie=rng.random(pairs) < ties,
        weight=rng.choice([0.5, 1, 2], pairs),
    )


def differences(data: EmbeddedPairs) -> Floats:
    return np.asarray((data.embeddings.rows(data.chosen) - data.embeddings.rows(data.rejected)).double().numpy())


def accuracy(model: palate.RewardModel, support: EmbeddedPairs, test: EmbeddedPairs) -> float:
    return float(np.mean([row["accuracy"] for row in palate.evaluate(model, support, test).rows()]))


# -- a new user


def test_newton_is_where_a_long_gradient_descent_ends() -> None:
    rng, data = np.random.default_rng(1), small(users=3, pairs=40)
    factor = np.tril(rng.standard_normal((2, 2))) + np.eye(2)
    numbers = {"direction": rng.standard_normal(4), "bases": rng.standard_normal((4, 2)), "mean": np.zeros(2), "factor": factor}
    model = PReF().like({name: torch.from_numpy(value) for name, value in numbers.items()})
    profiles = palate.adapt(model, data)
    z, precision = differences(data), np.linalg.inv(factor @ factor.T)
    tie, weight = data.tie.numpy(), data.weight.double().numpy()
    for row in range(3):
        mine = data.user_index.numpy() == row
        slopes, offset, w = z[mine] @ numbers["bases"], z[mine] @ numbers["direction"], np.zeros(2)
        for _ in range(100_000):
            slope = weight[mine] * (1 / (1 + np.exp(-offset - slopes @ w)) - np.where(tie[mine], 0.5, 1.0))
            w = w - 0.01 * (slopes.T @ slope + precision @ w)
        np.testing.assert_allclose(profiles.mean[row], w, atol=1e-4)


def test_the_published_descent_is_one_user_at_a_time_in_numpy() -> None:
    rng = np.random.default_rng(2)
    slopes, offset, tie = rng.standard_normal((3, 6, 2)), rng.standard_normal((3, 6)), rng.random((3, 6)) < 0.3
    weight = np.ones((3, 6))
    weight[0, 4:] = 0  # a shorter user
    batch = Batch(*(torch.from_numpy(value) for value in (slopes, offset, weight, tie)))
    solved = Descent(200, 0.01, seed=5).solve(batch, None, ("ada", "bo", "cy"))
    for row, user in enumerate(("ada", "bo", "cy")):
        w = palate.models.base.normal_for(user, 5, 2).double().numpy()
        for _ in range(200):
            slope = 1 / (1 + np.exp(-offset[row] - slopes[row] @ w)) - np.where(tie[row], 0.5, 1.0)
            w = w - 0.01 * slopes[row].T @ (weight[row] * slope) / weight[row].sum()
        np.testing.assert_allclose(solved.mean[row], w, atol=1e-10)
    assert solved.covariance is None
    assert not solved.converged.any()


# -- the joint problem


def joint_of(data: EmbeddedPairs) -> tuple[Joint, Floats, Floats]:
    """The joint problem of all users but the last, its z and its offsets, in double precision."""
    design = crowd.Rescaled(data.differences(), crowd.standard_scale(data)[1])
    offset = 0.3 * design.project(torch.ones(design.shape[1], 1, dtype=torch.float64))[:, 0]
    rows = torch.nonzero(data.user_index != len(data.user_ids) - 1)[:, 0]
    z = differences(data) * design.scale.numpy()
    return Joint(data, design, offset, rows), z[rows.numpy()], offset[rows].numpy()


def test_the_joint_fit_is_the_minimum_over_both_sides() -> None:
    joint, z, offset = joint_of(small())
    part, ridge, rng = joint.part, 0.003, np.random.default_rng(0)
    user, tie, users = part.user_index.numpy(), part.tie.numpy(), len(part.user_ids)
    weight = part.weight.numpy()

    def objective(flat: Floats) -> float:
        v, w = flat[:8].reshape(4, 2), flat[8:].reshape(users, 2)
        margin = offset + (z @ v * w[user]).sum(1)
        loss = weight @ (np.logaddexp(0, -margin) + np.where(tie, margin / 2, 0))
        return float((loss + (w**2).sum() / 2) / weight.sum() + ridge / 2 * (v**2).sum())

    first = rng.standard_normal((4, 2))
    expected = min(minimize(objective, rng.standard_normal(8 + 2 * users), method="BFGS").fun for _ in range(4))
    found = joint.fit(torch.from_numpy(first), ridge, max_iter=200)
    weights, _ = joint.users.solve(joint.project(found), joint.offset)
    assert objective(np.concatenate([found.numpy().ravel(), weights.numpy().ravel()])) == pytest.approx(expected, abs=2e-4)
    assert objective(np.zeros(8 + 2 * users)) > expected + 0.01  # the optimum is not that nobody differs


def test_score_gradients_and_the_ridge_at_which_nobody_differs() -> None:
    data = small()
    joint, z, offset = joint_of(data)
    weight = joint.part.weight.numpy()
    score = weight * (np.where(joint.part.tie.numpy(), 0.5, 1.0) - 1 / (1 + np.exp(-offset)))
    matrix = np.stack([(score * (joint.part.user_index.numpy() == u)) @ z for u in range(len(joint.part.user_ids))])
    _, size, axes = np.linalg.svd(matrix, full_matrices=False)
    found, largest = joint.gradients(2, seed=0)
    assert largest == pytest.approx(size[0], rel=1e-6)
    np.testing.assert_allclose(np.abs(np.sum(found.numpy() * axes[:2].T, axis=0)), 1, atol=1e-6)
    start = 1e-3 * torch.from_numpy(axes[:1].T)
    critical = size[0] ** 2 / weight.sum()
    assert float(joint.fit(start, 1.02 * critical).norm()) < 1e-3
    assert float(joint.fit(start, 0.5 * critical, max_iter=300).norm()) > 0.05


def test_the_regression_of_factors_on_features_is_weighted_ridge() -> None:
    joint, z, _ = joint_of(small())
    target = np.random.default_rng(0).standard_normal((len(z), 3))
    share = (joint.part.weight / joint.total).numpy()[:, None]
    expected = np.linalg.solve(z.T @ (share * z) + 0.02 * np.eye(4), z.T @ (share * target))
    np.testing.assert_allclose(joint._regress(torch.from_numpy(target), 0.02), expected, atol=1e-5)


def test_wide_first_changes_coordinates_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    bases, z = torch.from_numpy(rng.standard_normal((5, 3)) * [1.0, 0.4, 2.0]), torch.from_numpy(rng.standard_normal((40, 5)))
    turned, spread = wide_first(bases, z @ bases)
    slopes = z @ turned
    torch.testing.assert_close(slopes.T @ slopes / 40, torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(slopes * spread.square() @ slopes.T, (z @ bases) @ (z @ bases).T)
    assert (spread.diff() <= 0).all()


# -- planted truths


@pytest.fixture(scope="module")
def groups() -> Any:
    return two_groups(3, n_users=100, dim=24)


def test_two_groups_are_told_nearly_as_well_as_can_be(groups: Any) -> None:
    model = palate.fit(groups.train, PReF((1, 3)), seed=0)
    reached = accuracy(model, groups.support, groups.test_unseen)
    crowd_alone = accuracy(palate.fit(groups.train, palate.BradleyTerry()), groups.support, groups.test_unseen)
    assert reached > groups.oracle_unseen - 0.02
    assert reached > crowd_alone + 0.05
    assert model.record["selection"]["start"] == "scores"  # nobody shares a pair
    axis, planted = model.state_dict()["bases"][:, 0], groups.directions[:, 0]
    assert abs(float(axis @ planted / axis.norm() / planted.norm())) > 0.9


def test_one_crowd_is_left_alone() -> None:
    world = one_crowd(1, n_users=60, dim=16)
    model = palate.fit(world.train, PReF(2), seed=0)
    assert model.record["selection"]["kappa"] == 0
    assert model.n_weights == 0
    plain = palate.fit(world.train, palate.BradleyTerry(), seed=0)
    torch.testing.assert_close(palate.margins(model, world.test_unseen), palate.margins(plain, world.test_unseen))


def test_the_traits_of_the_84_users_are_found_from_the_table_of_answers() -> None:
    world = attributes(2, n_pairs=150)
    model = palate.fit(world.train, PReF(7, strength=0.1, kappa=4.0), seed=0)
    assert model.record["selection"]["start"] == "answers"  # twenty people judged every pair
    frame = torch.linalg.qr(model.state_dict()["bases"])[0]
    assert float(torch.linalg.svdvals(frame.T @ world.directions).min()) > 0.9  # the same seven dimensions
    pair, sign, n_pairs = by_pair(world.train)
    assert n_pairs == 150
    assert (torch.bincount(pair) == 20).all()
    assert torch.equal(sign > 0, world.train.chosen < world.train.rejected)


@pytest.mark.parametrize("start", ["answers", "scores"])
def test_either_start_leads_to_a_good_model(start: Any) -> None:
    world = attributes(5, n_pairs=150)
    model = palate.fit(world.train, PReF(7, strength=0.1, kappa=4.0, start=start), seed=0)
    assert model.record["selection"]["start"] == start
    margins = world.margins(world.pool)
    support, test = (
        EmbeddedPairs(
            world.embeddings,
            torch.where(wins, rows[:, 0], rows[:, 1]).flatten(),
            torch.where(wins, rows[:, 1], rows[:, 0]).flatten(),
            np.repeat([wish.name for wish in world.unseen], len(rows)),
        )
        for rows, wins in ((world.pool[:60], margins[:, :60] > 0), (world.pool[60:], margins[:, 60:] > 0))
    )
    assert accuracy(model, support, test) > 0.87  # the crowd, who agree about nothing, have a half


def test_somebody_who_said_nothing_gets_the_crowds_reward(groups: Any) -> None:
    model = palate.fit(groups.train, PReF(2, strength=0.3, kappa=1.0), seed=0)
    plain = palate.fit(groups.train, palate.BradleyTerry(), seed=0)
    torch.testing.assert_close(palate.margins(model, groups.test_unseen), palate.margins(plain, groups.test_unseen))
    wider = palate.fit(groups.train, PReF(2, strength=0.3, kappa=4.0), seed=0)
    assert model.prior is not None
    assert wider.prior is not None
    torch.testing.assert_close(wider.prior.covariance, 4 * model.prior.covariance)


@pytest.mark.parametrize("make", [lambda: PReF((1, 2)), lambda: PReF.faithful(3)], ids=["fixed", "faithful"])
def test_the_same_bits_again_and_from_disk(make: Callable[[], PReF], groups: Any, tmp_path: Path) -> None:
    model, again = (palate.fit(groups.train, make(), seed=4) for _ in range(2))
    assert model.fingerprint() == again.fingerprint()
    model.save_pretrained(tmp_path)
    loaded = palate.load_model(tmp_path)
    ours, theirs = (palate.margins(m, groups.test_unseen, palate.adapt(m, groups.support)) for m in (model, loaded))
    assert torch.equal(ours, theirs)
    assert loaded.record == model.record


# -- the published code


@pytest.mark.parametrize("rank", [1, 2, 100])
def test_imputation_against_flat_numpy(rank: int) -> None:
    rng = np.random.default_rng(rank)
    table = np.where(rng.random((6, 4)) < 0.4, np.nan, rng.choice([0, 0.5, 1], (6, 4)))
    full = np.where(np.isnan(table), 0.5, table)
    for _ in range(10):
        left, size, right = np.linalg.svd(full, full_matrices=False)
        again = sum(size[k] * np.outer(left[:, k], right[k]) for k in range(min(rank, 4)))
        for q, u in zip(*np.nonzero(np.isnan(table)), strict=True):
            full[q, u] = again[q, u]
        full = np.clip(full, 0, 1)
    ours = impute(torch.from_numpy(table), rank=rank)
    np.testing.assert_allclose((ours[0] * ours[1]) @ ours[2].T, (left * size) @ right, atol=1e-10)
    np.testing.assert_allclose(ours[1], size, atol=1e-10)
    if rank == 100:  # the published rank: a table with a side below 100 never moves
        np.testing.assert_allclose((ours[0] * ours[1]) @ ours[2].T, np.where(np.isnan(table), 0.5, table), atol=1e-10)


def test_the_faithful_fit_against_flat_numpy() -> None:
    """Everything but the draws written again: the table, the two descents, the gradient of the mean length by hand."""
    data, j, seed = small(4, users=4, pairs=160, dim=5, texts=6), 3, 7
    z, user = differences(data), data.user_index.numpy()
    chosen, rejected, tie = data.chosen.numpy(), data.rejected.numpy(), data.tie.numpy()
    rows: dict[tuple[int, int], int] = {}
    row = [rows.setdefault((min(a, b), max(a, b)), len(rows)) for a, b in zip(chosen, rejected, strict=True)]
    answers: dict[tuple[int, int], list[float]] = {}
    n_rows = 160 // 50
    for p in range(160):
        if row[p] < n_rows:
            answers.setdefault((row[p], user[p]), []).append(0.5 if tie[p] else float(chosen[p] < rejected[p]))
    table = np.full((n_rows, 4), np.nan)
    for cell, given in answers.items():
        table[cell] = np.mean(given)
    left, size, right = (value.numpy() for value in impute(torch.from_numpy(table)))
    target, weights = left[:, :j] * np.sqrt(size[:j]), right[:, :j] * np.sqrt(size[:j])
    generator = torch.Generator().manual_seed(seed)
    head = (2 * torch.rand(5, j, generator=generator) - 1).double().numpy() / np.sqrt(5)
    inside = [p for p in range(160) if row[p] < n_rows]
    for _ in range(50):
        gradient = np.zeros_like(head)
        for i in torch.randint(len(inside), (64,), generator=generator).tolist():
            p = inside[i]
            turned = z[p] if chosen[p] < rejected[p] else -z[p]
            gradient += 2 * np.outer(turned, turned @ head - target[row[p]]) / (64 * j)
        head = head - 1e-6 * gradient
    strict = np.flatnonzero(~tie)
    for _ in range(500):
        to_head, to_weights = np.zeros_like(head), np.zeros_like(weights)
        for i in torch.randint(len(strict), (64,), generator=generator).tolist():
            p = strict[i]
            phi = z[p] @ head
            slope = 1 / (1 + np.exp(-phi @ weights[user[p]])) - 1
            to_head += np.outer(z[p], slope * weights[user[p]] + 0.02 * phi / np.linalg.norm(phi)) / 64
            to_weights[user[p]] += slope * phi / 64
        head, weights = head - 1e-3 * to_head, weights - 1e-3 * to_weights
    model, table_of = fit_with_profiles(data, PReF.faithful(j), seed=seed)
    assert table_of is not None
    # An axis of the decomposition may come out with the other sign on both sides; here both use the same routine.
    np.testing.assert_allclose(model.state_dict()["bases"], head, atol=1e-8)
    np.testing.assert_allclose(table_of.mean, weights, atol=1e-8)
    np.testing.assert_allclose(model.crowd_weights, weights.mean(0), atol=1e-8)


@pytest.mark.parametrize("regulariser", get_args(Regulariser))
def test_regularisers_by_hand(regulariser: Regulariser) -> None:
    rng = np.random.default_rng(0)
    phi, w = rng.standard_normal((64, 3)), rng.standard_normal((64, 3))
    off, diagonal = [], []
    for a, b in zip(phi[::2], phi[1::2], strict=True):
        products = np.outer(a, a) + np.outer(b, b)
        off.append(sum(abs(products[i, k]) for i in range(3) for k in range(3) if i != k))
        diagonal.append(sum(abs(products[i, i] - 1) for i in range(3)))
    length, own = np.linalg.norm(phi, axis=1).mean(), np.linalg.norm(w, axis=1).mean()
    expected = {
        **{"none": 0, "l1": np.abs(phi).sum(1).mean(), "l2": length, "double_l2": length + own},
        **{"diag": np.mean(off), "diag_full": np.mean(off) + np.mean(diagonal)},
    }
    found = imputation._penalty(regulariser, torch.from_numpy(phi), torch.from_numpy(w))
    assert float(found) == pytest.approx(expected[regulariser])


@pytest.mark.parametrize("regulariser", get_args(Regulariser))
def test_every_regulariser_can_be_fitted_and_is_another_model(regulariser: Regulariser) -> None:
    data = small(2)
    model = palate.fit(data, PReF.faithful(3, regulariser=regulariser))
    plain = palate.fit(data, PReF.faithful(3, regulariser="none"))
    assert torch.isfinite(model.state_dict()["bases"]).all()
    assert torch.equal(model.state_dict()["bases"], plain.state_dict()["bases"]) == (regulariser == "none")


def test_more_base_rewards_than_the_table_has_are_zero_weights() -> None:
    data = EmbeddedPairs(Dense(np.eye(3)), [0, 1, 0], [1, 2, 2], ["a", "b", "b"])  # one row of the table, two users
    model, table = fit_with_profiles(data, PReF.faithful(3))
    assert table is not None
    assert table.mean.shape == (2, 3)
    assert model.state_dict()["bases"].shape == (3, 3)


# -- arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PReF(0), "n_bases is 0; expected a positive number of base rewards"),
        (lambda: PReF(()), r"n_bases is \(\)"),
        (lambda: PReF(2, strength=1.0), r"strength is 1\.0; expected a number between 0 and 1"),
        (lambda: PReF(2, kappa=-1.0), r"kappa is -1\.0; expected a finite number of at least 0"),
        (lambda: PReF(2, start="middle"), "start is 'middle'; expected one of auto, answers, scores"),  # type: ignore[arg-type]
        (lambda: PReF.faithful((2, 3)), r"n_bases is \(2, 3\); the faithful preset takes one number"),  # type: ignore[arg-type]
        (lambda: PReF.faithful(2, regulariser="l3"), "regulariser is 'l3'; expected one of none, l2"),  # type: ignore[arg-type]
        (lambda: PReF.faithful(2, few_shot_steps=0), "few_shot_steps is 0; expected at least one step"),
    ],
)
def test_arguments_that_make_no_model(make: Callable[[], PReF], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()
