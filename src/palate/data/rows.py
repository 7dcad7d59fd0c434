"""What a good row is. The one place that decides it, for the readers and for the validation alike.

A row is a TRL preference row with a user: `user_id`, `chosen`, `rejected`, and optionally `prompt`, `tie`, `weight`, `margin`,
`timestamp`, `conversation_id`, `split`. All four shapes of TRL are read (and a prompt in one form with sides in the other):

| | plain text | conversation (a list of `{"role": ..., "content": ...}`) |
|---|---|---|
| with a prompt | prompt, two responses | the turns so far, and two lists of turns |
| without | two whole texts; the prompt is "" | two whole conversations; the turns they share are the prompt |

Two whole texts are not cut at their common beginning, as TRL's `extract_prompt` would: "The sky is blue" and "The sky is
black" share half a word, and the same text against another rival would be cut elsewhere, so that one prompt had many names and
a split by prompt leaked without a sound. Without a prompt, such rows refuse a split by prompt, which can be heard.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from palate.data.pairs import Choice, Message, Prompt

COLUMNS = ("user_id", "prompt", "chosen", "rejected", "tie", "weight", "margin", "timestamp", "conversation_id", "split")
REQUIRED = ("user_id", "chosen", "rejected")

# What a missing id becomes on its way through a string: one "user" made of everybody whose id was lost.
_PRINTED_NOTHING = {"nan", "NaN", "None", "null", "<NA>"}
# str() of a list or array of texts or messages; a list of numbers may well be somebody's answer and passes.
_STRINGIFIED = re.compile(
    r"\s*(?:array\()?\[\s*(?:['\"]|\{\s*['\"]).*['\"}]\s*\](?:,\s*dtype=\w+)?\)?\s*|\s*\[\s*\]\s*", re.DOTALL
)
_STRINGIFIED_TURN = re.compile(r"\s*\{\s*['\"](?:role|content)['\"]\s*:.*\}\s*", re.DOTALL)


def is_stringified(text: str) -> bool:
    """Whether a text is what `str()` makes of a list of texts or turns, of one turn, or of an empty list."""
    return bool(_STRINGIFIED.fullmatch(text) or _STRINGIFIED_TURN.fullmatch(text))


class Reason(StrEnum):
    """Why a row is bad: the codes of a validation report."""

    BROKEN_JSON = "broken_json"
    NOT_AN_OBJECT = "not_an_object"
    BAD_ENCODING = "bad_encoding"
    TRUNCATED = "truncated"
    LINE_TOO_LONG = "line_too_long"
    BROKEN_CSV = "broken_csv"
    WRONG_FIELD_COUNT = "wrong_field_count"
    MISSING_COLUMN = "missing_column"
    WRONG_TYPE = "wrong_type"
    MISSING_USER = "missing_user"
    EMPTY_TEXT = "empty_text"
    BAD_CHARACTER = "bad_character"
    STRINGIFIED_LIST = "stringified_list"
    BAD_CONVERSATION = "bad_conversation"
    IDENTICAL_SIDES = "identical_sides"
    ECHOES_PROMPT = "echoes_prompt"
    BAD_NUMBER = "bad_number"
    NEGATIVE_MARGIN = "negative_margin"
    BAD_TIMESTAMP = "bad_timestamp"
    BAD_VOTE = "bad_vote"
    DUPLICATE = "duplicate"
    CONTRADICTION = "contradiction"


class Problem(NamedTuple):
    """One thing wrong with a row, for machines (`reason`) and for people (`message`)."""

    reason: Reason
    message: str


class _Turn(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    role: str
    content: str


_Words = str | list[_Turn]


class _Row(BaseModel):
    """The types of a row, nothing converted; an integer user id is the one thing written as text."""

    model_config = ConfigDict(strict=True, extra="ignore")

    user_id: str | int
    prompt: _Words | None = None
    chosen: _Words
    rejected: _Words
    tie: bool | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    timestamp: float | str | datetime | None = None
    conversation_id: str | int | None = None
    split: str | None = None


def _shown(value: object, width: int = 60) -> str:
    """The value as an error shows it: its repr, cut."""
    text = repr(value)
    return text if len(text) <= width else text[:width] + "..."


def _type_problems(error: ValidationError, row: Mapping[str, Any]) -> list[Problem]:
    problems: dict[str, Problem] = {}  # a union reports once per branch; the column is what is wrong
    for detail in error.errors(include_url=False, include_context=False):
        column, kind = str(detail["loc"][0]), detail["type"]
        value = row.get(column)
        if column == "user_id" and (kind == "missing" or value is None or (isinstance(value, float) and math.isnan(value))):
            problems[column] = Problem(
                Reason.MISSING_USER, f"user_id is {_shown(value)}; expected a non-empty text or an integer"
            )
        elif kind == "string_unicode":
            message = f"{column} holds a lone surrogate (half a character): {_shown(ascii(value))}; expected valid Unicode"
            problems[column] = Problem(Reason.BAD_CHARACTER, message)
        elif kind == "missing":
            present = ", ".join(sorted(map(str, row))) or "none"
            problems[column] = Problem(Reason.MISSING_COLUMN, f"no {column!r}; the columns of the row are: {present}")
        elif column == "margin" and kind == "greater_than_equal":
            message = f"margin is {_shown(value)}; expected 0 or more: by how much the chosen side is better (exchange the sides)"
            problems[column] = Problem(Reason.NEGATIVE_MARGIN, message)
        elif kind in ("greater_than", "greater_than_equal", "finite_number"):
            wanted = "a finite number above 0" if column == "weight" else "a finite number, or nothing"
            problems[column] = Problem(Reason.BAD_NUMBER, f"{column} is {_shown(value)}; expected {wanted}")
        elif column not in problems:
            wanted = {
                "user_id": "a text or an integer",
                "tie": "true or false",
                "weight": "a number above 0",
                "margin": "a number of 0 or more",
                "timestamp": "seconds since 1970 or an ISO-8601 text",
                "conversation_id": "a text or an integer",
                "split": "a text",
            }.get(column, 'a text, or a list of {"role": text, "content": text}')
            message = f"{column} is {_shown(value)} ({type(value).__name__}); expected {wanted}"
            problems[column] = Problem(Reason.WRONG_TYPE, message)
    return list(problems.values())


def _text_problems(column: str, text: str, *, may_be_empty: bool = False) -> list[Problem]:
    problems = []
    if not may_be_empty and not text.strip():
        problems.append(Problem(Reason.EMPTY_TEXT, f"{column} is {_shown(text)}; expected a text with something in it"))
    if "\x00" in text:
        problems.append(Problem(Reason.BAD_CHARACTER, f"{column} holds a NUL character: {_shown(text)}; expected text"))
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            where = f"{column} holds a lone surrogate (half a character) at position {error.start}: {text[error.start]!a}"
            problems.append(Problem(Reason.BAD_CHARACTER, f"{where}; expected valid Unicode"))
    if is_stringified(text):
        message = f"{column} is a list that became a text: {_shown(text)}; write the text itself, or a real list of turns"
        problems.append(Problem(Reason.STRINGIFIED_LIST, message))
    return problems


def _conversation(
    prompt: "str | list[_Turn] | None", chosen: list[_Turn], rejected: list[_Turn]
) -> "tuple[Prompt, str, str] | str":
    """(prompt, response, response) of two conversations, or what is wrong with them."""
    shared, limit = 0, min(len(chosen), len(rejected)) - 1
    while shared < limit and chosen[shared] == rejected[shared]:
        shared += 1
    rests = chosen[shared:], rejected[shared:]
    if len(rests[0]) != 1 or len(rests[1]) != 1:
        found = (
            f"after the {shared} turns that they share, chosen goes on for {len(rests[0])} turns and rejected for {len(rests[1])}"
        )
        return f"{found}; expected one response each (cut the rows where the conversations part)"
    roles = rests[0][0].role, rests[1][0].role
    if roles != ("assistant", "assistant"):
        return f"the last turns of chosen and rejected are by {roles[0]!r} and {roles[1]!r}; expected 'assistant' twice"
    turns = [Message(turn.role, turn.content) for turn in chosen[:shared]]
    if isinstance(prompt, str) and prompt:
        # Some published sets repeat the prompt as the first user turn of both sides.
        before = [] if any(turn.role == "user" and turn.content == prompt for turn in turns) else [Message("user", prompt)]
    else:
        before = [Message(turn.role, turn.content) for turn in prompt or () if not isinstance(turn, str)]
        before = [] if turns[: len(before)] == before else before
    whole = tuple(before + turns)
    return whole or "", rests[0][0].content, rests[1][0].content


def _sides(row: _Row) -> "tuple[Prompt, str, str] | Problem":
    chosen, rejected, prompt = row.chosen, row.rejected, row.prompt
    if isinstance(chosen, list) and isinstance(rejected, list):
        found = _conversation(prompt, chosen, rejected)
        return found if isinstance(found, tuple) else Problem(Reason.BAD_CONVERSATION, found)
    if isinstance(chosen, str) and isinstance(rejected, str):
        turns = prompt if isinstance(prompt, str) else tuple(Message(turn.role, turn.content) for turn in prompt or ())
        return turns or "", chosen, rejected
    message = "chosen and rejected have different forms, one a text and one a list of turns; expected the same form for both"
    return Problem(Reason.BAD_CONVERSATION, message)


def _timestamp(value: "float | str | datetime | None") -> "float | Problem | None":
    if value is None or value == "":
        return None
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        if math.isfinite(value):
            return float(value)
    except (ValueError, OverflowError):
        pass
    return Problem(
        Reason.BAD_TIMESTAMP, f"timestamp is {_shown(value)}; expected finite seconds since 1970 or an ISO-8601 text (UTC)"
    )


def check_row(row: object) -> "Choice | list[Problem]":
    """The `Choice` that `row` says, or everything that is wrong with it by itself. O(length of its texts).

    Rejected are also rows in which *either* side repeats the prompt: a filter that looked at one side only would itself tell
    chosen from rejected. A timestamp without a zone is taken as UTC. Columns that are not in `COLUMNS` are ignored.
    """
    if not isinstance(row, Mapping):
        return [Problem(Reason.NOT_AN_OBJECT, f"the row is {_shown(row)}; expected an object with {', '.join(REQUIRED)}")]
    try:
        typed = _Row.model_validate(dict(row))
    except ValidationError as error:
        return _type_problems(error, row)
    problems: list[Problem] = []
    user = str(typed.user_id)
    if not user.strip() or user.strip() in _PRINTED_NOTHING:
        hint = " (what a missing value becomes in a text)" if user.strip() else ""
        problems.append(Problem(Reason.MISSING_USER, f"user_id is {_shown(user)}{hint}; expected who made the choice"))
    problems += [p for p in _text_problems("user_id", user, may_be_empty=True) if p.reason is Reason.BAD_CHARACTER]
    sides = _sides(typed)
    if isinstance(sides, Problem):
        return [*problems, sides]
    prompt, chosen, rejected = sides
    parts = [("prompt", prompt)] if isinstance(prompt, str) else [("prompt", turn.content) for turn in prompt]
    for column, text in parts:
        problems += _text_problems(column, text, may_be_empty=True)
    for column, text in (("chosen", chosen), ("rejected", rejected)):
        problems += _text_problems(column, text)
    for column, label in (("conversation_id", typed.conversation_id), ("split", typed.split)):
        labelled = _text_problems(column, str(label or ""), may_be_empty=True)
        problems += [p for p in labelled if p.reason is Reason.BAD_CHARACTER]
    if chosen.strip() == rejected.strip() and chosen.strip():
        message = f"chosen and rejected are the same text {_shown(chosen)}; expected two responses (leave the row out)"
        problems.append(Problem(Reason.IDENTICAL_SIDES, message))
    asked = (parts[-1][1] if parts else "").strip()
    echoes = [column for column, text in (("chosen", chosen), ("rejected", rejected)) if asked and text.strip() == asked]
    if echoes:
        message = f"{' and '.join(echoes)} repeats the prompt {_shown(asked)}; expected a response to it"
        problems.append(Problem(Reason.ECHOES_PROMPT, message))
    time = _timestamp(typed.timestamp)
    if isinstance(time, Problem):
        return [*problems, time]
    if problems:
        return problems
    conversation = None if typed.conversation_id in (None, "") else str(typed.conversation_id)
    weight = 1.0 if typed.weight is None else typed.weight
    return Choice(user, prompt, chosen, rejected, bool(typed.tie), weight, typed.margin, time, conversation, typed.split or None)


def _digest(*parts: object) -> int:
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = (part if isinstance(part, str) else repr(part)).encode("utf-8", "surrogatepass")
        whole.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(whole.digest(), "little")


class Repeats:
    """Finds rows that repeat or contradict an earlier good row, in one pass.

    A duplicate has the same user, prompt, sides and answer (a tie has no order), at the same time in the same conversation
    where rows say when and where. A contradiction is the same user choosing both ways on one pair: people do that, but no
    reader can tell which one they meant, so the first stays, the second is set aside, and both are named. A tie beside a
    choice contradicts nothing. Memory: 16-byte hashes, about 150 bytes a good row in Python's dict, whatever the texts' size.
    """

    def __init__(self) -> None:
        self._first: dict[int, int] = {}

    def check(self, choice: Choice, line: int) -> "Problem | None":
        """What is wrong with `choice` beside the earlier ones; remembers it if nothing is."""
        low, high = sorted((choice.chosen, choice.rejected))
        who = (choice.user_id, choice.prompt)
        plain = _digest(*who, low, high, "tie") if choice.tie else _digest(*who, choice.chosen, choice.rejected)
        exact = plain
        if choice.timestamp is not None or choice.conversation_id is not None:
            exact = _digest(plain, choice.timestamp, choice.conversation_id)
        if exact in self._first:
            answer = "the same tie" if choice.tie else "the same choice"
            return Problem(
                Reason.DUPLICATE, f"{answer} by user {choice.user_id!r} as in line {self._first[exact]}; keep one of them"
            )
        if not choice.tie:
            swapped = self._first.get(_digest(*who, choice.rejected, choice.chosen))
            if swapped is not None:
                message = f"user {choice.user_id!r} chose the other way on the same pair in line {swapped}; keep one of them"
                return Problem(Reason.CONTRADICTION, message)
        self._first[exact] = line
        self._first.setdefault(plain, line)
        return None


def as_row(choice: Choice) -> dict[str, Any]:
    """`choice` as a canonical row: what `check_row` reads back as the same choice. Columns without a value are left out."""
    talk = not isinstance(choice.prompt, str)

    def side(text: str) -> object:
        return [{"role": "assistant", "content": text}] if talk else text

    prompt = choice.prompt if isinstance(choice.prompt, str) else [turn._asdict() for turn in choice.prompt]
    row: dict[str, Any] = {
        "user_id": choice.user_id,
        "prompt": prompt,
        "chosen": side(choice.chosen),
        "rejected": side(choice.rejected),
    }
    if choice.tie:
        row["tie"] = True
    if choice.weight != 1.0:
        row["weight"] = choice.weight
    optional = ("margin", "timestamp", "conversation_id", "split")
    return row | {name: value for name in optional if (value := getattr(choice, name)) is not None}
