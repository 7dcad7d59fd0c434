"""`compare`: the same splits for all, the test choices out of reach, and a failure that is never a number."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

import palate
from palate.data.embeddings import Dense, Embeddings
from palate.data.pairs import Choice, EmbeddedPairs, PairSet, Text
from palate.data.planted import two_groups
from palate.data.splits import SIDES, Split, unit_labels
from palate.data.synthetic import Population, synthetic
from palate.encoders import Encoder
from palate.errors import DataError, LeakError, PalateError
from palate.evaluation import Evaluation, compare, evaluate
from palate.evaluation.comparison import drawn
from palate.models.base import Fixed, Inference, RewardModel
from palate.models.factored import BradleyTerry, LoRe


class Spy(BradleyTerry):
    """Bradley-Terry that keeps what it was given, and fails where told to."""

    def __init__(self, ridge: float | None = 0.01, fail: str = ""):
        super().__init__(ridge)
        self.inference: Inference = Fixed()
        self.fail, self.given = fail, cast("list[EmbeddedPairs]", [])

    def options(self) -> dict[str, Any]:
        return {"ridge": self.ridge, "fail": self.fail}

    def fitted(self, data: EmbeddedPairs, *, seed: int, progress: Any) -> tuple[BradleyTerry, None]:
        self.given.append(data)
        if self.fail == "fit" or self.fail == f"seed {seed}":
            raise ZeroDivisionError("divided by the number of friends")
        return super().fitted(data, seed=seed, progress=progress)

    def features(self, embeddings: Embeddings) -> Tensor:
        if self.fail == "use":
            raise DataError("this text is too ugly")
        return super().features(embeddings)


class Counting(Encoder):
    """Ten numbers of a text, and how often they were asked for."""

    spec = "counting"

    def __init__(self) -> None:
        self.calls: list[int] = []

    def encode(self, texts: Any) -> Dense:
        self.calls.append(len(texts))
        assert len({Text(t.prompt, t.response) for t in texts}) == len(texts)
        rows = [np.random.default_rng(abs(hash_of(t.response))).standard_normal(10) for t in texts]
        return Dense(torch.from_numpy(np.asarray(rows, dtype=np.float32)))

    def state(self) -> dict[str, Any]:
        return {"encoder": self.spec}


def hash_of(text: str) -> int:
    return sum((i + 1) * ord(c) for i, c in enumerate(text))


@pytest.fixture(scope="module")
def pairs() -> PairSet:
    return synthetic(24, 12, population=Population(groups=2), seed=1).pairs


@pytest.fixture(scope="module")
def found(pairs: PairSet) -> Evaluation:
    methods = {"bt": BradleyTerry(0.01), "lore": LoRe.faithful(2), "broken": Spy(fail="fit"), "shaky": Spy(fail="seed 1")}
    return compare(pairs, Counting(), methods, by="conversation", seeds=2, shots=(0, 3, None), data_set="made up")


def test_every_cell_is_there_and_failures_are_not_numbers(found: Evaluation) -> None:
    assert found.methods == ("bt", "lore", "shaky")
    assert [(f.method, f.seed, f.stage) for f in found.failures] == [
        ("broken", 0, "fit"),
        ("broken", 1, "fit"),
        ("shaky", 1, "fit"),
    ]
    assert found.failures[0].message == "ZeroDivisionError: divided by the number of friends"
    assert "3 failures" in repr(found)
    cells = {(row["method"], row["cohort"], row["shots"], row["n_seeds"]) for row in found.summary()}
    assert {cell for cell in cells if cell[0] == "shaky"} == {
        ("shaky", "seen", None, 1),
        *(("shaky", "unseen", n, 1) for n in (0, 3, None)),
    }
    assert len(cells) == 12
    assert found.data_sets == ("made up",)
    assert [(run.method, run.seed, run.kind) for run in found.runs] == [
        *(("bt", 0, "BradleyTerry"), ("lore", 0, "LoRe"), ("shaky", 0, "Spy"), ("bt", 1, "BradleyTerry"), ("lore", 1, "LoRe"))
    ]
    assert found.runs[0].record["n_pairs"] == found.splits[0].pairs["train"]
    assert all(row["fit_seconds"] > 0 and row["adapt_seconds"] >= 0 for row in found.rows())


def test_bradley_terry_does_not_care_about_shots_and_seen_are_not_unseen(found: Evaluation) -> None:
    rows = [row for row in found.rows() if row["method"] == "bt" and row["seed"] == 0]
    by_shots = {n: [row["accuracy"] for row in rows if (row["cohort"], row["shots"]) == ("unseen", n)] for n in (0, 3, None)}
    assert by_shots[0] == by_shots[3] == by_shots[None]
    users = {cohort: {row["user"] for row in rows if row["cohort"] == cohort} for cohort in ("seen", "unseen")}
    assert users["seen"].isdisjoint(users["unseen"])
    assert {row["n_support"] for row in rows if row["shots"] == 3} == {3}


def test_fit_is_given_the_training_rows_and_nothing_else(pairs: PairSet) -> None:
    spy, encoder = Spy(), Counting()
    methods = {"spy": spy}
    done = compare(pairs, encoder, methods, by="conversation", seeds=[3, 5], shots=(None,))
    assert len(encoder.calls) == 1
    assert encoder.calls[0] == len(np.unique(np.concatenate([pairs.chosen, pairs.rejected])))
    assert not spy.is_fitted  # the given model is not changed
    for data, facts, seed in zip(spy.given, done.splits, (3, 5), strict=True):
        split = palate.split(pairs, by="conversation", seed=seed)
        train, tests = pairs[split.train], np.concatenate([split.test_seen, split.test_unseen])
        assert data.fingerprint() == Counting().embed(pairs, unit=unit_labels(pairs, "conversation"))[split.train].fingerprint()
        assert len(data) == len(train) == facts.pairs["train"]
        shown = {(u, frozenset(p)) for u, *p in zip(pairs.users[tests], pairs.chosen[tests], pairs.rejected[tests], strict=True)}
        learnt = {(u, frozenset(p)) for u, *p in zip(train.users, train.chosen, train.rejected, strict=True)}
        assert shown.isdisjoint(learnt)


def test_a_cell_is_what_evaluate_says(pairs: PairSet) -> None:
    data = Counting().embed(pairs)
    whole = compare(data, None, {"lore": LoRe(2)}, seeds=[4], shots=(2,))
    split = palate.split(data, by="unit", seed=4)
    model = palate.fit(data[split.train], LoRe(2), seed=4)
    alone = evaluate(model, data[split.support], data[split.test_unseen], shots=2, seed=4)
    again = whole.where(cohort="unseen")
    for name in ("user", "accuracy", "log_loss", "n_support", "n_test", "n_parameters"):
        assert again.columns[name].tolist() == alone.columns[name].tolist()
    seen = evaluate(model, data[split.train], data[split.test_seen], seed=4)
    assert whole.where(cohort="seen").columns["accuracy"].tolist() == seen.columns["accuracy"].tolist()


def test_the_seen_are_served_with_the_table_that_a_method_learned(pairs: PairSet) -> None:
    from palate.training import fit_with_profiles

    data = Counting().embed(pairs)
    whole = compare(data, None, {"lore": LoRe.faithful(2)}, seeds=[0], shots=(1,))
    split = palate.split(data, by="unit", seed=0)
    model, table = fit_with_profiles(data[split.train], LoRe.faithful(2), seed=0)
    assert table is not None
    expected = evaluate(model, None, data[split.test_seen], profiles=table).columns
    seen = whole.where(cohort="seen").columns
    assert seen["accuracy"].tolist() == expected["accuracy"].tolist()
    assert seen["n_support"].tolist() == expected["n_support"].tolist()
    assert seen["n_support"].min() > 0


def test_same_seed_same_rows(pairs: PairSet) -> None:
    def once() -> list[dict[str, Any]]:
        done = compare(pairs, Counting(), {"bt": BradleyTerry(0.1), "lore": LoRe(2)}, seeds=1, shots=(0, 2))
        return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in done.rows()]

    torch.rand(3)
    assert once() == once()


def labelled(pairs: PairSet, drop: int = 0) -> PairSet:
    split = palate.split(pairs, by="conversation", seed=9)
    labels = np.full(len(pairs), None, dtype=object)
    for side in ("train", "test_seen", "support", "test_unseen"):
        labels[getattr(split, side)] = side
    labels[:drop] = None
    columns = {name: getattr(pairs, name) for name in PairSet.__dataclass_fields__}
    return PairSet(**(columns | {"split": labels}))


def test_a_given_split_is_used_as_it_is(pairs: PairSet) -> None:
    spy = Spy()
    given = labelled(pairs, drop=1)
    done = compare(given, Counting(), {"spy": spy}, by="conversation", seeds=2, shots=(None,))
    assert [len(data) for data in spy.given] == [int((given.split == "train").sum())] * 2
    assert spy.given[0].users.tolist() == given.users[given.split == "train"].tolist()
    assert done.splits[0].by == "given, checked by conversation"
    assert done.splits[0].dropped == {"no split given": 1}
    assert [facts.seed for facts in done.splits] == [0, 1]
    first, second = (done.where(seed=s).columns["accuracy"].tolist() for s in (0, 1))
    assert first == second  # Bradley-Terry with a fixed ridge draws nothing
    leaking = labelled(pairs)
    first_train = int(np.flatnonzero(leaking.split == "train")[0])
    same = np.flatnonzero(leaking.conversation == leaking.conversation[first_train])
    leaking.split[same[-1]] = "test_seen"
    with pytest.raises(LeakError, match="conversation is learnt from and tested on"):
        compare(leaking, Counting(), {"spy": spy}, by="conversation", seeds=1)


def test_of_a_given_split_no_more_is_used_than_asked(pairs: PairSet) -> None:
    given, whole = labelled(pairs), drawn(labelled(pairs), by="conversation")
    parts = drawn(given, by="conversation", max_support=2, max_test=3, seed=1)
    for side, most in zip(SIDES, (2, 3, 2, 3), strict=True):
        rows, before = getattr(parts, side), getattr(whole, side)
        assert set(rows.tolist()) <= set(before.tolist())
        expected = np.minimum(np.bincount(given.user_index[before]), most)  # every user keeps what there is, up to the limit
        assert np.bincount(given.user_index[rows]).tolist() == expected.tolist()
    left = sum(len(getattr(parts, side)) for side in SIDES)
    assert parts.dropped == {"no split given": 0, "beyond max_support or max_test": len(given) - left}
    assert drawn(given, by="conversation", max_test=3, seed=1).test_seen.tolist() == parts.test_seen.tolist()
    spy = Spy()
    done = compare(given, Counting(), {"spy": spy}, by="conversation", seeds=[1], shots=(None,), max_support=2, max_test=3)
    assert spy.given[0].users.tolist() == given.users[parts.train].tolist()
    assert done.columns["n_test"].max() == 3
    with pytest.raises(DataError, match="min_support is 2, and the rows have a split column"):
        compare(given, Counting(), {"spy": spy}, seeds=1, min_support=2)
    with pytest.raises(DataError, match="at most 0 rows of a user are wanted in test_seen"):
        drawn(given, by="conversation", max_test=0)


def test_a_split_of_ones_own(pairs: PairSet) -> None:
    asked: list[int] = []

    def own(data: PairSet | EmbeddedPairs, seed: int) -> Split:
        asked.append(seed)
        return palate.split(data, by="pair", unseen=0, seed=seed)

    done = compare(pairs, Counting(), {"bt": BradleyTerry(0.1)}, by=own, seeds=2)
    assert asked == [0, 1]
    assert done.cohorts == ("seen",)
    assert done.splits[0].users["support"] == 0
    assert done.few_shot() == []


@pytest.mark.parametrize("by", ["prompt", "item", "pair"])
def test_other_units(pairs: PairSet, by: Any) -> None:
    done = compare(pairs, Counting(), {"bt": BradleyTerry(0.1)}, by=by, seeds=1, shots=(None,), max_support=3, max_test=5)
    assert done.splits[0].by == by
    assert done.columns["n_test"].max() <= 5
    assert done.columns["n_support"].max() <= 3


def test_a_failure_while_testing_is_kept_with_its_stage(pairs: PairSet) -> None:
    with pytest.raises(
        PalateError, match=r"no method .* bad \(seen\): this text is too ugly; bad \(unseen\): this text is too ugly"
    ):
        compare(pairs, Counting(), {"bad": Spy(fail="use")}, seeds=1, shots=(0,))
    done = compare(pairs, Counting(), {"bad": Spy(fail="use"), "bt": BradleyTerry(0.1)}, seeds=1, shots=(0,))
    assert [(f.method, f.stage) for f in done.failures] == [("bad", "seen"), ("bad", "unseen")]
    assert done.methods == ("bt",)


def test_leaks_are_refused_before_any_fit() -> None:
    listed = [Choice(f"u{i % 6}", f"Question {i}?", f"Plain answer {i}.", f"['Answer', 'as a list {i}']") for i in range(120)]
    spy = Spy()
    with pytest.raises(LeakError, match="formatting alone"):
        compare(PairSet.from_choices(listed), Counting(), {"spy": spy}, seeds=1)
    assert spy.given == []


def test_progress_counts_to_the_end(pairs: PairSet) -> None:
    heard: list[tuple[int, int, str]] = []
    compare(pairs, Counting(), {"bt": BradleyTerry(0.1)}, seeds=2, shots=(0,), progress=lambda *said: heard.append(said))
    assert [done for done, _, _ in heard] == [0, 0, 1, 1, 2]
    assert {total for _, total, _ in heard} == {2}
    assert heard[1][2] == "bt, split 0"


def test_compare_refuses(pairs: PairSet) -> None:
    bt: dict[str, RewardModel] = {"bt": BradleyTerry(0.1)}
    embedded = Counting().embed(pairs)
    with pytest.raises(DataError, match="no methods"):
        compare(pairs, Counting(), {})
    with pytest.raises(DataError, match="method 'bt' is a str"):
        compare(pairs, Counting(), {"bt": "bt"})  # type: ignore[dict-item]
    for seeds in (0, [1, 1], [-1]):
        with pytest.raises(DataError, match="seeds are"):
            compare(pairs, Counting(), bt, seeds=seeds)
    for shots in ((), (1, 1), (-1,)):
        with pytest.raises(DataError, match="shots are"):
            compare(pairs, Counting(), bt, shots=shots)
    with pytest.raises(DataError, match="need an encoder"):
        compare(pairs, None, bt)
    with pytest.raises(DataError, match="embedded already"):
        compare(embedded, Counting(), bt)


def test_two_groups_are_worth_more_than_one_crowd() -> None:
    planted = two_groups(0, n_users=60, n_train=30, n_test=30, dim=8)
    parts = (planted.train, planted.test_seen, planted.support, planted.test_unseen)
    users = np.concatenate([part.users for part in parts])
    chosen, rejected = (torch.cat([getattr(part, side) for part in parts]) for side in ("chosen", "rejected"))
    data = EmbeddedPairs(planted.train.embeddings, chosen, rejected, users)
    methods = {"bt": BradleyTerry(0.003), "hierarchical": palate.Hierarchical(bend=False)}
    done = compare(data, None, methods, seeds=1, shots=(0, None))
    assert not done.failures
    gain = done.difference("hierarchical", "bt")
    assert gain.low > 0.03
    assert abs(done.difference("hierarchical", "bt", shots=0).value) < 0.02
    assert done.difference("hierarchical", "bt", metric="worst_decile").value > 0.05


def test_by_item_a_catalogue_under_one_question_still_leaves_pairs_to_choose_by() -> None:
    rng = np.random.default_rng(0)
    drawn = [(u, *rng.permutation(12)[:2].tolist()) for u in range(8) for _ in range(30)]
    one = PairSet.from_choices(list(dict.fromkeys(Choice(f"u{u}", "Agree?", f"Item {a}.", f"Item {b}.") for u, a, b in drawn)))
    spy = Spy()
    compare(one, palate.load_encoder("items"), {"spy": spy}, by="item", seeds=1, shots=(None,))
    assert len(torch.unique(spy.given[0].unit)) > 10
