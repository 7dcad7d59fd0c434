"""All cells of a benchmark as one file of rows, and as one `Evaluation` for each data set and condition."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from palate.bench import cells
from palate.bench.cells import Cell
from palate.bench.plan import recorded
from palate.errors import DataError
from palate.evaluation import Evaluation
from palate.evaluation.result import COLUMNS

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Board:
    """What is known of one data set under one condition. `missing` counts the cells that were not run (yet)."""

    data_set: str
    condition: str
    evaluation: Evaluation
    methods: tuple[str, ...]  # all that were asked for, those without a figure included
    seeds: tuple[int, ...]
    missing: int

    @property
    def complete(self) -> tuple[str, ...]:
        """The methods with figures for every seed: only these can be ranked."""
        found = {(run.method, run.seed) for run in self.evaluation.runs} - {
            (failure.method, failure.seed) for failure in self.evaluation.failures
        }
        return tuple(name for name in self.methods if all((name, seed) in found for seed in self.seeds))


def boards(folder: Path) -> Iterator[Board]:
    """One after the other, in the order of the plan; each is read when it is asked for.

    Raises `DataError` where the folder holds no plan of this version, `ModelFileError` for a cell that is damaged.
    """
    for (data_set, condition), group in groupby(_planned(folder), key=lambda cell: (cell.label, cell.condition)):
        of_board = list(group)
        found = [cells.read(folder, cell) for cell in of_board if _is_there(folder, cell)]
        methods = tuple(dict.fromkeys(cell.name for cell in of_board))
        seeds = tuple(dict.fromkeys(cell.seed for cell in of_board))
        joined = Evaluation.concat(found) if found else Evaluation.from_rows([])
        yield Board(data_set, condition, joined, methods, seeds, len(of_board) - len(found))


def _planned(folder: Path) -> list[Cell]:
    every = recorded(folder)
    if not every:
        raise DataError(f"{folder} holds no benchmark of this version of palate; expected the --out of `palate bench`")
    return every


def _is_there(folder: Path, cell: Cell) -> bool:
    return cells.path_of(folder, cell.key).exists()


def with_rows_written(folder: Path, every: Iterable[Board]) -> Iterator[Board]:
    """The same boards, while `results.jsonl` is written: the columns of `palate compare`'s, `condition` before and `failure`
    behind them.

    `failure` is null in a row of figures. A cell that failed is a row without figures whose `failure` says why; no number stands
    in its place. The file is there when the last board was taken, so that no more than one is in memory.
    """
    _planned(folder)
    path = folder / RESULTS
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for board in every:
            for row in _rows(board):
                file.write(json.dumps({"condition": board.condition, **row}, ensure_ascii=False, allow_nan=False) + "\n")
            yield board
    partial.replace(path)


def _rows(board: Board) -> Iterator[dict[str, Any]]:
    for row in board.evaluation.rows():
        yield row | {"failure": None}
    for failure in board.evaluation.failures:
        known = {"data_set": failure.data_set, "method": failure.method, "seed": failure.seed}
        yield dict.fromkeys(COLUMNS) | known | {"failure": f"{failure.stage}: {failure.message}"}
