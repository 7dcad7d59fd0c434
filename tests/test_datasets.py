"""Published data sets: files in their own shapes, written here, and every step of each recipe counted by hand."""

import csv
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import palate
from palate.data import arena, community, prism, recipes
from palate.data.argilla import argilla_labels, argilla_rankings, argilla_ratings
from palate.data.attribute_texts import attribute_texts
from palate.data.attributes import TRAITS, wishes
from palate.data.leaks import check_leaks
from palate.data.pairs import PairSet
from palate.data.personalllm import MEAN_SD, N_ANSWERS, SCORERS, ScoredAnswers, best_and_worst, load_personalllm, two_at_random
from palate.data.personas import load_personas
from palate.data.prism import LORE_CORRECTED, LORE_PAPER, MRM, load_prism, prism_split
from palate.data.splits import given_split
from palate.data.tldr import load_tldr, load_tldr_lore, load_tldr_paper
from palate.encoders import Items
from palate.errors import DataError

Row = dict[str, Any]


def jsonl(path: Path, rows: list[Row] | list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def framed(value: Any) -> Any:
    """The value as pandas gives it back from Parquet: every list is an array of objects, also inside another."""
    if isinstance(value, dict):
        return {name: framed(one) for name, one in value.items()}
    if not isinstance(value, list):
        return value
    out = np.empty(len(value), dtype=object)
    out[:] = [framed(one) for one in value]
    return out


def sides(pairs: PairSet) -> list[tuple[str, str, str]]:
    """(user, chosen, rejected) of every choice, in order."""
    rows = zip(pairs.users, pairs.chosen, pairs.rejected, strict=True)
    return [(user, pairs.texts[c].response, pairs.texts[r].response) for user, c, r in rows]


# -- PRISM


def said(turn: int, role: str, content: str, chosen: bool | None = None) -> Row:
    return {"turn": turn, "role": role, "content": content, "if_chosen": chosen, "score": None}


def turn(number: int, asked: str, chosen: str, *others: str) -> list[Row]:
    answers = [said(number, "model", chosen, True), *(said(number, "model", other, False) for other in others)]
    return [said(number, "user", asked), *answers]


def talk(user: str, number: int, *turns: list[Row]) -> Row:
    return {
        "user_id": user,
        "conversation_id": f"{user}-{number}",
        "conversation_history": [one for turn in turns for one in turn],
    }


def plain(user: str, number: int) -> Row:
    """One turn, three answers, two pairs."""
    return talk(user, number, turn(0, f"Q{number}", f"good {number}", f"bad {number}", f"worse {number}"))


def test_prism_keeps_users_of_six_conversations_that_count(tmp_path: Path) -> None:
    unanswered = [said(0, "user", "Hello?")]
    no_choice = [said(0, "user", "Hi?"), said(0, "model", "a", False), said(0, "model", "b", False)]
    rows = [plain("six", i) for i in range(6)]
    rows += [plain("five", i) for i in range(5)]
    rows += [talk("five", 5, unanswered), talk("five", 6, no_choice)]  # they do not count: no turn is complete
    rows += [plain("mixed", i) for i in range(5)] + [talk("mixed", 5, no_choice, turn(1, "And?", "so", "not so"))]
    for recipe in (MRM, LORE_PAPER, LORE_CORRECTED):
        pairs, report = load_prism(jsonl(tmp_path / "conversations.jsonl", rows), recipe=recipe)
        assert Counter(pairs.users) == {"six": 12, "mixed": 11}  # 6 x 2, and 5 x 2 + 1
        assert report.ok
        assert ("six", "good 3", "bad 3") in sides(pairs)
        assert ("six", "good 3", "worse 3") in sides(pairs)  # each rejected answer by itself, as plain text


def test_prism_leaves_out_users_who_completed_nothing(tmp_path: Path) -> None:
    conversations = jsonl(tmp_path / "conversations.jsonl", [plain(user, i) for user in ("ada", "bo") for i in range(6)])
    survey = jsonl(
        tmp_path / "survey.jsonl",
        [{"user_id": "ada", "num_completed_conversations": 0}, {"user_id": "bo", "num_completed_conversations": 6}],
    )
    assert load_prism(conversations)[0].user_ids == ("ada", "bo")
    assert load_prism(conversations, survey=survey)[0].user_ids == ("bo",)
    with pytest.raises(DataError, match=r"line 1: KeyError\('num_completed_conversations'\); .* expected PRISM's survey\.jsonl"):
        load_prism(conversations, survey=jsonl(tmp_path / "survey.jsonl", [{"user_id": "ada"}]))


def test_prism_of_the_lore_paper_counts_characters(tmp_path: Path) -> None:
    """A conversation goes only if every turn is long; a long turn of a kept one stays, unless a side of a pair is too long."""
    exactly, beyond = "x" * (2300 - 2), "x" * (2301 - 2)  # with the two characters of the question: 2300 and 2301
    long_and_short = talk("ada", 1, turn(0, "Q1", beyond, "no"), turn(1, "Q2", "yes", "no"))
    rows = [
        talk("ada", 0, turn(0, "Q1", exactly, "no")),
        long_and_short,
        talk("ada", 2, turn(0, "Q1", beyond, "no"), turn(1, "Q2", "yes", beyond)),  # every turn is too long
        talk("ada", 3, turn(0, "Q1", "yes", "y" * 2397)),  # 2399 characters with the question, but the only turn is too long
    ]
    path = jsonl(tmp_path / "conversations.jsonl", rows)
    with pytest.raises(DataError, match=r"none of 1 users has 3 conversations with a choice \(at most 2\)"):
        load_prism(path, min_conversations=3, recipe=LORE_PAPER)
    found, _ = load_prism(path, min_conversations=2, recipe=LORE_PAPER)
    # The first turn of the second conversation is kept (2301 < 2400), and the second one, because a history is not counted.
    assert Counter(found.conversation) == {"ada-0": 1, "ada-1": 2}
    told = f"user: Q1\nassistant: {beyond}\nuser: Q2"
    assert found.texts[found.chosen[2]].prompt == told[-1500:]  # one text, not turns
    assert found.texts[found.chosen[0]].prompt == "Q1"
    everything, _ = load_prism(path, min_conversations=4)
    assert len(everything) == 6
    assert [message.role for message in everything.texts[everything.chosen[2]].prompt] == ["user", "assistant", "user"]  # type: ignore[union-attr]
    assert everything.texts[everything.chosen[2]].prompt_text == told

    sizes = {"rejected": [("a", "b" * 2398), ("a", "b" * 2399)], "chosen": [("a" * 2397, "b"), ("a" * 2398, "b")]}
    for side, (stays, goes) in sizes.items():  # with "Q2": 2400 and 2401 characters rejected, 2399 and 2400 chosen
        rows = [talk(side, i, turn(0, "Q1", "yes", "no"), turn(1, "Q2", *one)) for i, one in enumerate((stays, goes))]
        found, _ = load_prism(jsonl(tmp_path / "conversations.jsonl", rows), min_conversations=2, recipe=LORE_PAPER)
        assert Counter(found.conversation) == {f"{side}-0": 2, f"{side}-1": 1}, side


def test_prism_words_that_are_none_are_no_text(tmp_path: Path) -> None:
    broken = talk("ada", 1, turn(0, "Q1", None, "no"), turn(1, "Q2", "yes", "no"))  # type: ignore[arg-type]
    path = jsonl(tmp_path / "conversations.jsonl", [plain("ada", 0), broken])
    for recipe in (MRM, LORE_PAPER):
        pairs, report = load_prism(path, min_conversations=2, recipe=recipe)
        assert (len(pairs), dict(report.reasons)) == (2, {"wrong_type": 2})
        assert not any("None" in text.prompt_text for text in pairs.texts)
    with pytest.raises(DataError, match=r"line 1: TypeError\(\"user_id is \['ada'\]"):
        load_prism(jsonl(path, [plain("ada", 0) | {"user_id": ["ada"]}]))


def test_prism_history_has_the_chosen_answers_only(tmp_path: Path) -> None:
    turns = [
        turn(0, "One?", "first", "never 1", "never 2"),
        turn(1, "Two?", "second", "never 3"),
        turn(2, "Three?", "third", "n"),
    ]
    pairs, _ = load_prism(jsonl(tmp_path / "conversations.jsonl", [talk("ada", 0, *turns)]), min_conversations=1)
    assert len(pairs) == 4
    last = pairs.texts[pairs.chosen[3]].prompt
    assert last == (("user", "One?"), ("assistant", "first"), ("user", "Two?"), ("assistant", "second"), ("user", "Three?"))
    assert not any("never" in text.prompt_text for text in pairs.texts)


@pytest.mark.parametrize("recipe", [prism.MRM, prism.LORE_PAPER], ids=["mrm", "lore-paper"])
def test_prism_history_has_turns_with_one_answer_too(tmp_path: Path, recipe: prism.Recipe) -> None:
    """They are no choice and do not make a conversation count, but the later ones were made after them."""
    turns = (turn(0, "Q0", "A0", "B0"), turn(1, "I am Bob", "Hello Bob"), turn(2, "Who am I?", "Bob", "Eve"))
    alone = [talk("solo", i, turn(0, "Q0", "A0"), turn(1, "Q1", "A1")) for i in range(2)]
    path = jsonl(tmp_path / "conversations.jsonl", [talk("ada", i, *turns) for i in range(2)] + alone)
    pairs, report = load_prism(path, min_conversations=2, recipe=recipe)
    assert (pairs.user_ids, len(pairs), report.n_bad) == (("ada",), 4, 0)
    told = ("user: Q0", "assistant: A0", "user: I am Bob", "assistant: Hello Bob", "user: Who am I?")
    assert pairs.texts[pairs.chosen[1]].prompt_text == "\n".join(told)


@pytest.mark.parametrize(("recipe", "n_unseen"), [(MRM, 10), (LORE_PAPER, 10), (LORE_CORRECTED, 4)])
def test_prism_splits_users_and_whole_conversations(tmp_path: Path, recipe: prism.Recipe, n_unseen: int) -> None:
    rows = [plain(f"user {u:02d}", i) for u in range(20) for i in range(6 + u % 2)]
    pairs = prism_split(load_prism(jsonl(tmp_path / "conversations.jsonl", rows), recipe=recipe)[0], recipe)
    split = given_split(pairs)
    assert len(set(pairs.users[split.support])) == n_unseen
    assert set(pairs.users[split.support]) == set(pairs.users[split.test_unseen])
    assert set(pairs.users[split.train]) == set(pairs.users[split.test_seen])
    assert not set(pairs.users[split.train]) & set(pairs.users[split.support])
    for learned, tested in ((split.train, split.test_seen), (split.support, split.test_unseen)):
        assert not set(pairs.conversation[learned]) & set(pairs.conversation[tested])
    assert set(Counter(pairs.users[split.train]).values()) == {6}  # three conversations of six or seven, two pairs each
    assert sum(len(getattr(split, side)) for side in ("train", "test_seen", "support", "test_unseen")) == len(pairs)
    assert prism_split(pairs, recipe).split.tolist() == pairs.split.tolist()
    assert prism_split(pairs, recipe, seed=7).split.tolist() != pairs.split.tolist()
    with pytest.raises(DataError, match="seed is -1"):
        prism_split(pairs, recipe, seed=-1)


def test_prism_split_of_mrm_is_the_published_one(tmp_path: Path) -> None:
    """Python's own generator, one user at a time, as the scripts do it."""
    rows = [plain(f"user {u}", i) for u in range(9) for i in range(6 + u)]
    pairs = prism_split(load_prism(jsonl(tmp_path / "conversations.jsonl", rows))[0], MRM, seed=43)
    users = sorted(pairs.user_ids)
    random.Random(43).shuffle(users)
    for place, user in enumerate(users):
        talks = [f"{user}-{i}" for i in range(6 + int(user[-1]))]
        random.Random(43 + int(hashlib.md5(user.encode()).hexdigest(), 16) % 2**32).shuffle(talks)
        names = ("train", "test_seen") if place < 4 else ("support", "test_unseen")
        for conversation, label in zip(pairs.conversation[pairs.users == user], pairs.split[pairs.users == user], strict=True):
            assert label == names[int(conversation in talks[len(talks) // 2 :])]


def test_prism_draws_before_bad_rows_are_left_out(tmp_path: Path) -> None:
    """Conversations and users of whom no row is good are drawn with the others, as in the scripts; a broken line is not there."""
    rows = [plain(f"user {u}", i) for u in range(7) for i in range(6 + u)]
    clean = prism_split(load_prism(jsonl(tmp_path / "conversations.jsonl", rows))[0])
    bad = {("user 6", 2), ("user 6", 3), *(("user 3", i) for i in range(9))}
    same = [
        talk(user, i, turn(0, "Q", "Hello!", "Hello!")) if (user, i) in bad else plain(user, i)
        for user, i in ((row["user_id"], int(row["conversation_id"].rpartition("-")[2])) for row in rows)
    ]
    path = jsonl(tmp_path / "conversations.jsonl", same)
    path.write_text("not json\n\n" + path.read_text() + json.dumps(plain("user 0", 6) | {"conversation_history": None}) + "\n")
    pairs, report = load_prism(path)
    assert dict(report.reasons) == {"broken_json": 1, "wrong_type": 1, "identical_sides": len(bad)}
    assert [row.line for row in report.bad_rows[:3]] == [1, 3 + len(rows), 3 + 6 + 7 + 8]  # of the file; lines are told first
    assert "conversations.jsonl: TypeError(" in str(report.bad_rows[1])
    assert "expected user_id, conversation_id, conversation_history, as PRISM has them" in str(report.bad_rows[1])
    split = prism_split(pairs)
    expected = {name: label for name, label in zip(clean.conversation, clean.split, strict=True)}
    assert pairs.user_ids == tuple(f"user {u}" for u in (0, 1, 2, 4, 5, 6))
    assert split.split.tolist() == [expected[name] for name in split.conversation]
    assert prism_split(pairs[np.arange(len(pairs))]).split.tolist() != split.split.tolist()  # of these alone that is not known


def test_prism_users_with_one_side_left_have_no_split(tmp_path: Path) -> None:
    rows = [plain(user, i) for user in ("ada", "bo") for i in range(6)]
    clean = prism_split(load_prism(jsonl(tmp_path / "conversations.jsonl", rows))[0])
    learned = set(clean.conversation[(clean.users == "ada") & np.isin(clean.split, ("train", "support"))])
    rows = [talk("ada", i, turn(0, "Q", "x", "x")) if f"ada-{i}" in learned else plain("ada", i) for i in range(6)] + rows[6:]
    split = prism_split(load_prism(jsonl(tmp_path / "conversations.jsonl", rows))[0])
    assert set(split.split[split.users == "ada"]) == {None}
    assert split.split[split.users == "bo"].tolist() == clean.split[clean.users == "bo"].tolist()


def test_prism_survey_lines_that_say_nothing_leave_nobody_out(tmp_path: Path) -> None:
    conversations = jsonl(tmp_path / "conversations.jsonl", [plain(user, i) for user in ("ada", "bo") for i in range(6)])
    survey = jsonl(tmp_path / "survey.jsonl", [{"user_id": "ada"}, {"user_id": "bo", "num_completed_conversations": 0}])
    pairs, report = load_prism(conversations, survey=survey)
    assert (pairs.user_ids, report.n_bad) == (("ada",), 1)
    assert "line 1: survey.jsonl: KeyError('num_completed_conversations')" in str(report.bad_rows[0])
    conversations.write_text("")
    with pytest.raises(DataError, match="is empty; expected rows with user_id, conversation_id, conversation_history"):
        load_prism(conversations)


# -- TL;DR


def compared(worker: str, number: int, choice: int = 0) -> Row:
    summaries = [{"text": f"{worker} short {number}"}, {"text": f"{worker} long {number}"}]
    return {"info": {"post": f"post {number}", "title": "T"}, "summaries": summaries, "choice": choice, "worker": worker}


def test_tldr_of_the_paper_pools_and_halves(tmp_path: Path) -> None:
    sizes = {"w1": 49, "w2": 50, "w3": 61, "w4": 80, "w5": 90}
    rows = [compared(worker, i, i % 2) for worker, size in sizes.items() for i in range(size)]
    parts = jsonl(tmp_path / "a.jsonl", rows[:100]), rows[100:]  # a file and rows in memory
    pairs, report = load_tldr_paper(*parts, seen_limit=30, unseen_limit=10)
    assert report.ok
    split = given_split(pairs)
    assert pairs.user_ids == ("w2", "w3", "w4", "w5")  # 49 annotations are too few
    seen, unseen = set(pairs.users[split.train]), set(pairs.users[split.support])
    assert (len(seen), len(unseen), seen & unseen) == (2, 2, set())
    for rows_of, tested, limit in ((split.train, split.test_seen, 30), (split.support, split.test_unseen, 10)):
        for user in set(pairs.users[rows_of]):
            assert (pairs.users[rows_of] == user).sum() == min(limit, sizes[user] // 2)
            assert (pairs.users[tested] == user).sum() == sizes[user] - sizes[user] // 2  # the other half, in full
    assert not set(pairs.chosen[split.train]) & set(pairs.chosen[split.test_seen])
    assert {text.prompt_text[:5] for text in pairs.texts} == {"post "}
    odd = next(row for row in sides(pairs) if row[1].endswith("long 1"))
    assert odd[2].endswith("short 1")
    with pytest.raises(DataError, match=r"none of 5 workers has 91 comparisons \(at most 90\)"):
        load_tldr_paper(*parts, min_annotations=91)
    with pytest.raises(DataError, match="min_annotations is 0"):
        load_tldr_paper(*parts, min_annotations=0)


def test_tldr_limits_are_those_published() -> None:
    rows = [compared(worker, i) for worker in ("a", "b") for i in range(400)]
    pairs, _ = load_tldr_paper(rows)
    assert Counter(pairs.split) == {"train": 150, "test_seen": 200, "support": 50, "test_unseen": 200}
    hundred, _ = load_tldr_paper(rows, seen_limit=100)
    assert Counter(hundred.split)["train"] == 100
    assert len(set(sides(hundred))) == len(hundred)  # no comparison twice


def test_tldr_of_lores_code_drops_the_two_smallest_workers() -> None:
    sizes = {"a": 9, "b": 3, "c": 5, "d": 5, "e": 8, "only-train": 1}
    train = [compared(worker, i) for worker, size in sizes.items() for i in range(size)]
    validation = [compared(worker, 100 + i) for worker in ("a", "b", "c", "d", "e") for i in range(2)]
    pairs, _ = load_tldr_lore(train, validation, seen_limit=6, unseen_limit=4)
    assert pairs.user_ids == ("a", "c", "e")  # b has 3; of c and d, with 5, the later id goes
    split = given_split(pairs)
    assert len(set(pairs.users[split.train])) == 1  # half of three, rounded down
    assert Counter(pairs.users[np.concatenate([split.test_seen, split.test_unseen])]) == {"a": 2, "c": 2, "e": 2}
    assert set(Counter(pairs.users[split.support]).values()) == {4}
    assert load_tldr(train, validation)[0].user_ids == ("a", "b", "c", "d", "e")
    with pytest.raises(DataError, match="3 workers are in both parts; expected at least 4"):
        load_tldr_lore([row for row in train if row["worker"] in "abc"], validation)


def test_tldr_comparisons_of_articles_have_no_post() -> None:
    rows, others = ([compared(worker, first + i) for worker in "ab" for i in range(4)] for first in (0, 10))
    news = compared("a", 9) | {"info": {"post": None, "title": None, "article": "News."}}
    pairs, report = load_tldr(rows, [*others, news])
    assert (len(pairs), report.n_bad, dict(report.reasons)) == (16, 1, {"empty_text": 1})
    assert "info.post of validation 8 is None; expected a post" in str(report.bad_rows[0])
    assert all(text.prompt_text for text in pairs.texts)
    for worker in (3, None, ["a"]):
        with pytest.raises(DataError, match=r"train row 0: TypeError.*expected .* worker \(a text\)"):
            load_tldr([compared("a", 1) | {"worker": worker}], rows)


def test_tldr_comparisons_made_twice_are_learned_from_or_tested_but_not_both() -> None:
    """A worker who is asked again and chooses otherwise contradicts the first choice, which stays."""
    train = [compared(worker, i) for worker in "ab" for i in range(4)]
    again = [compared(worker, i, choice) for worker in "ab" for i, choice in ((0, 0), (1, 1))]
    validation = [compared(worker, 10 + i) for worker in "ab" for i in range(3)] + again
    pairs, report = load_tldr(train, [*validation, validation[0]])
    assert dict(report.reasons) == {"duplicate": 3, "contradiction": 2}
    assert Counter(pairs.split) == {"train": 4, "test_seen": 3, "support": 4, "test_unseen": 3}
    check_leaks(pairs, given_split(pairs), by="pair")


def test_tldr_rows_that_are_no_comparison_are_not_there(tmp_path: Path) -> None:
    rows, others = ([compared(worker, first + i, i % 2) for i in range(30) for worker in "abcd"] for first in (0, 30))
    odd = [rows[0] | change for change in ({"choice": 1.0}, {"info": None}, {"summaries": [{"text": "one"}]}, {"worker": 3})]
    parts = [jsonl(tmp_path / f"{name}.jsonl", [*part, *odd]) for name, part in (("train", rows), ("validation", others))]
    parts[0].write_text(parts[0].read_text() + "not json\n")
    for load in (load_tldr, load_tldr_lore, load_tldr_paper):
        limits = {"seen_limit": 9, "unseen_limit": 4}
        clean, found = load(rows, others, **limits)[0], load(*parts, **limits)
        assert sides(found[0]) == sides(clean)
        assert found[0].split.tolist() == clean.split.tolist()  # the draws are those without such rows
        report = found[1]
        assert (report.n_good, report.n_bad, report.reasons["broken_json"]) == (len(clean), 2 * 4 + 1, 1)
        part = "part 1" if load is load_tldr_paper else "train"
        assert f"line 121: {part}: TypeError('2 summaries and choice 1.0'); expected info.post" in str(report.bad_rows[0])


def test_tldr_reads_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [compared(worker, i) for worker in "ab" for i in range(4)]
    for name, part in (("train", rows), ("validation", rows[::-1])):
        parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"{name}.parquet")
    found, report = load_tldr(tmp_path / "train.parquet", [tmp_path / "validation.parquet"])
    assert (found.user_ids, report.rows) == (("a", "b"), 16)
    (tmp_path / "x.jsonl").write_text("<html>\n")
    with pytest.raises(DataError, match="train row 0: not JSON"):
        load_tldr(tmp_path / "x.jsonl", rows)


# -- PersonalLLM


def scored(prompt: str, scores: Any, *, columns: str = "response_{answer}_{scorer}") -> Row:
    row: Row = {"prompt": prompt}
    for i in range(N_ANSWERS):
        row[f"response_{i + 1}"] = f"{prompt}: answer {i + 1}"
        row[f"response_{i + 1}_model"] = f"model {i % 3}"
        for k, scorer in enumerate(SCORERS):
            row[columns.format(answer=i + 1, scorer=scorer)] = float(scores[i][k])
    return row


def prompts(n: int, seed: int = 0, name: str = "p") -> list[Row]:
    table = np.random.default_rng(seed).normal(size=(n, N_ANSWERS, len(SCORERS))) * 2 + 3
    return [scored(f"{name}{i}", table[i]) for i in range(n)]


def test_personalllm_constants_are_the_published_ones() -> None:
    assert len(SCORERS) == 10
    assert MEAN_SD["llama3_sfairx"] == (1.0638, 2.9530)
    assert MEAN_SD["beaver_7b"] == (6.2335, 3.0126)
    assert MEAN_SD["oasst_pythia_7b"] == (4.7064, 1.3659)
    assert sum(mean for mean, _ in MEAN_SD.values()) == pytest.approx(43.5456)
    assert sum(sd for _, sd in MEAN_SD.values()) == pytest.approx(23.3441)


@pytest.mark.parametrize("kind", ["csv", "parquet", "rows"])
def test_personalllm_files(tmp_path: Path, kind: str) -> None:
    rows: Any = prompts(3, seed=4)
    expected = np.asarray([[[row[f"response_{i}_{k}"] for k in SCORERS] for i in range(1, 9)] for row in rows])
    source: Any = rows
    if kind == "csv":
        source = tmp_path / "train.csv"
        with source.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        source = tmp_path / "train.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    raw, report = load_personalllm(source, model_column="response_{answer}_model")
    assert (report.n_good, report.ok, len(raw)) == (3, True, 3)
    assert raw.scores.shape == (3, 8, 10)
    assert np.array_equal(raw.scores, expected)
    assert raw.answers[1][7] == "p1: answer 8"
    assert raw.answered_by[2] == ("model 0", "model 1", "model 2") * 2 + ("model 0", "model 1")
    assert repr(raw) == "ScoredAnswers(3 prompts x 8 answers x 10 raw scores)"
    standard, _ = load_personalllm(source, standardised=True)
    assert standard.scores[2, 5, 3] == (expected[2, 5, 3] - 1.0638) / 2.9530
    assert (standard.standardised, standard.answered_by) == (True, ())


def test_personalllm_rows_that_cannot_be(tmp_path: Path) -> None:
    good, *bad = prompts(6)
    bad[0]["response_3_beaver_7b"] = "much"
    bad[1]["response_8"] = " "
    bad[2]["response_2_gemma_2b"] = float("nan")
    del bad[3]["response_5_mistral_ray"]
    path = jsonl(tmp_path / "train.jsonl", [*bad[:2], good, *bad[2:4]])
    with path.open("a") as file:
        file.write("{broken\n")
    read, report = load_personalllm(path)
    assert read.prompts == ("p0",)
    assert (report.rows, report.n_good, report.n_bad) == (6, 1, 5)
    assert dict(report.reasons) == {"wrong_type": 3, "missing_column": 1, "broken_json": 1}
    assert [row.line for row in report.bad_rows] == [1, 2, 4, 5, 6]
    assert "response_3_beaver_7b is 'much'; expected a finite number" in str(report.bad_rows[0])
    with pytest.raises(DataError, match="no prompt with eight answers"):
        load_personalllm([bad[0]])
    with (tmp_path / "other.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, good.keys())
        writer.writeheader()
        writer.writerow(good)
    with pytest.raises(DataError, match=r"has no column gemma_2b/1, .* its columns are prompt, response_1, response_1_model"):
        load_personalllm(tmp_path / "other.csv", score_column="{scorer}/{answer}")
    assert len(
        load_personalllm([scored("p", np.zeros((8, 10)), columns="{scorer}/{answer}")], score_column="{scorer}/{answer}")[0]
    )
    with pytest.raises(
        DataError, match=r"score_column is 'reward'; expected the name of a column with \{answer\} and \{scorer\}"
    ):
        load_personalllm([good], score_column="reward")
    with pytest.raises(DataError, match=r"no 'gemma_2b\{1\}\{x\}'"):
        load_personalllm([good], score_column="{scorer}{{answer}}{x}")


def test_personalllm_has_every_prompt_once() -> None:
    rows = prompts(3)
    again = rows[0] | {"response_1_gemma_2b": 9.0}
    other = rows[0] | {"response_1": "Another answer."}
    data, report = load_personalllm([*rows, again, other])
    assert (data.prompts, report.n_good, dict(report.reasons)) == (("p0", "p1", "p2", "p0"), 4, {"duplicate": 1})
    assert "line 4: the prompt and its answers are those of line 1" in str(report.bad_rows[0])


def oracle(data: ScoredAnswers, weights: Any, prompt: int) -> Any:
    return data.scores[prompt] @ weights


def test_best_and_worst_of_each_user(tmp_path: Path) -> None:
    train, test = (load_personalllm(prompts(n, seed=n, name=f"{n}-"))[0] for n in (60, 11))
    mixed = best_and_worst(train, test, alpha=0.1, n_users=(53, 4), shots=(45, 9), seed=3)
    pairs, split = mixed.pairs, given_split(mixed.pairs)
    assert (mixed.standardised, mixed.n_equal, mixed.weights.shape) == (False, 0, (57, 10))
    assert Counter(pairs.split) == {"train": 53 * 45, "test_seen": 53 * 11, "support": 4 * 9, "test_unseen": 4 * 11}
    assert pairs.user_ids == tuple(sorted(pairs.user_ids))
    assert np.allclose(mixed.weights.sum(axis=1), 1)
    places = {prompt: (data, i) for data in (train, test) for i, prompt in enumerate(data.prompts)}
    for row in range(len(pairs)):  # a flat loop
        data, i = places[pairs.texts[pairs.chosen[row]].prompt_text]
        reward = oracle(data, mixed.weights[pairs.user_index[row]], i)
        assert pairs.texts[pairs.chosen[row]].response == data.answers[i][int(reward.argmax())]
        assert pairs.texts[pairs.rejected[row]].response == data.answers[i][int(reward.argmin())]
        assert (data is test) == pairs.split[row].startswith("test")
    own = pairs[split.train[pairs.user_index[split.train] == 20]]
    assert len(set(own.conversation)) == 45  # different prompts, and not the same for everybody
    assert set(own.conversation) != set(pairs[split.train[pairs.user_index[split.train] == 21]].conversation)
    again = best_and_worst(train, test, alpha=0.1, n_users=(53, 4), shots=(45, 9), seed=3)
    assert again.pairs.fingerprint() == pairs.fingerprint()
    assert len(best_and_worst(train, test, n_users=(1, 1), shots=(60, 1), n_test=2).pairs) == 60 + 1 + 4


def test_a_small_alpha_is_one_scorer_and_a_large_one_is_everybody() -> None:
    data = load_personalllm(prompts(9))[0]
    few = best_and_worst(data, data, alpha=1e-5, n_users=(60, 60), shots=(9, 9)).weights
    assert np.isfinite(few).all()
    assert (few.max(axis=1) > 0.999).all()
    assert len(set(few.argmax(axis=1))) == 10
    assert best_and_worst(data, data, alpha=1e5, n_users=(60, 60), shots=(9, 9)).weights.std() < 0.001


def test_answers_that_are_equal_are_no_choice() -> None:
    rows = prompts(3)
    rows[1] |= {f"response_{i}": "the same words" for i in range(1, 9)}
    rows[2] = scored("p2", np.ones((8, 10)))
    data = load_personalllm(rows)[0]
    mixed = best_and_worst(data, data, n_users=(2, 1), shots=(3, 2), n_test=1)
    prompts_left = {mixed.pairs.texts[i].prompt_text for i in mixed.pairs.chosen}
    assert prompts_left == {"p0"}
    assert len(mixed.pairs) + mixed.n_equal == 2 * 3 + 1 * 2 + 3


def test_two_at_random_draws_all_eight_answers() -> None:
    train, test = (load_personalllm(prompts(n, seed=n), standardised=True)[0] for n in (80, 7))
    mixed = two_at_random(train, test, n_users=(30, 8))
    pairs = mixed.pairs
    split = given_split(pairs)
    counts = Counter(pairs.users[np.concatenate([split.train, split.support])])
    assert (min(counts.values()) >= 25, max(counts.values()) <= 49, len(set(counts.values())) > 8) == (True, True, True)
    assert {int(text.response[-1]) for text in pairs.texts} == set(range(1, 9))
    met = Counter(pairs.texts[i].response[-1] for i in np.concatenate([pairs.chosen[split.train], pairs.rejected[split.train]]))
    assert min(met.values()) / max(met.values()) > 0.7  # each about an eighth of 2 x 30 x 37
    for row in split.train[:200]:
        i = train.prompts.index(pairs.texts[pairs.chosen[row]].prompt_text)
        reward = oracle(train, mixed.weights[pairs.user_index[row]], i)
        answers = train.answers[i]
        chosen, rejected = (answers.index(pairs.texts[side[row]].response) for side in (pairs.chosen, pairs.rejected))
        assert reward[chosen] > reward[rejected]
    with pytest.raises(DataError, match=r"the scores are raw; expected load_personalllm\(..., standardised=True\)"):
        two_at_random(load_personalllm(prompts(3))[0], test)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"n_users": (0, 3)}, r"n_users are \(0, 3\)"),
        ({"shots": (10, 2)}, "a user meets 2 to 10 training prompts; expected numbers from 1 to 9"),
        ({"shots": (2, 0)}, "a user meets 0 to 2"),
        ({"n_test": 10}, "n_test is 10; expected 1 to 9"),
    ],
)
def test_simulations_that_cannot_be(options: Row, match: str) -> None:
    data = load_personalllm(prompts(9))[0]
    with pytest.raises(DataError, match=match):
        best_and_worst(data, data, **{"shots": (2, 2), **options})
    with pytest.raises(DataError, match="expected both raw or both standardised"):
        best_and_worst(data, load_personalllm(prompts(9), standardised=True)[0], shots=(2, 2))


# -- PReF


def persona(index: int, text: str, preference: object, name: str = "q") -> Row:
    return {
        **{"prompt": f"{name} {index}?", "response_1": f"original {index}", "response_2": f"revised {index}"},
        **{"persona": text, "persona_index": index, "preference": preference},
    }


def table(path: Path, rows: list[Row]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_personas_are_people_by_their_text(tmp_path: Path) -> None:
    files = [
        table(
            tmp_path / "train.csv", [persona(0, "a baker, 40", 1.0), persona(1, "a nurse", 0.0), persona(1, "a nurse", 0.5, "r")]
        ),
        table(tmp_path / "validation.csv", [persona(0, "a baker, 40", 0, "v")]),
        table(tmp_path / "calibration.csv", [persona(0, "a pilot", 1, "c")]),  # index 0 again, and another person
        table(tmp_path / "test.csv", [persona(0, "a pilot", 0.0, "t"), persona(0, "a pilot", "both", "u")]),
    ]
    pairs, report = load_personas(*files)
    assert (report.n_good, report.n_bad) == (6, 1)
    assert str(report.bad_rows[0]).startswith("line 3: source 4: preference is 'both'; expected a finite number")
    assert len(pairs.user_ids) == 3
    assert [(chosen, tie) for (_, chosen, _), tie in zip(sides(pairs), pairs.tie, strict=True)] == [
        *(("original 0", False), ("revised 1", False), ("original 1", True), ("revised 0", False)),
        *(("original 0", False), ("revised 0", False)),
    ]
    assert pairs.split.tolist() == ["train"] * 3 + ["test_seen", "support", "test_unseen"]
    assert pairs.users[0] == pairs.users[3] != pairs.users[1]
    assert pairs.users[4] == pairs.users[5] not in pairs.users[:4]
    swapped, _ = load_personas(*files, first_wins=0.0)
    assert [row[1] for row in sides(swapped)][:3] == ["revised 0", "original 1", "original 1"]
    with pytest.raises(DataError, match=r"1 personas, such as persona-.* expected new people"):
        load_personas(files[0], files[1], files[1], files[3])
    with pytest.raises(DataError, match="has no column persona_index, preference"):
        load_personas(table(tmp_path / "x.csv", [{"prompt": 1, "response_1": 1, "response_2": 1, "persona": 1}]), *files[1:])
    with pytest.raises(DataError, match=r"first_wins is 0\.5"):
        load_personas(*files, first_wins=0.5)


def test_one_index_with_two_persons_is_a_bad_row() -> None:
    rows = [persona(0, "a baker", 1), persona(0, "a nurse", 1, "r")]
    _, report = load_personas(rows, [persona(1, "x", 1)], [persona(1, "y", 1)], [persona(1, "y", 1, "z")])
    assert report.n_bad == 1
    assert "persona_index 0 has another persona than earlier in train" in str(report.bad_rows[0])


def test_attribute_texts_are_what_84_users_want() -> None:
    data = attribute_texts(5, n_train=6, n_test=4)
    pairs, split = data.pairs, given_split(data.pairs)
    assert pairs.user_ids == tuple(sorted(wish.name for wish in wishes()))
    assert len(pairs.user_ids) == 84
    assert len(set(pairs.users[split.support])) == 24
    assert Counter(pairs.split) == {"train": 360, "test_seen": 240, "support": 144, "test_unseen": 96}
    assert not {pairs.texts[i].prompt for i in pairs.chosen[split.train]} & {
        pairs.texts[i].prompt for i in pairs.chosen[split.test_seen]
    }
    for user, weights in zip(pairs.user_ids, data.weights, strict=True):
        wanted = [TRAITS[trait][int(weights[trait] > 0)] for trait in np.flatnonzero(weights)]
        assert user == " and ".join(wanted)
        assert set(np.abs(weights)) == {0.0, 1.5}
    assert 0.8 < data.oracle_accuracy() < 0.99
    # P(tie | margin) = 2 p (1 - p), in sum over all choices
    p = 1 / (1 + np.exp(-data.margin))
    assert abs(pairs.tie.mean() - (2 * p * (1 - p)).mean()) < 0.04
    assert attribute_texts(5, n_train=6, n_test=4).pairs.fingerprint() == pairs.fingerprint()
    assert attribute_texts(6, n_train=6, n_test=4).pairs.fingerprint() != pairs.fingerprint()


def test_attribute_texts_say_what_their_margins_say() -> None:
    """The words themselves: who wants short answers was given the shorter one, wherever the other wish is equal."""
    data = attribute_texts(1, n_train=12, n_test=6, scale=8.0)
    lengths = np.asarray([len(text.response) for text in data.pairs.texts])
    shorter = lengths[data.pairs.chosen] < lengths[data.pairs.rejected]
    strict = ~data.pairs.tie
    length = data.weights[data.pairs.user_index, 0]
    assert shorter[strict & (length < 0)].mean() > 0.65
    assert shorter[strict & (length > 0)].mean() < 0.35
    shouted = np.asarray([text.response.count("!") for text in data.pairs.texts])
    louder = shouted[data.pairs.chosen] - shouted[data.pairs.rejected]
    enthusiasm = data.weights[data.pairs.user_index, 5]
    assert louder[strict & (enthusiasm > 0)].mean() > 1 > -1 > louder[strict & (enthusiasm < 0)].mean()


@pytest.mark.parametrize(
    ("options", "match"),
    [({"n_unseen": 84}, "n_unseen is 84"), ({"n_test": 0}, "n_test is 0"), ({"scale": -1.0}, r"scale is -1\.0")],
)
def test_attribute_texts_that_cannot_be(options: Row, match: str) -> None:
    with pytest.raises(DataError, match=match):
        attribute_texts(**options)


# -- PersonalRewardBench


def test_arena_rows_in_all_their_forms(tmp_path: Path) -> None:
    before = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Why?"}]
    turned = {"role": "assistant", "content": "Because."}
    train = [
        {"user_id": "ada", "context": before, "chosen": turned, "rejected": {"role": "assistant", "content": "No."}},
        {"user_id": "bo", "context": "Why?", "chosen": "Because.", "rejected": "No."},
        {"user_id": "cy", "context": before, "chosen": [turned], "rejected": [{"role": "assistant", "content": "No."}]},
        {"user_id": "di", "context": "Why?", "chosen": [{"role": "user", "content": "?"}], "rejected": "No."},
        {"user_id": "di", "context": [3], "chosen": "a", "rejected": "b"},
    ]
    val = [{"user_id": user, "context": "How?", "chosen": "So.", "rejected": "Not."} for user in ("ada", "bo", "cy")]
    test = [{"user_id": user, "context": "When?", "chosen": "Now.", "rejected": "Never."} for user in ("ada", "bo", "cy")]
    pairs, report = arena.load_arena(jsonl(tmp_path / "train.jsonl", train), val, test, unseen=0.34)
    assert (report.n_good, report.n_bad) == (9, 2)
    assert "source 1: chosen ends with a turn of 'user'" in str(report.bad_rows[0])
    assert "context is [3]; expected a text, or turns" in str(report.bad_rows[1])
    assert sides(pairs)[:3] == [(user, "Because.", "No.") for user in ("ada", "bo", "cy")]
    assert pairs.texts[pairs.chosen[0]].prompt_text == "user: Hi?\nassistant: Yes?\nuser: Why?"
    assert Counter(pairs.split) == {"train": 4, "test_seen": 2, "support": 2, "test_unseen": 1}
    assert len(set(pairs.users[pairs.split == "support"])) == 1
    assert set(pairs.users[pairs.split == "support"]) == set(pairs.users[pairs.split == "test_unseen"])
    whole = [{"role": "user", "content": "What?"}, turned]
    talks = [{"user_id": "ada", "context": "", "chosen": whole, "rejected": [whole[0], {"role": "assistant", "content": "No."}]}]
    talks += [talks[0] | {"rejected": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "No."}]}]
    models = [{"role": "user", "content": "Hi?"}, {"role": "model", "content": "Yes?"}, {"role": "user", "content": "Why?"}]
    prisms = train[0] | {"context": models, "chosen": turned | {"role": "model"}, "rejected": {"role": "model", "content": "No."}}
    of_prism, _ = arena.load_arena([prisms], val, test)
    assert of_prism.texts[of_prism.chosen[0]] == pairs.texts[pairs.chosen[0]]  # PRISM calls the assistant model
    told, report = arena.load_arena(talks, val, test)
    assert told.texts[told.chosen[0]].prompt_text == "What?"  # it is nowhere but in front of the answers
    assert (report.n_bad, "answer different turns" in str(report.bad_rows[0])) == (1, True)
    of_frame, _ = arena.load_arena([framed(row) for row in train], val, test, unseen=0.34)
    assert of_frame.fingerprint() == pairs.fingerprint()
    everybody, _ = arena.load_arena(train, val, test, unseen=0.0)
    assert Counter(everybody.split) == {"train": 6, "test_seen": 3}
    renamed = [{"who": "ada", "before": "Why?", "chosen": "a", "rejected": "b"}]
    named = arena.Columns(user="who", context="before")
    assert len(arena.load_arena(renamed, [renamed[0] | {"before": "x"}], [renamed[0] | {"before": "y"}], columns=named)[0]) == 3
    with pytest.raises(DataError, match=r"no 'context'; the columns of the row are: who, before, chosen, rejected"):
        arena.load_arena(renamed, renamed, renamed)
    with pytest.raises(DataError, match=r"unseen is 1\.0"):
        arena.load_arena(train, val, test, unseen=1.0)


# -- Community Alignment


MARKED = community.Columns("annotator", "asked", ["a", "b", "c", "d"], "best", conversation="id", language="lang")


def marked(annotator: str, best: object, lang: str = "en", **answers: str) -> Row:
    row = {"annotator": annotator, "id": f"{annotator}-talk", "lang": lang, "asked": "Which?", "best": best}
    return row | {name: f"answer {name}" for name in "abcd"} | answers


def test_one_of_four_answers_is_three_choices(tmp_path: Path) -> None:
    rows = [marked("ada", "c"), marked("bo", "a", "fr", d="answer a"), marked("cy", "e"), marked("di", "b", "it")]
    pairs, report = community.load_community(jsonl(tmp_path / "rows.jsonl", rows), MARKED)
    assert sides(pairs)[:3] == [("ada", "answer c", f"answer {other}") for other in "abd"]
    assert Counter(pairs.users) == {"ada": 3, "bo": 2, "di": 3}
    assert dict(report.reasons) == {"identical_sides": 1, "wrong_type": 1}
    assert [row.line for row in report.bad_rows] == [2, 3]
    assert "best is 'e'; expected one of ['a', 'b', 'c', 'd']" in str(report.bad_rows[1])
    assert np.allclose(pairs.weight, 1 / 3)
    assert set(pairs.conversation) == {"ada-talk", "bo-talk", "di-talk"}
    some, _ = community.load_community(rows, MARKED, languages={"en", "it"})
    assert some.user_ids == ("ada", "di")  # and cy, whose row is bad
    unsaid = [marked("ed", "a") | {"lang": None}, marked("flo", "a") | {"lang": ["en"]}]
    some, report = community.load_community([*rows[:1], *unsaid], MARKED, languages={"en", "it"})
    assert (some.user_ids, report.n_bad, report.bad_rows[0].line) == (("ada",), 1, 3)  # one bad row, and nobody else's
    assert "lang is ['en'] (list); expected a language" in str(report.bad_rows[0])


def aligned(annotator: str, *turns: tuple[str, str, list[str | None]], lang: str = "en") -> Row:
    """A record of the published file: (prompt, mark, answers) of each turn that there was."""
    row: Row = {"annotator_id": annotator, "conversation_id": f"{annotator}-talk", "assigned_lang": lang}
    for i, name in enumerate(community.TURNS):
        asked, best, answers = turns[i] if i < len(turns) else (None, None, [None] * 4)
        row |= {f"{name}_turn_prompt": asked, f"{name}_turn_preferred_response": best}
        row |= {f"{name}_turn_response_{letter}": answer for letter, answer in zip("abcd", answers, strict=True)}
    return row


def test_community_alignment_as_it_is_published(tmp_path: Path) -> None:
    first = ("Lunch?", "response_c", ["Soup.", "Bread.", "Rice. <|end_of_text|>", "Bread."])
    second = ("And then?", "response_a", ["Tea.", "Tea.", "Nothing.", None])
    gap = ("Still there?", "response_a", ["Yes.", "No.", "Who?", "Hm."])
    rows = [
        aligned("ada", first, second),
        aligned("bo", first, ("", "response_a", ["a", "b", "c", "d"]), gap),  # what comes after a gap answers nothing
        aligned("cy", ("Lunch?", "EMPTY STRING", ["a", "b", "c", "d"])),
        aligned("di", first, ("More?", "response_d", ["a", "b", "c", None])),
        aligned("ed", first, lang="fr"),
    ]
    with (tmp_path / "part.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for source in (rows, jsonl(tmp_path / "part.jsonl", rows), tmp_path / "part.csv"):
        pairs, report = community.load_community_alignment(source, languages={"en"})
        of_first = [("Rice.", "Soup."), ("Rice.", "Bread.")]
        found = [(user, *both) for user in ("ada", "bo", "di") for both in of_first]
        assert sides(pairs) == [*found[:2], ("ada", "Tea.", "Nothing."), *found[2:]]
        assert pairs.weight.tolist() == [0.5, 0.5, 1.0, *[0.5] * 4]
        talk = pairs.texts[pairs.chosen[2]]
        assert talk.prompt_text == "user: Lunch?\nassistant: Rice.\nuser: And then?"
        assert pairs.texts[pairs.chosen[0]].prompt == "Lunch?"
        assert set(pairs.conversation) == {"ada-talk", "bo-talk", "di-talk"}
        assert [str(row).partition("; ")[0].partition(": ")[2] for row in report.bad_rows] == [
            "the first turn has no prompt or no marked answer [wrong_type]",
            "second_turn_preferred_response is 'response_d'",
        ]
    assert len(community.load_community_alignment(rows)[0]) == 9
    odd = aligned("flo", first) | {"assigned_lang": ["en"]}
    some, report = community.load_community_alignment([rows[0], odd], languages={"en"})
    assert (some.user_ids, dict(report.reasons)) == (("ada",), {"wrong_type": 1})
    (tmp_path / "part.csv").write_text((tmp_path / "part.csv").read_text().replace("assigned_lang", "language"))
    with pytest.raises(DataError, match="has no column assigned_lang"):
        community.load_community_alignment(tmp_path / "part.csv")


def test_community_columns_that_cannot_be() -> None:
    numbered = community.Columns("annotator", "asked", ["a", "b"], "best", labels=[1, 2])
    pairs, _ = community.load_community([marked("ada", 2), marked("bo", "1")], numbered)
    assert sides(pairs) == [("ada", "answer b", "answer a"), ("bo", "answer a", "answer b")]
    for answers, labels in ((["a"], None), (["a", "b"], [1, 1]), (["a", "b"], [1])):
        with pytest.raises(DataError, match="expected at least two, each with its own label"):
            community.load_community([], community.Columns("annotator", "asked", answers, "best", labels=labels))
    with pytest.raises(DataError, match=r"languages are \['en'\], but no column of the language is named"):
        community.load_community([marked("ada", 1)], numbered, languages=["en"])
    with pytest.raises(DataError, match="no 'a'; the columns of the row are: asked"):
        community.load_community([{"asked": "?"}], numbered)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_an_empty_file_is_told_the_columns_of_its_loader(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"{name} is empty; expected rows with annotator, asked, a, b, c, d, best, id, lang"):
        community.load_community(tmp_path / name, MARKED)


# -- Argilla


def exported(question: str, answers: list[object], users: list[object] | None = None, status: list[str] | None = None) -> Row:
    who = [f"user-{i}" for i in range(len(answers))] if users is None else users
    return {
        **{"instruction": "Lunch?", "response-1": "Soup.", "response-2": "Bread.", "response-3": "Rice."},
        **{f"{question}.responses": answers, f"{question}.responses.users": who},
        f"{question}.responses.status": ["submitted"] * len(answers) if status is None else status,
    }


def test_argilla_rankings_in_both_forms(tmp_path: Path) -> None:
    ranked = [{"value": "response-2", "rank": 1}, {"value": "response-1", "rank": 2}, {"value": "response-3", "rank": 2}]
    rows = [
        exported("order", [["response-3", "response-1", "response-2"], ranked], status=["submitted", "submitted"]),
        exported("order", [["response-1", "response-2"], ["response-1", "response-2"]], ["eve", "dan"], ["draft", "discarded"]),
        exported("order", [["response-9", "response-1"], ["response-2", "response-1"]], ["fay", "gus"]),
        exported("order", []) | {"order.responses": None},
        exported("order", [["response-1"]], ["a", "b"]),
    ]
    fields = ["response-1", "response-2", "response-3"]
    pairs, report = argilla_rankings(jsonl(tmp_path / "x.jsonl", rows), "order", prompt="instruction", answers=fields)
    assert sides(pairs) == [
        *(("user-0", "Rice.", "Soup."), ("user-0", "Rice.", "Bread."), ("user-0", "Soup.", "Bread.")),
        *(("user-1", "Bread.", "Soup."), ("user-1", "Bread.", "Rice.")),
        ("gus", "Bread.", "Soup."),  # whose neighbour's answer is bad, and theirs not
    ]
    assert pairs.weight.tolist() == pytest.approx([1 / 3] * 3 + [1 / 2] * 2 + [1])
    assert [row.line for row in report.bad_rows] == [3, 5]
    assert "annotator 'fay': order.responses ranks 'response-9'" in str(report.bad_rows[0])
    assert "order has 1 responses by 2 users with 1 states" in str(report.bad_rows[1])
    of_frame, _ = argilla_rankings([framed(row) for row in rows], "order", prompt="instruction", answers=fields)
    assert of_frame.fingerprint() == pairs.fingerprint()
    tied, _ = argilla_rankings(rows, "order", prompt="instruction", answers=fields, ties=True)
    assert int(tied.tie.sum()) == 1
    renamed = [exported("order", [["A", "B"]])]
    found, _ = argilla_rankings(renamed, "order", prompt="instruction", answers={"A": "response-1", "B": "response-3"})
    assert sides(found) == [("user-0", "Soup.", "Rice.")]


def test_argilla_labels() -> None:
    labels = {"first": "response-1", "second": "response-2", "same": None}
    rows = [exported("which", ["first", "second", "same", "neither"])]
    pairs, report = argilla_labels(rows, "which", prompt="instruction", labels=labels)
    assert sides(pairs) == [("user-0", "Soup.", "Bread."), ("user-1", "Bread.", "Soup."), ("user-2", "Soup.", "Bread.")]
    assert pairs.tie.tolist() == [False, False, True]
    assert "annotator 'user-3': the label is 'neither'; expected one of first, second, same" in str(report.bad_rows[0])
    with pytest.raises(DataError, match="expected labels that prefer one of two fields"):
        argilla_labels(rows, "which", prompt="instruction", labels={"first": "response-1"})
    with pytest.raises(DataError, match=r"no 'other\.responses'"):
        argilla_labels(rows, "other", prompt="instruction", labels=labels)


def test_argilla_ratings_are_compared_across_records() -> None:
    rows = [
        exported("stars", [5, 1, 3]) | {"answer": "Soup."},
        exported("stars", [2, 4, 3]) | {"answer": "Bread."},
        exported("stars", [9]) | {"answer": "Cake.", "instruction": "Dinner?"},  # nothing else to the same prompt
        exported("stars", ["many", 3], ["user-0", ""]) | {"answer": "Rice."},
        exported("stars", [1]) | {"answer": " "},
    ]
    pairs, report = argilla_ratings(rows, "stars", prompt="instruction", answer="answer")
    assert sides(pairs) == [("user-0", "Soup.", "Bread."), ("user-1", "Bread.", "Soup.")]
    assert pairs.margin.tolist() == [3, 3]
    assert (report.n_good, report.n_bad, report.rows) == (2, 3, 5)
    assert dict(report.reasons) == {"wrong_type": 2, "missing_user": 1}
    assert [row.line for row in report.bad_rows] == [4, 4, 5]
    with pytest.raises(DataError, match=r"rows of a list: 0 of 2 rows are good, 2 are bad .*\n  line 1: no 'other\.responses'"):
        argilla_ratings(rows[:2], "other", prompt="instruction", answer="answer")
    once = [rows[2], rows[2] | {"instruction": "Lunch?", "stars.responses.users": ["bo"]}, rows[4]]
    with pytest.raises(DataError, match="2 ratings by 2 annotators, but none of them rated two answers to one prompt") as caught:
        argilla_ratings(once, "stars", prompt="instruction", answer="answer")
    assert "0 of 1 rows are good, 1 are bad (1 wrong_type)\n  line 3: answer is ' '" in str(caught.value)
    alike = [exported("stars", [4]) | {"answer": answer} for answer in ("Soup.", "Bread.", "Rice.")]
    with pytest.raises(DataError, match=r"3 ratings by 1 annotator, but all that can be compared are equal; .* ties=True"):
        argilla_ratings(alike, "stars", prompt="instruction", answer="answer")
    tied, _ = argilla_ratings(rows, "stars", prompt="instruction", answer="answer", ties=True)
    assert sides(tied)[2] == ("user-2", "Soup.", "Bread.")
    assert bool(tied.tie[2])


# -- by name


Run = Callable[..., tuple[int, str, str]]


def test_prepared_rows_read_back_as_they_are(tmp_path: Path, palate_command: Run) -> None:
    conversations = jsonl(tmp_path / "conversations.jsonl", [plain(f"user {u}", i) for u in range(6) for i in range(6)])
    out = tmp_path / "rows.jsonl.gz"
    code, said_, err = palate_command("data", "prepare", "prism-mrm", conversations, "--out", out)
    assert (code, said_.strip(), "72 choices" in err) == (0, str(out), True)
    expected = prism_split(load_prism(conversations)[0])
    again = palate.load_pairs(out)
    assert again.fingerprint() == expected.fingerprint()
    assert again.split.tolist() == expected.split.tolist()
    assert again.conversation.tolist() == expected.conversation.tolist()
    survey = jsonl(tmp_path / "survey.jsonl", [{"user_id": "user 0", "num_completed_conversations": 0}])
    options = ("--out", out, "--seed", 5, "--overwrite")
    assert palate_command("data", "prepare", "prism-lore-corrected", conversations, survey, *options)[0] == 0
    fewer = palate.load_pairs(out)
    assert "user 0" not in fewer.user_ids
    assert fewer.split.tolist() == prism_split(fewer, LORE_CORRECTED, seed=5).split.tolist()


def test_what_is_left_out_of_any_file_is_said(tmp_path: Path, palate_command: Run) -> None:
    good = prompts(50)
    files = [jsonl(tmp_path / name, [*good, good[0] | {"prompt": " "}]) for name in ("train.jsonl", "test.jsonl")]
    code, _, err = palate_command("data", "prepare", "personalllm-lore", *files, "--out", tmp_path / "rows.jsonl")
    assert code == 0
    said_ = " ".join(err.split())
    assert all(f"{file.name}: 50 of 51 rows are good" in said_ for file in files)


def test_every_recipe_is_prepared_by_its_name(tmp_path: Path) -> None:
    conversations = [plain(f"user {u}", i) for u in range(6) for i in range(6)]
    comparisons, others = ([compared(worker, first + i) for worker in "abcdef" for i in range(60)] for first in (0, 60))
    judged = [{"user_id": f"u{i}", "context": "Why?", "chosen": "So.", "rejected": "No."} for i in range(4)]
    scores = prompts(50)
    new = [persona(0, "a pilot", 1), persona(1, "a poet", 0)]
    given: dict[str, list[list[Row]]] = {
        **{name: [conversations] for name in ("prism-mrm", "prism-lore-paper", "prism-lore-corrected")},
        **{name: [comparisons, others] for name in ("tldr-mrm", "tldr-lore")},
        "tldr-paper": [comparisons],
        **{name: [scores, scores] for name in ("personalllm-lore", "personalllm-random")},
        "arena": [judged, [row | {"context": "How?"} for row in judged], [row | {"context": "When?"} for row in judged]],
        "community-alignment": [[aligned("ada", ("Lunch?", "response_b", [*"abcd"]))]],
        "community": [[marked("ada", 2)]],
        "argilla-rankings": [[exported("order", [["response-2", "response-1"]])]],
        "argilla-labels": [[exported("which", ["first", "same"])]],
        "argilla-ratings": [[exported("stars", [n]) | {"answer": answer} for n, answer in ((5, "Soup."), (1, "Bread."))]],
        "personas": [[persona(0, "a baker", 1)], [persona(0, "a baker", 1, "v")], new, [persona(0, "a pilot", 0, "t")]],
    }
    options = {
        "community": recipes.Options(columns="annotator=annotator,prompt=asked,preferred=best", answers="1=a,2=b"),
        "argilla-rankings": recipes.Options(question="order", prompt="instruction", answers="response-1,response-2"),
        "argilla-labels": recipes.Options(question="which", prompt="instruction", answers="first=response-1,x=response-2,same="),
        "argilla-ratings": recipes.Options(question="stars", prompt="instruction", answers="answer"),
    }
    without_split = {"community-alignment": 3, "community": 1, "argilla-rankings": 1, "argilla-labels": 2, "argilla-ratings": 1}
    assert {*given, "attributes"} == set(recipes.RECIPES)  # that one has a test of its own below
    for name, parts in given.items():
        files = [jsonl(tmp_path / f"{name}-{i}.jsonl", part) for i, part in enumerate(parts)]
        pairs, reports = recipes.prepared(name, files, options=options.get(name))
        if name in without_split:  # none is published
            assert (len(pairs), set(pairs.split)) == (without_split[name], {None}), name
            continue
        split = given_split(pairs)
        assert all(len(getattr(split, side)) for side in ("train", "test_seen", "support", "test_unseen")), name
        assert len(reports) == (2 if name.startswith("personalllm") else 1)
        assert recipes.prepared(name, files)[0].fingerprint() == pairs.fingerprint(), name


def test_recipes_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no recipe 'prism'; expected one of prism-mrm, prism-lore-paper"):
        recipes.prepared("prism", [])
    with pytest.raises(DataError, match=r"arena got 2 files; expected train, val, test"):
        recipes.prepared("arena", [tmp_path, tmp_path])
    with pytest.raises(DataError, match="attributes got 1 files; expected none, because it generates its rows"):
        recipes.prepared("attributes", [tmp_path])
    with pytest.raises(DataError, match="tldr-paper got 0 files"):
        recipes.prepared("tldr-paper", [])


def test_an_argilla_export_is_prepared_by_one_command(tmp_path: Path, palate_command: Run) -> None:
    rows = [exported("which", ["first", "same", "second"], ["ada", "bo", "cy"], ["submitted", "submitted", "draft"])]
    out, export = tmp_path / "rows.jsonl", jsonl(tmp_path / "export.json", rows)  # as `datasets` names JSON Lines
    options = ("--prompt", "instruction", "--answers", "first=response-1,second=response-3,same=")
    command = ("data", "prepare", "argilla-labels", export, *options, "--out", out)
    assert palate_command(*command, "--question", "which")[0] == 0
    expected, _ = argilla_labels(
        rows, "which", prompt="instruction", labels={"first": "response-1", "second": "response-3", "same": None}
    )
    again = palate.load_pairs(out)
    assert again.fingerprint() == expected.fingerprint()
    assert (again.user_ids, again.tie.tolist()) == (("ada", "bo"), [False, True])

    def refused(*arguments: object) -> str:
        code, _, err = palate_command(*arguments, "--overwrite")
        assert code == 2
        return " ".join(err.split())

    assert "argilla-labels needs --question; docs/datasets.md has an example" in refused(*command)
    wrong = refused(*command, "--question", "witch")
    assert "no 'witch.responses'; the columns of the row are: instruction, response-1" in wrong
    assert "argilla-labels takes no --ties; expected --question, --prompt, --answers" in refused(
        *command, "--question", "q", "--ties"
    )
    export.write_text(json.dumps([{"fields": {"instruction": "Lunch?"}, "responses": {"which": [{"value": "first"}]}}], indent=1))
    assert "does not say which answers were submitted; expected a flattened export" in refused(*command, "--question", "which")
    assert palate.load_pairs(out).fingerprint() == expected.fingerprint()


def test_options_of_recipes_are_those_of_the_loaders(tmp_path: Path) -> None:
    files = [jsonl(tmp_path / name, prompts(50)) for name in ("train.jsonl", "test.jsonl")]
    even, usual = (recipes.prepared("personalllm-lore", files, options=o)[0] for o in (recipes.Options(alpha=9), None))
    train, test = (load_personalllm(file)[0] for file in files)
    assert even.fingerprint() == best_and_worst(train, test, alpha=9, n_test=50).pairs.fingerprint() != usual.fingerprint()
    tldr = [jsonl(tmp_path / f"{i}.jsonl", [compared(worker, i) for worker in "abcd" for i in range(60)]) for i in range(2)]
    fewer = recipes.prepared("tldr-mrm", tldr, options=recipes.Options(seen_limit=7))[0]
    assert int((fewer.split == "train").sum()) == 2 * 7
    turns = ("Lunch?", "response_b", [*"abcd"])
    aligned_file = jsonl(tmp_path / "a.jsonl", [aligned("ada", turns), aligned("bo", turns) | {"assigned_lang": "xx"}])
    kept, _ = recipes.prepared("community-alignment", [aligned_file], options=recipes.Options(languages="de, xx"))
    assert kept.user_ids == ("bo",)
    asked = [{"who": "ada", "context": "Why?", "chosen": "So.", "rejected": "No."}]
    parts = [jsonl(tmp_path / f"{n}.jsonl", [{**asked[0], "context": n}]) for n in ("train", "val", "test")]
    assert recipes.prepared("arena", parts, options=recipes.Options(columns="user=who"))[0].user_ids == ("ada",)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("prism-mrm", {"languages": "en"}, "prism-mrm takes no --languages; expected nothing but files and --seed"),
        ("tldr-paper", {"columns": "a=b", "alpha": 0.1}, "tldr-paper takes no --alpha, --columns; expected --seen-limit"),
        ("community", {"columns": "annotator=a"}, "community needs --answers"),
        (
            "community",
            {"columns": "annotator=a,prompt=p", "answers": "a,b"},
            "expected preferred as well, such as preferred=COLUMN",
        ),
        (
            "community",
            {"columns": "who=a", "answers": "a,b"},
            "--columns has who=a; expected WHAT=COLUMN with WHAT one of annotator",
        ),
        ("community", {"columns": "annotator=", "answers": "a,b"}, "--columns has annotator=; expected"),
        ("argilla-rankings", {"question": "q", "prompt": "p", "answers": "a,,b"}, "--answers is 'a,,b'; expected names"),
        ("argilla-rankings", {"question": "q", "prompt": "p", "answers": "a=x,a=y"}, "each once"),
        ("argilla-rankings", {"question": "q", "prompt": "p", "answers": "a=x,b="}, "expected a field for every answer"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        recipes.prepared(name, [jsonl(tmp_path / "x.jsonl", [{}])], options=recipes.Options(**options))


# -- in one go with the rest


def test_a_prepared_set_goes_through_a_comparison() -> None:
    pairs, reports = recipes.prepared("attributes", [])
    assert (reports, len(pairs), len(given_split(pairs).train)) == ((), 84 * 80, 60 * 40)
    some = pairs[np.arange(0, len(pairs), 20)]
    found = palate.compare(some, Items(), {"bt": palate.BradleyTerry()}, seeds=1, shots=(None,), by="prompt")
    assert set(found.columns["cohort"]) == {"seen", "unseen"}
