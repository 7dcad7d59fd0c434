"""Embedding tables that never become bigger than they must.

A model only ever needs three things of an (N, D) table: some of its rows, `E V` for a few directions, and `E^T G` for a few
columns of weights. A dense tensor or memory map, a one-hot table (one feature per catalogue item) and several tables side by
side all give these three, so a catalogue of a million items is a million numbers and never a million squared. Dense tables
stored in half precision are converted in blocks; the whole table is never copied.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palate.errors import DataError

CACHE_BYTES = 2**20  # size of a block that is gathered and combined: it should not leave the processor's cache
BLOCK_BYTES = 64 * 2**20  # size of a float32 block: large enough for full BLAS speed, small against memory


class Embeddings(ABC):
    """An (N, D) table of features, one row per distinct text."""

    shape: tuple[int, int]
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """Rows `index` (B,) as a float (B, D) tensor. O(B D)."""

    @abstractmethod
    def take(self, index: Tensor) -> "Embeddings":
        """The table of the rows `index` only; its columns are unchanged."""

    @abstractmethod
    def project(self, directions: Tensor) -> Tensor:
        """E V: (D, K) -> (N, K). One pass over the table."""

    @abstractmethod
    def back(self, weights: Tensor) -> Tensor:
        """E^T G: (N, K) -> (D, K), the adjoint of `project`. One pass over the table."""

    @abstractmethod
    def finite(self) -> bool:
        """Whether every number of the table is finite. One pass."""

    @abstractmethod
    def column_blocks(self) -> Sequence[tuple[slice, bool]]:
        """(columns, dense?) of each block; a one-hot block has one scale for all its columns, a dense one has one per column."""

    @abstractmethod
    def column_moments(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (D,) and variance (D,) of every column under row weights (N,) >= 0."""

    def __len__(self) -> int:
        return self.shape[0]


class Fetched(Protocol):
    """Rows that are fetched when they are asked for, such as those of a cache: what `Dense` needs of them."""

    ndim: int
    shape: tuple[int, int]
    dtype: np.dtype[Any]

    def __getitem__(self, part: slice | NDArray[Any]) -> NDArray[Any]: ...

    def select(self, index: NDArray[Any]) -> "Fetched":
        """The same for the rows `index` only; nothing is fetched yet."""


class Dense(Embeddings):
    """A tensor, NumPy array, memory map or `Fetched` rows (N, D) of any float type; computes in float32 unless it is float64."""

    def __init__(self, table: Tensor | np.ndarray | Fetched):
        if table.ndim != 2:
            raise DataError(f"embeddings have shape {tuple(table.shape)}; expected (N, D): one row per distinct text")
        if not isinstance(table, Tensor):
            if table.dtype.kind != "f":
                raise DataError(f"embeddings have dtype {table.dtype}; expected a floating type")
            self.device = torch.device("cpu")
        else:
            if not table.is_floating_point():
                raise DataError(f"embeddings have dtype {table.dtype}; expected a floating type")
            table = table.detach()
            self.device = table.device
        self.table = table
        self.shape = (int(table.shape[0]), int(table.shape[1]))
        wide = table.dtype in (torch.float64, np.float64)
        self.dtype = torch.float64 if wide else torch.float32

    def _block(self, part: slice | Tensor) -> Tensor:
        if isinstance(self.table, Tensor):
            return self.table[part].to(self.dtype)
        index = part if isinstance(part, slice) else part.cpu().numpy()
        picked = self.table[index]
        # A read-only map cannot back a tensor; converting the type copies anyway, and float32 rows by index are a copy already.
        wide = np.float64 if self.dtype == torch.float64 else np.float32
        return torch.from_numpy(np.array(picked, dtype=wide, copy=True))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(row slice, float block) over the table, each block at most `BLOCK_BYTES`."""
        step = max(1, BLOCK_BYTES // (4 * max(1, self.shape[1])))
        for start in range(0, self.shape[0], step):
            part = slice(start, min(start + step, self.shape[0]))
            yield part, self._block(part)

    def _whole(self) -> Tensor | None:
        ready = isinstance(self.table, Tensor) and self.table.dtype == self.dtype
        return self.table if ready and isinstance(self.table, Tensor) else None

    def rows(self, index: Tensor) -> Tensor:
        return self._block(index)

    def take(self, index: Tensor) -> "Dense":
        if isinstance(self.table, Tensor):
            return Dense(self.table[index])
        chosen = index.cpu().numpy()
        return Dense(self.table[chosen] if isinstance(self.table, np.ndarray) else self.table.select(chosen))

    def project(self, directions: Tensor) -> Tensor:
        whole = self._whole()
        if whole is not None:
            return whole @ directions.to(whole)
        out = torch.empty(self.shape[0], directions.shape[1], dtype=self.dtype, device=self.device)
        for part, block in self.blocks():
            torch.mm(block, directions.to(block), out=out[part])
        return out

    def back(self, weights: Tensor) -> Tensor:
        whole = self._whole()
        if whole is not None:
            return _adjoint(whole, weights.to(whole))
        out = torch.zeros(self.shape[1], weights.shape[1], dtype=self.dtype, device=self.device)
        for part, block in self.blocks():
            out.addmm_(block.T, weights[part].to(block))
        return out

    def finite(self) -> bool:
        return all(bool(torch.isfinite(block).all()) for _, block in self.blocks())

    def column_blocks(self) -> Sequence[tuple[slice, bool]]:
        return [(slice(0, self.shape[1]), True)]

    def column_moments(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        share = (weights / weights.sum()).to(self.dtype)
        mean = self.back(share[:, None])[:, 0]
        variance = torch.zeros_like(mean)
        for part, block in self.blocks():
            variance += share[part] @ (block - mean).square()
        return mean, variance


def _adjoint(table: Tensor, weights: Tensor) -> Tensor:
    """table^T weights for a tall table: as (weights^T table)^T, which reads the rows in order and takes half the time."""
    return (weights.T.contiguous() @ table).T


class OneHot(Embeddings):
    """Row i is `scale` in column `column[i]` and zero elsewhere; column -1 is a row of zeros (an item never seen in training).

    Stored as N integers: O(N) memory and O(N K) for every operation, whatever D is.
    """

    def __init__(self, column: Tensor | np.ndarray | Sequence[int] | int, n_columns: int | None = None, *, scale: float = 1.0):
        if isinstance(column, int):
            column = torch.arange(column)
        self.column = torch.as_tensor(column, dtype=torch.int64)
        if self.column.ndim != 1:
            raise DataError(f"one-hot columns have shape {tuple(self.column.shape)}; expected (N,)")
        highest = int(self.column.max()) if len(self.column) else -1
        n_columns = highest + 1 if n_columns is None else n_columns
        if highest >= n_columns or (len(self.column) and int(self.column.min()) < -1):
            raise DataError(f"one-hot columns span {int(self.column.min())}..{highest}; expected -1..{n_columns - 1}")
        if not scale > 0:
            raise DataError(f"scale is {scale}; expected a positive number")
        self.scale, self.device, self.dtype = float(scale), self.column.device, torch.float32
        self.shape = (len(self.column), n_columns)

    def _known(self) -> tuple[Tensor, Tensor]:
        known = torch.nonzero(self.column >= 0)[:, 0]
        return known, self.column[known]

    def rows(self, index: Tensor) -> Tensor:
        out = torch.zeros(len(index), self.shape[1], dtype=self.dtype, device=self.device)
        column = self.column[index]
        known = torch.nonzero(column >= 0)[:, 0]
        out[known, column[known]] = self.scale
        return out

    def take(self, index: Tensor) -> "OneHot":
        return OneHot(self.column[index], self.shape[1], scale=self.scale)

    def project(self, directions: Tensor) -> Tensor:
        padded = torch.cat([directions, directions.new_zeros(1, directions.shape[1])])  # column -1 reads the zero row
        return padded[self.column] * self.scale

    def back(self, weights: Tensor) -> Tensor:
        known, column = self._known()
        out = weights.new_zeros(self.shape[1], weights.shape[1])
        return out.index_add_(0, column, weights[known] * self.scale)

    def finite(self) -> bool:
        return True

    def column_blocks(self) -> Sequence[tuple[slice, bool]]:
        return [(slice(0, self.shape[1]), False)]

    def column_moments(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        share = (weights / weights.sum()).to(self.dtype)
        mean = self.back(share[:, None])[:, 0]
        return mean, self.scale * mean - mean.square()


class Joined(Embeddings):
    """Several tables with the same rows, side by side, each multiplied by its gain."""

    def __init__(self, blocks: Sequence[Embeddings], gains: Sequence[float] | None = None):
        lengths = [len(block) for block in blocks]
        if not blocks or len(set(lengths)) != 1:
            raise DataError(f"joined tables have {lengths} rows; expected at least one table and the same number in each")
        self.blocks = list(blocks)
        self.gains = [1.0] * len(blocks) if gains is None else [float(gain) for gain in gains]
        if len(self.gains) != len(self.blocks):
            raise DataError(f"{len(self.gains)} gains for {len(self.blocks)} tables; expected one each")
        widths = np.cumsum([0] + [block.shape[1] for block in blocks])
        self.slices = [slice(int(a), int(b)) for a, b in itertools.pairwise(widths)]
        self.shape, self.device, self.dtype = (lengths[0], int(widths[-1])), blocks[0].device, blocks[0].dtype

    def rows(self, index: Tensor) -> Tensor:
        return torch.cat([block.rows(index) * gain for block, gain in zip(self.blocks, self.gains, strict=True)], dim=1)

    def take(self, index: Tensor) -> "Joined":
        return Joined([block.take(index) for block in self.blocks], self.gains)

    def project(self, directions: Tensor) -> Tensor:
        parts = zip(self.blocks, self.gains, self.slices, strict=True)
        return sum((block.project(directions[part]) * gain for block, gain, part in parts), start=torch.zeros(()))

    def back(self, weights: Tensor) -> Tensor:
        return torch.cat([block.back(weights) * gain for block, gain in zip(self.blocks, self.gains, strict=True)])

    def finite(self) -> bool:
        return all(block.finite() for block in self.blocks)

    def column_blocks(self) -> Sequence[tuple[slice, bool]]:
        out: list[tuple[slice, bool]] = []
        for block, part in zip(self.blocks, self.slices, strict=True):
            out += [(slice(part.start + s.start, part.start + s.stop), dense) for s, dense in block.column_blocks()]
        return out

    def column_moments(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        moments = [block.column_moments(weights) for block in self.blocks]
        mean = torch.cat([m * g for (m, _), g in zip(moments, self.gains, strict=True)])
        return mean, torch.cat([v * g**2 for (_, v), g in zip(moments, self.gains, strict=True)])


def as_embeddings(table: "Tensor | np.ndarray | Embeddings") -> Embeddings:
    """`table` itself if it already is an `Embeddings`, else a `Dense` over it."""
    if isinstance(table, Embeddings):
        return table
    if isinstance(table, (Tensor, np.ndarray)):
        return Dense(table)
    raise DataError(f"embeddings are a {type(table).__name__}; expected a tensor, an array, a memory map or an Embeddings")


class Differences:
    """z = e(chosen) - e(rejected) of P pairs as a linear operator (P, D): the only thing the linear methods ever see of D.

    With fewer pairs than texts the differences are formed once (P D numbers); otherwise every product goes through the table
    (N D) and the pairs only gather and scatter K numbers each. Which is cheaper is arithmetic, not an option.
    """

    def __init__(self, embeddings: Embeddings, chosen: Tensor, rejected: Tensor):
        self.embeddings, self.chosen, self.rejected = embeddings, chosen, rejected
        self.shape = (len(chosen), embeddings.shape[1])
        self._formed: Tensor | None = None
        if isinstance(embeddings, Dense) and len(chosen) <= len(embeddings):
            formed = torch.empty(self.shape, dtype=embeddings.dtype, device=embeddings.device)
            step = max(1, CACHE_BYTES // (4 * max(1, self.shape[1])))
            for start in range(0, len(chosen), step):
                part = slice(start, start + step)
                torch.sub(embeddings.rows(chosen[part]), embeddings.rows(rejected[part]), out=formed[part])
            self._formed = formed

    def project(self, directions: Tensor) -> Tensor:
        """z V: (D, K) -> (P, K)."""
        if self._formed is not None:
            return self._formed @ directions.to(self._formed)
        projected = self.embeddings.project(directions)
        return projected[self.chosen] - projected[self.rejected]

    def back(self, weights: Tensor) -> Tensor:
        """z^T G: (P, K) -> (D, K)."""
        if self._formed is not None:
            return _adjoint(self._formed, weights.to(self._formed))
        onto = weights.new_zeros(len(self.embeddings), weights.shape[1])
        onto.index_add_(0, self.chosen, weights).index_add_(0, self.rejected, weights, alpha=-1)
        return self.embeddings.back(onto)

    def rows(self, index: Tensor) -> Tensor:
        """z of the pairs `index` (B,) as (B, D)."""
        if self._formed is not None:
            return self._formed[index]
        return self.embeddings.rows(self.chosen[index]) - self.embeddings.rows(self.rejected[index])
