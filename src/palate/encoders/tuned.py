"""An encoder with learned parts: LoRA adapters inside its model (arXiv 2106.09685), a small MLP on its features, or both.

`palate.fit_through` learns them. The encoder that they sit on is never written to: the adapted model is a copy of its modules
that shares their weights, so both encoders stay what they are and the memory is that of one. The adapters are kept beside the
weights, not merged into them, because a small update vanishes in a half-precision weight.
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from palate.data.pairs import Text
from palate.encoders.base import Batch, BatchedEncoder, Encoder, State
from palate.encoders.huggingface import HuggingFace
from palate.encoders.minilm import MiniLM
from palate.encoders.plans import by_length
from palate.errors import DataError, MismatchError, MissingExtraError, ModelFileError
from palate.models import files

ADAPTER, LAYERS, CONFIG = "adapter_model.safetensors", "layers.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # what peft puts before every name in its own files
HEADS = ("score", "classifier", "lm_head", "pooler", "embed_out")  # modules that read the features and do not make them
CHUNK = 4096  # texts at once through the MLP alone


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates of linear layers: W + (alpha / rank) B A, with A (rank, in) drawn and B (out, rank) zero at first.

    Args:
        rank: of the updates.
        alpha: their scale times the rank; None is twice the rank.
        dropout: on the input of A while training. Above 0 the steps depend on the number of processes.
        targets: last parts of the names of the layers, such as ("q_proj", "v_proj"); None is every linear layer of the model
            but its head.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or (self.alpha is not None and not self.alpha > 0):
            raise DataError(f"{self}; expected a rank of at least 1, alpha above 0 and dropout in [0, 1)")


class Layers(nn.Module):
    """Hidden layers with ReLU over standardised features: relu(... relu(((e - centre) * scale) W_1 + b_1) ...).

    Their outputs are the features of the tuned encoder, and the base rewards that a model learns on them are those of an MLP.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, centre: Tensor, scale: Tensor, widths: Sequence[int], *, seed: int = 0):
        super().__init__()
        if not widths or min(widths) < 1:
            raise DataError(f"hidden is {tuple(widths)}; expected positive widths")
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)
        generator = torch.Generator().manual_seed(seed)
        sizes = list(zip((len(centre), *widths), widths, strict=False))
        drawn = [torch.randn(*size, generator=generator) * (2 / size[0]) ** 0.5 for size in sizes]  # He et al. 2015
        self.matrices = nn.ParameterList([nn.Parameter(matrix.to(centre)) for matrix in drawn])
        self.biases = nn.ParameterList([nn.Parameter(centre.new_zeros(width)) for width in widths])

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, last width)."""
        out = (features.to(self.centre) - self.centre) * self.scale
        for matrix, bias in zip(self.matrices, self.biases, strict=True):
            out = torch.relu(out @ matrix + bias)
        return out


class TunedEncoder(BatchedEncoder):
    """The features of `base` with adapters in its model, `layers` after it, or both.

    Its fingerprint covers the base encoder (and so its weights) and every learned number, so a model fitted on it, and the
    profiles of that model, are refused by the untuned encoder and the other way round.

    Args:
        base: any encoder for `layers`; for `lora` one that holds a transformers model. It is not changed.
        seed: of the first A. The adapters change nothing until they are trained, because B is zero.

    Raises:
        DataError: nothing to learn, an encoder without a model, targets that are no layers of it.
        MissingExtraError: peft is not installed.
    """

    def __init__(self, base: Encoder, lora: LoRA | None = None, layers: Layers | None = None, *, seed: int = 0):
        if lora is None and layers is None:
            raise DataError("neither adapters nor layers; expected LoRA(...), hidden widths, or both")
        self.base, self.lora, self.layers = base, lora, layers
        self.spec = f"{base.spec} (tuned)"
        self.inner: Encoder = base
        self.model: nn.Module | None = None
        if lora is not None:
            self.inner, self.model = _adapted(base, lora, seed)
        inner_width = self.inner.width if isinstance(self.inner, BatchedEncoder) else 0
        self.width = inner_width if layers is None else len(layers.biases[-1])
        self._weights: str | None = None

    def plan(self, texts: Sequence[Text]) -> Sequence[Batch]:
        if self.model is not None and isinstance(self.inner, BatchedEncoder):
            return [Batch(batch.rows, partial(self._after, batch)) for batch in self.inner.plan(texts)]
        parts = [list(range(start, min(start + CHUNK, len(texts)))) for start in range(0, len(texts), CHUNK)]
        return [Batch(part, partial(self._of_table, [texts[i] for i in part])) for part in parts]

    def _after(self, batch: Batch) -> Tensor:
        rows = batch.compute()
        return rows if self.layers is None else self.layers(rows)

    def _of_table(self, texts: Sequence[Text]) -> Tensor:
        table = self.inner.encode(texts)
        rows = table.rows(torch.arange(len(texts), device=table.device))
        return rows if self.layers is None else self.layers(rows)

    def hidden(self, texts: Sequence[Text]) -> Tensor:
        """(N, width) features of `texts` in their order with the gradient by what is learned, in batches of like length."""
        if isinstance(self.inner, HuggingFace):
            ids = self.inner.tokens(texts)
            parts = by_length(ids, range(len(ids)), self.inner.tokens_per_batch)
            found = [self.inner.hidden([texts[i] for i in part]) for part in parts]
        else:
            batches = self.inner.plan(texts) if isinstance(self.inner, BatchedEncoder) else ()
            parts, found = [batch.rows for batch in batches], [batch.compute() for batch in batches]
        place = torch.tensor([i for part in parts for i in part])
        rows = torch.cat(found)[torch.argsort(place)]
        return rows if self.layers is None else self.layers(rows)

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """What is learned, by name: float32 matrices A and B of the adapters, then the layers."""
        found = {} if self.model is None else {n: p for n, p in self.model.named_parameters() if ".lora_" in n}
        return found | ({} if self.layers is None else {f"layers.{n}": p for n, p in self.layers.named_parameters()})

    def train(self, training: bool = True) -> Self:
        """Whether gradients are taken; after training the numbers are fixed and so is the fingerprint."""
        self._weights = None
        for part in (self.model, self.layers):
            if part is not None:
                part.train(training)
        for parameter in self.learned.values():
            parameter.requires_grad_(training)
        return self

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What is written, by file and name; the adapters under peft's names."""
        out: dict[str, dict[str, Tensor]] = {}
        if self.model is not None:
            from peft import get_peft_model_state_dict

            found = get_peft_model_state_dict(self.model, save_embedding_layers=False)
            out[ADAPTER] = {PREFIX + name: tensor for name, tensor in found.items()}
        if self.layers is not None:
            out[LAYERS] = dict(self.layers.state_dict())
        return out

    @property
    def weights(self) -> str:
        """SHA-256 over every learned number."""
        if self._weights is None:
            self._weights = _digest(self.tensors())
        return self._weights

    def state(self) -> State:
        return {
            "encoder": "tuned",
            "version": 1,
            "base": self.base.state(),
            "lora": None if self.lora is None else {**asdict(self.lora), "targets": list(self.lora.targets or ())},
            "hidden": [] if self.layers is None else [len(bias) for bias in self.layers.biases],
            "weights": self.weights,
        }

    def save(self, folder: str | Path) -> None:
        """Write the learned numbers under `folder`, in a folder whose name holds their hash; `restore` reads them.

        The adapters are a folder that peft reads too (`PeftModel.from_pretrained`). Nothing that belongs to other weights is
        touched, so whoever reads the folder meanwhile keeps what they had. Files are written whole or not at all.
        """
        for name, tensors in self.tensors().items():
            files.write_tensors(_place(folder, self.weights) / name, tensors, {"format": "pt"})
        if self.lora is not None:
            _config(self.lora, self.model).save_pretrained(str(_place(folder, self.weights)))

    @classmethod
    def restore(cls, state: State, base: Encoder, folder: str | Path) -> "TunedEncoder":
        """The encoder whose `state` was saved, with its numbers from beneath `folder`.

        Raises:
            ModelFileError: the numbers are missing, cannot be read, or are not those of the state.
            MismatchError: `base` is another encoder than the one that was tuned.
        """
        if base.state() != state["base"]:
            raise MismatchError(
                f"the encoder was tuned on {state['base'].get('encoder')!r} with other weights or settings than {base!r} has; "
                "load it with the encoder that it was tuned on"
            )
        place = _place(folder, state["weights"])
        lora, layers = state["lora"], None
        try:
            if state["hidden"]:
                numbers = load_file(place / LAYERS)
                layers = Layers(numbers["centre"], numbers["scale"], state["hidden"])
                layers.load_state_dict(numbers)
            made = None if lora is None else LoRA(**{**lora, "targets": tuple(lora["targets"]) or None})
            out = cls(base, made, layers)
            if out.model is not None:
                from peft import set_peft_model_state_dict

                numbers = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(place / ADAPTER).items()}
                set_peft_model_state_dict(out.model, numbers)
        except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
            raise ModelFileError(f"{place} cannot be read as a tuned encoder ({error}); fit the model again") from error
        out.train(False)
        if out.weights != state["weights"]:
            raise ModelFileError(
                f"{place} holds numbers with hash {out.weights[:12]}; expected {state['weights'][:12]}: copy the folder again"
            )
        return out


def _place(folder: str | Path, weights: str) -> Path:
    return Path(folder) / f"encoder-{weights[:12]}"


def _adapted(base: Encoder, lora: LoRA, seed: int) -> tuple[BatchedEncoder, nn.Module]:
    """A copy of the encoder around a copy of its model with adapters; the weights beneath are shared, and fixed."""
    original = base.model if isinstance(base, HuggingFace) else getattr(base, "_model", None)
    if not isinstance(original, nn.Module) or not isinstance(base, HuggingFace | MiniLM):
        raise DataError(
            f"{base!r} has no model of transformers to put adapters in; expected HuggingFace, such as load_encoder('hf:FOLDER'), "
            "or MiniLM; any encoder takes hidden layers instead"
        )
    try:
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise MissingExtraError("LoRA needs the package peft; run: pip install 'palate[hf]'") from error
    shared: dict[int, Any] = {id(t): nn.Parameter(t.detach(), requires_grad=False) for t in original.parameters()}
    model: nn.Module = copy.deepcopy(original, shared)
    for module in model.modules():  # only LoRA's own dropout is wanted, and the copy's modules are its own
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)
    with torch.random.fork_rng(devices=[]):  # peft draws from the global stream; what it draws is replaced below
        inject_adapter_in_model(_config(lora, model), model)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float() if parameter.dtype in (torch.float16, torch.bfloat16) else parameter.data
            if ".lora_A." in name:  # as peft does: U(-1, 1) / sqrt(in)
                drawn = (2 * torch.rand(parameter.shape, generator=generator) - 1) / parameter.shape[1] ** 0.5
                parameter.data.copy_(drawn)
    model.eval()
    if isinstance(base, HuggingFace):
        return _around(base, model), model
    inner = copy.copy(base)
    inner._model = model
    inner.cache = inner.progress = None  # what the base has kept is not what this model computes
    return inner, model


def _around(base: HuggingFace, model: nn.Module) -> HuggingFace:
    return HuggingFace.from_model(
        model,
        base.tokenizer,
        pooling=base.reading.pooling,
        layer=base.reading.layer,
        template=base.formatter.format,
        max_tokens=base.formatter.max_tokens,
        share_prefix=base.not_shared != "switched off",
        tokens_per_batch=base.tokens_per_batch,
    )


def _config(lora: LoRA, model: nn.Module | None) -> Any:
    from peft import LoraConfig

    linear = {} if model is None else _linear(model)
    targets = set(lora.targets or linear)
    unknown = sorted(targets - linear.keys())
    if unknown or not targets:
        raise DataError(f"the model has no linear layers called {unknown}; expected some of {', '.join(sorted(linear))}")
    return LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(targets),
        bias="none",
        fan_in_fan_out=any(linear[name] == "Conv1D" for name in targets),
        inference_mode=True,
    )


def _linear(model: nn.Module) -> dict[str, str]:
    """The last part of the name of every linear layer that makes features, and its class."""
    out: dict[str, str] = {}
    for name, module in model.named_modules():
        whole, kind = name.split("."), type(module).__name__
        if (isinstance(module, nn.Linear) or kind == "Conv1D") and "lora_A" not in whole and "lora_B" not in whole:
            own = [part for part in whole if part != "base_layer"]
            if not set(own) & set(HEADS):
                out[own[-1]] = kind
    return out


def _digest(found: Mapping[str, Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for file, tensors in sorted(found.items()):
        for name, tensor in sorted(tensors.items()):
            kept = tensor.detach().cpu().contiguous()
            digest.update(f"{file} {name} {tuple(kept.shape)} {kept.dtype}".encode())
            digest.update(kept.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
