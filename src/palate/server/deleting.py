"""Deletion of users through the service: their rows at once, then one rewrite of the store's files for all who wait for one.

A rewrite (`ProfileStore.scrub`) takes the time of a copy of the store, and no row can be deleted meanwhile. So it begins when no
deletion is under way, which makes it everybody's who came so far; whoever comes while it runs waits here, where that costs no
thread of those that read the store, and shares the next one.
"""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar

from palate.errors import StoreBusyError, StoreError
from palate.server.people import People, Who
from palate.store.records import Deleted

T = TypeVar("T")

SCRUB = 5.0  # seconds that the answer to a deletion waits for the store's files to be written anew
TURN = 10.0  # seconds that a deletion waits for a rewrite to end that began before it
RETRY = 60.0  # seconds after which a rewrite that failed is tried again: on a full disk it costs what it costs


class _Done(NamedTuple):
    deleted: Deleted
    rewrite: "asyncio.Task[bool] | None"


class Deleter:
    """Deletes users from a store and from what is held in memory. To be used from one event loop.

    Args:
        people: the caches, and the store behind them.

    Attributes:
        rewrites: how many times the files were written anew.
    """

    def __init__(self, people: People):
        self.people, self.rewrites = people, 0
        self._under_way = 0  # deletions of rows
        self._idle, self._open = asyncio.Event(), asyncio.Event()  # no deletion is under way; no rewrite is running
        self._idle.set()
        self._open.set()
        self._rewrite: asyncio.Task[bool] | None = None  # one that waits or runs
        self._again: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def delete(self, who: Who, turn: asyncio.Lock) -> Deleted:
        """Delete everything about a user; `scrubbed` is False where the rewrite fails, or takes more than `SCRUB` seconds.

        Whoever gives up waiting does not end it, so that no rewrite is left out.

        Args:
            turn: what whoever writes about this user holds; held until the rows are gone.

        Raises:
            StoreBusyError: the files are being written anew for longer than `TURN`; nothing was deleted.
            StoreError: as `ProfileStore.delete`.
        """
        done = await asyncio.shield(self._begun(self._rows(who, turn)))
        if done.rewrite is None:
            return done.deleted
        ended, _ = await asyncio.wait({done.rewrite}, timeout=SCRUB)
        return done.deleted._replace(scrubbed=bool(ended) and done.rewrite.result())

    def rewrite(self) -> "asyncio.Task[bool]":
        """Have the files written anew, by the run that has not begun yet or by a new one; its result: whether it was done."""
        if self._rewrite is None:
            self._rewrite = self._begun(self._rewritten())
        return self._rewrite

    def resume(self) -> None:
        """Have the files written anew in the background where that is due: the process that deleted somebody ended before it."""
        self._begun(self._resumed())

    async def _resumed(self) -> None:
        with suppress(StoreError):  # then it is due still
            if await self.people.call(self.people.store.unscrubbed):
                self.rewrite()

    async def close(self) -> None:
        """Finish what was begun."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._again is not None:
            self._again.cancel()

    async def _rows(self, who: Who, turn: asyncio.Lock) -> "_Done":
        async with turn:
            await self._until_open()
            done = await self._without(who)
        if not done.found:
            return _Done(done, None)
        self.people.deleted += 1
        return _Done(done, self.rewrite())

    async def _until_open(self) -> None:
        try:
            async with asyncio.timeout(TURN):
                while not self._open.is_set():
                    await self._open.wait()
        except TimeoutError:
            raise StoreBusyError(
                "the store's files are being written anew after other deletions; nothing was deleted, try again in a moment"
            ) from None

    async def _without(self, who: Who) -> Deleted:
        self._under_way += 1
        self._idle.clear()
        self.people.forget(who)
        try:
            return await self.people.call(partial(self.people.store.delete, scrub=False), *who)
        finally:
            self.people.forget(who)
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def _rewritten(self) -> bool:
        while self._under_way:
            await self._idle.wait()
        self._open.clear()  # from here on nobody joins: what is deleted later is not overwritten by this run
        try:
            await asyncio.to_thread(self.people.store.scrub)
        except StoreError:
            self._again = asyncio.get_running_loop().call_later(RETRY, self.rewrite)  # it stays due
            return False
        finally:
            self._rewrite = None
            self._open.set()
        self.rewrites += 1
        return True

    def _begun(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
