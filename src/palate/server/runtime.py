"""What the service does, without HTTP: rank for a user, take feedback and keep it, forget somebody.

The way of an acknowledged event: read the profile it rests on, learn from it, hand event and profile to the store together, and
answer only when the store says that both are on the disk. Where another process was faster the store refuses, and the event is
learned again on top of what is there now. One user's events go one after another; everybody else's do not wait for them.
"""

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from palate.data.pairs import Prompt
from palate.errors import DataError, PalateError, StoreBusyError, UnknownUserError
from palate.living import consent
from palate.living.events import AHEAD, Feedback, check_time
from palate.living.explain import AxisEdit
from palate.living.profile import LiveProfile
from palate.living.terms import Rewards
from palate.server.deleting import Deleter
from palate.server.lanes import Lane
from palate.server.learning import Said, from_log, learned, rewards
from palate.server.people import Held, People, Person, Who
from palate.store.committing import Committer
from palate.store.database import ProfileStore
from palate.store.records import Consent, Deleted, Event, Listed, Outcome, Refused, Replayed, Write, Written

ATTEMPTS = 8  # of a write that others were faster than
PAGE = 500  # events of a log that are read at a time


class RefusedError(PalateError, ValueError):
    """Feedback that the store will not keep: `code` is "consent", "event" or "key"."""

    def __init__(self, message: str, code: str):
        super().__init__(message, code)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])


class OutdatedError(PalateError, RuntimeError):
    """What was to be kept was worked out from a profile that is not the user's any more: work it out again."""


class UnlearnedError(PalateError, RuntimeError):
    """A log that a model cannot learn from: the user waits for another model, or for the server to be started with what lacks."""


class UnknownModelError(UnknownUserError):
    """A model that this server does not have."""


class Acknowledged(NamedTuple):
    """Events that are on the disk. `before`: by an earlier request under the same key."""

    version: int
    event_ids: tuple[str, ...]
    before: bool = False


class Runtime:
    """The models, the people and the store behind one service. To be used from one event loop.

    Args:
        lanes: the models, the newest first. A user is ranked by the newest under which their profile is up to date, and feedback
            is learned under all of them, so that either can be taken away.
        store: where everything is kept.
        committer: its writer; made here where none is given.
        people: the caches; made here where none are given.
        text_version: the version of the consent text that feedback needs; None takes any.

    Attributes:
        on_conflict: called when a write came too late and is done again. on_event: told the kind of an acknowledged event.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        store: ProfileStore,
        *,
        committer: Committer | None = None,
        people: People | None = None,
        text_version: str | None = None,
    ):
        names = {lane.name for lane in lanes}
        if not lanes or len(names) < len(lanes) or len({lane.fingerprint for lane in lanes}) < len(lanes):
            raise DataError(f"{len(lanes)} models with {len(names)} names; expected at least one, and different ones")
        self.store, self.text_version = store, text_version
        self.committer = Committer(store) if committer is None else committer
        self.people = People(lanes, store) if people is None else people
        self.deleter = Deleter(self.people)
        self.on_conflict: Callable[[], object] = int
        self.on_event: Callable[[str], object] = len
        self._relearning: dict[tuple[Who, str], asyncio.Task[Held]] = {}
        self._turns: WeakValueDictionary[Who, asyncio.Lock] = WeakValueDictionary()

    @property
    def lanes(self) -> Sequence[Lane]:
        """The models, the newest first."""
        return self.people.lanes

    def lane(self, name: str | None) -> Lane | None:
        """The model that a request names, None where it names none. Raises `UnknownModelError`."""
        if name is None:
            return None
        lane = self.people.lane(name)
        if lane is None:
            raise UnknownModelError(
                f"there is no model {name[:80]!r} here; expected one of {', '.join(a.name for a in self.lanes)}"
            )
        return lane

    async def close(self) -> None:
        """Finish what was begun: encoder calls, then writes. Whoever is being learned again is begun again another time."""
        for learning in list(self._relearning.values()):
            learning.cancel()
        await asyncio.gather(*self._relearning.values(), return_exceptions=True)
        for lane in self.lanes:
            await lane.batcher.close()
        await self.deleter.close()
        await asyncio.to_thread(self.committer.close)
        self.people.close()

    # -- ranking

    async def person(self, who: Who, lane: Lane | None = None) -> Person:
        """The user's weights under `lane`, or under the newest model that knows them.

        Somebody whose events no model has learned yet (the model is new) is learned from the log now.
        """
        if lane is None:
            person = await self.people.person(who)
            if person is not None:
                return person
        held = await self.people.held(who)
        wanted = lane or next((a for a in self.lanes if a.fingerprint in held.lives), self.lanes[0])
        life = held.lives.get(wanted.fingerprint)
        if life is None and held.last:
            held = await self.relearned(who, wanted)
            life = held.lives.get(wanted.fingerprint)
        if life is None:
            return Person(held.version, wanted, wanted.crowd, False, held.read)
        return Person(held.version, wanted, wanted.aged(life).mean, life.n_events > 0, held.read)

    async def life(self, who: Who, lane: Lane | None = None) -> tuple[Held, Lane, LiveProfile]:
        """The user's whole profile, its model, and what else is held of them; a new profile for somebody unknown."""
        person = await self.person(who, lane)
        held = await self.people.held(who)
        life = held.lives.get(person.lane.fingerprint)
        lane = person.lane
        return held, lane, lane.population.start(who[1]) if life is None else lane.aged(life)

    async def scored(
        self, who: Who | None, prompt: Prompt, responses: Sequence[str], model: str | None = None
    ) -> tuple[Person, NDArray[np.float64]]:
        """Rewards (n,) of `responses` for a user, or the crowd's for nobody; and whose they are.

        With a user at hand and texts seen before this is a lookup and a product, without a wait.
        """
        lane = self.lane(model)
        if who is None:
            lane = lane or self.lanes[0]
            person = Person(0, lane, lane.crowd, False, 0.0)
        else:
            person = (self.people.known(who) if lane is None else None) or await self.person(who, lane)
        found = await person.lane.rewards(prompt, responses)
        return person, reward(found, person.weights)

    # -- feedback

    async def feedback(
        self,
        who: Who,
        events: Sequence[Feedback | AxisEdit],
        key: str | None = None,
        request: str | None = None,
        *,
        as_of: int | None = None,
    ) -> Acknowledged:
        """Learn from a user's events and keep them, all or none; returns when they are on the disk.

        Args:
            key: of idempotency: the second request under it changes nothing and gets the first one's answer.
            request: what makes a request under the key the same one, where the events do not.
            as_of: the version of the user that the events were worked out from, where they depend on it.

        Raises:
            RefusedError: no consent, an id that is taken, a key that stands for something else.
            DataError: an event that cannot be learned from.
            OutdatedError: the user is at another version than `as_of`.
            OverloadedError, StoreError: not now; nothing was kept.
        """
        now = time.time()
        for event in events:
            check_time(event, now)
        said = [_said(event, now) for event in events]
        logged = tuple(Event(one.event_id, one.event.kind, one.payload, one.at) for one in said)
        ids = tuple(one.event.name if isinstance(one.event, AxisEdit) else one.event_id for one in said)
        await self._learned_once(who)
        async with self._turn(who):
            for attempt in range(ATTEMPTS):
                held = await self.people.held(who, reread=attempt > 0)
                try:
                    if as_of not in (None, held.version):
                        raise OutdatedError(f"the user is at version {held.version}, and what came was worked out from {as_of}")
                    held, lives = await self._lives_after(held, who, said)
                    expected = held.version
                except (DataError, OutdatedError, RefusedError):
                    # Done before under this key, it cannot be done once more: what is undone is not there, or consent was
                    # withdrawn since. The answer of then is what a key promises, and to give it nothing is kept.
                    if key is None or await self.people.call(self.store.answer, *who, key) is None:
                        raise
                    lives, expected = {}, 0  # a version that nobody who is there has: the store looks at the key, and no further
                states = {name: life.to_bytes() for name, life in lives.items()}
                answer = None if key is None else json.dumps(ids)
                write = Write(*who, expected=expected, events=logged, states=states, key=key, answer=answer, request=request)
                outcome = await self._written(who, write)
                if isinstance(outcome, Written):
                    self.people.keep(who, Held(outcome.version, held.consent, outcome.last, lives, self.people.now()))
                    for one in said:
                        self.on_event(one.event.kind)
                    return Acknowledged(outcome.version, ids)
                if isinstance(outcome, Replayed):
                    return Acknowledged(outcome.version, tuple(json.loads(outcome.answer or "[]")), before=True)
                if isinstance(outcome, Refused):
                    raise RefusedError(outcome.reason, outcome.code)
                self.on_conflict()
        raise StoreBusyError(f"{ATTEMPTS} times somebody else wrote first for this user; try again in a moment")

    def _consented(self, held: Held) -> None:
        try:
            consent.require_consent(consent_of(held.consent), text_version=self.text_version)
        except consent.ConsentError as error:
            raise RefusedError(str(error), "consent") from None

    async def _learned_once(self, who: Who) -> None:
        """Have somebody whom no model has learned learned, before their turn: whoever gives up waiting would end it there."""
        held = await self.people.held(who)
        if held.last and not held.lives:
            with suppress(RefusedError):  # said in their turn
                self._consented(held)
                await self.relearned(who, self.lanes[0])

    async def _lives_after(self, held: Held, who: Who, said: Sequence[Said]) -> tuple[Held, dict[str, LiveProfile]]:
        """The profiles with the events in them, under every lane that is up to date (one at least, which sees to it that the
        events can be learned from); none where the store will refuse anyway."""
        self._consented(held)
        if held.last and not held.lives:  # another process took away what `_learned_once` saw to
            held = await self._relearned(who, self.lanes[0])
        lives = {}
        for lane in self.lanes:
            life = held.lives.get(lane.fingerprint) if held.last else lane.population.start(who[1])
            if life is None:
                continue  # learned from the log later
            if any(one.event_id in life.event_ids for one in said):
                return held, {}  # taken, or the same request again: the store knows which
            found = await rewards(lane, said)
            if len(said) == 1:  # a millisecond: less than it takes to hand it to a thread and back under load
                lives[lane.fingerprint] = learned(life, said, found, lane)
            else:
                lives[lane.fingerprint] = await asyncio.to_thread(learned, life, said, found, lane)
        return held, lives

    async def _written(self, who: Who, write: Write) -> Outcome:
        """What became of a write, once it is known. Whoever gives up waiting leaves no old profile behind in a cache."""
        try:
            return await asyncio.shield(asyncio.wrap_future(self.committer.submit(write)))
        except BaseException:
            self.people.forget(who)
            raise

    async def agreed(self, who: Who, record: consent.Consent) -> int:
        """Put a consent, or its withdrawal, on record; returns the user's version. Raises `DataError` for one from tomorrow."""
        if record.at > time.time() + AHEAD:
            raise DataError(f"the consent is dated {record.at:.0f}, which is ahead of now; expected a past time in unix seconds")
        kept = Consent(record.purpose, record.text_version, record.at, record.granted)
        async with self._turn(who):
            for attempt in range(ATTEMPTS):
                held = await self.people.held(who, reread=attempt > 0)
                outcome = await self._written(who, Write(*who, expected=held.version, consent=kept))
                if isinstance(outcome, Written):
                    self.people.keep(who, held._replace(version=outcome.version, consent=kept, read=self.people.now()))
                    return outcome.version
                self.on_conflict()
        raise StoreBusyError(f"{ATTEMPTS} times somebody else wrote first for this user; try again in a moment")

    # -- a new model

    async def relearned(self, who: Who, lane: Lane) -> Held:
        """Learn a user under `lane` from the whole log, and keep it; does nothing where that is done already.

        Whoever gives up waiting does not end it: it goes on and is kept, and whoever asks next waits for the same.

        Raises:
            UnlearnedError: an event that means nothing under this model (an axis that it does not know, say).
        Cost: as `from_log`.
        """
        key = who, lane.fingerprint
        task = self._relearning.get(key)
        if task is None:
            task = self._relearning[key] = asyncio.get_running_loop().create_task(self._relearned_in_turn(who, lane))
            task.add_done_callback(lambda _: self._relearning.pop(key))
        return await asyncio.shield(task)

    async def _relearned_in_turn(self, who: Who, lane: Lane) -> Held:
        async with self._turn(who):
            return await self._relearned(who, lane)

    async def _relearned(self, who: Who, lane: Lane) -> Held:
        for _ in range(ATTEMPTS):
            held = await self.people.held(who, reread=True)
            if lane.fingerprint in held.lives or not held.last:
                return held
            try:
                life, seq = await from_log(who[1], lambda seq: self.people.call(self.store.events, *who, seq, PAGE), lane)
            except DataError as error:
                raise UnlearnedError(f"what this user said cannot be learned under model {lane.name!r}: {error}") from error
            if seq in (0, held.last):  # 0: all of it is older than is kept
                state = await asyncio.to_thread(life.to_bytes)
                write = Write(*who, expected=held.version, states={lane.fingerprint: state})
                outcome = await self._written(who, write)
                if isinstance(outcome, Written):
                    lives = {**held.lives, lane.fingerprint: life}
                    held = held._replace(version=outcome.version, lives=lives, read=self.people.now())
                    self.people.keep(who, held)
                    return held
            self.on_conflict()
        raise StoreBusyError(f"{ATTEMPTS} times somebody else wrote first for this user; try again in a moment")

    # -- the rest of what can be asked about a user

    async def export(self, who: Who) -> dict[str, Any]:
        """Everything that is stored about a user. Raises `UnknownUserError`."""
        found: dict[str, Any] | None = await self.people.call(self.store.export, *who)
        if found is None:
            raise unknown()
        return found

    async def deleted(self, who: Who) -> Deleted:
        """Remove everything about a user, from the caches too.

        The rows are gone when this returns; for `scrubbed` see `deleting.Deleter.delete`.

        Raises `UnknownUserError` for somebody who is not there.
        """
        done = await self.deleter.delete(who, self._turn(who))
        if not done.found:
            raise unknown()
        return done

    async def listed(self, tenant: str, after: str, limit: int) -> Sequence[Listed]:
        """A page of the users of a tenant, by id."""
        return await self.people.call(self.store.users, tenant, after, limit)

    def _turn(self, who: Who) -> asyncio.Lock:
        lock = self._turns.get(who)
        if lock is None:
            lock = self._turns[who] = asyncio.Lock()
        return lock


def reward(found: Rewards, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) offset + slopes . w."""
    return np.asarray(found.offset + found.slopes @ weights)


def unknown() -> UnknownUserError:
    """What to say about somebody who is not there."""
    return UnknownUserError("there is no such user here; expected one who has given consent or feedback")


def _said(event: Feedback | AxisEdit, now: float) -> Said:
    # an edit of an axis is known to the profile by its axis, so that the next one replaces it, and to the log by its own name
    named = None if isinstance(event, AxisEdit) else event.event_id
    return Said(named or uuid.uuid4().hex, event, now if event.at is None else event.at)


def consent_of(kept: Consent | None) -> consent.Consent | None:
    """The store's record as the library has it."""
    if kept is None:
        return None
    return consent.Consent(purpose=kept.purpose, text_version=kept.text_version, granted=kept.given, at=kept.at)
