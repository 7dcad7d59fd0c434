"""PRISM (Kirk et al. 2024): people from 75 countries talking to several language models and saying which answer was best.

`conversations.jsonl` of `HannahRoseKirk/prism-alignment` as choices: in each turn the chosen answer against each of the others,
after the earlier turns with the answers that were chosen, which is how the conversation went on (a turn with a single answer, of
which nothing can be compared, is part of it). Papers prepared it differently,
and figures on different preparations are not comparable, so each preparation is a recipe with a name:

| | `MRM` | `LORE_PAPER` | `LORE_CORRECTED` |
|---|---|---|---|
| source | MRM (arXiv 2601.18731), its repository | LoRe (arXiv 2504.14439), its code of June 2025 | LoRe's present code |
| users | 6 conversations or more | the same | the same |
| a conversation counts if | any turn is complete | any turn is complete and of at most 2300 characters | as MRM |
| pairs | chosen against each other answer | the same, of at most 2400 characters (the chosen side: below) | as MRM |
| history | turns | one text, of which the last 1500 characters are kept | turns |
| seen, unseen users | half, half | half, half | 80 %, 20 % |
| conversations of a user | half to learn from, half to test | the same | the same |

A turn is complete with a user's words, a chosen answer and another one. LoRe's present code sets a *list* of all other answers
against the chosen text, and the printed list gives the label away; that is not prepared here, which is what "corrected" says.
Characters are those of the user's words in that turn with one answer, as in LoRe's code. Departure: its one text has the markers
of a Llama 3 chat; here it has lines of `user: ...` and `assistant: ...`, which are fewer characters.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from palate.data.draws import of_user, python_order
from palate.data.foreign import choices_in, meant_by, with_split
from palate.data.pairs import PairSet
from palate.data.sources import Record, records
from palate.data.splits import split
from palate.data.validation import Tally, ValidationReport
from palate.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """One published preparation of PRISM; see the table of this module.

    Attributes:
        name: what a report calls it.
        max_turn: a turn of more characters does not make its conversation count.
        max_side: most characters of a side of a pair, and one less of the chosen side.
        max_text: the history is one text, of which so many characters are kept, and not a list of turns.
        unseen: share of the users who are unseen.
        published_draws: the split is drawn as the MRM scripts draw it, to the user and the conversation.
        seed: the published seed of the split (the paper of LoRe names none for its users).
    """

    name: str
    max_turn: int | None
    max_side: int | None
    max_text: int | None
    unseen: float
    published_draws: bool
    seed: int


MRM = Recipe("prism-mrm", None, None, None, 0.5, True, 42)
LORE_PAPER = Recipe("prism-lore-paper", 2300, 2400, 1500, 0.5, False, 123)
LORE_CORRECTED = Recipe("prism-lore-corrected", None, None, None, 0.2, False, 123)


@dataclass(frozen=True, eq=False, repr=False)
class PrismPairs(PairSet):
    """Choices, and what the published draws were made over: every conversation that counts, also one whose rows are all bad.

    Attributes:
        talks: the conversations of each user, in the order of the file.
    """

    talks: Mapping[str, tuple[str, ...]]


class _Turn(NamedTuple):
    asked: str
    chosen: Row | None
    others: list[Row]

    @property
    def length(self) -> int | None:
        """Characters of the user's words with the longest answer; None of a turn that is not complete."""
        if self.chosen is None or not self.others:
            return None
        return _size(self.asked) + max(_size(one["content"]) for one in (self.chosen, *self.others))


def _size(content: object) -> int:
    """Characters of a text; what is no text is reported later, with the row."""
    return len(content) if isinstance(content, str) else 0


def load_prism(
    path: "str | os.PathLike[str]",
    *,
    min_conversations: int = 6,
    recipe: Recipe = MRM,
    survey: "str | os.PathLike[str] | None" = None,
) -> tuple[PrismPairs, ValidationReport]:
    """The choices of PRISM's `conversations.jsonl` by one of the recipes, and the report on rows that were left out.

    A turn counts if it has a user's words, a chosen answer and another one; users with fewer than `min_conversations` that count
    are left out. Besides, the 1-100 scores that users gave are kept: `margin` is how much higher the chosen answer was scored,
    where it was. Texts of both sides go through the same lines of code. `prism_split` says who learns from what.

    Args:
        path: the file, which may be compressed with gzip.
        min_conversations: 6 in every recipe.
        recipe: `MRM`, `LORE_PAPER` or `LORE_CORRECTED`.
        survey: PRISM's `survey.jsonl`; users whose `num_completed_conversations` is 0 there are left out, as published. Without
            it nobody is left out for that.

    A line that is no conversation is a bad row, as if it were not there: it neither counts nor takes part in a draw.

    Raises:
        DataError: a file of which no line is PRISM's, with the first; nobody with enough conversations.
    Cost: one pass; memory is that of the file.
    """
    tally = Tally(path)
    absent = set() if survey is None else _without_conversations(Path(survey), tally)
    by_user: dict[str, list[_Talk]] = {}
    for talk in _conversations(Path(path), recipe, tally):
        if talk.user not in absent and talk.counts:
            by_user.setdefault(talk.user, []).append(talk)
    kept = {user: talks for user, talks in by_user.items() if len(talks) >= min_conversations}
    if not kept:
        most = max(map(len, by_user.values()), default=0)
        raise DataError(
            f"{path}: none of {len(by_user)} users has {min_conversations} conversations with a choice (at most {most}); "
            "expected the whole conversations.jsonl, or lower min_conversations"
            + (f"\n{tally.report().summary()}" if tally.bad else "")
        )
    rows = [Record(talk.line, None, row) for talks in kept.values() for talk in talks for row in talk.rows]
    pairs, report = choices_in([(rows, lambda row: [dict(row)])], (), tally)
    names = {user: tuple(dict.fromkeys(talk.name for talk in talks)) for user, talks in kept.items()}
    return PrismPairs(**vars(pairs), talks=names), report


def prism_split(pairs: PairSet, recipe: Recipe = MRM, *, seed: int | None = None) -> PairSet:
    """The same choices with the recipe's split in their column: `train`, `test_seen`, `support`, `test_unseen`.

    Whole conversations fall on one side. For `MRM` the users and conversations are the very ones of the published scripts (seed
    42, and one more for each repeat): they are drawn among all that count, and bad rows are left out of what was drawn. LoRe's
    draws cannot be had again: its users were drawn without a seed in June, and what is shuffled now is not stored. For its
    recipes the proportions are the published ones and the draws are ours.

    Args:
        pairs: what `load_prism` gave with the same recipe. Of any other choices, those that were selected or saved included,
            it is not known which conversations had bad rows only, and the draws are over those that are there.
        seed: by default the recipe's.

    Returns:
        Users without one of the sides (all of whose conversations, or good rows, fall together) have no split.

    Raises:
        DataError: a negative seed, choices without a conversation, or nobody with two sides.
    """
    drawn = recipe.seed if seed is None else seed
    if drawn < 0:
        raise DataError(f"seed is {drawn}; expected 0 or more")
    if not recipe.published_draws:
        return with_split(pairs, split(pairs, by="conversation", unseen=recipe.unseen, test=0.5, seed=drawn))
    talks = pairs.talks if isinstance(pairs, PrismPairs) else _talks_in(pairs)
    users = sorted(talks)
    seen = {users[i] for i in python_order(drawn, len(users))[: len(users) // 2]}
    learned = {user: _first_half(talks[user], of_user(drawn, user)) for user in users if len(talks[user]) > 1}
    labels = np.full(len(pairs), None, dtype=np.object_)
    sides: dict[str, set[str]] = {}
    for row, (user, conversation) in enumerate(zip(pairs.users, pairs.conversation, strict=True)):
        if user in learned:
            names = ("train", "test_seen") if user in seen else ("support", "test_unseen")
            labels[row] = names[0] if conversation in learned[user] else names[1]
            sides.setdefault(user, set()).add(labels[row])
    labels[[len(sides.get(user, ())) < 2 for user in pairs.users]] = None
    if not any(label is not None for label in labels):
        raise DataError(
            f"none of {len(pairs.user_ids)} users has two conversations; expected at least one to learn from and one to test"
        )
    return replace(pairs, split=labels)


def _talks_in(pairs: PairSet) -> Mapping[str, tuple[str, ...]]:
    """The conversations of each user, in the order in which they come."""
    talks: dict[str, dict[str, None]] = {}
    for user, conversation in zip(pairs.users, pairs.conversation, strict=True):
        if conversation is None:
            raise DataError(f"a choice of user {user!r} has no conversation; expected what load_prism gave")
        talks.setdefault(user, {})[conversation] = None
    return {user: tuple(names) for user, names in talks.items()}


def _first_half(talks: Sequence[str], seed: int) -> set[str]:
    """Half of the conversations, rounded down, as the scripts shuffle them."""
    return {talks[i] for i in python_order(seed, len(talks))[: len(talks) // 2]}


class _Talk(NamedTuple):
    """A line of conversations.jsonl; one that counts may have no rows, and one that does not has none."""

    line: int
    user: str
    name: str
    counts: bool
    rows: list[Row]


def _without_conversations(path: Path, tally: Tally) -> set[str]:
    def absent(row: Mapping[str, Any]) -> list[str]:
        return [] if row["num_completed_conversations"] else [_id(row, "user_id")]

    columns = ("user_id", "num_completed_conversations")
    return {user for _, users in _of_lines(path, "survey.jsonl", columns, absent, tally) for user in users}


def _conversations(path: Path, recipe: Recipe, tally: Tally) -> Iterator[_Talk]:
    def told(row: Mapping[str, Any]) -> tuple[str, str, bool, list[Row]]:
        user, name, turns = _id(row, "user_id"), _id(row, "conversation_id"), list(_turns(row["conversation_history"]))
        lengths = [turn.length for turn in turns if turn.length is not None]
        counts = any(recipe.max_turn is None or length <= recipe.max_turn for length in lengths)
        return user, name, counts, list(_choices(user, name, turns, recipe)) if counts else []

    columns = ("user_id", "conversation_id", "conversation_history")
    for line, found in _of_lines(path, "conversations.jsonl", columns, told, tally):
        yield _Talk(line, *found)


def _id(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str | int):
        raise TypeError(f"{column} is {value!r:.60}")
    return str(value)


def _of_lines(
    path: Path, name: str, columns: Sequence[str], meaning: Callable[[Mapping[str, Any]], Any], tally: Tally
) -> Iterator[tuple[int, Any]]:
    """(line, what it means) of every line of PRISM's file of that name that means something; the others go into the tally.

    Raises `DataError` with the first line where none does.
    """
    expected = ", ".join(columns)

    def told(row: Mapping[str, Any]) -> Any:
        try:
            return meaning(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{error!r}; expected {expected}, as PRISM has them") from error

    numbered = ((record.line, record) for record in records(path, "jsonl", columns))
    advice = f"; expected PRISM's {name}, with {expected} in each line (get the file again)"
    return meant_by(numbered, told, tally, name=name, place=f"{path}, line", advice=advice)


def _turns(history: list[Row]) -> Iterator[_Turn]:
    """The turns in which the user said something, in order."""
    for _, group in groupby(sorted(history, key=lambda said: said["turn"]), key=lambda said: said["turn"]):
        said = list(group)
        asked = [one["content"] for one in said if one["role"] == "user"]
        chosen = [one for one in said if one["role"] != "user" and one["if_chosen"]]
        others = [one for one in said if one["role"] != "user" and not one["if_chosen"]]
        if asked:
            yield _Turn(asked[0], chosen[0] if chosen else None, others)


def _choices(user: str, conversation: str, turns: list[_Turn], recipe: Recipe) -> Iterator[Row]:
    talk: list[Row] = []
    for asked, chosen, others in turns:
        talk = [*talk, {"role": "user", "content": asked}]
        if chosen is None:
            continue
        for other in others:
            row: Row = {"user_id": user, "conversation_id": conversation, "prompt": _told(talk, recipe)}
            row |= {side: one["content"] for side, one in (("chosen", chosen), ("rejected", other))}
            sizes = _size(asked) + _size(row["chosen"]) + 1, _size(asked) + _size(row["rejected"])
            if recipe.max_side is not None and max(sizes) > recipe.max_side:
                continue
            scores = chosen.get("score"), other.get("score")
            if scores[0] is not None and scores[1] is not None and scores[0] >= scores[1]:
                row["margin"] = float(scores[0] - scores[1])
            yield row
        talk = [*talk, {"role": "assistant", "content": chosen["content"]}]


def _told(talk: list[Row], recipe: Recipe) -> str | list[Row]:
    """The prompt: turns, or the end of their text. A turn without words has no text: as turns the row is reported."""
    if recipe.max_text is None or not all(isinstance(said["content"], str) for said in talk):
        return talk
    told = "\n".join(f"{said['role']}: {said['content']}" for said in talk) if len(talk) > 1 else talk[0]["content"]
    return str(told)[-recipe.max_text :]
