"""How a database becomes a store, one numbered step after another, each in the same transaction as its number.

A step is never changed once a version of Palate with it is out: a store of any age is brought up by the steps it lacks. Both
databases run the same text, their names of types aside, and both take back a step that fails half-way.
"""

from sqlalchemy import Connection, inspect, text

from palate.errors import StoreCorruptError, StoreError

TYPES = {
    "sqlite": {"id": "INTEGER PRIMARY KEY AUTOINCREMENT", "blob": "BLOB", "float": "REAL", "name": "TEXT"},
    # Compared by bytes in both, so that pages of a list have one order everywhere.
    "postgresql": {
        "id": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
        "blob": "BYTEA",
        "float": "DOUBLE PRECISION",
        "name": 'TEXT COLLATE "C"',
    },
}
OWNER = "owner BIGINT NOT NULL REFERENCES palate_users (id) ON DELETE CASCADE"

STEPS: tuple[tuple[str, ...], ...] = (
    (  # 1: a log of feedback and the profiles learned from it
        "CREATE TABLE palate_store (version BIGINT NOT NULL)",
        "INSERT INTO palate_store VALUES (0)",
        "CREATE TABLE palate_users (id {id}, tenant {name} NOT NULL, user_id {name} NOT NULL, version BIGINT NOT NULL, "
        "last BIGINT NOT NULL, at {float} NOT NULL, UNIQUE (tenant, user_id))",
        f"CREATE TABLE palate_events ({OWNER}, seq BIGINT NOT NULL, event_id {{name}} NOT NULL, kind TEXT NOT NULL, "
        "payload TEXT NOT NULL, at {float} NOT NULL, PRIMARY KEY (owner, seq), UNIQUE (owner, event_id))",
        "CREATE INDEX palate_events_at ON palate_events (at)",
        f"CREATE TABLE palate_states ({OWNER}, model {{name}} NOT NULL, blob {{blob}} NOT NULL, through BIGINT NOT NULL, "
        "PRIMARY KEY (owner, model))",
    ),
    (  # 2: consent is a record, and a request that comes twice is done once; nobody of version 1 has said yes
        "ALTER TABLE palate_users ADD COLUMN consents BIGINT NOT NULL DEFAULT 0",
        "ALTER TABLE palate_users ADD COLUMN consented SMALLINT NOT NULL DEFAULT 0",
        f"CREATE TABLE palate_consents ({OWNER}, seq BIGINT NOT NULL, purpose TEXT NOT NULL, text_version TEXT NOT NULL, "
        "given SMALLINT NOT NULL, at {float} NOT NULL, PRIMARY KEY (owner, seq))",
        f"CREATE TABLE palate_answers ({OWNER}, key {{name}} NOT NULL, digest {{blob}} NOT NULL, answer TEXT, "
        "version BIGINT NOT NULL, first BIGINT NOT NULL, last BIGINT NOT NULL, at {float} NOT NULL, PRIMARY KEY (owner, key))",
        "CREATE INDEX palate_answers_at ON palate_answers (at)",
    ),
    (  # 3: keys of the service, models side by side, and what a deletion must remember without remembering whom
        "CREATE TABLE palate_keys (id {id}, hash {blob} NOT NULL UNIQUE, tenant {name} NOT NULL, scopes TEXT NOT NULL, "
        "name TEXT NOT NULL, created {float} NOT NULL, expires {float}, revoked {float})",
        "CREATE TABLE palate_models (fingerprint {name} NOT NULL PRIMARY KEY, name TEXT NOT NULL, added {float} NOT NULL, "
        "retired {float})",
        "CREATE TABLE palate_meta (name {name} NOT NULL PRIMARY KEY, value BIGINT NOT NULL)",
        "INSERT INTO palate_meta VALUES ('floor', 0), ('unscrubbed', 0)",
    ),
)
NEWEST = len(STEPS)

# PostgreSQL's planner keeps samples of every column in a table of its own, which no vacuum of ours reaches: none of these.
UNSAMPLED = {
    "palate_users": ("user_id",),
    "palate_events": ("event_id", "payload", "kind"),
    "palate_states": ("blob",),
    "palate_consents": ("purpose", "text_version"),
    "palate_answers": ("key", "digest", "answer"),
}


def version_of(connection: Connection) -> int:
    """The number of the last step that this database has seen, 0 for an empty one.

    Raises:
        StoreCorruptError: a database with tables, and none of them Palate's.
    """
    names = inspect(connection).get_table_names()
    if "palate_store" not in names:
        if connection.dialect.name == "sqlite" and names:  # a server's database may well be shared; a file is not
            raise StoreCorruptError(
                f"the file is a database with the tables {', '.join(sorted(names)[:4])}, and no store of profiles; name another"
            )
        return 0
    found = connection.execute(text("SELECT version FROM palate_store")).scalar()
    if not isinstance(found, int):
        raise StoreCorruptError("the store does not say which version it is; restore it from a backup")
    return found


def other_version(found: int) -> StoreError:
    """What to say about a store that this Palate does not know."""
    return StoreError(f"the store is of version {found} and this Palate knows version {NEWEST}; install the Palate that wrote it")


def migrate(connection: Connection) -> None:
    """Bring the database up to the newest version, inside the transaction that `connection` has begun for writing.

    Raises:
        StoreError: the store was written by a newer version of Palate.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(7095418823)"))  # any number that others do not use
    version = version_of(connection)
    if version > NEWEST:
        raise other_version(version)
    types = TYPES[connection.dialect.name]
    for step in STEPS[version:]:
        for statement in step:
            connection.exec_driver_sql(statement.format(**types))
    if version < NEWEST:
        connection.execute(text("UPDATE palate_store SET version = :version"), {"version": NEWEST})
        if connection.dialect.name == "postgresql":
            for table, columns in UNSAMPLED.items():
                alter = ", ".join(f"ALTER COLUMN {column} SET STATISTICS 0" for column in columns)
                connection.exec_driver_sql(f"ALTER TABLE {table} {alter}")
