"""Two short lists beside the users: the API keys of the service, as hashes, and the models that profiles are learned with."""

import json
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite

from palate.errors import DataError
from palate.store.records import MOST, ApiKey, Model, check_name
from palate.store.sessions import Database
from palate.store.tables import ONE_MORE, keys, models, states

PAGE = 1000  # rows that one transaction deletes


class Keys:
    """API keys of the service. What is kept of a key is the hash that `palate.server` makes of it."""

    def __init__(self, database: Database):
        self._database = database

    def add(self, hash: bytes, tenant: str, scopes: Sequence[str], name: str, expires: float | None = None) -> ApiKey:
        """Keep a new key. Raises `DataError` where its hash is there already."""
        check_name("tenant", tenant)
        check_name("name", name)
        insert = sqlite.insert if self._database.is_file else postgresql.insert
        row = {"hash": hash, "tenant": tenant, "scopes": json.dumps(list(scopes)), "name": name, "expires": expires}
        put = insert(keys).values(created=time.time(), **row).on_conflict_do_nothing().returning(*_KEY)
        with self._database.writing("adding a key") as connection:
            made = connection.execute(put).first()
        if made is None:
            raise DataError(f"the key {name!r} is there already; make another one")
        return _api_key(made)

    def find(self, hash: bytes) -> ApiKey | None:
        """The key with this hash, None where there is none; whether it is expired or revoked is for the caller to judge."""
        with self._database.reading("finding a key") as connection:
            row = connection.execute(select(*_KEY).where(keys.c.hash == hash)).first()
        return None if row is None else _api_key(row)

    def list(self, tenant: str | None = None) -> list[ApiKey]:
        """Every key, or a tenant's, oldest first, the revoked ones among them."""
        asked = select(*_KEY).order_by(keys.c.id)
        with self._database.reading("listing keys") as connection:
            rows = connection.execute(asked if tenant is None else asked.where(keys.c.tenant == tenant)).all()
        return [_api_key(row) for row in rows]

    def revoke(self, id: int) -> bool:
        """End a key now, for good; False where there is none with this number. The first revocation's time stays."""
        if not 0 < id < MOST:
            return False
        with self._database.writing("revoking a key") as connection:
            found = connection.execute(select(keys.c.revoked).where(keys.c.id == id)).first()
            if found is not None and found.revoked is None:
                connection.execute(update(keys).where(keys.c.id == id).values(revoked=time.time()))
        return found is not None


class Models:
    """Which models there are. Profiles under several live side by side; a retired model's are deleted."""

    def __init__(self, database: Database):
        self._database = database

    def add(self, fingerprint: str, name: str = "") -> Model:
        """Say that a model is in use; again, if it was retired."""
        check_name("fingerprint", fingerprint)
        insert = sqlite.insert if self._database.is_file else postgresql.insert
        put = insert(models).values(fingerprint=fingerprint, name=name, added=time.time(), retired=None)
        put = put.on_conflict_do_update(index_elements=["fingerprint"], set_={"name": name, "retired": None})
        with self._database.writing("adding a model") as connection:
            connection.execute(put)
            return Model(*connection.execute(select(models).where(models.c.fingerprint == fingerprint)).one())

    def list(self) -> list[Model]:
        """Every model, oldest first, the retired ones among them."""
        with self._database.reading("listing models") as connection:
            return [Model(*row) for row in connection.execute(select(models).order_by(models.c.added, models.c.fingerprint))]

    def retire(self, fingerprint: str) -> int:
        """Take a model out of use and delete every profile under it, a thousand in a transaction; how many those were.

        The log of feedback stays, and so do the profiles' bytes in the files, until `ProfileStore.scrub`. Where this is stopped
        half-way, call it again.
        """
        with self._database.writing("retiring a model") as connection:
            connection.execute(update(models).where(models.c.fingerprint == fingerprint).values(retired=time.time()))
        deleted = after = 0
        while True:
            page = select(states.c.owner).where(states.c.model == fingerprint, states.c.owner > after).order_by(states.c.owner)
            with self._database.writing("retiring a model") as connection:
                owners = connection.execute(page.limit(PAGE)).scalars().all()
                if not owners:
                    return deleted
                connection.execute(delete(states).where(states.c.model == fingerprint, states.c.owner.in_(owners)))
                connection.execute(ONE_MORE)
            deleted, after = deleted + len(owners), owners[-1]


_KEY = tuple(keys.c[name] for name in ApiKey._fields)


def _api_key(row: Row[Any]) -> ApiKey:
    times = row.created, row.expires, row.revoked
    return ApiKey(row.id, row.tenant, tuple(json.loads(row.scopes)), row.name, *times, bytes(row.hash))
