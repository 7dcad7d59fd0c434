"""Every kind of bad row is named with its line and its reason, and nothing is lost beside it."""

import base64
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.data import sources
from palate.data.pairs import Choice, Message
from palate.data.readers import load_pairs
from palate.data.rows import Reason, as_row, check_row
from palate.data.validation import MAX_LISTED, validate
from palate.errors import DataError

GOOD: dict[str, Any] = {
    "user_id": "ana",
    "prompt": "Why is the sky blue?",
    "chosen": "Rayleigh scattering.",
    "rejected": "It is not.",
}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


BAD_ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("stringified_list", {"rejected": "['It is not.', 'Who knows?']"}, "rejected is a list that became a text"),
    ("stringified_list", {"chosen": '["Rayleigh", "Mie"]'}, "chosen is a list"),
    ("stringified_list", {"rejected": "[]"}, "rejected is a list"),
    ("stringified_list", {"prompt": "[{'role': 'user', 'content': 'Why?'}]"}, "prompt is a list"),
    ("stringified_list", {"chosen": "array(['a', 'b'], dtype=object)"}, "chosen is a list"),
    ("stringified_list", {"chosen": "{'role': 'assistant', 'content': 'Rayleigh'}"}, "chosen is a list"),
    ("identical_sides", {"rejected": " Rayleigh scattering.\n"}, "the same text 'Rayleigh scattering.'"),
    ("echoes_prompt", {"rejected": "Why is the sky blue? "}, "rejected repeats the prompt"),
    ("echoes_prompt", {"chosen": "Why is the sky blue?"}, "chosen repeats the prompt"),
    ("empty_text", {"chosen": ""}, "chosen is ''"),
    ("empty_text", {"rejected": " \t\n"}, "rejected is"),
    ("missing_user", {"user_id": ""}, "user_id is ''"),
    ("missing_user", {"user_id": None}, "user_id is None"),
    ("missing_user", {"user_id": float("nan")}, "user_id is nan"),
    ("missing_user", {"user_id": "nan"}, "what a missing value becomes"),
    ("wrong_type", {"user_id": 3.5}, "a text or an integer"),
    ("wrong_type", {"user_id": True}, "a text or an integer"),
    ("wrong_type", {"chosen": 7}, r"chosen is 7 \(int\)"),
    ("wrong_type", {"rejected": ["a", "b"]}, "rejected is \\['a', 'b'\\] \\(list\\)"),
    ("wrong_type", {"prompt": {"text": "Why?"}}, "prompt is"),
    ("wrong_type", {"tie": "yes"}, "expected true or false"),
    ("wrong_type", {"tie": 1}, "expected true or false"),
    ("wrong_type", {"weight": "2"}, "expected a number above 0"),
    ("wrong_type", {"split": 1}, "split is 1"),
    ("bad_number", {"weight": 0}, "weight is 0"),
    ("bad_number", {"weight": -2.5}, "weight is -2.5"),
    ("bad_number", {"weight": float("inf")}, "weight is inf"),
    ("bad_number", {"weight": float("nan")}, "weight is nan"),
    ("bad_number", {"margin": float("nan")}, "margin is nan"),
    ("negative_margin", {"margin": -0.5}, "margin is -0.5"),
    ("bad_timestamp", {"timestamp": "yesterday"}, "timestamp is 'yesterday'"),
    ("bad_timestamp", {"timestamp": float("inf")}, "timestamp is inf"),
    ("bad_character", {"chosen": "Rayleigh\x00"}, "NUL"),
    ("bad_character", {"rejected": "half \ud83d"}, "lone surrogate"),
    ("bad_character", {"user_id": "an\x00a"}, "user_id holds a NUL"),
    ("bad_character", {"split": "tr\x00ain"}, "split holds a NUL"),
    ("bad_conversation", {"chosen": [assistant("Rayleigh")]}, "different forms"),
    ("bad_conversation", {"chosen": [user("a")], "rejected": [user("b")]}, "by 'user' and 'user'"),
    ("bad_conversation", {"chosen": [assistant("a"), user("b"), assistant("c")], "rejected": [assistant("d")]}, "for 3 turns"),
    ("bad_conversation", {"chosen": [], "rejected": [assistant("d")]}, "chosen goes on for"),
]


@pytest.mark.parametrize(("code", "change", "message"), BAD_ROWS, ids=[f"{c}-{i}" for i, (c, _, _) in enumerate(BAD_ROWS)])
def test_a_bad_row_is_named(code: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    problems = check_row(GOOD | change)
    assert isinstance(problems, list)
    assert [problem.reason for problem in problems] == [code]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(problems[0].message)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | change) + "\n")
    report = validate(file)
    assert (report.n_good, report.n_bad, report.reasons, report.bad_rows[0].line) == (1, 1, {code: 1}, 2)


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_a_missing_column_names_those_there_are(column: str) -> None:
    row = {name: value for name, value in GOOD.items() if name != column}
    problems = check_row(row)
    assert isinstance(problems, list)
    assert [problem.reason for problem in problems] == [Reason.MISSING_COLUMN]
    assert f"no '{column}'; the columns of the row are: {', '.join(sorted(row))}" in str(problems)
    assert check_row({"chosen": "a", "rejected": "b"})[0].reason == Reason.MISSING_USER  # type: ignore[union-attr]


def test_all_reasons_of_a_row_are_given() -> None:
    problems = check_row(GOOD | {"user_id": " ", "chosen": "", "rejected": "['a']", "timestamp": "soon"})
    assert [p.reason for p in problems] == ["missing_user", "empty_text", "stringified_list", "bad_timestamp"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text", ["[1, 2, 3]", "['a' and 'b' are different", "[citation needed]", "{x: 1}", "'a', 'b'", "f(['a'])"]
)
def test_what_only_resembles_a_list_is_somebodys_answer(text: str) -> None:
    assert isinstance(check_row(GOOD | {"chosen": text}), Choice)


def test_the_four_shapes_and_their_mixtures_say_the_same() -> None:
    prompt, a, b = "Why is the sky blue?", "Rayleigh.", "No idea."
    talk = [{"role": "system", "content": "Be brief."}, user("Hello"), assistant("Hi"), user(prompt)]
    turns = tuple(Message(turn["role"], turn["content"]) for turn in talk)

    def read(**columns: Any) -> Choice:
        found = check_row({"user_id": 7, **columns})
        assert isinstance(found, Choice), found
        return found

    assert read(prompt=prompt, chosen=a, rejected=b)[:4] == ("7", prompt, a, b)
    assert read(chosen=f"{prompt} {a}", rejected=f"{prompt} {b}")[:4] == ("7", "", f"{prompt} {a}", f"{prompt} {b}")
    explicit = read(prompt=talk, chosen=[assistant(a)], rejected=[assistant(b)])
    assert explicit[:4] == ("7", turns, a, b)
    assert read(chosen=[*talk, assistant(a)], rejected=[*talk, assistant(b)]) == explicit
    assert read(prompt=talk, chosen=a, rejected=b) == explicit
    assert read(prompt=talk, chosen=[*talk, assistant(a)], rejected=[*talk, assistant(b)]) == explicit  # the prompt, told twice
    once = read(prompt=prompt, chosen=[user(prompt), assistant(a)], rejected=[user(prompt), assistant(b)])
    assert once[:4] == ("7", (Message("user", prompt),), a, b)
    assert read(prompt=prompt, chosen=[assistant(a)], rejected=[assistant(b)]) == once
    assert read(prompt=[], chosen=[assistant(a)], rejected=[assistant(b)])[:4] == ("7", "", a, b)
    # The last turn is the response even where one side is the beginning of the other.
    assert read(chosen=[user("x"), assistant("y")], rejected=[user("x"), assistant("z")]).prompt == (Message("user", "x"),)


@pytest.mark.parametrize(
    ("given_time", "seconds"),
    [
        (12, 12.0),
        (1.5, 1.5),
        ("1970-01-01T00:01:00Z", 60.0),
        ("1970-01-02", 86400.0),
        ("1970-01-01T01:00:00+01:00", 0.0),
        (None, None),
    ],
)
def test_timestamps(given_time: object, seconds: float | None) -> None:
    found = check_row(GOOD | {"timestamp": given_time})
    assert isinstance(found, Choice)
    assert found.timestamp == seconds


def choice_columns() -> st.SearchStrategy[dict[str, Any]]:
    words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
    texts = words.map(lambda w: f"-{w}")
    turn = st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant"]), words)
    optional = {
        "tie": st.booleans(),
        "weight": st.floats(0.1, 9),
        "margin": st.floats(0, 9),
        "timestamp": st.floats(0, 2e9),
        "conversation_id": words,
        "split": st.sampled_from(["train", "support"]),
        "prompt": words | st.lists(turn, max_size=3),
    }
    return st.fixed_dictionaries({"user_id": texts, "chosen": texts, "rejected": texts}, optional=optional)


@given(choice_columns())
def test_canonical_rows_read_back_as_the_same_choice(row: dict[str, Any]) -> None:
    found = check_row(row)
    if isinstance(found, Choice):
        assert check_row(json.loads(json.dumps(as_row(found)))) == found


LINES = st.sampled_from(
    [
        *(json.dumps(GOOD | {"user_id": u, "margin": m}).encode() for u in "abc" for m in (1, 2)),
        *(json.dumps(GOOD | change).encode() for _, change, _ in BAD_ROWS[:20:3]),
        json.dumps(GOOD | {"chosen": GOOD["rejected"], "rejected": GOOD["chosen"], "user_id": "a"}).encode(),
        *(
            b"{",
            b"[1]",
            b"null",
            b"\xff\xfe{}",
            b"",
            b"   ",
            b"\r",
            b'{"a": 1}\r',
            b"\xef\xbb\xbf{}",
            b'"text"',
            b"[" * 3000,
            b"\x00",
            b"9" * 5000,
        ),
    ]
) | st.binary(max_size=30).map(lambda b: b.replace(b"\n", b""))


@given(st.lists(LINES, min_size=1, max_size=25), st.booleans())
def test_nothing_is_lost(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], final: bool) -> None:
    folder = tmp_path_factory.mktemp("rows")
    file, good, bad = folder / "in.jsonl", folder / "good.jsonl", folder / "bad.jsonl"
    lines = [b"{}", *lines]  # a first line that is neither empty nor a byte order mark nor an array
    file.write_bytes(b"\n".join(lines) + b"\n" * final)
    report = validate(file, good=good, quarantine=bad)
    assert report.rows == report.n_good + report.n_bad
    numbered = {number: line for number, line in enumerate(lines, 1) if line.strip()}
    assert len(numbered) == report.rows
    entries = [json.loads(line) for line in bad.read_text().splitlines()]
    assert [entry["line"] for entry in entries] == [row.line for row in report.bad_rows]
    for entry in entries:
        raw = base64.b64decode(entry["raw_base64"]) if "raw_base64" in entry else entry["raw"].encode("utf-8")
        assert raw == numbered.pop(entry["line"])
        assert entry["reasons"]
    kept = [check_row(json.loads(line)) for line in good.read_text().splitlines()]
    assert kept == [check_row(json.loads(line)) for line in numbered.values()]  # what is left over is what was good
    if kept:
        assert validate(good).ok


def test_broken_lines_are_named_and_cost_nothing_beside_them(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [json.dumps(GOOD | {"user_id": str(i)}).encode() for i in range(4)]
    file.write_bytes(
        b"\xef\xbb\xbf" + rows[0] + b'\r\n{"user_id": \n\n[1]\n' + rows[1] + b"\n" + rows[2][:30] + b"\xe9" + b"\n" + rows[3]
    )
    report = validate(file)
    assert [(row.line, [p.reason.value for p in row.problems]) for row in report.bad_rows] == [
        (2, ["broken_json"]),
        (4, ["not_an_object"]),
        (6, ["bad_encoding"]),
    ]
    assert (report.n_good, report.n_blank, report.rows) == (3, 1, 6)
    assert "byte 31 of the line is 0xe9" in str(report.bad_rows[2])
    assert report.summary(1).startswith(f"{file}: 3 of 6 rows are good, 3 are bad (1 broken_json")
    assert report.summary(1).endswith("and 2 more")


def test_repeats_and_contradictions(tmp_path: Path) -> None:
    swapped = {"chosen": GOOD["rejected"], "rejected": GOOD["chosen"]}
    rows: list[tuple[dict[str, Any], str | None]] = [
        (GOOD, None),
        (GOOD | {"tie": False, "weight": 2.0}, "duplicate"),  # the same choice; the weight is no other answer
        (GOOD | swapped, "contradiction"),
        (GOOD | swapped, "contradiction"),  # of line 1 again, not a duplicate of a row that was set aside
        (GOOD | swapped | {"user_id": "ben"}, None),  # another person may disagree
        (GOOD | swapped | {"prompt": "Why?"}, None),  # so may this one about another prompt
        (GOOD | {"tie": True}, None),  # a tie beside a choice contradicts nothing
        (GOOD | swapped | {"tie": True}, "duplicate"),  # but a tie has no order
        (GOOD | {"user_id": "cy", "timestamp": 1}, None),
        (GOOD | {"user_id": "cy", "timestamp": 2}, None),  # asked again later, answered the same: two observations
        (GOOD | {"user_id": "cy", "timestamp": 2}, "duplicate"),
        (GOOD | {"user_id": "cy", "timestamp": 3, **swapped}, "contradiction"),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row, _ in rows))
    report = validate(file)
    found = {row.line: row.problems[0] for row in report.bad_rows}
    assert {line: problem.reason.value for line, problem in found.items()} == {
        i: code for i, (_, code) in enumerate(rows, 1) if code
    }
    assert "line 1" in found[2].message
    assert "line 1" in found[4].message
    assert "line 7" in found[8].message
    assert "line 10" in found[11].message


def test_truncated_and_broken_gzip_keep_what_came_before(tmp_path: Path) -> None:
    rows = "".join(json.dumps(GOOD | {"user_id": f"user {i * 7919}"}) + "\n" for i in range(4000))
    whole = gzip.compress(rows.encode())
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(whole[: len(whole) // 2])
    report = validate(file, good=tmp_path / "good.jsonl", quarantine=tmp_path / "bad.jsonl")
    assert report.reasons == {"truncated": 1}
    assert 1000 < report.n_good < 3000
    assert report.bad_rows[0].line == report.n_good + 1
    partial = json.loads((tmp_path / "bad.jsonl").read_text())["raw"]
    assert rows.startswith((tmp_path / "good.jsonl").read_text() + partial)
    file.write_bytes(b"\x1f\x8bnot gzip at all")
    assert validate(file).reasons == {"truncated": 1}


CSV_HEAD = "user_id,prompt,chosen,rejected,tie,weight,timestamp,note\n"


def test_csv_types_and_broken_rows(tmp_path: Path) -> None:
    file, bad = tmp_path / "rows.csv", tmp_path / "bad.jsonl"
    text = (
        "\ufeff" + CSV_HEAD + 'ana,p,"two\nlines, ""quoted""",no,true,,1970-01-02,x\n'
        "ben,p,yes,no,,2.5,12,\n"
        "\n"
        "cy,p,yes,no\n"  # line 5: too few fields
        'di,p,"said "hi" to me",no,,,,\n'  # line 6: broken quoting, which a lenient reader changes without a word
        "ed,p,yes,no,perhaps,,,\n"  # line 7
        "flo,p,yes,no,,much,,\n"  # line 8
        'gus,p,"never closed,no,,,,\n'  # line 9: swallows what follows
        "hal,p,yes,no,0,,,\n"
        "ida,,yes,,,,,\n"  # line 11: empty
    )
    file.write_text(text, encoding="utf-8")
    report = validate(file, good=tmp_path / "good.jsonl", quarantine=bad)
    assert {row.line: row.problems[0].reason.value for row in report.bad_rows} == {
        6: "wrong_field_count",
        7: "broken_csv",
        8: "wrong_type",
        9: "wrong_type",
        10: "broken_csv",
        12: "empty_text",
    }
    assert (report.n_good, report.n_blank, report.rows) == (3, 1, 9)
    assert report.ignored_columns == {"note": 1}
    raws = {entry["line"]: entry["raw"] for entry in map(json.loads, bad.read_text().splitlines())}
    assert raws[10] == 'gus,p,"never closed,no,,,,'
    pairs = load_pairs(tmp_path / "good.jsonl")
    assert pairs.user_ids == ("ana", "ben", "hal")
    assert pairs.texts[0].response == 'two\nlines, "quoted"'
    assert (pairs.tie.tolist(), pairs.weight.tolist()) == ([True, False, False], [1.0, 2.5, 1.0])
    assert pairs.timestamp[:2].tolist() == [86400.0, 12.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "is empty"),
        ("rows.jsonl", b"\n\n", "has no rows"),
        ("rows.jsonl", b"[\n{}]", "JSON array"),
        ("rows.jsonl", "{}".encode("utf-16"), "UTF-16"),
        ("rows.csv", b"user_id,chosen\na,b\n", "no column rejected; its columns are user_id, chosen"),
        ("rows.csv", b"user_id;chosen;rejected\na;b;c\n", "is the delimiter a comma"),
        ("rows.csv", b"user_id,chosen,rejected,chosen\n", "more than one column chosen"),
        ("rows.csv", b'user_id,"cho"sen,rejected\n', "header is unreadable"),
        ("rows.csv", CSV_HEAD.encode(), "has no rows"),
        ("rows.parquet", b"PAR1 but no more", "cannot be read as Parquet"),
        ("rows.txt", b"x", "named like no known format"),
    ],
)
def test_a_file_without_any_good_row_is_an_error(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        validate(tmp_path / name, good=tmp_path / "good.jsonl")
    assert not list(tmp_path.glob("good*"))  # and no half of an output


def test_outputs_never_overwrite(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD))
    for good, bad in ((file, None), (None, file), (tmp_path / "x", tmp_path / "x")):
        with pytest.raises(DataError, match="would overwrite"):
            validate(file, good=good, quarantine=bad)
    assert json.loads(file.read_text()) == GOOD


def test_a_very_long_line_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE", 5000)
    monkeypatch.setattr(sources, "_CHUNK", 700)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + "x" * 12345 + "\n" + json.dumps(GOOD | {"user_id": "ben"}))
    report = validate(file)
    assert (report.n_good, report.bad_rows[0].line, report.reasons) == (2, 2, {"line_too_long": 1})
    assert "12,345 bytes" in report.bad_rows[0].problems[0].message
    file.write_text(json.dumps(GOOD) + "\n" + "y" * 9999)
    assert "9,999 bytes" in validate(file).bad_rows[0].problems[0].message


def test_unknown_columns_are_kept_and_counted(tmp_path: Path) -> None:
    good = tmp_path / "good.jsonl.gz"
    rows = [GOOD | {"group": "x", "empty": None}, GOOD | {"user_id": "ben", "group": "half \ud83d"}]
    report = validate(rows, good=good, quarantine=tmp_path / "bad.jsonl")
    assert report.ignored_columns == {"group": 2}
    assert report.source == "rows of a list"
    with gzip.open(good, "rt", encoding="utf-8") as file:
        assert [json.loads(line)["group"] for line in file] == ["x", "half \ud83d"]
    validate([GOOD | {"chosen": {1, 2}}, GOOD], quarantine=tmp_path / "bad.jsonl")
    assert json.loads((tmp_path / "bad.jsonl").read_text())["row"]["chosen"] == "{1, 2}"


def test_the_report_lists_so_many_and_counts_all() -> None:
    report = validate([GOOD, *({"user_id": "a"} for _ in range(MAX_LISTED + 5))])
    assert (report.n_bad, len(report.bad_rows), report.reasons) == (
        MAX_LISTED + 5,
        MAX_LISTED,
        {"missing_column": MAX_LISTED + 5},
    )


@pytest.mark.slow
def test_a_file_larger_than_memory_is_streamed(tmp_path: Path) -> None:
    # 300 MB of rows; the memory beyond what the import itself took stays under 30 MB.
    file, script = tmp_path / "rows.jsonl", tmp_path / "check.py"
    filler = "word " * 20_000
    with file.open("w") as out:
        for i in range(3000):
            out.write(json.dumps(GOOD | {"user_id": str(i), "chosen": filler}) + "\n")
    script.write_text(
        "import resource, sys\n"
        "from palate.data.validation import validate\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "report = validate(sys.argv[1])\n"
        "print(report.n_good, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    assert file.stat().st_size > 290e6
    env = {"PYTHONPATH": str(Path(sources.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), str(file)], capture_output=True, text=True, env=env, check=True)
    rows, grown = map(int, done.stdout.split())
    assert rows == 3000
    assert grown < 30_000  # kilobytes


def test_real_files(shared: Path) -> None:
    # 75 rows with identical sides and 12 contradictions. 118 duplicates: 101 among the strict rows, and 17 ties, 11 of them with
    # the two sides in the other order. (shared/data/README counts the 101.)
    report = validate(shared / "convarg" / "pairs.jsonl.gz")
    assert (report.rows, report.n_good) == (84_445, 84_240)
    assert report.reasons == {"duplicate": 118, "identical_sides": 75, "contradiction": 12}
    ties = sum("the same tie" in row.problems[0].message for row in report.bad_rows)
    assert ties == 17
    # Four responses in PRISM are the prompt again.
    report = validate(shared / "prism-subset" / "pairs.jsonl.gz")
    assert (report.rows, report.reasons, report.ignored_columns) == (2551, {"echoes_prompt": 4}, {"conversation_type": 2547})
    assert [row.line for row in report.bad_rows][:2] == [527, 1885]
