"""What every event of feedback has: checked texts, a prompt, and a way from rewards to terms of the likelihood.

Whatever may come from outside is checked here: sizes, NUL, half characters, NaN, times in milliseconds, a response given twice.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator

from palate.data.pairs import Message, Prompt
from palate.errors import DataError
from palate.living.consent import Seconds
from palate.living.exposure import Exposure
from palate.living.reading import Level, Trust
from palate.living.terms import Floats, Rewards, Terms

MAX_TEXT = 32_768  # characters of one text
MAX_TURNS = 64  # of a prompt
MAX_SHOWN = 64  # responses of one event
MAX_WEIGHT = 10.0


def _text(text: str) -> str:
    if "\x00" in text:
        raise ValueError("the text holds a NUL character; expected text")
    return text


def _words(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is empty or blank; expected a response with something in it")
    return _text(text)


def listed(given: Any) -> Any:
    """A list as a tuple, so that a frozen event is frozen; anything else is left to the check that follows."""
    return tuple(given) if isinstance(given, list) else given


# The patterns are for the reader of the schema; the functions check the same, and say what is wrong.
Asked = Annotated[str, Field(max_length=MAX_TEXT, json_schema_extra={"pattern": r"^[^\x00]*$"}), AfterValidator(_text)]
Words = Annotated[
    str,
    Field(min_length=1, max_length=MAX_TEXT, json_schema_extra={"pattern": r"^[^\x00]*[^\s\x00\x1c-\x1f\x85][^\x00]*$"}),
    AfterValidator(_words),
]
EventId = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:~-]+$")]
Several = Annotated[
    tuple[Words, ...], Field(max_length=MAX_SHOWN, json_schema_extra={"uniqueItems": True}), BeforeValidator(listed)
]
Shown = Annotated[
    tuple[Words, ...],
    Field(min_length=2, max_length=MAX_SHOWN, json_schema_extra={"uniqueItems": True}),
    BeforeValidator(listed),
]


class Strict(BaseModel):
    """Nothing converted, nothing ignored, nothing changed."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Turn(Strict):
    """One turn of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64, json_schema_extra={"pattern": r"^[^\x00]*$"}), AfterValidator(_text)]
    content: Asked


class Part(NamedTuple):
    """One term: rows of `responses()` (-1 is the level), the share of each, its weight, and log-odds to add to the rewards."""

    rows: tuple[int, ...]
    target: tuple[float, ...]
    weight: float = 1.0
    bias: tuple[float, ...] = ()


class Event(Strict):
    """What all events have."""

    examples: ClassVar[tuple[dict[str, Any], ...]] = ()

    kind: str
    event_id: EventId | None = Field(default=None, description="names the event, so that it can be undone or corrected")
    at: Seconds | None = Field(default=None, description="when it happened, in unix seconds")

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core))
        schema["required"] = ["kind", *(name for name in schema.get("required", []) if name != "kind")]  # tells which one it is
        schema["examples"] = list(cls.examples)
        return schema

    def responses(self) -> tuple[str, ...]:
        """The distinct texts whose rewards `terms` needs, in the order of their rows; none for an event without evidence."""
        return ()

    def terms(
        self,
        rewards: Rewards,
        *,
        exposure: Exposure,
        level: Level,
        trust: Trust = Trust(),  # noqa: B008
        near: Floats | None = None,
    ) -> Terms:
        """What the event says of the person's weights.

        Args:
            rewards: of `responses()`, (m,) and (m, K).
            exposure: what positions do. level: an ordinary response. trust: how much each kind counts.
            near: (K,) weights at which it is judged how far somebody had looked before a pick, where that is not known. By
                default the crowd's, so that what an event says depends on no other event; weights that were learned so far
                shrink less, and belong in a fit that goes over everything again (`Exposure.fit`).

        Raises `DataError` for rewards of other responses or another number of weights. O(m K) a term.
        """
        texts, k = self.responses(), len(level.slopes)
        if rewards.offset.shape != (len(texts),) or rewards.slopes.shape != (len(texts), k):
            raise DataError(
                f"rewards have offset {rewards.offset.shape} and slopes {rewards.slopes.shape}; expected ({len(texts)},) and "
                f"({len(texts)}, {k}), a row for each of event.responses()"
            )
        at = rewards.offset + rewards.slopes @ (np.array(level.crowd) if near is None else near)
        parts = [part for part in self._parts(at, exposure, level) if len(part.rows) > 1]
        weight = self._counts(trust)
        if not parts or weight == 0:
            return Terms.empty(k)
        rows = [row for part in parts for row in part.rows]
        offset = np.append(rewards.offset, level.offset)[rows]
        if any(part.bias for part in parts):
            offset += [b for part in parts for b in (part.bias or (0.0,) * len(part.rows))]
        return Terms(
            slopes=np.concatenate((rewards.slopes, [level.slopes]))[rows],
            offset=offset,
            target=np.array([share for part in parts for share in part.target]),
            start=np.array([0, *accumulate(len(part.rows) for part in parts[:-1])]),
            weight=np.array([weight * part.weight for part in parts]),
            pulls=np.zeros((0, k)),
            level=np.zeros(0),
            std=np.zeros(0),
        )

    def _parts(self, rewards: Floats, exposure: Exposure, level: Level) -> Iterator[Part]:
        """The terms, given the rewards (m,) of the crowd."""
        yield from ()

    def _counts(self, trust: Trust) -> float:
        return 0.0


class Said(Event):
    """An event about responses to a prompt."""

    prompt: Asked | Annotated[tuple[Turn, ...], Field(min_length=1, max_length=MAX_TURNS), BeforeValidator(listed)]
    weight: float = Field(
        default=1.0, gt=0, le=MAX_WEIGHT, allow_inf_nan=False, description="how much it counts, times its kind's trust"
    )

    @property
    def trusted_as(self) -> str | None:
        """Which number of `Trust` multiplies it; None for an event without evidence."""
        return self.kind

    def _counts(self, trust: Trust) -> float:
        multiplier: float = 0.0 if self.trusted_as is None else getattr(trust, self.trusted_as)
        return self.weight * multiplier

    @property
    def asked(self) -> Prompt:
        """The prompt as encoders take it."""
        return self.prompt if isinstance(self.prompt, str) else tuple(Message(turn.role, turn.content) for turn in self.prompt)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        texts = self.responses()
        for row, text in enumerate(texts):
            if text in texts[:row]:
                raise ValueError(f"responses {texts.index(text)} and {row} are the same text; expected distinct ones")
        return self
