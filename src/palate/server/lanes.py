"""A model as the server holds it: the encoder behind a batcher, the population, and the rewards of texts that came before.

What a text contributes to anybody's reward is K + 1 numbers (an offset and K slopes), so the last hundred thousand texts fit into
a few tens of megabytes, and ranking texts that came before is a lookup and a product. They are found by a hash of prompt and
response: no text is kept.
"""

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from palate.data.pairs import Prompt, Text
from palate.errors import DataError
from palate.living.population import Population
from palate.living.profile import LiveProfile
from palate.living.reading import Level, Reading
from palate.living.terms import Rewards
from palate.scoring import Scorer
from palate.server.batching import Batcher, Rows

if TYPE_CHECKING:
    from palate.living.explain import Explainer
    from palate.living.floor import Floor

Keys = list[bytes]


class Room(NamedTuple):
    """How much a lane may hold and how it batches."""

    cached_texts: int = 100_000
    max_batch: int = 64
    max_wait: float = 0.002  # seconds
    max_queue: int = 4096


ROOM = Room()


class Shelf:
    """The rows (W,) of the texts that were asked for last, by key; the one that was not asked for longest makes room.

    One table of at most `capacity` rows, which doubles as it fills: 16 known texts are found and gathered in about 10 us.
    """

    def __init__(self, width: int, capacity: int):
        if capacity < 1:
            raise DataError(f"cached_texts is {capacity}; expected at least 1")
        self.capacity = capacity
        self._table = np.empty((min(capacity, 1024), width))
        self._place: OrderedDict[bytes, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._place)

    def find(self, keys: Keys) -> Rows | None:
        """(n, W) rows of `keys`, or None where one of them is not there."""
        place, move = self._place, self._place.move_to_end
        try:
            rows = [place[key] for key in keys]
        except KeyError:
            return None
        for key in keys:
            move(key)
        return self._table[rows]

    def put(self, key: bytes, row: Rows) -> None:
        """Keep a row."""
        place = self._place.get(key)
        if place is None:
            place = len(self._place)
            if place >= self.capacity:
                place = self._place.popitem(last=False)[1]
            elif place >= len(self._table):
                grown = np.empty((min(self.capacity, 2 * len(self._table)), self._table.shape[1]))
                grown[: len(self._table)] = self._table
                self._table = grown
            self._place[key] = place
        self._table[place] = row


def keys_of(prompt: Prompt, responses: Sequence[str]) -> Keys:
    """16 bytes of BLAKE2b over the prompt, its length and the response, for every response. About 2 us each."""
    asked = prompt if isinstance(prompt, str) else json.dumps(prompt)
    head = f"{'text' if isinstance(prompt, str) else 'turns'} {len(asked)} {asked}".encode("utf-8", "surrogatepass")
    start = hashlib.blake2b(head, digest_size=16)
    out = []
    for response in responses:
        hashed = start.copy()
        hashed.update(response.encode("utf-8", "surrogatepass"))
        out.append(hashed.digest())
    return out


class Lane:
    """One model of those that the server has: its scorer, its population, and what it knows of texts.

    Attributes:
        name: what requests call it. scorer, population: of the model. fingerprint: of the model, as profiles carry it.
        reading: how feedback is read. has_level: whether it knows an ordinary response, which thumbs and ratings need.
        explainer, floor: None where none was given: then nothing is explained, and every profile is believed.
        crowd: (K,) float64, the weights of somebody of whom nothing is known.
        on_look: told of every look-up whether all of its texts were there.

    Raises:
        DataError: the model's reward is not linear in a user's weights (PAL, VPL), or reads prompts on their own.
    """

    def __init__(
        self,
        name: str,
        scorer: Scorer,
        population: Population,
        *,
        reading: Reading | None = None,
        explainer: "Explainer | None" = None,
        floor: "Floor | None" = None,
        room: Room = ROOM,
    ):
        model = scorer.model
        if not model.linear or model.reads_prompts:
            raise DataError(
                f"{type(model).__name__} has no living profiles, because its reward is not linear in a user's weights; serve a "
                "model of another method, such as hierarchical"
            )
        self.name, self.scorer, self.population = name, scorer, population
        self.explainer, self.floor, self.has_level = explainer, floor, reading is not None
        self.fingerprint = model.fingerprint()
        self.crowd: NDArray[np.float64] = model.crowd_weights.detach().double().cpu().numpy()
        self.reading = Reading(level=_nowhere(self.crowd, self.fingerprint)) if reading is None else reading
        self.shelf = Shelf(1 + model.n_weights, room.cached_texts)
        self.batcher = Batcher(self._compute, max_batch=room.max_batch, max_wait=room.max_wait, max_queue=room.max_queue)
        self.on_look: Callable[[bool], object] = bool

    def aged(self, life: LiveProfile) -> LiveProfile:
        """The profile as of now, where this population forgets with time."""
        return life if self.population.forgetting.seconds is None or not life.n_events else life.at(time.time())

    def explains(self) -> "Explainer":
        """The explainer. Raises `DataError` where the server has none for this model."""
        if self.explainer is None:
            raise DataError(f"nobody can be explained under model {self.name!r}; start the server with --sample ROWS")
        return self.explainer

    async def rewards(self, prompt: Prompt, responses: Sequence[str]) -> Rewards:
        """Offset (n,) and slopes (n, K) of `responses`; without an encoder, and without waiting, where all were seen before.

        Raises as `Batcher.rows`.
        """
        keys = keys_of(prompt, responses)
        rows = self.shelf.find(keys)
        self.on_look(rows is not None)
        if rows is None:
            rows = await self._fetched(prompt, responses, keys)
        return Rewards(rows[:, 0], rows[:, 1:])

    async def _fetched(self, prompt: Prompt, responses: Sequence[str], keys: Keys) -> Rows:
        known = [self.shelf.find([key]) for key in keys]
        missing = [i for i, row in enumerate(known) if row is None]
        found = await self.batcher.rows([Text(prompt, responses[i]) for i in missing])
        for i, row in zip(missing, found, strict=True):
            self.shelf.put(keys[i], row)
            known[i] = row[None]
        return np.concatenate([row for row in known if row is not None])

    @torch.no_grad()
    def _compute(self, texts: list[Text]) -> Rows:
        """(n, K + 1): the offset and the slopes of every text, as `Scorer.score` would compute them."""
        model = self.scorer.model
        table = self.scorer.encoder.encode(texts)
        model.check(table)
        offset, slopes = model.design(model.features(table))
        rows = torch.cat([offset[:, None].double(), slopes.double()], dim=1).cpu().numpy()
        if not np.isfinite(rows).all():
            raise DataError(
                f"the encoder gave {int((~np.isfinite(rows)).any(axis=1).sum())} of {len(texts)} texts no finite reward"
            )
        return rows


def _nowhere(crowd: NDArray[np.float64], fingerprint: str) -> Level:
    """A level in the right shape for events that read none; `learning.learned` refuses those that do."""
    nothing = (0.0,) * len(crowd)
    return Level(offset=0.0, slopes=nothing, crowd=tuple(crowd.tolist()), model=fingerprint, n_texts=1)
