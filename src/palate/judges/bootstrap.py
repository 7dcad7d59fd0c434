"""Which past choices to show a judge: the random search of SynthesizeMe, over a user's own choices and nobody else's.

DSPy's `BootstrapFewShotWithRandomSearch` in our own words, as SynthesizeMe (arXiv 2506.05598) sets it. A candidate is a list of
demonstrations made of the user's training choices. Bootstrapped ones carry the reasoning of the judge itself, and only where the
judge was right; labelled ones carry the choice alone. Every candidate is scored on the user's validation choices, from which no
demonstration is ever made, and the first of the best is kept.

| number | candidate |
|---|---|
| -3 | none at all |
| -2 | `max_labeled` labelled choices, drawn at random |
| -1 | the training choices in their order, bootstrapped |
| 0, 1, ... | in a random order, up to a random number of them bootstrapped |

Random numbers are NumPy's, so the draws are not those of DSPy, bit for bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from palate.errors import DataError
from palate.judges.base import Demo, Side
from palate.judges.rounds import Work

NOTHING, LABELLED, IN_ORDER = -3, -2, -1


class Said(NamedTuple):
    """What the judge made of one past choice: a side, or None where it could not be read, and the reasoning before it."""

    answer: Side | None
    thought: str


Ask = Callable[[Sequence[tuple[Demo, tuple[Demo, ...]]]], Work[list[Said]]]  # (choice, demonstrations shown with it), ...


class Found(NamedTuple):
    """The best candidate.

    Attributes:
        number: which.
        demos: its demonstrations.
        right: validation choices that it tells right; an answer that cannot be read counts as wrong.
        of: validation choices.
        scores: (number, right) of all candidates that were tried.
    """

    number: int
    demos: tuple[Demo, ...]
    right: int
    of: int
    scores: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Search:
    """How the search goes; the defaults are the published ones.

    Args:
        n_candidates: random candidates, beside the three that are always the same.
        max_labeled: labelled choices, where bootstrapped ones do not take their place already.
        max_bootstrapped: bootstrapped choices; None for as many as there are.
        stop_at: the percentage of validation choices at which no further candidate is tried.
        seed: of the draws.

    Raises:
        DataError: negative numbers, or a percentage outside 0 to 100.
    """

    n_candidates: int = 10
    max_labeled: int = 4
    max_bootstrapped: int | None = None
    stop_at: float = 80.0
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = (self.n_candidates, self.max_labeled, self.seed, 0 if self.max_bootstrapped is None else self.max_bootstrapped)
        if min(numbers) < 0 or not 0 <= self.stop_at <= 100:
            raise DataError(
                f"n_candidates is {self.n_candidates}, max_labeled {self.max_labeled}, max_bootstrapped {self.max_bootstrapped}, "
                f"seed {self.seed} and stop_at {self.stop_at}; expected numbers from 0, and a percentage"
            )

    def best(self, train: Sequence[Demo], valid: Sequence[Demo], ask: Ask, *, with_nothing: bool) -> Work[Found]:
        """The first of the candidates that are right most often on `valid`.

        Where there is nothing to validate on, nothing can be compared, and it is the training choices in their order.

        Args:
            train: choices that demonstrations are made of. valid: choices that they are scored on.
            ask: what the judge makes of choices, each with the demonstrations shown before it.
            with_nothing: try the candidate without demonstrations too.
        Cost: at most `calls` requests where every answer can be read.
        """
        found: Found | None = None
        scores: list[tuple[int, int]] = []
        numbers = range(NOTHING if with_nothing else LABELLED, self.n_candidates) if valid else (IN_ORDER,)
        for number in numbers:
            demos = yield from self.candidate(number, train, ask)
            said = (yield from ask([(demo, demos) for demo in valid])) if valid else []
            right = sum(one.answer == demo.answer for one, demo in zip(said, valid, strict=True))
            scores.append((number, right))
            if found is None or right > found.right:
                found = Found(number, demos, right, len(valid), ())
            if valid and 100 * right >= self.stop_at * len(valid):
                break
        if found is None:
            raise DataError("0 candidates to search; expected at least one")
        return found._replace(scores=tuple(scores))

    def candidate(self, number: int, train: Sequence[Demo], ask: Ask) -> Work[tuple[Demo, ...]]:
        """The demonstrations of one candidate.

        The judge is asked about one training choice after the other, with labelled ones before it but never that choice itself,
        until enough were told right. What room they leave below `max_labeled` is filled with labelled ones.
        """
        if number == NOTHING:
            return ()
        if number == LABELLED:
            return self._labelled(train, self.max_labeled)
        most = len(train) if self.max_bootstrapped is None else min(self.max_bootstrapped, len(train))
        queue = list(train)
        if number >= 0 and most:
            draw = np.random.default_rng((self.seed, 1, number))
            queue = [train[i] for i in draw.permutation(len(train)).tolist()]
            most = int(draw.integers(1, most, endpoint=True))
        teacher = self._labelled(queue, self.max_labeled)
        kept: list[Demo] = []
        while len(kept) < most and queue:
            now, queue = queue[: most - len(kept)], queue[most - len(kept) :]  # never more than could still be kept
            said = yield from ask([(demo, tuple(other for other in teacher if other != demo)) for demo in now])
            kept += [replace(demo, thought=one.thought) for demo, one in zip(now, said, strict=True) if one.answer == demo.answer]
        known = {replace(demo, thought="") for demo in kept}
        rest = [demo for demo in train if demo not in known]
        return (*kept, *self._labelled(rest, self.max_labeled - len(kept)))

    def calls(self, n_train: int, n_valid: int, *, with_nothing: bool) -> tuple[int, int]:
        """(least, most) questions of one search, second tries of answers that cannot be read not counted."""
        kept = n_train if self.max_bootstrapped is None else min(self.max_bootstrapped, n_train)
        asked = n_train if kept else 0  # when every answer is wrong
        if not n_valid:
            return kept, asked
        candidates = self.n_candidates + (3 if with_nothing else 2)
        return n_valid, candidates * n_valid + (1 + self.n_candidates) * asked

    def _labelled(self, demos: Sequence[Demo], k: int) -> tuple[Demo, ...]:
        if k <= 0 or not demos:
            return ()
        draw = np.random.default_rng((self.seed, 0))
        return tuple(demos[i] for i in draw.choice(len(demos), size=min(k, len(demos)), replace=False).tolist())
