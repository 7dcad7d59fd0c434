"""`python -m palate.bench.worker FOLDER`: runs the cells it is told, one after another, in one thread.

A line of JSON on standard input is a cell; when its file is written, a line of JSON on standard output says how long it took. The
end of the input is the end of the worker, so it never outlives its bench by more than a cell.
"""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch

from palate.bench import cells, known, prepared
from palate.bench.cells import Cell
from palate.bench.protocols import Draw
from palate.data.conditions import Condition
from palate.errors import DataError, PalateError
from palate.evaluation import Evaluation, compare
from palate.models.attribute_prior import AttributePrior
from palate.models.base import RewardModel
from palate.models.columns import Table


def found(cell: Cell, draw: Draw, people: Table | None = None) -> Evaluation:
    """Fit and test one method; one that fails is a failure and no figure. What was learnt from never meets a test choice."""
    try:
        data, parts = Condition.named(cell.condition).apply(*draw, cell.seed)
        model = _fed(cell.method.model(), draw, people)
        return replace(
            compare(
                data,
                None,
                {cell.name: model},
                by=lambda *_: parts,
                seeds=[cell.seed],
                shots=cell.tried(),
                data_set=cell.label,
            ),
            mispredicted=(),
        )
    except Exception as error:  # whatever a method does wrong must not cost the results of the others
        message = str(error) if isinstance(error, PalateError) else f"{type(error).__name__}: {error}"
        # Where nothing could be tested, `compare` raises with the stage in its words.
        stage, _, said = message.partition(f"splits: {cell.name} (")[2].partition("): ")
        return cells.failed(cell, stage or "fit", said or message)


def _fed(model: RewardModel, draw: Draw, people: Table | None) -> RewardModel:
    """The model with what it reads beside choices. Raises `DataError`, which begins with one of `cells.LACKS`, without it."""
    if model.reads_prompts and draw.data.prompts is None:
        raise DataError("no texts: this method reads prompts, and this data set has vectors only")
    if isinstance(model, AttributePrior):
        if people is None:
            raise DataError("no attributes: nothing is known here of single persons beside their choices (docs/bench.md)")
        return model.with_attributes(people)
    return model


def run(folder: Path, lines: TextIO, answers: TextIO) -> None:
    """Every cell of the input; the last draw is kept, because the next cell is often of the same."""
    kept: tuple[str, Draw] | None = None
    for line in lines:
        cell = Cell.from_json(json.loads(line))
        began = time.perf_counter()
        if kept is None or kept[0] != cell.data:
            kept = None  # before the next is read: two tables at once need not fit
            kept = cell.data, prepared.read(folder / "data", cell.data)
        evaluation = found(cell, kept[1], known.kept(folder / "data", cell.attributes) if cell.attributes else None)
        seconds = time.perf_counter() - began
        cells.write(folder, cell, evaluation, seconds)
        message = evaluation.failures[0].message if evaluation.failures else None
        answers.write(json.dumps({"key": cell.key, "seconds": round(seconds, 3), "failure": message}) + "\n")
        answers.flush()


def main() -> None:
    """What a library writes to standard output goes to standard error: the answers have a channel of their own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the bench is told, and ends its workers
    torch.set_num_threads(1)  # sums in another order are other bits, and the cores have a worker each
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    run(Path(sys.argv[1]), sys.stdin, answers)


if __name__ == "__main__":
    main()
