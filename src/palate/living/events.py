"""Feedback as it comes: one event a thing that a person did, each with the likelihood it stands for.

Every kind becomes terms of one likelihood, the multinomial logit (`terms.Terms`), with u the reward of a response in log-odds:

| kind | what it says | terms |
|---|---|---|
| choice | this over that | Bradley and Terry 1952; a tie is half a win each way |
| pick | this one of those shown | multinomial logit (McFadden 1974) over what was looked at, with the positions' log-odds |
| ranking | best to worst | Plackett-Luce (Luce 1959, Plackett 1975): a pick of each place from all that is left |
| rating | a value on a scale | continuation ratios (Tutz 1991): each step passed is won against an ordinary response (`Level`) |
| thumb | up or down | a rating with one step |
| edit | what was there was rewritten | the edited text over the original |
| regenerate | once more, please | an ordinary response over this one; where the next was kept, that one over this one |
| copy | taken as it is | this one over the others shown, or over an ordinary response |
| unsure, undo, correct | | none: no evidence, or about another event |
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, Union

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from palate.data.pairs import Prompt
from palate.errors import DataError, MismatchError
from palate.living.evidence import MAX_SHOWN, Event, EventId, Part, Said, Several, Shown, Words, listed
from palate.living.exposure import Exposure
from palate.living.reading import MAX_STEPS, Level, Reading
from palate.living.terms import Floats, Rewards, Terms

if TYPE_CHECKING:
    from palate.living.draft import Draft
    from palate.living.profile import LiveProfile

L = TypeVar("L", "LiveProfile", "Draft")

MAX_RANKED = 32  # responses of one ranking
MAX_TIED = 4  # responses in one place of it: all their orders are averaged over, 2^4 terms
MAX_BYTES = 2**22  # of one event as JSON
AHEAD = 300.0  # seconds that a sender's clock may be ahead of ours


class Choice(Said):
    """One response preferred to another, or neither."""

    examples = ({"kind": "choice", "prompt": "Lunch?", "chosen": "Soup.", "rejected": "One might consider a sandwich."},)
    kind: Literal["choice"] = "choice"
    chosen: Words
    rejected: Words
    tie: bool = Field(default=False, description="no preference: half a win each way")
    first: Literal["chosen", "rejected"] | None = Field(default=None, description="which one was shown first, where it is known")

    def responses(self) -> tuple[str, ...]:
        return self.chosen, self.rejected

    def _parts(self, rewards: Floats, exposure: Exposure, level: Level) -> Iterator[Part]:
        ahead, behind = exposure.bias(2).tolist()
        bias = {"chosen": (ahead, behind), "rejected": (behind, ahead), None: (0.0, 0.0)}[self.first]
        yield Part((0, 1), (0.5, 0.5) if self.tie else (1.0, 0.0), 1.0, bias)


class Picked(Said):
    """One response picked of those shown, in the order shown."""

    examples = ({"kind": "pick", "prompt": "Lunch?", "shown": ["Soup.", "Rice.", "Toast."], "picked": 1, "examined": 2},)
    kind: Literal["pick"] = "pick"
    shown: Shown
    picked: int = Field(ge=0, lt=MAX_SHOWN, description="its place in `shown`, from 0")
    examined: int | None = Field(
        default=None, ge=1, le=MAX_SHOWN, description="how many of them, from the top, were looked at; omit where unknown"
    )

    @model_validator(mode="after")
    def _among(self) -> Self:
        if self.picked >= len(self.shown):
            raise ValueError(f"picked is {self.picked} of {len(self.shown)} shown; expected 0 to {len(self.shown) - 1}")
        if self.examined is not None and not self.picked < self.examined <= len(self.shown):
            raise ValueError(
                f"examined is {self.examined}; expected {self.picked + 1} to {len(self.shown)}: what was picked was looked at"
            )
        return self

    def responses(self) -> tuple[str, ...]:
        return self.shown

    def _parts(self, rewards: Floats, exposure: Exposure, level: Level) -> Iterator[Part]:
        bias = exposure.bias(len(self.shown))
        for depth, share in exposure.depths(rewards + bias, self.picked, self.examined):
            target = [0.0] * depth
            target[self.picked] = 1.0
            yield Part(tuple(range(depth)), tuple(target), share, tuple(bias[:depth].tolist()))


Place = Words | Annotated[tuple[Words, ...], Field(min_length=1, max_length=MAX_TIED), BeforeValidator(listed)]


class Ranked(Said):
    """Responses from best to worst; those in one place are equally good. `rest` was shown too and stands below, in no order."""

    examples = (
        {"kind": "ranking", "prompt": "Lunch?", "places": ["Soup.", ["Rice.", "Toast."]], "rest": ["Crisps.", "Nothing."]},
    )
    kind: Literal["ranking"] = "ranking"
    places: Annotated[tuple[Place, ...], Field(min_length=1, max_length=MAX_RANKED), BeforeValidator(listed)]
    rest: Several = ()

    @model_validator(mode="after")
    def _several(self) -> Self:
        if not 2 <= len(self.responses()) <= MAX_RANKED:
            raise ValueError(f"{len(self.responses())} responses are ranked; expected 2 to {MAX_RANKED}")
        return self

    def responses(self) -> tuple[str, ...]:
        listed = [text for place in self.places for text in ((place,) if isinstance(place, str) else place)]
        return *listed, *self.rest

    def _parts(self, rewards: Floats, exposure: Exposure, level: Level) -> Iterator[Part]:
        """Plackett-Luce, averaged over the orders of each place: of m tied, every subset of size s can be what is left after the
        others, and each of them has been with probability 1 / C(m, s)."""
        below, end = tuple(range(len(self.responses()))), 0
        for place in self.places:
            size = 1 if isinstance(place, str) else len(place)
            tied, below = tuple(range(end, end + size)), below[size:]
            end += size
            for left in range(size, 0, -1):
                for subset in combinations(tied, left):
                    target = (1 / left,) * left + (0.0,) * len(below)
                    yield Part(subset + below, target, 1 / math.comb(size, left))


class Rated(Said):
    """A value given to one response, on a scale from `low` to `high`; higher is better."""

    examples = ({"kind": "rating", "prompt": "Lunch?", "response": "Soup.", "value": 4, "low": 1, "high": 5},)
    kind: Literal["rating"] = "rating"
    response: Words
    value: float = Field(ge=-1e6, le=1e6, allow_inf_nan=False)
    low: float = Field(ge=-1e6, le=1e6, allow_inf_nan=False)
    high: float = Field(ge=-1e6, le=1e6, allow_inf_nan=False)

    @model_validator(mode="after")
    def _on_the_scale(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"the scale is from {self.low:g} to {self.high:g}; expected low below high")
        if not self.low <= self.value <= self.high:
            raise ValueError(f"value is {self.value:g}; expected one on the scale from {self.low:g} to {self.high:g}")
        return self

    def responses(self) -> tuple[str, ...]:
        return (self.response,)

    def steps(self) -> tuple[float, int]:
        """(how many steps above the lowest, of how many): whole steps of 1 where the scale has at most `MAX_STEPS`, else that."""
        span = self.high - self.low
        n = int(span) if span == int(span) and span <= MAX_STEPS else MAX_STEPS
        place = n * (self.value - self.low) / span
        return (float(round(place)) if abs(place - round(place)) < 1e-9 else place), n

    def _parts(self, rewards: Floats, exposure: Exposure, level: Level) -> Iterator[Part]:
        """A value between two steps is the mean of what both say."""
        place, n = self.steps()
        whole, over = int(place), place - int(place)
        for step, log_odds in enumerate(level.passing(n).tolist()):
            passed = 1.0 if step < whole else over if step == whole else 0.0
            reached = 1.0 if step <= whole else over if step == whole + 1 else 0.0
            if reached:
                yield Part((0, -1), (passed, 1 - passed), reached, (0.0, -log_odds))


class Thumbed(Said):
    """A thumb up or down: better or worse than an ordinary response."""

    examples = ({"kind": "thumb", "prompt": "Lunch?", "response": "Soup.", "up": True},)
    kind: Literal["thumb"] = "thumb"
    response: Words
    up: bool

    def responses(self) -> tuple[str, ...]:
        return (self.response,)

    def _parts(self, rewards: Floats, exposure: Exposure, level: Level) -> Iterator[Part]:
        yield Part((0, -1), (1.0, 0.0) if self.up else (0.0, 1.0))


class Edited(Said):
    """A response that the person rewrote: what they made of it is preferred to what was there."""

    examples = ({"kind": "edit", "prompt": "Lunch?", "response": "One might consider soup.", "edited": "Soup."},)
    kind: Literal["edit"] = "edit"
    response: Words
    edited: Words

    def responses(self) -> tuple[str, ...]:
        return self.edited, self.response

    def _parts(self, rewards: Floats, exposure: Exposure, level: Level) -> Iterator[Part]:
        yield Part((0, 1), (1.0, 0.0))


class Regenerated(Said):
    """Another response was asked for. That says little of the first, and more where the next one was kept."""

    examples = ({"kind": "regenerate", "prompt": "Lunch?", "rejected": "Soup.", "shown_next": "Rice.", "kept": True},)
    kind: Literal["regenerate"] = "regenerate"
    rejected: Words
    shown_next: Words | None = None
    kept: bool = Field(default=False, description="the next one was kept: it is preferred to the first")

    @model_validator(mode="after")
    def _something_kept(self) -> Self:
        if self.kept and self.shown_next is None:
            raise ValueError("kept is true without a shown_next; expected the response that was kept")
        return self

    def responses(self) -> tuple[str, ...]:
        return (self.rejected,) if self.shown_next is None else (self.rejected, self.shown_next)

    def _parts(self, rewards: Floats, exposure: Exposure, level: Level) -> Iterator[Part]:
        yield Part((0, 1 if self.kept else -1), (0.0, 1.0))

    @property
    def trusted_as(self) -> str | None:
        return "kept" if self.kept else "regenerate"


class Copied(Said):
    """A response taken as it is, of those shown (`others`), or on its own."""

    examples = ({"kind": "copy", "prompt": "Lunch?", "response": "Soup.", "others": ["Rice."]},)
    kind: Literal["copy"] = "copy"
    response: Words
    others: Several = ()

    def responses(self) -> tuple[str, ...]:
        return self.response, *self.others

    def _parts(self, rewards: Floats, exposure: Exposure, level: Level) -> Iterator[Part]:
        rows = tuple(range(1 + len(self.others))) if self.others else (0, -1)
        yield Part(rows, (1.0,) + (0.0,) * (len(rows) - 1))

    @property
    def trusted_as(self) -> str | None:
        return "copied"


class Unsure(Said):
    """'I can't say': the question was asked and answered, and nothing is learned of the weights."""

    examples = ({"kind": "unsure", "prompt": "Lunch?", "first": "Soup.", "second": "Rice."},)
    kind: Literal["unsure"] = "unsure"
    first: Words
    second: Words

    @property
    def trusted_as(self) -> str | None:
        return None


class Undo(Event):
    """An earlier event is taken back, as if it had never been."""

    examples = ({"kind": "undo", "of": "a1"},)
    kind: Literal["undo"] = "undo"
    of: EventId


Evidence = Annotated[
    Union[Choice, Picked, Ranked, Rated, Thumbed, Edited, Regenerated, Copied, Unsure],  # noqa: UP007
    Field(discriminator="kind"),
]


class Correction(Event):
    """An earlier event is replaced by another."""

    examples = (
        {"kind": "correct", "of": "a1", "event": {"kind": "thumb", "prompt": "Lunch?", "response": "Soup.", "up": False}},
    )
    kind: Literal["correct"] = "correct"
    of: EventId
    event: Evidence

    def responses(self) -> tuple[str, ...]:
        return self.event.responses()


Feedback = Annotated[
    Union[Choice, Picked, Ranked, Rated, Thumbed, Edited, Regenerated, Copied, Unsure, Undo, Correction],  # noqa: UP007
    Field(discriminator="kind"),
]
_FEEDBACK: TypeAdapter[Feedback] = TypeAdapter(Feedback)
_KINDS = ("choice", "pick", "ranking", "rating", "thumb", "edit", "regenerate", "copy", "unsure", "undo", "correct")


def parse_feedback(data: str | bytes | Mapping[str, Any]) -> Feedback:
    """The event that JSON, or an object made from it, describes. Texts are never repeated in an error.

    Raises `DataError` with every reason, and where.
    """
    try:
        if isinstance(data, Mapping):
            return _FEEDBACK.validate_python(dict(data))
        size = len(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
        if size > MAX_BYTES:
            raise DataError(f"the event has {size} bytes; expected at most {MAX_BYTES}")
        return _FEEDBACK.validate_json(data)
    except ValidationError as error:
        raise DataError(f"this is no feedback: {'; '.join(_reasons(error))}") from None  # the cause would show the texts
    except UnicodeEncodeError as error:
        raise DataError(f"this is no feedback: half a character at position {error.start}; expected valid Unicode") from None


def _reasons(error: ValidationError) -> Iterator[str]:
    for detail in error.errors(include_url=False, include_context=False, include_input=True)[:8]:
        where, value = ".".join(str(part)[:40] for part in detail["loc"]), detail["input"]
        shown = f" (got {value!r})"[:40] if isinstance(value, int | float) else ""
        known = f"kind is none of {', '.join(_KINDS)}" if detail["type"] == "union_tag_invalid" else detail["msg"]
        yield f"{where or 'the event'}: {known}{shown}"


def check_time(event: Event, now: float) -> None:
    """Raise `DataError` where an event, or what it puts in the place of another, is dated more than `AHEAD` seconds after `now`
    (unix seconds)."""
    for at in (event.at, event.event.at if isinstance(event, Correction) else None):
        if at is not None and at > now + AHEAD:
            raise DataError(f"the event is dated {at - now:.0f} s ahead of now; expected a time that has been, in unix seconds")


def apply(
    live: L,
    event: Feedback,
    rewards_of: Callable[[Prompt, tuple[str, ...]], Rewards],
    reading: Reading,
    *,
    event_id: str | None = None,
    at: float | None = None,
) -> L:
    """The profile (or its draft) after an event: learned from it, without the one it takes back, or with that one replaced.

    Args:
        rewards_of: (prompt, distinct texts) to their rewards under the model of `live`; not asked where there is no evidence.
        reading: how feedback is read, of the same model.
        event_id: the name to keep the event under, where it has none of its own. at: its time, likewise.

    Raises:
        MismatchError: the reading is of another model.
        DataError: rewards that do not fit; the event taken back or replaced is not there; an event id that is.
    """
    if live.population.fingerprint != reading.level.model:
        raise MismatchError(
            f"a reading for model {reading.level.model[:12]} given to a profile of model {live.population.fingerprint[:12]}; "
            "make it again with Level.of"
        )
    if isinstance(event, Undo):
        return live.undo(event.of)
    said = event.event if isinstance(event, Correction) else event
    texts = said.responses()
    if texts:
        rewards = rewards_of(said.asked, texts)
        terms = said.terms(rewards, exposure=reading.exposure, level=reading.level, trust=reading.trust)
    else:
        terms = Terms.empty(len(reading.level.slopes))
    if isinstance(event, Correction):
        return live.correct(event.of, terms, at=said.at)  # when what it replaces happened, not when it was replaced
    return live.update(terms, event_id=event.event_id or event_id, at=event.at if event.at is not None else at)
