"""What a benchmark consists of: data sets x conditions x methods x seeds, and the list of its cells on disk.

    DIR/plan.json    every cell that the pages are made from, in their order

A later bench in the same folder adds to the list. What it has anew replaces what it was: cells of the same method with other
options, of the same data set prepared otherwise, and of another version of this library are not listed any more.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate.bench import known
from palate.bench.cells import Cell, Method
from palate.bench.protocols import Source
from palate.data.conditions import Condition
from palate.errors import DataError, ModelFileError
from palate.models.base import RewardModel
from palate.version import __version__

SHOTS: tuple[int | None, ...] = (0, 1, 2, 5, 10, None)
FORMAT, VERSION = "palate-bench-plan", 1


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        sources: the data sets, each under a label of its own.
        methods: unfitted models by the names that they have in the results. Published presets end in "-faithful".
        seeds: of the splits and the fits.
        conditions: see `palate.data.conditions`.
        shots: numbers of choices from which unseen users are adapted; None is all.

    Raises:
        DataError: nothing of a kind, or something twice.
    """

    sources: Sequence[Source]
    methods: Mapping[str, RewardModel]
    seeds: Sequence[int]
    conditions: Sequence[Condition] = (Condition("clean"),)
    shots: tuple[int | None, ...] = SHOTS

    def __post_init__(self) -> None:
        parts: dict[str, list[object]] = {
            "data sets": [source.label for source in self.sources],
            "methods": list(self.methods),
            "seeds": list(self.seeds),
            "conditions": [condition.name for condition in self.conditions],
            "shots": list(self.shots),
        }
        for what, names in parts.items():
            if not names or len(set(names)) < len(names):
                advice = "; ,name=LABEL behind rows=FILE makes a name" if what == "data sets" and names else ""
                raise DataError(f"the {what} are {names}; expected at least one, each once{advice}")
        if min(self.seeds) < 0 or any(n is not None and n < 0 for n in self.shots):
            raise DataError(f"seeds are {tuple(self.seeds)} and shots {self.shots}; expected whole numbers of 0 or more")
        if None not in self.shots:
            raise DataError(f"shots are {self.shots}; expected 'all' among them, which is what methods are ranked by")

    def cells(self, digests: Mapping[tuple[str, int, bool], str], tables: Mapping[tuple[str, int], str]) -> list[Cell]:
        """Every cell; `digests` has the draw of each (label, seed, with prompts) and `tables` what is known of the users of each
        (label, seed). Seeds are outermost within a data set and condition, so that an unfinished bench has whole comparisons."""
        told = {name: Method.of(model) for name, model in self.methods.items()}
        return [
            Cell(
                source.label,
                condition.name,
                name,
                seed,
                told[name],
                digests[source.label, seed, model.reads_prompts],
                source.origin,
                self.shots,
                tables.get((source.label, seed), "") if known.reads(model) else "",
            )
            for source in self.sources
            for condition in self.conditions
            for seed in self.seeds
            for name, model in self.methods.items()
        ]


def recorded(folder: Path) -> list[Cell]:
    """The cells of `plan.json`; none where there is no such file. Raises `ModelFileError` where it cannot be read."""
    path = folder / "plan.json"
    if not path.exists():
        return []
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if (held["format"], held["version"]) != (FORMAT, VERSION):
            raise ModelFileError(f"{path} is {held['format']} version {held['version']}; expected {FORMAT} version {VERSION}")
        return [Cell.from_json(cell) for cell in held["cells"]] if held["palate"] == __version__ else []
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{path} cannot be read ({error!r}); give the bench another folder") from error


def record(folder: Path, cells: Sequence[Cell]) -> list[Cell]:
    """Write the list that has `cells` and what is still true of the recorded ones; returns it, in the order of the pages."""
    methods = {cell.name: cell.method for cell in cells}
    origins = {cell.label: cell.origin for cell in cells}
    here = {(cell.label, cell.condition, cell.name, cell.seed) for cell in cells}

    def stays(cell: Cell) -> bool:
        anew = (cell.label, cell.condition, cell.name, cell.seed) in here
        same = methods.get(cell.name, cell.method) == cell.method and origins.get(cell.label, cell.origin) == cell.origin
        return same and not anew

    kept = [cell for cell in recorded(folder) if stays(cell)]
    every = _ordered([*cells, *kept])
    folder.mkdir(parents=True, exist_ok=True)
    value: dict[str, Any] = {"format": FORMAT, "version": VERSION, "palate": __version__}
    partial = folder / "plan.json.partial"
    partial.write_text(json.dumps({**value, "cells": [cell.as_json() for cell in every]}, indent=1), encoding="utf-8")
    partial.replace(folder / "plan.json")
    return every


def _ordered(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of one data set, then condition, seed and method, each in the order of its first appearance."""
    columns = [[cell.label for cell in cells], [cell.condition for cell in cells], [cell.name for cell in cells]]
    label, condition, name = ({value: i for i, value in enumerate(dict.fromkeys(column))} for column in columns)
    return sorted(cells, key=lambda cell: (label[cell.label], condition[cell.condition], cell.seed, name[cell.name]))
