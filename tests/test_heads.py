"""Connections on which too little comes too slowly, against uvicorn on a socket."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from palate.server import heads
from palate.server.heads import Heads

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
PATIENCE = 0.4


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once, without reading the body; "/slow" after twice the time that a head has."""
    if scope["type"] != "http":
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(2 * PATIENCE)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    config = uvicorn.Config(app, port=0, http=Heads, lifespan="off", log_level="error", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "HEAD", PATIENCE)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
        server.should_exit = True
        thread.join()


def talk(port: int, first: bytes, then: bytes = b"") -> tuple[bytes, float]:
    """What comes back until the connection is closed, and after how long; `then` is sent byte by byte."""
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(first)
        connection.settimeout(0.05)
        out, left = b"", then
        while time.monotonic() - start < 5:
            try:
                part = connection.recv(4096)
                if not part:
                    return out, time.monotonic() - start
                out += part
            except TimeoutError:
                pass
            except ConnectionError:
                return out, time.monotonic() - start
            try:
                connection.sendall(left[:1])
            except OSError:
                return out, time.monotonic() - start
            left = left[1:]
    return out, 5.0


GOOD = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "answers"),
    [
        (b"", 0),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow: ", 0),
        (GOOD + b"GET / HTTP/1.1\r\nX-Slow: ", 1),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\n", 1),
        (b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n" + b"GET / HTTP/1.1\r\nX-Slow: ", 1),
    ],
    ids=["nothing", "a head", "a second head", "a body after its answer", "a head behind a slow answer"],
)
def test_what_comes_byte_by_byte_is_closed(port: int, first: bytes, answers: int) -> None:
    said, after = talk(port, first, b"x" * 90 if first else b"")
    assert said.count(b"HTTP/1.1 200") == answers
    assert PATIENCE * 0.9 < after < 4 * PATIENCE + 0.5


def test_requests_that_come_whole_are_left_alone(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        for path in (b"/", b"/slow", b"/"):
            connection.sendall(GOOD.replace(b"/ ", path + b" ", 1))
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            time.sleep(1.5 * PATIENCE)
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):  # still open
            connection.recv(1)
