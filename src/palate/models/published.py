"""What the MRM repository leaves on disk, read into this library: embedding files, its split of users, and checkpoints.

The published scripts write, for an encoder and a data set, `V2.pt` beside `V2.json`, and while training `epoch_N.pt`. Their names
and shapes are those of github.com/ModalityDance/MRM (January 2026, commit 2af1718):

- `V2.pt`: one tensor (N, D), bfloat16, with a row for each side of each pair.
- `V2.json`: user id -> list of pairs, each with `chosen_idx`, `rejected_idx`, `conversation_id`, its texts, the logits of the
  encoder's own head (`chosen_score`, `rejected_score`: not what the user scored), and for TL;DR `split`, "train" or "val".
- `epoch_N.pt`: a state dictionary: `layers.0.weight` (H, D), `layers.1.weight` ... with no activation between them, `.bias` where
  there are any, and `shared_weight` (K,), w0 before the softmax. The factor .01 on the embeddings is in no file.

A `.pt` file is a pickle and could run code. These are read with weights only: a file with anything but tensors is refused.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from palate.data.draws import of_user, python_order
from palate.data.pairs import EmbeddedPairs
from palate.data.splits import Split
from palate.errors import DataError, ModelFileError
from palate.models.meta import GradientSteps, described
from palate.models.mrm import MRM

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCALE = 0.01  # of the embeddings, in the published model
INDICES = ("chosen_idx", "rejected_idx")
EXPECTED = "layers.0.weight (and .1 ... in order, each with .bias or without) and shared_weight"


@dataclass(frozen=True, eq=False)
class PublishedPairs:
    """The pairs of an embedding file.

    Attributes:
        data: the pairs in the order of the file; a pair's unit is its conversation.
        part: (P,) "train" or "val" where the file says so (TL;DR); None for every pair of a file that does not (PRISM).
    """

    data: EmbeddedPairs
    part: "NDArray[np.object_]"

    def __repr__(self) -> str:
        return f"PublishedPairs({self.data!r}{', split' if self.given else ''})"

    @property
    def given(self) -> bool:
        """Whether the file says which pairs are for training and which for testing."""
        return self.part[0] is not None

    def split(self, seed: int = 42, *, seen_limit: int | None = None, unseen_limit: int | None = None) -> Split:
        """Whom and what the published scripts train and test on: the very users and pairs, drawn as Python's `random` draws.

        Users in the order of their ids are shuffled with the seed; the first half of them, rounded down, is seen. Of each user
        (shuffled with the seed plus MD5 of the id, modulo 2^32) the first half of the conversations, rounded down, is trained on
        and the rest tested; where the file has a split, `train` is trained on and all of `val` tested.

        Args:
            seed: 42 in the published scripts, and one more for each repeat.
            seen_limit, unseen_limit: at most so many conversations (PRISM; the scripts set none) or pairs (TL;DR; 150 or 100, and
                50 for unseen users) of a user to learn from; None for all.

        Raises:
            DataError: a negative seed, a limit below 1, or nobody with both sides.
        Departures: a TL;DR user without one of the sides is dropped and counted, as the scripts do for PRISM; there they stop.
        Cost: a shuffle in Python for each user, because it repeats another generator's draws; 1,300 PRISM users take 0.1 s.
        """
        limits = seen_limit, unseen_limit
        if seed < 0 or any(limit is not None and limit < 1 for limit in limits):
            raise DataError(f"seed is {seed} and the limits are {limits}; expected 0 or more, and limits of at least 1 or None")
        users, grouped = self.data.user_ids, self.data.grouped()
        rows = np.split(grouped.order.cpu().numpy(), grouped.offsets[1:-1].cpu().numpy())
        seen = set(python_order(seed, len(users))[: len(users) // 2])
        sides: dict[bool, tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]] = {True: ([], []), False: ([], [])}
        lost, beyond, gone = 0, 0, 0
        for number, (user, own) in enumerate(zip(users, rows, strict=True)):
            limit = seen_limit if number in seen else unseen_limit
            learned, tested, over = self._sides(own, of_user(seed, user), limit)
            if not len(learned) or not len(tested):
                lost, gone = lost + len(own), gone + 1
                continue
            beyond += over
            for side, found in zip(sides[number in seen], (learned, tested), strict=True):
                side.append(found)
        if not sides[True][0] and not sides[False][0]:
            raise DataError(f"none of {len(users)} users has pairs to learn from and pairs to test on; expected at least one")
        empty = np.zeros(0, dtype=np.int64)
        four = [np.sort(np.concatenate([empty, *side])) for cohort in (True, False) for side in sides[cohort]]
        dropped = {"of users with one side only": lost, "beyond the limit": beyond}
        by = "given" if self.given else "conversation"
        return Split(four[0], four[1], four[2], four[3], by, seed, dropped, {"one side only": gone})

    def _sides(
        self, own: "NDArray[np.int64]", seed: int, limit: int | None
    ) -> "tuple[NDArray[np.int64], NDArray[np.int64], int]":
        """One user's rows to learn from, to test on, and how many the limit took."""
        if self.given:
            pool, tested = own[self.part[own] == "train"], own[self.part[own] == "val"]
            learned = pool[python_order(seed, len(pool))][:limit]
            return learned, tested, len(pool) - len(learned)
        unit = self.data.unit.cpu().numpy()[own]
        met = np.fromiter(dict.fromkeys(unit.tolist()), dtype=np.int64)  # in the order in which they come
        shuffled = met[python_order(seed, len(met))]
        half = shuffled[: len(met) // 2]
        tested = own[np.isin(unit, shuffled[len(met) // 2 :])]
        learned = own[np.isin(unit, half[:limit])]
        return learned, tested, len(own) - len(tested) - len(learned)


def load_published_pairs(tensor: str | Path, metadata: str | Path | None = None, *, encoder: str | None = None) -> PublishedPairs:
    """An embedding file of the MRM repository and its metadata, the table mapped from the disk and not copied.

    Args:
        tensor: the `.pt` file. metadata: the `.json` file; by default the one of the same name.
        encoder: a name for the encoder that made it, such as "Skywork-Reward-V2-Llama-3.1-8B". A model trained on one name
            refuses another; without names, V1 embeddings given to a model of V2 cannot be noticed.

    Raises:
        DataError: a file that is not there, holds more than one tensor of floats, or could run code when read; metadata of
            another shape, or of another number of rows than the table; numbers that are not finite.
    Cost: one pass over the table; memory is that of the metadata.
    """
    path = Path(tensor)
    beside = path.with_suffix(".json") if metadata is None else Path(metadata)
    table = _weights_only(path, DataError)
    if not isinstance(table, Tensor) or table.ndim != 2 or not table.is_floating_point() or table.layout != torch.strided:
        found = f"a tensor {tuple(table.shape)} of {table.dtype}" if isinstance(table, Tensor) else f"a {type(table).__name__}"
        raise DataError(f"{path} holds {found}; expected one dense tensor (N, D) of floats: a row for each side of each pair")
    users, columns, part = _metadata(beside)
    sides = np.asarray([columns[name] for name in INDICES], dtype=np.int64)
    used = np.unique(sides)
    if len(used) and (used[0] < 0 or used[-1] >= len(table)):
        raise DataError(f"{beside} points at rows {used[0]}..{used[-1]} of {path}, which has {len(table)}; give files of one run")
    if len(used) != len(table):
        raise DataError(
            f"{path} has {len(table)} rows, {beside} uses {len(used)} of them in {len(users)} pairs; expected every row to be "
            "used: the files are of different runs, or one was cut"
        )
    data = EmbeddedPairs(table, sides[0], sides[1], users, unit=columns["conversation_id"], encoder=encoder)
    return PublishedPairs(data, np.asarray(part, dtype=object))


def load_published_mrm(path: str | Path, *, inner_rate: float = 1e-3, inner_steps: int = 1, encoder: str | None = None) -> MRM:
    """A checkpoint of the MRM repository as a fitted `MRM.faithful`; `save_pretrained` then writes it in this library's format.

    The layers, between which there is no activation, are multiplied out to V (D, K), .01 included: the same margins to float32's
    precision. Biases add a constant to all rewards of a user and cancel in every margin; they are left out.

    Args:
        path: `epoch_N.pt`, or one of the released files.
        inner_rate, inner_steps: of the Adam steps that adapt a user; no file holds them. The scripts use 1e-3 on PRISM, 5e-3 on
            TL;DR (and the same rates outside), and one step.
        encoder: the name that was given to `load_published_pairs` for the embeddings it was trained on.

    Raises:
        ModelFileError: a file that is not there, or could run code when read; which keys were found and which were expected;
            shapes that do not follow from each other; numbers that are not finite.

    Known of the format: the keys `layers.N.weight`, `.bias` and `shared_weight`, a bare dictionary or one under `state_dict` or
    `model`. Assumed, to be lenient: a prefix `module.` (what wrapping for several GPUs adds), and that layers of one output and
    the same D inputs each are K separate heads. Not tried on a released file: none was at hand.
    """
    path = Path(path)
    state = _weights_only(path, ModelFileError)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ModelFileError(f"{path} holds a {type(state).__name__}; expected a state dictionary with {EXPECTED}")
    numbers = {key.removeprefix("module."): value for key, value in state.items()}
    layers = sorted(key for key in numbers if re.fullmatch(r"layers\.\d+\.weight", key))
    layers.sort(key=lambda key: int(key.split(".")[1]))
    allowed = {"shared_weight", *layers, *(key.replace("weight", "bias") for key in layers)}
    in_order = [f"layers.{i}.weight" for i in range(len(layers))] == layers
    if not layers or not in_order or "shared_weight" not in numbers or not set(numbers) <= allowed:
        raise ModelFileError(f"{path} has the keys {', '.join(sorted(state)) or 'none'}; expected {EXPECTED}")
    for key, value in numbers.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise ModelFileError(f"{path}: {key} is no tensor of finite floats; the checkpoint is broken, or training diverged")
    start = numbers["shared_weight"].float()
    weights = _multiplied(path, [numbers[key] for key in layers], start)
    model = MRM.faithful(len(start), inner_rate=inner_rate, outer_rate=inner_rate)
    inner = described(GradientSteps(inner_rate, inner_steps, adam=True))
    model = model.like({"bases": (SCALE * weights).T.float(), "start": start}, inner=inner)
    model.encoder = encoder
    model.record["converted"] = {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "layers": len(layers),
    }
    return model


def _multiplied(path: Path, layers: Sequence[Tensor], start: Tensor) -> Tensor:
    """(K, D) in double precision: what the layers do to an embedding, one after the other."""
    shapes = [tuple(layer.shape) for layer in layers]
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or start.ndim != 1:
        raise ModelFileError(f"{path}: layers {shapes}, shared_weight {tuple(start.shape)}; expected matrices and a vector")
    heads = len(shapes) == len(start) > 1 and set(shapes) == {(1, shapes[0][1])} and shapes[0][1] > 1
    if heads:
        return torch.cat([layer.double() for layer in layers])
    if any(before[0] != after[1] for before, after in pairwise(shapes)) or shapes[-1][0] != len(start):
        raise ModelFileError(
            f"{path}: layers {shapes} and {len(start)} numbers in shared_weight; expected each layer to read as many numbers as "
            "the one before it gives, and the last to give as many as shared_weight has"
        )
    out = layers[0].double()
    for layer in layers[1:]:
        out = layer.double() @ out
    return out


def _weights_only(path: Path, kind: type[DataError] | type[ModelFileError]) -> Any:
    """The tensors of a `.pt` file, mapped where the format allows it; never anything that is executed."""
    if not path.is_file():
        raise kind(f"{path} is no file; expected a .pt file of the MRM repository")
    try:
        # Files from before torch 1.6 are no archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a broken or hostile file can make a reader of pickles raise
        if type(error).__name__ == "UnpicklingError":
            raise kind(
                f"{path} holds something else than tensors, which could run code when read, or is no .pt file; it was not read: "
                "expected what torch.save writes for a tensor or a state dictionary"
            ) from error
        raise kind(f"{path} cannot be read ({type(error).__name__}: {str(error)[:120]}); expected a whole .pt file") from error


def _metadata(path: Path) -> tuple[list[str], dict[str, list[Any]], list[str | None]]:
    """(P,) users, the columns by name, and the split, of everything in the file, in its order."""
    if not path.is_file():
        raise DataError(f"{path} is no file; expected the .json that the MRM repository writes beside the .pt")
    try:
        whole = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error}); expected user id -> list of pairs") from error
    if not isinstance(whole, dict) or not whole:
        raise DataError(f"{path} holds {'nothing' if whole == {} else type(whole).__name__}; expected user id -> list of pairs")
    users: list[str] = []
    columns: dict[str, list[Any]] = {name: [] for name in (*INDICES, "conversation_id")}
    part: list[str | None] = []
    for user, pairs in whole.items():
        if not isinstance(pairs, list) or not pairs:
            raise DataError(f"{path}: user {user!r} has {str(pairs)[:40]}; expected a list of at least one pair")
        for number, pair in enumerate(pairs):
            wrong = _wrong(pair)
            if wrong is not None:
                raise DataError(f"{path}: pair {number} of user {user!r}: {wrong}")
            users.append(user)
            part.append(pair.get("split"))
            for name, column in columns.items():
                column.append(pair[name])
    if None in part and any(part):
        raise DataError(
            f"{path}: {part.count(None)} of {len(part)} pairs have no split; expected a split for all of them or none"
        )
    return users, columns, part


def _wrong(pair: object) -> str | None:
    if not isinstance(pair, dict):
        return f"it is {str(pair)[:40]!r}; expected an object with {', '.join(INDICES)} and conversation_id"
    for name in INDICES:
        if type(pair.get(name)) is not int:
            return f"{name} is {pair.get(name)!r}; expected a row of the table"
    if type(pair.get("conversation_id")) not in (int, str):
        return f"conversation_id is {pair.get('conversation_id')!r}; expected a text or a number"
    if pair.get("split") not in (None, "train", "val"):
        return f"split is {pair['split']!r}; expected 'train', 'val' or none"
    return None
