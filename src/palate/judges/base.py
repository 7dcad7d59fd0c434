"""What a judge is: it studies what users chose, as text, and says of two responses which one a user would choose.

    briefs = judge.study(past)                  what it makes of every user's history, readable and editable
    verdict = judge.judge(briefs["ada"], prompt, "Yes.", "No.")

A `Brief` belongs to no judge: one that was written by one model can be handed to a judge with another, and `save_briefs` and
`load_briefs` put a text editor in between.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from palate.data.pairs import Message, PairSet, Prompt
from palate.errors import DataError

Side = Literal["First", "Second"]
Outcome = Literal["answered", "unreadable", "truncated", "empty", "refusal", "malformed", "endpoint", "budget", "unstudied"]
# No word of the judge's arrived, or its study of the user was cut short: nothing may be counted for or against it.
NOT_JUDGED = ("endpoint", "budget", "malformed", "unstudied")


@dataclass(frozen=True)
class Demo:
    """One past choice as it is shown: two responses in some order, which one the user chose, and why, where somebody said so."""

    prompt: Prompt
    first: str
    second: str
    answer: Side
    thought: str = ""

    @property
    def chosen(self) -> str:
        return self.first if self.answer == "First" else self.second

    @property
    def rejected(self) -> str:
        return self.second if self.answer == "First" else self.first


@dataclass(frozen=True)
class Brief:
    """What is known of one user, in words.

    Attributes:
        user_id: whose.
        text: a summary or persona; may be edited. Empty where there is none.
        demos: past choices, the oldest first.
        made: how, such as "raw" or "synthesize-me".
        model: the model that wrote it; None where none did.
    """

    user_id: str
    text: str = ""
    demos: tuple[Demo, ...] = ()
    made: str = ""
    model: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` is its inverse."""
        out = asdict(self)
        out["demos"] = [asdict(demo) | {"prompt": _packed(demo.prompt)} for demo in self.demos]
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Brief":
        """Raises `DataError` saying which field is wrong."""
        known = {"user_id", "text", "demos", "made", "model"}
        if not isinstance(values, Mapping) or not isinstance(values.get("user_id"), str) or set(values) - known:
            found = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise DataError(f"a brief has the fields {found}; expected user_id and any of text, demos, made, model")
        user = values["user_id"]
        for name in ("text", "made", "model"):
            if not isinstance(values.get(name, ""), str) and not (name == "model" and values[name] is None):
                raise DataError(f"the brief of {user!r} has {name} {values[name]!r}; expected text")
        demos = values.get("demos", [])
        if not isinstance(demos, list | tuple):
            raise DataError(f"the brief of {user!r} has demos {demos!r:.80}; expected a list")
        shown = tuple(_demo(demo, user) for demo in demos)
        return cls(user, values.get("text", ""), shown, values.get("made", ""), values.get("model"))


class Answer(NamedTuple):
    """What the judge said to one order of the two responses.

    Attributes:
        swapped: the second response was shown first.
        outcome: "answered", or why there is no verdict in it.
        p_first: of the response that is first in the question, however it was shown; None unless answered.
        text: what the model wrote, or why it wrote nothing.
    """

    swapped: bool
    outcome: Outcome
    p_first: float | None
    text: str


class Verdict(NamedTuple):
    """Which response a user would choose.

    Attributes:
        p_first: of the first response, in [0, 1], the mean over both orders; None where an order has no verdict, because one
            order alone carries the bias for a place.
        reason: why `p_first` is None.
        thought: what the judge wrote before its verdict, in the order as asked.
        answers: every raw answer in both orders.
    """

    p_first: float | None
    reason: str | None = None
    thought: str = ""
    answers: tuple[Answer, ...] = ()

    @property
    def judged(self) -> bool:
        """The judge answered something, readable or not; a failed connection, a broken body and a spent budget are no answer."""
        return self.p_first is not None or not any(answer.outcome in NOT_JUDGED for answer in self.answers)

    def turned(self) -> "Verdict":
        """The same verdict on the same two responses, named the other way round."""
        answers = (
            answer._replace(swapped=not answer.swapped, p_first=None if answer.p_first is None else 1 - answer.p_first)
            for answer in self.answers
        )
        return self._replace(p_first=None if self.p_first is None else 1 - self.p_first, answers=tuple(answers))


class Question(NamedTuple):
    """Which of two responses would the user of this brief choose? None is a user of whom nothing is known."""

    brief: Brief | None
    prompt: Prompt
    first: str
    second: str


@runtime_checkable
class Judge(Protocol):
    """Anything that tells from text which of two responses a user would choose.

    Attributes:
        probabilistic: `p_first` is a probability that a log loss may hold to its word; else it only says which, and how often.
    """

    probabilistic: bool

    def study(self, past: PairSet) -> dict[str, Brief]:
        """A brief for every user of `past`; nothing but their own rows goes into it."""
        ...

    def judge(self, brief: Brief | None, prompt: Prompt, first: str, second: str) -> Verdict:
        """The verdict on one question."""
        ...

    def judge_all(self, questions: Sequence[Question]) -> list[Verdict]:
        """The verdicts in the order of the questions; one that fails costs no other."""
        ...


def demos_of(past: PairSet) -> dict[str, tuple[Demo, ...]]:
    """Every user's strict choices, the oldest first where all of a user's rows have a timestamp, else in the order of the rows.

    Which response is shown first is drawn from the texts alone, so half of the answers are First and nothing else changes it.
    """
    out: dict[str, list[tuple[float, Demo]]] = {user: [] for user in past.user_ids}
    for row in np.flatnonzero(~past.tie).tolist():
        chosen, rejected = past.texts[past.chosen[row]], past.texts[past.rejected[row]]
        swap = shuffled(chosen.response, rejected.response)
        sides = (rejected.response, chosen.response) if swap else (chosen.response, rejected.response)
        demo = Demo(chosen.prompt, *sides, "Second" if swap else "First")
        out[past.user_ids[past.user_index[row]]].append((float(past.timestamp[row]), demo))
    for rows in out.values():
        if not any(np.isnan(time) for time, _ in rows):
            rows.sort(key=lambda row: row[0])  # stable
    return {user: tuple(demo for _, demo in rows) for user, rows in out.items()}


def shuffled(chosen: str, rejected: str) -> bool:
    """Whether to show the rejected response first: a coin thrown by the two texts, whichever of them is the chosen one."""
    low, high = sorted((chosen, rejected))
    coin = sha256(f"{len(low)}:{low}{high}".encode("utf-8", "surrogatepass")).digest()[0] % 2 == 1
    return coin if chosen == low else not coin


def edited(brief: Brief, text: str) -> Brief:
    """The same brief with another text, which is now that of whoever wrote it."""
    return replace(brief, text=text, made=f"{brief.made}, edited" if brief.made else "edited")


def save_briefs(briefs: Mapping[str, Brief] | Iterable[Brief], path: str | Path) -> None:
    """One JSON object a line and user. They hold what people wrote and chose, in words: keep the file where such may be kept."""
    rows = briefs.values() if isinstance(briefs, Mapping) else briefs
    save_lines((brief.as_dict() for brief in rows), Path(path))


def save_lines(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """One JSON object a line, to be read by people; under its name only once it is whole. Half a character becomes a '?'."""
    partial = path.with_name(f"{path.name}.partial")
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    partial.write_text(text, encoding="utf-8", errors="replace")
    partial.replace(path)


def load_briefs(path: str | Path) -> dict[str, Brief]:
    """The briefs of `save_briefs`, by user, edited or not.

    Raises:
        DataError: a line that is no brief, with its number, a user with two of them, or a file that is not UTF-8.
    """
    out: dict[str, Brief] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # some editors put a mark before UTF-8
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start + 1}); save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            brief = Brief.from_dict(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        if brief.user_id in out:
            raise DataError(f"{path}, line {number}: a second brief of {brief.user_id!r}; expected one a user")
        out[brief.user_id] = brief
    return out


def _packed(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [turn._asdict() for turn in prompt]


def _demo(values: Any, user: str) -> Demo:
    what = f"a demo of {user!r} is {values!r:.80}"
    if not isinstance(values, Mapping) or set(values) - {"prompt", "first", "second", "answer", "thought"}:
        raise DataError(f"{what}; expected prompt, first, second, answer and perhaps thought")
    prompt, thought = values.get("prompt"), values.get("thought", "")
    if isinstance(prompt, list | tuple) and all(isinstance(t, Mapping) and set(t) == {"role", "content"} for t in prompt):
        prompt = tuple(Message(str(turn["role"]), str(turn["content"])) for turn in prompt)
    if not isinstance(prompt, str | tuple) or not all(isinstance(values.get(side), str) for side in ("first", "second")):
        raise DataError(f"{what}; expected a prompt (text or turns with role and content) and two responses")
    if values.get("answer") not in ("First", "Second") or not isinstance(thought, str):
        raise DataError(f"{what}; expected the answer First or Second, and a thought in words")
    return Demo(prompt, values["first"], values["second"], values["answer"], thought)
