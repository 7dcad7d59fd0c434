"""A training run on disk: a log, checkpoints at intervals, the model, and going on after the process was stopped.

    DIR/log.jsonl                one line an epoch: epoch, loss, seconds, and the held-out users' accuracy at checkpoints
    DIR/checkpoints/epoch-20     `meta.State`, everything that the next epoch depends on; it holds no user
    DIR/model                    the model as of the last checkpoint, for `load_model`

Only `MRM` is learned in epochs. What is killed at any moment and resumed ends with the bits of a run that was not: an epoch
depends on the state and on draws keyed by its number, every file is replaced whole, and a line that belongs to an epoch after the
checkpoint is written anew.
"""

import json
import math
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError, ModelFileError
from palate.evaluation import evaluate
from palate.models.base import RewardModel
from palate.models.meta import State
from palate.models.mrm import MRM, Epoch
from palate.training import check_finite
from palate.version import __version__

LOG, CHECKPOINTS, MODEL = "log.jsonl", "checkpoints", "model"
Progress = Callable[[float, str], None]  # (share done, what)


@torch.no_grad()
def train(
    model: RewardModel,
    data: EmbeddedPairs,
    out: str | Path,
    *,
    every: int = 10,
    held_out: tuple[EmbeddedPairs, EmbeddedPairs] | None = None,
    resume: bool = False,
    seed: int = 0,
    on_save: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> MRM:
    """`fit` for a method that learns in epochs, with a log, checkpoints, and `resume` after the process was stopped.

    Args:
        model: an unfitted `MRM`, of either preset.
        data: training pairs of the seen users.
        out: folder of the run, which is made where it does not exist.
        every: epochs between checkpoints; the first and the last epoch always have one.
        held_out: (support, test) of users who are not in `data`: at each checkpoint they are adapted from the one, and the mean
            of their accuracies on the other is logged. Nothing is chosen by it: the model is that of the last epoch.
        resume: go on from the last checkpoint in `out`, if there is one. Without it, a folder with a run in it is refused.
        seed, progress: as for `fit`, which gives the same bits.
        on_save: called with the folder of the model each time it was written, for what belongs beside it.

    Raises:
        DataError: a method without epochs, a folder with a run in it, held-out users who are trained on, only ties.
        MismatchError: the run in the folder has other options, other data or another seed.
        ModelFileError: none of the checkpoints in the folder can be read.
    Cost: training, a few numbers a base on disk per checkpoint, and where users are held out one `evaluate` each.
    """
    folder = Path(out)
    if not isinstance(model, MRM):
        raise DataError(
            f"{type(model).__name__} is learned in one solve, without epochs to log or to go on from; expected an MRM, or use "
            "palate.fit (`palate fit`)"
        )
    if every < 1:
        raise DataError(f"every is {every}; expected at least 1 epoch between checkpoints")
    if bool(data.tie.all()):
        raise DataError(f"{len(data)} pairs, all of them ties; expected at least one choice to learn from")
    both = set(data.user_ids).intersection(held_out[1].user_ids if held_out else ())
    if both:
        raise DataError(f"{len(both)} users, such as {min(both)!r}, are held out and trained on; expected one or the other")
    state = _last(folder, resume=resume)
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    began, whose = time.perf_counter(), -1 if state is None else state.epoch
    for number, epoch in enumerate(model.epochs(data, seed=seed, state=state, progress=progress)):
        if not number:  # only now is it sure that the run goes on
            _keep_log(folder, whose)
        if epoch.state is not state:  # the state that it goes on from is logged and saved already
            row: dict[str, Any] = {"epoch": epoch.number, "loss": None if math.isnan(epoch.loss) else epoch.loss}
            due = epoch.number % every == 0
            if due and held_out is not None:
                row |= _measured(epoch, *held_out, seed=seed)
            now = time.perf_counter()
            _append(folder / LOG, row | {"seconds": round(now - began, 3)})
            began = now
            if due:
                _save(folder, epoch, data, seed, on_save)
        last = epoch
    return _save(folder, last, data, seed, on_save)


def _measured(epoch: Epoch, support: EmbeddedPairs, test: EmbeddedPairs, *, seed: int) -> dict[str, float]:
    found = evaluate(epoch.model(), support, test, seed=seed).columns
    return {"held_out_accuracy": float(found["accuracy"].mean()), "held_out_log_loss": float(found["log_loss"].mean())}


def _model(epoch: Epoch, data: EmbeddedPairs, seed: int) -> MRM:
    """The model with what `fit` records, except for seconds: a run that was stopped saves the same file."""
    out = epoch.model()
    check_finite(out)
    versions = {"palate": __version__, "torch": torch.__version__, "python": platform.python_version()}
    out.record |= {"data": data.fingerprint(), "n_pairs": len(data), "n_users": len(data.user_ids), "seed": seed}
    out.record |= {"epochs": epoch.number, "versions": versions}
    return out


def _save(folder: Path, epoch: Epoch, data: EmbeddedPairs, seed: int, on_save: Callable[[Path], None] | None) -> MRM:
    model = _model(epoch, data, seed)
    epoch.state.save(folder / CHECKPOINTS / f"epoch-{epoch.number}")
    model.save_pretrained(folder / MODEL)
    if on_save is not None:
        on_save(folder / MODEL)
    return model


def _last(folder: Path, *, resume: bool) -> State | None:
    """The newest state of the run that can be read; None where there is no run yet."""
    names = [entry.name for entry in (folder / CHECKPOINTS).iterdir()] if (folder / CHECKPOINTS).is_dir() else []
    numbers = sorted((int(found[1]) for name in names if (found := re.fullmatch(r"epoch-(\d+)", name))), reverse=True)
    if not resume and (numbers or (folder / LOG).exists()):
        there = f"a run up to epoch {numbers[0]}" if numbers else "the log of a run"
        raise DataError(f"{folder} holds {there}; give resume (--resume) to go on with it, or another folder")
    broken: ModelFileError | None = None
    for number in numbers:
        try:
            return State.load(folder / CHECKPOINTS / f"epoch-{number}")
        except ModelFileError as error:  # a disk that lost the newest file still has the one before
            broken = error
    if broken is not None:
        raise ModelFileError(f"no checkpoint in {folder / CHECKPOINTS} can be read ({broken}); begin anew elsewhere") from broken
    return None


def _keep_log(folder: Path, epoch: int) -> None:
    """The lines up to this epoch; what came after it, half a line at the end included, will come again."""
    path = folder / LOG
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().split(b"\n")[:-1] if _epoch_of(line) <= epoch]
    partial = path.with_name(LOG + ".partial")
    partial.write_bytes(b"".join(line + b"\n" for line in kept))
    partial.replace(path)


def _epoch_of(line: bytes) -> float:
    try:
        row = json.loads(line)
        return int(row["epoch"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
