"""The personas of PReF (arXiv 2503.06358): simulated people who compare an answer with its revision.

`preferences_dataset_{train,validation,calibration,test}.csv` as choices. They are often called PRISM, because the personas were
written from PRISM's participants, but the choices are a language model's and no person's.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from palate.data.foreign import Meaning, Row, Source, choices_in, number, text
from palate.data.pairs import PairSet
from palate.data.validation import ValidationReport
from palate.errors import DataError

COLUMNS = ("prompt", "response_1", "response_2", "persona", "persona_index", "preference")
_PARTS = (("train", "train"), ("validation", "test_seen"), ("calibration", "support"), ("test", "test_unseen"))


def load_personas(
    train: Source, validation: Source, calibration: Source, test: Source, *, first_wins: float = 1.0
) -> tuple[PairSet, ValidationReport]:
    """The choices of the four files in the sides of a split, and the report on rows that were left out.

    `train` stays, `validation` tests the same personas (`test_seen`), `calibration` is what is known of new ones (`support`) and
    `test` what they are tested on (`test_unseen`). A preference of .5, two answers in two orders that disagree, is a tie. A user
    is a persona's text: the index is a place within its file, and in different files the same place is different people.

    Args:
        train, validation, calibration, test: CSV (or JSON Lines, Parquet, rows) with `prompt`, `response_1`, `response_2`,
            `persona`, `persona_index` and `preference`, which is 0, .5 or 1.
        first_wins: the preference that says `response_1` is better; give 0.0 if your files mean it the other way round.

    Raises:
        DataError: a column that is not there, no good row, a persona on both sides of seen and unseen. A row whose index had
            another text earlier in its part is a bad row.
    """
    if first_wins not in (0.0, 1.0):
        raise DataError(f"first_wins is {first_wins}; expected 1.0 (a preference of 1 is for response_1) or 0.0")
    known: dict[bool, set[str]] = {True: set(), False: set()}
    parts = [
        (source, _meaning(name, side, first_wins, known[name in ("train", "validation")]))
        for source, (name, side) in zip((train, validation, calibration, test), _PARTS, strict=True)
    ]
    pairs, report = choices_in(parts, COLUMNS)
    if both := known[True] & known[False]:
        raise DataError(
            f"{len(both)} personas, such as {min(both)}, are in train or validation and in calibration or test; "
            "expected new people there (are the files in the order train, validation, calibration, test?)"
        )
    return pairs, report


def _meaning(name: str, side: str, first_wins: float, known: set[str]) -> Meaning:
    of_index: dict[str, str] = {}

    def rows(row: Mapping[str, Any]) -> Iterator[Row]:
        preference, persona, index = number(row, "preference"), text(row, "persona"), str(row["persona_index"])
        if preference not in (0.0, 0.5, 1.0):
            raise DataError(f"preference is {preference}; expected 0, 0.5 or 1")
        if not persona.strip():
            raise DataError(f"persona is {persona!r}; expected a description of somebody")
        user = f"persona-{hashlib.sha256(persona.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
        if of_index.setdefault(index, user) != user:
            raise DataError(f"persona_index {index} has another persona than earlier in {name}; expected one text for an index")
        known.add(user)
        first, second = text(row, "response_1"), text(row, "response_2")
        chosen, rejected = (first, second) if preference in (0.5, first_wins) else (second, first)
        out: Row = {"user_id": user, "prompt": text(row, "prompt"), "chosen": chosen, "rejected": rejected, "split": side}
        yield out | ({"tie": True} if preference == 0.5 else {})

    return rows
