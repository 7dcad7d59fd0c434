"""`ProfileStore`: a log of feedback and the profiles learned from it, in a SQLite file or in PostgreSQL.

What `write` has returned as `Written` is on the disk: SQLite syncs its write-ahead log at every commit, PostgreSQL its own. Two
writers never lose an update, because a write says which version it was computed from, and a version is used once.
"""

import time
from collections.abc import Sequence
from typing import Any, Self

from sqlalchemy import and_, bindparam, func, literal, select, tuple_

from palate.errors import DataError, StoreBusyError, StoreCorruptError, StoreFullError
from palate.store import forgetting
from palate.store.failures import crossed
from palate.store.records import (
    Consent,
    Deleted,
    Listed,
    Logged,
    Outcome,
    Pruned,
    Replayed,
    State,
    User,
    Write,
    check_name,
    check_page,
    check_text,
    check_user,
)
from palate.store.registers import Keys, Models
from palate.store.sessions import Database
from palate.store.tables import answers, consents, events, states, users
from palate.store.writing import Raced, write_group

MAX_ROUNDS = 5  # of a group that another process got in the way of

# Made once: putting a statement together costs more than SQLite takes to run it. PostgreSQL has no sample of ids on purpose (see
# `migrations.UNSAMPLED`) and takes one id for hundreds of users, so every join starts from what is said to be a single row.
_THEM = and_(users.c.tenant == bindparam("tenant"), users.c.user_id == bindparam("user_id"))
_OWNER = select(users.c.id).where(_THEM).scalar_subquery()
_ONE = select(*users.c["id", "version", "last", "consents"]).where(_THEM).limit(1).subquery()
READ = select(
    *_ONE.c["version", "last"],
    *consents.c["purpose", "text_version", "at", "given"],
    *states.c["model", "blob", "through"],
).select_from(
    _ONE.outerjoin(consents, and_(consents.c.owner == _ONE.c.id, consents.c.seq == _ONE.c.consents)).outerjoin(
        states, states.c.owner == _ONE.c.id
    )
)
VERSION = select(users.c.version).where(_THEM)
ANSWER = select(*answers.c["answer", "version", "first", "last"]).where(
    answers.c.owner == _OWNER, answers.c.key == bindparam("key"), answers.c.at > bindparam("oldest")
)
LOG = (
    select(*events.c["seq", "event_id", "kind", "payload", "at"])
    .where(events.c.owner == _OWNER, events.c.seq > bindparam("after"))
    .order_by(events.c.seq)
    .limit(bindparam("limit"))
)


class ProfileStore:
    """The users of every tenant: what they said, what was learned of them, and what they agreed to.

    Safe for any number of threads and processes. A process that forks opens its own.

    Args:
        url: a path of a SQLite file, which is made if need be, or `postgresql+psycopg://user@host/database`.
        patience: seconds to wait for a lock or a slow statement before `StoreBusyError`.
        connections: at most so many at once in this process.
        key_life: seconds for which an idempotency key is remembered.
        make: whether to make a SQLite file that is not there.

    Attributes:
        keys: the API keys of the service, as hashes.
        models: the models that profiles are learned with, side by side.
        is_file: whether it is a file of SQLite, and not a server.

    Raises:
        DataError: a URL of no store, or one in memory; a file that is not there and is not to be made.
        StoreError: it cannot be opened (`StoreDownError`, `StoreReadOnlyError`, `StoreCorruptError`), or is of a newer Palate.
        MissingExtraError: PostgreSQL without psycopg.
    """

    def __init__(self, url: str, *, patience: float = 10.0, connections: int = 16, key_life: float = 86400.0, make: bool = True):
        if not (patience > 0 and connections > 0 and key_life >= 0):
            raise DataError(f"patience is {patience}, connections {connections}, key_life {key_life}; expected more than 0")
        self._database = Database(url, patience=patience, connections=connections, make=make)
        self.name, self.key_life, self.is_file = self._database.name, key_life, self._database.is_file
        self.keys, self.models = Keys(self._database), Models(self._database)

    def __repr__(self) -> str:
        return f"ProfileStore({self.name!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back. A store can be used again afterwards: it connects anew."""
        self._database.engine.dispose()

    # -- one user

    def read(self, tenant: str, user_id: str) -> User | None:
        """What is known of a user at one moment, None for one who is not there. One statement."""
        check_user(tenant, user_id)
        with self._database.reading("reading a user") as connection:
            rows = connection.execute(READ, {"tenant": tenant, "user_id": user_id}).all()
        if not rows:
            return None
        one = rows[0]
        consent = None if one.purpose is None else Consent(one.purpose, one.text_version, one.at, bool(one.given))
        found = {row.model: State(bytes(row.blob), row.through) for row in rows if row.model is not None}
        return User(one.version, consent, found, one.last)

    def version(self, tenant: str, user_id: str) -> int:
        """The user's version, 0 for one who is not there: enough to know whether something kept in memory still holds."""
        check_user(tenant, user_id)
        with self._database.reading("reading a version") as connection:
            return connection.execute(VERSION, {"tenant": tenant, "user_id": user_id}).scalar() or 0

    def answer(self, tenant: str, user_id: str, key: str) -> Replayed | None:
        """What came of the request under this idempotency key, None where there was none or it is too long ago."""
        check_user(tenant, user_id)
        check_name("idempotency key", key)
        asked = {"tenant": tenant, "user_id": user_id, "key": key, "oldest": time.time() - self.key_life}
        with self._database.reading("reading an answer") as connection:
            row = connection.execute(ANSWER, asked).first()
        return None if row is None else Replayed(row.answer, row.version, row.first, row.last)

    def events(self, tenant: str, user_id: str, after: int = 0, limit: int = 1000) -> list[Logged]:
        """The user's log from number `after` + 1 on, at most `limit` of it, in order; empty for one who is not there."""
        check_user(tenant, user_id)
        check_page(after, limit)
        asked = {"tenant": tenant, "user_id": user_id, "after": after, "limit": limit}
        with self._database.reading("reading the log") as connection:
            return [Logged(*row) for row in connection.execute(LOG, asked)]

    def export(self, tenant: str, user_id: str) -> dict[str, Any] | None:
        """Everything that the store has of a user, as JSON (bytes in hexadecimal); None for one who is not there.

        All of it as of one moment. The log is in it whole: a user of 100,000 choices is a large dict.
        """
        check_user(tenant, user_id)
        with self._database.reading("exporting a user", whole=True) as connection:
            asked = select(users).where(users.c.tenant == tenant, users.c.user_id == user_id)
            row = connection.execute(asked).mappings().first()
            if row is None:
                return None
            out: dict[str, Any] = {name: row[name] for name in ("tenant", "user_id", "version", "last", "at")}
            for table in (events, states, consents, answers):
                inner = select(table).where(table.c.owner == row["id"]).order_by(*table.primary_key.columns)
                found = connection.execute(inner).mappings().all()
                lines = [{name: _plain(value) for name, value in line.items() if name != "owner"} for line in found]
                out[table.name.removeprefix("palate_")] = lines
        return out | {"consented": bool(row["consented"])}

    def delete(self, tenant: str, user_id: str, *, scrub: bool = True) -> Deleted:
        """Delete everything about a user: the rows, in one transaction, then what the files keep of deleted rows (`scrub`).

        The rows are gone when this returns. `scrubbed` is False where a reader holds on to their old bytes, or there is no room
        for a copy of the store: `scrub` is then still due, and says why if it is called. To delete many, pass scrub=False and
        call `scrub` once at the end.
        """
        check_user(tenant, user_id)
        found = forgetting.delete_user(self._database, tenant, user_id)
        try:
            if scrub:
                self.scrub()
        except (StoreBusyError, StoreFullError):
            return found
        return found._replace(scrubbed=scrub)

    def scrub(self) -> None:
        """Overwrite what deleted rows left in the files, if any were deleted since the last time (see `forgetting`).

        Other writers wait meanwhile, readers of SQLite do not. Costs a copy of the store, in time and in room on the disk.

        Raises:
            StoreBusyError: a reader holds on to the old bytes; end it and call again.
            StoreFullError: no room for the copy.
        """
        if self.unscrubbed():
            forgetting.scrub(self._database)

    def deletions(self) -> int:
        """How many deletions there ever were, of users and by retention, by any process; a number that only grows."""
        return forgetting.deletions(self._database)

    def unscrubbed(self) -> int:
        """How many deletions were not yet followed by a `scrub`."""
        return forgetting.unscrubbed(self._database)

    def prune(self, before: float, *, idle: bool = False, scrub: bool = True) -> Pruned:
        """Keep to a limit of retention: forget the events from before a moment, and expired idempotency keys.

        A log is cut from its beginning up to its first event that is not from before: one that a clock dated back among younger
        ones stays until they go, so that no choice outlives the event that took it back. The profiles learned from what is
        forgotten are deleted with it, and `stale` lists their users.

        Args:
            before: unix seconds.
            idle: delete users whole who have not been written to since then.
            scrub: as for `delete`.

        Raises `DataError` for a time that is ahead of now, as one in milliseconds is.
        """
        found = forgetting.prune(self._database, before, idle=idle, key_life=self.key_life)
        if scrub:
            self.scrub()
        return found

    # -- many users

    def write(self, writes: Sequence[Write]) -> list[Outcome]:
        """What became of each write, in order; all in one transaction, and on the disk when this returns.

        A conflict or a refusal of one does not touch the others. A later write of the same user in the same group sees what the
        earlier did.

        Raises:
            StoreError: the transaction failed as a whole. Nothing of it is there, except where the connection to a server broke
                while it committed (`StoreDownError`): then nobody knows, and a write with a key can be repeated safely.
        """
        for _ in range(MAX_ROUNDS):
            try:
                with self._database.writing("writing") as connection:
                    return write_group(connection, writes, self.key_life)
            except Raced:
                continue
            except StoreBusyError as error:
                if not crossed(error):
                    raise
        raise StoreBusyError(f"{len(writes)} writes met others {MAX_ROUNDS} times in {self.name}; try again in a moment")

    def users(self, tenant: str, after: str = "", limit: int = 1000) -> list[Listed]:
        """The tenant's users with ids after `after`, in the order of their ids' bytes, at most `limit`."""
        check_text("user id", after)
        check_page(0, limit)
        asked = select(*users.c["user_id", "version", "last"]).where(users.c.tenant == tenant, users.c.user_id > after)
        with self._database.reading("listing users") as connection:
            return [Listed(*row) for row in connection.execute(asked.order_by(users.c.user_id).limit(limit))]

    def stale(self, model: str, after: tuple[str, str] = ("", ""), limit: int = 1000) -> list[tuple[str, str]]:
        """(tenant, user id) of users with events that are not in their profile under `model` yet, in order, after `after`.

        To learn everybody again under a new model, take a page, write each one's new state, and take the next page after the
        last of it; a run that was stopped begins again at the beginning and skips what is done. One walk over the users.
        """
        check_page(0, limit)
        own = and_(states.c.owner == users.c.id, states.c.model == model)
        asked = (
            select(*users.c["tenant", "user_id"])
            .select_from(users.outerjoin(states, own))
            .where(users.c.last > func.coalesce(states.c.through, 0))
            .where(tuple_(users.c.tenant, users.c.user_id) > tuple_(literal(after[0]), literal(after[1])))
            .order_by(users.c.tenant, users.c.user_id)
            .limit(limit)
        )
        with self._database.reading("looking for stale profiles") as connection:
            return [(row.tenant, row.user_id) for row in connection.execute(asked)]

    def check(self, *, deep: bool = False) -> None:
        """Whether the store can be read and written now; `deep` reads a SQLite file whole and looks for damage, which takes long.

        Raises:
            StoreError: it cannot, and why.
        """
        self._database.check()
        if deep and (damage := forgetting.check_damage(self._database)):
            raise StoreCorruptError(f"{self.name} is damaged: {'; '.join(damage)}; restore it from a backup")


def _plain(value: Any) -> Any:
    return bytes(value).hex() if isinstance(value, bytes | memoryview) else value
