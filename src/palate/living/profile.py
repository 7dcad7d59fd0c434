"""One user, while they use the thing: choices come, are taken back and corrected, age, and the answer is that of one batch.

A `LiveProfile` is a value. Every method returns another one, so that a failure leaves the old and two threads cannot meet in one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from palate.adaptation import Profile
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.living.change import Change, changed
from palate.living.history import History
from palate.living.rows import Rows
from palate.living.solver import Solved
from palate.living.stored import written
from palate.living.terms import Floats, Terms

if TYPE_CHECKING:
    from palate.living.population import Population


@dataclass(frozen=True, eq=False)
class LiveProfile:
    """One user's choices and the weights that follow from them; made by `Population.start`, read again by `from_bytes`.

    With nothing forgotten and nobody erring the weights are those of `palate.adapt` on the same choices, whatever the order in
    which they came, were taken back and were corrected.

    Attributes:
        population: whose prior it is. user_id: whose profile.
        history: the events with their rows.
        now: unix seconds up to which choices have aged, None for the time of the last event.
    """

    population: "Population"
    user_id: str
    history: History
    solved: Solved
    now: float | None = None

    def __repr__(self) -> str:
        return f"LiveProfile({self.user_id!r}, {self.n_events} events, model {self.population.fingerprint[:12]})"

    # -- what comes in

    def update(self, said: EmbeddedPairs | Terms, *, event_id: str | None = None, at: float | None = None) -> "LiveProfile":
        """With one more event: choices of this user, or any terms. Terms without rows are an event that says nothing.

        Args:
            said: choices (projected through the model), each of which counts as one; or terms over the model's weights
                (`Population.rewards`, `Terms`), which are one choice together, however many they are.
            event_id: its name, by which it can be taken back; by default "event-0" and so on.
            at: unix seconds, needed where the population forgets by time.

        Raises:
            DataError: an id that came before, choices of somebody else, terms that are none, a time that is not finite.
            MismatchError: embeddings of another encoder.
        Cost: two to four Newton steps from the last answer, about 0.2 ms for 10 weights and 50 choices.
        """
        rows = self.population.rows(said, self.user_id)
        return self._with(self.history.appended(rows, _choices(said, rows), event_id, at))

    def after(self, events: Sequence[Terms]) -> "LiveProfile":
        """With several events, one after another, under names of their own and without times; solved once. Raises as `update`."""
        if not events:
            return self
        rows = self.population.rows(Terms.concat(events), self.user_id)
        n_terms = [int((np.diff(said.start, append=len(said.offset)) > 1).sum()) for said in events]  # as `Rows.of` keeps them
        return self._with(self.history.extended(rows, np.array(n_terms), np.array([len(said.level) for said in events])))

    def undo(self, event_id: str) -> "LiveProfile":
        """As if the event had never come. Raises `DataError` for one that is not here."""
        return self._with(self.history.without(event_id))

    def correct(self, event_id: str, said: EmbeddedPairs | Terms, at: float | None = None) -> "LiveProfile":
        """With other evidence in the place of the event's, under the same id; its time stays unless `at` is given.

        Raises: as `update`, and `DataError` for an event that is not here.
        """
        rows = self.population.rows(said, self.user_id)
        return self._with(self.history.replaced(event_id, rows, _choices(said, rows), at))

    def at(self, now: float) -> "LiveProfile":
        """As of `now` (unix seconds): what was said has aged until then. Never back before the last event."""
        if not np.isfinite(now):
            raise DataError(f"now is {now}; expected unix seconds")
        return replace(self, now=float(now))._with(self.history)

    def since(self, event_id: str) -> "LiveProfile":
        """From the events since this one alone, itself included: a new start where the taste has moved (`change`)."""
        first = self.history.place(event_id)
        order = self.history.order()
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return self._with(self.history.kept(rank >= rank[first]))

    def again(self) -> "LiveProfile":
        """Solved again from what is kept."""
        return self._with(self.history)

    def _with(self, history: History) -> "LiveProfile":
        solved = self.population.solve(history, self.user_id, self.now, self.solved.modes)
        return replace(self, history=history, solved=solved)

    # -- what is known

    @property
    def mean(self) -> Floats:
        """(K,) posterior mean of the weights; the crowd's before any evidence."""
        return self.solved.mean

    @property
    def covariance(self) -> Floats | None:
        """(K, K) posterior covariance, None where the method has none."""
        return self.solved.covariance

    @property
    def converged(self) -> bool:
        return self.solved.converged

    @property
    def n_events(self) -> int:
        return len(self.history.ids)

    @property
    def n_terms(self) -> int:
        """Terms of the likelihood, of all events; a rating from 0 to 10 has ten."""
        return self.history.rows.n_terms

    @property
    def n_choices(self) -> int:
        """Choices that say something, of all events; a rating is one."""
        return int(self.history.n_choices.sum())

    @property
    def event_ids(self) -> tuple[str, ...]:
        """Names of the events that are in, in the order in which they came."""
        return self.history.ids

    def brought(self, event_id: str) -> tuple[int, int]:
        """How many terms and how many pulls the event brought. Raises `DataError` for one that is not here."""
        place = self.history.place(event_id)
        return int(self.history.n_terms[place]), int(self.history.n_pulls[place])

    @property
    def terms(self) -> Terms:
        """Everything that is in, as terms."""
        return self.history.rows.terms()

    @property
    def flip_rate(self) -> float:
        """Posterior mean of this user's own flip rate; the population's where everybody has the same."""
        flips = self.solved.flips
        return float(flips @ np.asarray(self.population.flips.rates)) if len(flips) else 0.0

    @property
    def profile(self) -> Profile:
        """For everything that reads a `palate.Profile`: scorers, explanations, files."""
        kind, spread = self.population.dtype, self.covariance
        return Profile(
            self.user_id,
            torch.from_numpy(self.mean).to(kind),
            None if spread is None else torch.from_numpy(spread).to(kind),
            self.n_choices,
            self.converged,
            self.population.fingerprint,
        )

    def change(self, run_length: float = 1000.0) -> Change:
        """Whether this user's taste has moved, and since when (`palate.living.change`).

        Args:
            run_length: how many choices of a user whose taste does not move pass, on average at least, until one false alarm.

        Raises:
            DataError: a method without a prior, whose evidence is not defined.
        """
        population = self.population
        return changed(self.history, population.components(self.user_id), population.view, population.flips, run_length)

    # -- on disk

    def to_bytes(self) -> bytes:
        """Everything, as one safetensors file; `Population.from_bytes` reads it. Personal data: treat it as such."""
        return written(self)


def _choices(said: EmbeddedPairs | Terms, rows: Rows) -> int:
    """How many choices an event is (`History.n_choices`)."""
    return rows.n_terms if isinstance(said, EmbeddedPairs) else min(1, rows.n_terms)
