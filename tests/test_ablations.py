"""The scripts behind the open questions: one thing varies at a time, and the figures are those of the rows."""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from palate.data.planted import two_groups
from palate.data.splits import split
from palate.evaluation import Evaluation, bootstrap
from palate.models.base import RewardModel
from palate.models.meta import ExactSolve, Outer
from palate.models.objectives import RPO, CVaR, Mean
from palate.training import fit


@pytest.fixture(scope="module")
def benchmarks(root: Path) -> Iterator[tuple[ModuleType, ModuleType]]:
    """(ablations, robust), which are run from the repository and not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        from benchmarks import ablations, robust

        yield ablations, robust


def rows_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for path in sorted(folder.glob("rows/*.jsonl")) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_every_study_leaves_rows_and_a_table(
    benchmarks: tuple[ModuleType, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablations = benchmarks[0]
    for source, studies in {"planted": ("bases", "data", "inner", "rho-gamma", "meta"), "synthetic": ("base",)}.items():
        what = [word for name in studies for word in ("--what", name)]
        ablations.main([*what, "--data", source, "--seeds", "1", "--tiny", "--out", str(tmp_path)])
    summary = (tmp_path / "summary.md").read_text()
    assert capsys.readouterr().out.strip().endswith(summary.strip())
    rows = rows_of(tmp_path)
    # 12 unseen users after 0, 1, 5 and all choices; 12 seen ones, or as many as there were left.
    counts = Counter((str(row["data_set"]), str(row["method"])) for row in rows)
    assert {name.split(",")[0] for name, _ in counts} == set(ablations.STUDIES)
    for (data_set, method), count in counts.items():
        assert f"| {method} |" in summary
        if "planted" in data_set:
            assert count == 4 * 12 + (6 if "0.5 of the users" in method else 12), method
    numbers = {row["method"]: row["n_parameters"] for row in rows}
    assert numbers["no bases"] == 10  # D: the crowd's direction
    assert numbers["mixture"] == 4 * 10 + 4  # bases and start
    assert numbers["exact"] == 10 + 10 * 10 + 10 + 10  # crowd, as many bases as features, start, spread
    with (tmp_path / "meta-planted-two_groups.csv").open() as file:
        table = {(row["method"], row["cohort"], row["shots"]): float(row["accuracy"]) for row in csv.DictReader(file)}
    own = [float(str(row["accuracy"])) for row in rows if row["method"] == "exact" and row["cohort"] == "seen"]
    assert table["exact", "seen", ""] == pytest.approx(np.mean(own), abs=1e-12)
    assert "failed" not in summary


def test_only_the_objective_differs(benchmarks: tuple[ModuleType, ModuleType]) -> None:
    """Untrained, models of all objectives are the same numbers; trained for a step they are not; CVaR(1) is the mean."""
    ablations = benchmarks[0]
    data = two_groups(0, n_users=14, n_train=8, n_test=4, dim=9).train

    def made(objective: object, epochs: int) -> RewardModel:
        outer = Outer(0.05, 256, epochs, "constant", warmup=0.0)
        return fit(data, ablations.Told(3, simplex=False, inner=ExactSolve(), outer=outer, objective=objective), seed=4)

    start = made(Mean(), 0)
    for objective in (RPO(), CVaR(0.3), RPO(0.5, 0.5, published=True)):
        untrained, trained = made(objective, 0), made(objective, 2)
        for name, value in start.state_dict().items():
            assert torch.equal(value, untrained.state_dict()[name]), name
        assert not torch.equal(start.state_dict()["bases"], trained.state_dict()["bases"])
        assert trained.record["selection"]["epochs"] == 2
    torch.testing.assert_close(made(CVaR(1.0), 2).state_dict(), made(Mean(), 2).state_dict(), rtol=1e-4, atol=1e-5)


def test_fewer_users_and_choices_are_parts_of_more(benchmarks: tuple[ModuleType, ModuleType]) -> None:
    ablations = benchmarks[0]
    data = two_groups(1, n_users=24, n_train=9, n_test=3, dim=5).train
    parts = split(data, by="unit", seed=2)
    kept = [
        ablations.fewer(data, parts.train, users, choices, 2)
        for users, choices in ((1.0, None), (0.5, None), (0.25, None), (0.25, 2), (0.25, 1))
    ]
    assert np.array_equal(np.sort(kept[0]), parts.train)
    assert all(set(small) < set(large) for large, small in pairwise(kept))
    owners = [data.user_index.numpy()[rows] for rows in kept]
    assert [len(np.unique(owner)) for owner in owners] == [12, 6, 3, 3, 3]
    assert set(np.bincount(owners[3])) == {0, 2}
    assert set(np.bincount(owners[4])) == {0, 1}


def test_components_are_those_of_the_training_texts(benchmarks: tuple[ModuleType, ModuleType]) -> None:
    """Training texts vary along two directions only; what varies elsewhere on the test side is not looked at."""
    ablations, robust = benchmarks
    data, parts = robust.with_minority(True).draw(0)
    train = torch.unique(torch.cat([data.chosen[parts.train], data.rejected[parts.train]]))
    table = torch.randn(len(data.embeddings), 7, generator=torch.Generator().manual_seed(0)) * 100
    table[train] = torch.randn(len(train), 2, generator=torch.Generator().manual_seed(1)) @ torch.eye(7)[[1, 4]]
    replaced = type(data)(table, data.chosen, data.rejected, data.users)
    found = ablations.components(replaced, parts, 2).embeddings.rows(torch.arange(len(table)))
    expected = table[:, [1, 4]]
    assert torch.allclose(torch.cdist(found[:50], found[-50:]), torch.cdist(expected[:50], expected[-50:]), rtol=1e-3, atol=1e-2)


def test_the_minority_is_a_fifth_and_of_one_mind(benchmarks: tuple[ModuleType, ModuleType]) -> None:
    robust = benchmarks[1]
    data, parts = robust.with_minority(True).draw(3)
    sides = [data.users[rows] for rows in (parts.train, parts.test_seen, parts.support, parts.test_unseen)]
    for side in sides:
        users = np.unique(side.astype(str))
        few = np.char.startswith(users, "minority")
        assert 0.15 <= few.mean() <= 0.25
    assert set(sides[0]) == set(sides[1])
    assert set(sides[2]) == set(sides[3])
    assert not set(sides[0]) & set(sides[2])
    assert sorted(np.concatenate([parts.train, parts.test_seen, parts.support, parts.test_unseen])) == list(range(len(data)))
    # Along the direction that tells the groups apart, the majority chooses upwards and the minority downwards.
    direction = two_groups(3, n_users=20, n_train=8, n_test=8, dim=10).directions[:, 0]
    up = (data.embeddings.rows(data.chosen) - data.embeddings.rows(data.rejected)) @ direction
    of_minority = torch.tensor([str(user).startswith("minority") for user in data.users])
    assert float(up[~of_minority].mean()) > 0.3
    assert float(up[of_minority].mean()) < -0.3


def test_gains_are_those_of_the_rows(benchmarks: tuple[ModuleType, ModuleType]) -> None:
    """Accuracies by hand: four people, two seeds, `other` is better by .1 for the minority, worse by .2 for one other."""
    robust = benchmarks[1]
    accuracy = {"majority a": 0.9, "majority b": 0.8, "majority c": 0.7, "minority d": 0.3}
    gain = {"majority a": -0.2, "majority b": 0.0, "majority c": 0.0, "minority d": 0.1}
    rows = [
        {"data_set": "by hand", "method": method, "seed": seed, "shots": None, "cohort": "unseen", "user": user}
        | {"n_support": 3, "n_test": 10, "accuracy": value + (gain[user] if method == "other" else 0.0)}
        | {"log_loss": 0.5, "n_parameters": 1, "fit_seconds": None, "adapt_seconds": None, "auc": 0.5, "n_ties": 0}
        for method in ("mean", "other")
        for seed in (0, 1)
        for user, value in accuracy.items()
    ]
    found = Evaluation.from_rows(rows)
    assert robust.estimate(found, "mean", None, bootstrap.mean).value == pytest.approx(0.675)
    assert robust.estimate(found, "other", "mean", bootstrap.mean).value == pytest.approx(-0.025)
    assert robust.estimate(found, "other", "mean", bootstrap.worst(0.1)).value == pytest.approx(0.1)
    assert robust.estimate(found, "other", "mean", bootstrap.worst(0.5)).value == pytest.approx((0.4 + 0.7) / 2 - (0.3 + 0.7) / 2)
    assert robust.estimate(found, "other", "mean", bootstrap.mean, users="minority").value == pytest.approx(0.1)
    sure = robust.estimate(found, "other", "mean", bootstrap.mean, users="minority")
    assert (sure.low, sure.high) == pytest.approx((0.1, 0.1))


def test_the_robust_command(
    benchmarks: tuple[ModuleType, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    robust = benchmarks[1]
    way = "mixture, five Adam steps"
    given = ["--data", "planted", "--way", way, "--tiny", "--out", str(tmp_path)]
    robust.main([*given, "--seeds", "1"])
    robust.main([*given, "--seeds", "1", "--first-seed", "1"])
    summary = (tmp_path / "summary.md").read_text()
    assert "2 seeds (0 to 1)" in summary  # seeds may be run in parts
    assert {row["method"] for row in rows_of(tmp_path)} == set(robust.FEW)
    assert [line for line in summary.splitlines() if line.startswith("| minority |")]
    with pytest.raises(SystemExit):
        robust.main(["--data", "polis", "--out", str(tmp_path)])
    assert "expected one of polis PATH" in capsys.readouterr().err
