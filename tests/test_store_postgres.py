"""The store in a PostgreSQL that dies, that may not be written, that is locked, and whose files are searched byte by byte."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from palate.errors import StoreBusyError, StoreDownError, StoreReadOnlyError
from palate.store import Committer, Conflict, Consent, Event, Replayed, State, Write, Written, open_store
from palate.store.database import ProfileStore

YES = Consent("personalise", "2026-01", 1000.0)


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        from benchmarks.postgres import Postgres, programs
    if programs() is None:
        pytest.skip("no PostgreSQL on this machine (on Debian: apt-get install postgresql)")
    with Postgres() as started:
        yield started


@pytest.fixture
def store(server: Any) -> Iterator[ProfileStore]:
    with open_store(server.empty(f"t{time.monotonic_ns()}"), patience=2.0) as opened:
        yield opened


def choice(n: int, payload: str = "{}") -> Event:
    return Event(f"e{n}", "choice", payload, 1000.0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_server_that_dies_is_said_to_be_dead_and_comes_back_with_everything(server: Any, store: ProfileStore, how: str) -> None:
    first = Write("acme", "ada", 0, (choice(1),), {"m": b"1"}, YES, key="k1", answer="one")
    second = Write("acme", "ada", 1, (choice(2),), {"m": b"2"}, key="k2")
    with Committer(store) as committer:
        assert committer.submit(first).result(30) == Written(1, 1, 1)
        getattr(server, how)()
        with pytest.raises(StoreDownError, match="does not answer"):
            committer.submit(second).result(30)
        for ask in (store.check, lambda: store.read("acme", "ada"), lambda: store.events("acme", "ada")):
            with pytest.raises(StoreDownError):
                ask()
        server.start()
        store.check()
        assert committer.submit(second).result(30) == Written(2, 2, 2)  # the same process, the same committer
        assert committer.submit(first).result(30) == Replayed("one", 1, 1, 1)
    assert store.read("acme", "ada") == (2, YES, {"m": State(b"2", 2)}, 2)


def test_a_server_that_takes_no_writes(server: Any, store: ProfileStore) -> None:
    store.write([Write("acme", "ada", 0, consent=YES)])
    with open_store(store._database.engine.url.render_as_string() + "%20-cdefault_transaction_read_only%3Don") as standby:
        assert standby.version("acme", "ada") == 1
        with pytest.raises(StoreReadOnlyError):
            standby.write([Write("acme", "bob", 0, consent=YES)])
        with pytest.raises(StoreReadOnlyError, match="primary"):
            standby.check()


def test_a_locked_row_is_waited_for_and_then_refused(store: ProfileStore) -> None:
    store.write([Write("acme", "ada", 0, (choice(1),), {}, YES)])
    with open_store(store._database.engine.url.render_as_string(), patience=1.0) as other:
        with store._database.writing("holding a lock") as connection:
            connection.exec_driver_sql("SELECT id FROM palate_users FOR UPDATE")
            with pytest.raises(StoreBusyError, match="try again in a moment"):
                other.write([Write("acme", "ada", 1, (choice(2),))])
            assert other.write([Write("acme", "bob", 0, (choice(1),), {}, YES)]) == [Written(1, 1, 1)]  # of nobody's business
        assert other.write([Write("acme", "ada", 1, (choice(2),))]) == [Written(2, 2, 2)]


def test_two_who_make_the_same_user_at_once_and_groups_that_cross(server: Any, store: ProfileStore) -> None:
    """One wins each user, whatever the order in a group, and no id gets into the server's log."""
    url, n_users, won = store._database.engine.url.render_as_string(), 12, {0: 0, 1: 0}
    start = threading.Barrier(2)

    def run(number: int) -> None:
        with open_store(url) as own:
            own.check()
            for turn in range(20):
                names = [f"secret-{turn}-{n}" for n in range(n_users)][:: 1 if number else -1]
                start.wait()
                outcomes = own.write([Write("acme", name, 0, (choice(1),), {}, YES) for name in names])
                assert all(outcome in (Written(1, 1, 1), Conflict(1)) for outcome in outcomes)
                won[number] += sum(isinstance(outcome, Written) for outcome in outcomes)

    threads = [threading.Thread(target=run, args=(number,)) for number in won]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(won.values()) == 20 * n_users == len(store.users("acme"))
    assert "secret" not in server.log.read_text()


@pytest.mark.slow
def test_of_a_deleted_user_nothing_is_in_any_file_but_the_servers_own_log(server: Any, store: ProfileStore) -> None:
    marks = (
        b"marked-user",
        b"marked-event",
        b"marked payload",
        b"marked-state",
        b"marked-purpose",
        b"marked-key",
        b"marked-answer",
    )

    def everywhere(*words: bytes) -> set[str]:
        with store._database.outside("flushing") as connection:
            connection.exec_driver_sql("ANALYZE")  # whose samples are copies too
            connection.exec_driver_sql("CHECKPOINT")
        files = [path for path in server.folder.rglob("*") if path.is_file() and "pg_wal" not in path.parts]
        return {path.name for path in files for word in words if word in path.read_bytes()}

    for turn in range(6):
        own = [Write("acme", f"u{turn}-{n}", 0, (choice(1, f"other {n} " * 90),), {"m": b"s" * 700}, YES) for n in range(40)]
        event = Event(f"marked-event-{turn}", "choice", "marked payload " * 9, 1.0)
        states, consent = {"m": b"marked-state" * 9}, YES._replace(purpose="marked-purpose")
        own.append(
            Write("acme", "marked-user", turn, (event,), states, consent, key=f"marked-key-{turn}", answer="marked-answer")
        )
        assert all(isinstance(outcome, Written) for outcome in store.write(own))
    assert everywhere(*marks) != set()
    url = store._database.engine.url.render_as_string()
    with open_store(url) as other, other._database.reading("holding a snapshot", whole=True) as connection:
        connection.exec_driver_sql("SELECT 1 FROM pg_class").first()
        assert store.delete("acme", "marked-user") == (True, 6, False)  # gone, but visible to somebody's old transaction
        assert everywhere(*marks) != set()
        with pytest.raises(StoreBusyError, match=r"older than that still sees .* scrub"):
            store.scrub()
    store.scrub()
    assert everywhere(*marks) == set()
    assert everywhere(b"u3-7") != set()  # the search can find what is there
    assert len(store.users("acme")) == 240
