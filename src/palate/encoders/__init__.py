"""From texts to features: `load_encoder` by name, `restore_encoder` from what a saved model carries."""

import importlib
from pathlib import Path
from typing import Any

from palate.encoders.base import BatchedEncoder, Encoder, State, digest
from palate.encoders.joined import JoinedEncoder
from palate.encoders.minilm import MiniLM
from palate.encoders.offline import Items, Style
from palate.encoders.sentence import SentenceEncoder
from palate.encoders.specs import Part, chosen, parse
from palate.errors import DataError, MismatchError, ModelFileError

__all__ = [
    "BatchedEncoder",
    "Encoder",
    "Items",
    "JoinedEncoder",
    "MiniLM",
    "SentenceEncoder",
    "State",
    "Style",
    "load_encoder",
    "restore_encoder",
]

NAMES = ("items", "minilm", "style")
KINDS = {  # what stands before a colon, and what after it
    "hf": "a model of transformers: an id on the hub, or a folder",
    "st": "a model of sentence-transformers, likewise",
    "labels": "all the logits of a classifier",
    "scores": "a file with scores of every text",
    "openai": "a model behind an OpenAI-compatible /embeddings",
    "vllm": "a model behind vLLM's /pooling",
}
# Modules that only some users need: each is imported when its encoder is asked for.
_BY_SPEC = {
    "labels": "palate.encoders.labels:LabelScores",
    "scores": "palate.encoders.scorers:TableScorers",
    "openai": "palate.encoders.endpoints:OpenAIEmbeddings",
    "vllm": "palate.encoders.endpoints:VLLMPooling",
}
_BY_STATE = {**_BY_SPEC, "scorers": "palate.encoders.scorers:Scorers"}


def load_encoder(spec: str) -> Encoder:
    """The encoder named by `spec`.

    "items", "style" and "minilm" are names; "st:ID" and "hf:ID" models of sentence-transformers and of transformers, by an id on
    the hub or a folder; "labels:ID" all the logits of a classifier; "scores:FILE" scores from a file; "openai:MODEL" and
    "vllm:MODEL" models behind a server. Options follow a question mark ("minilm?text=response"), and "+" joins several
    ("hf:./folder+style"); the grammar is in `palate.encoders.specs`. A folder, or an id whose files are in the hub's cache, may
    stand without its prefix.

    Raises:
        DataError: a name, kind or option that does not exist, an empty part, the same part twice.
        ModelFileError: a model that cannot be loaded.
        MissingExtraError: an encoder whose packages are not installed; the message has the command.
    """
    if not isinstance(spec, str):
        raise DataError(f"the encoder is a {type(spec).__name__}; expected a name such as 'minilm+style'")
    parts = [_resolved(part, spec) for part in parse(spec, NAMES, KINDS)]
    if len(set(parts)) != len(parts):
        raise DataError(f"{spec!r} names an encoder twice; expected each one once")
    encoders = [_made(part) for part in parts]
    return encoders[0] if len(encoders) == 1 else JoinedEncoder(encoders)


def restore_encoder(state: State) -> Encoder:
    """The encoder whose `state()` was saved, with the same fingerprint.

    Raises:
        ModelFileError: a state that no encoder of this version wrote, or files that are no longer there.
        MismatchError: this version of the encoder, or its files, give other features than the saved one did.
    """
    try:
        encoder = _restored(state)
    except (MismatchError, ModelFileError):
        raise
    except DataError as error:
        raise ModelFileError(f"the saved encoder cannot be made again here: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ModelFileError(f"the saved encoder cannot be read ({error!r}); expected what Encoder.state() returns") from error
    if digest(encoder.state()) != digest(state):
        raise MismatchError(
            f"the saved encoder {encoder.spec!r} differs from the one in this version of palate, so its features would mean "
            "something else; use the version that wrote it, or fit again"
        )
    return encoder


def _resolved(part: Part, spec: str) -> Part:
    """The part with its kind said: a folder, or an id in the hub's cache, is known by its files."""
    if part.source or part.kind in NAMES:
        return part
    folder = Path(part.kind)
    if part.kind and folder.is_dir():
        if (folder / "modules.json").exists():
            return Part("st", part.kind, part.options)
        if (folder / "config.json").exists():
            return Part("hf", part.kind, part.options)
        raise DataError(f"the folder {part.kind!r} has neither modules.json nor config.json; expected a saved model")
    if part.kind.count("/") == 1 and not part.kind.startswith((".", "/")):
        from huggingface_hub import try_to_load_from_cache

        for kind, file in (("st", "modules.json"), ("hf", "config.json")):
            if isinstance(try_to_load_from_cache(part.kind, file), str):
                return Part(kind, part.kind, part.options)
        raise DataError(
            f"{part.kind!r} is no folder here and was not fetched from the hub before; expected 'hf:{part.kind}' for a model of "
            f"transformers, or 'st:{part.kind}' for one of sentence-transformers"
        )
    if part.kind.startswith((".", "/", "~")):
        raise DataError(f"there is no folder {part.kind!r} (in {spec!r}); expected one with a saved model")
    kinds = ", ".join(f"'{kind}:...' ({what})" for kind, what in KINDS.items())
    raise DataError(
        f"there is no encoder {part.kind!r} (in {spec!r}); expected {', '.join(NAMES)}, {kinds}, a folder with a model, or "
        "several joined with '+'"
    )


def _made(part: Part) -> Encoder:
    options = dict(part.options)
    if part.kind in ("hf", "labels", "st") and "device" in options:
        _tried(options["device"], part)
    if part.kind == "items":
        return Items(**chosen(options, (), (), "items"))
    if part.kind == "style":
        return Style(**chosen(options, (), (), "style"))
    if part.kind == "minilm":
        return MiniLM(**chosen(options, ("text",), (), "minilm"))
    if part.kind == "st":
        return SentenceEncoder.from_spec(part.source, options)
    if part.kind == "hf":
        from palate.encoders.huggingface import HuggingFace

        texts, numbers = ("revision", "pooling", "template", "dtype", "device"), ("layer", "max_tokens", "tokens_per_batch")
        encoder: Encoder = HuggingFace(part.source, **chosen(options, texts, numbers, "hf"))
        encoder.spec = str(part)
        return encoder
    made: Encoder = _class(_BY_SPEC[part.kind]).from_spec(part.source, options)
    return made


def _tried(device: str, part: Part) -> None:
    """Refuse a device that nothing can be put on, before gigabytes of weights are read."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # built without it, no such device, no such name
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"the device {device!r} of '{part}' cannot be used ({reason}); expected one of this machine, such as 'cpu'"
        ) from error


def _restored(state: State) -> Encoder:
    kind = state["encoder"]
    if kind == "joined":
        return JoinedEncoder([_restored(part) for part in state["parts"]], state["gains"])
    if kind == "items":
        return Items(state["catalogue"])
    if kind == "minilm":
        return MiniLM.restore(state)
    if kind == "sentence":
        return SentenceEncoder.restore(state)
    if kind == "style":
        return Style()
    if kind == "huggingface":
        from palate.encoders.huggingface import HuggingFace

        return HuggingFace.from_state(state)
    if kind in _BY_STATE:
        restored: Encoder = _class(_BY_STATE[kind]).restore(state)
        return restored
    if kind == "tuned":
        raise ModelFileError(
            "a tuned encoder keeps its numbers beside its model; read it with palate.encoders.saved.saved_encoder"
        )
    known = ("joined", *NAMES, "sentence", "huggingface", *_BY_STATE)
    raise ModelFileError(f"the saved encoder is of kind {kind!r}; expected one of {', '.join(known)}")


def _class(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
