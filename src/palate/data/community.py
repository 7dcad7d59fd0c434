"""Community Alignment (Meta, arXiv 2507.09650), and files in its shape: an annotator reads four answers and marks the best one.

A mark becomes three choices, the marked answer over each other one. `load_community_alignment` reads the published file, in which
a record is a conversation of up to four turns; `load_community` reads files of one mark a record, whose columns the caller names.

The columns of the published file could not be read from the file itself when this was written; they are those that several
programs of other people read from it. Where one is called otherwise in a later version, the error lists those that are there.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palate.data.foreign import Row, Source, choices_in, text
from palate.data.pairs import PairSet
from palate.data.rows import Problem, Reason
from palate.data.validation import ValidationReport
from palate.errors import DataError

TURNS, LETTERS = ("first", "second", "third", "fourth"), "abcd"
ABSENT = ("", "nan", "none", "empty string")  # what a missing cell was written as, in lower case
END = "<|end_of_text|>"  # left at the end of some answers by the models that wrote them


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
        if languages is not None and columns.language is not None and not _spoken(row, columns.language, languages):
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


def load_community_alignment(source: Source, *, languages: Collection[str] | None = None) -> tuple[PairSet, ValidationReport]:
    """The published file: in every turn the marked answer over each of the others, and the report on rows that were left out.

    The prompt of a turn is the conversation up to it, with the answers that the annotator marked. It ends at the first turn
    without a prompt or a mark: what was said after a gap answers something that is not there. An answer that is not there, or
    says the same as the marked one, is left out. The choices of one mark share a weight of 1; `conversation_id` keeps turns
    together.

    Args:
        source: `community_alignment.csv`, or Parquet, one file or several, or rows.
        languages: keep these values of `assigned_lang` only, such as {"en"}.

    Raises:
        DataError: a column that is not there, or no good row in these languages.
    """

    def rows(row: Mapping[str, Any]) -> Iterator[Row | Problem]:
        if languages is not None and not _spoken(row, "assigned_lang", languages):
            return
        said: list[Row] = []
        for turn in TURNS:
            asked, best = _cell(row, f"{turn}_turn_prompt"), _cell(row, f"{turn}_turn_preferred_response")
            if asked is None or best is None:
                if not said:
                    raise DataError("the first turn has no prompt or no marked answer")
                return
            answers = {f"response_{letter}": _cell(row, f"{turn}_turn_response_{letter}") for letter in LETTERS}
            chosen = answers.get(best)
            if chosen is None:
                message = f"{turn}_turn_preferred_response is {best!r:.60}; expected one of the answers that are there"
                yield Problem(Reason.WRONG_TYPE, message)  # the turns before it said what they said
                return
            said.append({"role": "user", "content": asked})
            others = dict.fromkeys(answer for answer in answers.values() if answer is not None and answer != chosen)
            for other in others:
                talk: Row = {"prompt": asked if len(said) == 1 else list(said), "chosen": chosen, "rejected": other}
                whose: Row = {"user_id": row["annotator_id"], "conversation_id": row["conversation_id"]}
                yield talk | whose | {"weight": 1 / len(others)}
            said.append({"role": "assistant", "content": chosen})

    named = (f"{turn}_turn_{what}" for turn in TURNS for what in ("prompt", "preferred_response"))
    answers = (f"{turn}_turn_response_{letter}" for turn in TURNS for letter in LETTERS)
    return choices_in([(source, rows)], ["annotator_id", "conversation_id", "assigned_lang", *named, *answers])


def _spoken(row: Mapping[str, Any], column: str, languages: Collection[str]) -> bool:
    """Whether the row is in one of the languages; where nobody said in which, it is not."""
    value = row[column]
    if value is None or value != value:  # NaN, as tables have it
        return False
    if not isinstance(value, str):
        raise DataError(f"{column} is {value!r:.60} ({type(value).__name__}); expected a language, a text such as 'en'")
    return value in languages


def _cell(row: Mapping[str, Any], column: str) -> str | None:
    """The text in a column, None for one of the ways to write that there is none."""
    value = row[column]
    if value is None or value != value:  # NaN, as tables have it
        return None
    if not isinstance(value, str):
        raise DataError(f"{column} is {value!r:.60} ({type(value).__name__}); expected a text")
    found = value.strip().removesuffix(END).rstrip()
    return None if found.lower() in ABSENT else found
