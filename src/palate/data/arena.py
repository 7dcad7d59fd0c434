"""PersonalRewardBench (SynthesizeMe, arXiv 2506.05598): people of Chatbot Arena and of PRISM, with a split that is given.

Two data sets of one shape on the Hugging Face Hub, `MichaelR207/chatbot_arena_personalized_0125` (131 users) and
`MichaelR207/prism_personalized_0125` (723): a user's choices are filtered for questions on which people can differ, and stand in
`train`, `val` and `test`. It is not the split of LoRe or MRM, and figures on it are not comparable with theirs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from palate.data.foreign import Meaning, Row, Source, choices_in
from palate.data.pairs import PairSet
from palate.data.validation import ValidationReport
from palate.errors import DataError


@dataclass(frozen=True)
class Columns:
    """Where a file of this shape keeps what. The defaults are those of the published code, SALT-NLP/SynthesizeMe.

    Attributes:
        user: who chose.
        context: what came before the two answers: a text, or a list of turns with `role` and `content`.
        chosen, rejected: the answers: texts, turns, or lists that end with the answer's turn. The turns before it have to be the
            same on both sides, and are the context where that is empty.
    """

    user: str = "user_id"
    context: str = "context"
    chosen: str = "chosen"
    rejected: str = "rejected"


def load_arena(
    train: Source, val: Source, test: Source, *, columns: Columns | None = None, unseen: float = 0.5, seed: int = 0
) -> tuple[PairSet, ValidationReport]:
    """The choices with the given split in ours, and the report on rows that were left out.

    Of each user `train` and `val` are learned from and `test` is tested. There every user is fitted by themselves; for methods
    that learn from other people a share of the users, drawn with the seed, is unseen: `support` and `test_unseen`.

    Args:
        train, val, test: the published parts, as files (JSON Lines, Parquet, CSV) or rows.
        columns: how the columns are called; a missing one is an error that lists those that are there.
        unseen: share of the users that nothing is fitted on, rounded; 0 for none, as published.
        seed: of that draw.

    Raises:
        DataError: a column that is not there, no good row, a share outside [0, 1) or a negative seed.
    """
    named = columns or Columns()
    if not 0 <= unseen < 1:
        raise DataError(f"unseen is {unseen}; expected a fraction of at least 0 and below 1")
    if seed < 0:
        raise DataError(f"seed is {seed}; expected 0 or more")
    required = (named.user, named.context, named.chosen, named.rejected)
    parts = [(source, _meaning(named, side)) for source, side in ((train, "train"), (val, "train"), (test, "test_seen"))]
    pairs, report = choices_in(parts, required)
    shuffled = np.random.default_rng(seed).permutation(len(pairs.user_ids))
    new = np.zeros(len(pairs.user_ids), dtype=np.bool_)
    new[shuffled[: round(unseen * len(shuffled))]] = True
    pairs.split[new[pairs.user_index] & (pairs.split == "train")] = "support"
    pairs.split[new[pairs.user_index] & (pairs.split == "test_seen")] = "test_unseen"
    return pairs, report


def _meaning(named: Columns, side: str) -> Meaning:
    def rows(row: Mapping[str, Any]) -> Iterator[Row]:
        context = row[named.context]
        prompt = context if isinstance(context, str) else _turns(context, named.context)
        (before, chosen), (other, rejected) = _answer(row, named.chosen), _answer(row, named.rejected)
        if before != other:
            raise DataError(f"{named.chosen} and {named.rejected} answer different turns; expected two answers to the same")
        yield {"user_id": row[named.user], "prompt": prompt or before, "chosen": chosen, "rejected": rejected, "split": side}

    return rows


def _answer(row: Mapping[str, Any], column: str) -> tuple[list[Row], str]:
    """The turns before an answer, and its words: a text, a turn, or the last turn of a list. The same lines for both sides."""
    value = row[column]
    if isinstance(value, str):
        return [], value
    turns = _turns([value] if isinstance(value, Mapping) else value, column)
    if not turns or turns[-1]["role"] != "assistant":
        last = turns[-1]["role"] if turns else "nobody"
        raise DataError(f"{column} ends with a turn of {last!r}; expected the answer of 'assistant'")
    return turns[:-1], turns[-1]["content"]


def _turns(value: object, column: str) -> list[Row]:
    turns = value if isinstance(value, list) else None
    if turns is None or not all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in turns):
        raise DataError(f"{column} is {value!r:.60}; expected a text, or turns with role and content")
    # PRISM says "model", and its half of the benchmark still does
    return [{"role": "assistant" if turn["role"] == "model" else turn["role"], "content": turn["content"]} for turn in turns]
