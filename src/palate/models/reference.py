"""The reward model as it came, on the same footing as the methods that learn: r = v_ref . e, for everybody.

It is the row of every table that says whether learning anything from these people was worth it. v_ref is the encoder's own scalar
head, and no model of this class exists whose head did not give the encoder's own logits (`encoders.heads`): published tables
have a row of this name that was computed with a column of an MLP.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from palate.data.embeddings import Embeddings
from palate.data.pairs import EmbeddedPairs, Text
from palate.encoders.base import Encoder
from palate.encoders.heads import encoder_head
from palate.errors import DataError, MismatchError
from palate.models.base import Fixed, Inference, RewardModel

Progress = Callable[[float, str], None]  # (share done, what)


class Reference(RewardModel):
    """One reward for everybody that nobody here has learned: r = v_ref . e + b, the logit of the encoder's own head.

    `Reference.of(encoder)` makes it. `Reference()` names the method before there is an encoder: `palate.compare` and the command
    line give it theirs. Nothing is fitted, and a profile has no weights.

    Args:
        output: which logit, where the head has several: its number from 0, or its name in the model's configuration.

    Raises:
        DataError: an `output` that is neither.
    """

    direction: Tensor
    bias: Tensor

    def __init__(self, output: int | str | None = None):
        super().__init__()
        if isinstance(output, bool) or not isinstance(output, int | str | None) or (isinstance(output, int) and output < 0):
            raise DataError(f"output is {output!r}; expected the number of a logit from 0, its name, or None for the only one")
        self.output = output
        self.inference: Inference = Fixed()
        self.register_buffer("direction", torch.zeros(0))
        self.register_buffer("bias", torch.zeros(()))

    @classmethod
    def of(cls, encoder: Encoder, *, output: int | str | None = None, texts: Sequence[Text] | None = None) -> Self:
        """The model of the encoder's own head, which goes with this encoder's fingerprint and with no other.

        Args:
            encoder: one that holds a sequence classifier, or a join of which one part does (the head is 0 on the others).
            output: as above.
            texts: on which the head must give the model's own logits; by default `encoders.heads.TEXTS`.

        Raises:
            DataError: the encoder has no linear scalar head, and why; several logits and no `output`; texts that tell nothing.
            MismatchError: W e + b differs from the model's own logits: the message has the figures.
        Cost: the forward passes of the texts, twice, one text at a time.
        """
        head, check = encoder_head(encoder, texts)
        out = cls(output)
        row = _row_of(output, head.outputs)
        out = out.like({"direction": head.weight[row].clone(), "bias": head.bias[row].clone()})
        out.encoder = encoder.fingerprint
        out.record["head"] = {"name": head.name, "output": row, "reads": head.reads, **check._asdict()}
        return out

    def options(self) -> dict[str, Any]:
        return {"output": self.output}

    @property
    def n_features(self) -> int:
        return len(self.direction)

    @property
    def n_parameters(self) -> int:
        """0: the head is the encoder's, and nothing is learned."""
        return 0

    @property
    def crowd_weights(self) -> Tensor:
        return self.direction.new_zeros(0)

    def features(self, embeddings: Embeddings) -> Tensor:
        return embeddings.project(self.direction[:, None]) + self.bias.to(embeddings.device)

    def design(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features[:, 0], features[:, 1:]

    def fitted(self, data: EmbeddedPairs, *, seed: int, progress: Progress) -> tuple["Reference", None]:
        """The same model: there is nothing to learn. Raises where the data were not embedded by its own encoder."""
        if not self.is_fitted:
            raise DataError(
                "Reference learns nothing from choices: it is the encoder's own head; use palate.Reference.of(encoder), or "
                "give palate.compare the encoder"
            )
        self.check(data.embeddings, data.encoder)
        if data.encoder != self.encoder:
            raise MismatchError(
                f"embeddings of an unknown encoder given to the head of encoder {(self.encoder or 'unknown')[:12]}; embed the "
                "texts with encoder.embed(pairs)"
            )
        out = self.like(self.state_dict())
        out.record.update(self.record)
        return out, None


def bound(model: RewardModel, encoder: Encoder | None) -> RewardModel:
    """`model`, and a `Reference` that has no encoder yet as the one of `encoder`."""
    if encoder is None or not isinstance(model, Reference) or model.is_fitted:
        return model
    return Reference.of(encoder, output=model.output)


def _row_of(output: int | str | None, names: Sequence[str]) -> int:
    """Which row of a head is meant."""
    if output is None and len(names) == 1:
        return 0
    if isinstance(output, int) and output < len(names):
        return output
    if isinstance(output, str) and list(names).count(output) == 1:
        return names.index(output)
    raise DataError(
        f"output is {output!r} and the head has {len(names)} logits ({', '.join(names[:8])}); expected the number or the name of "
        "one of them"
    )
