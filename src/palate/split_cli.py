"""Which choices are learned from and which are told: the same options for `palate compare` and `palate judge`."""

from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from palate.errors import DataError

if TYPE_CHECKING:
    from palate.data.pairs import PairSet
    from palate.data.splits import By

ITEM_PAIRS = 40  # pairs made of votes are products of two short lists: more of them say little that is new
MIN_SUPPORT = 3

MaxSupport = Annotated[
    int | None,
    typer.Option(help=f"At most so many choices of a user to learn from; by default all, by item {ITEM_PAIRS}.", min=1),
]
MaxTest = Annotated[
    int | None,
    typer.Option(help=f"At most so many choices of a user to tell; by default all, by item {ITEM_PAIRS}.", min=1),
]
MinSupport = Annotated[
    int | None,
    typer.Option(help=f"Leave out users with fewer choices to learn from.  [default: {MIN_SUPPORT}]", min=1),
]


class Sides(NamedTuple):
    """What `palate.evaluation.comparison.drawn` is asked for."""

    by: "By"
    max_support: int | None = None
    max_test: int | None = None
    min_support: int = 1


def sides(pairs: "PairSet", by: "By | None", max_support: int | None, max_test: int | None, min_support: int | None) -> Sides:
    """The options with what is usual where nothing is said.

    A `split` column is taken as it is: `max_support` and `max_test` lessen it only where they are given.

    Raises:
        DataError: `min_support` where the rows have a `split` column, which has said already who is tested.
    """
    from palate.encoders.base import usual_unit
    from palate.evaluation.comparison import is_given

    given = is_given(pairs)
    if given and min_support is not None:
        raise DataError(f"--min-support {min_support}: the rows have a split column, which says who is tested; leave one out")
    by = usual_unit(pairs) if by is None else by
    if given:
        return Sides(by, max_support, max_test)
    usual = ITEM_PAIRS if by == "item" else None
    return Sides(by, max_support or usual, max_test or usual, min_support or MIN_SUPPORT)
