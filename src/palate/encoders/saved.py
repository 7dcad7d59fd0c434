"""The encoder beside a model: `encoder.json`, from which the same features can be made again wherever the folder goes."""

import json
import shutil
from pathlib import Path

from palate.encoders import Encoder, restore_encoder
from palate.encoders.tuned import TunedEncoder
from palate.errors import ModelFileError
from palate.models.base import RewardModel

ENCODER_FILE = "encoder.json"


def save_encoder(encoder: Encoder, folder: str | Path) -> None:
    """Beside a model, what makes the same features again. Written whole or not at all."""
    folder = Path(folder)
    if isinstance(encoder, TunedEncoder):
        encoder.save(folder)  # first: what encoder.json names must be there
    partial = folder / f"{ENCODER_FILE}.partial"
    partial.write_text(json.dumps(encoder.state()), encoding="utf-8")
    partial.replace(folder / ENCODER_FILE)


def saved_encoder(folder: str | Path) -> Encoder:
    """The encoder of a model's folder, with the fingerprint that it had.

    Raises:
        ModelFileError: there is none, or its file cannot be read.
        MismatchError: this version of the encoder, or its weights, would compute other features.
    """
    state = saved_state(folder)
    if state.get("encoder") == "tuned":
        base = state.get("base")
        if not isinstance(base, dict):
            raise ModelFileError(f"{folder} does not say which encoder was tuned; fit the model again")
        return TunedEncoder.restore(state, restore_encoder(base), folder)
    return restore_encoder(state)


def save_together(model: RewardModel, encoder: Encoder, folder: str | Path) -> None:
    """Model and encoder in one folder. A new folder appears whole or not at all; in one that exists each part is replaced whole.

    Where the process dies between two parts of an existing folder, encoder and model have different fingerprints, and every use
    is refused.
    """
    folder = Path(folder)
    if folder.exists():
        model.save_pretrained(folder)
        save_encoder(encoder, folder)
        return
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # of a process that died
    model.save_pretrained(partial)
    save_encoder(encoder, partial)
    partial.rename(folder)


def saved_state(folder: str | Path) -> dict[str, object]:
    """The state of the encoder of a model's folder, as `Encoder.state` gave it; nothing is loaded. Raises as `saved_encoder`."""
    path = Path(folder) / ENCODER_FILE
    if not path.exists():
        raise ModelFileError(f"{folder} has no {ENCODER_FILE}; expected a folder written by `palate fit`")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFileError(f"{path} is no JSON ({error}); expected what `palate fit` wrote; fit the model again") from error
    if not isinstance(state, dict):
        raise ModelFileError(f"{path} holds a {type(state).__name__}; expected what `palate fit` wrote; fit the model again")
    return state
