"""Harder versions of a data set, for benchmarks: flipped labels, people who want the opposite, few choices.

What makes learning harder touches the choices that are learnt from (`train`, `support`) and nothing else. Contrarians are the
exception: they are people, not noise, so what they are tested on is reversed as well. Every draw is a function of the seed.
"""

import math
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palate.data.pairs import EmbeddedPairs
from palate.data.splits import Split, nested_shots
from palate.errors import DataError

KINDS = ("clean", "flip", "contrarian", "pairs")
_FLIP, _CONTRARIAN = 11, 12  # streams: what a draw is for, so that no two purposes share numbers


class Condition(NamedTuple):
    """`clean`; `flip` with a probability; `contrarian` with a share of the users; `pairs` with a number for each user."""

    kind: str
    amount: float = 0.0

    @classmethod
    def named(cls, text: str) -> Self:
        """The condition that `clean`, `flip=.2`, `contrarian=.3` or `pairs=5` names. Raises `DataError` for anything else."""
        kind, given, number = text.strip().partition("=")
        expected = "expected clean, flip=.2 (a probability), contrarian=.3 (a share of the users) or pairs=5 (a whole number)"
        if kind == "clean" and not given:
            return cls("clean")
        try:
            amount = float(number)
        except ValueError:
            raise DataError(f"the condition is {text!r}; {expected}") from None
        fits = amount.is_integer() and amount >= 1 if kind == "pairs" else 0 < amount <= 1
        if kind not in KINDS[1:] or not math.isfinite(amount) or not fits:
            raise DataError(f"the condition is {text!r}; {expected}")
        return cls(kind, amount)

    @property
    def name(self) -> str:
        return self.kind if self.kind == "clean" else f"{self.kind}={self.amount:g}"

    def apply(self, data: EmbeddedPairs, parts: Split, seed: int) -> tuple[EmbeddedPairs, Split]:
        """The data and the split under this condition; rows keep their places. O(P log P)."""
        if self.kind == "flip":
            return flipped(data, parts, self.amount, seed), parts
        if self.kind == "contrarian":
            return contrarian(data, parts, self.amount, seed), parts
        return (data, fewer(data, parts, int(self.amount), seed)) if self.kind == "pairs" else (data, parts)


def flipped(data: EmbeddedPairs, parts: Split, probability: float, seed: int) -> EmbeddedPairs:
    """Each strict choice of `train` and `support` swapped with this probability, by itself. Tests and ties stay as they are."""
    learnt = np.sort(np.concatenate([parts.train, parts.support]))
    mask = np.zeros(len(data), dtype=np.bool_)
    mask[learnt] = np.random.default_rng([seed, _FLIP]).random(len(learnt)) < probability
    return _swapped(data, mask)


def contrarian(data: EmbeddedPairs, parts: Split, share: float, seed: int) -> EmbeddedPairs:
    """All choices, those tested on included, of `share` of the seen and of the unseen users (rounded) reversed."""
    user = data.user_index.cpu().numpy()
    rng = np.random.default_rng([seed, _CONTRARIAN])
    against = np.zeros(len(data.user_ids), dtype=np.bool_)
    for sides in ((parts.train, parts.test_seen), (parts.support, parts.test_unseen)):
        cohort = np.unique(user[np.concatenate(sides)])
        against[rng.permutation(cohort)[: round(share * len(cohort))]] = True
    return _swapped(data, against[user])


def fewer(data: EmbeddedPairs, parts: Split, most: int, seed: int) -> Split:
    """At most so many choices a user in `train` and in `support`; fewer are always a part of more. Tests stay as they are."""
    kept = {name: (rows := getattr(parts, name))[nested_shots(data[_index(rows)], most, seed)] for name in ("train", "support")}
    lost = len(parts.train) + len(parts.support) - sum(map(len, kept.values()))
    dropped = {**parts.dropped, f"beyond {most} choices a user": lost}
    sides = kept["train"], parts.test_seen, kept["support"], parts.test_unseen
    return Split(*sides, parts.by, parts.seed, dropped, parts.dropped_users)


def _index(rows: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(rows)


def _swapped(data: EmbeddedPairs, mask: NDArray[np.bool_]) -> EmbeddedPairs:
    """The strict choices where `mask` (P,) with their sides exchanged."""
    swap = torch.from_numpy(mask).to(data.tie.device) & ~data.tie
    return EmbeddedPairs(
        data.embeddings,
        torch.where(swap, data.rejected, data.chosen),
        torch.where(swap, data.chosen, data.rejected),
        data.users,
        tie=data.tie,
        weight=data.weight,
        # Labels are sorted as text, and a fit draws its held-out halves in that order: with zeros in front it stays what it was.
        unit=[f"{unit:012d}" for unit in data.unit.tolist()],
        prompts=data.prompts,
        encoder=data.encoder,
    )
