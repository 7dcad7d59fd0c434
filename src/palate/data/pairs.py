"""The data model: `PairSet` (choices as text) and `EmbeddedPairs` (choices as arrays), with their invariants.

Both keep every distinct text once and refer to it by index, because people judge the same texts again and again: ConvArg has
84,445 choices over 1,052 texts. Both are immutable; selecting rows shares the texts and the embeddings.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from palate.data.embeddings import Differences, Embeddings, as_embeddings
from palate.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]


class Text(NamedTuple):
    """A prompt (plain text, or the turns so far) and one response to it: what an encoder turns into one row."""

    prompt: Prompt
    response: str

    @property
    def prompt_text(self) -> str:
        """The prompt as plain text: a single user turn as it is, several turns as `role: content` lines."""
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) == 1:
            return self.prompt[0].content
        return "\n".join(f"{turn.role}: {turn.content}" for turn in self.prompt)


class Choice(NamedTuple):
    """One row as a reader hands it over; `PairSet.from_choices` checks and indexes them."""

    user_id: str
    prompt: Prompt
    chosen: str
    rejected: str
    tie: bool = False
    weight: float = 1.0
    margin: float | None = None
    timestamp: float | None = None
    conversation_id: str | None = None
    split: str | None = None


def _column(values: "ArrayLike | None", n: int, name: str, dtype: Any, default: Any) -> "NDArray[Any]":
    if values is None:
        return np.full(n, default, dtype=dtype)
    out = np.asarray(values, dtype=dtype)
    if out.shape != (n,):
        raise DataError(f"{name} has shape {out.shape}; expected ({n},), one value per pair")
    return out


def _indices(values: Any, n_rows: int, name: str, device: torch.device) -> Tensor:
    if not isinstance(values, Tensor):
        values = np.asarray(values)
        if values.size == 0:
            values = values.astype(np.int64)
        if values.dtype.kind not in "biuf":
            raise DataError(f"{name} has dtype {values.dtype}; expected (P,) integers: rows of the table")
    out = torch.as_tensor(values, device=device)
    if out.ndim != 1 or out.is_floating_point() or out.dtype == torch.bool:
        raise DataError(f"{name} has shape {tuple(out.shape)} and dtype {out.dtype}; expected (P,) integers: rows of the table")
    out = out.to(torch.int64)
    if len(out) and (int(out.min()) < 0 or int(out.max()) >= n_rows):
        raise DataError(f"{name} points at rows {int(out.min())}..{int(out.max())} of a table with rows 0..{n_rows - 1}")
    return out


def _ids(users: Any, n: int) -> tuple[tuple[str, ...], "NDArray[np.int64]"]:
    given = list(users.tolist() if hasattr(users, "tolist") else users)
    nobody = [i for i, user in enumerate(given) if user is None or user != user]
    if nobody:
        raise DataError(f"the user of pairs {nobody[:5]} ({len(nobody)} in all) is missing; expected an id for each pair")
    listed = [str(user) for user in given]
    if len(listed) != n:
        raise DataError(f"{len(listed)} user ids for {n} pairs; expected one per pair")
    if not listed:
        return (), np.zeros(0, dtype=np.int64)
    distinct, index = np.unique(np.asarray(listed, dtype=object), return_inverse=True)
    return tuple(distinct.tolist()), index.astype(np.int64)


@dataclass(frozen=True, eq=False)
class PairSet:
    """P choices by U users over N distinct texts.

    `chosen` and `rejected` (P,) index `texts`; `user_index` (P,) indexes `user_ids` (sorted). For a tie the two sides stand in
    the order in which they came. `margin` and `timestamp` are NaN, `conversation` and `split` are None, where a row had none.
    """

    texts: tuple[Text, ...]
    chosen: "NDArray[np.int64]"
    rejected: "NDArray[np.int64]"
    user_ids: tuple[str, ...]
    user_index: "NDArray[np.int64]"
    tie: "NDArray[np.bool_]"
    weight: "NDArray[np.float64]"
    margin: "NDArray[np.float64]"
    timestamp: "NDArray[np.float64]"
    conversation: "NDArray[np.object_]"
    split: "NDArray[np.object_]"

    @classmethod
    def from_choices(cls, choices: Iterable[Choice]) -> "PairSet":
        """Index checked rows in O(P), with every distinct text once. Raises `DataError` for identical sides."""
        texts: dict[Text, int] = {}
        rows: list[tuple[Any, ...]] = []
        for i, choice in enumerate(choices):
            if choice.chosen == choice.rejected:
                raise DataError(f"row {i}: chosen and rejected are the same text {choice.chosen[:60]!r}; expected two responses")
            sides = [texts.setdefault(Text(choice.prompt, side), len(texts)) for side in (choice.chosen, choice.rejected)]
            rows.append((*sides, choice.user_id, *choice[4:]))
        columns: list[Any] = list(map(list, zip(*rows, strict=True))) if rows else [[] for _ in range(9)]
        chosen, rejected, users, tie, weight, margin, timestamp, conversation, split = columns
        user_ids, user_index = _ids(users, len(rows))
        n = len(rows)
        return cls(
            tuple(texts),
            np.asarray(chosen, dtype=np.int64),
            np.asarray(rejected, dtype=np.int64),
            user_ids,
            user_index,
            _column(tie, n, "tie", np.bool_, False),
            _column(weight, n, "weight", np.float64, 1.0),
            _column([np.nan if m is None else m for m in margin], n, "margin", np.float64, np.nan),
            _column([np.nan if t is None else t for t in timestamp], n, "timestamp", np.float64, np.nan),
            _column(conversation, n, "conversation_id", np.object_, None),
            _column(split, n, "split", np.object_, None),
        )

    def __len__(self) -> int:
        return len(self.chosen)

    def __repr__(self) -> str:
        ties = int(self.tie.sum())
        return f"PairSet({len(self)} choices, {ties} of them ties, by {len(self.user_ids)} users over {len(self.texts)} texts)"

    @property
    def users(self) -> "NDArray[np.object_]":
        """The user id of every choice, (P,)."""
        return np.asarray(self.user_ids, dtype=object)[self.user_index] if len(self) else np.zeros(0, dtype=object)

    @property
    def prompt_index(self) -> "NDArray[np.int64]":
        """A number per choice, equal where the prompt is equal, (P,)."""
        seen: dict[Prompt, int] = {}
        of_text = np.asarray([seen.setdefault(text.prompt, len(seen)) for text in self.texts], dtype=np.int64)
        return of_text[self.chosen] if len(self) else np.zeros(0, dtype=np.int64)

    def __getitem__(self, rows: "NDArray[Any] | slice") -> "PairSet":
        """The choices at `rows` (mask, indices or slice); the texts are shared, user ids without a choice left are dropped."""
        kept, index = np.unique(self.user_index[rows], return_inverse=True)
        return PairSet(
            self.texts,
            self.chosen[rows],
            self.rejected[rows],
            tuple(self.user_ids[u] for u in kept),
            index.astype(np.int64),
            self.tie[rows],
            self.weight[rows],
            self.margin[rows],
            self.timestamp[rows],
            self.conversation[rows],
            self.split[rows],
        )

    def fingerprint(self) -> str:
        """SHA-256 over every row in order, for the record of what a model was fitted on."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(repr(tuple(text)).encode("utf-8", "surrogatepass"))
        for column in (self.chosen, self.rejected, self.user_index, self.tie, self.weight):
            digest.update(np.ascontiguousarray(column).tobytes())
        digest.update("\x00".join(self.user_ids).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Grouped:
    """Pairs sorted by user: pairs `order[offsets[u]:offsets[u + 1]]` are those of user u."""

    order: Tensor  # (P,)
    offsets: Tensor  # (U + 1,)

    @property
    def counts(self) -> Tensor:
        return self.offsets[1:] - self.offsets[:-1]

    def padded(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n) the pairs of these users, one user a row, and the mask of the real ones; a padded place points at some pair."""
        counts = self.counts[users]
        column = torch.arange(int(counts.max()) if len(counts) else 0, device=counts.device)
        real = column < counts[:, None]
        return self.order[torch.where(real, self.offsets[users][:, None] + column, 0)], real


@dataclass(frozen=True, eq=False, init=False)
class EmbeddedPairs:
    """P choices by U users as arrays.

    Args:
        embeddings: (N, D) tensor, array or memory map (any float type), or an `Embeddings` (one-hot, joined).
        chosen: (P,) rows of the table that were preferred.
        rejected: (P,) rows that were not.
        users: (P,) user ids; kept as strings.
        tie: (P,) bool, no preference. A tie counts half a win each way.
        weight: (P,) positive weights of the choices, 1 by default.
        unit: (P,) labels of what must not be split (conversation, prompt, item); a pair is its own unit by default.
        prompts: (P,) rows of the table that hold e(prompt), for the methods that want it.
        encoder: fingerprint of the encoder that made the table; a model fitted on one encoder refuses another.

    Raises:
        DataError: shapes that disagree, indices outside the table, numbers that are not finite, weights that are not positive,
            a pair of a row with itself.
    """

    embeddings: Embeddings
    chosen: Tensor
    rejected: Tensor
    user_ids: tuple[str, ...]
    user_index: Tensor
    tie: Tensor
    weight: Tensor
    unit: Tensor
    prompts: Tensor | None
    encoder: str | None
    _cache: dict[str, Any] = field(repr=False)

    def __init__(
        self,
        embeddings: "Tensor | NDArray[Any] | Embeddings",
        chosen: Any,
        rejected: Any,
        users: Sequence[Any] | Any,
        *,
        tie: Any = None,
        weight: Any = None,
        unit: Any = None,
        prompts: Any = None,
        encoder: str | None = None,
    ):
        table = as_embeddings(embeddings)
        if not table.finite():
            raise DataError(
                "the embeddings hold NaN or infinite numbers; expected finite ones (a failed encoder is not a feature)"
            )
        chosen = _indices(chosen, len(table), "chosen", table.device)
        rejected = _indices(rejected, len(table), "rejected", table.device)
        n = len(chosen)
        if len(rejected) != n:
            raise DataError(f"{n} chosen and {len(rejected)} rejected rows; expected as many of one as of the other")
        same = torch.nonzero(chosen == rejected)[:, 0]
        if len(same):
            raise DataError(f"pairs {same[:5].tolist()} compare a row with itself ({len(same)} in all); drop them")
        user_ids, user_index = _ids(users, n)
        ties = torch.as_tensor(_column(tie, n, "tie", np.bool_, False), device=table.device)
        weights = torch.as_tensor(_column(weight, n, "weight", np.float64, 1.0), device=table.device, dtype=table.dtype)
        if not bool((torch.isfinite(weights) & (weights > 0)).all()):
            raise DataError(
                f"weight has minimum {float(weights.min())}; expected finite numbers above 0 (leave a pair out instead)"
            )
        if unit is None:
            units = torch.arange(n, device=table.device)
        else:
            labels = np.asarray([str(u) for u in (unit.tolist() if hasattr(unit, "tolist") else unit)], dtype=object)
            if labels.shape != (n,):
                raise DataError(f"unit has shape {labels.shape}; expected ({n},), one label per pair")
            units = torch.as_tensor(np.unique(labels, return_inverse=True)[1] if n else np.zeros(0), device=table.device)
            units = units.to(torch.int64)
        rows = None if prompts is None else _indices(prompts, len(table), "prompts", table.device)
        if rows is not None and len(rows) != n:
            raise DataError(f"{len(rows)} prompt rows for {n} pairs; expected one per pair")
        self._set(
            table,
            chosen,
            rejected,
            user_ids,
            torch.as_tensor(user_index, device=table.device),
            ties,
            weights,
            units,
            rows,
            encoder,
        )

    def _set(self, *values: Any) -> None:
        names = ("embeddings", "chosen", "rejected", "user_ids", "user_index", "tie", "weight", "unit", "prompts", "encoder")
        for name, value in zip(names, values, strict=True):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_cache", {})

    def __len__(self) -> int:
        return len(self.chosen)

    def __repr__(self) -> str:
        n, d = self.embeddings.shape
        return f"EmbeddedPairs({len(self)} choices by {len(self.user_ids)} users over {n} texts x {d} features)"

    @property
    def users(self) -> "NDArray[np.object_]":
        """The user id of every choice, (P,)."""
        index = self.user_index.cpu().numpy()
        return np.asarray(self.user_ids, dtype=object)[index] if len(self) else np.zeros(0, dtype=object)

    def __getitem__(self, rows: "Tensor | NDArray[Any] | slice") -> "EmbeddedPairs":
        """The choices at `rows` (mask, indices or slice); the table is shared, user ids without a choice left are dropped."""
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows, device=self.chosen.device)
        kept, index = torch.unique(self.user_index[rows], return_inverse=True)
        out = object.__new__(EmbeddedPairs)
        prompts = None if self.prompts is None else self.prompts[rows]
        ids = self.user_ids if len(kept) == len(self.user_ids) else tuple(self.user_ids[u] for u in kept.tolist())
        columns = (self.tie[rows], self.weight[rows], self.unit[rows], prompts, self.encoder)
        out._set(self.embeddings, self.chosen[rows], self.rejected[rows], ids, index, *columns)
        return out

    def of_users(self, ids: Iterable[str]) -> "EmbeddedPairs":
        """The choices of these users."""
        wanted = set(ids)
        chosen = torch.tensor([user in wanted for user in self.user_ids], dtype=torch.bool, device=self.chosen.device)
        return self[chosen[self.user_index]]

    def swapped(self) -> "EmbeddedPairs":
        """The same choices with the two sides exchanged: every margin changes its sign."""
        out = object.__new__(EmbeddedPairs)
        columns = (self.user_ids, self.user_index, self.tie, self.weight, self.unit, self.prompts, self.encoder)
        out._set(self.embeddings, self.rejected, self.chosen, *columns)
        return out

    def grouped(self) -> Grouped:
        """Order and offsets of the pairs by user (stable); computed once."""
        if "grouped" not in self._cache:
            order = torch.argsort(self.user_index, stable=True)
            counts = torch.bincount(self.user_index, minlength=len(self.user_ids))
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            self._cache["grouped"] = Grouped(order, offsets)
        grouped: Grouped = self._cache["grouped"]
        return grouped

    def differences(self) -> Differences:
        """z = e(chosen) - e(rejected) as a (P, D) operator; formed once where that is cheaper."""
        if "differences" not in self._cache:
            self._cache["differences"] = Differences(self.embeddings, self.chosen, self.rejected)
        differences: Differences = self._cache["differences"]
        return differences

    def fingerprint(self) -> str:
        """SHA-256 over users, indices, units, ties, weights and a projection of the table: the record of what a model saw."""
        digest = hashlib.sha256("\x00".join(self.user_ids).encode("utf-8", "surrogatepass"))
        for column in (self.chosen, self.rejected, self.user_index, self.unit, self.tie, self.weight):
            digest.update(column.cpu().numpy().tobytes())
        ramp = torch.linspace(-1, 1, self.embeddings.shape[1])[:, None].to(self.embeddings.device)
        digest.update(self.embeddings.project(ramp).double().cpu().numpy().tobytes())
        digest.update((self.encoder or "").encode())
        return digest.hexdigest()
