"""The store: its rules against a dictionary, its failures made for real, and a deletion looked for in the bytes of every file.

What holds for both databases runs on both; PostgreSQL is started here, and skipped with a word where it is not installed.
"""

import json
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event, inspect

from palate.errors import (
    DataError,
    MissingExtraError,
    QueueFullError,
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
)
from palate.store import (
    Committer,
    Conflict,
    Consent,
    Event,
    Listed,
    Refused,
    Replayed,
    State,
    Write,
    Written,
    forgetting,
    open_store,
)
from palate.store.database import ProfileStore
from palate.store.migrations import STEPS
from palate.store.tables import metadata
from palate.store.writing import Known, decide

YES = Consent("personalise", "2026-01", 1000.0)
NO = YES._replace(given=False, at=2000.0)


def said(n: int, payload: str = '{"row": 1}', at: float = 0.0) -> Event:
    return Event(f"e{n}", "choice", payload, at or 1000.0 + n)


@pytest.fixture(scope="module")
def postgres(root: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        from benchmarks.postgres import Postgres, programs
    if programs() is None:
        pytest.skip("no PostgreSQL on this machine (on Debian: apt-get install postgresql)")
    with Postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return str(tmp_path / "profiles.db")
    found: str = request.getfixturevalue("postgres").empty(f"t{time.monotonic_ns()}")
    return found


@pytest.fixture
def store(url: str) -> Iterator[ProfileStore]:
    with open_store(url) as opened:
        yield opened


@pytest.fixture
def on_file(tmp_path: Path) -> Iterator[ProfileStore]:
    with open_store(str(tmp_path / "profiles.db"), patience=0.7) as opened:
        yield opened


# -- the rules


def test_what_is_written_is_read_and_a_version_is_used_once(store: ProfileStore) -> None:
    assert store.read("acme", "ada") is None
    first = Write("acme", "ada", 0, (said(1), said(2)), {"m": b"\x00\xff", "n": b""}, YES)
    assert store.write([first, Write("acme", "bob", 0, (), {}, NO)]) == [Written(1, 1, 2), Written(1, 1, 0)]
    assert store.write([first]) == [Conflict(1)]
    assert store.write([Write("acme", "ada", 1, (said(3),), {"m": b"2"}), Write("acme", "cid", 7, consent=YES)]) == [
        Written(2, 3, 3),
        Conflict(0),
    ]
    user = store.read("acme", "ada")
    assert user == (2, YES, {"m": State(b"2", 3), "n": State(b"", 2)}, 3)
    assert [entry[:3] for entry in store.events("acme", "ada", after=1)] == [(2, "e2", "choice"), (3, "e3", "choice")]
    assert store.events("acme", "ada", after=1, limit=1)[0].payload == '{"row": 1}'
    assert store.read("other", "ada") is None
    assert store.events("other", "ada") == []
    assert store.export("other", "ada") is None
    assert (store.version("acme", "ada"), store.version("other", "ada")) == (2, 0)


class Flat:
    """The same rules for one tenant, one write after another, in dictionaries."""

    def __init__(self) -> None:
        self.users: dict[str, dict[str, Any]] = {}

    def write(self, write: Write) -> Any:
        user = self.users.get(write.user_id, {"version": 0, "log": [], "keys": {}, "consent": None, "states": {}})
        if write.key in user["keys"]:
            digest, answer, done = user["keys"][write.key]
            return Replayed(answer, *done) if digest == write.digest() else "key"
        if write.expected != user["version"]:
            return Conflict(user["version"])
        consent = write.consent or user["consent"]
        if write.events and not (consent and consent.given):
            return "consent"
        if {event.event_id for event in write.events} & {event.event_id for event in user["log"]}:
            return "event"
        done = Written(user["version"] + 1, len(user["log"]) + 1, len(user["log"]) + len(write.events))
        log = [*user["log"], *write.events]
        states = user["states"] | {model: State(blob, len(log)) for model, blob in write.states.items()}
        keys = user["keys"] | ({write.key: (write.digest(), write.answer, done)} if write.key else {})
        self.users[write.user_id] = {"version": done.version, "log": log, "keys": keys, "consent": consent, "states": states}
        return done


writes = st.builds(
    lambda name, expected, ids, states, consent, *kept: Write(
        *("-", name, expected, () if consent == NO else tuple(said(n) for n in ids), states, consent), *kept
    ),
    st.sampled_from(["ada", "bob"]),
    st.integers(0, 4),
    st.lists(st.integers(0, 9), max_size=2, unique=True),
    st.dictionaries(st.sampled_from(["m", "n"]), st.binary(max_size=3), min_size=1),
    st.sampled_from([None, None, YES, NO]),
    st.sampled_from([None, "k1", "k2"]),
    st.sampled_from([None, "{}"]),
)


@given(groups=st.lists(st.lists(writes, max_size=6), max_size=5))
@settings(max_examples=25)
def test_groups_do_what_single_writes_to_dictionaries_do(
    store_of_many: ProfileStore, numbers: Iterator[int], groups: list[list[Write]]
) -> None:
    tenant, flat = f"tenant-{next(numbers)}", Flat()
    for group in groups:
        own = [
            Write(tenant, *(getattr(write, name) for name in Write.__dataclass_fields__ if name != "tenant")) for write in group
        ]
        expected = [flat.write(write) for write in own]
        assert [out.code if isinstance(out, Refused) else out for out in store_of_many.write(own)] == expected
    assert store_of_many.users(tenant) == [
        Listed(name, user["version"], len(user["log"])) for name, user in sorted(flat.users.items())
    ]
    for name, kept in flat.users.items():
        user = store_of_many.read(tenant, name)
        assert user == (kept["version"], kept["consent"], kept["states"], len(kept["log"]))
        assert [tuple(entry) for entry in store_of_many.events(tenant, name)] == [
            (seq, *event) for seq, event in enumerate(kept["log"], 1)
        ]


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def store_of_many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProfileStore]:
    if request.param == "sqlite":
        url = str(tmp_path_factory.mktemp("store") / "profiles.db")
    else:
        url = request.getfixturevalue("postgres").empty("many")
    with open_store(url) as opened:
        yield opened


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    return iter(range(10**9))


def test_a_key_lives_for_a_while_and_goes_with_its_user(url: str) -> None:
    with open_store(url, key_life=1000.0) as store, open_store(url, key_life=0.0) as forgetful:
        write = Write("acme", "ada", 0, (said(1),), {}, YES, key="k", answer='{"ok": 1}')
        assert store.write([write, write]) == [Written(1, 1, 1), Replayed('{"ok": 1}', 1, 1, 1)]
        assert store.answer("acme", "ada", "k") == Replayed('{"ok": 1}', 1, 1, 1)
        assert store.answer("acme", "bob", "k") is None
        assert forgetful.answer("acme", "ada", "k") is None
        again = Write("acme", "ada", 1, (said(2, "{}"),), key="k")
        assert [type(out) for out in store.write([again])] == [Refused]
        assert forgetful.write([again]) == [Written(2, 2, 2)]  # the key is kept anew
        assert store.write([again]) == [Replayed(None, 2, 2, 2)]
        assert store.delete("acme", "ada", scrub=False).events == 2
        assert store.answer("acme", "ada", "k") is None


def test_a_profile_from_before_a_deletion_never_passes_for_a_new_one(store: ProfileStore) -> None:
    for n in range(3):
        store.write([Write("acme", "ada", n, (said(n),), {"m": b"old"}, YES)])
    assert store.delete("acme", "ada") == (True, 3, True)
    assert store.read("acme", "ada") is None
    assert store.delete("acme", "ada") == (False, 0, True)
    assert store.write([Write("acme", "ada", 0, (said(0),), {"m": b"new"}, YES)]) == [Written(4, 1, 1)]
    stale = [Write("acme", "ada", version, (said(9),), {"m": b"old and more"}) for version in (1, 2, 3)]
    assert store.write(stale) == [Conflict(4)] * 3


def test_ids_are_data_and_what_no_database_keeps_is_refused(store: ProfileStore) -> None:
    hostile = ["'; DROP TABLE palate_users; --", "%_\\", "\u202eevil", "😀" * 256, "ada ", "Ada", "ada", "\x7f\t\n"]
    store.write([Write("acme", name, 0, (said(1, json.dumps(name)),), {}, YES) for name in hostile])
    assert [row.user_id for row in store.users("acme")] == sorted(hostile)  # by code points in both, so pages agree
    assert [row.user_id for row in store.users("acme", after="ada", limit=1)] == ["ada "]
    assert [json.loads(store.events("acme", name)[0].payload) for name in hostile] == hostile
    for wrong in ("", "x" * 513, "a\x00b", "\ud800"):
        with pytest.raises(DataError, match="user id"):
            Write("acme", wrong, 0, consent=YES)
    for ask in (store.read, store.version, store.events, store.export, store.delete):
        with pytest.raises(DataError, match="no valid Unicode"):
            ask("acme", "\ud800")
    with pytest.raises(DataError, match="page of -1"):
        store.events("acme", "ada", limit=-1)
    with pytest.raises(DataError, match="page of 5 after number 9223372036854775808"):
        store.events("acme", "ada", after=2**63, limit=5)
    with pytest.raises(DataError, match="payload contains a NUL"):
        Write("acme", "ada", 0, (said(1, "\x00"),))
    with pytest.raises(DataError, match="time is nan"):
        Write("acme", "ada", 0, (said(1, "{}", float("nan")),))
    with pytest.raises(DataError, match="nothing to write"):
        Write("acme", "ada", 0)


def test_an_export_is_all_that_the_tables_have(store: ProfileStore) -> None:
    for n in range(2):
        store.write([Write("acme", "ada", n, (said(n, '{"text": "é"}'),), {"m": b"\x01"}, YES, key=f"k{n}", answer="yes")])
    store.write([Write("acme", "bob", 0, (said(1),), {"m": b"bob"}, YES), Write("acme", "ada", 2, consent=NO)])
    export = store.export("acme", "ada")
    assert export is not None
    assert json.loads(json.dumps(export)) == export
    assert (export["user_id"], export["consented"]) == ("ada", False)
    with store._database.engine.connect() as connection:
        tables = {name: connection.exec_driver_sql(f"SELECT * FROM {name}").mappings().all() for name in _names(store)}
    (owner,) = (row["id"] for row in tables["palate_users"] if row["user_id"] == "ada")
    owned = {name: [row for row in rows if row.get("owner") == owner] for name, rows in tables.items()}
    assert {name: len(rows) for name, rows in owned.items() if rows} == {
        "palate_events": 2,
        "palate_states": 1,
        "palate_consents": 3,
        "palate_answers": 2,
    }
    for name, rows in owned.items():
        for row, line in zip(rows, export.get(name.removeprefix("palate_"), []), strict=True):
            for column, value in row.items():
                assert column == "owner" or line[column] == (value.hex() if isinstance(value, bytes) else value)


def _names(store: ProfileStore) -> list[str]:
    return inspect(store._database.engine).get_table_names()


def test_users_are_learned_again_page_by_page_under_a_new_model(store: ProfileStore) -> None:
    names = [f"u{n:02}" for n in range(25)]
    store.write([Write("acme", name, 0, (said(1),), {"old": b"1"}, YES) for name in names])
    store.write([Write("acme", "quiet", 0, consent=YES)])  # nothing to learn from
    for fingerprint in ("old", "new"):
        store.models.add(fingerprint, fingerprint.title())
    assert store.stale("old") == []
    learned = []
    for _ in range(2):  # stopped after a page, and begun again
        page = store.stale("new", limit=10)
        learned += page
        store.write([Write(*who, 1, states={"new": b"2"}) for who in page])
    while page := store.stale("new", after=learned[-1], limit=10):
        learned += page
        store.write([Write(*who, 1, states={"new": b"2"}) for who in page])
    assert learned == [("acme", name) for name in names]
    store.write([Write("acme", "u03", 2, (said(2),), {"new": b"3"})])
    assert (store.stale("new"), store.stale("old")) == ([], [("acme", "u03")])  # side by side: each says how far it goes
    assert store.models.retire("old") == 25
    assert [(model.fingerprint, model.retired is None) for model in store.models.list()] == [("old", False), ("new", True)]
    user = store.read("acme", "u03")
    assert user is not None
    assert dict(user.states) == {"new": State(b"3", 2)}


def test_retention_forgets_from_the_beginning_and_never_revives_a_choice(store: ProfileStore) -> None:
    undo = Event("u", "undo", '{"undo": "e1"}', 5.0)  # its clock was wrong: it is older than what it takes back
    store.write([Write("acme", "ada", 0, (said(1, at=10.0), undo, said(2, at=20.0)), {"m": b"all"}, YES)])
    store.write([Write("acme", "bob", 0, (said(1, at=30.0),), {"m": b"bob"}, YES)])
    assert store.prune(7.0)[:3] == (0, 0, 0)
    assert store.prune(15.0)[:3] == (2, 1, 0)
    user = store.read("acme", "ada")
    assert user == (2, YES, {}, 3)  # another version: what is kept in memory is not this
    assert [entry.seq for entry in store.events("acme", "ada")] == [3]
    assert store.stale("m") == [("acme", "ada")]
    assert store.write([Write("acme", "ada", 2, (said(3),), {"m": b"again"})]) == [Written(3, 4, 4)]
    assert store.prune(time.time() + 1, idle=True).deleted == 2
    assert store.users("acme") == []


def test_what_is_retired_or_expires_waits_for_a_scrub(tmp_path: Path) -> None:
    with open_store(str(tmp_path / "profiles.db"), key_life=0.0) as store:
        mark, kept = b"marked-state-" * 40, "marked-answer-" * 40
        store.write([Write("acme", "ada", 0, (said(1),), {"m": mark}, YES, key="k", answer=kept)])
        store.models.add("m")
        assert store.models.retire("m") == 1
        assert store.unscrubbed() == 1
        assert store.prune(0.0, scrub=False) == (0, 0, 0, 1)
        assert store.unscrubbed() == 2
        assert store.prune(0.0, scrub=False) == (0, 0, 0, 0)
        assert store.unscrubbed() == 2
        store.scrub()
        assert store.unscrubbed() == 0
        assert everywhere(tmp_path, mark, kept.encode()) == set()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"states": {"m": "text"}}, "the state under model 'm' is a str; expected bytes"),
        ({"expected": 1.5}, "the expected version is 1.5"),
        ({"expected": True}, "the expected version is True"),
        ({"consent": NO}, "a withdrawal of consent comes with events, which it refuses; send the withdrawal alone"),
    ],
)
def test_a_write_that_cannot_land_is_not_made(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        Write(**{"tenant": "acme", "user_id": "ada", "expected": 1, "events": (said(1),), **wrong})


def test_no_question_reads_a_whole_table(on_file: ProfileStore) -> None:
    """SQLite's own plan of every statement: all of them look up, whatever the number of users. (A group once did not.)"""
    plans: dict[str, list[str]] = {}

    def explain(_: object, cursor: Any, statement: str, parameters: Any, __: object, many: bool) -> None:
        if statement.lstrip().startswith(("SELECT", "UPDATE", "DELETE")) and statement not in plans:
            asked = cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters[0] if many else parameters)
            plans[statement] = [row[3] for row in asked if row[3].startswith(("SCAN palate", "SCAN t"))]

    event.listen(on_file._database.engine, "before_cursor_execute", explain)
    names = [f"u{n}" for n in range(5)]
    on_file.write([Write("acme", name, 0, (said(1),), {"m": b"1"}, YES, key="k") for name in names])
    on_file.write([Write("acme", name, 1, (said(2),), {"m": b"2"}, key="l") for name in names])
    for ask in (on_file.read, on_file.version, on_file.events, on_file.export):
        ask("acme", "u1")
    on_file.answer("acme", "u1", "k")
    on_file.users("acme")
    on_file.stale("m")
    on_file.keys.find(b"1")
    on_file.prune(1002.0, scrub=False)
    on_file.models.add("m")
    on_file.models.retire("m")
    on_file.delete("acme", "u1", scrub=False)
    assert len(plans) >= 25
    assert {statement: plan for statement, plan in plans.items() if plan} == {}


def test_keys_of_the_service(store: ProfileStore) -> None:
    made = store.keys.add(b"\x01" * 32, "acme", ["rank", "feedback"], "phone", expires=5e9)
    other = store.keys.add(b"\x02" * 32, "other", [], "desk")
    assert made[:4] == (made.id, "acme", ("rank", "feedback"), "phone")
    assert store.keys.find(b"\x01" * 32) == made
    assert store.keys.find(b"\x03" * 32) is None
    assert store.keys.list("acme") == [made]
    assert store.keys.list() == [made, other]
    with pytest.raises(DataError, match="'again' is there already"):
        store.keys.add(b"\x01" * 32, "acme", [], "again")
    assert store.keys.revoke(made.id)
    assert not any(store.keys.revoke(number) for number in (99, 0, -1, 2**63, 10**30))
    revoked = store.keys.find(b"\x01" * 32)
    assert revoked is not None
    assert revoked.revoked is not None
    assert store.keys.revoke(made.id)
    assert store.keys.find(b"\x01" * 32) == revoked


def test_a_clock_that_jumps_back_changes_no_order_and_no_version(store: ProfileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write([Write("acme", "ada", 0, (said(1, at=5e9),), {}, YES, key="k", answer="first")])
    monkeypatch.setattr(time, "time", lambda: 1.0)
    assert store.write([Write("acme", "ada", 1, (said(2, at=1.0),), {"m": b"2"})]) == [Written(2, 2, 2)]
    assert store.write([Write("acme", "ada", 0, (said(1, at=5e9),), {}, YES, key="k")]) == [Replayed("first", 1, 1, 1)]
    assert [entry.event_id for entry in store.events("acme", "ada")] == ["e1", "e2"]
    assert store.stale("m") == []


def test_every_connection_keeps_what_it_acknowledges(store: ProfileStore) -> None:
    """What no kill -9 can test: that a commit waits for the disk."""
    asked = {"PRAGMA journal_mode": "wal", "PRAGMA synchronous": 2, "PRAGMA secure_delete": 1, "PRAGMA foreign_keys": 1}
    for _ in range(2):
        with store._database.reading("asking") as connection, store._database.reading("asking") as other:
            for own in (connection, other):
                if store._database.is_file:
                    assert {ask: own.exec_driver_sql(ask).scalar() for ask in asked} == asked
                else:
                    assert own.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
        store.close()


# -- many writers


def count_up(url: str, process: int, n_users: int, n_updates: int) -> None:
    with open_store(url, patience=30.0) as store:
        for turn in range(n_updates):
            user_id = f"u{(turn * 7 + process) % n_users}"
            while True:
                user = store.read("acme", user_id)
                version, count = (user.version, int(user.states["m"].blob)) if user else (0, 0)
                event = Event(f"{process}-{turn}", "choice", "{}", 0.0)
                write = Write("acme", user_id, version, (event,), {"m": b"%d" % (count + 1)}, None if user else YES)
                if isinstance(store.write([write])[0], Written):
                    break


@pytest.mark.slow
def test_no_update_of_any_process_is_lost(url: str) -> None:
    n_processes, n_users, n_updates = 4, 20, 40
    context = get_context("fork")
    running = [context.Process(target=count_up, args=(url, n, n_users, n_updates)) for n in range(n_processes)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running] == [0] * n_processes
    with open_store(url) as store:
        ids, total = [], 0
        for row in store.users("acme"):
            user = store.read("acme", row.user_id)
            assert user is not None
            assert int(user.states["m"].blob) == user.last == user.version == row.last  # nobody counted on an old number
            ids += [entry.event_id for entry in store.events("acme", row.user_id)]
            total += user.last
    assert sorted(ids) == sorted(f"{process}-{turn}" for process in range(n_processes) for turn in range(n_updates))
    assert total == n_processes * n_updates


def test_threads_share_a_flush_and_each_gets_its_own_outcome(store: ProfileStore) -> None:
    with Committer(store, group=64) as committer:
        futures = [committer.submit(Write("acme", f"u{n % 150}", 0, (said(n),), {}, YES)) for n in range(300)]
        outcomes = [future.result(30) for future in futures]
    assert outcomes[:150] == [Written(1, 1, 1)] * 150
    assert outcomes[150:] == [Conflict(1)] * 150
    assert committer.written == 300
    assert committer.groups <= 60
    with pytest.raises(StoreError, match="closed"):
        committer.submit(Write("acme", "late", 0, consent=YES))


def test_a_full_queue_refuses_and_loses_nothing(on_file: ProfileStore) -> None:
    blocker = sqlite3.connect(on_file._database.path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with Committer(on_file, waiting=3, group=1) as committer:
        kept, refused = [], 0
        for n in range(8):
            try:
                kept.append(committer.submit(Write("acme", f"u{n}", 0, consent=YES)))
            except QueueFullError:
                refused += 1
        assert len(kept) in (3, 4)  # one may be under way
        assert refused == 8 - len(kept)
        with pytest.raises(StoreBusyError, match="locked"):
            kept[0].result(5)
        blocker.execute("ROLLBACK")
        landed = [future for future in kept[1:] if future.exception(5) is None]
    blocker.close()
    assert len(on_file.users("acme")) == len(landed) >= 1


# -- failures


def test_a_full_disk_refuses_what_does_not_fit_and_keeps_the_rest(tmp_path: Path) -> None:
    with open_store(str(tmp_path / "profiles.db")) as store:
        store.write([Write("acme", "ada", 0, (said(1),), {"m": b"1"}, YES)])
        pages = tmp_path.joinpath("profiles.db").stat().st_size // 4096 + 30
        event.listen(store._database.engine, "connect", lambda raw, _: raw.execute(f"PRAGMA max_page_count={pages}"))
        store.close()  # every connection from here on has so much room and no more
        with Committer(store) as committer:
            big = Write("acme", "ada", 1, (said(2, "secret words " * 40_000),), {"m": b"2"})
            blocked = sqlite3.connect(store._database.path, isolation_level=None)
            blocked.execute("BEGIN IMMEDIATE")  # so that the next three wait, and form one group
            futures = [committer.submit(Write("acme", "eve", 0, consent=YES))]
            time.sleep(0.05)
            futures += [committer.submit(write) for write in (Write("acme", "bob", 0, (said(1),), {}, YES), big)]
            futures.append(committer.submit(Write("acme", "cid", 0, consent=YES)))
            blocked.execute("ROLLBACK")
            blocked.close()
            with pytest.raises(StoreFullError, match="disk is full") as caught:
                futures[2].result(30)
            assert "secret" not in str(caught.value)
            assert [futures[n].result(30) for n in (0, 1, 3)] == [Written(1, 1, 0), Written(1, 1, 1), Written(1, 1, 0)]
        assert store.read("acme", "ada") == (1, YES, {"m": State(b"1", 1)}, 1)
        store.check(deep=True)


def test_a_file_that_can_only_be_read_is_read(tmp_path: Path) -> None:
    path = tmp_path / "profiles.db"
    with open_store(str(path)) as store:
        store.write([Write("acme", "ada", 0, (said(1),), {}, YES)])
    with open_store(f"sqlite:///file:{path}?mode=ro&uri=true") as store:
        assert store.version("acme", "ada") == 1
        with pytest.raises(StoreReadOnlyError, match="cannot be written"):
            store.write([Write("acme", "ada", 1, (said(2),))])
        with pytest.raises(StoreReadOnlyError):
            store.check()
        assert len(store.events("acme", "ada")) == 1


def test_a_damaged_file_is_said_to_be_damaged(tmp_path: Path) -> None:
    for name, content in (("text.db", b"these are no profiles" * 400), ("half.db", b"SQLite format 3\x00" + b"\x07" * 8000)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StoreCorruptError, match=name):
            open_store(str(tmp_path / name))
        assert (tmp_path / name).read_bytes() == content
    path = tmp_path / "profiles.db"
    with open_store(str(path)) as store:
        store.write([Write("acme", f"u{n}", 0, (said(1, "x" * 3000),), {}, YES) for n in range(50)])
        store.check(deep=True)
    content = bytearray(path.read_bytes())
    content[40_000:120_000] = os.urandom(80_000)
    path.write_bytes(content)
    with pytest.raises(StoreCorruptError, match="damaged"):
        _read_all(path)


def _read_all(path: Path) -> None:
    with open_store(str(path)) as store:
        for n in range(50):
            store.events("acme", f"u{n}")
        store.check(deep=True)


def test_a_locked_file_is_waited_for_and_then_refused(on_file: ProfileStore) -> None:
    blocker = sqlite3.connect(on_file._database.path, isolation_level=None, check_same_thread=False)
    write = Write("acme", "ada", 0, (said(1),), {}, YES)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreBusyError, match="try again in a moment"):
        on_file.write([write])
    with pytest.raises(StoreBusyError):
        on_file.check()
    assert on_file.read("acme", "ada") is None  # readers do not wait
    threading.Timer(0.1, blocker.execute, ["ROLLBACK"]).start()
    assert on_file.write([write]) == [Written(1, 1, 1)]
    blocker.close()


def test_a_driver_that_is_missing_is_said_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'palate\[postgres\]'"):
        open_store("postgresql://localhost/palate")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///file::memory:?uri=true", "in memory"),
        ("sqlite:///file:name?vfs=memdb&uri=true", "in memory"),
        ("mysql://localhost/x", "no store in mysql"),
        ("://", "no URL"),
        ("no/such/folder/profiles.db", "no folder"),
    ],
)
def test_what_is_no_store(given: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=match):
        open_store(given)
    assert list(tmp_path.iterdir()) == []


# -- migrations

VERSION_1 = """
CREATE TABLE palate_store (version BIGINT NOT NULL);
INSERT INTO palate_store VALUES (1);
CREATE TABLE palate_users (id INTEGER PRIMARY KEY AUTOINCREMENT, tenant TEXT NOT NULL, user_id TEXT NOT NULL,
    version BIGINT NOT NULL, last BIGINT NOT NULL, at REAL NOT NULL, UNIQUE (tenant, user_id));
CREATE TABLE palate_events (owner BIGINT NOT NULL REFERENCES palate_users (id) ON DELETE CASCADE, seq BIGINT NOT NULL,
    event_id TEXT NOT NULL, kind TEXT NOT NULL, payload TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (owner, seq), UNIQUE (owner, event_id));
CREATE INDEX palate_events_at ON palate_events (at);
CREATE TABLE palate_states (owner BIGINT NOT NULL REFERENCES palate_users (id) ON DELETE CASCADE, model TEXT NOT NULL,
    blob BLOB NOT NULL, through BIGINT NOT NULL, PRIMARY KEY (owner, model));
INSERT INTO palate_users VALUES (1, 'acme', 'ada', 3, 2, 1000.0);
INSERT INTO palate_events VALUES (1, 1, 'e1', 'choice', '{}', 1000.0), (1, 2, 'e2', 'choice', '{}', 999.0);
INSERT INTO palate_states VALUES (1, 'm', x'00ff', 2);
"""


def test_a_store_of_version_1_is_brought_up_with_everything_in_it(tmp_path: Path) -> None:
    path = tmp_path / "profiles.db"
    with sqlite3.connect(path) as old:
        old.executescript(VERSION_1)
    old.close()
    with open_store(str(path)) as store:
        assert store.read("acme", "ada") == (3, None, {"m": State(b"\x00\xff", 2)}, 2)
        assert [entry.event_id for entry in store.events("acme", "ada")] == ["e1", "e2"]
        (refused,) = store.write([Write("acme", "ada", 3, (said(3),))])  # nobody of version 1 was asked
        assert isinstance(refused, Refused)
        assert refused.code == "consent"
        assert store.write([Write("acme", "ada", 3, (said(3),), {}, YES)]) == [Written(4, 3, 3)]
        assert _columns(store) == _declared()


def test_a_new_store_has_the_tables_that_the_queries_expect(store: ProfileStore) -> None:
    assert _columns(store) == _declared()


def _columns(store: ProfileStore) -> dict[str, dict[str, bool]]:
    found = inspect(store._database.engine)
    return {
        name: {column["name"]: bool(column["nullable"]) for column in found.get_columns(name) if column["name"] != "id"}
        for name in found.get_table_names()
    }


def _declared() -> dict[str, dict[str, bool]]:
    return {
        table.name: {column.name: bool(column.nullable) for column in table.columns if column.name != "id"}
        for table in metadata.tables.values()
    }


def test_a_newer_store_and_a_foreign_file_are_left_alone(tmp_path: Path) -> None:
    newer, foreign = tmp_path / "newer.db", tmp_path / "foreign.db"
    with open_store(str(newer)) as store:
        store.write([Write("acme", "ada", 0, consent=YES)])
    for path, script in ((newer, f"UPDATE palate_store SET version = {len(STEPS) + 1}"), (foreign, "CREATE TABLE songs (name)")):
        with sqlite3.connect(path) as raw:
            raw.execute(script)
        raw.close()
    with pytest.raises(StoreError, match=f"of version {len(STEPS) + 1} and this Palate knows version {len(STEPS)}"):
        open_store(str(newer))
    with pytest.raises(StoreCorruptError, match="songs"):
        open_store(str(foreign))


def test_a_step_that_fails_half_way_leaves_the_version_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profiles.db"
    with sqlite3.connect(path) as old:
        old.executescript(VERSION_1)
    old.close()
    broken = (*STEPS[:2], (*STEPS[2][:2], "NO SQL AT ALL"))
    with monkeypatch.context() as patch:
        patch.setattr("palate.store.migrations.STEPS", broken)
        with pytest.raises(StoreError, match="opening"):
            open_store(str(path))
    with sqlite3.connect(path) as raw:
        assert raw.execute("SELECT version FROM palate_store").fetchone() == (1,)
        assert raw.execute("SELECT count(*) FROM sqlite_master WHERE name = 'palate_consents'").fetchone() == (0,)
    raw.close()
    with open_store(str(path)) as store:
        assert store.version("acme", "ada") == 3


# -- deletion


def everywhere(folder: Path, *words: bytes) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() for word in words if word in path.read_bytes()}


def test_of_a_deleted_user_nothing_is_in_any_file(on_file: ProfileStore, tmp_path: Path) -> None:
    """Among others who write at the same time, with payloads of several pages, and with a reader who is in the way."""
    marks = (
        b"marked-user",
        b"marked-event",
        b"marked payload",
        b"marked-state",
        b"marked-purpose",
        b"marked-key",
        b"marked-answer",
    )

    def grown(turn: int) -> list[Write]:
        own = [Write("acme", f"u{turn}-{n}", 0, (said(1, f"other {n} " * 90),), {"m": b"s" * 700}, YES) for n in range(60)]
        event = Event(f"marked-event-{turn}", "choice", "marked payload " * (400 if turn % 3 else 9), 1.0)
        consent = YES._replace(purpose="marked-purpose")
        states = {"m": b"marked-state" * 90}
        own.append(
            Write("acme", "marked-user", turn, (event,), states, consent, key=f"marked-key-{turn}", answer="marked-answer")
        )
        return own

    for turn in range(12):
        assert all(isinstance(outcome, Written) for outcome in on_file.write(grown(turn)))
    assert everywhere(tmp_path, *marks) != set()
    reader = sqlite3.connect(on_file._database.path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM palate_events").fetchone()
    assert on_file.delete("acme", "marked-user") == (True, 12, False)  # gone, and still in bytes that the reader holds
    assert on_file.read("acme", "marked-user") is None
    assert everywhere(tmp_path, *marks) != set()
    with pytest.raises(StoreBusyError, match=r"a reader of .* end it and call scrub"):
        on_file.scrub()
    assert on_file.unscrubbed() == 1
    reader.close()
    on_file.scrub()
    assert on_file.unscrubbed() == 0
    assert everywhere(tmp_path, *marks) == set()
    assert everywhere(tmp_path, b"u3-7", b"other 7 ") == {"profiles.db"}  # the search can find what is there
    assert len(on_file.users("acme", limit=10**6)) == 12 * 60
    on_file.check(deep=True)


def test_the_rules_need_no_database() -> None:
    """`decide` alone, for its corner: what the floor of versions is for."""
    known = Known({}, {}, set(), floor=41)
    out = decide([Write("acme", "ada", 0, consent=YES), Write("acme", "ada", 42, (said(1),))], known, 0.0, 1.0)
    assert out.outcomes == [Written(42, 1, 0), Written(43, 1, 1)]


def test_two_who_scrub_at_once_leave_nothing_undone(on_file: ProfileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ada", "bob"):
        on_file.write([Write("acme", name, 0, (said(1),), {"m": b"1"}, YES)])
    on_file.delete("acme", "ada", scrub=False)
    truncate = forgetting._truncate_log

    def meanwhile(*given: Any) -> None:  # another process does all of it while this one is in the middle
        monkeypatch.setattr(forgetting, "_truncate_log", truncate)
        with open_store(str(on_file._database.path)) as other:
            other.scrub()
        truncate(*given)

    monkeypatch.setattr(forgetting, "_truncate_log", meanwhile)
    on_file.scrub()
    assert on_file.unscrubbed() == 0
    on_file.delete("acme", "bob", scrub=False)
    assert on_file.unscrubbed() == 1  # and not 0, with which the next scrub would do nothing


@pytest.mark.parametrize("before", [float("nan"), float("inf"), 1.7e12])
def test_a_limit_of_retention_that_is_none(on_file: ProfileStore, before: float) -> None:
    on_file.write([Write("acme", "ada", 0, (said(1),), {}, YES)])
    with pytest.raises(DataError, match="not milliseconds"):
        on_file.prune(before, idle=True)
    assert len(on_file.events("acme", "ada")) == 1
