"""The benchmark: what conditions do, that a killed bench ends like one that was not, and when a cell of the matrix is red."""

import fcntl
import io
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import palate
from palate import bench_cli, terminal
from palate.bench import board, cells, known, pages, prepared, protocols, results, running, worker
from palate.bench.plan import Plan
from palate.bench.protocols import Draw, World, one_table
from palate.data.conditions import Condition
from palate.data.embeddings import Dense, Embeddings, Joined, OneHot
from palate.data.leaks import check_leaks
from palate.data.pairs import EmbeddedPairs
from palate.data.planted import two_groups
from palate.data.splits import SIDES, split
from palate.data.synthetic import synthetic
from palate.errors import DataError, ModelFileError, PalateError
from palate.evaluation import Evaluation, compare
from palate.evaluation.facts import Failure, Run
from palate.models.base import RewardModel
from palate.models.columns import Table
from palate.models.validation import halves

CLOCK = ("fit_seconds", "adapt_seconds")


def small(seed: int = 0, *, users: int = 20, pairs: int = 600, ties: float = 0.1, table: Embeddings | None = None) -> Draw:
    """Random choices with ties, split by the pair."""
    rng = np.random.default_rng(seed)
    table = Dense(torch.from_numpy(rng.standard_normal((90, 4)).astype(np.float32))) if table is None else table
    sides = np.array([rng.permutation(90)[:2] for _ in range(pairs)])
    who = np.concatenate([np.arange(users), rng.integers(users, size=pairs - users)])
    names = [f"u{u:02d}" for u in who]
    data = EmbeddedPairs(
        table, sides[:, 0], sides[:, 1], names, tie=rng.random(pairs) < ties, weight=rng.choice([0.5, 1, 2], pairs)
    )
    return protocols.only(data, split(data, by="pair", seed=seed))


def swapped(before: EmbeddedPairs, after: EmbeddedPairs) -> np.ndarray:
    """(P,) whether the sides of each pair were exchanged; nothing else may differ."""
    mask = before.chosen != after.chosen
    assert torch.equal(torch.where(mask, after.rejected, after.chosen), before.chosen)
    assert torch.equal(torch.where(mask, after.chosen, after.rejected), before.rejected)
    for name in ("user_index", "tie", "weight"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert torch.equal(torch.unique(before.unit, return_inverse=True)[1], after.unit)
    assert (before.user_ids, before.encoder) == (after.user_ids, after.encoder)
    return mask.numpy()


# -- conditions


def test_flips_touch_strict_choices_that_are_learnt_from_and_no_others() -> None:
    data, parts = small(users=60, pairs=6000)
    learnt = np.concatenate([parts.train, parts.support])
    strict = learnt[~data.tie.numpy()[learnt]]
    every, _ = Condition("flip", 1.0).apply(data, parts, 3)
    assert np.array_equal(np.flatnonzero(swapped(data, every)), np.sort(strict))
    some, same_parts = Condition("flip", 0.2).apply(data, parts, 3)
    assert same_parts is parts
    flips = np.flatnonzero(swapped(data, some))
    assert set(flips) <= set(strict.tolist())
    spread = np.sqrt(len(strict) * 0.2 * 0.8)
    assert abs(len(flips) - 0.2 * len(strict)) < 4 * spread  # 2,700 choices: a share wrong by .04 would be seen
    for side in (parts.train, parts.support):  # on both sides alike
        assert abs(np.isin(side, flips).mean() - 0.2 * 0.9) < 0.05
    again, other = (swapped(data, Condition("flip", 0.2).apply(data, parts, seed)[0]) for seed in (3, 4))
    assert np.array_equal(np.flatnonzero(again), flips)
    assert not np.array_equal(np.flatnonzero(other), flips)


def test_contrarians_are_an_exact_share_of_either_cohort_and_reversed_in_their_tests_too() -> None:
    data, parts = small(1, users=35, pairs=900)
    against, _ = Condition("contrarian", 0.3).apply(data, parts, 5)
    mask, user, tie = swapped(data, against), data.user_index.numpy(), data.tie.numpy()
    counts = []
    for sides in ((parts.train, parts.test_seen), (parts.support, parts.test_unseen)):
        cohort = np.unique(user[np.concatenate(sides)])
        shares = np.array([mask[(user == u) & ~tie].mean() for u in cohort])
        assert set(shares) == {0.0, 1.0}  # all strict choices of a user or none
        counts.append((int(shares.sum()), round(0.3 * len(cohort))))
    assert all(found == expected for found, expected in counts), counts
    assert not mask[tie].any()


@given(seed=st.integers(0, 50), few=st.integers(1, 6))
def test_few_pairs_are_an_exact_number_and_a_part_of_more(seed: int, few: int) -> None:
    data, parts = small(2)
    user = data.user_index.numpy()
    _, some = Condition("pairs", few).apply(data, parts, seed)
    _, more = Condition("pairs", few + 3).apply(data, parts, seed)
    for side in ("train", "support"):
        all_of, kept = (Counter(user[getattr(part, side)].tolist()) for part in (parts, some))
        assert kept == {u: min(few, n) for u, n in all_of.items()}
        assert set(getattr(some, side)) <= set(getattr(more, side)) <= set(getattr(parts, side))
    for side in ("test_seen", "test_unseen"):
        assert np.array_equal(getattr(some, side), getattr(parts, side))


def test_conditions_go_by_their_names() -> None:
    assert [Condition.named(name).name for name in ("clean", " flip=.2", "contrarian=0.30", "pairs=5")] == [
        "clean",
        "flip=0.2",
        "contrarian=0.3",
        "pairs=5",
    ]
    for wrong in ("flip", "flip=0", "flip=1.5", "flip=nan", "pairs=2.5", "pairs=0", "clean=1", "noise=.1", "flip=x", ""):
        with pytest.raises(DataError, match=r"the condition is .*; expected clean, flip"):
            Condition.named(wrong)


# -- draws


def tables() -> Mapping[str, Embeddings]:
    rng = np.random.default_rng(0)
    dense = Dense(torch.from_numpy(rng.standard_normal((90, 3)).astype(np.float32)))
    return {
        "dense": dense,
        "half": Dense(rng.standard_normal((90, 5)).astype(np.float16)),
        "one-hot": OneHot(torch.arange(90) % 7 - 1, 6, scale=0.7),
        "joined": Joined([OneHot(90), dense], [0.5, 2.0]),
    }


@pytest.mark.parametrize("kind", ["dense", "half", "one-hot", "joined"])
def test_a_draw_comes_back_from_disk_to_the_same_fit(kind: str, tmp_path: Path) -> None:
    data, parts = small(3, table=tables()[kind])
    written = prepared.prepare(Draw(data, parts), tmp_path)
    back, sides = prepared.read(tmp_path, written)
    assert swapped(data, back).sum() == 0
    for side in SIDES:
        assert np.array_equal(getattr(parts, side), getattr(sides, side))
    fits = [palate.fit(d[torch.from_numpy(parts.train)], palate.BradleyTerry()).direction for d in (data, back)]
    assert torch.equal(*fits)
    for mine, theirs in zip(halves(data, 3), halves(back, 3), strict=True):  # what fits hold out goes by the order of units
        assert torch.equal(mine, theirs)
    before = sorted(tmp_path.iterdir())
    assert prepared.prepare(Draw(data, parts), tmp_path) == written
    assert sorted(tmp_path.iterdir()) == before
    changed = Condition("flip", 0.01).apply(data, parts, 0)[0]
    other = replace(parts, train=parts.train[1:])
    assert len({written, *(prepared.prepare(Draw(*d), tmp_path) for d in ((changed, parts), (data, other)))}) == 3


def test_a_damaged_draw_says_what_to_do(tmp_path: Path) -> None:
    written = prepared.prepare(small(), tmp_path)
    path = tmp_path / f"{written}.npz"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ModelFileError, match=r"cannot be read .*; remove .*, and the bench makes it anew"):
        prepared.read(tmp_path, written)


@pytest.mark.parametrize("by", ["prompt", "item"])
def test_a_cell_has_the_figures_of_compare(by: Any) -> None:
    """The choices are cut to those on a side, and the table is read from a file: not one bit may come of it."""
    pairs = synthetic(16, 14, seed=3).pairs
    recipe = protocols.Recipe(lambda pairs: pairs, by, 4, 5, "style")
    source = protocols.Texts("made", pairs, recipe, palate.load_encoder("style"))
    methods = {"hierarchical": palate.Hierarchical(2, bend=0, types=())}
    shots = (0, 2, None)
    expected = compare(
        pairs,
        palate.load_encoder("style"),
        methods,
        by=by,
        seeds=[7],
        shots=shots,
        max_support=4,
        max_test=5,
        data_set="made, style",
    )
    method = cells.Method.of(methods["hierarchical"])
    found = worker.found(cells.Cell(source.label, "clean", "hierarchical", 7, method, "", "", shots), source.draw(7))
    assert without_clock(found) == without_clock(expected)
    assert len(found) == len(expected) > 20


def without_clock(evaluation: Evaluation) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in evaluation.rows()]


def test_the_attribute_users_are_84_with_choices_of_their_own() -> None:
    data, parts = protocols.attribute_choices(3)
    user = data.user_index.numpy()
    assert len(data.user_ids) == 84
    cohorts = [set(user[np.concatenate(sides)]) for sides in ((parts.train, parts.test_seen), (parts.support, parts.test_unseen))]
    assert [len(cohort) for cohort in cohorts] == [60, 24]
    assert not cohorts[0] & cohorts[1]
    assert [len(getattr(parts, side)) for side in SIDES] == [400 * 20, 60 * 200, 24 * 40, 24 * 200]
    assert set(Counter(user[parts.support].tolist()).values()) == {40}
    check_leaks(data, parts, by="unit")
    # Two equal answers are the true one with probability p^2 / (p^2 + (1 - p)^2).
    again = protocols.attribute_choices(3)[0]
    assert torch.equal(again.chosen, data.chosen)
    strict = parts.test_unseen[~data.tie.numpy()[parts.test_unseen]]
    world = palate.data.attributes.attributes(3)
    weights = {wish.name: w for wish, w in zip(world.unseen, world.weights_unseen, strict=True)}
    own = torch.stack([weights[data.user_ids[u]] for u in user[strict]])
    gap = (data.embeddings.rows(data.chosen[strict]) - data.embeddings.rows(data.rejected[strict])) @ world.directions
    margin = (gap * own).sum(1)
    share = torch.sigmoid(margin.abs()) ** 2 / (torch.sigmoid(margin.abs()) ** 2 + torch.sigmoid(-margin.abs()) ** 2)
    assert float((margin > 0).float().mean()) == pytest.approx(float(share.mean()), abs=0.02)


def test_data_sets_go_by_their_names(tmp_path: Path) -> None:
    def encoder(spec: str) -> palate.Encoder:
        raise AssertionError(spec)

    assert protocols.source("two-groups", encoder).label == "two groups"
    alphas = [protocols.source(f"personalllm:alpha={alpha}", encoder) for alpha in (".001", ".01", ".1")]
    assert [source.label for source in alphas] == [f"personalllm, alpha {alpha}" for alpha in ("0.001", "0.01", "0.1")]
    assert len(tiny_plan(sources=alphas).sources) == 3
    for wrong in ("polis", "prism=", "imdb=rows.jsonl", "attributes=x", "", "personalllm", "prism=x,attributes="):
        with pytest.raises(DataError, match=r"--data is .*; expected one of polis=PATH"):
            protocols.source(wrong, encoder)
    with pytest.raises(DataError, match="expected a number above 0 for alpha"):
        protocols.source("personalllm:alpha=0", encoder)
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        protocols.source(f"prism={tmp_path / 'nowhere.jsonl'}", encoder)


def test_prism_is_prepared_as_the_project_reports_it(shared: Path) -> None:
    source = protocols.source(f"prism={shared / 'prism-subset' / 'pairs.jsonl.gz'},encoder=style", palate.load_encoder)
    data, parts = source.draw(100)
    assert source.label == "prism, style"
    assert [len(getattr(parts, side)) for side in SIDES] == [502, 613, 504, 577]
    assert len(data.user_ids) == 183
    assert not bool(data.tie.any())


# -- running


def tiny(label: str, groups: int = 12) -> World:
    return World(label, lambda seed: one_table(two_groups(seed, n_users=groups, n_train=8, n_test=6, dim=6), 2))


def tiny_plan(**changes: Any) -> Plan:
    methods: dict[str, RewardModel] = {"bt": palate.BradleyTerry(), "mrm-faithful": palate.MRM.faithful(epochs=2)}
    usual = Plan(
        [tiny("one"), tiny("two", 9)], methods, [100, 101], [Condition("clean"), Condition("flip", 0.2)], shots=(0, 1, None)
    )
    return replace(usual, **changes)


def here(started: running.Started, folder: Path) -> list[dict[str, Any]]:
    """Run what is missing in this process, through the worker's own loop."""
    asked = io.StringIO("".join(json.dumps(cell.as_json()) + "\n" for cell in started.pending))
    answers = io.StringIO()
    worker.run(folder, asked, answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in CLOCK} for line in lines]


SCRIPT = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import test_bench
    from palate.bench import run, start
    out = Path(sys.argv[1])
    run(start(test_bench.tiny_plan(), out), out, jobs=2)
"""


@pytest.mark.slow
def test_killed_and_resumed_in_parallel_it_ends_like_a_serial_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent))))

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([sys.executable, str(script), str(killed)], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list((killed / "cells").glob("*.json.gz"))) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "results.jsonl").exists()
    pages.write_pages(killed)  # a page can be made of what there is
    done = {path.name: path.stat().st_mtime_ns for path in (killed / "cells").glob("*.json.gz")}
    assert 2 <= len(done) < 16
    for out, jobs in ((killed, 2), (whole, 1)):
        assert running.run(running.start(tiny_plan(), out), out, jobs=jobs) == 0
        pages.write_pages(out)
    assert rows_of(killed) == rows_of(whole)
    assert len(rows_of(whole)) == 2 * 2 * 2 * (12 + 9) * (1 + 3)  # methods, conditions, seeds, users, cohorts and shots
    kept = {path.name: path.stat().st_mtime_ns for path in (killed / "cells").glob("*.json.gz")}
    assert done.items() <= kept.items()  # no cell was run twice
    assert {path.name for path in (whole / "cells").iterdir()} == set(kept)


def test_a_change_costs_its_own_cells_and_no_others(tmp_path: Path) -> None:
    first = running.start(tiny_plan(), tmp_path)
    assert len(first.pending) == 16
    here(first, tmp_path)
    assert not running.start(tiny_plan(), tmp_path).pending
    pages.write_pages(tmp_path)
    before = rows_of(tmp_path)

    def pending(**changes: Any) -> Counter[str]:
        return Counter(cell.name for cell in running.start(tiny_plan(**changes), tmp_path).pending)

    bt, other = palate.BradleyTerry(), palate.MRM.faithful(epochs=3)
    assert pending(methods={"bt": bt, "mrm-faithful": other}) == {"mrm-faithful": 8}
    assert pending(methods={"crowd": bt}) == {}  # a name changes nothing
    assert pending(methods={"bt": bt}, sources=[tiny("one", 10), tiny("two", 9)]) == {"bt": 4}
    assert pending(methods={"bt": bt}, seeds=[100, 101, 102]) == {"bt": 4}
    assert pending(methods={"bt": bt}, conditions=[Condition("clean"), Condition("flip", 0.25)]) == {"bt": 4}
    assert pending(methods={"bt": bt}, shots=(0, None)) == {"bt": 8}
    # What was replaced comes back when it is asked for again: its cells are still there.
    assert not running.start(tiny_plan(), tmp_path).pending
    pages.write_pages(tmp_path)
    assert [row for row in rows_of(tmp_path) if row["method"] in ("bt", "mrm-faithful") and row["seed"] < 102] == before
    assert len(running.start(tiny_plan(), tmp_path, again=["bt"]).pending) == 8
    with pytest.raises(DataError, match="again has lore; expected methods of this bench: bt, mrm-faithful"):
        running.start(tiny_plan(), tmp_path, again=["lore"])


def test_a_later_bench_adds_to_the_pages_and_replaces_what_it_has_anew(tmp_path: Path) -> None:
    def listed(**changes: Any) -> Counter[tuple[str, Any]]:
        every = running.start(tiny_plan(conditions=[Condition("clean")], **changes), tmp_path).every
        return Counter((cell.name, cell.method.options["outer"]["epochs"] if cell.name != "bt" else cell.label) for cell in every)

    bt = palate.BradleyTerry()
    assert listed(methods={"bt": bt}) == {("bt", "one"): 2, ("bt", "two"): 2}
    slow = listed(methods={"mrm-faithful": palate.MRM.faithful(epochs=2)}, seeds=[100])
    assert slow == {("bt", "one"): 2, ("bt", "two"): 2, ("mrm-faithful", 2): 2}
    slower = listed(methods={"mrm-faithful": palate.MRM.faithful(epochs=4)}, seeds=[101])
    assert slower == {("bt", "one"): 2, ("bt", "two"): 2, ("mrm-faithful", 4): 2}  # seed 100 had other options
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"plan\.json cannot be read"):
        results.recorded(tmp_path)


def test_data_of_one_name_that_changed_are_other_data(tmp_path: Path) -> None:
    recipe = protocols.Recipe(lambda pairs: pairs, "prompt", None, None, "style")

    def of(users: int, spec: str = "style") -> Plan:
        texts = protocols.Texts("made", synthetic(users, 8, seed=1).pairs, recipe, palate.load_encoder(spec))
        return tiny_plan(sources=[texts], methods={"bt": palate.BradleyTerry()}, conditions=[Condition("clean")])

    assert len(running.start(of(8), tmp_path).every) == 2
    assert len(running.start(replace(of(8), seeds=[102]), tmp_path).every) == 3
    assert len(running.start(replace(of(10), seeds=[102]), tmp_path).every) == 1  # the rows of other people's seeds are gone


class Reads(palate.BradleyTerry):
    """Reads prompts, or says so."""

    reads_prompts = True


def test_a_method_that_reads_prompts_costs_the_others_nothing(tmp_path: Path) -> None:
    recipe = protocols.Recipe(lambda pairs: pairs, "prompt", None, None, "style")
    texts = protocols.Texts("made", synthetic(8, 8, seed=1).pairs, recipe, palate.load_encoder("style"))
    usual = tiny_plan(sources=[texts], methods={"bt": palate.BradleyTerry()}, conditions=[Condition("clean")])
    here(running.start(usual, tmp_path), tmp_path)
    both = running.start(replace(usual, methods={"bt": palate.BradleyTerry(), "reads": Reads()}), tmp_path)
    assert {cell.name for cell in both.pending} == {"reads"}
    assert len(both.every) == 4
    drawn = {cell.name: prepared.read(tmp_path / "data", cell.data).data for cell in both.every}
    assert drawn["bt"].prompts is None
    assert drawn["reads"].prompts is not None
    assert torch.equal(drawn["bt"].chosen, drawn["reads"].chosen)


def few_told(seed: int) -> Draw:
    """Two groups of people far apart, of whom a region is known."""
    return Draw(*one_table(two_groups(seed, n_users=40, n_train=12, n_test=20, dim=6, separation=3.0), 2))


def few_regions(seed: int) -> Table:
    return known.regions(two_groups(seed, n_users=40, n_train=12, n_test=20, dim=6, separation=3.0), seed)


def test_what_is_known_of_people_reaches_the_method_that_reads_it_and_no_other(tmp_path: Path) -> None:
    base = palate.Hierarchical(2, bend=0, types=(), kappa=1.0)
    methods: dict[str, RewardModel] = {"bt": palate.BradleyTerry(), "informed": palate.AttributePrior(base=base, effect=0.3)}
    told = World("told", few_told, few_regions)
    wanted = tiny_plan(
        sources=[told, tiny("untold")], methods=methods, conditions=[Condition("clean")], seeds=[4], shots=(0, None)
    )
    started = running.start(wanted, tmp_path)
    assert [bool(cell.attributes) for cell in started.every] == [False, True, False, False]
    assert [row["failure"] for row in here(started, tmp_path)][:3] == [None] * 3
    (first, second) = results.boards(tmp_path)
    columns = first.evaluation.columns
    before = {name: columns["accuracy"][(columns["method"] == name) & (columns["shots"] == 0)].mean() for name in methods}
    assert before["informed"] > before["bt"] + 0.05  # before any choice a region tells the group of four in five
    data, parts = few_told(4)
    direct = {"informed": palate.AttributePrior(few_regions(4), base=base, effect=0.3)}
    expected = compare(data, None, direct, by=lambda *_: parts, seeds=[4], shots=(0, None), data_set="told")
    assert without_clock(first.evaluation.where(method="informed")) == without_clock(expected)
    (failure,) = second.evaluation.failures
    assert (failure.method, failure.message.partition(":")[0]) == ("informed", "no attributes")
    assert running.run(running.start(wanted, tmp_path, retry=True), tmp_path) == 0  # which is no failure of the method
    pages.write_pages(tmp_path)
    assert "| informed (no attributes) | \N{EN DASH} |" in (tmp_path / "leaderboard.md").read_text()
    moved = replace(wanted, sources=[World("told", few_told, lambda seed: {"user000": {"region": "north"}}), tiny("untold")])
    assert [(cell.label, cell.name) for cell in running.start(moved, tmp_path).pending] == [("told", "informed")]
    assert [len(known.wished()), len(set(map(str, known.wished().values())))] == [84, 84]
    assert set(protocols.attribute_choices(0)[0].user_ids) == set(known.wished())


def test_attributes_of_real_people_come_from_a_file(tmp_path: Path) -> None:
    rows, table = tmp_path / "rows.jsonl", tmp_path / "people.json"
    made = synthetic(8, 8, seed=1).pairs
    lines = [
        {
            "user_id": user,
            "prompt": made.texts[c].prompt_text,
            "chosen": made.texts[c].response,
            "rejected": made.texts[r].response,
        }
        for user, c, r in zip(made.users, made.chosen, made.rejected, strict=True)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table.write_text(json.dumps({made.user_ids[0]: {"age": 31, "region": "north"}, "nobody": {"age": 50}}))
    for behind in (f",encoder=style,attributes={table}", f",attributes={table},encoder=style"):
        source = protocols.source(f"prism={rows}{behind}", palate.load_encoder)
        assert source.label == "prism, style"
        assert source.attributes(3) == {made.user_ids[0]: {"age": 31.0, "region": "north"}, "nobody": {"age": 50.0}}
    assert protocols.source(f"prism={rows},encoder=style", palate.load_encoder).attributes(3) is None
    for text, said in (
        ("{", "is not JSON"),
        ('["ada"]', 'expected {"user":'),
        ('{"nobody": {"age": 3}}', "attributes of 1 users and of none of the 8"),
        (json.dumps({made.user_ids[0]: {"age": [1]}}), "expected a finite number or a word"),
    ):
        table.write_text(text)
        with pytest.raises(DataError, match=said):
            protocols.source(f"prism={rows},encoder=style,attributes={table}", palate.load_encoder)
    with pytest.raises(ModelFileError, match="the bench makes it anew"):
        known.kept(tmp_path, "nowhere")


def test_a_failure_is_a_row_with_its_message_and_the_rest_goes_on(tmp_path: Path) -> None:
    methods: dict[str, RewardModel] = {"bt": palate.BradleyTerry(), "reference": palate.Reference()}
    wanted = tiny_plan(methods=methods, sources=[tiny("one")], conditions=[Condition("clean")])
    told = here(running.start(wanted, tmp_path), tmp_path)
    assert [row["failure"] is None for row in told] == [True, False] * 2
    pages.write_pages(tmp_path)
    rows = rows_of(tmp_path)
    failed = [row for row in rows if row["failure"] is not None]
    assert [(row["condition"], row["data_set"], row["method"], row["seed"]) for row in failed] == [
        ("clean", "one", "reference", 100),
        ("clean", "one", "reference", 101),
    ]
    for row in failed:
        assert row["failure"].startswith("fit: Reference learns nothing from choices")
        assert row["accuracy"] is row["log_loss"] is row["user"] is row["shots"] is None
    assert {row["method"] for row in rows if row["failure"] is None} == {"bt"}
    text = (tmp_path / "leaderboard.md").read_text()
    assert "failed (fit, seeds 100, 101): Reference learns nothing" in text
    assert not running.start(wanted, tmp_path).pending
    assert {cell.name for cell in running.start(wanted, tmp_path, retry=True).pending} == {"reference"}


FATAL = """
    import os
    from palate.models.factored import BradleyTerry

    class Fatal(BradleyTerry):
        def fitted(self, data, *, seed, progress):
            os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_a_worker_that_the_system_kills_is_one_failed_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fatal_model.py").write_text(textwrap.dedent(FATAL))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    import fatal_model  # type: ignore[import-not-found]

    out = tmp_path / "out"
    wanted = tiny_plan(
        sources=[tiny("one")],
        conditions=[Condition("clean")],
        seeds=[100],
        methods={"fatal": fatal_model.Fatal(), "bt": palate.BradleyTerry()},
    )
    started = running.start(wanted, out)
    assert running.run(started, out, jobs=1) == 1
    (found,) = results.boards(out)
    assert found.evaluation.failures == (
        Failure("one", "fatal", 100, "fit", "the worker process ended with signal 9, as when memory runs out"),
    )
    assert found.complete == ("bt",)
    assert running.run(running.start(wanted, out), out, jobs=1) == 0  # nothing is left to run
    assert [row["method"] for row in running.logged(out)] == ["fatal", "bt"]


def test_a_model_that_no_worker_can_import_is_refused() -> None:
    class Here(palate.BradleyTerry):
        pass

    with pytest.raises(DataError, match=r"Here is defined in .*, which worker processes cannot import; move it"):
        cells.Method.of(Here())
    with pytest.raises(DataError, match="jobs is 0"):
        running.run(running.Started((), ()), Path("nowhere"), jobs=0)


def test_two_benches_in_one_folder_are_one_too_many(tmp_path: Path) -> None:
    plan = tiny_plan(sources=[tiny("one")], seeds=[1])
    started = running.start(plan, tmp_path)
    before = (tmp_path / "plan.json").read_text()
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another bench runs in .*; wait for it"):
            running.start(replace(plan, methods={"bt": palate.BradleyTerry(ridge=1.0)}), tmp_path)
        assert (tmp_path / "plan.json").read_text() == before  # its pages will be of what it was asked for
        with pytest.raises(DataError, match=r"another bench runs in .*; wait for it"):
            running.run(started, tmp_path, jobs=1)
    assert not (tmp_path / "cells").exists()


@pytest.mark.parametrize("name", [n for n in palate.terminal.METHODS if n not in bench_cli.NEED_MORE])
def test_every_method_can_be_told_to_a_worker(name: str) -> None:
    model = palate.terminal.method(name)
    told = cells.Method(*json.loads(json.dumps(cells.Method.of(model))))
    again = told.model()
    assert type(again) is type(model)
    assert json.loads(json.dumps(again.options())) == json.loads(json.dumps(model.options()))
    assert cells.Method.of(again) == cells.Method.of(model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": []}, r"the seeds are \[\]"),
        ({"seeds": [1, 1]}, "expected at least one, each once"),
        ({"sources": [tiny("one"), tiny("one")]}, "the data sets are .*each once"),
        ({"methods": {}}, "the methods are"),
        ({"shots": (0, 1)}, "expected 'all' among them"),
        ({"seeds": [-1]}, "expected whole numbers of 0 or more"),
    ],
)
def test_a_plan_without_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        tiny_plan(**changes)


def test_the_time_is_estimated_from_the_log_and_guessed_where_it_says_nothing(tmp_path: Path) -> None:
    jobs = [
        cells.Cell(label, "clean", name, 1, cells.Method("m", "K", {}), "d", "o", (None,))
        for label, name in (("a", "bt"), ("b", "bt"), ("b", "unheard"))
    ]
    lines = [
        {"data_set": "a", "method": "bt", "seconds": 10.0, "failure": None},
        {"data_set": "a", "method": "bt", "seconds": 20.0, "failure": None},
        {"data_set": "c", "method": "bt", "seconds": 60.0, "failure": None},
        {"data_set": "b", "method": "bt", "seconds": 0.0, "failure": "it broke"},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"half')
    seconds, guessed = running.estimated(jobs, tmp_path, 2)
    assert (seconds, guessed) == (pytest.approx((15 + 30 + running.UNKNOWN) / 2), 1)
    assert running.estimated(jobs[:2], tmp_path, 8) == (pytest.approx(30), 0)  # no faster than its longest cell
    assert running.estimated([], tmp_path, 2) == (0, 0)


# -- the matrix


def made_board(accuracy: Mapping[str, Sequence[float]], *, failed: Sequence[Failure] = (), seeds: int = 1) -> results.Board:
    """Users with these accuracies for each method, unseen after all of their choices, the same under every seed."""
    usual = {"n_support": 5, "n_test": 50, "log_loss": 0.5, "n_parameters": 7, "fit_seconds": 1.5, "adapt_seconds": 0.002}
    usual |= {"auc": 0.5, "n_ties": 0, "data_set": "made", "shots": None, "cohort": "unseen"}
    rows = [
        {**usual, "method": method, "seed": seed, "user": f"u{u}", "accuracy": value}
        for seed in range(seeds)
        for method, values in accuracy.items()
        for u, value in enumerate(values)
    ]
    order = dict.fromkeys(results.COLUMNS)
    runs = tuple(Run("made", method, seed, "Kind", 0, 7, 1.5, {}) for seed in range(seeds) for method in accuracy)
    evaluation = replace(Evaluation.from_rows([{n: row[n] for n in order} for row in rows]), runs=runs, failures=tuple(failed))
    return results.Board("made", "clean", evaluation, (*accuracy, *(f.method for f in failed)), tuple(range(seeds)), 0)


BASE = np.linspace(0.6, 0.8, 25)


@pytest.mark.parametrize(
    ("others", "kept"),
    [
        ({"bt": -0.05, "mrm-faithful": -0.01, "lore": -0.02}, [True, True, True]),
        ({"bt": 0.05, "mrm-faithful": -0.01, "lore": -0.02}, [False, True, False]),  # everybody is below: no interval reaches 0
        ({"bt": -0.05, "mrm-faithful": 0.0005, "lore": -0.02}, [True, False, True]),
        ({"bt": -0.05, "mrm-faithful": -0.01, "lore": 0.0029}, [True, True, True]),
        ({"bt": -0.05, "mrm-faithful": -0.01, "lore": 0.0031}, [True, True, False]),
        ({"bt": -0.05, "mrm-faithful": -0.01, "pref-faithful": 0.002}, [True, False, True]),
        ({"mrm-faithful": -0.01, "lore": -0.02}, [None, True, True]),
        ({"bt": -0.05}, [True, None, True]),
    ],
)
def test_a_cell_is_red_where_the_promise_is_broken(others: dict[str, float], kept: list[bool | None]) -> None:
    found = board.verdict(made_board({"hierarchical": BASE, **{name: BASE + gap for name, gap in others.items()}}), "unseen")
    assert [check.kept for check in found.checks] == kept
    assert found.kept is (False if False in kept else None if None in kept else True)


def test_a_part_of_the_promise_says_of_how_many_methods_it_was_held() -> None:
    usual = [name for name in terminal.METHODS if name not in ("hierarchical", *bench_cli.NEED_MORE)]
    assert set(board.PRESETS) == {name for name in usual if name.endswith("-faithful")}
    assert set(board.OTHERS) == {name for name in usual if not name.endswith("-faithful")}
    lower = dict.fromkeys(("bt", "lore", "mine", "lore-faithful", "mrm-faithful"), BASE - 0.1)
    some = made_board({"hierarchical": BASE, **lower})
    found = board.verdict(some, "unseen")
    assert found.kept  # as far as it was measured, and it says how far that is
    assert [check.figures.partition("; ")[2] for check in found.checks] == ["", "2 of 6 presets", "2 of 11 others"]
    without = [Failure("made", name, 0, "fit", "no texts: this method reads prompts") for name in ("pal-b", "pal-b-faithful")]
    broke = [Failure("made", "vpl-faithful", 0, "fit", "it diverged")]
    known = made_board({"hierarchical": BASE, **lower}, failed=[*without, *broke])
    found = board.verdict(known, "unseen")  # what cannot run there is not missing; what failed is
    assert [check.figures.partition("; ")[2] for check in found.checks] == ["", "2 of 5 presets", "2 of 10 others"]
    text = pages.markdown(pages.page([known]))
    assert "; 2 of 5 presets)" in text
    assert "- PAL-B cannot be measured here: no texts: this method reads prompts\n" in text  # and has not failed
    assert "- VPL (as published) failed (fit, seeds 0): it diverged\n" in text
    every = made_board({"hierarchical": BASE} | dict.fromkeys(usual, BASE - 0.1))
    assert board.verdict(every, "unseen").checks[1].figures.endswith("; 6 of 6 presets")
    assert board.verdict(every, "unseen").checks[2].figures.endswith("; 11 of 11 others")


def test_below_bradley_terry_within_the_interval_is_not_red() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, 25)
    noise += -0.004 - noise.mean()
    check = board.verdict(made_board({"hierarchical": BASE + noise, "bt": BASE}), "unseen").checks[0]
    assert check.kept
    assert check.figures.startswith("-0.0040 [-0.0")
    assert "+0.0" in check.figures


def test_a_method_that_failed_somewhere_is_neither_ranked_nor_in_the_matrix() -> None:
    failure = Failure("made", "lore", 1, "fit", "it broke")
    made = made_board({"hierarchical": BASE, "bt": BASE - 0.1, "lore": BASE + 0.1}, failed=[failure], seeds=2)
    made = replace(made, methods=("hierarchical", "bt", "lore"))
    assert made.complete == ("hierarchical", "bt")
    assert board.verdict(made, "unseen").checks[2].figures.startswith("best bt, +0.1000")
    table = board.lines(made)
    assert [(line.method, line.rank) for line in table] == [("hierarchical", 1), ("bt", 2), ("lore", None)]
    broken = board.verdict(replace(made, methods=("lore",)), "unseen")
    assert (broken.kept, broken.checks[0].what) == (None, "Hierarchical")


def test_figures_of_a_line_are_those_of_the_rows() -> None:
    made = made_board({"hierarchical": BASE, "bt": BASE - 0.1, "lore": BASE}, seeds=3)
    first, second, third = board.lines(made)
    assert (first.rank, second.rank, third.rank) == (1, 1, 3)  # equal accuracies share a rank
    assert third.unseen == pytest.approx(BASE.mean() - 0.1)
    assert third.worst == pytest.approx(np.sort(BASE)[:3].mean() - 0.1)  # ceil(25 / 10) users
    assert third.against_crowd is None
    assert third.against_subject is not None
    assert third.against_subject.value == pytest.approx(-0.1)
    assert (third.parameters, third.fit_seconds, third.adapt_ms, third.n_seeds) == (7, 1.5, 2.0, 3)
    assert third.seen is None
    assert third.few == (None,) * 4
    assert board.mean_ranks([[first, second, third], [third]]) == [("hierarchical", 1, 1), ("lore", 1, 1), ("bt", 3, 2)]


def test_the_page_is_red_with_figures_and_safe() -> None:
    other = "<b>|mine|</b>-faithful"
    made = made_board({"hierarchical": BASE, "bt": BASE - 0.1, other: BASE + 0.02})
    shown = pages.page([made])
    assert shown.headline == "Hierarchical keeps its promise in 0 of 1 cells of the matrix, and breaks it in 1."
    text, html = pages.markdown(shown), pages._html(shown)
    row = next(line for line in text.splitlines() if line.startswith("| made, unseen"))
    assert "**BROKEN**" in row
    assert r"nearest &lt;b\>\|mine\|&lt;/b\>-faithful, -0.0200 \[-0.0200, -0.0200\]" in row
    assert "<br>under 1 of 1 seeds held-out users did not surely gain by personal weights" in row
    assert '<td class="broken">' in html
    assert "&lt;b&gt;|mine|" in html
    assert "<b>" not in html
    assert "http" not in html
    good = pages.page([made_board({"hierarchical": BASE, "bt": BASE - 0.1, "lore-faithful": BASE - 0.1})])
    assert (good.state, '<td class="broken">' in pages._html(good)) == ("kept", False)
    assert "surely gain" not in pages.markdown(good)
    told = made_board({"hierarchical": BASE, "bt": BASE - 0.1, "lore": BASE - 0.1, "told": BASE + 0.1})
    runs = tuple(run._replace(kind="AttributePrior") if run.method == "told" else run for run in told.evaluation.runs)
    found = board.verdict(replace(told, evaluation=replace(told.evaluation, runs=runs)), "unseen")
    assert found.checks[2].figures.startswith("best bt, +0.1000")  # who is told more is no part of the promise
    assert board.verdict(told, "unseen").kept is False


def test_folders_without_a_bench_and_damaged_cells_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no benchmark of this version"):
        pages.write_pages(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="holds no benchmark of this version"):
        pages.write_pages(tmp_path / "nowhere")
    started = running.start(tiny_plan(methods={"bt": palate.BradleyTerry()}, sources=[tiny("one")], seeds=[1]), tmp_path)
    here(started, tmp_path)
    path = cells.path_of(tmp_path, started.every[0].key)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelFileError, match=r"cannot be read .*; remove it, and the bench runs this cell again"):
        pages.write_pages(tmp_path)


# -- the command


@pytest.fixture
def command() -> Callable[..., Any]:
    """`palate bench` on its own, as `palate` has it."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(bench_cli.bench)

    def call(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call


@pytest.mark.slow
def test_the_command_runs_a_file_and_says_where_the_page_is(command: Callable[..., Any], tmp_path: Path) -> None:
    toml = tmp_path / "plan.toml"
    toml.write_text(
        'data = ["attributes"]\nmethods = ["bt", "lore"]\nseeds = 3\nfirst-seed = 100\nshots = "0,all"\njobs = 1\n'
        "[options.lore]\nn_bases = 2\nsteps = 5\n"
    )
    out = tmp_path / "out"
    done = command("--plan", toml, "--seeds", 1, "--out", out)
    assert (done.exit_code, done.stdout.strip()) == (0, str(out / "leaderboard.html")), done.output
    assert done.stderr.startswith("2 cells to run of 2, about 20 s with 1 worker, 2 of them guessed")
    assert len(done.stderr.splitlines()) == 1  # nobody's terminal: no bars
    assert [cell.method.options.get("steps") for cell in results.recorded(out)] == [None, 5]
    again = command("--plan", toml, "--seeds", 1, "--out", out)
    assert again.stderr.startswith("0 cells to run of 2, about 0 s")
    (out / "leaderboard.html").unlink()
    assert command("--report", out).exit_code == 0
    assert (out / "leaderboard.html").exists()


def test_methods_go_by_group_or_name() -> None:
    fixed, faithful, every = (list(bench_cli._methods(name, {})) for name in ("fixed", "faithful", "all"))
    assert {"bt", "hierarchical", "lore"} <= set(fixed)
    assert all(name.endswith("-faithful") for name in faithful)
    assert sorted(fixed + faithful) == sorted(every)
    assert not set(bench_cli.NEED_MORE) & set(every)
    assert list(bench_cli._methods("bt,reference", {})) == ["bt", "reference"]
    informed = bench_cli._methods("attribute-prior,bt", {"attribute-prior": {"effect": 0.3}})
    assert list(informed) == ["attribute-prior", "bt"]
    assert cells.Method.of(informed["attribute-prior"]).model().options() == palate.AttributePrior(effect=0.3).options()
    assert list(bench_cli._methods("attribute-prior", {})) == ["attribute-prior"]
    assert "attribute-prior" not in every  # it is told more than the others
    assert set(bench_cli._methods("faithful,bt", {})) == {"bt", *faithful}


def test_an_option_within_an_option_leaves_the_others() -> None:
    published = bench_cli._methods("vpl-faithful", {"vpl-faithful": {"published": {"latent": 64}}})["vpl-faithful"].options()
    assert published["published"] == palate.VPL.faithful(64).options()["published"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--out is missing"),
        (("--out", "x"), "expected at least one data set"),
        (("--out", "x", "--data", "imdb"), "--data is 'imdb'"),
        (("--out", "x", "--data", "attributes", "--methods", "btt"), "--methods is 'btt'"),
        (("--out", "x", "--data", "attributes", "--conditions", "flip"), "the condition is 'flip'"),
        (("--out", "x", "--data", "attributes", "--again", "lore", "--methods", "bt"), "again has lore"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    arguments: tuple[str, ...], said: str, command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command(*arguments)
    assert isinstance(done.exception, PalateError)
    assert said in str(done.exception)
    assert not list(tmp_path.glob("x/cells/*"))


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("data = [", "is not TOML"),
        ("dta = []", "has dta; expected data, methods"),
        ('seeds = "5"', "seeds is '5'; expected a whole number of at least 1"),
        ("methods = 3", "methods is 3; expected words"),
        ('methods = "lore"\n[options.lore]\nx = 1', r"options\.lore has x; expected n_bases"),
        ("[options.pal]\nx = 1", "options are given for 'pal'"),
        ("options = 3", "options is 3; expected a table for each method"),
        ('[options.lore]\nn_bases = "x"', r"options\.lore has {'n_bases': 'x'} .*; expected values such as"),
        ("methods = 'faithful'\n[options.vpl-faithful]\nlatent = 64", r"options\.vpl-faithful has latent, which changes nothing"),
        ("methods = 'faithful'\n[options.pal-a-faithful.faithful]\nsed = 3", "unexpected keyword argument 'sed'"),
    ],
)
def test_a_wrong_file_is_refused(toml: str, said: str, command: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(toml)
    done = command("--plan", tmp_path / "plan.toml", "--out", tmp_path / "x")
    with pytest.raises(DataError, match=said):
        raise done.exception
