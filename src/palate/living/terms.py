"""What a user did, as arrays: every kind of feedback is a list of terms of one likelihood, the multinomial logit.

A term is a choice among m responses. Response j of it has the utility u_j = offset_j + slopes_j . w, linear in the user's K
weights, and is chosen with probability exp(u_j) / sum_i exp(u_i) (McFadden 1974; two responses are Bradley and Terry 1952).
What was chosen is a distribution: one response, or a share of each, where half and half is a tie.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from palate.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FAR = 1e12  # a utility beyond this is a failed encoder, and its square would overflow


class Rewards(NamedTuple):
    """The rewards of m responses as functions of a user's weights, offset + slopes . w, in natural log-odds."""

    offset: Floats  # (m,)
    slopes: Floats  # (m, K)


class Terms(NamedTuple):
    """T terms over R rows. loss(w) = sum_t weight_t (logsumexp_{j in t} u_j - sum_{j in t} target_j u_j), u = offset + slopes w,
    plus sum_q ((pulls_q . w - level_q) / std_q)^2 / 2, soft linear constraints such as an axis that the user turned down.
    """

    slopes: Floats  # (R, K)
    offset: Floats  # (R,)
    target: Floats  # (R,) at least 0, sums to 1 within a term
    start: Ints  # (T,) first row of each term, ascending from 0
    weight: Floats  # (T,) at least 0
    pulls: Floats  # (Q, K)
    level: Floats  # (Q,)
    std: Floats  # (Q,) above 0

    @classmethod
    def pairs(cls, offset: Any, slopes: Any, *, weight: Any = None, tie: Any = None) -> Self:
        """The terms of P choices between two, with margins offset (P,) + slopes (P, K) . w: exactly `likelihood.nll`.

        A pair is a term of two rows, the difference and zero, with target (1, 0), or (1/2, 1/2) where `tie` (P,) is true.
        """
        margin, difference = np.asarray(offset, dtype=np.float64), np.asarray(slopes, dtype=np.float64)
        if margin.ndim != 1 or difference.ndim != 2 or len(difference) != len(margin):
            raise DataError(f"pairs have offset {margin.shape} and slopes {difference.shape}; expected (P,) and (P, K)")
        n, k = difference.shape
        both = np.zeros((n, 2, k)), np.zeros((n, 2)), np.zeros((n, 2))
        both[0][:, 0], both[1][:, 0], both[2][:, 0] = difference, margin, 1
        if tie is not None:
            both[2][np.asarray(tie, dtype=np.bool_)] = 0.5
        weights = np.ones(n) if weight is None else np.asarray(weight, dtype=np.float64)
        rows = both[0].reshape(2 * n, k), both[1].ravel(), both[2].ravel()
        return cls(*rows, 2 * np.arange(n), weights, np.zeros((0, k)), np.zeros(0), np.zeros(0))

    @classmethod
    def empty(cls, n_weights: int) -> Self:
        """No evidence at all."""
        return cls.pairs(np.zeros(0), np.zeros((0, n_weights)))

    @classmethod
    def concat(cls, parts: "Sequence[Terms]") -> Self:
        """The terms of all parts, in their order. Raises `DataError` for no parts, or parts of different numbers of weights."""
        widths = {part.slopes.shape[1] for part in parts}
        if len(widths) != 1:
            raise DataError(f"{len(parts)} parts with {sorted(widths)} weights to join; expected at least one, all of one width")
        rows = np.cumsum([0, *(len(part.offset) for part in parts)])
        start = np.concatenate([part.start + first for part, first in zip(parts, rows.tolist(), strict=False)])
        joined = (np.concatenate(column) for column in zip(*(part._replace(start=part.start[:0]) for part in parts), strict=True))
        return cls(*joined)._replace(start=start)

    @property
    def n_terms(self) -> int:
        return len(self.start)

    @property
    def n_weights(self) -> int:
        return int(self.slopes.shape[1])

    def check(self, n_weights: int) -> None:
        """Raise `DataError` unless these are terms over so many weights, with numbers that a likelihood can have."""
        rows, terms, pulls = len(self.offset), len(self.start), len(self.level)
        shapes = tuple(column.shape for column in self)
        k = n_weights
        expected = ((rows, k), (rows,), (rows,), (terms,), (terms,), (pulls, k), (pulls,), (pulls,))
        if shapes != expected:
            raise DataError(f"terms have shapes {shapes} for {k} weights; expected {expected} in the order of Terms")
        if pulls and not (np.isfinite(self.pulls).all() and np.isfinite(self.level).all() and bool((self.std > 0).all())):
            raise DataError(f"pulls have levels {self.level} and stds {self.std}; expected finite numbers, and stds above 0")
        if not terms:
            if rows:
                raise DataError(f"{rows} rows belong to no term; expected the first row of each term in start")
            return
        size = np.diff(self.start, append=rows)
        if self.start[0] != 0 or int(size.min()) < 1:
            raise DataError(
                f"terms start at rows {self.start[:5]} of {rows}; expected ascending ones from 0, a row for each term"
            )
        largest = np.maximum(np.abs(self.slopes).max(initial=0.0), np.abs(self.offset).max())  # keeps NaN, max() may not
        if not largest < FAR:  # NaN is not
            raise DataError(f"utilities have slopes or offsets of {largest}; expected finite numbers in log-odds")
        if not (bool((self.weight >= 0).all()) and bool((self.weight < FAR).all())):
            raise DataError(
                f"weights of terms are from {self.weight.min()} to {self.weight.max()}; expected at least 0, below {FAR:g}"
            )
        total = np.add.reduceat(self.target, self.start)
        if not (bool((self.target >= 0).all()) and bool((np.abs(total - 1) < 1e-6).all())):
            raise DataError(f"targets sum to {total[:5]} by term; expected shares of at least 0 that sum to 1")
