"""How much a weak kind of feedback is worth: what makes the same people's later choices most likely."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from palate import likelihood
from palate.errors import DataError
from palate.living.events import Choice
from palate.living.evidence import Said
from palate.living.population import Population
from palate.living.reading import Reading, Trust
from palate.living.terms import Floats, Rewards

WEAK = ("rating", "thumb", "copied", "regenerate", "kept")
MULTIPLIERS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0)
FEWEST = 20  # people who must have left a kind, and later choices, before anything is learned about it


class Tried(NamedTuple):
    """What was found for one kind.

    Attributes:
        multiplier: the one that is kept.
        best: the one with the smallest loss.
        gain: by how much its loss is below that of the multiplier before, in nats a choice. error: standard error over people.
        n_users: people who left this kind and later choices.
    """

    kind: str
    multiplier: float
    best: float
    gain: float
    error: float
    n_users: int


class Learned(NamedTuple):
    """`Trust` with what was learned, and what was tried."""

    trust: Trust
    tried: tuple[Tried, ...]


class _Person(NamedTuple):
    """What somebody left before the later half of their choices, and these choices."""

    said: Sequence[tuple[Said, Rewards]]
    offset: Floats  # (n,) of the later choices
    slopes: Floats  # (n, K)
    tie: Floats  # (n,)


def learn_trust(
    histories: Mapping[str, Sequence[tuple[Said, Rewards]]],
    population: Population,
    reading: Reading,
    *,
    kinds: Sequence[str] = WEAK,
    multipliers: Sequence[float] = MULTIPLIERS,
) -> Learned:
    """Choose the multiplier of each weak kind by the log loss of later choices.

    Of each person the later half of their choices between two is held out; everything that they did before the first of these
    makes a profile, under each multiplier in turn, and the loss is that of the log-odds that the model states. One kind after the
    other, the most frequent first. A multiplier replaces the one in `reading` only where it is better by more than one standard
    error of the difference over people: where the data do not say, nothing changes.

    Args:
        histories: of each person, in the order of time, what they did, with the rewards of its `responses()`.
        population: of the model that gave the rewards.
        reading: how everything else is read; its trust is where the search starts.
        kinds: names of `Trust`'s numbers.

    Raises `DataError` where fewer than `FEWEST` people left any of the kinds before later choices, or for an unknown kind.
    Cost: a solve of each person, kind and multiplier.
    """
    unknown = [kind for kind in kinds if kind not in Trust.model_fields]
    if unknown or any(not 0 <= value <= 100 for value in multipliers):
        raise DataError(
            f"kinds {unknown} and multipliers {list(multipliers)}; expected kinds among {', '.join(Trust.model_fields)}, and "
            "multipliers from 0 to 100"
        )
    people = {user: person for user, history in histories.items() if (person := _person(history)) is not None}
    left = {kind: [u for u, p in people.items() if any(said.trusted_as == kind for said, _ in p.said)] for kind in kinds}
    able = sorted((kind for kind in kinds if len(left[kind]) >= FEWEST), key=lambda kind: -len(left[kind]))
    if not able:
        counts = ", ".join(f"{kind} {len(users)}" for kind, users in left.items())
        raise DataError(f"people who left each kind before later choices: {counts}; expected at least {FEWEST} for one of them")
    trust, tried = reading.trust, []
    for kind in able:
        before: float = getattr(trust, kind)
        grid = [before, *(value for value in multipliers if value != before)]
        loss = np.array(
            [[_loss(population, reading, trust, {kind: value}, user, people[user]) for value in grid] for user in left[kind]]
        )
        best = int(loss.mean(0).argmin())
        difference = loss[:, 0] - loss[:, best]
        gain, error = float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))
        kept = grid[best] if gain > error else before
        trust = trust.model_copy(update={kind: kept})
        tried.append(Tried(kind, kept, grid[best], gain, error, len(difference)))
    return Learned(trust, tuple(tried))


def _person(history: Sequence[tuple[Said, Rewards]]) -> _Person | None:
    choices = [place for place, (said, _) in enumerate(history) if isinstance(said, Choice)]
    if len(choices) < 2:
        return None
    later = choices[len(choices) // 2 :]
    rewards = [history[place][1] for place in later]
    tie = np.array([isinstance(said, Choice) and said.tie for said, _ in (history[place] for place in later)])
    offset = np.array([r.offset[0] - r.offset[1] for r in rewards])
    return _Person(history[: later[0]], offset, np.array([r.slopes[0] - r.slopes[1] for r in rewards]), tie)


def _loss(
    population: Population, reading: Reading, trust: Trust, changed: Mapping[str, float], user: str, person: _Person
) -> float:
    """Mean log loss of a person's later choices, nats."""
    now = trust.model_copy(update=dict(changed))
    said = [said.terms(r, exposure=reading.exposure, level=reading.level, trust=now) for said, r in person.said]
    live = population.start(user).after(said)
    margin, variance = person.offset + person.slopes @ live.mean, np.zeros(len(person.offset))
    if live.covariance is not None:
        variance = np.einsum("ni,ij,nj->n", person.slopes, live.covariance, person.slopes).clip(min=0)
    stated = population.model.stated(torch.from_numpy(margin), torch.from_numpy(variance))
    return float(likelihood.nll(stated, torch.from_numpy(person.tie)).mean())
