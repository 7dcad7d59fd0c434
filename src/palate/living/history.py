"""Everything that one user ever said, kept so that it can be taken back: rows, and which event each of them came with.

Nothing here is ever summarised. A mean and a covariance alone drift away from the answer that all choices give together, and
nothing can be taken out of them again; the rows of a user's choices are a few thousand numbers.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from palate.errors import DataError
from palate.living.rows import Rows
from palate.living.terms import Floats, Ints, Terms

NO_TIME = float("nan")


class Forgetting(NamedTuple):
    """How fast old choices lose weight: 2^-(age / half_life), with the age in seconds, in later choices, or the product of both.

    A pull (a constraint that the user set) is not forgotten.
    """

    seconds: float | None = None
    choices: float | None = None

    def check(self) -> None:
        """Raise `DataError` unless every half-life is above 0 (infinity never forgets)."""
        for name, value in self._asdict().items():
            if value is not None and not value > 0:
                raise DataError(f"a half-life of {value} {name}; expected a number above 0, or None to forget nothing")


@dataclass(frozen=True, eq=False)
class History:
    """E events in the order in which they came, with the rows of all of them, one event's after another's.

    Attributes:
        ids: (E,) distinct names.
        at: (E,) unix seconds, NaN where none was given.
        n_terms, n_pulls: (E,) how many terms and pulls of `rows` each event brought.
        n_choices: (E,) how many choices each was: as many as terms where it was pairs, 1 where a person did one thing that
            several terms stand for (a rating, a ranking), 0 where it has no term.
        count: events that ever came, those taken back included: the next name that is given by itself.
    """

    ids: tuple[str, ...]
    at: Floats
    n_terms: Ints
    n_pulls: Ints
    n_choices: Ints
    rows: Rows
    count: int

    @classmethod
    def empty(cls, n_weights: int) -> Self:
        none = np.zeros(0, dtype=np.int64)
        return cls((), np.zeros(0), none, none, none, Rows.of(Terms.empty(n_weights)), 0)

    @classmethod
    def joined(cls, parts: "Sequence[History]", count: int) -> Self:
        """The events of all parts, whose names have to differ, one part's after another's."""
        ids = tuple(itertools.chain.from_iterable(part.ids for part in parts))
        columns = zip(*((part.at, part.n_terms, part.n_pulls, part.n_choices) for part in parts), strict=True)
        at, n_terms, n_pulls, n_choices = (np.concatenate(column) for column in columns)
        return cls(ids, at, n_terms, n_pulls, n_choices, Rows.concat([part.rows for part in parts]), count)

    def place(self, event_id: str) -> int:
        """Where an event stands. Raises `DataError` for one that is not here."""
        try:
            return self.ids.index(event_id)
        except ValueError:
            raise absent(event_id, self.ids) from None

    def appended(self, rows: Rows, n_choices: int, event_id: str | None, at: float | None) -> "History":
        """With one more event at the end."""
        return History(
            (*self.ids, named(event_id, self.ids, self.count)),
            np.append(self.at, time_of(at)),
            np.append(self.n_terms, rows.n_terms),
            np.append(self.n_pulls, len(rows.level)),
            np.append(self.n_choices, n_choices),
            Rows.concat([self.rows, rows]),
            self.count + 1,
        )

    def extended(self, rows: Rows, n_terms: Ints, n_pulls: Ints) -> "History":
        """With several more events at the end, under names of their own and without times, each one choice if it has a term."""
        taken, n = set(self.ids), len(n_terms)
        free = (name for number in itertools.count(self.count) if (name := f"event-{number}") not in taken)
        return History(
            (*self.ids, *itertools.islice(free, n)),
            np.append(self.at, np.full(n, NO_TIME)),
            np.append(self.n_terms, n_terms),
            np.append(self.n_pulls, n_pulls),
            np.append(self.n_choices, np.minimum(n_terms, 1)),
            Rows.concat([self.rows, rows]),
            self.count + n,
        )

    def without(self, event_id: str) -> "History":
        """With one event taken back, as if it had never come."""
        return self.kept(np.arange(len(self.ids)) != self.place(event_id))

    def replaced(self, event_id: str, rows: Rows, n_choices: int, at: float | None) -> "History":
        """With other rows for one event, which keeps its place, and its time where no other is given."""
        i = self.place(event_id)
        before, after = np.arange(len(self.ids)) < i, np.arange(len(self.ids)) > i
        times, terms, pulls, choices = self.at.copy(), self.n_terms.copy(), self.n_pulls.copy(), self.n_choices.copy()
        times[i] = times[i] if at is None else time_of(at)
        terms[i], pulls[i], choices[i] = rows.n_terms, len(rows.level), n_choices
        joined = Rows.concat([self._rows(before), rows, self._rows(after)])
        return History(self.ids, times, terms, pulls, choices, joined, self.count)

    def kept(self, mask: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> "History":
        """The events where `mask` (E,) is true."""
        ids = tuple(name for name, stays in zip(self.ids, mask.tolist(), strict=True) if stays)
        columns = self.at[mask], self.n_terms[mask], self.n_pulls[mask], self.n_choices[mask]
        return History(ids, *columns, self._rows(mask), self.count)

    def _rows(self, events: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> Rows:
        return self.rows.only(np.repeat(events, self.n_terms), np.repeat(events, self.n_pulls))

    @property
    def event(self) -> Ints:
        """(T,) the event of each term."""
        return np.repeat(np.arange(len(self.ids)), self.n_terms)

    def order(self) -> Ints:
        """(E,) events from the first to the last: by time and then name where all that say something have a time, else as they
        came."""
        if not len(self.ids) or (np.isnan(self.at) & (self.n_terms > 0)).any():
            return np.arange(len(self.ids))
        return np.lexsort((np.asarray(self.ids), self.at))

    def in_order(self) -> Ints:
        """(T,) terms from the first to the last."""
        rank = np.empty(len(self.ids), dtype=np.int64)
        rank[self.order()] = np.arange(len(self.ids))
        return np.argsort(rank[self.event], kind="stable")

    def later(self) -> Ints:
        """(T,) how many choices came after each term: the terms of an event are one choice, or as many one after another."""
        order, first = self.order(), np.cumsum(self.n_terms) - self.n_terms
        up_to = np.empty(len(order), dtype=np.int64)
        up_to[order] = np.cumsum(self.n_choices[order])
        event = self.event
        behind = (first + self.n_terms - 1)[event] - np.arange(len(event))  # terms of the same event
        own = np.where((self.n_choices == self.n_terms)[event], behind, 0)
        return np.asarray((self.n_choices.sum() - up_to)[event] + own)

    def remembered(self, forgetting: Forgetting, now: float | None) -> Floats | None:
        """(T,) what is left of each term's weight at `now`, or at the last event where that is later or `now` is None.

        None where nothing is forgotten. A choice from after `now` (a clock that jumped) has not aged.

        Raises:
            DataError: forgetting by seconds, and an event without a time that has something to forget.
        """
        if forgetting.seconds is None and forgetting.choices is None:
            return None
        age = np.zeros(self.rows.n_terms)
        if forgetting.choices is not None:
            age += self.later() / forgetting.choices
        if forgetting.seconds is not None and len(age):
            timeless = np.isnan(self.at) & (self.n_terms > 0)  # a pull, and an event that says nothing, need no time
            if timeless.any():
                name = self.ids[int(timeless.argmax())]
                raise DataError(
                    f"event {name!r} has no time, and this population forgets by time; expected update(..., at=seconds)"
                )
            latest = float(np.nanmax(self.at))
            last = latest if now is None else max(now, latest)
            age += ((last - self.at) / forgetting.seconds)[self.event]
        return np.asarray(np.exp2(-age))


def named(event_id: str | None, ids: Collection[str], count: int) -> str:
    """The name of the next event. Raises `DataError` for one that is taken: the same choice must not count twice."""
    if event_id is None:
        return next(name for number in itertools.count(count) if (name := f"event-{number}") not in ids)
    if event_id in ids:
        raise DataError(
            f"event {event_id!r} came already; expected a new id, or correct({event_id!r}, ...) to replace what it said"
        )
    return event_id


def absent(event_id: str, ids: Sequence[str]) -> DataError:
    """What to say of an event that is not here."""
    return DataError(
        f"no event {event_id!r} among the {len(ids)} of this user (the last are {list(ids[-3:])}); "
        "expected one that came and was not taken back"
    )


def time_of(at: float | None) -> float:
    """Unix seconds, NaN where there are none. Raises `DataError` for a time that is not finite."""
    if at is None:
        return NO_TIME
    if not np.isfinite(at):
        raise DataError(f"at is {at}; expected unix seconds, or None for an event without a time")
    return float(at)
