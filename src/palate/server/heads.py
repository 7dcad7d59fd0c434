"""Connections that are begun and not gone on with: uvicorn waits for the rest of a head for as long as it takes to come.

Whoever sends a byte now and then would keep a connection, and with enough of them every one that there is. Bodies have a time of
their own (`guarding.Bodies`), and so have connections between two requests (uvicorn's keep-alive).
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD = 30.0  # seconds from a connection's beginning, or a request's first byte, to the end of its head


class Heads(HttpToolsProtocol):
    """uvicorn's protocol, which closes a connection whose request is not there in time: its head, or the rest of a body that was
    answered before it came whole.

    Cost: one timer for each request.
    """

    _due: asyncio.TimerHandle | None = None
    _whole = True  # the request at hand came to its end

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._whole = False
        self._wait()

    def on_headers_complete(self) -> None:
        self._wait_no_more()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._whole = True
        self._wait_no_more()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._whole:
            self._wait()

    def _wait(self) -> None:
        if self._due is None:
            self._due = self.loop.call_later(HEAD, self._late)

    def _wait_no_more(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _late(self) -> None:
        self._due = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self._wait()  # an answer to the request before is under way
