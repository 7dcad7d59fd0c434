"""Every user learned again under a new model, in the background, while the old one goes on ranking.

There is nothing to resume from but the store itself: a user whose profile under the new model is up to date is skipped, so a run
that was stopped begins again and does what is left. One user at a time, and none while requests wait for the encoder.
"""

import asyncio
from dataclasses import dataclass

from palate.errors import PalateError, StoreError
from palate.server.lanes import Lane
from palate.server.problems import Failure, of_error
from palate.server.runtime import Runtime, UnlearnedError

PAGE = 200  # users that the store is asked for at a time
PAUSE = 0.05  # seconds that a waiting request is given before the next user
MOST_PAUSES = 20  # for one user: an encoder that is never idle shall not keep everybody from being learned
RETRY = 5.0  # seconds after which a store that failed is asked again
ROUNDS = 3  # walks over the users: those whom feedback made stale meanwhile, and those who failed, are tried again


@dataclass
class Progress:
    """How far a run is: users done and users who failed, with why the last one did."""

    model: str
    running: bool = True
    done: int = 0
    failed: int = 0
    reason: str | None = None


class Readapter:
    """Runs over the users of a store, at most one for each model at a time."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.progress: dict[str, Progress] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, lane: Lane) -> Progress:
        """Begin, or tell how far the run is that has begun already."""
        task = self._tasks.get(lane.name)
        if task is None or task.done():
            self.progress[lane.name] = Progress(lane.name)
            self._tasks[lane.name] = asyncio.get_running_loop().create_task(self._run(lane, self.progress[lane.name]))
        return self.progress[lane.name]

    async def stop(self) -> None:
        """Stop after the user who is being learned; what is done is kept."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _run(self, lane: Lane, progress: Progress) -> None:
        try:
            for _ in range(ROUNDS):
                progress.failed = 0
                if not await self._walk(lane, progress):
                    break
        finally:
            progress.running = False

    async def _walk(self, lane: Lane, progress: Progress) -> int:
        """Once over the users that are not up to date; how many there were."""
        after, met, people = ("", ""), 0, self.runtime.people
        while True:
            try:
                page = await people.call(people.store.stale, lane.fingerprint, after, PAGE)
            except StoreError as error:
                progress.reason = why(error)
                await asyncio.sleep(RETRY)
                continue
            if not page:
                return met
            for who in page:
                met += 1
                for _ in range(MOST_PAUSES):
                    if not len(lane.batcher):
                        break
                    await asyncio.sleep(PAUSE)
                try:
                    await self.runtime.relearned(who, lane)
                    progress.done += 1
                except Exception as error:  # an encoder may raise anything: one user's text shall not end the others' turn
                    progress.failed, progress.reason = progress.failed + 1, why(error)
            after = page[-1]


def why(error: Exception) -> str:
    """What may be told of a failure to whoever asked for the run, who is of one tenant: no text, and no address of a store."""
    if isinstance(error, UnlearnedError):
        return str(error)
    if isinstance(error, PalateError):
        return str(of_error(error).detail)
    return f"the service failed with {Failure.of(error).kind}"
