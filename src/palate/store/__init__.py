"""Where profiles are kept: a log of feedback, the profiles learned from it, and consent, in SQLite or PostgreSQL.

    store = open_store("profiles.db")
    consent = Consent("personal ranking", "2026-01", at=time.time())
    event = Event("e1", "choice", '{"kind": "choice"}', at=time.time())
    store.write([Write("acme", "ada", 0, (event,), {model: blob}, consent)])      # [Written(version=1, first=1, last=1)]
    store.read("acme", "ada").states[model]

`records` says what goes in and comes out, `database` has the store, `committing` groups writes.
"""

from typing import TYPE_CHECKING

from palate.errors import MissingExtraError
from palate.store.committing import Committer
from palate.store.records import (
    ApiKey,
    Conflict,
    Consent,
    Deleted,
    Event,
    Listed,
    Logged,
    Model,
    Outcome,
    Pruned,
    Refused,
    Replayed,
    State,
    User,
    Write,
    Written,
)

if TYPE_CHECKING:
    from palate.store.database import ProfileStore

__all__ = [
    "ApiKey",
    "Committer",
    "Conflict",
    "Consent",
    "Deleted",
    "Event",
    "Listed",
    "Logged",
    "Model",
    "Outcome",
    "Pruned",
    "Refused",
    "Replayed",
    "State",
    "User",
    "Write",
    "Written",
    "open_store",
]


def open_store(
    url: str, *, patience: float = 10.0, connections: int = 16, key_life: float = 86400.0, make: bool = True
) -> "ProfileStore":
    """The store at `url`: a path of a SQLite file, which is made if need be, or `postgresql+psycopg://user@host/database`.

    Args: as for `palate.store.database.ProfileStore`.

    Raises:
        DataError: a URL of no store, or one in memory; with `make=False`, a file that is not there.
        StoreError: it cannot be opened (`StoreDownError`, `StoreReadOnlyError`, `StoreCorruptError`), or is of a newer Palate.
        MissingExtraError: a package of the extra `serve`, or `postgres`, is not installed.
    """
    try:
        from palate.store.database import ProfileStore
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "sqlalchemy":
            raise
        raise MissingExtraError("a store of profiles needs sqlalchemy; run: pip install 'palate[serve]'") from error
    return ProfileStore(url, patience=patience, connections=connections, key_life=key_life, make=make)
