"""Exports of Argilla: records that several annotators answered, as choices of each annotator.

A flattened export has for every question the columns `<question>.responses` (one answer a person), `<question>.responses.users`
and `<question>.responses.status`, beside the record's own fields. Which field holds what is up to whoever made the questions, so
the caller names them. Only submitted answers count; drafts and discarded ones are no judgement.

| the question | asks for | here |
|---|---|---|
| ranking | an order of the answers | `argilla_rankings` |
| label | which answer is better | `argilla_labels` |
| rating | a number for one answer | `argilla_ratings` |

`dataset.records.to_datasets().to_json("export.jsonl")` (or `.to_parquet`) is flattened. Argilla's own `to_json` and `to_disk` do
not say which answers were submitted, so their files are refused.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from palate.data.feedback import Ranking, Rating, from_rankings, from_ratings
from palate.data.foreign import Row, Source, choices_in, number, records_of, said_by, text
from palate.data.pairs import PairSet
from palate.data.rows import Problem, Reason, as_row
from palate.data.validation import Tally, ValidationReport
from palate.errors import DataError


class _Answer(NamedTuple):
    user: str
    value: Any


def argilla_rankings(
    source: Source, question: str, *, prompt: str, answers: Mapping[str, str] | Sequence[str], ties: bool = False
) -> tuple[PairSet, ValidationReport]:
    """Every answer over every one that an annotator ranked below it; the pairs of one ranking share a weight of 1.

    Args:
        source: the export as JSON Lines, Parquet or rows (a CSV has no lists).
        question: the name of the ranking question.
        prompt: the field that holds the prompt.
        answers: the fields that are ranked; where the question calls them otherwise, {its name there: field}.
        ties: answers of equal rank become ties instead of nothing.

    A ranking is a list of names from best to worst, or a list of `{"value": name, "rank": 1 is best}`. An annotator who ranked
    some of the answers said nothing about the rest.

    Raises:
        DataError: an export that is not flattened, a column that is not there, or no good row.
    """
    _check_flattened(source)
    field_of = dict(answers) if isinstance(answers, Mapping) else {name: name for name in answers}

    def rows(row: Mapping[str, Any]) -> Iterator[Row | Problem]:
        asked, fields = text(row, prompt), {name: text(row, field) for name, field in field_of.items()}
        for answer in _submitted(row, question):
            try:
                places = [[_known(fields, name, question) for name in place] for place in _places(answer.value, question)]
                found = from_rankings([Ranking(answer.user, asked, places)], ties=ties, per_event=True)
            except DataError as error:  # of one annotator; the others of the record said what they said
                yield Problem(Reason.WRONG_TYPE, f"annotator {answer.user!r}: {error}")
            else:
                yield from map(as_row, found)

    return choices_in([(source, rows)], [prompt, *field_of.values(), *_columns(question)])


def argilla_labels(
    source: Source, question: str, *, prompt: str, labels: Mapping[str, str | None]
) -> tuple[PairSet, ValidationReport]:
    """The answer that an annotator's label names over the other one.

    Args:
        source, question, prompt: as of `argilla_rankings`.
        labels: {label: field that it prefers}, of two fields; a label with None is a tie. {"A": "response-1", "B":
            "response-2", "same": None}, for example.

    Raises:
        DataError: labels of another number of fields, an export that is not flattened, a column that is not there, or no good
            row.
    """
    _check_flattened(source)
    fields = list(dict.fromkeys(field for field in labels.values() if field is not None))
    if len(fields) != 2:
        raise DataError(f"labels are {dict(labels)}; expected labels that prefer one of two fields, and perhaps some with None")

    def rows(row: Mapping[str, Any]) -> Iterator[Row | Problem]:
        first, second = (text(row, field) for field in fields)
        for answer in _submitted(row, question):
            if not isinstance(answer.value, str) or answer.value not in labels:
                message = f"annotator {answer.user!r}: the label is {answer.value!r:.60}; expected one of {', '.join(labels)}"
                yield Problem(Reason.WRONG_TYPE, message)
                continue
            wanted = labels[answer.value]
            chosen, rejected = (second, first) if wanted == fields[1] else (first, second)
            out: Row = {"user_id": answer.user, "prompt": text(row, prompt), "chosen": chosen, "rejected": rejected}
            yield out | ({"tie": True} if wanted is None else {})

    return choices_in([(source, rows)], [prompt, *fields, *_columns(question)])


def argilla_ratings(
    source: Source, question: str, *, prompt: str, answer: str, ties: bool = False
) -> tuple[PairSet, ValidationReport]:
    """The higher rated over the lower rated answer to the same prompt by the same annotator, who met them in different records.

    Args:
        source, question, prompt: as of `argilla_rankings`.
        answer: the field that holds the answer that was rated.
        ties: equal ratings become ties instead of nothing.

    Raises:
        DataError: an export that is not flattened, a column that is not there, no good row, or ratings of which no two can be
            compared.
    Cost: ratings are compared across records, so they are all held in memory.
    """
    _check_flattened(source)
    ratings: list[Rating] = []
    tally = Tally(source)

    def told(row: Mapping[str, Any]) -> list[Rating | Problem]:
        words = text(row, prompt), text(row, answer)
        if not words[1].strip():
            raise DataError(f"{answer} is {words[1]!r}; expected a text with something in it")
        return [_rating(one, words, question) for one in _submitted(row, question)]

    for record in records_of(source, [prompt, answer, *_columns(question)]):
        if record.blank:
            tally.add(record, [], [])
            continue
        found = said_by(record, told)
        for one in [found] if isinstance(found, Problem) else found:
            if isinstance(one, Problem):
                tally.add(record, [], [one])
            else:
                ratings.append(one)
    compared = from_ratings(ratings, ties=ties)
    if ratings and not compared:
        raise _incomparable(ratings, tally)
    return choices_in([(map(as_row, compared), lambda row: [dict(row)])], (), tally)


def _incomparable(ratings: list[Rating], tally: Tally) -> DataError:
    users = len({rating.user_id for rating in ratings})
    said = f"{tally.source}: {len(ratings)} ratings by {users} annotator{'s' if users > 1 else ''}, but "
    if from_ratings(ratings, ties=True):
        said += "all that can be compared are equal; keep them as ties with ties=True (--ties)"
    else:
        said += "none of them rated two answers to one prompt; expected some who did, as only their own ratings are compared"
    return DataError(said + (f"\nbesides, {tally.report().summary()}" if tally.bad else ""))


def _rating(answer: _Answer, words: tuple[str, str], question: str) -> Rating | Problem:
    if not answer.user.strip():
        return Problem(Reason.MISSING_USER, f"{question}.responses.users has {answer.user!r}; expected who rated")
    try:
        return Rating(answer.user, *words, number({question: answer.value}, question))
    except DataError as error:
        return Problem(Reason.WRONG_TYPE, f"annotator {answer.user!r}: {error}")


def _check_flattened(source: Source) -> None:
    """A list of records is what Argilla's own `to_json` and `to_disk` write: without the status of an answer."""
    if not isinstance(source, (str, os.PathLike)) or not Path(source).is_file():
        return
    with Path(source).open("rb") as file:
        if file.read(64).lstrip().startswith(b"["):
            raise DataError(
                f"{source} is one list of records, as Argilla's to_json and to_disk write them, which does not say which answers "
                'were submitted; expected a flattened export, dataset.records.to_datasets().to_json("export.jsonl")'
            )


def _columns(question: str) -> list[str]:
    return [f"{question}.responses", f"{question}.responses.users", f"{question}.responses.status"]


def _submitted(row: Mapping[str, Any], question: str) -> Iterator[_Answer]:
    """Who answered what. A record that nobody answered has empty lists, or nothing."""
    answers, users, status = (row[column] or [] for column in _columns(question))
    for name, values in zip(_columns(question), (answers, users, status), strict=True):
        if not isinstance(values, list):
            raise DataError(f"{name} is {values!r:.60}; expected a list with one entry an annotator")
    if not len(answers) == len(users) == len(status):
        raise DataError(
            f"{question} has {len(answers)} responses by {len(users)} users with {len(status)} states; expected as many of each"
        )
    for value, user, state in zip(answers, users, status, strict=True):
        if state == "submitted":
            yield _Answer(str(user) if user is not None else "", value)


def _places(value: object, question: str) -> list[list[str]]:
    """Names from best to worst, those of equal rank together."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{question}.responses has {value!r:.60}; expected a ranking, a list of names from best to worst")
    if all(isinstance(one, str) for one in value):
        return [[one] for one in value]
    by_rank: dict[float, list[str]] = {}
    for one in value:
        if not isinstance(one, Mapping) or not isinstance(one.get("value"), str) or one.get("rank") is None:
            raise DataError(f"{question}.responses has {one!r:.60} in a ranking; expected a name, or its value and rank")
        by_rank.setdefault(number(one, "rank"), []).append(one["value"])
    return [by_rank[rank] for rank in sorted(by_rank)]


def _known(fields: Mapping[str, str], name: str, question: str) -> str:
    if name not in fields:
        raise DataError(f"{question}.responses ranks {name!r:.60}; expected one of {', '.join(fields)}")
    return fields[name]
