"""Deleting so that nothing is left: rows first, then what databases keep of rows that are gone.

SQLite: `secure_delete` overwrites deleted rows; VACUUM writes the file anew, because cells that moved while pages were balanced
can leave a copy in a page's free room; a checkpoint with TRUNCATE empties the write-ahead log. PostgreSQL: VACUUM FULL, because a
plain one frees the room and leaves the bytes. What this cannot reach is in docs/store.md.
"""

import re
import time
from typing import Any

from sqlalchemy import and_, delete, exists, func, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from palate.errors import DataError, StoreBusyError
from palate.store.records import Deleted, Pruned
from palate.store.sessions import Database
from palate.store.tables import ONE_MORE, PERSONAL, answers, events, meta, states, users

PAGE = 200  # users that one transaction of a prune touches
AHEAD = 86400.0  # seconds; a limit of retention beyond it is no time in seconds, and would forget everything


def delete_user(database: Database, tenant: str, user_id: str) -> Deleted:
    """Delete every row about a user."""
    with database.writing("deleting a user") as connection:
        asked = select(*users.c["id", "version"]).where(users.c.tenant == tenant, users.c.user_id == user_id)
        row = connection.execute(asked.with_for_update()).first()
        if row is None:
            return Deleted(False, 0, False)
        count = connection.execute(select(func.count()).select_from(events).where(events.c.owner == row.id)).scalar_one()
        _raise_floor(connection, row.version)
        connection.execute(delete(users).where(users.c.id == row.id))  # the rest goes with it
    return Deleted(True, count, False)


def _raise_floor(connection: Any, version: int) -> None:
    """Whoever comes back begins above every version ever deleted: a profile kept in some memory cannot pass for theirs."""
    higher = and_(meta.c.name == "floor", meta.c.value < version)
    connection.execute(update(meta).where(higher).values(value=version))
    connection.execute(ONE_MORE)


def deletions(database: Database) -> int:
    """How many deletions there ever were."""
    return _counted(database)[0]


def unscrubbed(database: Database) -> int:
    """How many deletions still wait for their bytes to be overwritten."""
    deletions, scrubbed = _counted(database)
    return deletions - scrubbed


def _counted(database: Database) -> tuple[int, int]:
    """Deletions that ever were, and how many of them were scrubbed: two numbers that only grow, so that two processes that scrub
    at once do not take the same deletion off twice, and with it the next one."""
    with database.reading("checking") as connection:
        found = connection.execute(select(meta.c.name, meta.c.value).where(meta.c.name.in_(("unscrubbed", "scrubbed")))).all()
    values: dict[str, int] = {row.name: row.value for row in found}
    return values["unscrubbed"], values.get("scrubbed", 0)


def scrub(database: Database) -> None:
    """Overwrite what deleted rows left behind. Writes the whole store anew: the time and the room of a copy.

    Raises:
        StoreBusyError: somebody still reads the state before; the rows are deleted, and this has to be called again.
    """
    seen, _ = _counted(database)
    with database.outside("overwriting deleted rows") as connection:
        if database.is_file:
            _truncate_log(database, connection)  # the zeros that secure_delete wrote reach the file before it shrinks
            connection.exec_driver_sql("VACUUM")
            _truncate_log(database, connection)
        else:
            _vacuum_full(database, connection)
    with database.writing("overwriting deleted rows") as connection:
        insert = sqlite.insert if database.is_file else postgresql.insert
        put = insert(meta).values(name="scrubbed", value=seen)
        connection.execute(put.on_conflict_do_update(index_elements=["name"], set_={"value": seen}, where=meta.c.value < seen))


def _truncate_log(database: Database, connection: Any) -> None:
    """Fold the write-ahead log into the file and cut it to nothing, once no reader needs it any more."""
    until = time.monotonic() + database.patience
    while connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]:
        if time.monotonic() > until:
            raise StoreBusyError(
                f"the rows are deleted, but a reader of {database.name} holds the write-ahead log with their old bytes for more "
                f"than {database.patience:g} s; end it and call scrub()"
            )
        time.sleep(0.01)


def _vacuum_full(database: Database, connection: Any) -> None:
    kept: list[int] = []

    def notice(diagnostic: Any) -> None:  # "... dead row versions cannot be removed yet", in the server's language
        found = re.search(r"\d+", diagnostic.message_detail or "")
        kept.append(int(found[0]) if found else 0)

    raw = connection.connection.dbapi_connection
    raw.add_notice_handler(notice)
    try:
        connection.exec_driver_sql("SET statement_timeout = 0")  # it takes what it takes; waiting for a lock still does not
        for table in PERSONAL:
            connection.exec_driver_sql(f"VACUUM (FULL, VERBOSE) {table.name}")
    finally:
        raw.remove_notice_handler(notice)
        connection.exec_driver_sql(f"SET statement_timeout = {max(1, round(database.patience * 1000))}")
    if sum(kept):
        raise StoreBusyError(
            f"the rows are deleted, but a transaction in {database.name} that is older than that still sees {sum(kept)} of them; "
            "end it and call scrub()"
        )


def prune(database: Database, before: float, *, idle: bool, key_life: float) -> Pruned:
    """Forget events from before a moment, in order; the profiles learned from them go too, to be learned from what is left."""
    if not before <= time.time() + AHEAD:  # NaN is not
        raise DataError(
            f"events from before {before} are to be forgotten; expected a past time in unix seconds, not milliseconds"
        )
    n_events = n_users = n_deleted = 0
    if idle:
        n_deleted = _delete_idle(database, before)
    after = ("", "")
    while True:
        old = exists().where(events.c.owner == users.c.id, events.c.at < before)
        asked = select(*users.c["id", "tenant", "user_id"]).where(old, tuple_(users.c.tenant, users.c.user_id) > tuple_(*after))
        with database.writing("pruning") as connection:
            page = asked.order_by(users.c.tenant, users.c.user_id).limit(PAGE).with_for_update()
            rows = connection.execute(page).all()
            if not rows:
                break
            after = rows[-1].tenant, rows[-1].user_id
            for row in rows:
                gone = _prune_user(connection, row.id, before)
                n_events, n_users = n_events + gone, n_users + (gone > 0)
    with database.writing("pruning") as connection:
        expired = connection.execute(delete(answers).where(answers.c.at < time.time() - key_life)).rowcount
        if expired:
            connection.execute(ONE_MORE)
    return Pruned(n_events, n_users, n_deleted, expired)


def _prune_user(connection: Any, owner: int, before: float) -> int:
    """Events up to the first that is young enough: never out of order, so that no choice outlives the event that took it back."""
    young = select(func.min(events.c.seq)).where(events.c.owner == owner, events.c.at >= before)
    first = connection.execute(young).scalar()
    old = events.c.owner == owner if first is None else and_(events.c.owner == owner, events.c.seq < first)
    gone: int = connection.execute(delete(events).where(old)).rowcount
    if gone:
        connection.execute(delete(states).where(states.c.owner == owner))
        connection.execute(update(users).where(users.c.id == owner).values(version=users.c.version + 1))
        connection.execute(ONE_MORE)
    return gone


def _delete_idle(database: Database, before: float) -> int:
    n = 0
    while True:
        with database.writing("pruning") as connection:
            asked = select(*users.c["id", "version"]).where(users.c.at < before).order_by(users.c.id).limit(PAGE)
            rows = connection.execute(asked.with_for_update()).all()
            if not rows:
                return n
            _raise_floor(connection, max(row.version for row in rows))
            connection.execute(delete(users).where(users.c.id.in_([row.id for row in rows])))
            n += len(rows)


def check_damage(database: Database) -> list[str]:
    """What SQLite finds wrong with its file, at most ten lines; none for a server, which has tools of its own."""
    if not database.is_file:
        return []
    with database.reading("looking for damage") as connection:
        found = [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check(10)")]
    return [] if found == ["ok"] else found
