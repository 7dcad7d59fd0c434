"""What an encoder is: texts in, one row of features each, and a fingerprint that says when two tables may be compared.

A model fitted on one encoder's features means nothing on another's, so everything that changes a feature changes the
fingerprint, and every table carries it.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palate.data.embeddings import Dense, Embeddings
from palate.data.pairs import EmbeddedPairs, PairSet, Text
from palate.data.splits import By, pair_labels, unit_labels
from palate.errors import DataError

State = dict[str, Any]  # JSON-able


class Encoder(ABC):
    """Turns texts into an (N, D) table.

    Attributes:
        spec: what `load_encoder` takes to make this encoder.
        names: (D,) readable names of the features where they have any, else None.
    """

    spec: str
    names: tuple[str, ...] | None = None

    @abstractmethod
    def encode(self, texts: Sequence[Text]) -> Embeddings:
        """The (N, D) table of `texts`, in their order."""

    @abstractmethod
    def state(self) -> State:
        """Everything that determines the features, as JSON-able values; `restore_encoder` makes an equal encoder of it.

        What says only where files or servers are, and does not change a feature, stands under the key "where".
        """

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of `state` without its "where": equal exactly where the features of every text are equal."""
        return digest(self.state())

    def embed(self, pairs: PairSet, *, unit: Sequence[Any] | NDArray[Any] | None = None, prompts: bool = False) -> EmbeddedPairs:
        """`pairs` as arrays: every distinct text that is in use is encoded once.

        Args:
            pairs: at least one choice.
            unit: (P,) labels of what must not be split; by default the conversation of a choice, its prompt where it has none,
                and the pair of texts where most users answered one prompt only: by prompt they could not be split at all.
            prompts: also encode every prompt with an empty response, for the methods that read e(prompt) (`PAL(by_prompt=True)`).

        Raises:
            DataError: no choices, or a `unit` of the wrong length.
        """
        if not len(pairs):
            raise DataError("0 choices to embed; expected at least one")
        used, rows = np.unique(np.concatenate([pairs.chosen, pairs.rejected]), return_inverse=True)
        texts = [pairs.texts[i] for i in used.tolist()]
        asked: Tensor | None = None
        if prompts:
            alone = [Text(pairs.texts[i].prompt, "") for i in pairs.chosen.tolist()]
            place = {text: len(texts) + i for i, text in enumerate(dict.fromkeys(alone))}
            asked = torch.tensor([place[text] for text in alone])
            texts += list(place)
        table = self.encode(texts)
        if unit is None:
            kind, label = (
                ("prompt", pairs.prompt_index) if has_several(pairs, pairs.prompt_index) else ("pair", pair_labels(pairs))
            )
            labels = zip(pairs.conversation, label.tolist(), strict=True)
            unit = [f"{kind} {n}" if conversation is None else f"conversation {conversation}" for conversation, n in labels]
        n = len(pairs)
        return EmbeddedPairs(
            table,
            torch.from_numpy(rows[:n].astype(np.int64)),
            torch.from_numpy(rows[n:].astype(np.int64)),
            pairs.users,
            tie=pairs.tie,
            weight=pairs.weight,
            unit=unit,
            prompts=asked,
            encoder=self.fingerprint,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r}, fingerprint {self.fingerprint[:12]})"


class Batch(NamedTuple):
    """Some of the texts of a plan, and the forward pass that turns them into rows."""

    rows: list[int]
    compute: Callable[[], Tensor]  # (len(rows), D) float, finite; raises where a row cannot be computed


class Keeper(Protocol):
    """What keeps rows between runs: `palate.encoders.cache.Cache`."""

    def table(self, encoder: "BatchedEncoder", texts: Sequence[Text]) -> Embeddings: ...


class BatchedEncoder(Encoder):
    """An encoder whose rows cost something, so that they are planned in batches, and kept where there is a cache.

    The plan is a function of the texts alone and is made before the first forward pass: a job that is interrupted and goes on
    runs the same batches, so its rows are the same to the last bit.

    Attributes:
        width: D, the number of features.
        cache: where rows are kept between runs; None computes them every time.
        encoded: how many texts the last `encode` computed; the others were repeats, or kept.
        progress: told (texts done, texts in all) after every batch.
    """

    width: int
    cache: Keeper | None = None
    encoded: int = 0
    progress: Callable[[int, int], None] | None = None

    @abstractmethod
    def plan(self, texts: Sequence[Text]) -> Sequence[Batch]:
        """Batches that hold every one of the distinct `texts` once; the same texts in the same order give the same plan."""

    def encode(self, texts: Sequence[Text]) -> Embeddings:
        """(N, D) table of `texts`, in their order; a text that stands there twice is computed once."""
        if self.cache is not None:
            return self.cache.table(self, texts)
        position = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        table = torch.empty(len(position), self.width)
        for batch, done in self.run(list(position)):
            table[batch.rows] = done.to(table)
        return Dense(table if len(position) == len(texts) else table[[position[text] for text in texts]])

    def run(self, texts: Sequence[Text], plan: Sequence[Batch] | None = None) -> Iterator[tuple[Batch, Tensor]]:
        """Every batch of the plan and its rows, one after the other; `encoded` counts and `progress` is told."""
        self.encoded, total = 0, len(texts)
        for batch in self.plan(texts) if plan is None else plan:
            with torch.inference_mode():
                rows = batch.compute()
            if rows.shape != (len(batch.rows), self.width) or not bool(torch.isfinite(rows).all()):
                raise DataError(
                    f"{self!r} gave rows of shape {tuple(rows.shape)}, finite: {bool(torch.isfinite(rows).all())}; expected "
                    f"({len(batch.rows)}, {self.width}) finite numbers. Nothing is made up in their place"
                )
            self.encoded += len(batch.rows)
            if self.progress is not None:
                self.progress(self.encoded, total)
            yield batch, rows


def has_several(pairs: PairSet, label: NDArray[np.int64]) -> bool:
    """Whether at least half of the users with two choices or more have two of the labels (P,) or more. O(P log P).

    Users of one choice say nothing about it; where there is nobody else, any unit is as good as another.
    """
    distinct = np.unique(pairs.user_index * (int(label.max(initial=0)) + 1) + label) // (int(label.max(initial=0)) + 1)
    n_labels = np.bincount(distinct, minlength=len(pairs.user_ids))
    several = np.bincount(pairs.user_index, minlength=len(pairs.user_ids)) >= 2
    return not several.any() or bool((n_labels[several] >= 2).mean() >= 0.5)


def usual_unit(pairs: PairSet) -> By:
    """What the two sides of a user should not share, where nobody said: the widest unit of which users have several.

    The conversation where every choice names one, else the prompt. Under one prompt it is the item where a user's pairs share
    texts, as pairs made of votes do, and the pair otherwise.
    """
    if all(name is not None for name in pairs.conversation) and has_several(pairs, unit_labels(pairs, "conversation")):
        return "conversation"
    if has_several(pairs, pairs.prompt_index):
        return "prompt"
    items = np.concatenate([pairs.chosen, pairs.rejected])
    users = np.concatenate([pairs.user_index, pairs.user_index])
    return "item" if len(np.unique(users * len(pairs.texts) + items)) < len(pairs) else "pair"


def digest(state: Mapping[str, Any]) -> str:
    """SHA-256 in hexadecimal of JSON-able values, independent of the order of keys and of whatever stands under "where"."""
    return hashlib.sha256(json.dumps(_meaning(state), sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _meaning(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _meaning(inner) for key, inner in value.items() if key != "where"}
    return [_meaning(inner) for inner in value] if isinstance(value, list | tuple) else value
