"""Many events taken into a profile at once: gathered in their order, and solved when all of them are there.

`LiveProfile.update` copies everything that came before and solves again, so that n events one after another cost O(n^2). A
profile depends on what it holds and not on the way there, so a log can be gone through first and solved once.
"""

from collections.abc import KeysView
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import numpy as np

from palate.living.history import History, absent, named, time_of
from palate.living.profile import LiveProfile
from palate.living.rows import Rows
from palate.living.terms import Terms


class _Entry(NamedTuple):
    at: float  # NaN where it has no time
    rows: Rows


class Draft:
    """A profile to which events are being added, taken back and corrected; `solved` is the profile after them.

    The methods are those of `LiveProfile` and raise what these raise, but change the draft and return it. One thread at a time.

    Args:
        life: the profile before; nothing of it is changed.
    """

    def __init__(self, life: LiveProfile):
        self.life, self.population, self._count = life, life.population, life.history.count
        # in the order of the events; a number is a place in the history before
        self._entries: dict[str, _Entry | int] = {name: place for place, name in enumerate(life.history.ids)}

    @property
    def event_ids(self) -> KeysView[str]:
        """Names of the events that are in, in the order in which they came."""
        return self._entries.keys()

    def brought(self, event_id: str) -> tuple[int, int]:
        """As `LiveProfile.brought`."""
        entry, before = self._found(event_id), self.life.history
        if isinstance(entry, int):
            return int(before.n_terms[entry]), int(before.n_pulls[entry])
        return entry.rows.n_terms, len(entry.rows.level)

    def update(self, said: Terms, *, event_id: str | None = None, at: float | None = None) -> "Draft":
        """As `LiveProfile.update`, without the solve. O(1) in the events that are in."""
        rows = self.population.rows(said, self.life.user_id)
        self._entries[named(event_id, self._entries, self._count)] = _Entry(time_of(at), rows)
        self._count += 1
        return self

    def undo(self, event_id: str) -> "Draft":
        """As `LiveProfile.undo`, without the solve."""
        self._found(event_id)
        del self._entries[event_id]
        return self

    def correct(self, event_id: str, said: Terms, at: float | None = None) -> "Draft":
        """As `LiveProfile.correct`, without the solve."""
        rows, entry = self.population.rows(said, self.life.user_id), self._found(event_id)
        before = float(self.life.history.at[entry]) if isinstance(entry, int) else entry.at
        self._entries[event_id] = _Entry(before if at is None else time_of(at), rows)  # a key that is there keeps its place
        return self

    def solved(self) -> LiveProfile:
        """The profile with everything in it. Cost: one solve, and a copy of the rows."""
        return replace(self.life, history=self._history()).again()

    def _found(self, event_id: str) -> _Entry | int:
        if event_id not in self._entries:
            raise absent(event_id, tuple(self._entries))
        return self._entries[event_id]

    def _history(self) -> History:
        before = self.life.history
        parts = [History.empty(self.population.n_weights)]
        for stayed, run in groupby(self._entries.items(), lambda item: isinstance(item[1], int)):
            items = list(run)
            if stayed:
                mask = np.zeros(len(before.ids), dtype=np.bool_)
                mask[[entry for _, entry in items if isinstance(entry, int)]] = True
                parts.append(before if mask.all() else before.kept(mask))
            else:
                parts.append(_gathered({name: entry for name, entry in items if isinstance(entry, _Entry)}))
        return History.joined(parts, self._count)


def _gathered(entries: dict[str, _Entry]) -> History:
    """Events as a history of their own."""
    rows = [entry.rows for entry in entries.values()]
    n_terms, n_pulls = np.array([one.n_terms for one in rows]), np.array([len(one.level) for one in rows])
    at = np.array([entry.at for entry in entries.values()])
    return History(tuple(entries), at, n_terms, n_pulls, np.minimum(n_terms, 1), Rows.concat(rows), len(rows))
