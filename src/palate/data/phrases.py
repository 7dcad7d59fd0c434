"""Answers to everyday questions, composed from our own sentences with the style turned up or down axis by axis.

A generator of choices needs texts whose style is known exactly, and an encoder needs texts that read like answers. So every
answer is built from sentences written for its prompt (what to do, why, an example, a question back) in frames written for the
style (`phrases.json`). Each axis has three levels, and each level changes the words: the level *is* the planted truth.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TypedDict

import numpy as np

AXES: tuple[str, ...] = (
    "length",
    "formality",
    "warmth",
    "structure",
    "hedging",
    "humour",
    "directness",
    "enthusiasm",
    "examples",
    "curiosity",
)
LEVELS = 3  # off, some, much; levels 0, 1, 2 have mean 1 and variance 2/3 when drawn uniformly

_SHORT_FORMS = (
    (re.compile(r"\bcan't\b"), "cannot"),
    (re.compile(r"\bwon't\b"), "will not"),
    (re.compile(r"\b[Ll]et's\b"), "let us"),
    (re.compile(r"n't\b"), " not"),
    (re.compile(r"(?<=\w)'re\b"), " are"),
    (re.compile(r"(?<=\w)'ll\b"), " will"),
    (re.compile(r"(?<=\w)'ve\b"), " have"),
    (re.compile(r"\bI'm\b"), "I am"),
    (re.compile(r"\b([Ii]t|[Tt]hat|[Tt]here)'s\b"), r"\1 is"),
)


class Question(TypedDict):
    """One prompt with the sentences that answer it; a point is (imperative without a full stop, reason as a sentence)."""

    prompt: str
    topic: str
    answer: str
    points: list[tuple[str, str]]
    examples: list[str]
    ask: str


class _Book(TypedDict):
    frames: dict[str, list[str]]
    prompts: list[Question]


@cache
def _book() -> _Book:
    book: _Book = json.loads(files("palate.data").joinpath("phrases.json").read_text(encoding="utf-8"))
    return book


def questions() -> Sequence[Question]:
    """The prompts with their sentences, in a fixed order. Reads a package file once."""
    return _book()["prompts"]


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + ("" if words[-1] in ".!?" else ".")


def _formal(text: str) -> str:
    for short, long in _SHORT_FORMS:
        text = short.sub(long, text)
    return text


def compose(question: Question, levels: Mapping[str, int], rng: np.random.Generator) -> str:
    """One answer to `question` whose style is `levels` (axis -> 0, 1 or 2); which of the frames is used is drawn from `rng`.

    Length counts points and reasons; structure is prose, a numbered list, or headings with bullets; directness puts the answer
    first or last; the other axes insert 0, some or many sentences of their kind. 1 to 3 kB of text, about 0.1 ms.
    """
    frames, topic = _book()["frames"], question["topic"]

    def pick(name: str, count: int = 1) -> list[str]:
        options = frames[name]
        return [options[i].replace("{topic}", topic) for i in rng.choice(len(options), size=count, replace=False)]

    tone = ("_casual", "", "_formal")[levels["formality"]]
    before: list[str] = []
    if levels["directness"] == 2:
        before += [f"{pick('direct_answer')[0]} {question['answer']}"]
    before += pick("keen_open") if levels["enthusiasm"] else []
    before += pick("warm_open") if levels["warmth"] else []
    before += pick(f"{tone[1:]}_open") if tone else []
    if levels["directness"] < 2:
        before += pick("roundabout") if levels["directness"] == 0 else [question["answer"]]

    n_points = 2 + levels["length"]
    n_hedged = (0, (n_points + 1) // 2, n_points)[levels["hedging"]]
    n_reasons = (0, n_points // 2, n_points)[levels["length"]]
    hedged = set(rng.permutation(n_points)[:n_hedged].tolist())
    points: list[tuple[str, str]] = []
    for place, row in enumerate(np.sort(rng.permutation(len(question["points"]))[:n_points]).tolist()):
        act, reason = question["points"][row]
        words = pick(("hedged" if place in hedged else "plain") + tone)[0].replace("{p}", act)
        if tone == "_formal" and place:
            words = f"{pick('formal_joint')[0]}, {words}"
        said = _sentence(words)
        if levels["enthusiasm"] == 2 and place < 2:
            said = said[:-1] + "!"
        points.append((said, reason if place < n_reasons else ""))

    examples = [
        pick("example")[0].replace("{e}", question["examples"][i]) for i in rng.permutation(2)[: levels["examples"]].tolist()
    ]
    after: list[str] = []
    if levels["directness"] == 0:
        after += [f"{pick('late_answer')[0]} {question['answer']}"]
    after += pick("hedge_close") if levels["hedging"] == 2 else []
    after += pick("jokes", levels["humour"])
    after += pick("warm_close") if levels["warmth"] == 2 else []
    after += pick("keen_close") if levels["enthusiasm"] == 2 else []
    after += pick("direct_close") if levels["directness"] == 2 else []
    after += pick(f"{tone[1:]}_close") if tone else []
    after += [question["ask"]] if levels["curiosity"] else []
    after += pick("ask_more") if levels["curiosity"] == 2 else []

    text = _laid_out(levels["structure"], before, pick("lead")[0], points, examples, after)
    return _formal(text) if tone == "_formal" else text


def _laid_out(
    structure: int, before: list[str], lead: str, points: list[tuple[str, str]], examples: list[str], after: list[str]
) -> str:
    if structure == 0:
        body = [part for point in points for part in point if part]
        return " ".join([*before, *body, *examples, *after])
    if structure == 1:
        numbered = [f"{i}. {act} {reason}".rstrip() for i, (act, reason) in enumerate(points, start=1)]
        parts = [" ".join([*before, lead]), "\n".join(numbered), " ".join(examples), " ".join(after)]
        return "\n\n".join(part for part in parts if part)
    headings = _book()["frames"]["headings"]
    bullets = "\n".join(f"- **{act}** {reason}".rstrip() for act, reason in points)
    listed = "\n".join(f"- {example}" for example in examples)
    parts = [" ".join(before), bullets, listed, " ".join(after)]
    return "\n\n".join(f"## {heading}\n{part}" for heading, part in zip(headings, parts, strict=True) if part)
