"""Any model of the sentence-transformers library as an encoder: the library's own numbers, our own batches.

The library tokenises, runs the model, pools and normalises as the model's own `modules.json` says (Reimers and Gurevych 2019), so
the features are those that its users know. What is added: batches by length that are planned before anything runs, a count of
the texts whose end was not read, weights that are safetensors only and whose hash is part of the fingerprint, and no question to
a network about a folder that is already here.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from palate.data.pairs import Text
from palate.encoders.base import Batch, BatchedEncoder, State
from palate.encoders.checkpoints import folder_of, quiet
from palate.encoders.minilm import TOKENS_PER_BATCH, TextOf, check_text, line
from palate.encoders.plans import by_length
from palate.encoders.specs import Part, chosen
from palate.errors import DataError, MismatchError, MissingExtraError, ModelFileError

Precision = Literal["float32", "bfloat16", "float16"]
INSTALL = "pip install 'palate[hf]'"
READ = (".json", ".txt", ".model", ".jinja", ".safetensors")  # files that a module is made from
ON_A_CARD = 32_768  # padded tokens in a forward pass of a GPU
FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # weights that may run code when they are read


class SentenceEncoder(BatchedEncoder):
    """Features of unit or any length, as the model's modules say, for prompt and response or for the response alone.

    Args:
        source: a folder with `modules.json`, or an id on the hub. A folder is read without any network.
        text: "prompt and response" joins them with a line break, "response" leaves the prompt out.
        prompt: the name of one of the model's own prompts ("query", "document" ...), which then stands before every text; None
            takes the model's default, which most do not have.
        max_tokens: of a text that are read, if fewer than the model's own limit.
        dtype: of the weights. The features are compared with others of the same `dtype` only.
        revision: branch, tag or commit on the hub; the commit that it meant is recorded.
        device: where it runs, such as "cuda:1"; None leaves the choice to the library. No part of the fingerprint.

    Attributes:
        model: the `SentenceTransformer`.
        truncated: texts of the last `encode` that were longer than the model reads, whose end was not read.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        ModelFileError: a folder or id that is not there or is no such model, weights that are not safetensors, or modules that
            would run code from the folder.
        DataError: an unknown `text`, `prompt` or `dtype`, or `max_tokens` beyond what the model reads.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        text: TextOf = "prompt and response",
        prompt: str | None = None,
        max_tokens: int | None = None,
        dtype: Precision = "float32",
        revision: str | None = None,
        device: str | None = None,
    ):
        check_text(text)
        if dtype not in get_args(Precision):
            raise DataError(f"dtype is {dtype!r}; expected one of {', '.join(get_args(Precision))}")
        self.source, self.text, self.dtype, self.truncated = str(source), text, dtype, 0
        folder, self.revision = folder_of(self.source, revision, [f"*{suffix}" for suffix in READ])
        self.files = examined(folder)
        self.model = _load(folder, dtype, device)
        self.prompt_name, self.prompt = prompt, self._prompt(prompt)
        own = self.model.max_seq_length
        self.max_tokens = self._limit(max_tokens, own)
        self.width = int(self.model.get_embedding_dimension())
        options = {"text": text, "prompt": prompt, "max_tokens": max_tokens, "dtype": dtype, "revision": revision}
        usual = {"text": "prompt and response", "dtype": "float32", "max_tokens": own}
        said = ((key, str(value)) for key, value in options.items() if value is not None and value != usual.get(key))
        self.spec = str(Part("st", self.source, tuple(said)))

    def plan(self, texts: Sequence[Text]) -> list[Batch]:
        """Batches of texts of like length, as `minilm` makes them."""
        lines = [line(text, self.text) for text in texts]
        ids = self._tokens(lines)
        self.truncated = 0 if self.max_tokens is None else sum(len(row) > self.max_tokens for row in ids)
        most = TOKENS_PER_BATCH if self.model.device.type == "cpu" else ON_A_CARD
        batches = by_length([row[: self.max_tokens] for row in ids], range(len(ids)), most)
        return [Batch(rows, partial(self._forward, [lines[i] for i in rows])) for rows in batches]

    def state(self) -> State:
        return {
            "encoder": "sentence",
            "version": 1,
            "where": {"source": self.source, "revision": self.revision},
            "files": self.files,
            "text": self.text,
            "prompt": self.prompt_name,
            "max_tokens": self.max_tokens,
            "dtype": self.dtype,
        }

    @classmethod
    def from_spec(cls, source: str, options: Mapping[str, str]) -> Self:
        """The encoder of "st:SOURCE?key=value&...". Raises `DataError` for an option that does not exist."""
        given: dict[str, Any] = chosen(options, ("text", "prompt", "dtype", "revision", "device"), ("max_tokens",), "st")
        return cls(source, **given)

    @classmethod
    def restore(cls, state: State) -> Self:
        """The encoder whose `state()` was saved.

        Raises:
            MismatchError: the files that it is made from are no longer the same.
        """
        options = {name: state[name] for name in ("text", "prompt", "max_tokens", "dtype")}
        encoder = cls(state["where"]["source"], revision=state["where"]["revision"], **options)
        if encoder.files != state["files"]:
            raise MismatchError(
                f"the sentence-transformers model {encoder.source!r} has files of SHA-256 {encoder.files[:12]}; expected "
                f"{str(state['files'])[:12]}, those that the saved encoder was made from. Its features would mean something "
                "else: bring the old files back, or fit again"
            )
        return encoder

    def _forward(self, lines: list[str]) -> Tensor:
        rows: Tensor = self.model.encode(
            lines, prompt=self.prompt, batch_size=len(lines), convert_to_tensor=True, show_progress_bar=False
        )
        return rows.float().cpu()

    def _prompt(self, name: str | None) -> str | None:
        known: dict[str, str] = self.model.prompts
        if name is None:
            return known.get(self.model.default_prompt_name or "")
        if name not in known:
            raise DataError(f"{self.source!r} has no prompt {name!r}; expected one of {sorted(known)}, or None")
        return known[name]

    def _limit(self, wanted: int | None, own: int | None) -> int | None:
        if wanted is not None:
            if wanted < 1 or (own is not None and wanted > own):
                raise DataError(f"max_tokens is {wanted}; expected between 1 and {own}, which {self.source!r} reads at most")
            self.model.max_seq_length = wanted
        return own if wanted is None else wanted

    def _tokens(self, lines: list[str]) -> list[list[int]]:
        """Token ids of every line with the model's prompt and special tokens, nothing cut."""
        if not lines:
            return []
        whole = [(self.prompt or "") + one for one in lines]
        tokenizer = self.model.tokenizer
        if hasattr(tokenizer, "encode_batch"):  # a tokenizer of the library below, as models without attention carry
            return [tokens.ids for tokens in tokenizer.encode_batch(whole)]
        found: list[list[int]] = tokenizer(whole, truncation=False, verbose=False)["input_ids"]
        return found


def examined(folder: Path) -> str:
    """SHA-256 over the files that the modules in `folder` are made from. Reads all of them, about 1 GB/s.

    Raises:
        ModelFileError: no `modules.json`, weights that are not safetensors, or a module that is not the library's own.
    """
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        listed = [(str(module["type"]), folder / module["path"]) for module in modules]
        for _, part in listed:  # grows: a router has modules of its own, in folders below its own
            if (part / "router_config.json").exists():
                inner = json.loads((part / "router_config.json").read_text(encoding="utf-8"))["types"]
                listed += [(str(kind), part / name) for name, kind in inner.items()]
    except (AttributeError, OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(
            f"{folder} has no modules.json that can be read ({error}); expected a folder that sentence-transformers wrote. Other "
            "models are named with 'hf:'"
        ) from error
    outside = [kind for kind, _ in listed if not kind.startswith("sentence_transformers.")]
    if outside:
        raise ModelFileError(f"{folder} is made of {outside}; expected modules of sentence-transformers: other code is not run")
    found = {folder / "modules.json", folder / "config_sentence_transformers.json"}
    for _, part in listed:
        files = [file for file in part.iterdir() if file.is_file()] if part.is_dir() else []
        weights = [file.name for file in files if file.suffix in FOREIGN]
        if weights and not any(file.suffix == ".safetensors" for file in files):
            raise ModelFileError(f"{part} has {', '.join(sorted(weights))}; expected safetensors: save the model again with them")
        found.update(file for file in files if file.suffix in READ)
    out = hashlib.sha256()
    for file in sorted(found):
        if file.is_file():
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
            out.update(f"{os.path.relpath(file, folder)}\0{content}\n".encode())
    return out.hexdigest()


def _load(folder: Path, dtype: Precision, device: str | None) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtraError(
            f"the encoder 'st:{folder.name}' needs the package sentence-transformers; run: {INSTALL}"
        ) from error
    weights = {"use_safetensors": True, "dtype": getattr(torch, dtype)}
    with torch.random.fork_rng(devices=[]), quiet():  # layers are initialised before their weights arrive
        try:
            model = SentenceTransformer(
                str(folder), device=device, local_files_only=True, trust_remote_code=False, model_kwargs=weights
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
            raise ModelFileError(
                f"sentence-transformers cannot load {folder} ({type(error).__name__}: {error}); expected a model that it saved"
            ) from error
    return model.eval().requires_grad_(False)
