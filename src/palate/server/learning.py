"""From a logged event to a profile: what happens once when feedback comes, and again for every event when a model changes.

The log holds what people did, never what a model made of it, so that any later model can learn everybody from the same log. An
axis of style that somebody turned down in their explanation is an event of that log too.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from pydantic import ValidationError

from palate.data.pairs import Prompt
from palate.errors import DataError
from palate.living.draft import Draft
from palate.living.events import Copied, Correction, Feedback, Rated, Regenerated, Thumbed, Undo, apply, parse_feedback
from palate.living.explain import AxisEdit
from palate.living.profile import LiveProfile
from palate.living.terms import Rewards
from palate.server.lanes import Lane
from palate.store.records import Logged


class Said(NamedTuple):
    """An event with the id and the time it is kept under."""

    event_id: str
    event: Feedback | AxisEdit
    at: float

    @property
    def payload(self) -> str:
        """JSON for the log."""
        return self.event.model_dump_json()


AXIS = "axis"  # kind of an edit in the log
AT_ONCE = 128  # texts of a log that are asked for at once: few enough to leave room in the encoder's queue

Asked = tuple[Prompt, tuple[str, ...]]
L = TypeVar("L", LiveProfile, Draft)


def read(payload: str, kind: str) -> Feedback | AxisEdit:
    """The event of a line of the log. Raises `DataError` for one that no version of Palate wrote."""
    if kind != AXIS:
        return parse_feedback(payload)
    try:
        return AxisEdit.model_validate_json(payload)
    except ValidationError as error:
        raise DataError(f"an event of the log is no edit of an axis ({error.error_count()} flaws); restore the store") from None


def asked(events: Iterable[Said]) -> list[Asked]:
    """The (prompt, texts) whose rewards these events need, each once."""
    out: dict[Asked, None] = {}
    for said in events:
        event = said.event.event if isinstance(said.event, Correction) else said.event
        if not isinstance(event, AxisEdit | Undo):
            texts = event.responses()
            if texts:
                out[event.asked, texts] = None
    return list(out)


def reads_level(event: Feedback | AxisEdit) -> bool:
    """Whether what the event says depends on what an ordinary response is worth (see the table of `palate.living.events`)."""
    inner = event.event if isinstance(event, Correction) else event
    alone = (isinstance(inner, Regenerated) and not inner.kept) or (isinstance(inner, Copied) and not inner.others)
    return alone or isinstance(inner, Rated | Thumbed)


async def rewards(lane: Lane, events: Iterable[Said]) -> dict[Asked, Rewards]:
    """What `learned` needs of the encoder. Raises as `Batcher.rows`."""
    out: dict[Asked, Rewards] = {}
    for place, some in enumerate(_portions(asked(events))):
        if place:
            await asyncio.sleep(0)  # texts that were seen before come without a wait: others have their turn too
        found = await asyncio.gather(*(lane.rewards(prompt, texts) for prompt, texts in some))
        out |= zip(some, found, strict=True)
    return out


def _portions(wanted: Sequence[Asked]) -> Iterator[list[Asked]]:
    """Runs of `wanted` of at least `AT_ONCE` texts, or what is left."""
    portion: list[Asked] = []
    n = 0
    for one in wanted:
        portion.append(one)
        n += len(one[1])
        if n >= AT_ONCE:
            yield portion
            portion, n = [], 0
    if portion:
        yield portion


def learned(
    life: LiveProfile, events: Sequence[Said], found: dict[Asked, Rewards], lane: Lane, *, cut: bool = False
) -> LiveProfile:
    """The profile after these events, in their order. Touches nothing else, so it may run in any thread.

    Args:
        found: what `rewards` returned.
        cut: a limit of retention has taken the beginning of the log: an event taken back may be gone already, and of one that
            was replaced what replaced it is left.

    Raises:
        DataError: an event that cannot be: it takes back what is not there, reuses an id, or needs what the model lacks.
    Cost: one solve, however many events.
    """
    if len(events) == 1:  # a draft goes through all that is there first
        return _after(life, events[0], found, lane, cut)
    draft = Draft(life)
    _take(draft, events, found, lane, cut)
    return draft.solved()


async def from_log(user_id: str, log: Callable[[int], Awaitable[Sequence[Logged]]], lane: Lane) -> tuple[LiveProfile, int]:
    """The profile of a whole log under `lane`, and the number of its last event; 0 where all of it is older than is kept.

    Args:
        log: the next events after one of this number, none after the last.

    Raises: as `learned` and `Batcher.rows`, and `DataError` for an event that no version of Palate wrote.
    Cost: about .2 ms an event, one solve, both in a thread, and the encoder for texts that were not seen lately.
    """
    draft, seq, cut = Draft(lane.population.start(user_id)), 0, False
    while page := await log(seq):
        said = await asyncio.to_thread(_said, page)
        cut = cut or (not seq and page[0].seq > 1)
        found = await rewards(lane, said)
        await asyncio.to_thread(_take, draft, said, found, lane, cut)
        seq = page[-1].seq
    return await asyncio.to_thread(draft.solved), seq


def _said(page: Sequence[Logged]) -> list[Said]:
    return [Said(one.event_id, read(one.payload, one.kind), one.at) for one in page]


def _take(draft: Draft, events: Sequence[Said], found: dict[Asked, Rewards], lane: Lane, cut: bool) -> None:
    for said in events:
        _after(draft, said, found, lane, cut)


def _after(profile: L, said: Said, found: dict[Asked, Rewards], lane: Lane, cut: bool) -> L:
    """The profile (or its draft) after one event."""
    if not lane.has_level and reads_level(said.event):
        raise DataError(
            f"a {said.event.kind} is read against an ordinary response, and none is known here; start the server with "
            "--sample ROWS, or send choices"
        )
    of = said.event.of if isinstance(said.event, Undo | Correction) else None
    if cut and of is not None and of not in profile.event_ids:
        if isinstance(said.event, Correction):
            inner = said.event.event
            at = inner.at or said.at
            return apply(profile, inner, lambda *texts: found[texts], lane.reading, event_id=of, at=at)
        return profile
    if isinstance(said.event, AxisEdit):
        dated = said.event if said.event.at is not None else said.event.model_copy(update={"at": said.at})
        return lane.explains().edited(profile, dated)
    return apply(profile, said.event, lambda *texts: found[texts], lane.reading, event_id=said.event_id, at=said.at)
