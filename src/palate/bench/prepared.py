"""A draw on disk, for worker processes: the arrays of its choices, and its table of features once, as a memory map.

    DIR/data/<digest>.npz      choices, who made them, and the four sides of the split
    DIR/data/<digest>.npy      a dense table; every worker reads the same pages

A digest covers everything in the file, so a name never stands for other numbers, and data that are there are not written again.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from palate.bench.protocols import Draw
from palate.data.embeddings import Dense, Embeddings, Joined, OneHot
from palate.data.pairs import EmbeddedPairs
from palate.data.splits import SIDES, Split
from palate.errors import DataError, ModelFileError

_PAIRS = ("chosen", "rejected", "user_index", "tie", "weight", "unit")
Numbers = NDArray[Any]


def prepare(draw: Draw, folder: Path) -> str:
    """Write a draw into `folder`, unless it is there; its digest, which covers choices, table, encoder and split.

    Costs one pass over the table, and its numbers in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, parts = draw
    ids = json.dumps(data.user_ids).encode()
    about = {"table": _stored(data.embeddings, folder), "by": parts.by, "seed": parts.seed, "encoder": data.encoder}
    columns: dict[str, Numbers] = {name: getattr(data, name).cpu().numpy() for name in _PAIRS}
    columns |= {side: getattr(parts, side) for side in SIDES}
    columns |= {} if data.prompts is None else {"prompts": data.prompts.cpu().numpy()}
    columns |= {"ids": np.frombuffer(ids, dtype=np.uint8), "about": np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)}
    digest = hashlib.sha256()
    for name, column in columns.items():
        digest.update(f"{name} {column.dtype} {column.shape}".encode() + np.ascontiguousarray(column).tobytes())
    path = folder / f"{digest.hexdigest()[:32]}.npz"
    if not path.exists():
        _write(path, lambda file: np.savez(file, allow_pickle=False, **columns))
    return path.stem


def read(folder: Path, digest: str) -> Draw:
    """The draw that `prepare` wrote; its dense tables stay on disk until they are read.

    Raises `ModelFileError` where it is missing or damaged.
    """
    path = folder / f"{digest}.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            columns = {name: held[name] for name in held.files}
        about, ids = (json.loads(columns[name].tobytes()) for name in ("about", "ids"))
        table = _restored(about["table"], folder)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise ModelFileError(f"{path} cannot be read ({error}); remove {folder}, and the bench makes it anew") from error
    data = EmbeddedPairs(
        table,
        columns["chosen"],
        columns["rejected"],
        np.asarray(ids, dtype=object)[columns["user_index"]],
        tie=columns["tie"],
        weight=columns["weight"],
        # Sorted as text, as `EmbeddedPairs` does, they keep their order, on which the halves that a fit holds out depend.
        unit=[f"{unit:012d}" for unit in columns["unit"].tolist()],
        prompts=columns.get("prompts"),
        encoder=about["encoder"],
    )
    sides = (columns["train"], columns["test_seen"], columns["support"], columns["test_unseen"])
    return Draw(data, Split(*sides, about["by"], about["seed"], {}, {}))


def _stored(table: Embeddings, folder: Path) -> dict[str, Any]:
    """The table as JSON; its numbers are in files beside."""
    if isinstance(table, OneHot):
        return {"one_hot": _array(table.column.cpu().numpy(), folder), "columns": table.shape[1], "scale": table.scale}
    if isinstance(table, Joined):
        return {"joined": [_stored(block, folder) for block in table.blocks], "gains": table.gains}
    if isinstance(table, Dense):
        whole = np.concatenate([block.cpu().numpy() for _, block in table.blocks()])
        return {"dense": _array(whole, folder)}
    raise DataError(f"a {type(table).__name__} cannot be handed to other processes; expected Dense, OneHot or Joined features")


def _array(values: Numbers, folder: Path) -> str:
    digest = hashlib.sha256(f"{values.dtype} {values.shape}".encode() + np.ascontiguousarray(values).data).hexdigest()[:32]
    path = folder / f"{digest}.npy"
    if not path.exists():
        _write(path, lambda file: np.save(file, values))
    return path.name


def _restored(about: dict[str, Any], folder: Path) -> Embeddings:
    if "joined" in about:
        return Joined([_restored(block, folder) for block in about["joined"]], about["gains"])
    # Copy on write: nothing ever writes, and torch takes no array that it could not.
    values = np.load(folder / about["dense" if "dense" in about else "one_hot"], mmap_mode="c", allow_pickle=False)
    if "dense" in about:
        return Dense(torch.from_numpy(values))
    return OneHot(torch.from_numpy(np.array(values)), about["columns"], scale=about["scale"])


def _write(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        write(file)
    partial.replace(path)
