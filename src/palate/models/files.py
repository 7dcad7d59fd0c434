"""A model on disk: `config.json` (everything needed to say what it is and to repeat it) beside `model.safetensors` (its numbers).

A folder is either the old model or the new one, never half of each, whenever the process that writes it dies. Two files cannot
be renamed at once, so the new numbers are first written whole under the name `model.safetensors.next`; then `config.json`, which
holds their SHA-256, is replaced in one step, and that is the moment at which the new model counts; then the numbers get their
name. A reader takes whichever of the two files has the hash. Other files of the folder are left alone. Nothing is unpickled, and
only the classes below can be named.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from palate.errors import ModelFileError

FORMAT, VERSION = "palate-model", 1
CONFIG, NUMBERS = "config.json", "model.safetensors"
NEXT = f"{NUMBERS}.next"


class Kind(NamedTuple):
    """Where a class is found, and its numbers by name with one letter a dimension: equal letters are equal sizes."""

    module: str
    shapes: Mapping[str, str]


# D features, K weights, M bends, T types; F outputs of a first layer, H numbers after it, S spreads (K of them or none).
KINDS = {
    "BradleyTerry": Kind("palate.models.factored", {"direction": "D"}),
    "LoRe": Kind("palate.models.factored", {"bases": "DK", "mean_weights": "K"}),
    "MRM": Kind("palate.models.mrm", {"direction": "D", "bases": "DF", "hidden": "H", "start": "K", "spread": "S"}),
    "PAL": Kind(
        "palate.models.pal",
        {
            **{"direction": "D", "entry": "DF", "rest": "H", "prompt_entry": "DG", "prompt_rest": "J", "prototypes": "PE"},
            **{"mean_weights": "K", "scale": "", "concentration": ""},
        },
    ),
    "PReF": Kind("palate.models.pref", {"direction": "D", "bases": "DK", "mean": "K", "factor": "LL"}),
    "VPL": Kind("palate.models.vpl", {"direction": "D", "first": "DF", "bias": "B", "rest": "R", "spread": "K"}),
    "IndividualBT": Kind("palate.models.individual", {"direction": "D", "scale": "D"}),
    "GroupBT": Kind("palate.models.groups", {"rewards": "DG", "share": "G"}),
    "Neighbours": Kind("palate.models.neighbours", {"rewards": "DK", "nearest": "", "sharpness": ""}),
    "AttributePrior": Kind(
        "palate.models.attribute_prior",
        {
            **{"direction": "D", "bases": "DK"},
            **{"frequencies": "DM", "phases": "M", "amplitudes": "M"},
            **{"share": "T", "means": "TK", "factors": "TKK"},
            **{"effect": "EA", "rest": "EE", "centre": "A", "size": "A"},  # E is K, or 0 where attributes say nothing
        },
    ),
    "Reference": Kind("palate.models.reference", {"direction": "D", "bias": ""}),
    "GivenBases": Kind(
        "palate.models.given",
        {"scale": "D", "crowd": "D", "concentration": "C", "share": "T", "means": "TK", "factors": "TKK"},
    ),
    "Hierarchical": Kind(
        "palate.models.hierarchical",
        {
            **{"direction": "D", "bases": "DK"},
            **{"frequencies": "DM", "phases": "M", "amplitudes": "M"},
            **{"share": "T", "means": "TK", "factors": "TKK"},
        },
    ),
}


def write(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a model of one of `KINDS`, in place of the one in the folder; `config` has its class, options, encoder and record.

    Raises:
        ModelFileError: a class that is not in `KINDS`, something that is not JSON, a path that is a file, or a folder whose
            config.json is not ours (a model of another library, say), which is never overwritten.
    """
    folder = Path(folder)
    if config["class"] not in KINDS:
        raise ModelFileError(f"a {config['class']} cannot be saved; expected one of {', '.join(KINDS)}")
    if folder.exists() and not folder.is_dir():
        raise ModelFileError(f"{folder} is a file; expected a folder, or a name where one can be made")
    if (folder / CONFIG).exists():
        before = _config(folder)
        if (folder / NEXT).exists() and _sha256((folder / NEXT).read_bytes()) == before.get("sha256"):
            (folder / NEXT).replace(folder / NUMBERS)  # the last step of a writer that died: its numbers are the model's
    numbers = save(_own(tensors))
    head = {"format": FORMAT, "format_version": VERSION, **config, "sha256": _sha256(numbers)}
    try:
        text = json.dumps(_nulls(head), indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ModelFileError(
            f"the options or the record of this {config['class']} are no JSON ({error}); expected plain values"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{NUMBERS}.partial"
    _flush(partial, numbers)
    partial.replace(folder / NEXT)
    partial = folder / f"{CONFIG}.partial"
    _flush(partial, text.encode())
    partial.replace(folder / CONFIG)
    (folder / NEXT).replace(folder / NUMBERS)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """One safetensors file, whole or not at all, on the disk when this returns; its folder is made where there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    _flush(partial, save(_own(tensors), metadata))
    partial.replace(path)


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clones, because a view or an expanded tensor would write more, or other, numbers than it shows."""
    return {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}


def read(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write` was given, checked: config and tensors.

    Raises:
        ModelFileError: which file is missing, corrupt, foreign, newer, or holds numbers that the class cannot have.
    """
    folder = Path(folder)
    for _ in range(3):  # a writer may replace both files between the look at the one and at the other
        config = _header(folder)
        numbers = _numbers(folder, config["sha256"])
        if numbers is not None:
            break
    else:
        raise ModelFileError(
            f"{folder / NUMBERS} is not the file that {CONFIG} was written for (another SHA-256): it is cut off, changed, or "
            "another model's; copy the folder again, or save the model again"
        )
    try:
        # A clone, because the reader's tensors begin anywhere in memory, and sums over odd addresses can differ in the last bit.
        tensors = {key: tensor.clone() for key, tensor in load(numbers).items()}
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelFileError(f"{folder / NUMBERS} is no safetensors file ({error}); save the model again") from error
    _check(folder / NUMBERS, config["class"], tensors)
    return config, tensors


def check_ours(folder: str | Path) -> None:
    """Raise `ModelFileError` unless the config.json of `folder` is that of a model that this version reads."""
    _header(Path(folder))


def check_foreign(folder: str | Path) -> None:
    """Raise `ModelFileError` where the config.json of `folder` is another library's: a model of any version may be replaced."""
    _config(Path(folder))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        there = "has no " + CONFIG if folder.is_dir() else "is no folder"
        raise ModelFileError(f"{folder} {there}; expected a folder written by model.save_pretrained")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is no JSON ({error}); the file is corrupt: save the model again, or elsewhere") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ModelFileError(f"{path} is of format {found!r}; expected {FORMAT!r}: it belongs to something else")
    return config


def _header(folder: Path) -> dict[str, Any]:
    """A config of this version, of a class that we have, with everything that it must say."""
    config, path = _config(folder), folder / CONFIG
    version, name = config.get("format_version"), config.get("class")
    if not isinstance(version, int) or version < 1:
        raise ModelFileError(f"{path} has format_version {version!r}; expected a number from 1 to {VERSION}")
    if version > VERSION:
        raise ModelFileError(
            f"{path} has format_version {version}, written by a newer palate; this one reads up to {VERSION}: upgrade palate"
        )
    if not isinstance(name, str) or name not in KINDS:
        raise ModelFileError(f"{path} holds a {name!r}; expected one of {', '.join(KINDS)}")
    types: dict[str, Any] = {"options": dict, "record": dict, "sha256": str, "encoder": str | None}
    wrong = [key for key, kind in types.items() if not isinstance(config.get(key), kind)]
    if wrong:
        raise ModelFileError(f"{path} has no usable {' and no usable '.join(wrong)}; it was changed by hand: save again")
    return config


def _numbers(folder: Path, sha256: str) -> bytes | None:
    """The bytes with this hash, wherever the writer has them; None where nothing has."""
    found = False
    for name in (NUMBERS, NEXT, NUMBERS):  # the first once more, for a writer that renames between the two looks
        try:
            content = (folder / name).read_bytes()
        except FileNotFoundError:
            continue
        found = True
        if _sha256(content) == sha256:
            return content
    if not found:
        raise ModelFileError(f"{folder} has no {NUMBERS}, only a {CONFIG}; expected both, as model.save_pretrained writes them")
    return None


def _check(path: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    shapes = KINDS[name].shapes
    if tensors.keys() != shapes.keys():
        raise ModelFileError(f"{path} holds {sorted(tensors)}; expected the numbers of a {name}: {sorted(shapes)}")
    sizes: dict[str, int] = {}
    for key, letters in shapes.items():
        tensor = tensors[key]
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ModelFileError(f"{path}: {key} is {tensor.dtype}; expected float32 or float64")
        if not bool(torch.isfinite(tensor).all()):
            raise ModelFileError(f"{path}: {key} holds NaN or infinite numbers; expected finite ones: fit the model again")
        # A part that was never fitted is empty in every dimension, that of the features included.
        unused = tensor.ndim == len(letters) and not any(tensor.shape)
        agreed = tensor.ndim == len(letters) and all(
            sizes.setdefault(letter, size) == size
            for letter, size in zip(letters, tensor.shape, strict=True)
            if not unused or letter != "D"
        )
        if not agreed:
            raise ModelFileError(f"{path}: {key} has shape {tuple(tensor.shape)}; expected ({', '.join(letters)}) with {sizes}")
    if not sizes.get("D"):
        raise ModelFileError(f"{path} reads no feature; expected the numbers of a fitted {name}")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _nulls(value: Any) -> Any:
    """The same JSON with null for NaN: a loss that nobody could measure is not a number."""
    if isinstance(value, Mapping):
        return {key: _nulls(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_nulls(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _flush(path: Path, content: bytes) -> None:
    """Written and on the disk: a rename must not outrun what it renames when the machine, not only the process, goes down."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
