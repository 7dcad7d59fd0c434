"""PRISM (Kirk et al. 2024): people from 75 countries talking to several language models and saying which answer was best.

`conversations.jsonl` of `HannahRoseKirk/prism-alignment` as choices: in each turn the chosen answer against each of the others,
after the earlier turns with the answers that were chosen, which is how the conversation went on.
"""

import os
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from palate.data.pairs import PairSet
from palate.data.readers import load_valid_pairs
from palate.data.sources import records
from palate.data.validation import ValidationReport
from palate.errors import DataError

Row = dict[str, Any]


def load_prism(path: "str | os.PathLike[str]", *, min_conversations: int = 6) -> tuple[PairSet, ValidationReport]:
    """The choices of PRISM's `conversations.jsonl`, and the report on rows that were left out.

    As the MRM repository prepares them: a turn counts if it has a user's words, a chosen answer and another one; users with fewer
    than `min_conversations` that have such a turn are left out. Besides, the 1-100 scores that users gave are kept: `margin` is
    how much higher the chosen answer was scored, where it was. Texts of both sides go through the same lines of code.

    Raises:
        DataError: a file that is not PRISM's, with the line; nobody with enough conversations.
    Cost: one pass; memory is that of the file.
    """
    by_user: dict[str, list[list[Row]]] = {}
    for user, rows in _conversations(Path(path)):
        if rows:
            by_user.setdefault(user, []).append(rows)
    kept = [rows for talks in by_user.values() if len(talks) >= min_conversations for rows in talks]
    if not kept:
        most = max(map(len, by_user.values()), default=0)
        raise DataError(
            f"{path}: none of {len(by_user)} users has {min_conversations} conversations with a choice (at most {most}); "
            "expected the whole conversations.jsonl, or lower min_conversations"
        )
    return load_valid_pairs([row for rows in kept for row in rows])


def _conversations(path: Path) -> Iterator[tuple[str, list[Row]]]:
    for record in records(path, "jsonl"):
        if record.blank:
            continue
        row = record.row
        try:
            if not isinstance(row, Mapping):
                raise TypeError(record.problem.message if record.problem else "no object")
            user, conversation = row["user_id"], row["conversation_id"]
            yield user, list(_choices(user, conversation, row["conversation_history"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {record.line}: {error!r}; expected PRISM's conversations.jsonl, with user_id, conversation_id and "
                "conversation_history in each line (get the file again)"
            ) from error


def _choices(user: str, conversation: str, history: list[Row]) -> Iterator[Row]:
    talk: list[Row] = []
    for _, group in groupby(sorted(history, key=lambda said: said["turn"]), key=lambda said: said["turn"]):
        said = list(group)
        asked = [one["content"] for one in said if one["role"] == "user"]
        chosen = [one for one in said if one["role"] != "user" and one["if_chosen"]]
        others = [one for one in said if one["role"] != "user" and not one["if_chosen"]]
        if not (asked and chosen and others):
            continue
        talk = [*talk, {"role": "user", "content": asked[0]}]
        for other in others:
            row: Row = {"user_id": user, "conversation_id": conversation, "prompt": talk}
            row |= {side: one["content"] for side, one in (("chosen", chosen[0]), ("rejected", other))}
            scores = chosen[0].get("score"), other.get("score")
            if scores[0] is not None and scores[1] is not None and scores[0] >= scores[1]:
                row["margin"] = float(scores[0] - scores[1])
            yield row
        talk = [*talk, {"role": "assistant", "content": chosen[0]["content"]}]
