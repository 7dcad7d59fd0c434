"""Looking after a cache: what it holds, whether the bytes are still those that were written, and making room.

Whatever removes something waits for nobody: a folder that another process has open is left alone and said to be in use.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from palate.encoders.shelf import ENCODER, INDEX, LOCK, Shelf, flush_folder, said_clearly
from palate.errors import DataError, ModelFileError

DAY = 86_400.0
CHUNK = 2**24  # bytes read at once to check or to copy a batch


class Entry(NamedTuple):
    """One encoder of a cache."""

    folder: Path
    spec: str
    width: int
    rows: int
    bytes: int  # on the disk, the index included
    used: float  # seconds since 1970
    fault: str | None  # why it cannot be read; then spec is "?" and the numbers of rows and columns are 0

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the encoder's state, by which the folder is named."""
        return self.folder.name


class Removal(NamedTuple):
    """What `prune` removed from one encoder, or would remove."""

    entry: Entry
    bytes: int
    reason: str  # why, or why not where bytes is 0


def entries(folder: Path) -> list[Entry]:
    """Every encoder of a cache, the one used last first; one that cannot be read is listed with its fault."""
    if not folder.is_dir():
        return []
    found = [_entry(path) for path in folder.iterdir() if path.is_dir() and re.fullmatch("[0-9a-f]{64}", path.name)]
    return sorted(found, key=lambda entry: (-entry.used, entry.fingerprint))


def _entry(folder: Path) -> Entry:
    size, used = 0, 0.0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a journal of SQLite comes and goes
            facts = path.stat()
            size += facts.st_size
            used = facts.st_mtime if path.name == ENCODER else used
    try:
        with Shelf(folder) as shelf, said_clearly(folder):
            rows = int(shelf.index.execute("SELECT count(*) FROM text").fetchone()[0])
            return Entry(folder, shelf.head["spec"], shelf.width, rows, size, used, None)
    except (ModelFileError, OSError) as error:
        return Entry(folder, "?", 0, 0, size, used, str(error))


def verify(folder: Path) -> Iterator[tuple[str, int | None]]:
    """(what is wrong, the batch it is in) for everything in one encoder's folder that is not as it was written.

    Reads every row and compares SHA-256: about a gigabyte a second.
    """
    try:
        with Shelf(folder) as shelf, said_clearly(folder):
            found = shelf.index.execute("PRAGMA integrity_check").fetchone()[0]
            if found != "ok":
                yield f"{folder / INDEX}: {found}", None
                return
            # The list is fixed here: batches that others append meanwhile are not looked at.
            batches = shelf.index.execute("SELECT id, segment, start, rows, sha256 FROM batch ORDER BY segment, start").fetchall()
            for batch, segment, start, rows, expected in batches:
                size = shelf.row_bytes(segment)
                seen, n = hashlib.sha256(), 0
                for part in _bytes(folder / segment, start * size, rows * size):
                    seen.update(part)
                    n += len(part)
                if n < rows * size:
                    yield f"{folder / segment}: {n} of the {rows * size} bytes of batch {batch} are there", batch
                elif seen.hexdigest() != expected:
                    yield f"{folder / segment}: batch {batch} ({rows} rows from {start}) is not what was written", batch
            beyond = (
                "SELECT text.batch, count(*) FROM text LEFT JOIN batch ON batch.id = text.batch "
                "WHERE batch.id IS NULL OR text.place NOT BETWEEN 0 AND batch.rows - 1 GROUP BY text.batch"
            )
            for batch, n in shelf.index.execute(beyond).fetchall():
                yield f"{folder / INDEX}: {n} texts point at rows that batch {batch} does not have", batch
    except (ModelFileError, OSError) as error:
        yield str(error), None


def _bytes(path: Path, start: int, n: int) -> Iterator[bytes]:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(start)
        while n > 0 and (part := file.read(min(n, CHUNK))):
            n -= len(part)
            yield part


def repair(folder: Path, batches: Sequence[int]) -> int:
    """Drop these batches from the index, so that their texts are encoded again; returns how many texts that are.

    Raises:
        BlockingIOError: somebody has the folder open.
    """
    with Shelf(folder, alone=True) as shelf, said_clearly(folder), shelf.writing():
        dropped = 0
        for batch in batches:
            dropped += shelf.index.execute("DELETE FROM text WHERE batch = ?", (batch,)).rowcount
            shelf.index.execute("DELETE FROM batch WHERE id = ?", (batch,))
        return dropped


def prune(
    folder: Path,
    *,
    encoder: str | None = None,
    older_than: float | None = None,
    max_bytes: int | None = None,
    dry_run: bool = False,
) -> list[Removal]:
    """Remove encoders from a cache, and from those that stay the bytes that nothing points at.

    Args:
        folder: of the cache.
        encoder: the fingerprint, or how it begins, of one that goes; where given without more, no other is looked at.
        older_than: days since an encoder was used, after which it goes.
        max_bytes: encoders go until what is left is no larger, the one used longest ago first.
        dry_run: say what would go, and remove nothing.

    Raises:
        DataError: no encoder, or several, begin like `encoder`.
    """
    listed = entries(folder)
    reasons: dict[str, str] = {}
    if encoder is not None:
        matching = [entry for entry in listed if encoder and entry.fingerprint.startswith(encoder)]
        if len(matching) != 1:
            raise DataError(
                f"--encoder is {encoder!r}, which {len(matching)} encoders of {folder} begin with; expected the fingerprint of "
                "one, as `palate cache list` shows it"
            )
        reasons[matching[0].fingerprint] = "named"
        if older_than is None and max_bytes is None:
            listed = matching
    if older_than is not None:
        reasons |= {e.fingerprint: f"not used for {older_than:g} days" for e in listed if e.used < time.time() - older_than * DAY}
    if max_bytes is not None:
        left = sum(entry.bytes for entry in listed if entry.fingerprint not in reasons)
        for entry in reversed(listed):
            if left > max_bytes and entry.fingerprint not in reasons:
                reasons[entry.fingerprint] = f"the cache is larger than {max_bytes} bytes"
                left -= entry.bytes
    removals = []
    for entry in listed:
        if (reason := reasons.get(entry.fingerprint)) is not None:
            freed = entry.bytes if dry_run or _removed(entry.folder) else 0
            removals.append(Removal(entry, freed, reason if freed else "another process has it open"))
        elif entry.fault is None:
            try:
                freed = _compacted(entry.folder, dry_run=dry_run)
            except BlockingIOError:
                removals.append(Removal(entry, 0, "another process has it open"))
                continue
            if freed:
                removals.append(Removal(entry, freed, "nothing points there"))
    return removals


def _removed(folder: Path) -> bool:
    """Whether the folder of an encoder could be removed: the index first, so that what a crash leaves behind is no cache."""
    with (folder / LOCK).open("ab") as lock, said_clearly(folder):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        rest = [path for path in folder.iterdir() if path.name not in (INDEX, LOCK)]
        for path in (folder / INDEX, *rest, folder / LOCK):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a process that begins just now has put its lock there
            folder.rmdir()
    return True


def _compacted(folder: Path, *, dry_run: bool) -> int:
    """Bytes freed of one encoder: segments with holes are copied without them, tails are cut, forgotten files are removed."""
    with Shelf(folder, alone=True) as shelf, said_clearly(folder):
        rows: list[tuple[int, str, int, int]] = shelf.index.execute(
            "SELECT id, segment, start, rows FROM batch WHERE id IN (SELECT batch FROM text) ORDER BY segment, start"
        ).fetchall()
        freed = 0
        for path in sorted([*folder.glob("*.f16"), *folder.glob("*.f32"), *folder.glob("*.partial")]):
            size = path.stat().st_size
            live = [(batch, start, n) for batch, segment, start, n in rows if segment == path.name]
            needed = sum(n for _, _, n in live) * shelf.row_bytes(path.name) if live else 0
            if size < needed or (size == needed and live):  # cut, which is for `verify` to say, or nothing to free
                continue
            freed += size - needed
            if not dry_run:
                _rewrite(shelf, path, live)
        return freed


def _rewrite(shelf: Shelf, path: Path, live: Sequence[tuple[int, int, int]]) -> None:
    """Copy the live batches (id, start, rows) of a segment to a new one, name it in the index, and remove the old."""
    moved: list[tuple[Any, ...]] = []
    if live:
        kind = path.suffix
        numbers = [int(other.stem) for other in shelf.folder.glob(f"*{kind}")]
        new = shelf.folder / f"{max(numbers) + 1:06d}{kind}"
        size, end = shelf.row_bytes(path.name), 0
        with new.open("xb") as file:
            for batch, start, n in live:
                for part in _bytes(path, start * size, n * size):
                    file.write(part)
                moved.append((new.name, end, batch))
                end += n
            file.flush()
            os.fsync(file.fileno())
        flush_folder(shelf.folder)
    with shelf.writing():
        shelf.index.executemany("UPDATE batch SET segment = ?, start = ? WHERE id = ?", moved)
        shelf.index.execute("DELETE FROM batch WHERE segment = ?", (path.name,))
    path.unlink()
