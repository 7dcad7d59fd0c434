"""Files that other people published, in columns of their own: every record becomes rows of ours, or a bad row with its line.

Each loader says what one of its records means; the reading, the checks of `palate.data.rows`, the counts and the search for
repeats are the same for all of them and the same as for our own files.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from palate.data.pairs import Choice, PairSet
from palate.data.readers import some
from palate.data.rows import Problem, Reason, Repeats, check_row
from palate.data.sources import Record, csv_records, file_format, records, rows_in_memory
from palate.data.splits import SIDES, Split
from palate.data.validation import Tally, ValidationReport
from palate.errors import DataError

Source = str | os.PathLike[str] | Iterable[Any]
Row = dict[str, Any]
Meaning = Callable[[Mapping[str, Any]], Iterable[Row | Problem]]


def records_of(source: Source, required: Sequence[str]) -> Iterator[Record]:
    """The records of a JSON Lines, CSV (either may be compressed) or Parquet file, of several such files, or of rows in memory.

    Raises `DataError` for a file that is not there, is empty, or lacks a required column (of JSON Lines every row has its own
    columns, so there the row is bad). A stream: memory is one line or batch.
    """
    if isinstance(source, (list, tuple)) and source and all(isinstance(one, (str, os.PathLike)) for one in source):
        return chain.from_iterable(records_of(one, required) for one in source)
    if not isinstance(source, (str, os.PathLike)):
        return rows_in_memory(source)
    path = Path(source)
    kind = file_format(path)
    if kind == "polis":
        raise DataError(f"{path} is the folder of a Polis export; expected a file of {', '.join(required)}")
    if kind == "csv" and path.stat().st_size:
        return csv_records(path, required)  # every cell as text, where `records` reads the numbers of our own columns
    return records(path, kind, required)


def said_by(record: Record, meaning: Callable[[Mapping[str, Any]], Any]) -> Any:
    """What `meaning` makes of a record, or a `Problem`: a broken line, a missing column, a value it refuses (`DataError`)."""
    if record.problem is not None:
        return record.problem
    if not isinstance(record.row, Mapping):
        return Problem(Reason.NOT_AN_OBJECT, f"the row is {record.row!r:.60}; expected an object")
    try:
        return meaning(record.row)
    except KeyError as error:
        return Problem(Reason.MISSING_COLUMN, f"no {error}; the columns of the row are: {', '.join(map(str, record.row))}")
    except DataError as error:
        return Problem(Reason.WRONG_TYPE, str(error))


def meant_by(
    numbered: Iterable[tuple[int, Record]],
    meaning: Callable[[Mapping[str, Any]], Any],
    tally: Tally,
    *,
    name: str,
    place: str,
    advice: str = "",
) -> Iterator[tuple[int, Any]]:
    """(number, what it means) of every record that means something; the others go into the tally, as if they were not there.

    Raises `DataError` with the first of them where none does: `place` and its number, what is wrong, and the advice.
    """
    first, good = "", False
    for number, record in numbered:
        if record.blank:
            continue
        found = said_by(record, meaning)
        if isinstance(found, Problem):
            first = first or f"{place} {number}: {found.message}{advice}"
            tally.add(record, [], [found._replace(message=f"{name}: {found.message}")])
        else:
            good = True
            yield number, found
    if first and not good:
        raise DataError(first)


def choices_in(
    parts: Sequence[tuple[Source, Meaning]], required: Sequence[str], tally: Tally | None = None
) -> tuple[PairSet, ValidationReport]:
    """The good choices of some sources, each with what its records mean, and the report on the rest.

    A record may mean several choices (or say what is wrong with one of them), each of which is a row of the report; a record of
    which nothing can be made is one bad row. Of several sources a bad row's message says which one its line is in, from 1. A
    `tally` of what was left out before goes on in the report.

    Raises:
        DataError: no good choice at all, or what `records_of` raises.
    """
    tally, repeats = tally or Tally(parts[0][0]), Repeats()

    def good() -> Iterator[Choice]:
        for number, (source, meaning) in enumerate(parts, start=1):
            where = f"source {number}: " if len(parts) > 1 else ""
            for record in records_of(source, required):
                if record.blank:
                    tally.add(record, [], [])
                    continue
                rows = said_by(record, lambda row, meaning=meaning: list(meaning(row)))  # type: ignore[misc]
                for row in [rows] if isinstance(rows, Problem) else rows:
                    choices, problems = _judged(row, record.line, repeats)
                    problems = [problem._replace(message=where + problem.message) for problem in problems]
                    tally.add(record._replace(row=row), choices, problems)
                    yield from choices

    pairs = PairSet.from_choices(good())
    return some(pairs, tally.report()), tally.report()


def _judged(row: "Row | Problem", line: int, repeats: Repeats) -> tuple[list[Choice], list[Problem]]:
    if isinstance(row, Problem):
        return [], [row]
    found = check_row(row)
    if not isinstance(found, Choice):
        return [], found
    repeat = repeats.check(found, line)
    return ([found], []) if repeat is None else ([], [repeat])


def with_split(pairs: PairSet, split: Split) -> PairSet:
    """The same choices with `split` written into their column, as `given_split` and `palate compare` read it."""
    labels = np.full(len(pairs), None, dtype=np.object_)
    for side in SIDES:
        labels[getattr(split, side)] = side
    return replace(pairs, split=labels)


def text(row: Mapping[str, Any], column: str) -> str:
    """The text in a column. Raises `DataError` for anything else, `KeyError` where there is no such column."""
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{column} is {value!r:.60} ({type(value).__name__}); expected a text")
    return value


def number(row: Mapping[str, Any], column: str) -> float:
    """The finite number in a column, which CSV writes as text. Raises `DataError` for anything else."""
    value = row[column]
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if isinstance(value, bool) or not np.isfinite(found):
        raise DataError(f"{column} is {value!r:.60}; expected a finite number")
    return found
