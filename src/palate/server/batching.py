"""Many requests, few encoder calls: texts that arrive within milliseconds of each other are encoded together, each once.

A request waits at most `max_wait` seconds for company, and while one batch is being encoded the next one fills, so a busy server
makes large batches and an idle one answers at once. The queue is bounded: what does not fit is refused at once, not kept waiting.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from palate.data.pairs import Text
from palate.errors import PalateError

Rows = NDArray[np.float64]
Compute = Callable[[list[Text]], Rows]


class OverloadedError(PalateError, RuntimeError):
    """More work is waiting than the server has room for; the same request may be sent again after `retry_after` seconds."""

    retry_after = 1


class Batcher:
    """Rows of texts, computed in a thread of its own; to be used from one event loop.

    Args:
        compute: n texts -> (n, W) float64, called with distinct texts.
        max_batch: texts in a call.
        max_wait: seconds that a text waits for others.
        max_queue: texts that may wait; more are an `OverloadedError`.

    Attributes:
        on_batch: told the number of texts after every call.
    """

    def __init__(
        self,
        compute: Compute,
        *,
        max_batch: int = 64,
        max_wait: float = 0.002,
        max_queue: int = 4096,
    ):
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self.on_batch: Callable[[int], object] = bool
        self._compute = compute
        self._queue: deque[Text] = deque()
        self._waiting: dict[Text, asyncio.Future[Rows]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="palate-encoder")
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Texts that wait or are being encoded."""
        return len(self._waiting)

    async def rows(self, texts: Sequence[Text]) -> Rows:
        """(n, W) rows of `texts`, in their order; a text that another request waits for already is not computed again.

        A request that is given up leaves its texts to be computed: others may wait for them.

        Raises:
            OverloadedError: the queue has no room.
            PalateError: what the encoder says of one of these texts; texts of other requests in the batch are not harmed.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._waiting]
        if new and len(self._waiting) + len(new) > self.max_queue:
            raise OverloadedError(
                f"{len(self._waiting)} texts wait for the encoder and {len(new)} more were sent; it takes {self.max_queue} at a "
                "time: send the request again in a second"
            )
        loop = asyncio.get_running_loop()
        for text in new:
            future: asyncio.Future[Rows] = loop.create_future()
            future.add_done_callback(_seen)
            self._waiting[text] = future
            self._queue.append(text)
        futures = [self._waiting[text] for text in texts]
        if new and (self._task is None or self._task.done()):
            self._task = loop.create_task(self._work())
        if futures:
            await asyncio.wait(set(futures))  # unlike gather, it leaves them alone where this request is cancelled
        return np.stack([future.result() for future in futures]) if futures else self._compute([])

    async def close(self) -> None:
        """Finish what waits and end the thread."""
        if self._task is not None and not self._task.done():
            await asyncio.wait({self._task})
        self._thread.shutdown(wait=False)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            if len(self._queue) < self.max_batch and self.max_wait:
                await asyncio.sleep(self.max_wait)
            batch = [self._queue.popleft() for _ in range(min(self.max_batch, len(self._queue)))]
            done = await loop.run_in_executor(self._thread, self._each, batch)
            self.on_batch(len(batch))
            for text, row in zip(batch, done, strict=True):
                future = self._waiting.pop(text)
                if isinstance(row, BaseException):
                    future.set_exception(row)
                else:
                    future.set_result(row)

    def _each(self, batch: list[Text]) -> list[Rows | BaseException]:
        """The row of each text, or its error; a batch that fails is tried text by text, so that one text cannot spoil it."""
        try:
            return list(self._compute(batch))
        except Exception as error:  # anything at all: whoever waits has to be told
            if len(batch) == 1:
                return [error]
        return [row for text in batch for row in self._each([text])]


def _seen(future: "asyncio.Future[Rows]") -> None:
    """Take note of an exception that nobody waits for any more, so that asyncio does not complain about it."""
    if not future.cancelled():
        future.exception()
