"""What databases raise, as the errors of Palate: said once, so that no caller reads messages of drivers.

Nothing of a statement's values goes into a message: they are people's texts, and messages end up in logs.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from palate.errors import (
    StoreBusyError,
    StoreCorruptError,
    StoreDownError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
)

# SQLite's primary result codes (sqlite.org/rescode.html) and PostgreSQL's classes of states (its manual, appendix A).
SQLITE = {
    sqlite3.SQLITE_BUSY: StoreBusyError,
    sqlite3.SQLITE_LOCKED: StoreBusyError,
    sqlite3.SQLITE_FULL: StoreFullError,
    sqlite3.SQLITE_READONLY: StoreReadOnlyError,
    sqlite3.SQLITE_CORRUPT: StoreCorruptError,
    sqlite3.SQLITE_NOTADB: StoreCorruptError,
}
POSTGRES = {
    "53100": StoreFullError,
    "25006": StoreReadOnlyError,
    "XX001": StoreCorruptError,
    "XX002": StoreCorruptError,
    "55P03": StoreBusyError,  # a lock was not had in time
    "57014": StoreBusyError,  # the statement took too long
    "40001": StoreBusyError,
    "40P01": StoreBusyError,  # deadlock
    "53300": StoreBusyError,  # too many connections
    "58030": StoreError,  # input or output failed
}
ADVICE = {
    StoreBusyError: "it is locked or slow; try again in a moment",
    StoreFullError: "the disk is full and nothing was written; make room and try again",
    StoreReadOnlyError: "it cannot be written; check the rights on the file and its folder, or which server this is",
    StoreCorruptError: "the file is damaged or no store; restore it from a backup",
    StoreDownError: "the database server does not answer; whether a write under way landed is not known: repeat it under its key",
    StoreError: "look at the disk and at the database's own log",
}


def kind_of(error: SQLAlchemyError) -> type[StoreError]:
    """The class that says what to do about `error`."""
    if isinstance(error, PoolTimeout):
        return StoreBusyError
    original = getattr(error, "orig", None)
    if isinstance(original, sqlite3.Error):
        return SQLITE.get(getattr(original, "sqlite_errorcode", -1) & 0xFF, StoreError)
    state = getattr(original, "sqlstate", None)
    if state is not None:
        down = state[:2] == "08" or state[:3] == "57P"  # a connection that broke; a server that is starting or going
        return StoreDownError if down else POSTGRES.get(state, StoreFullError if state[:2] == "53" else StoreError)
    lost = isinstance(error, DBAPIError) and (error.connection_invalidated or isinstance(error, OperationalError))
    return StoreDownError if lost else StoreError


def said(error: SQLAlchemyError) -> str:
    """The first line of what the database said, without the details that name rows."""
    original = getattr(error, "orig", None) or error
    primary = getattr(getattr(original, "diag", None), "message_primary", None)
    lines = str(primary or original).splitlines()
    return lines[0] if lines else type(original).__name__


def crossed(error: StoreError) -> bool:
    """Whether two transactions waited for each other, so that the same one again will do."""
    return getattr(getattr(error.__cause__, "orig", None), "sqlstate", None) in ("40P01", "40001")


@contextmanager
def translated(store: str, doing: str) -> Iterator[None]:
    """Raise what SQLAlchemy raises inside as a `StoreError` that names the store and what was being done."""
    try:
        yield
    except SQLAlchemyError as error:
        kind = kind_of(error)
        raise kind(f"{doing} failed in the store {store}: {said(error)}; {ADVICE[kind]}") from error
