"""The rows of one encoder on disk: segments of raw numbers that only grow, and an index that says which text has which row.

A batch is written to a segment and flushed to the disk before the index names it, in one transaction of SQLite: whoever reads
the index sees whole batches only, whatever was killed. A process appends only to a segment that it has locked, and the bytes
behind the last row that the index names are free to be written again. Nobody's text is stored, only its SHA-256.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from shlex import quote
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from palate.data.pairs import Text
from palate.encoders.base import BatchedEncoder, digest
from palate.errors import ModelFileError

FORMAT = "palate cache"
VERSION = 1
ENCODER, INDEX, LOCK = "encoder.json", "index.sqlite", "lock"
PATIENCE = 60.0  # seconds to wait for another process that writes to the index; it does so for milliseconds
AT_ONCE = 500  # keys in one query; SQLite takes at least 999 parameters
NARROW = 32  # so many columns are scores and not hidden states: half precision would save nothing
DTYPES: dict[str, np.dtype[Any]] = {"f16": np.dtype("<f2"), "f32": np.dtype("<f4")}

TABLES = """
CREATE TABLE batch (id INTEGER PRIMARY KEY, segment TEXT NOT NULL, start INTEGER NOT NULL, rows INTEGER NOT NULL,
                    sha256 TEXT NOT NULL);
CREATE TABLE text (key BLOB PRIMARY KEY, batch INTEGER NOT NULL, place INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE job (id BLOB PRIMARY KEY, plan BLOB NOT NULL, began REAL NOT NULL);
"""


def key_of(text: Text) -> bytes:
    """SHA-256 of a prompt and a response. Every part comes with its length, so that no other text spells the same bytes."""
    plain = isinstance(text.prompt, str)
    parts = [text.prompt] if isinstance(text.prompt, str) else [part for turn in text.prompt for part in turn]
    found = hashlib.sha256(f"{'text' if plain else 'turns'} {len(parts)}".encode())
    for part in (*parts, text.response):
        encoded = part.encode("utf-8", "surrogatepass")
        found.update(f" {len(encoded)} ".encode() + encoded)
    return found.digest()


class Shelf:
    """The folder of one encoder, open: made where there is none, and locked against `prune` until it is closed.

    Args:
        folder: named by the fingerprint of its encoder.
        encoder: whose rows these are; None to look after a folder that is there.
        alone: nobody else may have it open; raises BlockingIOError where somebody has.

    Raises:
        ModelFileError: what stands there is of another encoder or width, of a newer version, or damaged.
        OSError: the folder cannot be made, read or written.
    """

    def __init__(self, folder: Path, encoder: BatchedEncoder | None = None, *, alone: bool = False):
        self.folder = folder
        self._segments: dict[str, FileIO] = {}  # those this process has locked, by their kind
        with said_clearly(folder):
            self._lock = _locked(folder, make=encoder is not None, alone=alone)
            try:
                if encoder is not None and not (folder / ENCODER).exists():
                    write_head(folder, encoder)
                self.head = read_head(folder)
                self.width: int = self.head["width"]
                if encoder is not None and self.width != encoder.width:
                    raise ModelFileError(
                        f"{folder} holds rows of {self.width} numbers and the encoder {encoder.spec!r} gives {encoder.width}; "
                        f"expected the same. {_remedy(folder)}"
                    )
                self.index = sqlite3.connect(folder / INDEX, timeout=PATIENCE, isolation_level=None)
                self._prepare()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unlock everything."""
        for file in (*self._segments.values(), self._lock):
            file.close()
        self._segments = {}
        if hasattr(self, "index"):
            self.index.close()

    def _prepare(self) -> None:
        self.index.execute("PRAGMA synchronous = FULL")
        found = self._one("PRAGMA user_version")
        if found == 0:
            with self.writing():
                if self._one("PRAGMA user_version") == 0:  # nobody was faster
                    for statement in TABLES.split(";"):
                        self.index.execute(statement)
                    self.index.execute(f"PRAGMA user_version = {VERSION}")
        elif found != VERSION:
            raise ModelFileError(f"{self.folder / INDEX} has version {found}; expected {VERSION}; update palate, or name another")

    def _one(self, query: str, *values: Any) -> Any:
        row = self.index.execute(query, values).fetchone()
        return None if row is None else row[0]

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction: all of it is on the disk when this is left, or nothing is."""
        self.index.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.index.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.index.execute("ROLLBACK")
            raise

    def touch(self) -> None:
        """Note that the rows were used now; a folder that may only be read is used all the same."""
        with contextlib.suppress(OSError):
            os.utime(self.folder / ENCODER)

    # Rows -----------------------------------------------------------------------------------------------------------------

    def find(self, keys: Sequence[bytes]) -> dict[bytes, tuple[str, int]]:
        """(segment, row in it) of each of the keys that has one. One query for `AT_ONCE` keys."""
        found: dict[bytes, tuple[str, int]] = {}
        with said_clearly(self.folder):
            for start in range(0, len(keys), AT_ONCE):
                part = keys[start : start + AT_ONCE]
                query = (
                    "SELECT text.key, batch.segment, batch.start + text.place FROM text JOIN batch ON batch.id = text.batch "
                    f"WHERE text.key IN ({','.join('?' * len(part))})"
                )
                found.update((key, (segment, row)) for key, segment, row in self.index.execute(query, part))
        return found

    def append(self, keys: Sequence[bytes], rows: NDArray[np.float32]) -> None:
        """Store a batch: when this returns it is on the disk, and until then nobody sees any of it.

        A key that another process stored meanwhile keeps that row, so that everybody reads the same.
        """
        kind = _kind(rows)
        with np.errstate(over="ignore"):
            content = rows.astype(DTYPES[kind]).tobytes()
        with said_clearly(self.folder):
            file, name = self._writable(kind)
            start = file.tell() // (len(content) // len(rows))
            _write(file, content)
            os.fsync(file.fileno())
            values = (name, start, len(rows), hashlib.sha256(content).hexdigest())
            with self.writing():
                stored = self.index.execute("INSERT INTO batch (segment, start, rows, sha256) VALUES (?, ?, ?, ?)", values)
                batch = stored.lastrowid
                self.index.executemany(
                    "INSERT OR IGNORE INTO text VALUES (?, ?, ?)", [(key, batch, place) for place, key in enumerate(keys)]
                )

    def _writable(self, kind: str) -> tuple[FileIO, str]:
        """A locked segment of this kind, at the end of what the index names, and its name."""
        if kind not in self._segments:
            self._segments[kind] = self._lock_segment(kind)
        file = self._segments[kind]
        name = Path(str(file.name)).name
        end = self.end(name)
        file.seek(end)
        file.truncate(end)  # what a killed process left behind, which nothing points at
        return file, name

    def _lock_segment(self, kind: str) -> FileIO:
        while True:
            there = sorted(self.folder.glob(f"*.{kind}"))
            for path in there:
                file = FileIO(path, "r+")
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.close()
                    continue
                if os.fstat(file.fileno()).st_size >= self.end(path.name):
                    return file
                file.close()  # shorter than the index says: `verify` tells, and nothing is added to it
            number = max((int(path.stem) for path in there), default=0) + 1
            with contextlib.suppress(FileExistsError):  # another process made it; the next round looks whether it is free
                (self.folder / f"{number:06d}.{kind}").open("xb").close()
                flush_folder(self.folder)

    def row_bytes(self, segment: str) -> int:
        """Bytes of a row of this segment, by the ending of its name."""
        return self.width * DTYPES[segment.rpartition(".")[2]].itemsize

    def end(self, segment: str) -> int:
        """Bytes of a segment up to the last row that the index names."""
        rows = self._one("SELECT max(start + rows) FROM batch WHERE segment = ?", segment) or 0
        return int(rows) * self.row_bytes(segment)

    def map(self, segment: str) -> NDArray[Any]:
        """(rows, D) memory map of what the index names of a segment."""
        path, end = self.folder / segment, self.end(segment)
        size = path.stat().st_size if path.exists() else 0
        if size < end:
            raise ModelFileError(
                f"{path} has {size} bytes and its index says {end}; it was cut. To encode again what is lost: "
                f"{repairing(self.folder.parent)}"
            )
        dtype = DTYPES[segment.rpartition(".")[2]]
        return np.memmap(path, dtype, "r", shape=(end // self.row_bytes(segment), self.width))

    # Jobs -----------------------------------------------------------------------------------------------------------------

    def begin(self, job: bytes, missing: Sequence[int]) -> list[int]:
        """The places of a job that are to be encoded: those that an earlier run recorded and did not finish, else `missing`."""
        plan = np.asarray(missing, dtype="<u4").tobytes()
        with said_clearly(self.folder), self.writing():
            self.index.execute("INSERT OR IGNORE INTO job VALUES (?, ?, ?)", (job, plan, time.time()))
            recorded = self._one("SELECT plan FROM job WHERE id = ?", job)
        return [int(place) for place in np.frombuffer(recorded, dtype="<u4")]

    def finish(self, job: bytes) -> None:
        """The job is done: forget its record."""
        with said_clearly(self.folder), self.writing():
            self.index.execute("DELETE FROM job WHERE id = ?", (job,))


def _write(file: FileIO, content: bytes) -> None:
    """All of it, or the error that says why not: an unbuffered write may stop half-way, as on a disk that is nearly full."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _kind(rows: NDArray[np.float32]) -> str:
    """Half precision, unless it would cost a row more than a thousandth of its largest number, or nothing is saved by it."""
    if rows.shape[1] < NARROW:
        return "f32"
    with np.errstate(over="ignore"):
        half = rows.astype(np.float16).astype(np.float32)
    if not np.isfinite(half).all():
        return "f32"
    lost, largest = np.abs(half - rows).max(axis=1), np.abs(rows).max(axis=1)
    return "f16" if (lost <= largest / 1000).all() else "f32"


def _locked(folder: Path, *, make: bool, alone: bool) -> FileIO:
    """The lock file of a folder, open and locked: shared by those who use it, alone for whoever removes from it."""
    while True:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOCK
        try:
            file = FileIO(path, "a")
        except OSError:  # a folder that may only be read can still be locked
            if make and not folder.exists():
                continue  # removed by `prune` just now
            file = FileIO(path, "r")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except BlockingIOError:
            file.close()
            raise
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # `prune` removed it while this waited


def write_head(folder: Path, encoder: BatchedEncoder) -> None:
    """Say whose rows a folder holds; whole or not at all."""
    head = {"format": FORMAT, "format_version": VERSION, "spec": encoder.spec, "width": encoder.width, "state": encoder.state()}
    partial = folder / f"{ENCODER}.{os.getpid()}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / ENCODER)
    flush_folder(folder)


def read_head(folder: Path) -> dict[str, Any]:
    """What `write_head` wrote, checked: its state must be what the folder is named by.

    Raises:
        ModelFileError: no JSON, another format, a newer version, or the state of another encoder.
    """
    path = folder / ENCODER
    remedy = _remedy(folder)
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ModelFileError(f"{path} was not written by this cache; expected format {FORMAT!r}. {remedy}")
        if head["format_version"] > VERSION:
            raise ModelFileError(
                f"{path} has format version {head['format_version']}; expected at most {VERSION}; update palate, or name another "
                "folder with --cache"
            )
        if digest(head["state"]) != folder.name:
            raise ModelFileError(
                f"{path} holds the state of another encoder ({digest(head['state'])[:12]}) than its folder is named by "
                f"({folder.name[:12]}), so its rows may be anybody's. {remedy}"
            )
        if not isinstance(head["width"], int) or head["width"] < 1 or not isinstance(head["spec"], str):
            raise ModelFileError(
                f"{path} has width {head['width']!r} and spec {head['spec']!r}; expected a number and a name. {remedy}"
            )
    except ModelFileError:
        raise
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{path} cannot be read ({error!r}); expected what palate wrote. {remedy}") from error
    return head


@contextlib.contextmanager
def said_clearly(folder: Path) -> Iterator[None]:
    """An error of the disk or of SQLite as one that says what to do."""
    try:
        yield
    except BlockingIOError:
        raise
    except sqlite3.OperationalError as error:
        raise OSError(f"{_cannot(folder)} ({error}). {_WAY_OUT}") from error
    except sqlite3.DatabaseError as error:
        raise ModelFileError(f"{folder / INDEX} is damaged ({error}). {_remedy(folder)}") from error
    except OSError as error:
        raise OSError(f"{_cannot(folder)} ({error.strerror or error}). {_WAY_OUT}") from error


_WAY_OUT = "The rows stored so far are kept. Make room, or name another folder with --cache, or go on with --no-cache"


def _remedy(folder: Path) -> str:
    # With the cache it is about: in another one the same encoder may be whole.
    return f"To drop the folder: palate cache prune --cache {quote(str(folder.parent))} --encoder {folder.name[:12]}"


def repairing(cache: Path) -> str:
    """The command that drops damaged rows of this cache."""
    return f"palate cache verify --cache {quote(str(cache))} --repair"


def _cannot(folder: Path) -> str:
    return f"the cache {folder} cannot be used"


def flush_folder(folder: Path) -> None:
    """The names of a folder's files are on the disk when this returns."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
