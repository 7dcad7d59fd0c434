"""Runs the cells of a plan in worker processes, and goes on where an earlier run of it was stopped.

    DIR/cells/<key>.json.gz   one for each cell, written whole
    DIR/data                  what the workers read (`palate.bench.prepared`)
    DIR/log.jsonl             a line for each cell that was run: when, how long, and what failed

Killed at any moment, a bench loses the cells that were running.
"""

import fcntl
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from palate.bench import cells, known
from palate.bench.cells import LACKS, Cell
from palate.bench.plan import Plan, record
from palate.bench.prepared import prepare
from palate.bench.workers import finished
from palate.errors import DataError

LOG = "log.jsonl"
# Seconds of a cell on one core of the project's machine: means over the five data sets of docs/bench.md.
TYPICAL: Mapping[str, float] = {
    **{"bt": 1, "lore": 19, "pref": 21, "mrm": 33, "hierarchical": 30},
    **{"pal-a": 15, "pal-b": 15, "vpl": 8, "individual": 1, "individual-crowd": 1, "groups": 4, "neighbours": 3},
    "attribute-prior": 35,
    **{"pal-a-faithful": 10, "pal-b-faithful": 10, "vpl-faithful": 60},
    **{"lore-faithful": 2, "pref-faithful": 1, "mrm-faithful": 40},
}
UNKNOWN = 25.0

Progress = Callable[[int, int, str], None]


class Started(NamedTuple):
    """All cells of the plan's folder, and those that are still to be run."""

    every: Sequence[Cell]
    pending: Sequence[Cell]


def start(
    plan: Plan, folder: Path, *, retry: bool = False, again: Collection[str] = (), progress: Progress | None = None
) -> Started:
    """Draw and embed every data set, leave them where workers find them, and say which cells are missing.

    Everything that can be refused is refused here, before the first fit.

    Args:
        plan: what is to be measured.
        folder: of the results; what an earlier bench left there is used.
        retry: run the cells that failed again.
        again: names of methods whose cells are all run again, as after a change of their code: only a new version of this
            library is noticed by itself.
        progress: called with (done, total, what is being done).

    Raises:
        DataError, LeakError: what the sources raise; a name in `again` that the plan has no method for; another bench runs in the
            folder.
        OSError: the folder cannot be written.
    Cost: one encoding of the texts, the splits, and their leak checks.
    """
    if unknown := sorted(set(again) - set(plan.methods)):
        raise DataError(f"again has {', '.join(unknown)}; expected methods of this bench: {', '.join(plan.methods)}")
    say = progress or (lambda done, total, what: None)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):  # what another bench runs by must not change under it
        found: dict[tuple[str, int, bool], str] = {}
        tables: dict[tuple[str, int], str] = {}
        informed = any(known.reads(model) for model in plan.methods.values())
        kinds = sorted({model.reads_prompts for model in plan.methods.values()})
        total = len(plan.sources) * len(plan.seeds) * len(kinds)
        for source in plan.sources:
            for prompts in kinds:
                for seed in plan.seeds:
                    say(len(found), total, f"preparing {source.label}, seed {seed}")
                    draw = source.draw(seed, prompts=prompts)
                    found[source.label, seed, prompts] = prepare(draw, folder / "data")
            for seed in plan.seeds if informed else ():
                if (table := source.attributes(seed)) is not None:
                    tables[source.label, seed] = known.keep(table, folder / "data")
        mine = plan.cells(found, tables)
        every = record(folder, mine)
        pending: dict[str, Cell] = {}
        for cell in mine:
            path = cells.path_of(folder, cell.key)
            if path.exists() and (cell.name in again or (retry and cells.read(folder, cell).failures)):
                path.unlink()
            if not path.exists():
                pending[cell.key] = cell  # two names of one thing are one cell
        return Started(every, list(pending.values()))


def run(started: Started, folder: Path, *, jobs: int = 1, progress: Progress | None = None) -> int:
    """Run what is missing with so many workers; returns how many of these cells failed.

    One whose data set lacks what the method reads has a message in place of figures, and has not failed.

    Interrupted, it ends its workers; what was written stays. Raises `DataError` for less than one job, and where another bench
    runs in the folder: both would run the same cells.
    """
    if jobs < 1:
        raise DataError(f"jobs is {jobs}; expected at least 1 worker")
    if not started.pending:
        return 0
    say = progress or (lambda done, total, what: None)
    total, failures = len(started.pending), 0
    say(0, total, "starting")
    with _alone(folder), closing(finished(folder, started.pending, jobs)) as answers:
        for number, (cell, told) in enumerate(answers, start=1):
            failures += told["failure"] is not None and not told["failure"].startswith(LACKS)
            _log(folder / LOG, cell, told)
            say(number, total, f"{cell.label}, {cell.condition}, {cell.name}, seed {cell.seed}")
    return failures


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A lock that ends with the process that holds it, however that ends."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another bench runs in {folder}; wait for it, or give another folder") from None
        for stale in (folder / "cells").glob("*.partial"):
            stale.unlink(missing_ok=True)
        yield


def estimated(pending: Sequence[Cell], folder: Path, jobs: int) -> tuple[float, int]:
    """(seconds that the cells will take, how many of them are a guess): what the log says of such cells, of this method on other
    data where it has none, and else what it takes on the project's machine."""
    same: dict[tuple[str, str], list[float]] = {}
    alike: dict[str, list[float]] = {}
    for row in logged(folder):
        if row["failure"] is None:
            same.setdefault((row["data_set"], row["method"]), []).append(row["seconds"])
            alike.setdefault(row["method"], []).append(row["seconds"])
    total, guessed, longest = 0.0, 0, 0.0
    for cell in pending:
        known = same.get((cell.label, cell.name)) or alike.get(cell.name)
        seconds = fmean(known) if known else TYPICAL.get(cell.name, UNKNOWN)
        total, longest = total + seconds, max(longest, seconds)
        guessed += not known
    return max(total / jobs, longest), guessed


def logged(folder: Path) -> list[dict[str, Any]]:
    """The rows of the log; half a line, of a bench that was killed as it wrote, is none."""
    path, out = folder / LOG, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out


def _log(path: Path, cell: Cell, told: dict[str, Any]) -> None:
    row: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "data_set": cell.label, "condition": cell.condition}
    row |= {"method": cell.name, "seed": cell.seed, **told}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
