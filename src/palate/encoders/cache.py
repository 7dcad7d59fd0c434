"""Features that were computed once are read the next time: `Cache`, for every encoder that plans batches.

A row is found by the fingerprint of its encoder, which covers everything that changes a feature, and by the text itself; a file
name or a number of rows never stands for either. Rows are stored in half precision (single where that would cost a row more than
a thousandth of its largest number) and are always read back, so the first run and the second see the same bits.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from palate.data.embeddings import BLOCK_BYTES, Dense
from palate.data.pairs import Text
from palate.encoders.base import BatchedEncoder, Encoder
from palate.encoders.joined import JoinedEncoder
from palate.encoders.shelf import Shelf, key_of, repairing, said_clearly
from palate.errors import DataError, ModelFileError

AnyEncoder = TypeVar("AnyEncoder", bound=Encoder)


class Cache:
    """Rows of encoders in a folder, for any number of processes on one machine at once.

    Killed at any moment, a run loses the batch it was in. The next run of the same texts takes the plan that was recorded when
    the first began, runs the batches that are missing, and gives the same bits as a run that nobody interrupted.

    Args:
        folder: made when the first row is stored; `default_folder()` where None.

    Attributes:
        found: for each encoder, by its `spec`, how many distinct texts of the last table were there already.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = default_folder() if folder is None else Path(folder)
        self.found: dict[str, int] = {}

    def table(self, encoder: BatchedEncoder, texts: Sequence[Text]) -> Dense:
        """(N, D) table of `texts`, in their order; those that were never seen are encoded and stored first.

        Rows are fetched from memory maps when they are asked for; a table that is one block of `Dense` is read at once.

        Raises:
            ModelFileError: what is stored is of another encoder, of a newer version, or damaged.
            OSError: the disk is full, or the folder cannot be written; what was stored stays.
            DataError: a row that is not finite, or a plan that does not hold every text once.
        """
        position: dict[bytes, int] = {}
        first: list[Text] = []
        place = np.empty(len(texts), dtype=np.int64)
        for i, text in enumerate(texts):
            key = key_of(text)
            if key not in position:
                position[key] = len(first)
                first.append(text)
            place[i] = position[key]
        keys = list(position)
        with Shelf(self.folder / encoder.fingerprint, encoder) as shelf:
            shelf.touch()
            self.found[encoder.spec] = _encode(shelf, encoder, keys, first)
            rows = _rows(shelf, keys)
        rows = rows if len(first) == len(texts) else rows.select(place)
        return Dense(rows[:] if 4 * rows.shape[0] * rows.shape[1] <= BLOCK_BYTES else rows)


def with_cache(encoder: AnyEncoder, cache: Cache | None) -> AnyEncoder:
    """The same encoder, which keeps its rows in `cache` from now on, or no longer where None; of joined ones every part does.

    Encoders that cost nothing, such as "style", are left as they are.
    """
    for part in batched(encoder):
        part.cache = cache
    return encoder


def batched(encoder: Encoder) -> list[BatchedEncoder]:
    """The encoders inside this one whose rows cost something."""
    if isinstance(encoder, JoinedEncoder):
        return [inner for part in encoder.parts for inner in batched(part)]
    return [encoder] if isinstance(encoder, BatchedEncoder) else []


def default_folder() -> Path:
    """$PALATE_CACHE, or `palate` in $XDG_CACHE_HOME, or ~/.cache/palate."""
    if named := os.environ.get("PALATE_CACHE"):
        return Path(named).expanduser()
    usual = os.environ.get("XDG_CACHE_HOME")
    return (Path(usual) if usual else Path.home() / ".cache") / "palate"


class Stored:
    """(N, D) rows of a shelf that are fetched from memory maps when they are asked for. They stay readable when files are pruned.

    Args:
        maps: the memory maps of the segments.
        segment: (N,) which map each row is in.
        row: (N,) its row there.
        width: D.
    """

    ndim = 2

    def __init__(self, maps: Sequence[NDArray[np.floating]], segment: NDArray[np.int32], row: NDArray[np.int64], width: int):
        self._maps, self._segment, self._row = maps, segment, row
        self.shape = (len(row), width)
        self.dtype = np.result_type(np.float16, *(part.dtype for part in maps))

    def __getitem__(self, part: slice | NDArray[np.int64]) -> NDArray[np.floating]:
        """The rows of a slice or of indices, as an array in memory."""
        segment, row = self._segment[part], self._row[part]
        out = np.empty((len(row), self.shape[1]), dtype=self.dtype)
        for number in np.unique(segment).tolist():
            here = segment == number
            out[here] = self._maps[number][row[here]]
        return out

    def select(self, index: NDArray[np.int64]) -> "Stored":
        """The rows `index` only; nothing is fetched yet."""
        return Stored(self._maps, self._segment[index], self._row[index], self.shape[1])


def _encode(shelf: Shelf, encoder: BatchedEncoder, keys: list[bytes], texts: list[Text]) -> int:
    """Store every row that is missing; returns how many were there. `encoder.encoded` counts what was computed."""
    job, encoded = hashlib.sha256(b"".join(keys)).digest(), 0
    missing = _missing(shelf, keys)
    n_found = len(keys) - len(missing)
    while missing:
        # The plan of an interrupted run comes first; what was removed since it began is missing still, and is a plan of its own.
        planned = shelf.begin(job, missing)
        subset, wanted = [texts[i] for i in planned], set(missing)
        plan = encoder.plan(subset)
        if sorted(place for batch in plan for place in batch.rows) != list(range(len(subset))):
            raise DataError(f"the plan of {encoder!r} does not hold each of {len(subset)} texts once, as it must")
        todo = [batch for batch in plan if any(planned[i] in wanted for i in batch.rows)]
        for done, rows in encoder.run([subset[i] for batch in todo for i in batch.rows], todo):
            numbers = rows.detach().float().cpu().numpy()
            if not np.isfinite(numbers).all():
                raise DataError(f"{encoder!r} gave numbers beyond single precision; a cache cannot hold them: use --no-cache")
            shelf.append([keys[planned[i]] for i in done.rows], numbers)
        encoded += encoder.encoded if todo else 0
        shelf.finish(job)
        missing = _missing(shelf, keys)
    encoder.encoded = encoded
    return n_found


def _missing(shelf: Shelf, keys: list[bytes]) -> list[int]:
    found = shelf.find(keys)
    return [i for i, key in enumerate(keys) if key not in found]


def _rows(shelf: Shelf, keys: list[bytes]) -> Stored:
    found = shelf.find(keys)
    names = sorted({segment for segment, _ in found.values()})
    number = {name: i for i, name in enumerate(names)}
    with said_clearly(shelf.folder):
        maps = [shelf.map(name) for name in names]
    segment = np.asarray([number[found[key][0]] for key in keys], dtype=np.int32)
    row = np.asarray([found[key][1] for key in keys], dtype=np.int64)
    beyond = [name for name, part in zip(names, maps, strict=True) if (row[segment == number[name]] >= len(part)).any()]
    if beyond:
        raise ModelFileError(
            f"{shelf.folder} names rows that {beyond} do not have; to drop them: {repairing(shelf.folder.parent)}"
        )
    return Stored(maps, segment, row, shelf.width)
