"""Any decoder or encoder of transformers as an encoder of ours: the last hidden state of a frozen (reward) model.

What is read is what the model's own head reads: the output of the model below the head, after its final norm, at the last token
that is not padding (or the mean over such tokens). Published pipelines ran one text at a time; here texts of like length run
together, and candidates for one prompt compute that prompt once. Neither changes a number: to 1e-5 in float32, to rounding below.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any, Self

import torch
from torch import Tensor

from palate.data.pairs import Text
from palate.encoders import checkpoints
from palate.encoders.base import Batch, BatchedEncoder, State, digest
from palate.encoders.formatting import Format, Formatter
from palate.encoders.plans import Group, by_length, by_prefix
from palate.encoders.prefixes import Pooling, Reading, Shared, inspected, obstacle, padded, rows_of, rows_sharing, trunk
from palate.encoders.specs import Part
from palate.errors import DataError, MismatchError, ModelFileError

VERSION = 2  # raise it with any change of a feature: it is part of the fingerprint
TOKENS_PER_BATCH = 4096  # enough for the matrix products of a processor; a large card wants more
MAX_TOKENS = 4096  # unless the model or its tokenizer allows less
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number

Devices = str | Sequence[str] | None


class HuggingFace(BatchedEncoder):
    """Hidden states of a checkpoint: a reward model, a causal model or a plain encoder.

    Args:
        id: repository of the hub, or a folder; a folder is never looked up on the network.
        revision: branch, tag or commit of the repository; the commit is recorded.
        pooling: "last" reads the last real token, "mean" averages over all of them.
        layer: index into the model's hidden states (0: its embeddings); None reads the last one, after the final norm.
        template: "chat" or "plain" (see `Formatter`); None takes the tokenizer's chat template where there is one.
        max_tokens: longer texts lose the start of their prompt; None: what the model allows, at most 4096.
        dtype: "float32", "bfloat16" or "float16". In half precision features depend on the batch, in the last bits.
        device: where to run; several run batches side by side, each with a copy of the model. None: the first GPU, or the CPU.
        share_prefix: compute a prompt once for all its candidates, where the model allows.
        tokens_per_batch: padded tokens in a forward pass.

    Attributes:
        model: the model of transformers, with its head where it is a classifier. `encode` wants it in evaluation mode.
        tokenizer: its tokenizer.
        formatter: turns texts into token ids.
        truncated: texts of the last `encode` that lost the start of their prompt.
        truncated_responses: those among them that lost the start of their response as well.
        spelled: texts of the last `encode` that hold a special token such as "</s>", which is read as its characters.
        not_shared: why prompts are not computed once for all candidates; None where they are. Known after the first `plan`.
        reading: how rows are read. Padding stands on the tokenizer's side where the model allows; it changes nothing.

    Raises:
        DataError: options out of range, a checkpoint that is not there, a template that cannot be used.
        ModelFileError: weights that are missing or not in safetensors.
        MissingExtraError: transformers is not installed.
    """

    def __init__(
        self,
        id: str,
        *,
        revision: str | None = None,
        pooling: Pooling = "last",
        layer: int | None = None,
        template: Format | None = None,
        max_tokens: int | None = None,
        dtype: str = "float32",
        device: Devices = None,
        share_prefix: bool = True,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ):
        found = checkpoints.load(id, revision, dtype)
        self._vocabulary = found.vocabulary
        self.id: str | None = id
        self.revision = found.revision
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._prepare(found.model, found.tokenizer, pooling, layer, template, max_tokens, device, share_prefix, tokens_per_batch)
        self._files: tuple[Any, str] | None = (
            _versions(found.model),
            found.weights,
        )  # on its device: buffers are moved by a copy
        said = {"revision": revision, "pooling": pooling, "layer": layer, "template": template, "max_tokens": max_tokens}
        usual = {"pooling": "last", "dtype": "float32"}
        kept = [(key, str(value)) for key, value in (said | {"dtype": dtype}).items() if value not in (None, usual.get(key))]
        self.spec = str(Part("hf", id, tuple(kept)))

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any,
        *,
        pooling: Pooling = "last",
        layer: int | None = None,
        template: Format | None = None,
        max_tokens: int | None = None,
        device: Devices = None,
        share_prefix: bool = True,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> Self:
        """An encoder of a model in memory (built, trained, or with LoRA in its layers), which is put into evaluation mode.

        Its fingerprint follows the weights: they are hashed again whenever a parameter was changed. It cannot be restored from
        its state alone; save the model, or what is needed to make it again, beside it.
        """
        self = cls.__new__(cls)
        self._files, self.id, self.revision = None, None, None
        self._vocabulary = checkpoints.vocabulary_hash(tokenizer)
        self._prepare(model, tokenizer, pooling, layer, template, max_tokens, device, share_prefix, tokens_per_batch)
        return self

    @classmethod
    def from_state(cls, state: State, *, device: Devices = None) -> Self:
        """The encoder whose `state()` was saved, loaded again from where it came from.

        Raises:
            ModelFileError: a state of a model that was only in memory.
            MismatchError: the checkpoint, its tokenizer or its template is another one now; the message says which.
        """
        if state["where"]["id"] is None:
            raise ModelFileError(
                "the saved encoder was made of a model in memory and cannot be found again; make it with HuggingFace.from_model"
            )
        self = cls(
            state["where"]["id"],
            revision=state["where"]["revision"],
            pooling=state["pooling"],
            layer=state["layer"],
            template=state["format"],
            max_tokens=state["max_tokens"],
            dtype=state["dtype"],
            device=device,
        )
        now = self.state()
        changed = [
            f"{key} (saved {str(state.get(key))[:16]}, now {str(now[key])[:16]})"
            for key in now
            if key != "where" and now[key] != state.get(key)
        ]
        if changed:
            raise MismatchError(
                f"{self.id} is not what it was when the encoder was saved: {', '.join(changed)}. Features would mean "
                "something else; bring the old version back, or fit again"
            )
        return self

    def _prepare(
        self,
        model: Any,
        tokenizer: Any,
        pooling: Pooling,
        layer: int | None,
        template: Format | None,
        max_tokens: int | None,
        device: Devices,
        share_prefix: bool,
        tokens_per_batch: int,
    ) -> None:
        if pooling not in ("last", "mean"):
            raise DataError(f"pooling is {pooling!r}; expected 'last' or 'mean'")
        if "decoder_input_ids" in inspect.signature(trunk(model).forward).parameters:
            raise DataError(f"{type(model).__name__} is an encoder-decoder; expected a decoder or an encoder alone")
        config = trunk(model).config
        n_layers = getattr(config, "num_hidden_layers", None)
        if layer is not None and not (n_layers is None or 0 <= layer <= n_layers):
            raise DataError(f"layer is {layer}; expected None or 0 (the embeddings) to {n_layers} (the last one)")
        most = _longest(trunk(model), tokenizer)
        max_tokens = min(most, MAX_TOKENS) if max_tokens is None else max_tokens
        if not 2 <= max_tokens <= most:
            raise DataError(f"max_tokens is {max_tokens}; expected 2 to {most}, the longest text that the model knows")
        if tokens_per_batch < 1:
            raise DataError(f"tokens_per_batch is {tokens_per_batch}; expected 1 or more")
        devices = [device] if isinstance(device, str) else device
        if devices is not None:
            if not devices:
                raise DataError("device is an empty list; expected a name such as 'cuda', or several")
            model.to(devices[0])
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.spec = "hf"
        self.formatter = Formatter(tokenizer, template, max_tokens)
        self.tokens_per_batch = tokens_per_batch
        self.truncated = self.truncated_responses = self.spelled = 0
        self.not_shared: str | None = None if share_prefix else "switched off"
        self._probed = not share_prefix
        self._n_tokens = model.get_input_embeddings().num_embeddings
        pad = getattr(config, "pad_token_id", None)
        asked = Reading(
            pooling=pooling,
            layer=layer,
            pad=pad if pad is not None and 0 <= pad < self._n_tokens else 0,  # masked, so any will do but for the RoBERTa family
            side="left" if getattr(tokenizer, "padding_side", "right") == "left" else "right",
        )
        self.reading, self.width = inspected(trunk(model), asked, self._n_tokens)
        self._replicas = [trunk(model), *(copy.deepcopy(trunk(model)).to(other) for other in (devices or ())[1:])]
        self._copied = _versions(model)
        self._free: SimpleQueue[Any] = SimpleQueue()
        for replica in self._replicas:
            self._free.put(replica)

    # -- what it reads

    def tokens(self, texts: Sequence[Text]) -> list[list[int]]:
        """Token ids of every text, as the model reads them; `truncated` counts those that were too long."""
        found = self.formatter(texts)
        self.truncated, self.truncated_responses, self.spelled = len(found.cut), len(found.cut_responses), len(found.spelled)
        return found.ids

    def inputs(self, texts: Sequence[Text]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (B, L) of `texts`, padded, on the device of the model: for `model(**inputs)`."""
        ids, mask = padded(self.tokens(texts), self.reading.pad, "right", next(self.model.parameters()).device)
        return {"input_ids": ids, "attention_mask": mask}

    def hidden(self, texts: Sequence[Text]) -> Tensor:
        """(N, D) float32 features of `texts` in one forward pass, with gradients where they are on."""
        return rows_of(trunk(self.model), self.tokens(texts), self.reading)

    def plan(self, texts: Sequence[Text]) -> list[Batch]:
        """Batches of candidates that share a prompt, then batches of like length.

        Raises:
            DataError: a text that cannot be formatted, or a model in training mode, whose features would be drawn at random.
        """
        if self.model.training:
            raise DataError("the model is in training mode (dropout is on); call encoder.model.eval() before encoding")
        self._follow()
        ids = self.tokens(texts)
        if not self._probed:
            self.not_shared, self._probed = obstacle(trunk(self.model), self.reading, self._n_tokens), True
        groups: list[list[Group]] = []
        left = list(range(len(ids)))
        if self.not_shared is None:
            groups, left = by_prefix(ids, [text.prompt for text in texts], self.tokens_per_batch)
        batches = []
        for together in groups:
            starts: list[Shared] = [(ids[g.rows[0]][: g.prefix], [ids[i][g.prefix :] for i in g.rows]) for g in together]
            batches.append(Batch([i for g in together for i in g.rows], partial(self._on_a_device, rows_sharing, starts)))
        for rows in by_length(ids, left, self.tokens_per_batch):
            batches.append(Batch(rows, partial(self._on_a_device, rows_of, [ids[i] for i in rows])))
        return batches

    def run(self, texts: Sequence[Text], plan: Sequence[Batch] | None = None) -> Iterator[tuple[Batch, Tensor]]:
        """As for every encoder, in the order of the plan; with several devices the batches that follow are computed meanwhile."""
        plan = self.plan(texts) if plan is None else plan
        if len(self._replicas) == 1:
            yield from super().run(texts, plan)
            return
        pool = ThreadPoolExecutor(len(self._replicas))
        try:
            waiting: list[Future[Tensor]] = [pool.submit(_without_gradients, batch.compute) for batch in plan]
            yield from super().run(texts, [Batch(batch.rows, later.result) for batch, later in zip(plan, waiting, strict=True)])
        finally:
            pool.shutdown(cancel_futures=True)

    def _on_a_device(self, read: Any, ids: Any) -> Tensor:
        model = self._free.get()
        try:
            rows: Tensor = read(model, ids, self.reading)
            return rows.cpu()
        finally:
            self._free.put(model)

    # -- what it is

    def state(self) -> State:
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return {
            "encoder": "huggingface",
            "version": VERSION,
            "where": {"id": self.id, "revision": self.revision},
            "weights": self._weights(),
            "config": checkpoints.config_hash(trunk(self.model).config),
            "tokenizer": self._vocabulary,
            **self.formatter.state(),
            "max_tokens": self.formatter.max_tokens,
            "pooling": self.reading.pooling,
            "layer": self.reading.layer,
            "dtype": dtype,
        }

    def _weights(self) -> str:
        versions = _versions(self.model)
        if self._files is None or self._files[0] != versions:
            weights, adapters = checkpoints.state_hash(trunk(self.model).state_dict()), _adapters(self.model)
            # Which adapters are on is no part of any weight.
            self._files = versions, digest({"weights": weights, "adapters": adapters}) if adapters else weights
        return self._files[1]

    def _follow(self) -> None:
        """Give the copies on other devices the weights of `model`, where these were changed since."""
        versions = _versions(self.model)
        if versions != self._copied:
            for replica in self._replicas[1:]:
                replica.load_state_dict(self._replicas[0].state_dict())
            self._copied = versions


def _versions(model: Any) -> list[Any]:
    """Changes with every change of a weight, in place or by another, and of the adapters that are on. Reads every weight once.

    Torch counts what is written to a tensor, but not through its `.data`, as peft does when it merges: so bits are summed too.
    """
    weights = trunk(model).state_dict(keep_vars=True)
    counts = [(name, id(tensor), 0 if tensor.is_inference() else tensor._version) for name, tensor in weights.items()]
    return [*counts, *map(_bits, weights.values()), *_adapters(model)]


def _bits(tensor: Tensor) -> int:
    """Sum of the tensor's memory as integers, of 8 bytes where it can be cut so: as fast as memory is read."""
    flat = tensor.detach().reshape(-1)
    size = flat.element_size()
    whole = flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0
    return int(flat.view(torch.int64 if whole else _BITS[size]).sum(dtype=torch.int64))


def _adapters(model: Any) -> list[str]:
    """What the layers of peft do with their adapters: which are on, which are merged, and how they are scaled."""
    said = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    layers = [(name, layer) for name, layer in trunk(model).named_modules() if hasattr(layer, "merged_adapters")]
    return [f"{name} {[getattr(layer, key, None) for key in said]}" for name, layer in layers]


def _longest(model: Any, tokenizer: Any) -> int:
    """Most tokens that both the model's positions and its tokenizer allow."""
    places = getattr(model.config, "max_position_embeddings", None) or 0
    places = places if places > 0 else tokenizer.model_max_length  # XLNet's -1 means that there is no end
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    pads = getattr(table, "padding_idx", None)  # in the RoBERTa family positions begin after the padding's own
    return int(min(places - (0 if pads is None else pads + 1), tokenizer.model_max_length))


def _without_gradients(compute: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode():  # belongs to a thread: the caller's does not reach here
        return compute()
