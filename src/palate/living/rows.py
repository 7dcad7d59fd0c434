"""Terms as they are kept and solved: one row less a term, because only differences of utilities count.

The last response of a term is its zero: what is kept of the others is their utility minus its. A pair is then one row, its
margin, and pairs are nearly everything that most users ever leave.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from palate.living.terms import Floats, Ints, Terms


class Rows(NamedTuple):
    """T terms over R rows: the utilities of all responses of a term but its last, which stands at zero."""

    slopes: Floats  # (R, K)
    offset: Floats  # (R,)
    target: Floats  # (R,); the last response of a term has what is missing to 1
    size: Ints  # (T,) rows of each term, at least 1
    weight: Floats  # (T,)
    pulls: Floats  # (Q, K)
    level: Floats  # (Q,)
    std: Floats  # (Q,)

    @classmethod
    def of(cls, terms: Terms) -> Self:
        """The same evidence. A term of one response says nothing and is left out."""
        size = np.diff(terms.start, append=len(terms.offset))
        rest = terms.pulls, terms.level, terms.std
        if len(size) and (size == 2).all():
            rows = terms.slopes[::2] - terms.slopes[1::2], terms.offset[::2] - terms.offset[1::2], terms.target[::2]
            return cls(*rows, size - 1, terms.weight, *rest)
        last = terms.start + size - 1
        kept = np.ones(len(terms.offset), dtype=np.bool_)
        kept[last] = False
        zero = np.repeat(last, size)[kept]
        rows = terms.slopes[kept] - terms.slopes[zero], terms.offset[kept] - terms.offset[zero], terms.target[kept]
        says = size > 1
        return cls(*rows, size[says] - 1, terms.weight[says], *rest)

    @classmethod
    def concat(cls, parts: "Sequence[Rows]") -> Self:
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    @property
    def n_terms(self) -> int:
        return len(self.size)

    def terms(self) -> Terms:
        """As `Terms`, with a row of zeros for the last response of each term."""
        first = np.cumsum(self.size) - self.size
        ends = first + self.size  # np.insert takes places in what it inserts into
        slopes, offset = np.insert(self.slopes, ends, 0.0, axis=0), np.insert(self.offset, ends, 0.0)
        left = 1 - np.add.reduceat(self.target, first) if len(first) else self.target
        target = np.insert(self.target, ends, np.maximum(left, 0.0))
        return Terms(slopes, offset, target, first + np.arange(len(first)), self.weight, self.pulls, self.level, self.std)

    def only(self, terms: Ints | slice, pulls: Ints | slice) -> Self:
        """The terms and the pulls at these places (masks or indices), in their order here."""
        size = self.size
        if len(self.offset) == len(size):  # pairs alone: a term is its row
            rows: Ints | slice = terms
        else:
            chosen = np.zeros(len(size), dtype=np.bool_)
            chosen[terms] = True
            rows = np.flatnonzero(np.repeat(chosen, size))
        kept = self.slopes[rows], self.offset[rows], self.target[rows]
        return type(self)(*kept, size[terms], self.weight[terms], self.pulls[pulls], self.level[pulls], self.std[pulls])

    def weighted(self, share: Floats | None) -> Self:
        """With so much left of the weight of each term (T,); all of it where None."""
        return self if share is None else self._replace(weight=self.weight * share)

    def broken(self) -> "tuple[Floats, Floats, Floats]":
        """Offset (P,), slopes (P, K) and weight (P,) of pairs that say nearly the same, for a method that reads pairs alone.

        Of a term with m responses every ordered pair (i, j) is a choice of i over j with weight 2 / m times the target of i:
        exact for two responses, ties included; for more a composite likelihood, which is consistent where choices are a
        multinomial logit (Azari Soufiani et al. 2013) but overlooks that the pairs of a term are one decision.
        """
        offset, slopes, weight = [], [], []
        terms = self.terms()
        for first, size, weight_of in zip(terms.start.tolist(), (self.size + 1).tolist(), self.weight.tolist(), strict=True):
            i, j = np.nonzero(~np.eye(size, dtype=np.bool_))
            share = terms.target[first + i] * (2 / size) * weight_of
            i, j, share = i[share > 0] + first, j[share > 0] + first, share[share > 0]
            offset.append(terms.offset[i] - terms.offset[j])
            slopes.append(terms.slopes[i] - terms.slopes[j])
            weight.append(share)
        k = self.slopes.shape[1]
        return (
            np.concatenate([*offset, np.zeros(0)]),
            np.concatenate([*slopes, np.zeros((0, k))]),
            np.concatenate([*weight, np.zeros(0)]),
        )
