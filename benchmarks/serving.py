"""`python -m benchmarks.serving [--users 100000] [--seconds 20] [--soak MINUTES]`: how quick the service is.

One server process (uvicorn, uvloop, httptools) over a SQLite store of users with choices, and this process as the load: an open
loop of requests at a fixed rate over keep-alive connections, timed from the moment at which each was due, so that a server that
stalls is not spared. Beside the figures: the bare arithmetic of a ranking, and a flush of the same disk.

`--soak` asks at a moderate rate for so long instead, and reports the server's memory. `--profile FILE` has the server write a
cProfile of its loop.
"""

import argparse
import asyncio
import dataclasses
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import torch

import palate
from palate.data.synthetic import synthetic
from palate.encoders.saved import save_encoder
from palate.living.population import Population
from palate.living.terms import Terms
from palate.store import Consent, Event, Write, open_store

K, CANDIDATES, PROMPTS, SAID = 16, 16, 60, 10
TENANT, CONNECTIONS, GROUP = "default", 64, 500
SOAKED = 500  # users of a soak: few enough that every cache is full after minutes, and what grows then is a leak


def prepare(folder: Path, users: int) -> None:
    """A model with K weights, a store of `users` people with `SAID` choices each, and bodies of requests."""
    data = synthetic(120, 24, n_responses=CANDIDATES, noise=0.05, seed=100)
    encoder = palate.load_encoder("style")
    model = palate.fit(encoder.embed(data.pairs), palate.Hierarchical(n_bases=K, bend=0, types=(1,), kappa=1.0))
    assert model.n_weights == K
    model.save_pretrained(folder / "model")
    save_encoder(encoder, folder / "model")
    by_prompt: dict[str, list[str]] = {}
    for text in synthetic(120, 24, n_responses=CANDIDATES, seed=101).pairs.texts:
        by_prompt.setdefault(text.prompt_text, []).append(text.response)
    known = [(prompt, texts[:CANDIDATES]) for prompt, texts in by_prompt.items() if len(texts) >= CANDIDATES][:PROMPTS]
    (folder / "known.json").write_text(json.dumps(known))

    population, rng = Population.of(model), np.random.default_rng(0)
    lives = []
    for _ in range(200):
        life = population.start("nobody")
        for place in range(SAID):
            life = life.update(Terms.pairs(rng.normal(size=1), rng.normal(size=(1, K))), event_id=f"e{place}")
        lives.append(life)
    payload = json.dumps({"kind": "choice", "prompt": "Hi?", "chosen": "Yes.", "rejected": "No."})
    events = tuple(Event(f"e{place}", "choice", payload, 1e9) for place in range(SAID))
    with open_store(str(folder / "profiles.db")) as store:
        for start in range(0, users, GROUP):
            names = [f"user-{i}" for i in range(start, min(users, start + GROUP))]
            store.write(
                [
                    Write(
                        TENANT,
                        name,
                        0,
                        events,
                        {life.population.fingerprint: dataclasses.replace(life, user_id=name).to_bytes()},
                        Consent("personalise", "1", 1e9),
                    )
                    for name, life in zip(names, (lives[i % len(lives)] for i in range(start, start + GROUP)), strict=False)
                ]
            )


def serve(folder: Path, port: int, profile: Path | None) -> None:
    """The server process."""
    from palate.server.app import create_app
    from palate.server.loading import load_lane
    from palate.server.observing import Log
    from palate.server.running import leave_on_term, run
    from palate.server.runtime import Runtime

    torch.set_num_threads(1)
    leave_on_term()
    lane, store = load_lane(folder / "model"), open_store(str(folder / "profiles.db"))
    with (folder / "log.jsonl").open("w") as log:
        app = create_app(Runtime([lane], store), log=Log(log))
        if profile is None:
            run(app, port=port)
        else:
            import cProfile

            found = cProfile.Profile()
            try:
                found.runcall(run, app, port=port)
            finally:
                found.dump_stats(profile)


class Connection:
    """One keep-alive connection that speaks just enough HTTP/1.1 to cost nothing."""

    def __init__(self, port: int):
        self.port = port

    async def open(self) -> "Connection":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def ask(self, request: bytes) -> int:
        if self.reader.at_eof():  # the server ends connections that nobody used for a minute
            await self.open()
        self.writer.write(request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        await self.reader.readexactly(length)
        return int(head[9:12])


def request(path: str, body: bytes, method: str = "POST") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Load:
    """Requests of two kinds, for users drawn evenly."""

    def __init__(self, folder: Path, users: int, port: int):
        self.known = json.loads((folder / "known.json").read_text())
        self.bodies = [
            json.dumps({"prompt": prompt, "candidates": texts}, ensure_ascii=False).encode() for prompt, texts in self.known
        ]
        self.users, self.rng, self.port = users, np.random.default_rng(1), port
        self.free: asyncio.Queue[Connection] = asyncio.Queue()

    async def connect(self) -> None:
        for _ in range(CONNECTIONS):
            self.free.put_nowait(await Connection(self.port).open())

    def rank(self) -> bytes:
        return request(f"/v1/users/user-{self.rng.integers(self.users)}/rank", self.bodies[self.rng.integers(len(self.bodies))])

    def feedback(self) -> bytes:
        prompt, texts = self.known[self.rng.integers(len(self.known))]
        one, other = self.rng.choice(len(texts), 2, replace=False)
        event = {"kind": "choice", "prompt": prompt, "chosen": texts[one], "rejected": texts[other]}
        return request(f"/v1/users/user-{self.rng.integers(self.users)}/feedback", json.dumps(event, ensure_ascii=False).encode())

    async def at_rate(self, make: Callable[[], bytes], per_second: float, seconds: float) -> np.ndarray:
        """Seconds that each answer came after it was due; arrivals are a Poisson process."""
        took: list[float] = []
        tasks, start = [], time.perf_counter() + 0.05
        due = start + np.cumsum(self.rng.exponential(1 / per_second, size=int(per_second * seconds)))

        async def one(body: bytes, at: float) -> None:
            connection = await self.free.get()
            status = await connection.ask(body)
            took.append(time.perf_counter() - at)
            self.free.put_nowait(connection)
            if status != 200:
                raise SystemExit(f"an answer of status {status}")

        for at in due.tolist():
            body = make()
            wait = at - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(body, at)))
        await asyncio.gather(*tasks)
        return np.array(took)

    async def back_and_forth(self, per_second: float, seconds: float) -> None:
        """Choices that are taken back at once, by one client."""
        connection, end = await self.free.get(), time.perf_counter() + seconds
        while time.perf_counter() < end:
            prompt, texts = self.known[self.rng.integers(len(self.known))]
            path, event_id = f"/v1/users/user-{self.rng.integers(self.users)}/feedback", f"{self.rng.integers(2**60)}"
            choice = {"kind": "choice", "prompt": prompt, "chosen": texts[0], "rejected": texts[1], "event_id": event_id}
            for event in (choice, {"kind": "undo", "of": event_id}):
                if await connection.ask(request(path, json.dumps(event).encode())) != 200:
                    raise SystemExit("feedback was not taken")
            await asyncio.sleep(1 / per_second)
        self.free.put_nowait(connection)

    async def as_fast_as_it_goes(self, make: Callable[[], bytes], seconds: float, clients: int = 16) -> float:
        """Answers a second to so many clients who each ask again at once."""
        end, done = time.perf_counter() + seconds, 0

        async def client() -> None:
            nonlocal done
            connection = await self.free.get()
            while time.perf_counter() < end:
                await connection.ask(make())
                done += 1
            self.free.put_nowait(connection)

        await asyncio.gather(*(client() for _ in range(clients)))
        return done / seconds


def flushes(folder: Path, n: int = 400) -> np.ndarray:
    """Seconds of a write of 8 KiB and fsync, in the store's folder, 50 a second."""
    took = []
    with (folder / "flush").open("wb") as file:
        for _ in range(n):
            start = time.perf_counter()
            file.write(os.urandom(8192))
            file.flush()
            os.fsync(file.fileno())
            took.append(time.perf_counter() - start)
            time.sleep(max(0.0, 0.005 - took[-1]))
    return np.array(took)


def bare(folder: Path) -> float:
    """Seconds of a ranking's arithmetic: rewards of the known candidates for given weights, in order."""
    rng = np.random.default_rng(0)
    offset, slopes, weights = rng.normal(size=CANDIDATES), rng.normal(size=(CANDIDATES, K)), rng.normal(size=K)
    start = time.perf_counter()
    for _ in range(20_000):
        np.argsort(-(offset + slopes @ weights), kind="stable")
    return (time.perf_counter() - start) / 20_000


def said(name: str, took: np.ndarray) -> None:
    p50, p95, p99, worst = 1e3 * np.quantile(took, [0.5, 0.95, 0.99, 1.0])
    print(f"{name}: n {len(took)}, p50 {p50:.2f} ms, p95 {p95:.2f}, p99 {p99:.2f}, worst {worst:.1f}", flush=True)


async def figures(load: Load, folder: Path, seconds: float, process: psutil.Process) -> None:
    gc.disable()  # of the load: a collection among ten thousand tasks stops it for .2 s, which would count as the server's
    await load.connect()
    for body in load.bodies:  # every candidate is known
        connection = await load.free.get()
        assert await connection.ask(request("/v1/users/user-0/rank", body)) == 200
        load.free.put_nowait(connection)
    await load.at_rate(load.rank, 200, 3)
    print(f"load of the machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"bare arithmetic of a ranking of {CANDIDATES}: {1e6 * bare(folder):.1f} us")
    said("write and fsync of 8 KiB", flushes(folder))
    for name, make, rate in (("rank at 500/s", load.rank, 500), ("feedback at 50/s", load.feedback, 50)):
        before = sum(process.cpu_times()[:2])
        took = await load.at_rate(make, rate, seconds)
        used = sum(process.cpu_times()[:2]) - before
        said(name, took)
        print(f"  server's processor: {100 * used / seconds:.0f} %, {1e3 * used / len(took):.2f} ms an answer")
    both = asyncio.gather(load.at_rate(load.rank, 450, seconds), load.at_rate(load.feedback, 50, seconds))
    for name, took in zip(("rank at 450/s with feedback", "feedback at 50/s with rank"), await both, strict=True):
        said(name, took)
    for clients in (1, 16, 64):
        rate = await load.as_fast_as_it_goes(load.rank, seconds / 2, clients)
        print(f"ranks a second, {clients} clients who wait: {rate:.0f}", flush=True)
    print(f"server's memory: {process.memory_info().rss / 2**20:.0f} MiB")


async def soak(load: Load, minutes: float, process: psutil.Process) -> None:
    """Rank at 100/s, and give and take back choices 5 times a second, so that no history grows; memory is read twenty times."""
    await load.connect()
    at = []
    for part in range(20):
        seconds = 60 * minutes / 20
        took, _ = await asyncio.gather(load.at_rate(load.rank, 100, seconds), load.back_and_forth(2.5, seconds))
        at.append(process.memory_info().rss / 2**20)
        print(
            f"{(part + 1) * minutes / 20:.1f} min: {at[-1]:.1f} MiB, rank p99 {1e3 * np.quantile(took, 0.99):.1f} ms", flush=True
        )
    late = np.polyfit(np.arange(10, 20) * minutes / 20, at[10:], 1)[0]
    print(f"memory in the second half: {late:+.2f} MiB a minute")


def main(given: list[str] | None = None) -> None:
    """Run the figures, or the soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--soak", type=float, metavar="MINUTES")
    parser.add_argument("--folder", type=Path, help="where the store is, or is made, and stays")
    parser.add_argument("--profile", type=Path, metavar="FILE")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.serve:
        serve(options.folder, options.serve, options.profile)
        return
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        folder.mkdir(exist_ok=True)
        if not (folder / "known.json").exists():
            start = time.perf_counter()
            prepare(folder, options.users)
            print(f"{options.users} users in the store after {time.perf_counter() - start:.0f} s", flush=True)
        print(f"{(folder / 'profiles.db').stat().st_size / 2**20:.0f} MiB of store")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "benchmarks.serving", "--serve", str(port), "--folder", str(folder)]
        command += [] if options.profile is None else ["--profile", str(options.profile)]
        server = subprocess.Popen(command)
        try:
            for _ in range(3000):
                with socket.socket() as tried:
                    if tried.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            users = options.users if options.soak is None else min(SOAKED, options.users)
            load, process = Load(folder, users, port), psutil.Process(server.pid)
            work = figures(load, folder, options.seconds, process) if options.soak is None else soak(load, options.soak, process)
            asyncio.run(work)
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    main()
