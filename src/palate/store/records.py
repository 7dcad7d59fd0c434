"""What goes into the store and what comes out, as plain values: no database is imported here."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from palate.errors import DataError

MAX_NAME = 512  # characters of an id: ids stand in indexes, and PostgreSQL's have rows of at most 2,704 bytes
MOST = 2**63  # no number of a database reaches it


class Consent(NamedTuple):
    """A record that a user agreed (or withdrew): to what, in which wording, and when (unix seconds)."""

    purpose: str
    text_version: str
    at: float
    given: bool = True


class Event(NamedTuple):
    """One piece of feedback as it is logged; `payload` is its JSON and `at` its time in unix seconds."""

    event_id: str
    kind: str
    payload: str
    at: float


class Logged(NamedTuple):
    """An event in the log. `seq` counts from 1 for every user and alone says what came first: clocks jump."""

    seq: int
    event_id: str
    kind: str
    payload: str
    at: float


class State(NamedTuple):
    """A profile under one model, as bytes, with every event up to and including number `through` in it."""

    blob: bytes
    through: int


class User(NamedTuple):
    """One user as the store has them.

    Attributes:
        version: changes with every write, and is never used again for the same user, a deletion between included.
        consent: the latest record, which may be a withdrawal; None where there is none.
        states: by fingerprint of the model. One that is not here is learned from the log.
        last: sequence number of the last event, 0 where there is none.
    """

    version: int
    consent: Consent | None
    states: Mapping[str, State]
    last: int


@dataclass(frozen=True)
class Write:
    """What one request changes of one user: all of it lands, or nothing.

    Attributes:
        expected: the version that this was computed from; 0 for a user who is not there yet.
        events: appended to the log in this order.
        states: by fingerprint of the model, each with everything in it up to the last of `events`.
        consent: a new record, in force for these very events.
        key: an idempotency key of this tenant and user. A second write under it changes nothing and gets the first one's answer.
        answer: kept with the key.
        request: what the key stands for, where the kinds and payloads of the events do not say it all.

    Raises:
        DataError: an id that is empty, too long, or not storable; a time that is none; a version that is no whole number; a state
            that is no bytes; a withdrawal of consent with events, which could not land; nothing to write.
    """

    tenant: str
    user_id: str
    expected: int
    events: tuple[Event, ...] = ()
    states: Mapping[str, bytes] = field(default_factory=dict)
    consent: Consent | None = None
    key: str | None = None
    answer: str | None = None
    request: str | None = None

    def __post_init__(self) -> None:
        check_user(self.tenant, self.user_id)
        if type(self.expected) is not int or not 0 <= self.expected < MOST:
            raise DataError(f"the expected version is {self.expected!r}; expected that of a read user, or 0 for a new one")
        if self.key is not None:
            check_name("idempotency key", self.key)
        for event in self.events:
            check_name("event id", event.event_id)
            check_name("kind", event.kind)
            check_text("payload", event.payload)
            _check_time(event.at)
        for model, blob in self.states.items():
            check_name("fingerprint", model)
            if not isinstance(blob, bytes):
                raise DataError(f"the state under model {model[:12]!r} is a {type(blob).__name__}; expected bytes")
        if self.consent is not None:
            check_name("purpose", self.consent.purpose)
            check_name("version of the text", self.consent.text_version)
            _check_time(self.consent.at)
            if self.events and not self.consent.given:
                raise DataError(
                    "a withdrawal of consent comes with events, which it refuses; send the withdrawal alone, or it would be lost "
                    "with them"
                )
        check_text("answer", self.answer or "")
        check_text("request", self.request or "")
        if len({event.event_id for event in self.events}) != len(self.events):
            raise DataError(f"{len(self.events)} events share an id; expected an id of its own for each")
        if not (self.events or self.states or self.consent):
            raise DataError("nothing to write; expected events, states or a consent")

    def digest(self) -> bytes:
        """32 bytes that tell this request from another one under the same key; ids and times that a server makes up aside."""
        said = self.request if self.request is not None else [[event.kind, event.payload] for event in self.events]
        agreed = None if self.consent is None else [self.consent.purpose, self.consent.text_version, self.consent.given]
        return hashlib.sha256(json.dumps([said, agreed]).encode()).digest()


class Written(NamedTuple):
    """It is on the disk. Its events are numbers `first` to `last` (`first` is `last` + 1 where there were none)."""

    version: int
    first: int
    last: int


class Conflict(NamedTuple):
    """Somebody else wrote first: nothing was done. The user is at `version` now (0: not there); read, compute, write again."""

    version: int


class Replayed(NamedTuple):
    """The key was used before for the same request: nothing was done, and this is what came of it then."""

    answer: str | None
    version: int
    first: int
    last: int


class Refused(NamedTuple):
    """Nothing was done and trying again will not help: no consent, an event id that is taken, a key of another request."""

    code: Literal["consent", "event", "key"]
    reason: str


Outcome = Written | Conflict | Replayed | Refused


class Listed(NamedTuple):
    """A line of a list of users."""

    user_id: str
    version: int
    last: int


class Deleted(NamedTuple):
    """What a deletion removed. `scrubbed`: nothing of it is left in the files that this store owns either."""

    found: bool
    events: int
    scrubbed: bool


class Pruned(NamedTuple):
    """What a retention limit removed: events, the users that they were of, whole users, and expired keys."""

    events: int
    users: int
    deleted: int
    keys: int


class Model(NamedTuple):
    """A model that profiles were learned with; `retired` is None while it is in use."""

    fingerprint: str
    name: str
    added: float
    retired: float | None


class ApiKey(NamedTuple):
    """A key of the service, without the key: only its hash is kept. Times are unix seconds."""

    id: int
    tenant: str
    scopes: tuple[str, ...]
    name: str
    created: float
    expires: float | None
    revoked: float | None
    hash: bytes


def check_name(what: str, value: str) -> None:
    """Raise `DataError` for an id that cannot be stored and found again."""
    if not value or len(value) > MAX_NAME:
        raise DataError(f"the {what} has {len(value)} characters; expected 1 to {MAX_NAME}")
    check_text(what, value)


def check_user(tenant: str, user_id: str) -> None:
    """Raise `DataError` for a tenant or a user that no store can have."""
    check_name("tenant", tenant)
    check_name("user id", user_id)


def check_page(after: int, limit: int) -> None:
    """Raise `DataError` for a page that is none."""
    if not (0 <= after < MOST and 1 <= limit < MOST):
        raise DataError(f"a page of {limit} after number {after}; expected at least 1, after 0 or more")


def check_text(what: str, value: str) -> None:
    """Raise `DataError` for text that one of the databases would refuse."""
    if "\x00" in value:
        raise DataError(f"the {what} contains a NUL character, which PostgreSQL cannot store; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the {what} is no valid Unicode ({error.reason} at character {error.start}); correct it") from error


def _check_time(at: float) -> None:
    if not math.isfinite(at):
        raise DataError(f"the time is {at}; expected unix seconds")
