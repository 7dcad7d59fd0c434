"""Forward passes over token ids: padded batches, and batches whose texts share a start that is computed once.

Hidden states of real tokens must not depend on padding: real positions are given and padding is masked. A shared start is run
once with its keys and values kept, these are repeated for every text that begins so, and only the rest of the texts is run. That
is exact where attention is causal and keys and values are all that passes between tokens, which `obstacle` checks on the model
itself instead of believing a list of architectures.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Pooling = Literal["last", "mean"]
Side = Literal["right", "left"]
Shared = tuple[Sequence[int], Sequence[Sequence[int]]]  # tokens of the start, and of what follows it in each text

MOST_TRIED = 1024  # tokens of a probe: a second or two of a large model on a processor
# How far two ways to the same features may be apart, relative to the largest feature; about the rounding of a few layers.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Reading(NamedTuple):
    """How rows are read off a model."""

    pooling: Pooling = "last"
    layer: int | None = None  # None: the last one, after the final norm; else an index into hidden_states (0: the embeddings)
    causal: bool = True
    positions: bool = True  # whether forward takes position_ids
    pad: int = 0
    side: Side = "right"


def trunk(model: Any) -> Any:
    """The model below its head, whose output a head reads; the layers that LoRA (peft) put into it included."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.base_model


def padded(ids: Sequence[Sequence[int]], pad: int, side: Side, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, L) tokens and (B, L) mask, 1 where a token is real."""
    longest = max(map(len, ids))
    tokens = torch.full((len(ids), longest), pad)
    mask = torch.zeros(len(ids), longest, dtype=torch.int64)
    for row, (line, real) in zip(ids, zip(tokens, mask, strict=True), strict=True):
        where = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        line[where] = torch.as_tensor(row)
        real[where] = 1
    return tokens.to(device), mask.to(device)


def rows_of(model: nn.Module, ids: Sequence[Sequence[int]], reading: Reading) -> Tensor:
    """(B, D) float32 features of texts given as token ids, in one padded forward pass of a model without its head.

    Raises:
        ValueError: no texts, or one without tokens.
    """
    tokens, mask = padded(ids, reading.pad, reading.side, _device(model))
    extra: dict[str, Any] = {"use_cache": False} if reading.causal else {}
    if reading.positions and reading.causal:
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = _hidden(model(input_ids=tokens, attention_mask=mask, **_layers(reading), **extra), reading)
    if reading.pooling == "last":
        return _last(hidden, mask)
    return (_sum(hidden, mask) / mask.sum(1, keepdim=True)).float()


def rows_sharing(model: nn.Module, groups: Sequence[Shared], reading: Reading) -> Tensor:
    """(B, D) float32 features of the texts of `groups`, one group after the other; every start is computed once.

    Two forward passes: over G starts, then over B rests. Keys and values of B whole texts are in memory in the second.
    """
    device = _device(model)
    starts, mask = padded([start for start, _ in groups], reading.pad, "right", device)
    owner = torch.tensor([g for g, (_, rests) in enumerate(groups) for _ in rests], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    first = model(input_ids=starts, attention_mask=mask, position_ids=positions, use_cache=True, **_layers(reading))
    cache = first.past_key_values
    cache.batch_select_indices(owner)
    tokens, real = padded([rest for _, rests in groups for rest in rests], reading.pad, "right", device)
    positions = mask.sum(1)[owner, None] + torch.arange(tokens.shape[1], device=device)
    second = model(
        input_ids=tokens,
        attention_mask=torch.cat([mask[owner], real], dim=1),
        position_ids=positions * real,  # a padded place must not point beyond the last position that a model knows
        past_key_values=cache,
        use_cache=True,
        **_layers(reading),
    )
    hidden = _hidden(second, reading)
    if reading.pooling == "last":
        return _last(hidden, real)
    total = _sum(hidden, real) + _sum(_hidden(first, reading), mask)[owner]
    return (total / (real.sum(1) + mask.sum(1)[owner])[:, None]).float()


def inspected(model: nn.Module, reading: Reading, n_tokens: int) -> tuple[Reading, int]:
    """`reading` with what the model itself shows, and D, the width of its features.

    Causal: two texts that differ in the last of three tokens have the same hidden states before it. Positions: it takes
    position_ids, and 0, 1, 2 are what it counts itself (models of the RoBERTa family begin at another number).
    """
    takes = inspect.signature(model.forward).parameters
    device = _device(model)
    tokens = torch.tensor([_tokens(3, n_tokens), [*_tokens(2, n_tokens), n_tokens - 1]], device=device)
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **_layers(reading)}
    with torch.inference_mode():
        hidden = _hidden(model(**given), reading)
        positions = "position_ids" in takes
        if positions:
            counted = torch.arange(3, device=device).expand(2, 3)
            positions = _close(_hidden(model(**given, position_ids=counted), reading), hidden, model)
    causal = "use_cache" in takes and _close(hidden[0, :2], hidden[1, :2], model)
    side: Side = reading.side if causal and positions else "right"
    return reading._replace(causal=causal, positions=positions, side=side), hidden.shape[-1]


def obstacle(model: nn.Module, reading: Reading, n_tokens: int) -> str | None:
    """Why a shared start cannot be computed once with this model; None where it can, to `TOLERANCE`."""
    if not reading.causal:
        return "its attention is not causal: every token depends on those that follow"
    if not reading.positions:
        return "its forward takes no position_ids that count from 0"
    from transformers.cache_utils import DynamicCache, DynamicLayer

    # Where a layer looks back over some tokens only, a probe that is shorter would not show it.
    config: Any = model.config
    windows = [value for key, value in config.to_dict().items() if "window" in key and isinstance(value, int)]
    reach = max([0, *windows])
    if reach > MOST_TRIED:
        return f"its configuration names a window of {reach} tokens, more than the {MOST_TRIED} that are tried"
    line = _tokens(12 + reach, n_tokens)
    groups: list[Shared] = [
        (line[: 5 + reach], [line[5:7], line[6:9], line[9:10]]),
        (line[2:5], [line[7:10], line[1:3]]),
    ]
    try:
        with torch.inference_mode():
            cache = model(input_ids=torch.tensor([line], device=_device(model)), use_cache=True).past_key_values
            if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
                kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", [])})
                return f"its cache is a {type(cache).__name__} of {kinds}, which cannot be repeated as keys and values"
            ours = rows_sharing(model, groups, reading)
            whole = rows_of(model, [[*start, *rest] for start, rests in groups for rest in rests], reading)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        return f"a probe failed: {error!r}"
    if not _close(ours, whole, model):
        return f"a probe gave other features: they differ by up to {float((ours - whole).abs().max()):.2g}"
    return None


def _tokens(n: int, n_tokens: int) -> list[int]:
    return [(7919 * (i + 1)) % max(1, n_tokens - 1) for i in range(n)]


def _close(ours: Tensor, theirs: Tensor, model: nn.Module) -> bool:
    away, scale = (ours - theirs).abs().max().float(), theirs.abs().max().float()
    return bool(away <= TOLERANCE.get(next(model.parameters()).dtype, 1e-4) * scale)  # NaN is not close to anything


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _layers(reading: Reading) -> dict[str, bool]:
    return {} if reading.layer is None else {"output_hidden_states": True}


def _hidden(output: Any, reading: Reading) -> Tensor:
    hidden: Tensor = output.last_hidden_state if reading.layer is None else output.hidden_states[reading.layer]
    return hidden


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last].float()


def _sum(hidden: Tensor, mask: Tensor) -> Tensor:
    # In float32, since a sum of half-precision numbers loses bits; filled and not multiplied, since a padded place may be NaN.
    return hidden.float().masked_fill(mask[:, :, None] == 0, 0).sum(1)
