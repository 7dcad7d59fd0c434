"""Says of every row of a file whether it can be learnt from, and loses none: the good are written on, the bad set aside.

`validate` and the readers go through the same `checked`, so what one accepts the other does.
"""

import base64
import gzip
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from palate.data.pairs import Choice
from palate.data.polis import polis_choices
from palate.data.rows import COLUMNS, Problem, Repeats, as_row, check_row
from palate.data.sources import Record, file_format, records, rows_in_memory
from palate.errors import DataError

MAX_LISTED = 10_000  # bad rows named in a report; the quarantine file and the counts have all of them


class BadRow(NamedTuple):
    """A row that was refused, and everything wrong with it."""

    line: int
    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        return f"line {self.line}: " + "; ".join(f"{problem.message} [{problem.reason}]" for problem in self.problems)


@dataclass(frozen=True)
class ValidationReport:
    """What a file held: `rows` = `n_good` + `n_bad`; blank lines are none of them.

    `reasons` counts bad rows by reason code (a row can have several); `bad_rows` are the first `MAX_LISTED`; `ignored_columns`
    counts the rows that had a value in a column nothing reads. Of a Polis export, rows are participants, `n_choices` their pairs.
    """

    source: str
    rows: int
    n_good: int
    n_bad: int
    n_blank: int
    n_choices: int
    reasons: Mapping[str, int]
    bad_rows: tuple[BadRow, ...]
    ignored_columns: Mapping[str, int]

    @property
    def ok(self) -> bool:
        """Whether there was at least one row and no bad one."""
        return self.n_bad == 0 and self.n_good > 0

    def summary(self, most: int = 5) -> str:
        """Counts by reason and the first `most` bad rows, one a line. Quotes the beginning of texts."""
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(self.reasons.items(), key=lambda item: -item[1]))
        head = f"{self.source}: {self.n_good} of {self.rows} rows are good" + (
            f", {self.n_bad} are bad ({counts})" if counts else ""
        )
        shown = [f"  {row}" for row in self.bad_rows[:most]]
        left = self.n_bad - len(shown)
        return "\n".join([head, *shown, *([f"  and {left} more"] if left > 0 and shown else [])])


def checked(
    source: "str | os.PathLike[str] | Iterable[object]", format: str | None
) -> Iterator[tuple[Record, list[Choice], list[Problem]]]:
    """(record, its choices, its problems) for everything in a file, a Polis export or rows in memory, repeats included.

    A stream: memory is one record and the hashes of `Repeats`. A record has choices or problems, never both; a blank one neither.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        kind = file_format(path, format)
        if kind == "polis":
            yield from polis_choices(path)
            return
        stream = records(path, kind)
    else:
        stream = rows_in_memory(source)
    repeats = Repeats()
    for record in stream:
        if record.problem is not None or record.blank:
            yield record, [], [record.problem] if record.problem else []
            continue
        found = check_row(record.row)
        if not isinstance(found, Choice):
            yield record, [], found
        elif (repeat := repeats.check(found, record.line)) is not None:
            yield record, [], [repeat]
        else:
            yield record, [found], []


class Tally:
    """Counts while the rows go by; `report` is what came of it."""

    def __init__(self, source: object):
        self.source = str(source) if isinstance(source, (str, os.PathLike)) else f"rows of a {type(source).__name__}"
        self.good = self.bad = self.blank = self.choices = 0
        self.reasons: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self.bad_rows: list[BadRow] = []

    def add(self, record: Record, choices: list[Choice], problems: list[Problem]) -> None:
        """One more record."""
        if problems:
            self.bad += 1
            self.reasons.update({problem.reason.value for problem in problems})
            if len(self.bad_rows) < MAX_LISTED:
                self.bad_rows.append(BadRow(record.line, tuple(problems)))
        elif record.blank:
            self.blank += 1
        else:
            self.good += 1
            self.choices += len(choices)
            self.ignored.update(_unknown(record).keys())

    def report(self) -> ValidationReport:
        """The counts so far."""
        return ValidationReport(
            source=self.source,
            rows=self.good + self.bad,
            n_good=self.good,
            n_bad=self.bad,
            n_blank=self.blank,
            n_choices=self.choices,
            reasons=dict(self.reasons),
            bad_rows=tuple(self.bad_rows),
            ignored_columns=dict(self.ignored),
        )


def _unknown(record: Record) -> dict[str, Any]:
    """The columns with a value that nothing reads."""
    row = record.row if isinstance(record.row, Mapping) else {}
    return {str(name): value for name, value in row.items() if name not in COLUMNS and value is not None and value != ""}


@contextmanager
def _written(path: Path) -> Iterator[TextIO]:
    """A text file that stands under `path` only once it is whole."""
    partial = path.with_name(path.name + ".partial")
    errors = "backslashreplace"  # half a character in a column that nothing reads: inside JSON, "\\ud800" is its proper spelling
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(partial, "wt", encoding="utf-8", errors=errors, newline="\n") as file:
                yield file
        else:
            with partial.open("w", encoding="utf-8", errors=errors, newline="\n") as file:
                yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _quarantined(record: Record, problems: list[Problem]) -> str:
    entry: dict[str, Any] = {
        "line": record.line,
        "reasons": [{"code": problem.reason.value, "message": problem.message} for problem in problems],
    }
    if record.raw is None:
        entry["row"] = record.row
    else:
        try:
            entry["raw"] = record.raw.decode("utf-8")
        except UnicodeDecodeError:
            entry["raw_base64"] = base64.b64encode(record.raw).decode("ascii")
    return json.dumps(entry, default=repr)  # ASCII: a lone surrogate or a control character cannot break the file itself


def validate(
    source: "str | os.PathLike[str] | Iterable[object]",
    *,
    good: "str | os.PathLike[str] | None" = None,
    quarantine: "str | os.PathLike[str] | None" = None,
    format: str | None = None,
) -> ValidationReport:
    """Check every row; write the good ones on and set the bad ones aside. One streaming pass, memory as of `Repeats`.

    Args:
        source: what `load_pairs` takes.
        good: JSON Lines of the good rows in canonical form (TRL columns, the prompt explicit), unknown columns kept; compressed
            if named `.gz`.
        quarantine: JSON Lines of the bad rows: `line`, `reasons` (code and message), and the line itself as `raw` (`raw_base64`
            if it is not UTF-8; of a line over `sources.MAX_LINE` bytes only its ends), or as `row` where there was no line.
        format: 'jsonl', 'csv', 'parquet' or 'polis'; by default by the name.

    Returns:
        The report; `report.ok` says whether every row is good. Both files are written whole or not at all.

    Raises:
        DataError: a source of which no row can be good: not there, empty, of another kind, without a required column; or an
            output that would overwrite the source or the other output.
    """
    outputs = [Path(path).resolve() for path in (good, quarantine) if path is not None]
    inputs = [Path(source).resolve()] if isinstance(source, (str, os.PathLike)) else []
    if len({*outputs, *inputs}) < len(outputs) + len(inputs):
        raise DataError(
            f"the outputs {[str(path) for path in outputs]} would overwrite the source or each other; name other files"
        )
    tally = Tally(source)
    with ExitStack() as stack:
        good_file = None if good is None else stack.enter_context(_written(Path(good)))
        bad_file = None if quarantine is None else stack.enter_context(_written(Path(quarantine)))
        for record, choices, problems in checked(source, format):
            tally.add(record, choices, problems)
            if good_file is not None:
                extra = _unknown(record) if len(choices) == 1 else {}
                good_file.writelines(
                    json.dumps(as_row(choice) | extra, ensure_ascii=False, default=repr) + "\n" for choice in choices
                )
            if bad_file is not None and problems:
                bad_file.write(_quarantined(record, problems) + "\n")
        report = tally.report()
        if report.rows == 0:
            raise DataError(f"{report.source} has no rows; expected at least one")
    return report
