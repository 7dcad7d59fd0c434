"""From a logged event to a profile: what happens once when feedback comes, and again for every event when a model changes.

The log holds what people did, never what a model made of it, so that any later model can learn everybody from the same log. An
axis of style that somebody turned down in their explanation is an event of that log too.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pydantic import ValidationError

from palate.data.pairs import Prompt
from palate.errors import DataError
from palate.living.events import Copied, Correction, Feedback, Rated, Regenerated, Thumbed, Undo, apply, parse_feedback
from palate.living.explain import AxisEdit
from palate.living.profile import LiveProfile
from palate.living.terms import Rewards
from palate.server.lanes import Lane


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

Asked = tuple[Prompt, tuple[str, ...]]


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
    wanted = asked(events)
    found = await asyncio.gather(*(lane.rewards(prompt, texts) for prompt, texts in wanted))
    return dict(zip(wanted, found, strict=True))


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
    """
    for said in events:
        if not lane.has_level and reads_level(said.event):
            raise DataError(
                f"a {said.event.kind} is read against an ordinary response, and none is known here; start the server with "
                "--sample ROWS, or send choices"
            )
        of = said.event.of if isinstance(said.event, Undo | Correction) else None
        if cut and of is not None and of not in life.event_ids:
            if isinstance(said.event, Correction):
                inner = said.event.event
                life = apply(life, inner, lambda *texts: found[texts], lane.reading, event_id=of, at=inner.at or said.at)
        elif isinstance(said.event, AxisEdit):
            dated = said.event if said.event.at is not None else said.event.model_copy(update={"at": said.at})
            life = lane.explains().edited(life, dated)
        else:
            life = apply(life, said.event, lambda *texts: found[texts], lane.reading, event_id=said.event_id, at=said.at)
    return life
