"""What can be asked of a running service, as values: a `Call` knows its route, its body, and how to read the answer.

No connection is made here. `palate.client` sends calls, at once or awaited, and gives both clients one method for each function
below; their arguments and answers are written down here, once.
"""

import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

from pydantic import BaseModel

from palate.data.pairs import Message, Prompt
from palate.errors import DataError

T = TypeVar("T")
Event = Mapping[str, Any] | BaseModel
Json = Mapping[str, Any]

NAME = r"^(?:\.{0,2}[^./\x00-\x1f\x7f-\x9f]|\.{3})[^/\x00-\x1f\x7f-\x9f]*$"  # no control character, no slash, not "." or ".."
MAX_NAME = 256  # characters of a user's id


class AnswerError(ValueError):
    """An answer that is not what the route promises."""


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and what its answer means.

    Attributes:
        repeatable: sent twice, it does what it does once, so that a lost answer is no reason to stop.
    """

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: str
    read: "Reader[T]"
    body: Json | None = None
    query: Mapping[str, str | int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True


@dataclass(frozen=True)
class Reader(Generic[T]):
    """Reads the JSON of an answer as `kind`; fields that a newer server adds are left out."""

    kind: type[T]

    def __call__(self, answer: Any) -> T:
        if not isinstance(answer, dict):
            raise AnswerError(f"the answer is a {type(answer).__name__}; expected an object")
        if not is_dataclass(self.kind):
            return self.kind(answer)  # type: ignore[call-arg]
        names = [field.name for field in fields(self.kind)]
        try:
            return self.kind(**{name: _inner(self.kind, name, answer[name]) for name in names if name in answer})
        except TypeError as error:
            raise AnswerError(f"the answer has the fields {', '.join(sorted(answer))}; expected {', '.join(names)}") from error


def _inner(kind: type, name: str, value: Any) -> Any:
    made = _LISTS.get((kind, name))
    if made is not None and isinstance(value, list):
        return tuple(Reader(made)(one) for one in value)
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Ranked:
    """One candidate: its place in the request, and its reward in natural log-odds."""

    index: int
    reward: float


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first. `personal` is False where it is the crowd's ranking."""

    user_id: str
    model: str
    personal: bool
    version: int
    results: tuple[Ranked, ...]


@dataclass(frozen=True)
class Scores:
    """Rewards in the order of the candidates; `std` is None where a method has no uncertainty."""

    user_id: str
    model: str
    personal: bool
    version: int
    rewards: tuple[float, ...]
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Kept:
    """Feedback that is on the server's disk, and the ids by which it can be undone or corrected."""

    user_id: str
    version: int
    event_ids: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """Show these two: places among the candidates of an entry of the pool."""

    entry: int
    first: int
    second: int


@dataclass(frozen=True)
class Questions:
    """Best first; `enough` where no answer is likely to change a ranking of the pool."""

    user_id: str
    model: str
    questions: tuple[Question, ...]
    enough: bool


@dataclass(frozen=True)
class Agreed:
    """A consent, or its withdrawal, that is on record."""

    user_id: str
    version: int


@dataclass(frozen=True)
class Removed:
    """A user who is gone; `scrubbed` where nothing is left in the files of the store either."""

    user_id: str
    events: int
    scrubbed: bool


@dataclass(frozen=True)
class Line:
    """One user of a list."""

    user_id: str
    version: int
    n_events: int


@dataclass(frozen=True)
class Page:
    """Users by id; `next` is what `after` of the next page is, None at the end."""

    users: tuple[Line, ...]
    next: str | None = None


@dataclass(frozen=True)
class Household:
    """Candidates for several people, best first by the rule; each result is a dict with the rewards of the members."""

    model: str
    rule: str
    results: tuple[dict[str, Any], ...]


_LISTS: Mapping[tuple[type, str], type] = {
    (Ranking, "results"): Ranked,
    (Questions, "questions"): Question,
    (Page, "users"): Line,
}


def rank(
    user_id: str,
    prompt: Prompt,
    candidates: Sequence[str],
    *,
    top_n: int | None = None,
    at_least: float | None = None,
    model: str | None = None,
) -> Call[Ranking]:
    """Rank responses to a prompt for a user, best first.

    Args:
        top_n: at most so many; None for all.
        at_least: use the crowd's ranking unless the personal one beats it with at least this probability.
        model: one that the service has; None for the newest that knows the user.
    """
    body = _body(prompt=_prompt(prompt), candidates=list(candidates), top_n=top_n, at_least=at_least, model=model)
    return Call("POST", _user(user_id, "/rank"), Reader(Ranking), body)


def score(
    user_id: str, prompt: Prompt, candidates: Sequence[str], *, at_least: float | None = None, model: str | None = None
) -> Call[Scores]:
    """The rewards of responses for a user. Arguments as for `rank`."""
    body = _body(prompt=_prompt(prompt), candidates=list(candidates), at_least=at_least, model=model)
    return Call("POST", _user(user_id, "/score"), Reader(Scores), body)


def rank_household(
    members: Sequence[str], prompt: Prompt, candidates: Sequence[str], *, rule: str = "mean", model: str | None = None
) -> Call[Household]:
    """Rank responses for several people who have to take one; `rule` says what is best for a group ("mean", "worst-off")."""
    names = [check_name(member) for member in members]
    body = _body(members=names, rule=rule, prompt=_prompt(prompt), candidates=list(candidates), model=model)
    return Call("POST", "/v1/households/rank", Reader(Household), body)


def feedback(user_id: str, *events: Event, idempotency_key: str | None = None) -> Call[Kept]:
    """Keep what a user did, all of it or none, and learn from it.

    Args:
        events: of `palate.living.events`, or dicts: `{"kind": "choice", "prompt": ..., "chosen": ..., "rejected": ...}`.
        idempotency_key: your own name for this; by default a new one, so that repeating it after a lost answer keeps it once.
    """
    if not events:
        raise DataError("0 events; expected at least one")
    sent = [event.model_dump(mode="json", exclude_none=True) if isinstance(event, BaseModel) else dict(event) for event in events]
    named = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
    return Call("POST", _user(user_id, "/feedback"), Reader(Kept), {"events": sent}, headers=named)


def undo(user_id: str, event_id: str) -> Call[Kept]:
    """Take back an event, as if it had never been; the log keeps that it was."""
    return feedback(user_id, {"kind": "undo", "of": event_id})


def question(
    user_id: str,
    pool: Sequence[tuple[Prompt, Sequence[str]]],
    *,
    n: int = 1,
    rule: str | None = None,
    model: str | None = None,
) -> Call[Questions]:
    """Which two responses to show the user next, of (prompt, candidates) that exist.

    Args:
        n: so many questions, no two of them nearly the same.
        rule: how they are chosen; None for the service's usual one.
    """
    entries = [{"prompt": _prompt(prompt), "candidates": list(candidates)} for prompt, candidates in pool]
    return Call("POST", _user(user_id, "/question"), Reader(Questions), _body(pool=entries, n=n, rule=rule, model=model))


def explain(user_id: str, *, model: str | None = None) -> Call[dict[str, Any]]:
    """What this user likes: words, and axes of style with intervals."""
    return Call("GET", _user(user_id, "/explain"), Reader(dict), query={} if model is None else {"model": model})


def set_axis(user_id: str, axis: str, *, by: float | None = None, to: float | None = None) -> Call[Kept]:
    """Turn an axis of the explanation: `by` standard deviations of people (-1: down), or `to` a strength (0: off)."""
    named = {"Idempotency-Key": uuid.uuid4().hex}
    return Call("PATCH", _user(user_id, f"/axes/{_quoted(axis)}"), Reader(Kept), _body(by=by, to=to), headers=named)


def consent(user_id: str, purpose: str, text_version: str, *, granted: bool = True, at: float | None = None) -> Call[Agreed]:
    """Put on record that a user agreed, or with `granted=False` that they did not or no longer do.

    Args:
        purpose: what for; "personalise" is what feedback needs.
        text_version: which wording they saw.
        at: when, in unix seconds; by default now.
    """
    body = {"purpose": purpose, "text_version": text_version, "granted": granted, "at": time.time() if at is None else at}
    return Call("PUT", _user(user_id, "/consent"), Reader(Agreed), body)


def user(user_id: str) -> Call[dict[str, Any]]:
    """What the service has of a user, without their texts."""
    return Call("GET", _user(user_id), Reader(dict))


def users(*, after: str = "", limit: int = 100) -> Call[Page]:
    """A page of users by id, those after `after`."""
    return Call("GET", "/v1/users", Reader(Page), query={"after": after, "limit": limit})


def export(user_id: str) -> Call[dict[str, Any]]:
    """Everything that is stored about a user."""
    return Call("GET", _user(user_id, "/export"), Reader(dict))


def delete(user_id: str) -> Call[Removed]:
    """Remove everything about a user.

    A lost answer is an error, since a second request could only say that there is no such user: ask again, and read
    `UnknownUserError` as done.
    """
    return Call("DELETE", _user(user_id), Reader(Removed), repeatable=False)


def models() -> Call[dict[str, Any]]:
    """The models that are served, in the shape of OpenAI's list."""
    return Call("GET", "/v1/models", Reader(dict))


def ready() -> Call[dict[str, Any]]:
    """Whether requests can be answered now; `ServiceError` where not."""
    return Call("GET", "/ready", Reader(dict))


def check_name(user_id: str) -> str:
    """The id itself. Raises `DataError` for one that no route can carry."""
    if not isinstance(user_id, str) or len(user_id) > MAX_NAME or re.fullmatch(NAME[1:-1], user_id) is None:
        raise DataError(
            f"the id {str(user_id)[:40]!r} cannot be; expected 1 to {MAX_NAME} characters without slashes and control "
            "characters, and neither '.' nor '..'"
        )
    return user_id


def _user(user_id: str, tail: str = "") -> str:
    return f"/v1/users/{_quoted(user_id)}{tail}"


def _quoted(name: str) -> str:
    try:
        return quote(check_name(name), safe="")
    except UnicodeEncodeError:
        raise DataError("the id holds half of a surrogate pair, which is no character") from None


def _prompt(prompt: Prompt) -> str | list[dict[str, str]]:
    if isinstance(prompt, str):
        return prompt
    return [{"role": turn.role, "content": turn.content} for turn in map(Message._make, prompt)]


def _body(**fields: object) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
