"""The labels of a classifier as scores: a reward model with a head for each attribute gives all its logits, not one of them.

Such models (ArmoRM's attributes, a classifier of helpfulness, toxicity and length) are trained to be mixed; `palate.GivenBases`
learns everybody's mix. The head is the one that the model's own logits were checked against (`palate.encoders.heads`), applied to
the features of `HuggingFace`, so that batches, templates and shared prompts are computed as they are there.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor

from palate.data.pairs import Text
from palate.encoders.base import Batch, BatchedEncoder, State
from palate.encoders.heads import encoder_head
from palate.encoders.huggingface import HuggingFace
from palate.encoders.specs import chosen


class LabelScores(BatchedEncoder):
    """The K logits of a sequence classifier, as they are: no softmax and no sigmoid. Spec "labels:ID".

    Args:
        encoder: of an `AutoModelForSequenceClassification`, with the pooling that its head reads.

    Attributes:
        names: (K,) what the model's configuration calls its labels.
        check: how closely the head on the encoder's features gave the model's own logits.

    Raises:
        DataError: the model has no linear head that reads the final hidden state.
        MismatchError: the head on the encoder's features does not give the model's logits.
    """

    names: tuple[str, ...]

    def __init__(self, encoder: HuggingFace):
        self.encoder = encoder
        self.head, self.check = encoder_head(encoder)
        self.names = self.head.outputs
        self.width = len(self.head.bias)
        self.spec = f"labels:{encoder.spec.removeprefix('hf:')}"

    @classmethod
    def from_spec(cls, id: str, options: Mapping[str, str]) -> Self:
        """The encoder of "labels:ID?revision=..."; options as for "hf:"."""
        texts = ("revision", "pooling", "template", "dtype", "device")
        return cls(HuggingFace(id, **chosen(options, texts, ("max_tokens", "tokens_per_batch"), "labels")))

    @classmethod
    def restore(cls, state: State) -> Self:
        """The encoder whose `state()` this is. Raises as `HuggingFace.from_state`."""
        return cls(HuggingFace.from_state(state["hidden"]))

    def plan(self, texts: Sequence[Text]) -> list[Batch]:
        """The batches of the hidden states, and the head after each."""
        return [Batch(batch.rows, partial(self._compute, batch)) for batch in self.encoder.plan(texts)]

    def state(self) -> State:
        """The state of the hidden states and the head as numbers: where either differs, so do the scores."""
        return {
            "encoder": "labels",
            "version": 1,
            "hidden": self.encoder.state(),
            "head": self._head(),
            "names": list(self.names),
        }

    def _head(self) -> str:
        numbers = torch.cat([self.head.weight, self.head.bias[:, None]], dim=1).float().cpu().contiguous()
        return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()

    def _compute(self, batch: Batch) -> Tensor:
        return self.head.apply(batch.compute()).float()
