"""Files in the shape of Community Alignment (Meta): an annotator reads four answers to a prompt and marks the best one.

One record becomes three choices, the marked answer over each other one. The published column names are not built in, because
they could not be checked when this was written: the caller names them once.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palate.data.foreign import Row, Source, choices_in, text
from palate.data.pairs import PairSet
from palate.data.validation import ValidationReport
from palate.errors import DataError


@dataclass(frozen=True)
class Columns:
    """Where a file of this shape keeps what.

    Attributes:
        annotator: who chose.
        prompt: what was asked: a text, or the turns so far.
        answers: the columns of the candidates, two or more (four in Community Alignment).
        preferred: which one was marked.
        labels: what `preferred` says for each of `answers`, in their order; by default the name of its column.
        conversation: what must not be split, if there is such a column.
        language: in which the annotator worked, if there is such a column.
    """

    annotator: str
    prompt: str
    answers: Sequence[str]
    preferred: str
    labels: Sequence[object] | None = None
    conversation: str | None = None
    language: str | None = None


def load_community(
    source: Source, columns: Columns, *, languages: Collection[str] | None = None
) -> tuple[PairSet, ValidationReport]:
    """The marked answer over each of the others, and the report on rows that were left out.

    The three choices of one mark share a weight of 1, because they are one judgement. An answer that says the same as the marked
    one is a bad row of its own and costs the others nothing.

    Args:
        source: JSON Lines, CSV, Parquet (one file or several), or rows.
        columns: how they are called in your copy.
        languages: keep these only; needs `columns.language`.

    Raises:
        DataError: a column that is not there, columns that cannot be, or no good row in these languages.
    """
    labels = list(columns.answers if columns.labels is None else columns.labels)
    if len(columns.answers) < 2 or len(labels) != len(columns.answers) or len(set(map(str, labels))) < len(labels):
        raise DataError(
            f"the answers are {list(columns.answers)} and the labels {labels}; expected at least two, each with its own label"
        )
    if languages is not None and columns.language is None:
        raise DataError(f"languages are {sorted(languages)}, but no column of the language is named; expected columns.language")
    place_of = {str(label): place for place, label in enumerate(labels)}

    def rows(row: Mapping[str, Any]) -> Iterator[Row]:
        if languages is not None and columns.language is not None and row[columns.language] not in languages:
            return
        answers = [text(row, column) for column in columns.answers]
        best = place_of.get(str(row[columns.preferred]))
        if best is None:
            raise DataError(f"{columns.preferred} is {row[columns.preferred]!r:.60}; expected one of {labels}")
        shared: Row = {"user_id": row[columns.annotator], "prompt": row[columns.prompt], "weight": 1 / (len(answers) - 1)}
        if columns.conversation is not None:
            shared["conversation_id"] = row[columns.conversation]
        for place, answer in enumerate(answers):
            if place != best:
                yield shared | {"chosen": answers[best], "rejected": answer}

    optional = [name for name in (columns.conversation, columns.language) if name is not None]
    return choices_in([(source, rows)], [columns.annotator, columns.prompt, *columns.answers, columns.preferred, *optional])
