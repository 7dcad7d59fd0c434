"""Learning everybody again: one user who cannot be learned ends nobody else's turn, and no reason tells what it should not."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from palate.errors import StoreDownError
from palate.server import readapting
from palate.server.readapting import Progress, Readapter
from palate.server.runtime import UnlearnedError

USERS = [("acme", f"u{n}") for n in range(5)]


class Runtime:
    """What `Readapter` asks of one: users in memory, some of whom fail."""

    def __init__(self, failures: dict[str, Exception], away: int = 0):
        self.failures, self.away, self.learned = failures, away, set[tuple[str, str]]()
        self.people = SimpleNamespace(store=SimpleNamespace(stale=self.stale), call=self.call)

    async def call(self, function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    def stale(self, _fingerprint: str, after: tuple[str, str], _limit: int) -> list[tuple[str, str]]:
        if self.away:
            self.away -= 1
            raise StoreDownError("postgresql://palate@sesame.example does not answer")
        return [who for who in USERS if who > after and who not in self.learned]

    async def relearned(self, who: tuple[str, str], _lane: Any) -> None:
        if who[1] in self.failures:
            raise self.failures[who[1]]
        self.learned.add(who)


class Queue:
    """An encoder that somebody always waits for."""

    def __len__(self) -> int:
        return 1


def ran(runtime: Runtime) -> Progress:
    async def run() -> Progress:
        lane = SimpleNamespace(name="m", fingerprint="f", batcher=Queue())
        readapter = Readapter(cast(Any, runtime))
        progress = readapter.start(cast(Any, lane))
        await asyncio.wait_for(readapter._tasks["m"], 20)
        return progress

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readapting, "PAUSE", 0.0001)
    monkeypatch.setattr(readapting, "RETRY", 0.0001)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("the text was: sesame"), "the service failed with builtins.RuntimeError"),
        (StoreDownError("postgresql://palate@sesame.example"), "what this needs does not answer"),
        (UnlearnedError("a thumb needs an ordinary response"), "a thumb needs an ordinary response"),
    ],
)
def test_one_who_cannot_be_learned_ends_nobody_elses_turn(error: Exception, reason: str) -> None:
    runtime = Runtime({"u1": error})
    progress = ran(runtime)
    assert (progress.running, progress.done, progress.failed) == (False, 4, 1)
    assert runtime.learned == {who for who in USERS if who[1] != "u1"}
    assert reason in str(progress.reason)
    assert "sesame" not in str(progress.reason)


def test_a_store_that_is_away_is_waited_for_and_not_named() -> None:
    progress = ran(Runtime({}, away=3))
    assert (progress.done, progress.failed) == (5, 0)
    assert "sesame" not in str(progress.reason)
