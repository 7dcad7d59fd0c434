"""`python -m benchmarks.store [--users 100000] [--database sqlite|postgres] [PART ...]`: what the store costs.

Parts: flush (the disk alone), read, write (50 a second, and as many as it takes), together (8 processes on the same 100 users),
delete (how long, and what is left in the file where it is not written anew). A latency counts from the moment at which a request
was due, so that waiting behind another counts too.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.postgres import Postgres
from palate.store import Committer, Consent, Event, Outcome, Write, Written, open_store
from palate.store.database import ProfileStore

YES = Consent("personalise", "2026-01", 1000.0)
PAYLOAD = json.dumps({"kind": "choice", "prompt": "p" * 120, "chosen": "c" * 400, "rejected": "r" * 400})
BLOB = bytes(4000)  # a profile of 8 weights and 30 choices
PARTS = ("flush", "read", "write", "together", "delete")


def line(name: str, seconds: NDArray[np.float64]) -> str:
    """Milliseconds at the quantiles that matter."""
    p50, p99, top = np.quantile(seconds, [0.5, 0.99, 1.0]) * 1e3
    return f"{name:<58}{len(seconds):>8} p50 {p50:8.3f} ms  p99 {p99:8.3f} ms  max {top:8.1f} ms"


def flush(folder: Path, n: int = 1000) -> NDArray[np.float64]:
    """Seconds of appending 16 KiB, what one choice writes to SQLite's log, and fsync; 50 a second as the requests are."""
    taken, chunk = np.empty(n), os.urandom(2**14)
    with (folder / "flush").open("wb", buffering=0) as file:
        for i in range(n):
            if file.tell() > 2**22:  # as the log does after a checkpoint: over what is there
                file.seek(0)
            begun = time.perf_counter()
            file.write(chunk)
            os.fsync(file.fileno())
            taken[i] = time.perf_counter() - begun
            time.sleep(max(0.0, 0.02 - taken[i]))
    return taken


def populate(store: ProfileStore, n_users: int, n_events: int = 3) -> None:
    """Users with a few choices and a profile each."""
    begun = time.perf_counter()
    events = tuple(Event(f"e{n}", "choice", PAYLOAD, 1000.0) for n in range(n_events))
    for start in range(0, n_users, 500):
        names = range(start, min(start + 500, n_users))
        store.write([Write("acme", f"user-{n:07}", 0, events, {"m" * 64: BLOB}, YES) for n in names])
    print(f"{n_users} users written in {time.perf_counter() - begun:.0f} s", flush=True)


def read(store: ProfileStore, n_users: int, n: int = 5000) -> None:
    """One user after another, at random."""
    rng = np.random.default_rng(0)
    for name, call in (("read, a user with the profile", store.read), ("version alone", store.version)):
        taken = np.empty(n)
        for i, row in enumerate(rng.integers(0, n_users, n)):
            begun = time.perf_counter()
            call("acme", f"user-{row:07}")
            taken[i] = time.perf_counter() - begun
        print(line(name, taken), flush=True)


def write(store: ProfileStore, n_users: int, seconds: float = 30.0) -> None:
    """Choices of users at random: read, then write one event and a profile, through one committer; Poisson arrivals."""
    for rate in (50, 300):
        rng = np.random.default_rng(rate)
        due = np.cumsum(rng.exponential(1 / rate, int(rate * seconds)))
        rows = rng.choice(n_users, len(due), replace=False)
        users = [store.read("acme", f"user-{row:07}") for row in rows]
        ended = np.full(len(due), np.nan)
        with Committer(store, waiting=len(due)) as committer:
            start = time.perf_counter()
            futures = []
            for i, (row, user) in enumerate(zip(rows, users, strict=True)):
                assert user is not None
                event = Event(f"r{rate}-{user.version}", "choice", PAYLOAD, 1000.0)
                write = Write("acme", f"user-{row:07}", user.version, (event,), {"m" * 64: BLOB}, key=f"k{rate}", answer="{}")
                time.sleep(max(0.0, start + due[i] - time.perf_counter()))
                futures.append(committer.submit(write))
                futures[-1].add_done_callback(_stamp(ended, i, start))
            assert all(isinstance(future.result(60), Written) for future in futures)
            groups = committer.groups
        print(line(f"write, {rate} a second, {len(due) / groups:.1f} in a group", ended - due), flush=True)
    begun, n = time.perf_counter(), 200
    taken = np.empty(n)
    for i in range(n):
        begun = time.perf_counter()
        store.write([Write("acme", f"single-{i}", 0, (Event("e", "choice", PAYLOAD, 1.0),), {"m" * 64: BLOB}, YES)])
        taken[i] = time.perf_counter() - begun
    print(line("write, one after another without a committer", taken), flush=True)


def _stamp(ended: NDArray[np.float64], i: int, start: float) -> Callable[[Future[Outcome]], None]:
    def done(_: Future[Outcome]) -> None:
        ended[i] = time.perf_counter() - start

    return done


def _count_up(url: str, process: int, n_users: int, n_updates: int) -> None:
    rng = np.random.default_rng(process)
    with open_store(url, patience=60.0) as store:
        for turn in range(n_updates):
            user_id = f"shared-{rng.integers(n_users)}"
            while True:
                user = store.read("acme", user_id)
                version, count = (user.version, int(user.states["m"].blob)) if user else (0, 0)
                event = Event(f"{process}-{turn}", "choice", "{}", 0.0)
                write = Write("acme", user_id, version, (event,), {"m": b"%d" % (count + 1)}, None if user else YES)
                if isinstance(store.write([write])[0], Written):
                    break


def together(url: str, n_processes: int = 8, n_users: int = 100, n_updates: int = 250) -> None:
    """Every process adds one to the number in a user's state, at random; what is lost is missing from the sum."""
    begun, context = time.perf_counter(), get_context("fork")
    running = [context.Process(target=_count_up, args=(url, n, n_users, n_updates)) for n in range(n_processes)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    seconds, total, logged = time.perf_counter() - begun, 0, 0
    with open_store(url) as store:
        for n in range(n_users):
            user = store.read("acme", f"shared-{n}")
            total += int(user.states["m"].blob) if user else 0
            logged += len(store.events("acme", f"shared-{n}"))
    print(
        f"{n_processes} processes, {n_users} users: {n_processes * n_updates} updates acknowledged in {seconds:.1f} s,", end=" "
    )
    print(f"{total} in the states and {logged} in the logs; exit codes {[process.exitcode for process in running]}", flush=True)


def delete(store: ProfileStore, folder: Path, n_users: int, is_file: bool) -> None:
    """A deletion with all that follows it; and on SQLite how often bytes are left where the file is not written anew."""
    begun = time.perf_counter()
    store.delete("acme", "user-0000000", scrub=False)
    rows = time.perf_counter() - begun
    begun = time.perf_counter()
    store.scrub()
    print(f"delete one of {n_users} users: rows {rows * 1e3:.1f} ms, scrub {time.perf_counter() - begun:.1f} s", flush=True)
    if not is_file:
        return
    path, left, n = folder / "traces.db", 0, 200
    with open_store(str(path)) as small:
        rng = np.random.default_rng(0)
        for turn in range(20):
            writes = []
            for row in rng.permutation(400)[:200]:
                user = small.read("acme", f"trace-{row:04}-user")
                event = Event(f"trace-{row:04}-event-{turn}", "choice", f"trace-{row:04}-text " * int(rng.integers(1, 60)), 1.0)
                version = user.version if user else 0
                writes.append(Write("acme", f"trace-{row:04}-user", version, (event,), {"m": BLOB[: rng.integers(9, 3000)]}, YES))
            small.write(writes)
        for row in range(n):
            small.delete("acme", f"trace-{row:04}-user", scrub=False)
        with small._database.outside("folding the log") as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        content = path.read_bytes()
        left = sum(f"trace-{row:04}-".encode() in content for row in range(n))
        small.scrub()
        content = path.read_bytes()
        after = sum(f"trace-{row:04}-".encode() in content for row in range(n))
    print(f"of {n} deleted users, traces of {left} in the file with secure_delete alone, of {after} after scrub", flush=True)


def main() -> None:
    """Run the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--users", type=int, default=100_000, help="at least 10,000 for `write`")
    parser.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    arguments = parser.parse_args()
    parts = arguments.parts or PARTS
    postgres = Postgres() if arguments.database == "postgres" else None
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            url = postgres.url if postgres is not None else str(folder / "profiles.db")
            with open_store(url) as store:
                if {"read", "write", "delete"} & set(parts):
                    populate(store, arguments.users)
                if "flush" in parts:
                    print(line("flush: 16 KiB and fsync", flush(folder)), flush=True)
                if "read" in parts:
                    read(store, arguments.users)
                if "write" in parts:
                    write(store, arguments.users)
                    print(line("flush: again, for the noise of this machine", flush(folder)), flush=True)
                if "delete" in parts:
                    delete(store, folder, arguments.users, postgres is None)
            if "together" in parts:
                together(url)
    finally:
        if postgres is not None:
            postgres.close()


if __name__ == "__main__":
    main()
