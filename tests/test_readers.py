"""One data set in every container reads as the same choices, and a bad one says where."""

import csv
import gzip
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from palate.data import sources
from palate.data.pairs import PairSet
from palate.data.readers import load_pairs, load_polis, load_valid_pairs
from palate.data.sources import csv_records
from palate.errors import DataError, MissingExtraError

ROWS: list[dict[str, Any]] = [
    {
        "user_id": "zoe",
        "prompt": "P",
        "chosen": "long, with a comma",
        "rejected": "two\nlines",
        "margin": 1.5,
        "conversation_id": "c1",
    },
    {"user_id": "ana", "prompt": "P", "chosen": "two\nlines", "rejected": 'a "quote"', "timestamp": 5.0, "split": "train"},
    {"user_id": "zoe", "prompt": "Q", "chosen": "é", "rejected": "two\nlines", "tie": True, "weight": 2.5, "extra": "x"},
]
COLUMNS = sorted({name for row in ROWS for name in row})


def same(one: PairSet, other: PairSet) -> None:
    assert one.texts == other.texts
    assert one.user_ids == other.user_ids
    for name in ("chosen", "rejected", "user_index", "tie", "weight", "margin", "timestamp", "conversation", "split"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.fixture
def expected() -> PairSet:
    pairs = load_pairs(ROWS)
    assert [(text.prompt, text.response) for text in pairs.texts] == [
        ("P", "long, with a comma"),
        ("P", "two\nlines"),
        ("P", 'a "quote"'),
        ("Q", "é"),
        ("Q", "two\nlines"),
    ]
    assert pairs.chosen.tolist() == [0, 1, 3]
    assert pairs.rejected.tolist() == [1, 2, 4]
    assert pairs.users.tolist() == ["zoe", "ana", "zoe"]
    assert pairs.tie.tolist() == [False, False, True]
    assert pairs.weight.tolist() == [1, 1, 2.5]
    np.testing.assert_array_equal(pairs.margin, [1.5, np.nan, np.nan])
    np.testing.assert_array_equal(pairs.timestamp, [np.nan, 5, np.nan])
    assert pairs.conversation.tolist() == ["c1", None, None]
    assert pairs.split.tolist() == [None, "train", None]
    return pairs


def test_json_lines(expected: PairSet, tmp_path: Path) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "named.otherwise").write_text(text, encoding="utf-8")
    same(load_pairs(tmp_path / "a.jsonl"), expected)
    same(load_pairs(str(tmp_path / "a.jsonl.gz")), expected)
    same(load_pairs(tmp_path / "named.otherwise", format="jsonl"), expected)


def test_csv(expected: PairSet, tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(ROWS)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    same(load_pairs(tmp_path / "a.csv"), expected)
    same(load_pairs(tmp_path / "a.csv.gz"), expected)


def test_a_cell_may_be_as_long_as_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, long = csv.field_size_limit(), "word " * 40_000  # 200,000 characters, where Python's csv stops at 131,072
    (tmp_path / "a.csv").write_text(f"user_id,chosen,rejected\nana,{long},b\nbo,c,{long}\n")
    pairs = load_pairs(tmp_path / "a.csv")
    assert [len(text.response) for text in pairs.texts] == [200_000, 1, 1]
    stream = csv_records(tmp_path / "a.csv", ())
    next(stream)
    assert csv.field_size_limit() == before  # which is the whole process's, also while a file is being read
    monkeypatch.setattr(sources, "MAX_LINE", 250_000)
    (tmp_path / "b.csv").write_text(f'user_id,chosen,rejected\nana,"{long}\n{long}",b\nbo,c,d\n')
    _, report = load_valid_pairs(tmp_path / "b.csv")
    assert (report.n_good, report.bad_rows[0].line, report.bad_rows[0].problems[0].reason) == (1, 2, "line_too_long")
    assert "a cell goes on for more than 250,000 characters; expected at most that" in str(report.bad_rows[0])
    assert csv.field_size_limit() == before


def test_arrays_in_rows_are_lists(expected: PairSet) -> None:
    """A data frame that was read from Parquet has arrays, of arrays even, where the file had lists."""
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "x"}]
    ended: list[Any] = [{"user_id": "a", "chosen": turns, "rejected": [turns[0], turns[1] | {"content": "y"}]}]
    arrays = [{name: np.array(value) if isinstance(value, list) else value for name, value in row.items()} for row in ended]
    same(load_pairs(arrays), load_pairs(ended))
    nested = np.empty(2, dtype=object)
    nested[:] = [np.array([1, 2]), {"ranked": np.array(["a"])}]
    assert [record.row for record in sources.rows_in_memory([{"x": nested}])] == [{"x": [[1, 2], {"ranked": ["a"]}]}]


def test_parquet_and_datasets(expected: PairSet, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    table = pa.Table.from_pylist([{name: row.get(name) for name in COLUMNS} for row in ROWS])
    parquet.write_table(table, tmp_path / "a.parquet")
    same(load_pairs(tmp_path / "a.parquet"), expected)
    same(load_pairs(datasets.Dataset(table)), expected)
    same(load_pairs(row for row in ROWS), expected)
    with pytest.raises(DataError, match="got a dict of train"):
        load_pairs(datasets.DatasetDict({"train": datasets.Dataset(table)}))
    parquet.write_table(table.drop_columns(["chosen"]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="no column chosen"):
        load_pairs(tmp_path / "b.parquet")
    times = pa.Table.from_pylist([ROWS[0] | {"timestamp": datetime(1970, 1, 2, tzinfo=UTC)}])
    parquet.write_table(times, tmp_path / "c.parquet")
    assert load_pairs(tmp_path / "c.parquet").timestamp.tolist() == [86400.0]
    turns = [{"role": "user", "content": "Why?"}]
    talk = {
        "user_id": "a",
        "chosen": [*turns, {"role": "assistant", "content": "x"}],
        "rejected": [*turns, {"role": "assistant", "content": "y"}],
    }
    parquet.write_table(pa.Table.from_pylist([talk]), tmp_path / "d.parquet")
    assert load_pairs(tmp_path / "d.parquet").texts[1].prompt_text == "Why?"


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'palate\[data\]'"):
        load_pairs(tmp_path / "a.parquet")


def test_strict_reading_names_the_first_bad_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    bad = [ROWS[0] | {"user_id": "", "margin": i} for i in range(9)]
    file.write_text("\n".join(json.dumps(row) for row in [ROWS[0], *bad, ROWS[1]]))
    with pytest.raises(DataError, match=r"rows.jsonl: 2 of 11 rows are good, 9 are bad \(9 missing_user\)") as caught:
        load_pairs(file)
    for part in ("line 2: user_id is ''", "line 6:", "and 4 more", "`palate validate`"):
        assert part in str(caught.value)
    assert "line 7:" not in str(caught.value)
    pairs, report = load_valid_pairs(file, quarantine=tmp_path / "bad.jsonl")
    same(pairs, load_pairs(ROWS[:2]))
    assert (report.n_bad, len((tmp_path / "bad.jsonl").read_text().splitlines())) == (9, 9)
    same(load_valid_pairs((row for row in [*bad, *ROWS]), quarantine=tmp_path / "bad.jsonl")[0], load_pairs(ROWS))
    with pytest.raises(DataError, match="no choice to learn from"):
        load_valid_pairs(bad)
    with pytest.raises(DataError, match="no choice to learn from"):
        load_pairs([])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", "does not exist"),
        (3, "got a int; expected a path"),
        ({"train": []}, "got a dict of train"),
        (["user_id"], "the row is 'user_id'; expected an object"),
    ],
)
def test_what_is_no_source(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_pairs(source)


def test_a_data_frame_is_told_what_to_do() -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(DataError, match="to_dict"):
        load_pairs(pandas.DataFrame(ROWS))


def test_formats_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(ROWS[0]))
    with pytest.raises(DataError, match="format is 'xml'"):
        load_pairs(file, format="xml")
    with pytest.raises(DataError, match="format 'polis' expects the export's folder"):
        load_pairs(file, format="polis")
    with pytest.raises(DataError, match=r"is a folder with a[.]jsonl"):
        load_pairs(tmp_path)


STATEMENTS = ["Trees.", "Cars.", "Bikes.", "Trees.", "Buses.", " "]


def polis(folder: Path, votes: list[list[str]], statements: list[str] = STATEMENTS) -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / "comments.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["comment-id", "comment-body"], *([i, text] for i, text in enumerate(statements))])
    with (folder / "participants-votes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["participant", "n-votes", *range(len(statements))], *votes])
    return folder


def test_polis_votes_become_pairs(tmp_path: Path) -> None:
    folder = polis(
        tmp_path / "export",
        [
            ["7", "5", "1", "-1", "0", "", "-1", "1"],  # agrees with Trees; disagrees with Cars, Buses; statement 5 has no text
            ["8", "4", "1", "-1", "1", "-1", "", ""],  # agrees and disagrees with the same text: only Bikes over Cars is left
            ["9", "2", "1", "", "", "", "", ""],  # too few
            ["10", "2", "1", "2", "", "", "", ""],  # no such vote
            ["7", "2", "1", "-1", "", "", "", ""],  # that participant again
            ["", "2", "1", "-1", "", "", "", ""],
            ["11", "1"],
            ["12", "4", "+1.0", "-1.0", "1", "1", "", ""],  # two statements with one text are one
        ],
    )
    pairs, report = load_polis(folder, min_votes=3, min_agrees=1, min_disagrees=1)
    texts = [text.response for text in pairs.texts]
    assert {text.prompt for text in pairs.texts} == {""}
    found = [(u, texts[a], texts[b]) for u, a, b in zip(pairs.users, pairs.chosen, pairs.rejected, strict=True)]
    assert found == [
        ("7", "Trees.", "Cars."),
        ("7", "Trees.", "Buses."),
        ("8", "Bikes.", "Cars."),
        ("12", "Trees.", "Cars."),
        ("12", "Bikes.", "Cars."),
    ]
    assert {row.line: row.problems[0].reason.value for row in report.bad_rows} == {
        5: "bad_vote",
        6: "duplicate",
        7: "missing_user",
        8: "wrong_field_count",
    }
    assert (report.rows, report.n_good, report.n_choices) == (8, 4, 5)
    with pytest.raises(DataError, match="the vote on statement 1 is '2'"):
        load_pairs(folder)
    with pytest.raises(DataError, match="no choice to learn from"):
        load_polis(folder)  # nobody has 20 votes


def test_a_broken_polis_export(tmp_path: Path) -> None:
    folder = polis(tmp_path / "export", [["7", "5", "1", "-1", "0", "", "-1", "1"]])
    with (folder / "comments.csv").open("a") as file:
        file.write("9,too,many\n")
    with pytest.raises(DataError, match=r"comments.csv, line 8: 3 fields"):
        load_pairs(folder)
    (folder / "comments.csv").unlink()
    with pytest.raises(DataError, match=r"no comments.csv"):
        load_pairs(folder)


def test_real_polis_export_matches_a_flat_count(shared: Path) -> None:
    folder = shared / "polis-ssis"
    pairs = load_pairs(folder)
    with (folder / "participants-votes.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (folder / "comments.csv").open(encoding="utf-8") as file:
        ids = [row["comment-id"] for row in csv.DictReader(file)]
    counts = {}
    for row in rows:
        agrees, disagrees = (sum(row.get(i) == vote for i in ids) for vote in ("1", "-1"))
        if agrees + disagrees >= 20 and agrees >= 4 and disagrees >= 4:
            counts[row["participant"]] = agrees * disagrees
    assert {user: int(n) for user, n in zip(pairs.user_ids, np.bincount(pairs.user_index), strict=True)} == counts
