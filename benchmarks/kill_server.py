"""`python -m benchmarks.kill_server [--trials 50] [--database sqlite|postgres]`: kill -9 the service under load, and count.

Each trial starts a server process over the same store, lets writers give and take back choices over HTTP, and kills it
with SIGKILL at a random moment. What was on its way then is sent again under its idempotency key when the next server stands, as
a client would. Afterwards every acknowledged event is in the log exactly once, nothing is there that was not sent, and every
profile equals a replay of the log and `palate.adapt` on the choices that stand.

What this does not test is a machine that loses its power: a killed process leaves the operating system's memory alone.
"""

import argparse
import http.client
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork takes no threads along

import numpy as np
import torch

import palate
from benchmarks.kill_store import TOLERANCE, World, world
from benchmarks.postgres import Postgres
from palate.data.embeddings import Dense
from palate.data.pairs import EmbeddedPairs, Text
from palate.encoders import Encoder
from palate.living.terms import Terms
from palate.scoring import Scorer
from palate.server.app import create_app
from palate.server.lanes import Lane
from palate.server.running import run
from palate.server.runtime import Runtime
from palate.store import open_store

USERS = tuple(f"user-{n}" for n in range(8))
WRITERS = 6
TENANT = "default"
Json = dict[str, Any]


class Rows(Encoder):
    """Texts that are numbers, which name a row of a table in double precision."""

    spec = "rows"

    def __init__(self, table: torch.Tensor):
        self.table = table

    def encode(self, texts: Sequence[Text]) -> Dense:
        return Dense(self.table[[int(text.response) for text in texts]])

    def state(self) -> Json:
        return {"encoder": "rows"}


def serve(place: World, url: str, port: int) -> None:
    """What the process that will be killed does."""
    torch.set_num_threads(1)
    encoder = Rows(place.data.embeddings.rows(torch.arange(len(place.data.embeddings))))
    lane = Lane("rows", Scorer(encoder, place.model), place.population)
    run(create_app(Runtime([lane], open_store(url))), port=port)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def begun(place: World, url: str) -> tuple[ForkProcess, int]:
    """A server in a process of its own, and its port."""
    port = free_port()
    process = multiprocessing.get_context("fork").Process(target=serve, args=(place, url, port))
    process.start()
    return process, port


@dataclass
class Writer:
    """One client: what it sent, what was acknowledged, and what is on its way."""

    number: int
    rng: np.random.Generator
    sent: dict[tuple[str, str], Json] = field(default_factory=dict)
    acknowledged: set[tuple[str, str]] = field(default_factory=set)
    standing: list[tuple[str, str]] = field(default_factory=list)
    under_way: tuple[str, Json] | None = None
    refused: list[str] = field(default_factory=list)
    turn: int = 0

    def work(self, port: int, n_texts: int) -> None:
        """Give feedback until the server is gone."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            while True:
                if self.under_way is None:
                    self.under_way = self._next(n_texts)
                self._tell(connection, *self.under_way)
                self.under_way = None
        except (OSError, http.client.HTTPException):
            return
        finally:
            connection.close()

    def _next(self, n_texts: int) -> tuple[str, Json]:
        self.turn += 1
        event_id = f"{self.number}-{self.turn}"
        if self.standing and self.rng.random() < 0.2:
            user_id, of = self.standing.pop(self.rng.integers(len(self.standing)))
            event: Json = {"kind": "undo", "of": of, "event_id": event_id}
        else:
            user_id = USERS[self.rng.integers(len(USERS))]
            one, other = (str(row) for row in self.rng.choice(n_texts, 2, replace=False))
            event = {"kind": "choice", "prompt": "?", "chosen": one, "rejected": other, "event_id": event_id}
        self.sent[user_id, event_id] = event
        return user_id, event

    def _tell(self, connection: http.client.HTTPConnection, user_id: str, event: Json) -> None:
        headers = {"Content-Type": "application/json", "Idempotency-Key": event["event_id"]}
        while True:
            connection.request("POST", f"/v1/users/{user_id}/feedback", json.dumps(event), headers)
            answer = connection.getresponse()
            said = answer.read()
            if answer.status == 503:
                time.sleep(0.01)
                continue
            if answer.status == 200:
                self.acknowledged.add((user_id, event["event_id"]))
                if event["kind"] == "choice":
                    self.standing.append((user_id, event["event_id"]))
            else:
                self.refused.append(f"{answer.status} {said[:200]!r}")
            return


def faults(place: World, url: str, writers: Sequence[Writer]) -> list[str]:
    """What is wrong with the store after a kill; empty where all is as it was acknowledged."""
    found = [words for writer in writers for words in writer.refused]
    sent = {at: event for writer in writers for at, event in writer.sent.items()}
    acknowledged = {at for writer in writers for at in writer.acknowledged}
    standing: list[tuple[str, Json]] = []
    lives = {}
    with open_store(url) as store:
        store.check(deep=True)
        for user_id in USERS:
            user, log = store.read(TENANT, user_id), store.events(TENANT, user_id, limit=10**9)
            ids = [event.event_id for event in log]
            missing = [of for who, of in acknowledged if who == user_id and ids.count(of) != 1]
            found += [f"{user_id}: {len(missing)} acknowledged events are not there once: {missing[:3]}"] * bool(missing)
            for event in log:
                kept, told = json.loads(event.payload), sent.get((user_id, event.event_id), {"nothing": None})
                if any(kept.get(name, event) != value for name, value in told.items()):
                    found.append(f"{user_id}: {event.event_id} is not what was sent")
            if user is None or not log:
                continue
            state = user.states.get(place.population.fingerprint)
            if state is None or state.through != user.last or ids != [event.event_id for event in log][: user.last]:
                found.append(f"{user_id}: the profile goes to {state and state.through} of {user.last}")
                continue
            lives[user_id] = place.population.from_bytes(state.blob)
            fresh, own = place.population.start(user_id), {}
            for event in log:
                said = json.loads(event.payload)
                if said["kind"] == "undo":
                    fresh = fresh.undo(said["of"])
                    del own[said["of"]]
                    continue
                rows = place.population.rewards(
                    place.data.embeddings.take(torch.tensor([int(said["chosen"]), int(said["rejected"])]))
                )
                terms = Terms.pairs(rows.offset[:1] - rows.offset[1:], rows.slopes[:1] - rows.slopes[1:])
                fresh, own[event.event_id] = fresh.update(terms, event_id=event.event_id), said
            if not np.allclose(fresh.mean, lives[user_id].mean, atol=TOLERANCE):
                found.append(f"{user_id}: the profile is not that of a replay")
            standing += [(user_id, said) for said in own.values()]
    chosen, rejected = (
        torch.tensor([int(said[side]) for _, said in standing], dtype=torch.int64) for side in ("chosen", "rejected")
    )
    if len(standing):
        fresh = palate.adapt(place.model, EmbeddedPairs(place.data.embeddings, chosen, rejected, [who for who, _ in standing]))
        for user_id in {who for who, _ in standing}:
            if not np.allclose(lives[user_id].mean, fresh[user_id].mean.numpy(), atol=TOLERANCE):
                found.append(f"{user_id}: {lives[user_id].mean} is not {fresh[user_id].mean.numpy()} of adapt")
    return found


def ready(port: int, *, agree: bool) -> None:
    """Wait until the server answers, and put everybody's consent on record in a new store."""
    for _ in range(600):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/health")
            connection.getresponse().read()
            break
        except OSError:
            time.sleep(0.05)
    for user_id in USERS if agree else ():
        body = json.dumps({"purpose": "personalise", "text_version": "1", "granted": True, "at": 1e9})
        connection.request("PUT", f"/v1/users/{user_id}/consent", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()
    connection.close()


def trial(place: World, url: str, writers: Sequence[Writer], rng: np.random.Generator) -> int:
    """Start, kill, and say how many acknowledgements came."""
    before = sum(len(writer.acknowledged) for writer in writers)
    process, port = begun(place, url)
    try:
        ready(port, agree=not any(writer.turn for writer in writers))
        n_texts = len(place.data.embeddings)
        threads = [threading.Thread(target=writer.work, args=(port, n_texts), daemon=True) for writer in writers]
        for thread in threads:
            thread.start()
        time.sleep(float(rng.uniform(0.0, 1.0)))
    finally:
        process.kill()
        process.join()
    for thread in threads:
        thread.join()
    return sum(len(writer.acknowledged) for writer in writers) - before


def main() -> None:
    """Run the trials and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", type=int, default=10, help="trials on one store before the next one begins")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    place, rng = world(), np.random.default_rng(arguments.seed)
    wrong, counts, doubtful = 0, [], 0
    with ExitStack() as until:
        folder = until.enter_context(tempfile.TemporaryDirectory())
        postgres = until.enter_context(closing(Postgres())) if arguments.database == "postgres" else None
        for number in range(arguments.trials):
            if number % arguments.fresh == 0:
                url = str(Path(folder) / f"{number}.db") if postgres is None else postgres.empty(f"trial{number}")
                writers = [Writer(n, np.random.default_rng([arguments.seed, number, n])) for n in range(WRITERS)]
            counts.append(trial(place, url, writers, rng))
            doubtful += sum(writer.under_way is not None for writer in writers)
            bad = faults(place, url, writers)
            wrong += bool(bad)
            print(f"{number + 1}: {counts[-1]} acknowledged, {len(bad)} faults {bad[:3]}", file=sys.stderr, flush=True)
    print(f"{arguments.database}: {len(counts)} times kill -9 of the service under {WRITERS} clients of {len(USERS)} users")
    print(f"acknowledged: {sum(counts)} events ({min(counts)} to {max(counts)} a trial); sent again after a kill: {doubtful}")
    print(f"trials after which something was lost, doubled, half-written or learned wrongly: {wrong}")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
