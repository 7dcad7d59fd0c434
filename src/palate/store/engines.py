"""Connections that keep what they acknowledge: what is set on SQLite and on PostgreSQL, and why."""

import os
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from palate.errors import DataError, MissingExtraError, StoreReadOnlyError

SQLITE = "sqlite+pysqlite"
POSTGRES = "postgresql+psycopg"
IN_MEMORY = (":memory:", "file::memory:")
BEGIN = "palate_begin"  # execution option: how SQLite begins ("IMMEDIATE" to write), or None for one statement on its own
CHECKPOINT_PAGES = 1000  # of 4 KiB: a log of 4 MiB is folded into the file (in a thread beside it was measured to be no faster)


def parsed(url: str) -> URL:
    """What `url` names: a path is a SQLite file, anything with :// is a URL of SQLAlchemy.

    Raises:
        DataError: a database of another kind, or one in memory, which keeps nothing.
    """
    if "://" not in url:
        found = URL.create(SQLITE, database=url)
    else:
        try:
            found = make_url(url)
        except ArgumentError as error:
            raise DataError(f"{url!r} is no URL of a store; expected a path or postgresql+psycopg://user@host/name") from error
    vfs = found.query.get("vfs", "")
    name = {"sqlite": SQLITE, "postgresql": POSTGRES, "postgres": POSTGRES}.get(found.drivername, found.drivername)
    if name not in (SQLITE, POSTGRES):
        raise DataError(f"no store in {found.drivername}; expected a path, sqlite:///path or postgresql+psycopg://user@host/name")
    if name == SQLITE and (not found.database or found.database in IN_MEMORY or "mode=memory" in str(found) or "memdb" in vfs):
        raise DataError("a store in memory loses every acknowledged choice with its process; give the path of a file")
    return found.set(drivername=name)


def connect(url: URL, *, patience: float, connections: int, make: bool = True) -> Engine:
    """An engine whose commits are on the disk when they return.

    Args:
        patience: seconds to wait for a lock, a connection or a statement before `StoreBusyError`.
        connections: at most so many at once.
        make: whether to make a SQLite file that is not there; else a `DataError` says so.
    """
    shared: dict[str, Any] = {"hide_parameters": True, "pool_timeout": patience, "max_overflow": 0, "pool_size": connections}
    if url.drivername == SQLITE:
        _make_private(url, make)
        engine = create_engine(url, connect_args={"timeout": patience}, **shared)
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    milliseconds = max(1, round(patience * 1000))
    own = url.query.get("options", "")  # such as -c search_path=...
    options = " ".join((own,) if isinstance(own, str) else own)
    options += f" -c synchronous_commit=on -c statement_timeout={milliseconds} -c lock_timeout={milliseconds}"
    options += f" -c idle_in_transaction_session_timeout={4 * milliseconds}"
    arguments = {"connect_timeout": max(2, round(patience)), "options": options, "application_name": "palate"}
    arguments |= {"tcp_user_timeout": 2 * milliseconds, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
    try:
        return create_engine(url, connect_args=arguments, pool_pre_ping=True, **shared)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise MissingExtraError("a store in PostgreSQL needs psycopg; run: pip install 'palate[postgres]'") from error


def _make_private(url: URL, make: bool) -> None:
    """Make the file, for its owner alone: SQLite gives its two companions the same rights."""
    name = str(url.database)
    if name.startswith("file:"):
        return  # a URI of SQLite's own: what it says is what is wanted
    path = Path(name)
    if not path.parent.is_dir():
        raise DataError(f"there is no folder {path.parent} for the store {path.name}; make it first")
    if not make and not path.exists():
        raise DataError(f"there is no store {path}; expected the file that `palate serve --store` keeps profiles in")
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        if not path.exists():
            raise StoreReadOnlyError(f"{path} cannot be made ({error.strerror}); check the rights on its folder") from error


def _set_up_sqlite(raw: sqlite3.Connection, _record: object) -> None:
    raw.isolation_level = None  # the driver begins nothing on its own: `_begin_sqlite` does
    cursor = raw.cursor()
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA secure_delete=ON")  # what is deleted is overwritten, not only unlinked
    cursor.execute("PRAGMA journal_mode=WAL")  # readers and the writer do not wait for each other
    cursor.execute("PRAGMA synchronous=FULL")  # in WAL mode the log is synced at every commit, not at checkpoints only
    cursor.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
    cursor.execute("PRAGMA mmap_size=0")  # an error of the disk is an error code, not a signal
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    how = connection.get_execution_options().get(BEGIN, "DEFERRED")
    if how is not None:
        connection.exec_driver_sql(f"BEGIN {how}")
