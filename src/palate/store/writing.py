"""Many writes in one transaction: read what they rest on, decide about each in memory, then a few statements for all.

`decide` is the whole of the rules (versions, consent, keys, event ids) and touches no database. A group costs three SELECTs and
up to seven statements, however many writes it has, and one flush of the disk.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import BindParameter, Connection, Executable, Row, bindparam, select, text, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from palate.store.records import Conflict, Outcome, Refused, Replayed, Write, Written
from palate.store.tables import answers, consents, events, meta, states, users

Who = tuple[str, str]  # tenant, user id
FLOOR = select(meta.c.value).where(meta.c.name == "floor").with_for_update(read=True)
CHANGE = update(users).where(users.c.id == bindparam("owner"))
NO_CONSENT = "no consent of this user is in force, and feedback without one is not kept; record a consent first"


@dataclass(frozen=True)
class Head:
    """Where a user stands. `owner` is None for one who is not there."""

    owner: int | None = None
    version: int = 0
    last: int = 0
    consents: int = 0
    consented: bool = False


class Known(NamedTuple):
    """What the database says about the users of a group."""

    heads: dict[Who, Head]
    keys: dict[tuple[Who, str], tuple[bytes, float, Replayed]]  # digest, when, what came of it
    taken: set[tuple[Who, str]]  # event ids
    floor: int


@dataclass
class Decided:
    """An outcome for every write, and what has to be done for them."""

    outcomes: list[Outcome] = field(default_factory=list)
    heads: dict[Who, Head] = field(default_factory=dict)  # of the users that change
    events: list[tuple[Who, dict[str, Any]]] = field(default_factory=list)
    states: dict[tuple[Who, str], dict[str, Any]] = field(default_factory=dict)  # the last one of each
    consents: list[tuple[Who, dict[str, Any]]] = field(default_factory=list)
    answers: dict[tuple[Who, str], dict[str, Any]] = field(default_factory=dict)
    taken: set[tuple[Who, str]] = field(default_factory=set)  # event ids


class Raced(Exception):
    """Another process made the same new user in this very moment; read again."""


def decide(writes: Sequence[Write], known: Known, now: float, key_life: float) -> Decided:
    """What becomes of each write, the earlier ones of the group counting for the later. Pure: no database, no clock."""
    out = Decided()
    for write in writes:
        who = (write.tenant, write.user_id)
        head = out.heads.get(who) or known.heads.get(who) or Head()
        outcome, after = _outcome(write, head, known, out, now - key_life)
        out.outcomes.append(outcome)
        if after is None:
            continue
        assert isinstance(outcome, Written)
        out.heads[who] = after
        for seq, event in enumerate(write.events, outcome.first):
            out.events.append((who, {"seq": seq} | event._asdict()))
            out.taken.add((who, event.event_id))
        for model, blob in write.states.items():
            out.states[who, model] = {"model": model, "blob": blob, "through": outcome.last}
        if write.consent is not None:
            record = write.consent._asdict() | {"seq": after.consents, "given": int(write.consent.given)}
            out.consents.append((who, record))
        if write.key is not None:
            kept = {"key": write.key, "digest": write.digest(), "answer": write.answer, "at": now}
            out.answers[who, write.key] = kept | outcome._asdict()
    return out


def _outcome(write: Write, head: Head, known: Known, out: Decided, oldest: float) -> tuple[Outcome, Head | None]:
    who = (write.tenant, write.user_id)
    if write.key is not None:
        before = known.keys.get((who, write.key))
        if kept := out.answers.get((who, write.key)):
            before = kept["digest"], kept["at"], Replayed(kept["answer"], kept["version"], kept["first"], kept["last"])
        if before is not None and before[1] > oldest:
            if before[0] == write.digest():
                return before[2], None
            return Refused("key", "the idempotency key was used for another request; use a key once"), None
    if write.expected != head.version:
        return Conflict(head.version), None
    consented = head.consented if write.consent is None else write.consent.given
    if write.events and not consented:
        return Refused("consent", NO_CONSENT), None
    for event in write.events:
        if (who, event.event_id) in known.taken or (who, event.event_id) in out.taken:
            return Refused("event", f"the event id {event.event_id!r} is in the log already; give every event its own"), None
    version = (head.version or known.floor) + 1
    last = head.last + len(write.events)
    after = replace(
        head,
        version=version,
        last=last,
        consents=head.consents + (write.consent is not None),
        consented=consented,
    )
    return Written(version, head.last + 1, last), after


def look(connection: Connection, writes: Sequence[Write]) -> Known:
    """What the writes rest on, locked until the transaction ends."""
    ask = _asked(connection.dialect.name)
    who = sorted({(write.tenant, write.user_id) for write in writes})  # one order, or two groups could wait for each other
    found = list(_rows(connection, ask.heads, who))
    heads = {(row.tenant, row.user_id): Head(row.id, row.version, row.last, row.consents, bool(row.consented)) for row in found}
    names = {row.id: (row.tenant, row.user_id) for row in found}
    owners = {pair: head.owner for pair, head in heads.items()}
    floor = 0
    if len(heads) < len(who):
        floor = connection.execute(FLOOR).scalar_one()
    keys = [(owners[w.tenant, w.user_id], w.key) for w in writes if w.key is not None and (w.tenant, w.user_id) in owners]
    ids = [(owners[w.tenant, w.user_id], event.event_id) for w in writes for event in w.events if (w.tenant, w.user_id) in owners]
    kept: dict[tuple[Who, str], tuple[bytes, float, Replayed]] = {}
    for row in _rows(connection, ask.kept, keys):
        replay = Replayed(row.answer, row.version, row.first, row.last)
        kept[names[row.owner], row.key] = (bytes(row.digest), row.at, replay)
    taken = {(names[row.owner], row.event_id) for row in _rows(connection, ask.taken, ids)}
    return Known(heads, kept, taken, floor)


class _Asked(NamedTuple):
    heads: Executable
    kept: Executable
    taken: Executable


@cache
def _asked(dialect: str) -> _Asked:
    """The three questions, each about a list of pairs.

    SQLite reads a whole table for `(a, b) IN (VALUES ...)` of two pairs or more, so it gets a join with a list in JSON, for which
    it looks up one pair after the other. PostgreSQL does that for IN, and has no numbers by which to plan a join.
    """
    if dialect == "sqlite":
        join = "CROSS JOIN {} AS t ON t.{} = json_extract(p.value, '$[0]') AND t.{} = json_extract(p.value, '$[1]')"
        named = (
            ("palate_users", "tenant", "user_id"),
            ("palate_answers", "owner", "key"),
            ("palate_events", "owner", "event_id"),
        )
        return _Asked(*(text(f"SELECT t.* FROM json_each(:pairs) AS p {join.format(*names)}") for names in named))
    pairs: BindParameter[Any] = bindparam("pairs", expanding=True)
    heads = select(users).where(tuple_(users.c.tenant, users.c.user_id).in_(pairs))
    return _Asked(
        heads.order_by(users.c.tenant, users.c.user_id).with_for_update(),
        select(answers).where(tuple_(answers.c.owner, answers.c.key).in_(pairs)),
        select(*events.c["owner", "event_id"]).where(tuple_(events.c.owner, events.c.event_id).in_(pairs)),
    )


def _rows(connection: Connection, asked: Executable, pairs: list[Any], size: int = 2000) -> Iterator[Row[Any]]:
    """The answer for each pair that is there, a few thousand pairs in a statement."""
    as_text = connection.dialect.name == "sqlite"
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        yield from connection.execute(asked, {"pairs": json.dumps(part) if as_text else part})


def carry_out(connection: Connection, decided: Decided, now: float) -> None:
    """Write down what was decided. Raises `Raced` where a new user is there already."""
    put = _puts(connection.dialect.name)
    owners = {who: head.owner for who, head in decided.heads.items() if head.owner is not None}
    rows = {
        who: {"version": head.version, "last": head.last, "consents": head.consents, "consented": int(head.consented), "at": now}
        for who, head in sorted(decided.heads.items())
    }
    new = [{"tenant": who[0], "user_id": who[1]} | row for who, row in rows.items() if who not in owners]
    changed = [{"owner": owners[who]} | row for who, row in rows.items() if who in owners]
    if new:
        made = connection.execute(put.user, new).all()
        if len(made) < len(new):
            raise Raced
        owners |= {(row.tenant, row.user_id): row.id for row in made}
    if changed:
        connection.execute(CHANGE, changed)
    if decided.events:
        connection.execute(events.insert(), [{"owner": owners[who]} | row for who, row in decided.events])
    if decided.consents:
        connection.execute(consents.insert(), [{"owner": owners[who]} | row for who, row in decided.consents])
    if decided.states:
        connection.execute(put.state, [{"owner": owners[who]} | row for (who, _), row in decided.states.items()])
    if decided.answers:
        connection.execute(put.answer, [{"owner": owners[who]} | row for (who, _), row in decided.answers.items()])


class _Puts(NamedTuple):
    user: Executable
    state: Executable
    answer: Executable


@cache
def _puts(dialect: str) -> _Puts:
    insert = sqlite.insert if dialect == "sqlite" else postgresql.insert
    # A unique violation would write the user's id into the server's log; a conflict that does nothing does not.
    user = insert(users).on_conflict_do_nothing().returning(*users.c["id", "tenant", "user_id"])
    state, answer = insert(states), insert(answers)
    newer = {name: state.excluded[name] for name in ("blob", "through")}
    over = {name: answer.excluded[name] for name in ("digest", "answer", "version", "first", "last", "at")}  # an expired one
    return _Puts(
        user,
        state.on_conflict_do_update(index_elements=["owner", "model"], set_=newer),
        answer.on_conflict_do_update(index_elements=["owner", "key"], set_=over),
    )


def write_group(connection: Connection, writes: Sequence[Write], key_life: float) -> list[Outcome]:
    """All of a group inside the transaction that `connection` has begun for writing."""
    now = time.time()
    decided = decide(writes, look(connection, writes), now, key_life)
    carry_out(connection, decided, now)
    return decided.outcomes
