"""What is known of people beside their choices, as numbers: the columns of `AttributePrior`."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from palate.errors import DataError

Table = Mapping[str, Mapping[str, float | str]]  # user id -> attribute -> a number, or a word

FEWEST = 5  # seen users of a column, below which it counts as unknown
FAR = 4.0  # standard deviations beyond which a number counts as this far: nothing was learned out there


class Column(NamedTuple):
    """A number of a user, or, with a word, whether the attribute is that word."""

    name: str
    word: str | None


def checked(attributes: Table) -> Table:
    """A copy with numbers as floats and ids as texts, as choices have them. Raises `DataError` for another shape, for two ids of
    one text, and for what is neither a finite number nor a word, or both."""
    if not isinstance(attributes, Mapping):
        raise DataError(
            f"attributes are {attributes!r:.60} ({type(attributes).__name__}); expected a mapping from user ids to attributes, "
            "such as {'ada': {'age': 41, 'region': 'north'}} (of a data frame, frame.to_dict('index'))"
        )
    out: dict[str, dict[str, float | str]] = {}
    kinds: dict[str, type] = {}
    for user, mine in attributes.items():
        if not isinstance(mine, Mapping):
            raise DataError(
                f"the attributes of user {user!r} are {mine!r:.60} ({type(mine).__name__}); expected a mapping from names to "
                "numbers and words, such as {'age': 41, 'region': 'north'}"
            )
        if str(user) in out:
            raise DataError(f"the attributes have user {user!r} twice, as a text and as another; expected each id once")
        own = out[str(user)] = {}
        for name, value in mine.items():
            if not isinstance(value, str):
                try:
                    value = float(value)
                except (TypeError, ValueError):
                    value = math.nan
                if not math.isfinite(value):
                    raise DataError(
                        f"attribute {name!r} of user {user!r} is {mine[name]!r}; expected a finite number or a word, "
                        "and no entry where it is unknown"
                    )
            if kinds.setdefault(name, type(value)) is not type(value):
                raise DataError(f"attribute {name!r} is a number for some users and a word for {user!r}; expected one of the two")
            own[name] = value
    return out


def columns_of(attributes: Table, users: Sequence[str]) -> tuple[tuple[Column, ...], Counter[str]]:
    """The columns that these users' attributes make, in the order of their names, and how many each attribute lost because
    fewer than `FEWEST` of them have it."""
    held = Counter(
        Column(name, value if isinstance(value, str) else None)
        for user in users
        for name, value in attributes.get(user, {}).items()
    )
    rare = Counter(column.name for column, n in held.items() if n < FEWEST)
    kept = [column for column, n in held.items() if n >= FEWEST]
    return tuple(sorted(kept, key=lambda column: (column.name, column.word or ""))), rare


def unknown_words(attributes: Table, columns: Sequence[Column]) -> Counter[str]:
    """For each attribute, how many users have a word of which the model has no column."""
    known = set(columns)
    return Counter(
        name
        for mine in attributes.values()
        for name, value in mine.items()
        if isinstance(value, str) and Column(name, value) not in known
    )


def encoded(attributes: Table, users: Sequence[str], columns: Sequence[Column]) -> tuple[Tensor, Tensor]:
    """(U, A) float64, NaN where it is unknown, and (U,) whether anything is known of a user."""
    known = set(columns)

    def cell(mine: Mapping[str, float | str], column: Column) -> float:
        value = mine.get(column.name)
        if isinstance(value, str):
            return float(value == column.word) if Column(column.name, value) in known else math.nan
        return math.nan if value is None or column.word is not None else value

    rows = [[cell(attributes.get(user, {}), column) for column in columns] for user in users]
    table = torch.tensor(rows, dtype=torch.float64).reshape(len(users), len(columns))
    return table, ~torch.isnan(table).all(1)


def moments(table: Tensor, columns: Sequence[Column]) -> tuple[Tensor, Tensor]:
    """Centre (A,) and size (A,): mean and standard deviation of a number, and half for a word, so that a rare one counts less.

    A number that is the same for everybody has no size to divide by: it counts as known and moves nobody.
    """
    there = ~torch.isnan(table)
    centre = table.nanmean(0)
    away = torch.where(there, table - centre, 0.0)
    size = (away.square().sum(0) / there.sum(0)).sqrt()
    words = torch.tensor([column.word is not None for column in columns])
    size = torch.where(words, torch.full_like(size, 0.5), size)
    return centre, torch.where(size > 1e-9 * centre.abs().clamp(min=1e-30), size, torch.ones_like(size))


def standard(table: Tensor, centre: Tensor, size: Tensor) -> Tensor:
    """(U, A) in standard deviations, at most `FAR` of them; 0 where it is unknown."""
    return ((table - centre) / size).nan_to_num(nan=0.0).clamp(-FAR, FAR)
