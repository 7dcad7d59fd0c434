"""`Database`: the transactions of one store, with errors that say what to do."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, update

from palate.errors import StoreBusyError, StoreReadOnlyError
from palate.store import migrations
from palate.store.engines import BEGIN, SQLITE, connect, parsed
from palate.store.failures import translated
from palate.store.tables import meta


class Database:
    """Connections to one store, migrated when this is made.

    Attributes:
        name: the URL without its password.
        is_file: SQLite, which has one writer at a time and files of its own.
    """

    def __init__(self, url: str, *, patience: float, connections: int, make: bool = True):
        found = parsed(url)
        self.name, self.patience, self.is_file = found.render_as_string(hide_password=True), patience, found.drivername == SQLITE
        self.path = found.database
        self.engine = connect(found, patience=patience, connections=connections, make=make)
        self._lock = threading.Lock()  # threads queue here for SQLite's one place, where waiting costs nothing
        try:
            self._open()
        except BaseException:
            self.engine.dispose()  # nobody else can
            raise

    def _open(self) -> None:
        with translated(self.name, "opening"):
            with self.engine.connect().execution_options(**{BEGIN: "DEFERRED"}) as connection:
                current = migrations.version_of(connection)
            if current != migrations.NEWEST:
                with self._begun("opening") as connection:
                    migrations.migrate(connection)

    @contextmanager
    def reading(self, doing: str, *, whole: bool = False) -> Iterator[Connection]:
        """A connection to read with; `whole` sees one moment in all of its statements, else each its own."""
        if self.is_file:
            options: dict[str, Any] = {BEGIN: "DEFERRED" if whole else None}
        else:
            options = {"isolation_level": "REPEATABLE READ" if whole else "AUTOCOMMIT"}
        with translated(self.name, doing), self.engine.connect().execution_options(**options) as connection:
            yield connection

    @contextmanager
    def writing(self, doing: str) -> Iterator[Connection]:
        """A transaction that is on the disk at the end, or changes nothing."""
        with translated(self.name, doing), self._begun(doing) as connection:
            yield connection

    @contextmanager
    def outside(self, doing: str) -> Iterator[Connection]:
        """A connection without a transaction, for what cannot run in one; no other writer of this process is at work."""
        options: dict[str, Any] = {BEGIN: None} if self.is_file else {"isolation_level": "AUTOCOMMIT"}
        with translated(self.name, doing), self._alone(doing), self.engine.connect().execution_options(**options) as connection:
            yield connection

    def check(self) -> None:
        """Raise the `StoreError` of a store that cannot be read and written now. Writes nothing."""
        with self.writing("checking") as connection:
            found = migrations.version_of(connection)
            if found != migrations.NEWEST:
                raise migrations.other_version(found)
            if self.is_file:  # which begins to write to a file that it may only read, and fails at the first change
                connection.execute(update(meta).values(value=meta.c.value))
                connection.rollback()
            elif connection.exec_driver_sql("SHOW transaction_read_only").scalar() == "on":
                raise StoreReadOnlyError(f"the server of {self.name} takes no writes; connect to the primary one")

    @contextmanager
    def _begun(self, doing: str) -> Iterator[Connection]:
        with (
            self._alone(doing),
            self.engine.connect().execution_options(**{BEGIN: "IMMEDIATE"}) as connection,
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def _alone(self, doing: str) -> Iterator[None]:
        if not self.is_file:
            yield
        elif not self._lock.acquire(timeout=self.patience):
            raise StoreBusyError(f"{doing} waited {self.patience:g} s for another writer of {self.name}; try again in a moment")
        else:
            try:
                yield
            finally:
                self._lock.release()
