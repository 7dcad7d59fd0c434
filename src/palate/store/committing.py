"""`Committer`: one thread that writes what everybody submits, all that waits in one transaction.

A flush of the disk takes milliseconds and does not care how much it flushes, so under load many requests share one, and alone
none waits for others: a group is whatever came while the last one was being written.
"""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol, Self

from palate.errors import (
    DataError,
    QueueFullError,
    StoreBusyError,
    StoreCorruptError,
    StoreDownError,
    StoreError,
    StoreReadOnlyError,
)
from palate.store.records import Outcome, Write

# What no write of a group is to blame for: one by one they would fail the same way, each after waiting as long.
EVERYBODYS = (StoreBusyError, StoreCorruptError, StoreDownError, StoreReadOnlyError)


class Writer(Protocol):
    """What a committer writes to: `ProfileStore`."""

    def write(self, writes: Sequence[Write]) -> list[Outcome]: ...


class Committer:
    """Writes of any number of threads, in groups, in the order in which they were submitted.

    A future gets its outcome after the transaction is on the disk, and not before. Where a group fails, its writes are tried one
    by one, so that one of them cannot take the others along; where the store is locked or gone, all of them fail with that.

    Args:
        store: where to write.
        waiting: at most so many writes in the queue; one more is refused with `QueueFullError`.
        group: at most so many writes in one transaction.

    Attributes:
        groups, written: how many transactions there were, and how many writes in them: their ratio is what grouping saves.
    """

    def __init__(self, store: Writer, *, waiting: int = 1024, group: int = 256):
        if waiting < 1 or group < 1:
            raise DataError(f"waiting is {waiting} and group is {group}; expected 1 or more")
        self.store, self.waiting, self.group = store, waiting, group
        self.groups = self.written = 0
        self._queue: deque[tuple[Write, Future[Outcome]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="palate-committer", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """How many writes wait."""
        return len(self._queue)

    def submit(self, write: Write) -> Future[Outcome]:
        """Queue a write. Its future has the outcome, or raises the `StoreError` that kept it from being written.

        A future that is cancelled before its turn is not written.

        Raises:
            QueueFullError: the disk does not keep up; ask the client to come back later.
            StoreError: the committer is closed.
        """
        future: Future[Outcome] = Future()
        with self._changed:
            if self._closed:
                raise StoreError("the committer is closed and takes no more writes; make a new one")
            if len(self._queue) >= self.waiting:
                raise QueueFullError(f"{len(self._queue)} writes wait for the disk, and no more may; try again in a moment")
            self._queue.append((write, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Write what waits, then stop. Returns once all of it is on the disk or has failed."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if not self._queue:
                    return
                taken = [self._queue.popleft() for _ in range(min(self.group, len(self._queue)))]
            self._write([(write, future) for write, future in taken if future.set_running_or_notify_cancel()])

    def _write(self, group: list[tuple[Write, "Future[Outcome]"]]) -> None:
        if not group:
            return
        try:
            outcomes = self.store.write([write for write, _ in group])
        except Exception as error:  # whatever it is, the thread has to live: others wait for it
            if len(group) == 1 or isinstance(error, EVERYBODYS):
                for _, future in group:
                    future.set_exception(error)
            else:
                for single in group:
                    self._write([single])
            return
        self.groups += 1
        self.written += len(group)
        for (_, future), outcome in zip(group, outcomes, strict=True):
            future.set_result(outcome)
