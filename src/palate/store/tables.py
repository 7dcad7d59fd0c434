"""The tables as the queries see them. `migrations` is what makes them, and a test compares the two.

Everything about a user hangs on one number (`owner`), so that the user's id stands in one table, and deleting that row deletes
the rest. The log has no clock in its order: (owner, seq).
"""

from sqlalchemy import BigInteger, Column, Float, ForeignKey, LargeBinary, MetaData, SmallInteger, Table, Text

metadata = MetaData()


def _owner() -> Column[int]:
    return Column("owner", BigInteger, ForeignKey("palate_users.id", ondelete="CASCADE"), primary_key=True)


schema = Table("palate_store", metadata, Column("version", BigInteger, nullable=False))

users = Table(
    "palate_users",
    metadata,
    Column("id", BigInteger, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("user_id", Text, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("last", BigInteger, nullable=False),  # sequence number of the last event
    Column("at", Float, nullable=False),  # of the last write
    Column("consents", BigInteger, nullable=False),  # how many records there are: the last of them is in force
    Column("consented", SmallInteger, nullable=False),
)

events = Table(
    "palate_events",
    metadata,
    _owner(),
    Column("seq", BigInteger, primary_key=True),
    Column("event_id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("payload", Text, nullable=False),
    Column("at", Float, nullable=False),
)

states = Table(
    "palate_states",
    metadata,
    _owner(),
    Column("model", Text, primary_key=True),
    Column("blob", LargeBinary, nullable=False),
    Column("through", BigInteger, nullable=False),
)

consents = Table(
    "palate_consents",
    metadata,
    _owner(),
    Column("seq", BigInteger, primary_key=True),
    Column("purpose", Text, nullable=False),
    Column("text_version", Text, nullable=False),
    Column("given", SmallInteger, nullable=False),
    Column("at", Float, nullable=False),
)

answers = Table(
    "palate_answers",
    metadata,
    _owner(),
    Column("key", Text, primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    Column("answer", Text),
    Column("version", BigInteger, nullable=False),
    Column("first", BigInteger, nullable=False),
    Column("last", BigInteger, nullable=False),
    Column("at", Float, nullable=False),
)

keys = Table(
    "palate_keys",
    metadata,
    Column("id", BigInteger, primary_key=True),
    Column("hash", LargeBinary, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("scopes", Text, nullable=False),  # JSON
    Column("name", Text, nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
)

models = Table(
    "palate_models",
    metadata,
    Column("fingerprint", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("added", Float, nullable=False),
    Column("retired", Float),
)

meta = Table("palate_meta", metadata, Column("name", Text, primary_key=True), Column("value", BigInteger, nullable=False))

# One more deletion whose bytes wait to be overwritten.
ONE_MORE = meta.update().where(meta.c.name == "unscrubbed").values(value=meta.c.value + 1)

PERSONAL = (users, events, states, consents, answers)  # every table in which something about a user can stand
