"""Rows as they stand in a file, one at a time, each with its line number and its bytes.

Nothing is judged here but the container: a line that is not JSON, a record with too many fields, an archive that ends early.
Such a record carries its problem and the reading goes on, so one bad line never costs the good ones beside it. Files are
streamed: memory is one line (JSON Lines, CSV) or one batch (Parquet), whatever the size of the file.
"""

import csv
import gzip
import json
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from palate.data.rows import REQUIRED, Problem, Reason
from palate.errors import DataError, MissingExtraError

MAX_LINE = 16 * 2**20  # bytes; a longer "line" is another kind of file, and reading it whole could exhaust the memory
_CHUNK = 2**18
_BATCH = 1024  # rows of a Parquet file held at a time
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_BOM, _GZIP, _UTF16 = b"\xef\xbb\xbf", b"\x1f\x8b", (b"\xff\xfe", b"\xfe\xff")


class Record(NamedTuple):
    """One record of a file: where it starts, what stood there, and its columns or the reason why there are none."""

    line: int  # from 1; for Parquet and for rows in memory the number of the row
    raw: bytes | None  # as in the file, without the line's end; None for Parquet and for rows in memory
    row: object
    problem: Problem | None = None
    blank: bool = False  # a line with nothing in it: counted, neither good nor bad


def file_format(path: Path, wanted: str | None = None) -> str:
    """'jsonl', 'csv', 'parquet' or 'polis': `wanted` if given, else by what is there. Raises `DataError` for anything else."""
    formats = ("jsonl", "csv", "parquet", "polis")
    if wanted is not None and wanted not in formats:
        raise DataError(f"format is {wanted!r}; expected one of {', '.join(formats)}, or None to go by the name")
    if not path.exists():
        raise DataError(f"{path} does not exist; expected a file of rows or a Polis export folder")
    if path.is_dir():
        if wanted not in (None, "polis") or not (path / "participants-votes.csv").is_file():
            inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
            raise DataError(f"{path} is a folder with {inside}; expected a file, or a Polis export with participants-votes.csv")
        return "polis"
    if wanted == "polis":
        raise DataError(f"{path} is a file; format 'polis' expects the export's folder")
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    found = wanted or _SUFFIXES.get(suffixes[-1] if suffixes else "")
    if found is None:
        raise DataError(f"{path} is named like no known format; expected {', '.join(_SUFFIXES)} (or .gz of it), or give format=")
    return found


def records(path: Path, file_format: str, required: Sequence[str] = REQUIRED) -> Iterator[Record]:
    """The records of a 'jsonl', 'csv' or 'parquet' file with the columns `required`, one at a time.

    Raises `DataError` where no record of the file can be good: an empty or foreign file, columns that are not there.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; expected rows with {', '.join(required)}")
    if file_format == "parquet":
        return parquet_records(path, required)
    return _csv(path, required) if file_format == "csv" else _jsonl(path)


def _lines(path: Path) -> Iterator[tuple[int, bytes, Problem | None]]:
    """(line number, bytes without "\\n", what is wrong) of a plain or compressed file; the byte order mark is dropped."""
    with path.open("rb") as file:
        compressed = file.read(2) == _GZIP
        file.seek(0)
        stream: IO[bytes] = gzip.GzipFile(fileobj=file) if compressed else file  # type: ignore[assignment]
        number, rest, dropped = 1, b"", 0
        while True:
            broken: Exception | None = None
            try:
                chunk = stream.read1(_CHUNK)  # type: ignore[attr-defined]  # both kinds have it; IO does not say so
            except (EOFError, OSError, zlib.error) as error:
                if not compressed:
                    raise
                chunk, broken = b"", error
            if number == 1 and not rest and chunk:
                if chunk.startswith(_UTF16):
                    raise DataError(f"{path} starts like UTF-16; expected UTF-8 (iconv -f UTF-16 -t UTF-8)")
                chunk = chunk.removeprefix(_BOM)
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield number, line, _too_long(dropped + len(line)) if dropped else None
                number, dropped = number + 1, 0
            if len(rest) > MAX_LINE:  # keep the beginning of the line, to recognise it by, and pass over the rest
                dropped, rest = dropped + len(rest) - 1000, rest[:1000]
            if broken is not None:
                message = f"the compressed file ends or breaks in or before line {number} ({broken}); get the file again"
                yield number, rest, Problem(Reason.TRUNCATED, message)
                return
            if not chunk:
                if rest or dropped:
                    yield number, rest, _too_long(dropped + len(rest)) if dropped else None
                return


def _too_long(size: int) -> Problem:
    return Problem(Reason.LINE_TOO_LONG, f"the line has {size:,} bytes; expected at most {MAX_LINE:,} (is this JSON Lines?)")


def _encoding_problem(raw: bytes) -> Problem | None:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"byte {error.start + 1} of the line is 0x{raw[error.start]:02x}, which is not UTF-8; save the file as UTF-8"
        return Problem(Reason.BAD_ENCODING, message)
    return None


def _jsonl(path: Path) -> Iterator[Record]:
    for number, raw, problem in _lines(path):
        problem = problem or _encoding_problem(raw)
        if problem is not None or not raw.strip():
            yield Record(number, raw, None, problem, blank=problem is None)
            continue
        if number == 1 and raw.lstrip()[:1] == b"[":
            raise DataError(f"{path} is a JSON array; expected JSON Lines, one object a line (jq -c '.[]' converts it)")
        try:
            row = json.loads(raw.decode("utf-8"))  # given bytes, json would guess at UTF-16 and UTF-32
        except (ValueError, RecursionError) as error:
            yield Record(number, raw, None, Problem(Reason.BROKEN_JSON, f"not JSON: {error}; expected one object a line"))
        else:
            yield Record(number, raw, row)


class _Feed:
    """Lines for `csv.reader`, which remembers what a record was made of and can take lines back."""

    def __init__(self, lines: Iterator[tuple[int, bytes, Problem | None]]):
        self._lines = lines
        self._waiting: deque[tuple[int, bytes, Problem | None]] = deque()
        self.used: list[tuple[int, bytes, Problem | None]] = []

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self._lines)
        self.used.append(line)
        return line[1].decode("utf-8", "surrogateescape") + "\n"

    def take_back(self, lines: Sequence[tuple[int, bytes, Problem | None]]) -> None:
        self._waiting.extendleft(reversed(lines))


_CELLS = threading.Lock()  # `csv` has one limit of a cell for the whole process


def _next_fields(reader: Iterator[list[str]]) -> list[str]:
    """The next record, whose cells may be as long as a line: the limit is set for it and put back. A call for every row, so no
    context manager, which made reading 1.2 to 1.5 times as long."""
    with _CELLS:
        before = csv.field_size_limit(MAX_LINE)
        try:
            return next(reader)
        finally:
            csv.field_size_limit(before)


def _csv_problem(error: csv.Error) -> Problem:
    if str(error).startswith("field larger than field limit"):  # of several lines: a line that long is a problem of its own
        message = f"a cell goes on for more than {MAX_LINE:,} characters; expected at most that (is its closing quote missing?)"
        return Problem(Reason.LINE_TOO_LONG, message)
    return Problem(Reason.BROKEN_CSV, f"broken CSV quoting: {error}; expected quotes in a text to be doubled")


def _csv_records(path: Path) -> Iterator[tuple[int, bytes, list[str], Problem | None]]:
    feed = _Feed(_lines(path))
    reader = csv.reader(feed, strict=True)  # not strict, it repairs '"He said "hi" to me"' into another text without a word
    width: int | None = None
    while True:
        feed.used = []
        problem: Problem | None = None
        try:
            fields = _next_fields(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fields, problem = [], _csv_problem(error)
        if problem is None and fields and width is not None and len(fields) != width:
            message = f"{len(fields)} fields where the header has {width}; quote the texts that hold commas or line breaks"
            problem = Problem(Reason.WRONG_FIELD_COUNT, message)
        used = feed.used
        if problem is not None and len(used) > 1:
            # A stray quote swallows the good records after it: give them back, only the first line is bad.
            feed.take_back(used[1:])
            used = used[:1]
            reader = csv.reader(feed, strict=True)
        number, raw = used[0][0], b"\n".join(raw for _, raw, _ in used)
        problem = next((p for _, _, p in used if p is not None), None) or _encoding_problem(raw) or problem
        if width is None and problem is None and fields:
            width = len(fields)
        yield number, raw, fields, problem


def csv_records(path: Path, required: Sequence[str]) -> Iterator[Record]:
    """Records of a CSV file with a header, every cell as text. Raises `DataError` where a required column is not there."""
    header: list[str] | None = None
    for number, raw, fields, problem in _csv_records(path):
        if header is None:
            if problem is not None:
                raise DataError(f"{path}, line {number}: the header is unreadable: {problem.message}")
            if fields:
                header = _header(path, [name.strip() for name in fields], required)
        elif problem is None and fields:
            yield Record(number, raw, dict(zip(header, fields, strict=True)))
        else:
            yield Record(number, raw, None, problem, blank=problem is None)


def _csv(path: Path, required: Sequence[str]) -> Iterator[Record]:
    for record in csv_records(path, required):
        yield record._replace(row=_typed(record.row)) if isinstance(record.row, dict) else record


def _header(path: Path, names: list[str], required: Sequence[str]) -> list[str]:
    missing = [name for name in required if name not in names]
    if missing:
        hint = " (is the delimiter a comma?)" if len(names) == 1 else ""
        raise DataError(f"{path} has no column {', '.join(missing)}; its columns are {', '.join(names)}{hint}; rename them")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path} has more than one column {', '.join(twice)}; expected different names")
    return names


def _typed(cells: dict[str, str]) -> dict[str, Any]:
    """CSV has only text: numbers and truth values are read as what they look like, an empty optional cell is nothing."""
    row: dict[str, Any] = dict(cells)
    for name in ("tie", "weight", "margin", "timestamp", "conversation_id", "split", "prompt"):
        if name not in row:
            continue
        cell = cells[name].strip()
        if not cell:
            row[name] = None
        elif name == "tie":
            row[name] = {"true": True, "1": True, "false": False, "0": False}.get(cell.lower(), cells[name])
        elif name in ("weight", "margin", "timestamp"):
            try:
                row[name] = float(cell)
            except ValueError:
                row[name] = cells[name]  # the row check says what was expected (or the timestamp is ISO-8601)
    return row


def parquet_records(path: Path, required: Sequence[str]) -> Iterator[Record]:
    """Records of a Parquet file that has the columns `required`, a batch of rows at a time."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtraError("reading Parquet needs pyarrow; install it with: pip install 'palate[data]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            _header(path, list(file.schema_arrow.names), required)
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(number, None, row)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}; expected a whole Parquet file") from error


def rows_in_memory(rows: Iterable[object]) -> Iterator[Record]:
    """Records of a `datasets.Dataset` or of any iterable of dicts; a `Record` among them keeps the line that it has.

    Raises `DataError` for what only looks like one.
    """
    if isinstance(rows, dict):
        keys = ", ".join(map(str, rows))
        raise DataError(f"got a dict of {keys}; expected rows: one split of a DatasetDict, or a list of dicts (one a row)")
    if hasattr(rows, "to_dict") and hasattr(rows, "iloc"):
        raise DataError("got a data frame; expected rows: pass frame.to_dict('records')")
    if not hasattr(rows, "__iter__"):
        raise DataError(f"got a {type(rows).__name__}; expected a path, a datasets.Dataset, or an iterable of dicts")
    for number, row in enumerate(rows, 1):
        yield row if isinstance(row, Record) else Record(number, None, _listed(row))


def _listed(value: object) -> object:
    """The value with lists for NumPy's arrays, which is what a data frame makes of lists, however deep they are."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [_listed(one) for one in value]
    return {name: _listed(one) for name, one in value.items()} if isinstance(value, dict) else value
