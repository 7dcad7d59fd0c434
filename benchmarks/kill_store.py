"""`python -m benchmarks.kill_store [--trials 200] [--database sqlite|postgres] [--seed 0]`: kill -9 a writing process, and count.

Each trial starts a process with threads that learn from choices, take some back and write everything through one `Committer`. It
says over a pipe what it is about to write and what was acknowledged, and is killed with SIGKILL at a random moment. With
PostgreSQL every third trial kills the server's postmaster the same way instead, starts it again, and kills the process later.
Afterwards `faults` looks at the store: every acknowledged event is there exactly once under the number that was told, nothing
else than was sent is there, nothing is half-written, and every profile equals a fresh replay of the log and `palate.adapt`.

What this does not test is a machine that loses its power: a killed process leaves the operating system's memory alone.
"""

import argparse
import json
import multiprocessing
import os
import select
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork takes no threads along

import numpy as np
import torch
from numpy.typing import NDArray

import palate
from benchmarks.postgres import Postgres
from palate.adaptation import pair_design
from palate.data.pairs import EmbeddedPairs
from palate.errors import StoreError
from palate.living.population import Population
from palate.living.profile import LiveProfile
from palate.living.terms import Terms
from palate.models.base import RewardModel
from palate.models.hierarchical import Hierarchical
from palate.store import Committer, Conflict, Consent, Event, Logged, Outcome, Replayed, Write, Written, open_store

TENANT = "acme"
USERS = tuple(f"user-{n}" for n in range(8))
N_THREADS = 6
TOLERANCE = 1e-6

Floats = NDArray[np.float64]


class World(NamedTuple):
    """A small fitted model, and choices that can be made under it, as differences of rewards."""

    model: RewardModel
    population: Population
    data: EmbeddedPairs
    offset: Floats
    slopes: Floats

    def applied(self, live: LiveProfile, event_id: str, payload: str) -> LiveProfile:
        """`live` after one event of the log: a choice (the row of `data` that was chosen), or one taken back."""
        said = json.loads(payload)
        if "undo" in said:
            return live.undo(said["undo"])
        row = said["row"]
        return live.update(Terms.pairs(self.offset[[row]], self.slopes[[row]]), event_id=event_id)

    def rows(self, log: Iterable[Logged]) -> list[int]:
        """The rows of the choices that stand."""
        standing: dict[str, int] = {}
        for event in log:
            said = json.loads(event.payload)
            if "undo" in said:
                del standing[said["undo"]]
            else:
                standing[event.event_id] = said["row"]
        return list(standing.values())


def world(seed: int = 0) -> World:
    """A model of four base rewards, in double precision so that a replay is the same to 1e-6."""
    rng, n_users, n_pairs, width = np.random.default_rng(seed), 30, 600, 6
    texts, tastes = rng.standard_normal((400, width)), rng.standard_normal((n_users, width)) + 1.0
    pairs, owner = rng.permuted(np.tile(np.arange(400), (n_pairs, 1)), axis=1)[:, :2], rng.integers(0, n_users, n_pairs)
    liked = ((texts[pairs[:, 0]] - texts[pairs[:, 1]]) * tastes[owner]).sum(1) + rng.logistic(size=n_pairs) > 0
    chosen, rejected = np.where(liked, pairs.T, pairs.T[::-1])
    columns = (torch.from_numpy(part) for part in (texts, chosen, rejected))
    data = EmbeddedPairs(*columns, [f"taste-{n}" for n in owner])
    model = palate.fit(data, Hierarchical(4, bend=0, types=(), kappa=1.0), seed=seed)
    offset, slopes = (part.double().numpy() for part in pair_design(model, data))
    return World(model, Population.of(model), data, offset, slopes)


@dataclass
class Told:
    """What writing processes said before they were killed."""

    sent: dict[tuple[str, str], str] = field(default_factory=dict)  # (user, event id) -> payload
    acknowledged: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)  # -> (sequence number, version)
    refused: list[str] = field(default_factory=list)  # none is expected


class Victim:
    """What the process that will be killed does, until it is. Every line of its pipe is one write of less than PIPE_BUF bytes."""

    def __init__(self, place: World, url: str, pipe: int, seed: int, patience: float):
        self.place, self.pipe, self.seed = place, pipe, seed
        self.store = open_store(url, patience=patience)
        self.committer = Committer(self.store)

    def run(self) -> None:
        """Work in threads, for ever."""
        torch.set_num_threads(1)
        for number in range(N_THREADS):
            threading.Thread(target=self._work, args=(number,), daemon=True).start()
        threading.Event().wait()

    def _work(self, number: int) -> None:
        rng = np.random.default_rng([self.seed, number])
        for turn in range(10**9):
            try:
                self._one(rng, USERS[rng.integers(len(USERS))], f"{self.seed}-{number}-{turn}")
            except StoreError:
                time.sleep(0.02)  # the server is away; the next turn asks again

    def _say(self, *words: object) -> None:
        os.write(self.pipe, (json.dumps(words) + "\n").encode())

    def _one(self, rng: np.random.Generator, user_id: str, event_id: str) -> None:
        """One event of one user, tried until it is in, whoever else writes to the same user meanwhile."""
        fingerprint, undo, payload = self.place.population.fingerprint, rng.random() < 0.2, ""
        while True:
            user = self.store.read(TENANT, user_id)
            state = user.states.get(fingerprint) if user else None
            live = self.place.population.from_bytes(state.blob) if state else self.place.population.start(user_id)
            kept = live.event_ids
            if not payload:
                said = (
                    {"undo": kept[rng.integers(len(kept))]}
                    if undo and kept
                    else {"row": int(rng.integers(len(self.place.offset)))}
                )
                payload = json.dumps(said)
                self._say("sent", user_id, event_id, payload)
            if "undo" in said and said["undo"] not in kept:
                return  # another thread was faster, and there is nothing to take back
            event = Event(event_id, "undo" if "undo" in said else "choice", payload, time.time())
            states = {fingerprint: self.place.applied(live, event_id, payload).to_bytes()}
            version, consent = (user.version, None) if user else (0, Consent("personalise", "1", time.time()))
            outcome = self._landed(Write(TENANT, user_id, version, (event,), states, consent, key=event_id, answer=event_id))
            if isinstance(outcome, Written | Replayed):
                self._say("kept", user_id, event_id, outcome.first, outcome.version)
                return
            if not isinstance(outcome, Conflict):
                self._say("refused", user_id, event_id, str(outcome))
                return

    def _landed(self, write: Write) -> Outcome:
        """What became of it. A write that failed may have landed all the same, and the same again under its key says so."""
        while True:
            try:
                return self.committer.submit(write).result()
            except StoreError:
                time.sleep(0.02)


def _live(place: World, url: str, pipe: int, seed: int, patience: float) -> None:
    Victim(place, url, pipe, seed, patience).run()


def begun(place: World, url: str, seed: int, patience: float = 5.0) -> tuple[ForkProcess, int]:
    """A `Victim` in a process of its own, and the end of its pipe to read."""
    reading, writing = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=_live, args=(place, url, writing, seed, patience))
    process.start()
    os.close(writing)
    return process, reading


def heard(pipe: int, seconds: float, told: Told, rest: bytes = b"") -> bytes:
    """Listen for so long, or to the end of what a dead process said; what is left is half a line."""
    until = time.monotonic() + seconds
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, until - time.monotonic()))
        data = os.read(pipe, 2**16) if ready else b""
        if not data:
            return rest
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            kind, *words = json.loads(line)
            if kind == "sent":
                told.sent[words[0], words[1]] = words[2]
            elif kind == "kept":
                told.acknowledged[words[0], words[1]] = (words[2], words[3])
            else:
                told.refused.append(f"{words}")


def faults(place: World, url: str, told: Told, users: Iterable[str] = USERS, tenant: str = TENANT) -> list[str]:
    """What is wrong with a store after a crash; empty where everything acknowledged is there once and every profile is right."""
    found, logs = [*told.refused], {}
    with open_store(url) as store:
        store.check(deep=True)
        for user_id in users:
            user, log = store.read(tenant, user_id), store.events(tenant, user_id, limit=10**9)
            if user is None:
                found += [f"{user_id} is not there"] * any(who == user_id for who, _ in told.acknowledged)
                continue
            if [event.seq for event in log] != list(range(1, user.last + 1)) or user.version != user.last:
                found.append(f"{user_id}: {len(log)} events, last {user.last}, version {user.version}")
            if len({event.event_id for event in log}) < len(log):
                found.append(f"{user_id}: an event is there twice")
            by_id = {event.event_id: event for event in log}
            for (who, event_id), numbers in told.acknowledged.items():
                if who == user_id and (event_id not in by_id or (by_id[event_id].seq,) * 2 != numbers):
                    found.append(f"{user_id}: {event_id} was acknowledged as {numbers} and is {by_id.get(event_id)}")
            for event in log:
                if told.sent.get((user_id, event.event_id)) != event.payload:
                    found.append(f"{user_id}: {event.event_id} is not what was sent")
                if (answer := store.answer(tenant, user_id, event.event_id)) is None or answer.first != event.seq:
                    found.append(f"{user_id}: {event.event_id} has the answer {answer}")
            state = user.states.get(place.population.fingerprint)
            if state is None or state.through != user.last:
                found.append(f"{user_id}: the profile goes to {state and state.through} of {user.last}")
                continue
            fresh = place.population.start(user_id)
            for event in log:
                fresh = place.applied(fresh, event.event_id, event.payload)
            live = place.population.from_bytes(state.blob)
            if live.event_ids != fresh.event_ids or not np.allclose(live.mean, fresh.mean, atol=TOLERANCE):
                found.append(f"{user_id}: the profile is not that of a replay")
            logs[user_id] = (live, place.rows(log))
    return found + _unlike_adapt(place, logs)


def _unlike_adapt(place: World, logs: Mapping[str, tuple[LiveProfile, list[int]]]) -> list[str]:
    rows = torch.tensor([row for _, kept in logs.values() for row in kept], dtype=torch.int64)
    names = [user_id for user_id, (_, kept) in logs.items() for _ in kept]
    if not names:
        return []
    said = EmbeddedPairs(place.data.embeddings, place.data.chosen[rows], place.data.rejected[rows], names)
    fresh = palate.adapt(place.model, said)
    return [
        f"{user_id}: {live.mean} is not {fresh[user_id].mean.numpy()} of adapt"
        for user_id, (live, kept) in logs.items()
        if kept and not np.allclose(live.mean, fresh[user_id].mean.numpy(), atol=TOLERANCE)
    ]


def trial(place: World, url: str, seed: int, told: Told, server: Postgres | None = None) -> int:
    """Start, kill, and say how many acknowledgements came. With a `server`, that is killed and started again before."""
    rng = np.random.default_rng([seed, 7])
    process, pipe = begun(place, url, seed)
    patient = rng.random() < 0.9  # to wait for the first write; the others die while the store opens
    before, sent, rest, until = len(told.acknowledged), len(told.sent), b"", time.monotonic() + 30
    try:
        while patient and len(told.sent) == sent and time.monotonic() < until:
            rest = heard(pipe, 0.05, told, rest)
        rest = heard(pipe, float(rng.uniform(0.0, 0.8)), told, rest)
        if server is not None:
            server.kill()
            server.start()
            rest = heard(pipe, float(rng.uniform(0.2, 0.8)), told, rest)
    finally:
        process.kill()
        process.join()
    heard(pipe, 60.0, told, rest)  # what it had said before it died
    os.close(pipe)
    return len(told.acknowledged) - before


def main() -> None:
    """Run the trials and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", type=int, default=10, help="trials on one store before the next one begins")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    place, wrong, counts, servers = world(), 0, [], 0
    postgres = Postgres() if arguments.database == "postgres" else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            told, url = Told(), ""
            for number in range(arguments.trials):
                if number % arguments.fresh == 0:
                    told, url = Told(), str(Path(folder) / f"{number}.db")
                    if postgres is not None:
                        url = postgres.empty(f"trial{number}")
                crash = postgres if postgres is not None and number % 3 == 2 else None
                servers += crash is not None
                counts.append(trial(place, url, arguments.seed * 10_000 + number, told, crash))
                bad = faults(place, url, told)
                wrong += bool(bad)
                print(f"{number + 1}: {counts[-1]} acknowledged, {len(bad)} faults {bad[:3]}", file=sys.stderr, flush=True)
    finally:
        if postgres is not None:
            postgres.close()
    print(f"{arguments.database}: {len(counts)} times kill -9 under {N_THREADS} writers of {len(USERS)} users", end="")
    print(f", {servers} of them after a kill -9 of the server" if servers else "")
    print(
        f"acknowledged: {sum(counts)} events ({min(counts)} to {max(counts)} a trial); killed before one came: {counts.count(0)}"
    )
    print(f"trials after which something was lost, doubled, half-written or learned wrongly: {wrong}")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
