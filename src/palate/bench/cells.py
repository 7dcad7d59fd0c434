"""One cell of a benchmark: a method, fitted and tested on one draw of one data set under one condition, and its file.

The file is named by a digest of everything that determines its figures, so that a cell which is there is this cell: nothing is
run twice, and nothing that changed is taken for what it was. It is replaced whole. A method that failed leaves its message.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from palate.data.conditions import Condition
from palate.errors import DataError, ModelFileError
from palate.evaluation import Evaluation
from palate.evaluation.facts import FACTS, Failure, packed
from palate.evaluation.result import COLUMNS
from palate.models.base import RewardModel
from palate.version import __version__

FORMAT, VERSION = "palate-bench-cell", 1
# How a message begins that says what a data set does not have: no figure, and no failure of the method either.
LACKS = ("no texts:", "no attributes:")


class Method(NamedTuple):
    """An unfitted model as it is told to another process: JSON-able."""

    module: str
    kind: str
    options: Mapping[str, Any]

    @classmethod
    def of(cls, model: RewardModel) -> "Method":
        """Raises `DataError` for a class that another process cannot import, or one that does not say its options."""
        kind = type(model)
        if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
            raise DataError(f"{kind.__qualname__} is defined in {kind.__module__}, which worker processes cannot import; move it")
        return cls(kind.__module__, kind.__qualname__, json.loads(json.dumps(model.options(), allow_nan=False)))

    def model(self) -> RewardModel:
        kind: type[RewardModel] = getattr(import_module(self.module), self.kind)
        return kind.from_options(dict(self.options))


@dataclass(frozen=True)
class Cell:
    """`name` and `label` are what the method and the data set are called, `origin` what the data were before they were split;
    they do not change what is in the file."""

    label: str
    condition: str
    name: str
    seed: int
    method: Method
    data: str  # the digest of the draw
    origin: str
    shots: tuple[int | None, ...]
    attributes: str = ""  # the digest of what is known of the users, of a method that reads it

    @property
    def key(self) -> str:
        """The digest of what determines the figures: data, split, encoder, condition, method, seed, shots, version, and what is
        known of the users."""
        what = [FORMAT, VERSION, __version__, self.method, self.data, self.condition, self.seed, self.shots]
        what += [self.attributes] if self.attributes else []  # as it was named before there were any
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"method": self.method._asdict()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Cell":
        return cls(**{**value, "method": Method(**value["method"]), "shots": tuple(value["shots"])})

    def tried(self) -> tuple[int | None, ...]:
        """The numbers of choices that there are: under `pairs=n`, none above n."""
        condition = Condition.named(self.condition)
        most = condition.amount if condition.kind == "pairs" else np.inf
        return tuple(n for n in self.shots if n is None or n <= most)


def path_of(folder: Path, key: str) -> Path:
    return folder / "cells" / f"{key}.json.gz"


def write(folder: Path, cell: Cell, found: Evaluation, seconds: float) -> None:
    """Keep what was found, rows and facts, or, where there are no rows, the failures."""
    columns = {name: found.columns[name].tolist() for name in COLUMNS}
    for name in ("fit_seconds", "adapt_seconds"):
        columns[name] = [None if value != value else value for value in columns[name]]
    facts = {name: [packed(fact) for fact in getattr(found, name)] for name in FACTS}
    head = {"format": FORMAT, "version": VERSION, "cell": cell.as_json(), "seconds": round(seconds, 3)}
    text = json.dumps({**head, "columns": columns, "facts": facts}, allow_nan=False)
    path = path_of(folder, cell.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A worker that outlived its bench may write the same cell as the next bench: the same bytes, each under a name of its own.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(gzip.compress(text.encode("utf-8", "surrogatepass"), mtime=0))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read(folder: Path, cell: Cell) -> Evaluation:
    """What was found in this cell, under the names that the method and the data set have now.

    Raises `ModelFileError` where the file is missing, damaged or of another format.
    """
    path = path_of(folder, cell.key)
    try:
        held = json.loads(gzip.decompress(path.read_bytes()).decode("utf-8", "surrogatepass"))
        if (held["format"], held["version"]) != (FORMAT, VERSION):
            raise ModelFileError(f"{path} is {held['format']} version {held['version']}; expected {FORMAT} version {VERSION}")
        columns = held["columns"]
        n = len(columns["user"])
        columns |= {"data_set": [cell.label] * n, "method": [cell.name] * n}
        rows = (dict(zip(COLUMNS, row, strict=True)) for row in zip(*(columns[name] for name in COLUMNS), strict=True))
        shots = [None if value == -1 else value for value in columns["shots"]]
        found = Evaluation.from_rows({**row, "shots": given} for row, given in zip(rows, shots, strict=True))
        names = {"data_set": cell.label, "method": cell.name}
        facts: dict[str, Any] = {
            name: tuple(kind(**(fact | {k: v for k, v in names.items() if k in fact})) for fact in held["facts"][name])
            for name, kind in FACTS.items()
        }
        return replace(found, **facts)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{path} cannot be read ({error}); remove it, and the bench runs this cell again") from error


def failed(cell: Cell, stage: str, message: str) -> Evaluation:
    """No rows, and the message."""
    return replace(Evaluation.from_rows([]), failures=(Failure(cell.label, cell.name, cell.seed, stage, message),))
