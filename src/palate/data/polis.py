"""Votes of a Polis export (compdemocracy.org/polis) as choices: every statement agreed with over every one disagreed with.

An export is a folder with `comments.csv` (a statement a row) and `participants-votes.csv` (a participant a row, a statement a
column: 1 agree, 0 pass, -1 disagree, empty for not seen). Passes are not used: taken as a middle level they add pairs that
say little and lower what every method can reach.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from palate.data.pairs import Choice
from palate.data.rows import Problem, Reason
from palate.data.sources import Record, csv_records
from palate.errors import DataError


def _statements(folder: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    path = folder / "comments.csv"
    if not path.is_file():
        raise DataError(f"{folder} has no comments.csv; expected the two files of a Polis export")
    for record in csv_records(path, ("comment-id", "comment-body")):
        if record.problem is not None:
            raise DataError(f"{path}, line {record.line}: {record.problem.message}")
        if isinstance(record.row, dict) and record.row["comment-body"].strip():
            texts[record.row["comment-id"].strip()] = record.row["comment-body"]
    return texts


def _votes(row: Mapping[str, str], texts: Mapping[str, str]) -> "tuple[list[str], list[str]] | Problem":
    sides: dict[str, list[str]] = {"1": [], "-1": [], "0": []}
    for statement, cell in row.items():
        if statement not in texts or not cell.strip():
            continue
        vote = cell.strip().removeprefix("+").removesuffix(".0")
        if vote not in sides:
            message = f"the vote on statement {statement} is {cell!r}; expected 1 (agree), 0 (pass), -1 (disagree) or nothing"
            return Problem(Reason.BAD_VOTE, message)
        sides[vote].append(texts[statement])
    return sides["1"], sides["-1"]


def polis_choices(
    folder: Path, *, min_votes: int = 20, min_agrees: int = 4, min_disagrees: int = 4
) -> Iterator[tuple[Record, list[Choice], list[Problem]]]:
    """(record, choices, problems) of every participant, in the order of the file; the prompt of every choice is "".

    A participant has no choices who has fewer than `min_votes` agrees and disagrees together, or fewer than `min_agrees` or
    `min_disagrees` of one kind. Two statements with the same text are the same text: who agrees with one and disagrees with the
    other has said nothing about it. Raises `DataError` for a folder that is not an export. O(votes + choices).
    """
    texts = _statements(folder)
    lines: dict[str, int] = {}
    for record in csv_records(folder / "participants-votes.csv", ("participant",)):
        if not isinstance(record.row, dict):
            yield record, [], [record.problem] if record.problem else []
            continue
        user = record.row["participant"].strip()
        found: tuple[list[str], list[str]] | Problem = _votes(record.row, texts)
        if not user:
            found = Problem(Reason.MISSING_USER, "the participant is empty; expected an id")
        elif user in lines:
            found = Problem(Reason.DUPLICATE, f"participant {user!r} stands in line {lines[user]} already; keep one of them")
        if isinstance(found, Problem):
            yield record, [], [found]
            continue
        lines[user] = record.line
        agreed, disagreed = found
        record = record._replace(row=None)  # its columns are statements, not unknown columns
        enough = len(agreed) + len(disagreed) >= min_votes and len(agreed) >= min_agrees and len(disagreed) >= min_disagrees
        both = set(agreed) & set(disagreed)
        liked, disliked = ([text for text in dict.fromkeys(side) if text not in both] for side in found)
        yield record, [Choice(user, "", a, d) for a in liked for d in disliked] if enough else [], []
