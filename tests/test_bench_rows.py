"""The benchmark on choices in text: files of `palate data prepare`, splits that rows bring, and dialogues that stay whole."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import palate
from palate import bench_cli, split_cli
from palate.bench import pages, protocols, running, worker
from palate.bench.plan import Plan
from palate.bench.protocols import Draw, Texts
from palate.data.pairs import PairSet
from palate.data.splits import SIDES, given_split, split
from palate.errors import DataError, LeakError
from palate.evaluation.comparison import drawn

Row = dict[str, Any]
WORDS = [
    "tea",
    "rain",
    "chess",
    "owls",
    "bread",
    "river",
    "stone",
    "cloud",
    "piano",
    "garden",
    "engine",
    "violin",
    "wine",
    "snow",
]
USERS, TALKS, TURNS = 8, 6, 3


def jsonl(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def say(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, 9)) + "."


def conversations() -> list[Row]:
    """Lines of PRISM's conversations.jsonl: dialogues of three turns, each of which goes on from the answer that was chosen."""
    rng = np.random.default_rng(0)
    out = []
    for user in range(USERS):
        for talk in range(TALKS):
            said: list[Row] = []
            for turn in range(TURNS):
                said.append({"turn": turn, "role": "user", "content": "Tell me of " + say(rng)})
                said += [{"turn": turn, "role": "model", "content": say(rng), "if_chosen": chosen} for chosen in (True, False)]
            out.append({"user_id": f"user{user}", "conversation_id": f"c{user}-{talk}", "conversation_history": said})
    return out


def aligned() -> list[Row]:
    """Lines of Community Alignment: dialogues of two turns, four answers in each, of which one is marked."""
    rng = np.random.default_rng(1)
    out = []
    for user in range(USERS):
        for talk in range(4):
            row: Row = {"annotator_id": f"user{user}", "conversation_id": f"c{user}-{talk}", "assigned_lang": "en"}
            for i, turn in enumerate(("first", "second", "third", "fourth")):
                there = i < 2
                row[f"{turn}_turn_prompt"] = say(rng) if there else None
                row[f"{turn}_turn_preferred_response"] = f"response_{'abcd'[rng.integers(4)]}" if there else None
                row |= {f"{turn}_turn_response_{letter}": say(rng) if there else None for letter in "abcd"}
            out.append(row)
    return out


def exported() -> list[Row]:
    """Records of an Argilla export: everybody ranks two answers to each of ten questions."""
    rng = np.random.default_rng(2)
    users = [f"user{user}" for user in range(USERS)]
    return [
        {
            **{"instruction": say(rng), "response-1": say(rng), "response-2": say(rng)},
            "better.responses": [[f"response-{n}" for n in rng.permutation([1, 2]).tolist()] for _ in users],
            **{"better.responses.users": users, "better.responses.status": ["submitted"] * USERS},
        }
        for _ in range(10)
    ]


@pytest.fixture
def prepared(tmp_path: Path, palate_command: Callable[..., Any]) -> Callable[..., Path]:
    """What `palate data prepare RECIPE` writes of the records of a data set in its published form."""

    def prepare(recipe: str, records: list[Row], *options: str) -> Path:
        out = tmp_path / f"{recipe}.jsonl"
        export = jsonl(tmp_path / f"export of {recipe}.jsonl", records)
        assert palate_command("data", "prepare", recipe, export, *options, "--out", out)[0] == 0
        return out

    return prepare


@pytest.fixture
def argilla(prepared: Callable[..., Path]) -> Path:
    options = ("--question", "better", "--prompt", "instruction", "--answers", "response-1,response-2")
    return prepared("argilla-rankings", exported(), *options)


@pytest.fixture
def prism(prepared: Callable[..., Path]) -> Path:
    return prepared("prism-mrm", conversations())


def without(column: str, path: Path) -> Path:
    return jsonl(path.with_name(f"without {column}.jsonl"), [row | {column: None} for row in read(path)])


def texts(text: str) -> Texts:
    found = protocols.source(text, palate.load_encoder)
    assert isinstance(found, Texts)
    return found


def labels(draw: Draw) -> list[tuple[str, int, int, str]]:
    """(user, row of either text, side) of every choice of a draw."""
    side = np.empty(len(draw.data), dtype=object)
    for name in SIDES:
        side[getattr(draw.parts, name)] = name
    users = np.asarray(draw.data.user_ids)[draw.data.user_index]
    return list(zip(users, draw.data.chosen.tolist(), draw.data.rejected.tolist(), side, strict=True))


def crossing(data: Texts, seed: int) -> tuple[int, int]:
    """(dialogues of which choices are learned from and tested on, dialogues)."""
    draw, talk = data.draw(seed), {c: name for c, name in zip(data.pairs.chosen.tolist(), data.pairs.conversation, strict=True)}
    learned, tested = (
        {talk[chosen] for _, chosen, _, side in labels(draw) if side in sides}
        for sides in (("train", "support"), ("test_seen", "test_unseen"))
    )
    return len(learned & tested), len(learned | tested)


# -- dialogues


@pytest.mark.parametrize("name", ["prism", "rows"])
def test_no_dialogue_is_learned_from_and_tested_on(name: str, prism: Path) -> None:
    data = texts(f"{name}={without('split', prism)},encoder=style")
    assert data.by == "conversation"
    assert [crossing(data, seed) for seed in range(3)] == [(0, USERS * TALKS)] * 3
    first, second = (labels(data.draw(seed)) for seed in (0, 1))
    assert first != second
    assert len(np.unique(data.draw(0).data.unit)) == USERS * TALKS  # what fits hold out is a dialogue, too


@pytest.mark.parametrize("name", ["prism", "rows"])
def test_dialogues_that_a_split_cuts_are_a_leak(name: str, prism: Path) -> None:
    made = read(prism)
    # A dialogue of three turns for each user, of which the last is tested on: no prompt is on two sides.
    of_one = [row for row in made if row["conversation_id"].endswith("-0")]
    cut = [
        row | {"split": (("train", "test_seen") if row["user_id"] < "user4" else ("support", "test_unseen"))[i % 3 == 2]}
        for i, row in enumerate(of_one)
    ]
    # Some choices are of no dialogue: split by prompt, the other dialogues are cut.
    some = [row | {"split": None, "conversation_id": row["conversation_id"] if i else None} for i, row in enumerate(made)]
    for rows in (cut, some):
        path = jsonl(prism, rows)
        with pytest.raises(LeakError, match=r"a user's conversation is learnt from and tested on: rows \d+ and \d+"):
            texts(f"{name}={path},encoder=style").draw(0)
    told = texts(f"rows={prism},encoder=style,by=prompt")  # on purpose
    assert crossing(told, 0)[0] > 0


def test_prism_without_dialogues_is_drawn_and_filed_as_it_always_was(argilla: Path) -> None:
    data = texts(f"prism={argilla},encoder=style")
    expected = split(data.pairs, by="prompt", seed=5)
    found, table = data.draw(5), data.encoder.embed(data.pairs)
    for side in SIDES:
        kept, meant = (getattr(parts, side) for parts in (found.parts, expected))
        assert torch.equal(found.data.chosen[torch.from_numpy(kept)], table.chosen[torch.from_numpy(meant)])
    assert (found.parts.by, found.parts.seed) == ("prompt", 5)
    told = f"{data.pairs.fingerprint()} ('prompt', None, None) {data.encoder.fingerprint}"
    assert data.origin == hashlib.sha256(told.encode()).hexdigest()[:32]


# -- splits that rows bring


@pytest.mark.parametrize("name", ["prism", "rows"])
def test_a_split_column_is_used_as_it_is_under_every_seed(name: str, prism: Path) -> None:
    made = read(prism)
    jsonl(prism, [made[0] | {"split": None}, *made[1:]])
    data, given = texts(f"{name}={prism},encoder=style"), given_split(palate.load_pairs(prism))
    for seed in (0, 7):
        draw = data.draw(seed)
        assert len(draw.data) == len(made) - 1  # one row has no split
        for side in SIDES:
            rows = torch.from_numpy(getattr(given, side))
            assert torch.equal(
                draw.data.chosen[torch.from_numpy(getattr(draw.parts, side))], torch.from_numpy(data.pairs.chosen)[rows]
            )
    assert crossing(data, 0)[0] == 0


def test_another_split_of_the_same_choices_is_other_data(prism: Path) -> None:
    path = prism
    before = texts(f"rows={path},encoder=style").origin
    other = {"train": "test_seen", "test_seen": "train"}
    jsonl(path, [row | {"split": other.get(row["split"], row["split"])} for row in read(path)])
    after = texts(f"rows={path},encoder=style").origin
    assert before != after
    assert before != texts(f"rows={without('split', path)},name=prism-mrm.jsonl,encoder=style").origin


def test_users_may_have_one_side_only(prism: Path, tmp_path: Path) -> None:
    path, rows = prism, read(prism)
    seen, unseen = (sorted({row["user_id"] for row in rows if row["split"] == side}) for side in ("train", "support"))
    gone = {(seen[0], "train"), (seen[1], "test_seen"), (unseen[0], "support"), (unseen[1], "test_unseen")}
    jsonl(path, [row for row in rows if (row["user_id"], row["split"]) not in gone])
    plan = Plan([texts(f"rows={path},encoder=style")], {"bt": palate.BradleyTerry()}, [0], shots=(0, None))
    ran = run_here(plan, tmp_path / "out")
    tested = {cohort: {row["user"] for row in ran if row["cohort"] == cohort} for cohort in ("seen", "unseen")}
    assert tested == {"seen": {seen[0], *seen[2:]}, "unseen": {unseen[0], *unseen[2:]}}
    jsonl(path, [row for row in rows if row["split"] in ("support", "test_unseen")])
    with pytest.raises(
        DataError, match=r"the split column has train 0, test_seen 0, support \d+, test_unseen \d+; expected train"
    ):
        texts(f"rows={path},encoder=style")
    jsonl(path, [row | {"split": "valid"} for row in rows])
    with pytest.raises(DataError, match=r"have split 'valid'; expected one of train, test_seen"):
        texts(f"rows={path},encoder=style")


def run_here(plan: Plan, out: Path) -> list[Row]:
    """The rows of a bench whose cells run in this process."""
    asked = "".join(json.dumps(cell.as_json()) + "\n" for cell in running.start(plan, out).pending)
    worker.run(out, io.StringIO(asked), io.StringIO())
    pages.write_pages(out)
    return read(out / "results.jsonl")


# -- any rows


def test_rows_are_drawn_as_compare_draws_them(argilla: Path, prepared: Callable[..., Path], tmp_path: Path) -> None:
    votes = [
        {"user_id": f"user{user}", "prompt": "Which?", "chosen": WORDS[i], "rejected": WORDS[j]}
        for user in range(USERS)
        for i in range(7)
        for j in range(7, 14)
    ]
    talks = without("split", prepared("community-alignment", aligned()))
    for path, by, most in (
        (argilla, "prompt", None),
        (talks, "conversation", None),
        (jsonl(tmp_path / "v.jsonl", votes), "item", 40),
    ):
        data = texts(f"rows={path},encoder=style")
        sides = split_cli.sides(data.pairs, None, None, None, None)
        assert (data.by, data.recipe.max_support, data.recipe.max_test) == (by, most, most)
        expected = drawn(data.pairs, seed=3, **sides._asdict())
        assert labels(data.draw(3)) == labels(protocols.only(data.encoder.embed(data.pairs), expected))
    pairwise = texts(f"rows={tmp_path / 'v.jsonl'},encoder=style,by=pair")
    assert (pairwise.by, pairwise.draw(0).parts.by) == ("pair", "pair")


def test_rows_go_by_their_labels(argilla: Path) -> None:
    assert texts(f"rows={argilla},encoder=style").label == "argilla-rankings.jsonl, style"
    assert texts(f"rows={argilla},name=mine,encoder=style").label == "mine, style"
    assert protocols.source(f"rows={argilla}", lambda spec: palate.load_encoder("style" if spec == "minilm+style" else "")).label

    for wrong in ("rows=", "rows=x,name=", "prism=x,by=prompt", "polis=x,name=mine", "rows=x,by=pair,by=item"):
        with pytest.raises(
            DataError, match=r"--data is .*; expected one of .*rows=PATH.*,by=UNIT, ,name=LABEL and .* behind that of rows"
        ):
            protocols.source(wrong, palate.load_encoder)
    with pytest.raises(DataError, match=r"with by 'user'; expected one of conversation, prompt, item, pair"):
        protocols.source(f"rows={argilla},by=user", palate.load_encoder)
    with pytest.raises(DataError, match=r"by is 'conversation', but rows .* have no conversation_id"):
        texts(f"rows={argilla},encoder=style,by=conversation").draw(0)


@pytest.fixture
def command() -> Callable[..., Any]:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(bench_cli.bench)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_prepared_sets_stand_side_by_side(
    argilla: Path, prism: Path, prepared: Callable[..., Path], command: Callable[..., Any], tmp_path: Path
) -> None:
    talks = prepared("community-alignment", aligned())
    named = [f"rows={argilla},encoder=style", f"rows={talks},name=aligned,encoder=style", f"rows={prism},encoder=style"]
    asked = [word for text in named for word in ("--data", text)]
    out = tmp_path / "out"
    done = command(*asked, "--methods", "bt", "--seeds", 2, "--shots", "0,all", "--jobs", 1, "--out", out, "--no-cache")
    assert done.exit_code == 0, done.output
    rows = read(out / "results.jsonl")
    sets = ["argilla-rankings.jsonl, style", "aligned, style", "prism-mrm.jsonl, style"]
    assert list(dict.fromkeys(row["data_set"] for row in rows)) == sets
    found = {(row["data_set"], row["seed"], row["cohort"]) for row in rows}
    assert found == {(label, seed, cohort) for label in sets for seed in (0, 1) for cohort in ("seen", "unseen")}
    same = [
        {row["user"] for row in rows if (row["data_set"], row["seed"], row["cohort"]) == (sets[2], seed, "seen")}
        for seed in (0, 1)
    ]
    assert same[0] == same[1]


def test_a_taste_for_a_format_is_no_leak_where_it_is_said(tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(0), []
    for user in range(12):
        for number in range(20):
            sides = [f"- {say(rng)}\n- {say(rng)}", say(rng)]  # a list, and a sentence
            chosen, rejected = sides if rng.random() < 0.85 else sides[::-1]
            rows.append({"user_id": f"u{user}", "prompt": f"Q {user} {number}?", "chosen": chosen, "rejected": rejected})
    told = f"rows={jsonl(tmp_path / 'lists.jsonl', rows)},encoder=style"
    with pytest.raises(LeakError, match=r"or ,believe-format=yes behind rows=FILE of palate bench"):
        protocols.source(told, palate.load_encoder).draw(0)
    assert len(protocols.source(f"{told},believe-format=yes", palate.load_encoder).draw(0).data) > 100
    with pytest.raises(DataError, match=r"and ,believe-format=yes behind that of rows"):
        protocols.source(f"{told},believe-format=maybe", palate.load_encoder)


def test_two_of_one_label_are_refused(argilla: Path, command: Callable[..., Any], tmp_path: Path) -> None:
    data = f"rows={argilla},name=mine,encoder=style"
    done = command("--data", data, "--data", data, "--methods", "bt", "--out", tmp_path / "out")
    with pytest.raises(
        DataError, match=r"the data sets are \['mine, style', 'mine, style'\].*each once; ,name=LABEL behind rows"
    ):
        raise done.exception


# -- one user


def test_one_user_is_refused(argilla: Path, command: Callable[..., Any], tmp_path: Path) -> None:
    rows = read(argilla)
    alone = [row for row in rows if row["user_id"] == "user3"]
    with_split = [row | {"split": ("train", "test_seen")[i % 2]} for i, row in enumerate(alone)]
    busy = [row for row in rows if row["user_id"] == "user3"] + [row for row in rows if row["user_id"] == "user5"][:2]
    for name, made in (("rows", alone), ("prism", alone), ("rows", with_split), ("prism", with_split), ("rows", busy)):
        path = jsonl(tmp_path / "some.jsonl", made)
        done = command("--data", f"{name}={path},encoder=style", "--methods", "bt", "--out", tmp_path / "out")
        with pytest.raises(DataError, match=r"^(some\.jsonl|prism): 1 user.*; at least 2 are needed so that one is unseen$"):
            raise done.exception
    assert isinstance(palate.load_pairs(path), PairSet)
    assert not (tmp_path / "out" / "cells").exists()


def test_bad_rows_are_left_out_with_a_word(argilla: Path, tmp_path: Path) -> None:
    rows = read(argilla)
    path = jsonl(tmp_path / "some.jsonl", [*rows, {"user_id": "user3"}, rows[0] | {"chosen": ""}])
    told: list[str] = []
    found = protocols.source(f"rows={path},encoder=style", palate.load_encoder, told.append)
    assert isinstance(found, Texts)
    assert len(found.pairs) == len(rows)
    assert len(told) == 1
    assert f"{len(rows)} of {len(rows) + 2} rows are good, 2 are bad" in told[0]
    protocols.source(f"rows={argilla},encoder=style", palate.load_encoder, told.append)
    assert len(told) == 1
