"""Models of transformers from a folder or the hub: safetensors only, no code of the repository, every weight accounted for.

A weight that the file does not have would be drawn at random, and features of random weights look like any others. So the names
are compared, and what is missing is an error.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from palate.encoders.base import digest
from palate.errors import DataError, MissingExtraError, ModelFileError

INSTALL = "pip install 'palate[hf]'"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
# Of the configuration, what says where a model came from or how it is run and changes no feature.
_VOLATILE = {
    "_name_or_path",
    "_attn_implementation",
    "attn_implementation",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_VOLATILE |= {"return_dict", "output_hidden_states", "output_attentions", "tokenizer_class"}


class Loaded(NamedTuple):
    """A model and its tokenizer as read from files."""

    model: Any
    tokenizer: Any
    weights: str  # SHA-256 of the weight files
    vocabulary: str  # SHA-256 of the tokenizer
    revision: str | None  # commit on the hub, None for a folder


def load(id: str, revision: str | None, dtype: str) -> Loaded:
    """The checkpoint `id`, in evaluation mode and without gradients. Weights are read once more for their hash, 1 GB a second.

    A classifier (`...ForSequenceClassification`) keeps its head; of anything else the model below the head is loaded.

    Raises:
        DataError: an unknown dtype, a folder or repository that is not there, a revision of a folder.
        ModelFileError: no safetensors, weights that are missing, a model that needs code of its repository or is no text encoder.
        MissingExtraError: transformers is not installed.
    """
    if dtype not in DTYPES:
        raise DataError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as error:
        raise MissingExtraError(f"a model of the hub or of a folder needs the package transformers; run: {INSTALL}") from error
    folder, commit = folder_of(id, revision)
    if (folder / "adapter_config.json").exists():  # transformers would load it too, on whatever model it names
        raise ModelFileError(f"{id} has an adapter of peft; expected a whole model: merge_and_unload() it, and save the result")
    weights = weight_files(folder)
    hashes = digest({file.name: _file_hash(file) for file in weights})
    with (
        quiet(),
        torch.random.fork_rng(devices=[]),
    ):  # initial weights that are thrown away would move the caller's random stream
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if config.is_encoder_decoder:
                raise ModelFileError(f"{id} is an encoder-decoder ({config.model_type}); expected a decoder or an encoder alone")
            heads = [name for name in config.architectures or [] if name.endswith("ForSequenceClassification")]
            kind = AutoModelForSequenceClassification if heads else AutoModel
            model, report = kind.from_pretrained(
                folder,
                config=config,
                dtype=DTYPES[dtype],
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            if isinstance(error, ModelFileError):
                raise
            raise ModelFileError(
                f"{id} cannot be loaded ({error}); expected a text model of transformers in safetensors"
            ) from error
    missing = sorted(name for name in report["missing_keys"] if "pooler." not in name)  # BERT's pooler is not read
    if missing or report["mismatched_keys"]:
        raise ModelFileError(
            f"{id} has no weights for {', '.join(missing[:5])} ({len(missing)} missing, {len(report['mismatched_keys'])} of "
            "another shape), which would be drawn at random; expected a checkpoint of the architecture that its config.json names"
        )
    vocabulary = folder / "tokenizer.json"
    return Loaded(
        model.eval().requires_grad_(False),
        tokenizer,
        hashes,
        _file_hash(vocabulary) if vocabulary.exists() else vocabulary_hash(tokenizer),
        commit,
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files in `folder` that hold the model: those that its index names, or model.safetensors.

    Raises:
        ModelFileError: there are none.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    else:
        files = [folder / "model.safetensors"]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise ModelFileError(
            f"{folder} has no {absent[0]}; expected weights in safetensors (pickled weights are not opened: convert them with "
            "save_pretrained)"
        )
    return files


def state_hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, by name. About 1 GB a second."""
    out = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        out.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        out.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return out.hexdigest()


def vocabulary_hash(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer in memory, without its padding and truncation, which calls to it leave behind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest({"vocabulary": tokenizer.get_vocab()})
    described = json.loads(backend.to_str())
    return digest({key: value for key, value in described.items() if key not in ("padding", "truncation")})


def config_hash(config: Any) -> str:
    """SHA-256 of what a configuration says about the features."""
    return digest(
        {key: value for key, value in json.loads(config.to_json_string(use_diff=False)).items() if key not in _VOLATILE}
    )


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_of(id: str, revision: str | None, patterns: Sequence[str] = FILES) -> tuple[Path, str | None]:
    """(folder, commit): a folder itself and None, or a repository's files in the hub's cache, fetched where they are not there.

    Raises:
        DataError: there is neither such a folder nor such a repository, or the hub cannot be reached.
    """
    path = Path(id).expanduser()
    if path.is_dir():
        if revision is not None:
            raise DataError(f"revision is {revision!r} for the folder {id}; expected None: a folder has one version")
        return path, None
    if id.count("/") > 1 or id.startswith(("/", ".", "~")):
        raise DataError(f"there is no folder {id!r}; expected a folder with config.json and safetensors, or an id of the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(id, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"{id!r} is neither a folder nor a repository of the hub that can be had ({error}); check the name, the revision "
            f"({revision}) and the connection, or pass a folder"
        ) from error
    return found, found.name


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bar and the reports of transformers: what they say is checked here. Settings are put back."""
    from transformers.utils import logging

    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
