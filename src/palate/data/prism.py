"""PRISM (Kirk et al. 2024): people from 75 countries talking to several language models and saying which answer was best.

`conversations.jsonl` of `HannahRoseKirk/prism-alignment` as choices: in each turn the chosen answer against each of the others,
after the earlier turns with the answers that were chosen, which is how the conversation went on. Papers prepared it differently,
and figures on different preparations are not comparable, so each preparation is a recipe with a name:

| | `MRM` | `LORE_PAPER` | `LORE_CORRECTED` |
|---|---|---|---|
| source | MRM (arXiv 2601.18731), its repository | LoRe (arXiv 2504.14439), its code of June 2025 | LoRe's present code |
| users | 6 conversations or more | the same | the same |
| a conversation counts if | any turn is complete | any turn is complete and of at most 2300 characters | as MRM |
| pairs | chosen against each other answer | the same, either side below 2400 characters | as MRM |
| history | turns | one text | turns |
| seen, unseen users | half, half | half, half | 80 %, 20 % |
| conversations of a user | half to learn from, half to test | the same | the same |

A turn is complete with a user's words, a chosen answer and another one. LoRe's present code sets a *list* of all other answers
against the chosen text, and the printed list gives the label away; that is not prepared here, which is what "corrected" says.
What exactly was counted as characters is not published: here a turn is the user's words with the longer of the chosen answer and
the longest other one, and a side of a pair is its whole text, history included.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from palate.data.draws import of_user, python_order
from palate.data.foreign import with_split
from palate.data.pairs import PairSet
from palate.data.readers import load_valid_pairs
from palate.data.sources import Record, records
from palate.data.splits import split
from palate.data.validation import ValidationReport
from palate.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """One published preparation of PRISM; see the table of this module.

    Attributes:
        name: what a report calls it.
        max_turn: a turn of more characters does not make its conversation count.
        max_side: a pair with a side of so many characters or more is left out.
        as_text: the history is one text and not a list of turns.
        unseen: share of the users who are unseen.
        published_draws: the split is drawn as the MRM scripts draw it, to the user and the conversation.
        seed: the published seed of the split (the paper of LoRe names none for its users).
    """

    name: str
    max_turn: int | None
    max_side: int | None
    as_text: bool
    unseen: float
    published_draws: bool
    seed: int


MRM = Recipe("prism-mrm", None, None, False, 0.5, True, 42)
LORE_PAPER = Recipe("prism-lore-paper", 2300, 2400, True, 0.5, False, 123)
LORE_CORRECTED = Recipe("prism-lore-corrected", None, None, False, 0.2, False, 123)


class _Turn(NamedTuple):
    asked: str
    chosen: Row
    others: list[Row]

    @property
    def length(self) -> int:
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
) -> tuple[PairSet, ValidationReport]:
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

    Raises:
        DataError: a file that is not PRISM's, with the line; nobody with enough conversations.
    Cost: one pass; memory is that of the file.
    """
    absent = set() if survey is None else _without_conversations(Path(survey))
    by_user: dict[str, list[list[Row]]] = {}
    for user, rows in _conversations(Path(path), recipe):
        if user not in absent and rows is not None:
            by_user.setdefault(user, []).append(rows)
    kept = [rows for talks in by_user.values() if len(talks) >= min_conversations for rows in talks]
    if not kept:
        most = max(map(len, by_user.values()), default=0)
        raise DataError(
            f"{path}: none of {len(by_user)} users has {min_conversations} conversations with a choice (at most {most}); "
            "expected the whole conversations.jsonl, or lower min_conversations"
        )
    return load_valid_pairs([row for rows in kept for row in rows])


def prism_split(pairs: PairSet, recipe: Recipe = MRM, *, seed: int | None = None) -> PairSet:
    """The same choices with the recipe's split in their column: `train`, `test_seen`, `support`, `test_unseen`.

    Whole conversations fall on one side. For `MRM` the users and conversations are the very ones of the published scripts (seed
    42, and one more for each repeat). LoRe's draws cannot be had again: its users were drawn without a seed in June, and what is
    shuffled now is not stored. For its recipes the proportions are the published ones and the draws are ours.

    Args:
        pairs: what `load_prism` gave with the same recipe.
        seed: by default the recipe's.

    Returns:
        Users without one of the sides (all of whose conversations fall together) have no split.

    Raises:
        DataError: a negative seed, choices without a conversation, or nobody with two sides.
    """
    drawn = recipe.seed if seed is None else seed
    if drawn < 0:
        raise DataError(f"seed is {drawn}; expected 0 or more")
    if not recipe.published_draws:
        return with_split(pairs, split(pairs, by="conversation", unseen=recipe.unseen, test=0.5, seed=drawn))
    labels = np.full(len(pairs), None, dtype=np.object_)
    seen = set(python_order(drawn, len(pairs.user_ids))[: len(pairs.user_ids) // 2])
    order = np.argsort(pairs.user_index, kind="stable")
    bounds = np.searchsorted(pairs.user_index[order], np.arange(1, len(pairs.user_ids)))
    for number, (user, own) in enumerate(zip(pairs.user_ids, np.split(order, bounds), strict=True)):
        talks = list(dict.fromkeys(pairs.conversation[own].tolist()))  # in the order in which they come
        if None in talks:
            raise DataError(f"a choice of user {user!r} has no conversation; expected what load_prism gave")
        if len(talks) < 2:
            continue
        shuffled = [talks[i] for i in python_order(of_user(drawn, user), len(talks))]
        learned = set(shuffled[: len(talks) // 2])
        names = ("train", "test_seen") if number in seen else ("support", "test_unseen")
        for row in own:
            labels[row] = names[0] if pairs.conversation[row] in learned else names[1]
    if not any(label is not None for label in labels):
        raise DataError(
            f"none of {len(pairs.user_ids)} users has two conversations; expected at least one to learn from and one to test"
        )
    return replace(pairs, split=labels)


def _without_conversations(path: Path) -> set[str]:
    def absent(row: Mapping[str, Any]) -> list[str]:
        return [] if row["num_completed_conversations"] else [row["user_id"]]

    return {
        user for found in _of_lines(path, "survey.jsonl, with user_id and num_completed_conversations", absent) for user in found
    }


def _conversations(path: Path, recipe: Recipe) -> Iterator[tuple[str, "list[Row] | None"]]:
    def told(row: Mapping[str, Any]) -> tuple[str, "list[Row] | None"]:
        user, conversation, turns = row["user_id"], row["conversation_id"], list(_turns(row["conversation_history"]))
        if isinstance(user, list | dict):
            raise TypeError(f"user_id is {user!r:.60}")
        counts = any(recipe.max_turn is None or turn.length <= recipe.max_turn for turn in turns)
        return user, list(_choices(user, conversation, turns, recipe)) if counts else None

    return _of_lines(path, "conversations.jsonl, with user_id, conversation_id and conversation_history", told)


def _of_lines(path: Path, expected: str, meaning: Callable[[Mapping[str, Any]], Any]) -> Iterator[Any]:
    def told(record: Record) -> Any:
        if not isinstance(record.row, Mapping):
            raise TypeError(record.problem.message if record.problem else "no object")
        return meaning(record.row)

    for record in records(path, "jsonl"):
        if record.blank:
            continue
        try:
            yield told(record)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {record.line}: {error!r}; expected PRISM's {expected} in each line (get the file again)"
            ) from error


def _turns(history: list[Row]) -> Iterator[_Turn]:
    for _, group in groupby(sorted(history, key=lambda said: said["turn"]), key=lambda said: said["turn"]):
        said = list(group)
        asked = [one["content"] for one in said if one["role"] == "user"]
        chosen = [one for one in said if one["role"] != "user" and one["if_chosen"]]
        others = [one for one in said if one["role"] != "user" and not one["if_chosen"]]
        if asked and chosen and others:
            yield _Turn(asked[0], chosen[0], others)


def _choices(user: str, conversation: str, turns: list[_Turn], recipe: Recipe) -> Iterator[Row]:
    talk: list[Row] = []
    for turn in turns:
        talk = [*talk, {"role": "user", "content": turn.asked}]
        told = "\n".join(f"{said['role']}: {said['content']}" for said in talk) if len(talk) > 1 else turn.asked
        # a turn without words has no text: as turns the row is reported, as a text it would say "None"
        as_text = recipe.as_text and all(isinstance(said["content"], str) for said in talk)
        for other in turn.others:
            row: Row = {"user_id": user, "conversation_id": conversation, "prompt": told if as_text else talk}
            row |= {side: one["content"] for side, one in (("chosen", turn.chosen), ("rejected", other))}
            if recipe.max_side is not None and _size(told) + max(_size(row["chosen"]), _size(row["rejected"])) >= recipe.max_side:
                continue
            scores = turn.chosen.get("score"), other.get("score")
            if scores[0] is not None and scores[1] is not None and scores[0] >= scores[1]:
                row["margin"] = float(scores[0] - scores[1])
            yield row
        talk = [*talk, {"role": "assistant", "content": turn.chosen["content"]}]
