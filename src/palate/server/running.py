"""The process: where it listens, what it refuses, and how it ends."""

import gc
import ipaddress
import signal
import ssl
import sys
from contextlib import suppress
from pathlib import Path

from fastapi import FastAPI

from palate.errors import DataError
from palate.server.observing import uvicorn_logging

DRAIN = 20  # seconds that requests under way are given after SIGTERM; writes that were begun end in any case
KEEP = 60  # seconds for which a connection that is not used stays open: longer than clients and proxies keep theirs
BACKLOG = 1024
# Seconds after which a thread that learns or writes lets the one that answers go on. Python's own are .005, and the loop, which
# gives the interpreter away at every system call, would wait as long to have it back.
SWITCH = 0.0001
COLLECT = (50_000, 20, 1000)  # of the garbage collector: walking through all of 100,000 users' objects stops everything


def is_loopback(host: str) -> bool:
    """Whether nobody outside this machine can reach what listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: wherever it leads


def check_address(host: str, *, keys: bool) -> None:
    """Refuse to listen where anybody could ask, without keys. Raises `DataError`."""
    if not keys and not is_loopback(host):
        raise DataError(
            f"--host is {host}, which others can reach, and the store has no API key; make one with "
            "`palate keys add --tenant NAME --scope rank,feedback,users`, or listen on 127.0.0.1"
        )


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """Refuse half of what TLS needs, and files that are not it. Raises `DataError`."""
    if (certificate is None) != (key is None):
        raise DataError("--tls-cert and --tls-key belong together; give both, or neither behind a proxy that speaks TLS")
    for name, path in (("--tls-cert", certificate), ("--tls-key", key)):
        if path is not None and not path.is_file():
            raise DataError(f"{name} is {path}, which is no file; expected one in PEM format")
    if certificate is not None and key is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise DataError(
                f"{certificate} and {key} are no certificate and its key ({error}); expected PEM, the key of this certificate "
                "and without a password"
            ) from error


def run(
    app: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    certificate: Path | None = None,
    key: Path | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT: no new connections, requests under way are answered, writes end, then it returns."""
    import uvicorn

    from palate.server.heads import Heads

    sys.setswitchinterval(SWITCH)
    gc.collect()
    gc.freeze()  # the model and the modules stay: no collection need walk them
    gc.set_threshold(*COLLECT)
    settings = uvicorn.Config(
        app,
        host=host,
        port=port,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        loop="uvloop" if sys.platform != "win32" else "asyncio",
        http=Heads,
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=uvicorn_logging(),
        server_header=False,
        timeout_graceful_shutdown=DRAIN,
        timeout_keep_alive=KEEP,
        backlog=BACKLOG,
    )
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once everything has ended
        uvicorn.Server(settings).run()


def leave_on_term() -> None:
    """Have SIGTERM end the process in order, before there is a server to do so: what was made is taken away again."""

    def leave(*_: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, leave)
