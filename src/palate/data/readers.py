"""From a file, a `datasets.Dataset` or a list of dicts to a `PairSet`: strictly, or with the bad rows set aside."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from palate.data.pairs import Choice, PairSet
from palate.data.polis import polis_choices
from palate.data.validation import Tally, ValidationReport, checked, validate
from palate.errors import DataError

__all__ = ["load_pairs", "load_polis", "load_valid_pairs", "validate"]


def _read(source: "str | os.PathLike[str] | Iterable[object]", format: str | None) -> tuple[PairSet, ValidationReport]:
    tally = Tally(source)

    def good() -> Iterator[Choice]:
        for record, choices, problems in checked(source, format):
            tally.add(record, choices, problems)
            yield from choices

    return PairSet.from_choices(good()), tally.report()


def some(pairs: PairSet, report: ValidationReport) -> PairSet:
    """`pairs`, if there are any; `DataError` with the first bad rows otherwise."""
    if not len(pairs):
        raise DataError(f"no choice to learn from in {report.summary()}\nexpected at least one good row")
    return pairs


def _strict(pairs: PairSet, report: ValidationReport) -> PairSet:
    if report.n_bad:
        what = "`palate validate` writes the good rows on and sets the bad ones aside; load_valid_pairs leaves them out"
        raise DataError(f"{report.summary()}\n{what}")
    return some(pairs, report)


def load_pairs(path_or_dataset: "str | os.PathLike[str] | Iterable[object]", format: str | None = None) -> PairSet:
    """The choices of a file or data set, all of them or an error.

    Rows are TRL preference rows with a `user_id` (see `palate.data.rows` for shapes, columns and what makes a row bad).

    Args:
        path_or_dataset: a path to JSON Lines, CSV (either may be compressed with gzip) or Parquet; the folder of a Polis export
            (`load_polis` has its thresholds); a `datasets.Dataset`; or any iterable of dicts.
        format: 'jsonl', 'csv', 'parquet' or 'polis'; by default by the name, for a folder by what is inside.

    Raises:
        DataError: any bad row; the message names the source, the first lines with their reasons, and how many there are.
        MissingExtraError: Parquet without pyarrow.

    Costs one pass; memory is that of the distinct texts and the rows' numbers. About 25 microseconds a row on one core.
    """
    return _strict(*_read(path_or_dataset, format))


def load_valid_pairs(
    path_or_dataset: "str | os.PathLike[str] | Iterable[object]",
    format: str | None = None,
    *,
    quarantine: "str | os.PathLike[str] | None" = None,
) -> tuple[PairSet, ValidationReport]:
    """The good choices of what `load_pairs` takes, and the report on the rest; the bad rows go to `quarantine` if given.

    Raises `DataError` only where there is no good row at all. With `quarantine` the rows are gone through twice.
    """
    if quarantine is not None:
        if not isinstance(path_or_dataset, (str, os.PathLike)):
            path_or_dataset = list(path_or_dataset)
        validate(path_or_dataset, quarantine=quarantine, format=format)
    pairs, report = _read(path_or_dataset, format)
    return some(pairs, report), report


def load_polis(
    folder: "str | os.PathLike[str]", *, min_votes: int = 20, min_agrees: int = 4, min_disagrees: int = 4
) -> tuple[PairSet, ValidationReport]:
    """Every (agreed, disagreed) pair of statements of every participant with enough votes, and the report on the rest.

    The prompt of every choice is "". `min_votes` counts agrees and disagrees together; passes are not used. See
    `palate.data.polis`. Raises `DataError` for a folder that is not a Polis export, or if nobody has voted enough.
    """
    tally = Tally(folder)

    def good() -> Iterator[Choice]:
        thresholds = {"min_votes": min_votes, "min_agrees": min_agrees, "min_disagrees": min_disagrees}
        for record, choices, problems in polis_choices(Path(folder), **thresholds):
            tally.add(record, choices, problems)
            yield from choices

    pairs = PairSet.from_choices(good())
    return some(pairs, tally.report()), tally.report()
