"""Per-user metrics, intervals and the table of results, against numbers obtained another way."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor

import palate
from palate import likelihood
from palate.adaptation import Profiles, adapt, margin_moments
from palate.data.embeddings import Embeddings
from palate.data.pairs import EmbeddedPairs
from palate.data.planted import two_groups
from palate.data.splits import nested_shots
from palate.errors import ConvergenceError, DataError, MismatchError
from palate.evaluation import Evaluation, bootstrap, evaluate
from palate.evaluation.metrics import (
    Calibration,
    binomial_floor,
    calibration,
    moderated,
    n_worst,
    user_metrics,
    worst_mean,
)
from palate.models.base import Inference, Newton, RewardModel
from palate.priors import Prior


class Linear(RewardModel):
    """A fitted model with known numbers: reward = crowd . e + w . (V^T e), w ~ N(0, I)."""

    direction: Tensor
    bases: Tensor

    def __init__(self, crowd: Tensor, bases: Tensor):
        super().__init__()
        self.inference: Inference = Newton()
        self.register_buffer("direction", crowd)
        self.register_buffer("bases", bases)

    @property
    def n_features(self) -> int:
        return len(self.direction)

    @property
    def crowd_weights(self) -> Tensor:
        return self.bases.new_zeros(self.bases.shape[1])

    @property
    def prior(self) -> Prior:
        return Prior.gaussian(torch.eye(self.bases.shape[1]))

    def options(self) -> dict[str, Any]:
        return {}

    def features(self, embeddings: Embeddings) -> Tensor:
        return embeddings.project(torch.cat([self.direction[:, None], self.bases], dim=1))

    def design(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features[:, 0], features[:, 1:]


def choices(users: list[str], seed: int, *, dim: int = 5, ties: bool = False) -> EmbeddedPairs:
    rng = np.random.default_rng(seed)
    n = len(users)
    table = torch.from_numpy(rng.standard_normal((2 * n, dim)).astype(np.float32))
    tie = rng.random(n) < 0.3 if ties else None
    return EmbeddedPairs(table, np.arange(n), np.arange(n, 2 * n), users, tie=tie)


@pytest.fixture
def model() -> Linear:
    generator = torch.Generator().manual_seed(4)
    return Linear(torch.randn(5, generator=generator), torch.randn(5, 2, generator=generator))


# -- metrics


def test_metrics_of_two_users_by_hand() -> None:
    margin = torch.tensor([2.0, 0.0, -1.0, 3.0, 0.5])
    tie = torch.tensor([False, False, False, True, False])
    found = user_metrics(margin, tie, torch.tensor([1, 1, 1, 1, 0]), 3)
    assert found.n_test.tolist() == [1, 3, 0]
    assert found.n_ties.tolist() == [0, 1, 0]
    assert found.accuracy[:2].tolist() == [1.0, 0.5]  # right, half, wrong; the labelled tie is left out
    assert np.isnan(found.accuracy[2])
    strict = [math.log(1 + math.exp(-m)) for m in (2, 0, -1)]
    half = 0.5 * math.log(1 + math.exp(-3)) + 0.5 * math.log(1 + math.exp(3))
    assert found.log_loss[:2] == pytest.approx([math.log(1 + math.exp(-0.5)), (sum(strict) + half) / 4], rel=1e-6)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-3, 3)), min_size=1, max_size=40))
def test_metrics_equal_a_loop_over_users_with_scikit_learn(rows: list[tuple[int, int]]) -> None:
    user, margin = torch.tensor([u for u, _ in rows]), torch.tensor([float(m) for _, m in rows])
    found = user_metrics(margin, torch.zeros(len(rows), dtype=torch.bool), user, 4)
    for u in range(4):
        mine = margin[user == u].numpy()
        if not len(mine):
            assert np.isnan(found.auc[u])
            continue
        truth = np.repeat([1, 0], len(mine))
        assert found.auc[u] == pytest.approx(roc_auc_score(truth, np.concatenate([mine, -mine])), abs=1e-12)
        assert found.accuracy[u] == pytest.approx(np.where(mine > 0, 1, np.where(mine == 0, 0.5, 0)).mean())


def test_exchanging_the_sides_mirrors_accuracy_and_auc_and_keeps_calibration() -> None:
    rng = np.random.default_rng(2)
    margin = torch.from_numpy(rng.standard_normal(300))
    no, user = torch.zeros(300, dtype=torch.bool), torch.from_numpy(rng.integers(0, 7, 300))
    one, other = user_metrics(margin, no, user, 7), user_metrics(-margin, no, user, 7)
    assert one.accuracy + other.accuracy == pytest.approx(np.ones(7))
    assert one.auc + other.auc == pytest.approx(np.ones(7))
    # In both orientations at once, in 20 bins of [0, 1]: the same error as folded into 10 bins of [.5, 1].
    p = np.concatenate([1 / (1 + np.exp(-margin.numpy())), 1 / (1 + np.exp(margin.numpy()))])
    y = np.repeat([1.0, 0.0], 300)
    place = np.minimum((p * 20).astype(int), 19)
    expected = sum(abs(y[place == b].sum() - p[place == b].sum()) for b in range(20)) / 600
    assert calibration(margin, no).error() == pytest.approx(expected, abs=1e-9)


def test_calibration_knows_honest_from_overstated_predictions() -> None:
    rng = np.random.default_rng(0)
    true = rng.standard_normal(40_000)
    margin = torch.from_numpy(np.where(rng.random(40_000) < 1 / (1 + np.exp(-true)), true, -true))
    no = torch.zeros(40_000, dtype=torch.bool)
    assert calibration(margin, no).error() < 0.01
    assert calibration(3 * margin, no).error() > 0.1
    confidence, right, pairs = calibration(margin, no).curve()
    assert pairs.sum() == 40_000
    assert right == pytest.approx(confidence, abs=0.05)
    assert (calibration(margin, no) + calibration(margin, no)).error() == pytest.approx(calibration(margin, no).error())
    with pytest.raises(DataError, match="calibration of 0 pairs"):
        calibration(margin, ~no).error()
    assert Calibration.__add__(calibration(margin, no), 3) is NotImplemented


def test_the_moderated_margin_is_the_expected_probability_and_near_the_integral() -> None:
    mean, variance = torch.tensor([0.3, -2.0, 4.0]), torch.tensor([0.0, 1.5, 9.0])
    p = torch.sigmoid(moderated(mean, variance))
    assert p.numpy() == pytest.approx(likelihood.expected_probability(mean, variance).numpy(), abs=1e-6)
    draws = mean.numpy() + np.sqrt(variance.numpy()) * np.random.default_rng(0).standard_normal((200_000, 3))
    assert p.numpy() == pytest.approx((1 / (1 + np.exp(-draws))).mean(0), abs=0.02)
    with pytest.raises(ConvergenceError, match=r"1 of 2 predicted margins are not finite \(the first is pair 1\)"):
        moderated(torch.tensor([0.0, math.nan]), torch.zeros(2))


def test_worst_means_and_how_many_they_are_of() -> None:
    accuracy = np.array([0.9, 0.1, 0.5, 0.7, 0.3])
    assert worst_mean(accuracy, 0.1) == pytest.approx(0.1)
    assert worst_mean(accuracy, 0.5) == pytest.approx(0.3)  # ceil(2.5) = 3 users
    assert [n_worst(n, q) for n, q in ((30, 0.1), (31, 0.1), (10, 0.3), (3, 0.1))] == [3, 4, 3, 1]
    with pytest.raises(DataError, match="0 users"):
        worst_mean(np.zeros(0), 0.1)


def test_binomial_floor_against_the_exact_mean_of_the_lowest_of_ten() -> None:
    n, p = 12, 0.7
    above = 1 - stats.binom.cdf(np.arange(n), n, p)
    exact = (above**10).sum() / n  # E[min of 10] = sum_k P(all > k) / n
    assert binomial_floor(p, np.full(10, n), (0.1,))[0] == pytest.approx(exact, abs=0.01)
    assert binomial_floor(1.0, np.full(7, 3)).tolist() == [1.0] * 5
    assert binomial_floor(p, np.full(10, n)).tolist() == binomial_floor(p, np.full(10, n)).tolist()
    with pytest.raises(DataError, match="at least 1 strict"):
        binomial_floor(p, np.array([3, 0]))


# -- evaluate


def test_evaluate_is_adapt_then_predict(model: Linear) -> None:
    names = ["b", "a", "c", "a", "b", "c", "c"]
    support, test = choices(names * 3, 1), choices(names * 5, 2, ties=True)
    found = evaluate(model, support, test, cohort="unseen", method="linear", data_set="toy", seed=3)
    mean, variance = margin_moments(model, test, adapt(model, support))
    p = likelihood.expected_probability(mean.double(), variance.double()).numpy()
    tie, user = test.tie.numpy(), test.users
    for row in found.rows():
        mine = user == row["user"]
        loss = np.where(tie, -(np.log(p) + np.log(1 - p)) / 2, -np.log(p))[mine].mean()
        assert row["log_loss"] == pytest.approx(loss, rel=1e-5)
        assert row["accuracy"] == pytest.approx((p > 0.5)[mine & ~tie].mean())
        assert row["n_test"] == (mine & ~tie).sum()
        assert row["n_ties"] == (mine & tie).sum()
        assert row["n_support"] == 3 * names.count(row["user"])
        assert (row["data_set"], row["method"], row["seed"], row["cohort"]) == ("toy", "linear", 3, "unseen")
        assert row["shots"] is None
        assert row["fit_seconds"] is None
        assert row["adapt_seconds"] >= 0
        assert row["n_parameters"] == 15
    assert [row["user"] for row in found.rows()] == ["a", "b", "c"]


def test_shots_are_nested_and_zero_is_the_crowd(model: Linear) -> None:
    support, test = choices(["a", "b", "c"] * 9, 1), choices(["a", "b", "c"] * 6, 2)
    few = evaluate(model, support, test, shots=4, seed=5)
    by_hand = adapt(model, support[nested_shots(support, 4, 5)])
    assert few.columns["accuracy"].tolist() == evaluate(model, None, test, profiles=by_hand).columns["accuracy"].tolist()
    assert few.columns["n_support"].tolist() == [4, 4, 4]
    crowd = evaluate(model, support, test, shots=0)
    assert crowd.columns["n_support"].tolist() == [0, 0, 0]
    right = (palate.margins(model, test) > 0).numpy()
    assert crowd.columns["accuracy"] == pytest.approx([right[test.users == user].mean() for user in "abc"])
    assert crowd.columns["log_loss"].tolist() == evaluate(model, None, test).columns["log_loss"].tolist()


def test_a_user_without_support_gets_the_crowds_reward_and_one_without_strict_pairs_no_row(model: Linear) -> None:
    support = choices(["a", "a", "z"], 1)
    test = choices(["a", "b", "b", "c"], 2)
    tie = torch.tensor([False, False, False, True])
    test = EmbeddedPairs(test.embeddings, test.chosen, test.rejected, test.users, tie=tie)
    found = evaluate(model, support, test)
    assert found.columns["user"].tolist() == ["a", "b"]
    assert found.columns["n_support"].tolist() == [2, 0]
    assert found.cells[0].n_dropped == 1
    crowd = evaluate(model, None, test)
    assert found.columns["log_loss"][1] == pytest.approx(crowd.columns["log_loss"][1], rel=1e-6)
    assert found.columns["log_loss"][0] != crowd.columns["log_loss"][0]


def test_a_model_that_knows_nothing_scores_a_half() -> None:
    blind = Linear(torch.zeros(5), torch.zeros(5, 2))
    found = evaluate(blind, choices(["a", "b"] * 5, 1), choices(["a", "b"] * 7, 2))
    assert found.columns["accuracy"].tolist() == [0.5, 0.5]
    assert found.columns["auc"].tolist() == [0.5, 0.5]
    assert found.columns["log_loss"] == pytest.approx([math.log(2)] * 2)
    planted = two_groups(1, n_users=60, n_train=4, n_test=60, dim=8)
    # A direction that is orthogonal to everything that anybody wants has nothing to do with the labels.
    wanted = torch.cat([planted.crowd[:, None], planted.directions], dim=1)
    unrelated = torch.linalg.qr(torch.cat([wanted, torch.eye(8)], dim=1))[0][:, 2]
    accuracy = evaluate(Linear(unrelated, torch.zeros(8, 1)), None, planted.test_unseen).columns["accuracy"].mean()
    assert accuracy == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(3600))


def test_adapting_finds_the_planted_groups() -> None:
    planted = two_groups(3, n_users=60, n_train=30, n_test=40, dim=8)
    knowing = Linear(planted.crowd, planted.directions)
    adapted = evaluate(knowing, planted.support, planted.test_unseen).columns["accuracy"].mean()
    crowd = evaluate(knowing, None, planted.test_unseen).columns["accuracy"].mean()
    assert adapted == pytest.approx(planted.oracle_unseen, abs=0.02)
    assert crowd == pytest.approx(planted.crowd_unseen, abs=0.02)
    assert adapted > crowd + 0.05


def test_evaluate_refuses(model: Linear) -> None:
    support, test = choices(["a", "b"] * 3, 1), choices(["a", "b"] * 2, 2)
    profiles = adapt(model, support)
    with pytest.raises(DataError, match="profiles and shots = 2"):
        evaluate(model, support, test, profiles=profiles, shots=2)
    with pytest.raises(DataError, match="shots is -1"):
        evaluate(model, support, test, shots=-1)
    with pytest.raises(MismatchError, match="adapt again"):
        evaluate(Linear(torch.ones(5), torch.zeros(5, 2)), support, test, profiles=profiles)
    ties = EmbeddedPairs(test.embeddings, test.chosen, test.rejected, test.users, tie=[True] * 4)
    with pytest.raises(DataError, match="none of the 4 test pairs is strict"):
        evaluate(model, support, ties)
    broken = Profiles(("a",), torch.full((1, 2), math.inf), None, torch.ones(1), torch.ones(1) > 0, model.fingerprint())
    with pytest.raises(ConvergenceError, match="not finite"):
        evaluate(model, support, test, profiles=broken)


# -- the table


def row(user: str, accuracy: float, **changes: Any) -> dict[str, Any]:
    base = {"data_set": "d", "method": "m", "seed": 0, "shots": None, "cohort": "unseen", "user": user, "n_support": 4}
    base |= {"n_test": 10, "accuracy": accuracy, "log_loss": 1 - accuracy, "n_parameters": 7, "fit_seconds": 2.0}
    return base | {"adapt_seconds": None, "auc": accuracy, "n_ties": 0} | changes


def results(seeds: int = 3, users: int = 40, gain: float = 0.05, seed: int = 0) -> Evaluation:
    rng = np.random.default_rng(seed)
    rows = []
    level = rng.uniform(0.4, 0.9, users)
    for s in range(seeds):
        for u in rng.permutation(users)[: users // 2]:
            base = float(np.clip(level[u] + 0.1 * rng.standard_normal(), 0, 0.95))
            rows.append(row(f"u{u}", base, method="bt", seed=s))
            rows.append(row(f"u{u}", base + gain + 0.02 * float(rng.standard_normal()), method="h", seed=s))
    return Evaluation.from_rows(rows)


def test_summary_by_hand() -> None:
    rows = [row(f"u{i}", a) for i, a in enumerate([0.2, 0.9, 0.7, 0.6])] + [row("u9", 0.8, seed=1), row("u1", 0.4, seed=1)]
    (found,) = Evaluation.from_rows(rows).summary()
    assert (found["n_seeds"], found["n_users"], found["n_support"]) == (2, 3, 4)
    assert found["accuracy"] == pytest.approx((0.6 + 0.6) / 2)  # users within a seed first, then seeds
    assert found["accuracy_std"] == pytest.approx(0)
    assert found["worst_10"] == pytest.approx((0.2 + 0.4) / 2)
    assert found["worst_50"] == pytest.approx(((0.2 + 0.6) / 2 + 0.4) / 2)
    assert (found["n_parameters"], found["fit_seconds"], found["adapt_seconds"]) == (7, 2.0, None)
    assert found["floor_10"] < found["floor_50"] < 0.6
    assert Evaluation.from_rows(rows[:4]).summary()[0]["accuracy_std"] is None


def test_rows_survive_a_file_exactly(tmp_path: Path, model: Linear) -> None:
    users = ["ada", "\N{LINE SEPARATOR}bo", "\ud800"]
    first = evaluate(model, choices(users * 3, 1), choices(users * 4, 2), shots=2)
    whole = Evaluation.concat([first, evaluate(model, choices(users * 3, 1), choices(users * 4, 2))])
    whole.save(tmp_path / "results.jsonl")
    again = Evaluation.load(tmp_path / "results.jsonl")
    assert list(again.rows()) == list(whole.rows())
    assert again.summary() == whole.summary()
    assert again.calibration("Linear").error() == whole.calibration("Linear").error()
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "results.facts.json"}
    fields = "data_set, method, seed, shots, cohort, user, n_support, n_test, accuracy, log_loss, "
    fields += "n_parameters, fit_seconds, adapt_seconds"
    line = json.loads((tmp_path / "results.jsonl").read_text(errors="surrogatepass").split("\n")[0])
    assert list(line)[:13] == fields.split(", ")
    (tmp_path / "results.facts.json").unlink()
    assert Evaluation.load(tmp_path / "results.jsonl").cells == ()


def test_broken_files_say_where(tmp_path: Path) -> None:
    path, beside = tmp_path / "r.jsonl", tmp_path / "r.facts.json"
    path.write_text(json.dumps(row("a", 0.5)) + "\n{oops\n")
    with pytest.raises(DataError, match=r"line 2"):
        Evaluation.load(path)
    path.write_text(json.dumps(row("a", 0.5) | {"extra": 1}) + "\n")
    with pytest.raises(DataError, match=r"row 0 differs in \['extra'\]"):
        Evaluation.load(path)
    path.write_text(json.dumps(row("a", 0.5) | {"accuracy": "high"}) + "\n")
    with pytest.raises(DataError, match="wrong type"):
        Evaluation.load(path)
    path.write_text(json.dumps(row("a", 0.5)) + "\n")
    beside.write_text('{"format": "palate-evaluation", "version": 9}')
    with pytest.raises(DataError, match="version 9"):
        Evaluation.load(path)
    beside.write_text("[1]")
    with pytest.raises(DataError, match="cannot be read"):
        Evaluation.load(path)
    with pytest.raises(DataError, match="differs in int"):
        Evaluation.from_rows([3])  # type: ignore[list-item]
    with pytest.raises(DataError, match="equally long"):
        Evaluation({})


def test_joining_refuses_the_same_user_twice() -> None:
    one = Evaluation.from_rows([row("a", 0.5), row("b", 0.6)])
    with pytest.raises(DataError, match=r"'a'\).* occurs 2 times"):
        Evaluation.concat([one, one])
    with pytest.raises(DataError, match="0 evaluations"):
        Evaluation.concat([])
    joined = Evaluation.concat([one, Evaluation.from_rows([row("a", 0.7, data_set="e")])])
    assert joined.data_sets == ("d", "e")
    assert len(joined.where(data_set="e")) == 1
    with pytest.raises(DataError, match="data_set is None; expected one of 'd', 'e'"):
        joined.interval("m")


# -- intervals


def test_differences_are_paired_and_cover_the_truth() -> None:
    gain = results().difference("h", "bt")
    assert gain.value == pytest.approx(0.05, abs=0.01)
    assert gain.low < gain.value < gain.high
    assert gain.high - gain.low < 0.03  # users differ by .15, but each is compared with themselves
    level = results().interval("h")
    assert level.high - level.low > 3 * (gain.high - gain.low)
    assert gain.excludes_zero()
    assert gain.n_seeds == 3
    same = results(gain=0.0).difference("h", "bt", metric="log_loss")
    assert not same.excludes_zero()
    assert results().difference("bt", "h").value == pytest.approx(-gain.value)
    assert results().difference("h", "bt") == gain
    assert results().difference("h", "bt", metric="worst_decile").value > 0


def test_one_seed_agrees_with_scipy() -> None:
    found = results(seeds=1, users=80)
    values = {name: found.where(method=name).columns["accuracy"] for name in ("h", "bt")}
    scipy = stats.bootstrap((values["h"] - values["bt"],), np.mean, n_resamples=4000, method="percentile", rng=1)
    gain = found.difference("h", "bt")
    assert gain.value == pytest.approx((values["h"] - values["bt"]).mean())
    width = scipy.confidence_interval.high - scipy.confidence_interval.low
    assert gain.low == pytest.approx(scipy.confidence_interval.low, abs=0.1 * width)
    assert gain.high == pytest.approx(scipy.confidence_interval.high, abs=0.1 * width)


def test_the_worst_decile_of_a_resample_is_that_of_its_users_written_out() -> None:
    rng = np.random.default_rng(5)
    values = rng.random(23)
    draws = rng.multinomial(23, np.full(23, 1 / 23), size=6).astype(float)
    expected = [worst_mean(np.repeat(values, drawn.astype(int)), 0.1) for drawn in draws]
    assert bootstrap.worst(0.1)(draws, values) == pytest.approx(expected)


def test_intervals_cover_when_the_same_users_recur_in_every_seed() -> None:
    inside, narrow = 0, 0
    for trial in range(60):
        rng = np.random.default_rng(trial)
        user = rng.normal(0.3, 1, 40)  # the truth is .3
        seeds = [
            bootstrap.Seed(picked := rng.permutation(40)[:30], user[picked] + 0.3 * rng.standard_normal(30), None)
            for _ in range(5)
        ]
        found = bootstrap.interval(seeds, bootstrap.mean, resamples=400)
        inside += found.low <= 0.3 <= found.high
        pooled = np.concatenate([one.values for one in seeds])
        half = 1.96 * pooled.std() / math.sqrt(len(pooled))
        narrow += abs(pooled.mean() - 0.3) <= half
    assert inside >= 53  # 95 % of 60 is 57
    assert narrow < 45  # what pooling users over seeds would have claimed


def test_different_shots_and_missing_users() -> None:
    rows = [row("a", 0.9, shots=5), row("b", 0.7, shots=5), row("a", 0.4, method="bt"), row("c", 0.1, method="bt")]
    found = Evaluation.from_rows(rows)
    gain = found.difference("m", "bt", shots=5, baseline_shots=None)
    assert gain.value == pytest.approx(0.5)
    assert gain.n_users == 1  # a alone was tested with both
    assert gain.low == gain.high
    with pytest.raises(DataError, match="no unseen user was tested"):
        found.difference("m", "bt")
    with pytest.raises(DataError, match="no seen user"):
        found.interval("m", cohort="seen")
    with pytest.raises(DataError, match="metric is 'f1'"):
        found.difference("m", "bt", metric="f1")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no calibration of"):
        found.calibration("m")
    with pytest.raises(DataError, match="no users to resample"):
        bootstrap.interval([], bootstrap.mean)


def test_few_shot_curves() -> None:
    rows = [row(u, a + 0.1 * i, shots=n) for i, n in enumerate((0, 2, None)) for u, a in (("a", 0.3), ("b", 0.5))]
    found = Evaluation.from_rows(rows).few_shot()
    assert [point["shots"] for point in found] == [0, 2, None]
    assert [point["value"] for point in found] == pytest.approx([0.4, 0.5, 0.6])
    assert all(point["low"] <= point["value"] <= point["high"] and point["n_users"] == 2 for point in found)
