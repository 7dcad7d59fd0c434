"""`python -m benchmarks.fuzz_server [--examples 100] [--seed 0]`: schemathesis, all its checks, against a whole service.

The service is a real one, on 127.0.0.1: a small model fitted on generated choices, a SQLite store in an empty folder, keys, and
everything that guards and observes it. Schemathesis asks every operation of the OpenAPI document with its examples, with data
that fits the document, with data that does not, and in sequences of requests that share ids. Two of its checks are told what no
schema can state (`fuzz_checks`). Then hostile ids, bodies and heads that no schema describes are sent straight into a socket.
Exit code 1 where anything is found, or where the service has counted an answer of 500 or more.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import uvicorn

import palate
from palate.client import Client
from palate.data.synthetic import synthetic
from palate.living.explain import Explainer
from palate.living.floor import Floor
from palate.living.population import Population
from palate.living.reading import Level, Reading
from palate.scoring import Scorer
from palate.server.access import KeyRing
from palate.server.app import create_app
from palate.server.heads import Heads
from palate.server.keys import SCOPES, mint
from palate.server.lanes import Lane
from palate.server.observing import Log, Metrics, uvicorn_logging
from palate.server.runtime import Runtime
from palate.store import open_store

PLANTED = "Ich mag 4711 lieber."  # a text that neither log nor metrics may ever hold


CHECKS = Path(__file__).with_name("fuzz_checks.py")
OWN = "negative_data_rejection,positive_data_acceptance"  # the checks that fuzz_checks has its own of


class Service(NamedTuple):
    """A service that runs in this process."""

    url: str
    key: str
    metrics: Metrics
    log: Path

    def failures(self) -> dict[str, int]:
        """How many answers were 500 or more, by method, route and status."""
        out = {}
        for metric in self.metrics.requests.collect():
            for sample in metric.samples:
                if sample.name.endswith("_total") and sample.labels["status"].startswith("5"):
                    out[" ".join(sample.labels[name] for name in ("method", "route", "status"))] = int(sample.value)
        return out

    def answers(self) -> dict[str, int]:
        """How many answers there were, by status."""
        out: dict[str, int] = {}
        for metric in self.metrics.requests.collect():
            for sample in metric.samples:
                if sample.name.endswith("_total"):
                    status = sample.labels["status"]
                    out[status] = out.get(status, 0) + int(sample.value)
        return dict(sorted(out.items()))


def small_lane(seed: int = 0) -> Lane:
    """A small model fitted on generated choices, with what reads thumbs and explains people."""
    data, others = synthetic(40, 20, seed=seed), synthetic(30, 20, seed=seed + 1)
    encoder = palate.load_encoder("style")
    embedded = encoder.embed(data.pairs)
    model = palate.fit(embedded, palate.Hierarchical(8, bend=0, types=(1,)), seed=seed)
    return Lane(
        "small",
        Scorer(encoder, model),
        Population.of(model),
        reading=Reading(level=Level.of(model, embedded.embeddings)),
        explainer=Explainer(model, encoder, data.pairs),
        floor=Floor.fit(model, encoder.embed(others.pairs)),
    )


@contextmanager
def served(lane: Lane, folder: Path) -> Iterator[Service]:
    """The service of a lane, over a new store in `folder`, for as long as this lasts."""
    token, hashed = mint()
    metrics, log = Metrics(), folder / "log.jsonl"
    with open_store(str(folder / "profiles.db")) as store, log.open("w", encoding="utf-8") as lines:
        store.keys.add(hashed, "fuzz", SCOPES, "fuzz")
        app = create_app(Runtime([lane], store), keys=KeyRing(store.keys), metrics=metrics, log=Log(lines))
        config = uvicorn.Config(
            app,
            port=0,
            http=Heads,
            log_config=uvicorn_logging(),
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise SystemExit("the service did not start; its log is above")
                time.sleep(0.02)
            port = server.servers[0].sockets[0].getsockname()[1]
            url = f"http://127.0.0.1:{port}"
            with Client(url, token) as client:
                client.consent("ada", "personalise", "2026-01")
                client.feedback("ada", {"kind": "choice", "prompt": "Lunch?", "chosen": PLANTED, "rejected": "A sandwich."})
            yield Service(url, token, metrics, log)
        finally:
            server.should_exit = True
            thread.join()


def schemathesis(service: Service, examples: int, seed: int, *more: str) -> tuple[int, str]:
    """(exit code, what it said) of all checks of schemathesis over the document of a service.

    It says it into a file of the service's folder while it runs. `more` are options of its command line.
    """
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json", "--checks", "all", "--no-color"]
    command += ["--header", f"Authorization: Bearer {service.key}", "--max-examples", str(examples), "--seed", str(seed)]
    command += ["--exclude-checks", OWN, "--continue-on-failure", "--request-timeout", "60", "--generation-database", "none"]
    environment, said = os.environ | {"SCHEMATHESIS_HOOKS": str(CHECKS)}, service.log.with_name("schemathesis.txt")
    with said.open("w", encoding="utf-8") as out:  # run there, so that what it leaves for `st replay` goes away with the folder
        done = subprocess.run(
            [*command, *more], stdout=out, stderr=subprocess.STDOUT, check=False, cwd=said.parent, env=environment
        )
    return done.returncode, said.read_text(encoding="utf-8")


def hostile(key: str) -> dict[str, tuple[bytes, tuple[int, ...]]]:
    """Requests as bytes, by name, each with the statuses that are right; 0 is a connection that is closed without an answer."""
    head = f"Host: 127.0.0.1\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n".encode()

    def get(path: bytes, more: bytes = b"") -> bytes:
        return b"GET " + path + b" HTTP/1.1\r\n" + head + more + b"\r\n"

    def post(body: bytes, more: bytes = b"Content-Type: application/json\r\n", path: bytes = b"/v1/users/ada/rank") -> bytes:
        return b"POST %b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n%b" % (path, head, more, len(body), body)

    def user(name: bytes) -> bytes:
        return get(b"/v1/users/" + name + b"/export")

    good = b'{"prompt": "Lunch?", "candidates": ["Soup.", "Toast."]}'
    kind = b"Content-Type: application/json\r\n"
    chunked = head + kind + b"Transfer-Encoding: chunked\r\n\r\n"
    many = (b"10000\r\n" + b" " * 0x10000 + b"\r\n") * 80
    return {
        "a good request": (post(good), (200,)),
        "an id that is not there": (user("Ünbekannt 名".encode()), (400, 404)),
        "a percent-encoded id": (user(b"%C3%9C%20%E5%90%8D"), (404,)),
        "a slash": (user(b"a%2Fb"), (400,)),
        "dots": (user(b"%2E%2E"), (400,)),
        "dots as they are": (user(b".."), (400,)),
        "NUL": (user(b"a%00b"), (400,)),
        "a raw NUL": (user(b"a\x00b"), (0, 400)),
        "broken UTF-8": (user(b"%ff%fe"), (400,)),
        "a line break": (user(b"a%0d%0aX-Evil:%201"), (400,)),
        "10,000 characters": (user(b"a" * 10_000), (414,)),
        "300 characters": (user(b"a" * 300), (422,)),
        "half a percent": (user(b"%zz%"), (404,)),
        "override of direction": (user("a\u202eb".encode()), (400, 404)),
        "SQL": (user(b"'%20OR%201=1;--"), (404,)),
        "a query of NUL": (get(b"/v1/users?after=%00"), (400,)),
        "a query of broken UTF-8": (get(b"/v1/users?after=%ff"), (400,)),
        "a large limit": (get(b"/v1/users?limit=" + b"9" * 400), (422,)),
        "long headers": (get(b"/health", b"X-A: " + b"a" * 20_000 + b"\r\n"), (0, 400, 431)),
        "many headers": (get(b"/health", b"X-A: a\r\n" * 5000), (0, 400, 431)),
        "another method": (post(good).replace(b"POST", b"BREW", 1), (0, 400, 405)),
        "no JSON": (post(b"Soup."), (400,)),
        "half of it": (post(good[:-2]), (400,)),
        "NaN": (post(good[:-1] + b', "at_least": NaN}'), (400, 422)),
        "a huge number": (post(good[:-1] + b', "top_n": ' + b"9" * 5000 + b"}"), (400, 422)),
        "infinity": (post(good[:-1] + b', "at_least": 1e999}'), (400, 422)),
        "deep": (post(b"[" * 100_000), (400,)),
        "UTF-16": (post(good.decode().encode("utf-16")), (400,)),
        "half a surrogate": (post(b'{"prompt": "\\ud800", "candidates": ["a"]}'), (400,)),
        "a NUL in a text": (post(b'{"prompt": "\\u0000", "candidates": ["a"]}'), (200, 422)),
        "two of one field": (post(b'{"prompt": "a", "prompt": "b", "candidates": ["a"]}'), (422,)),
        "no type": (post(good, b""), (415,)),
        "a form": (post(b"prompt=a", b"Content-Type: application/x-www-form-urlencoded\r\n"), (415,)),
        "compressed": (post(b"\x1f\x8b\x08\x00" * 9, kind + b"Content-Encoding: gzip\r\n"), (415,)),
        "too large": (post(b" " * (5 << 20)), (413,)),
        "too large, in chunks": (b"POST /v1/users/ada/rank HTTP/1.1\r\n" + chunked + many + b"0\r\n\r\n", (413,)),
        "bad chunks": (b"POST /v1/users/ada/rank HTTP/1.1\r\n" + chunked + b"zz\r\n\r\n", (0, 400)),
        "two lengths": (post(good, kind + b"Content-Length: 3\r\n"), (0, 400)),
        "a length and chunks": (post(good, kind + b"Transfer-Encoding: chunked\r\n"), (0, 400)),
        "a negative length": (b"POST /score HTTP/1.1\r\n" + head + b"Content-Length: -5\r\n\r\n", (0, 400)),
        "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", (0, 400)),
        "another key": (get(b"/v1/users").replace(key.encode(), b"palate_" + b"A" * 43), (401,)),
        "a key of another form": (get(b"/v1/users").replace(key.encode(), b"\xff\xfe"), (401,)),
        "a key in the query": (get(b"/v1/users?key=" + key.encode()).replace(b"Authorization", b"X-Nothing"), (401,)),
    }


def answered(url: str, sent: bytes) -> tuple[int, bytes]:
    """(status, everything that came back) of bytes that are sent as they are; status 0 where nothing came."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
            connection.sendall(sent)
        parts = []
        with suppress(ConnectionResetError):
            while part := connection.recv(65536):
                parts.append(part)
    out = b"".join(parts)
    words = out.split(None, 2)
    return (int(words[1]) if len(words) > 1 and words[1].isdigit() else 0), out


def wrong_answers(service: Service) -> list[str]:
    """What the service made of every hostile request that is not right."""
    out = []
    for name, (sent, right) in hostile(service.key).items():
        status, said = answered(service.url, sent)
        if status not in right:
            out.append(f"{name}: {status}, expected {' or '.join(map(str, right))}: {said[-300:]!r}")
        if b"Traceback" in said or b"server: uvicorn" in said.lower():
            out.append(f"{name}: the answer tells what is inside: {said[-300:]!r}")
    return out


def main() -> None:
    """Run it and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100, help="of every operation and phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="empty folder for the store, the log and all that schemathesis says, to keep")
    parser.add_argument("more", nargs="*", help="options of schemathesis, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, served(small_lane(), arguments.folder or Path(name)) as service:
        start = time.perf_counter()
        code, said = schemathesis(service, arguments.examples, arguments.seed, *arguments.more)
        print(said[-2000:])
        wrong = wrong_answers(service)
        answers, failures = service.answers(), service.failures()
        leaked = PLANTED in service.log.read_text(encoding="utf-8") + service.metrics.render()[0].decode()
        print(f"{sum(answers.values())} requests in {time.perf_counter() - start:.0f} s; answers by status: {answers}")
        print(f"{len(hostile(''))} hostile requests; answered wrongly: {wrong or 'none'}")
        print(f"answers of 500 or more: {failures or 'none'}; the planted text in the log or the metrics: {leaked}")
    raise SystemExit(code != 0 or bool(failures) or bool(wrong) or leaked)


if __name__ == "__main__":
    main()
