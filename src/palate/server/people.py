"""Users as the server holds them: the weights of very many, whole profiles of the few who are giving feedback.

Ranking needs K numbers of a user; learning needs every row of theirs. So there are two caches in front of the store, both bounded
and both emptied of a user who is deleted. What another process has written is seen after `fresh` seconds at the latest; feedback
is never based on an old profile, because the store refuses a write from an old version.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from palate.errors import ModelFileError
from palate.living.profile import LiveProfile
from palate.server.lanes import Lane
from palate.store.database import ProfileStore
from palate.store.records import Consent

V = TypeVar("V")
T = TypeVar("T")
Who = tuple[str, str]  # tenant, user id

# A read of a file should take half a millisecond. One of SLOW seconds says that the disk is not quick, and for CAUTIOUS seconds
# files are then read by threads. On a shared machine a read is now and then preempted for 20 ms and more, and ranking through
# threads costs several times as much (p99 at 500 a second: 12 to 51 ms; with these two numbers 10 to 12; never through threads
# 8 to 11). So neither a short wait nor for long: a disk that is really slow holds up the loop for one read in five seconds.
SLOW, CAUTIOUS = 0.05, 5.0


class Person(NamedTuple):
    """What ranking needs of a user: `personal` is False where they have said nothing."""

    version: int
    lane: Lane
    weights: NDArray[np.float64]  # (K,)
    personal: bool
    read: float


class Held(NamedTuple):
    """What learning needs of a user: their profile under every lane that is up to date, by fingerprint."""

    version: int
    consent: Consent | None
    last: int
    lives: Mapping[str, LiveProfile]
    read: float


class Recent(Generic[V]):
    """The values that were used last, at most `capacity` of them."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> V | None:
        """The value, which is now the last to go."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: Hashable, value: V) -> None:
        """Keep a value; the one unused for longest makes room."""
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self.capacity:
            self._values.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()

    def drop(self, key: Hashable) -> None:
        """Forget a value, if it is there."""
        self._values.pop(key, None)


class People:
    """Users by (tenant, id), read from the store when they are not at hand. To be used from one event loop.

    Args:
        lanes: the models, the newest first: a user is ranked by the first one under which their profile is up to date.
        store: where they are kept.
        cached: users whose weights are held; about half a kilobyte each.
        cached_whole: users whose whole profile is held; tens of kilobytes each.
        fresh: seconds after which the store is asked whether another process has written.
        threads: that read the store.
        clock: seconds that never go back.

    Attributes:
        on_look: told of every look-up whether the user's weights were at hand.
        deleted: users whom this process has deleted, each of whom was forgotten here at once.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        store: ProfileStore,
        *,
        cached: int = 100_000,
        cached_whole: int = 1_000,
        fresh: float = 30.0,
        threads: int = 4,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.lanes, self.store, self.fresh = list(lanes), store, fresh
        self._persons: Recent[Person] = Recent(cached)
        self._helds: Recent[Held] = Recent(cached_whole)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="palate-store")
        self._clock = clock
        self.on_look: Callable[[bool], object] = bool
        self._ages = any(lane.population.forgetting.seconds is not None for lane in lanes)
        self.deleted = 0
        self._elsewhere: int | None = None
        self._threads_until = -math.inf
        self._epoch = 0  # changes when somebody is forgotten, so that a read under way does not bring them back

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """What a blocking function of the store returns, from a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def lane(self, name: str) -> Lane | None:
        """The lane of a model's name or fingerprint."""
        return next((lane for lane in self.lanes if name in (lane.name, lane.fingerprint)), None)

    def known(self, who: Who) -> Person | None:
        """The user's weights, if they are at hand and fresh: nothing waits."""
        person = self._persons.get(who)
        found = person is not None and self._clock() - person.read < self.fresh
        self.on_look(found)
        return person if found else None

    async def person(self, who: Who) -> Person | None:
        """The user's weights from a cache or from the store; None where no lane has learned all that they said."""
        person = self._persons.get(who)
        if person is not None:
            now = self._clock()
            if now - person.read < self.fresh:
                return person
            if not self._ages and await self.call(self.store.version, *who) == person.version:
                person = person._replace(read=now)
                self._persons.put(who, person)
                return person
        held = self._helds.get(who)
        if held is not None and self._clock() - held.read < self.fresh:
            return self.person_of(held) if held.lives or not held.last else None
        epoch = self._epoch
        found = await self._looked(who)
        if found is not None and self._is_news(who, epoch, found.read):
            self._persons.put(who, found)
        return found

    async def _looked(self, who: Who) -> Person | None:
        """`_weighed`, on the loop itself where the store is a file and its disk is quick.

        Handing a read of SQLite to a thread and back costs more than the read, and under load the wait for the interpreter's lock
        makes several times of the slowest ranks. A log being written blocks no reader, but a disk may: after one slow read the
        reads of five seconds go to threads, so that it holds up everybody once in five seconds at most.
        """
        began = self._clock()
        if began < self._threads_until or not self.store.is_file:
            return await self.call(self._weighed, who)
        found = self._weighed(who)
        if self._clock() - began > SLOW:
            self._threads_until = self._clock() + CAUTIOUS
        return found

    def now(self) -> float:
        """What `read` of something that was just written is."""
        return self._clock()

    async def held(self, who: Who, *, reread: bool = False) -> Held:
        """The user's whole profiles; with `reread` the store is asked, whatever is at hand."""
        held = None if reread else self._helds.get(who)
        if held is not None and self._clock() - held.read < self.fresh:
            return held
        epoch = self._epoch
        held = await self.call(self._read, who)
        if self._is_news(who, epoch, held.read):
            self._helds.put(who, held)
            if held.lives or not held.last:
                self._persons.put(who, self.person_of(held))
        return held

    def _is_news(self, who: Who, epoch: int, read: float) -> bool:
        """Whether what was read may be kept: nobody was forgotten, and nothing of this user was written, in the meantime."""
        newest = self._persons.get(who)
        return epoch == self._epoch and (newest is None or newest.read <= read)

    def keep(self, who: Who, held: Held) -> Person:
        """Take over what was just written."""
        person = self.person_of(held)
        self._helds.put(who, held)
        self._persons.put(who, person)
        return person

    def forget(self, who: Who) -> None:
        """Hold nothing of this user any more."""
        self._epoch += 1
        self._helds.drop(who)
        self._persons.drop(who)

    async def recall(self) -> None:
        """Hold nothing any more where another process has deleted something since this was called last: it may be of them."""
        elsewhere = await self.call(self.store.deletions) - self.deleted
        if self._elsewhere not in (None, elsewhere):
            self._epoch += 1
            self._helds.clear()
            self._persons.clear()
        self._elsewhere = elsewhere

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False)

    def person_of(self, held: Held) -> Person:
        """What ranking needs of what is held: the first lane's that is up to date, and the crowd's where there is none."""
        for lane in self.lanes:
            life = held.lives.get(lane.fingerprint)
            if life is not None:
                return Person(held.version, lane, np.array(lane.aged(life).mean), life.n_events > 0, held.read)
        return Person(held.version, self.lanes[0], self.lanes[0].crowd, False, held.read)

    def _read(self, who: Who) -> Held:
        """In a thread: the user as the store has them, with the profiles that every event is in."""
        now, user = self._clock(), self.store.read(*who)
        if user is None:
            return Held(0, None, 0, {}, now)
        lives = {}
        for lane in self.lanes:
            state = user.states.get(lane.fingerprint)
            if state is not None and state.through == user.last:
                try:
                    lives[lane.fingerprint] = lane.population.from_bytes(state.blob)
                except ModelFileError:
                    continue  # the log is the truth: learned again from it
        return Held(user.version, user.consent, user.last, lives, now)

    def _weighed(self, who: Who) -> Person | None:
        """What ranking needs, from the first lane that every event is in, and of the profile no more than that."""
        now, user = self._clock(), self.store.read(*who)
        if user is None or not user.last:
            return Person(0 if user is None else user.version, self.lanes[0], self.lanes[0].crowd, False, now)
        for lane in self.lanes:
            state = user.states.get(lane.fingerprint)
            if state is None or state.through != user.last:
                continue
            light = lane.population.weights_of(state.blob) if lane.population.forgetting.seconds is None else None
            if light is not None:
                return Person(user.version, lane, np.array(light.mean), light.said, now)  # a copy: the bytes can go
            try:
                life = lane.population.from_bytes(state.blob)
            except ModelFileError:
                continue  # the log is the truth: learned again from it
            return Person(user.version, lane, np.array(lane.aged(life).mean), life.n_events > 0, now)
        return None
