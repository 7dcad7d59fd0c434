"""What one person likes, in words, which of their choices say so, and how they can change it.

`palate.naming` describes one person's departure from the crowd with intervals and a guard against chance, in seconds. Everything
of it that does not depend on the person is a sum over responses, permutations or resamples that is quadratic in the weights; an
`Explainer` keeps these sums, so that a person takes milliseconds and is told what `name_profile` would have told them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import Field

from palate.adaptation import Profile
from palate.data.pairs import PairSet
from palate.encoders import Encoder
from palate.errors import DataError, MismatchError
from palate.living.evidence import Event
from palate.living.explanation import Explanation, Liking, Telling
from palate.living.profile import LiveProfile
from palate.living.sums import Sums, pursuit
from palate.living.terms import Floats, Ints, Terms
from palate.models.base import RewardModel
from palate.naming import FEW, LEAST, LEVEL, NO_DIFFERENCE, WORDS, worded

if TYPE_CHECKING:
    from palate.living.draft import Draft

L = TypeVar("L", LiveProfile, "Draft")

SOFT = 0.1  # how firmly an axis is held where the person set it, in standard deviations of people along it
HARD = 1e-5  # the firmest: a fixed rule to five digits; far below it nothing can be solved for in float64
NARROW = 1e-6  # of the widest axis: people do not differ along one that is narrower
TOLD = 5  # most choices that are told


class AxisEdit(Event):
    """An axis that the person set by hand: so much log-odds shall a standard deviation more of it be worth to them."""

    examples: ClassVar = ({"kind": "axis", "axis": "length", "to": 0.0},)

    kind: Literal["axis"] = "axis"
    axis: str = Field(max_length=64, description="name of a statistic of style, as an explanation has it")
    to: float = Field(
        ge=-100, le=100, allow_inf_nan=False, description="log-odds of a standard deviation more; 0: it does not count"
    )
    softness: float = Field(default=SOFT, ge=HARD, le=10, allow_inf_nan=False, description="smaller holds more firmly")

    @property
    def name(self) -> str:
        """The id under which it stands among the events: one for each axis, so that a second edit replaces the first."""
        return self.event_id or "axis:" + self.axis.replace(" ", "-")


class Explainer:
    """Explains the people of one model against a sample of responses. Make it once; it holds no text and no person.

    Args:
        model: a fitted model that is linear in its weights and has some.
        encoder: the one that the model was fitted with; it need not be `style`.
        pairs: choices whose responses are the sample; who made them does not matter. A few thousand responses are plenty.
        seed: of permutations and resamples.

    Raises: as `palate.naming.name_profile`, and `DataError` for a model without weights.
    Cost: as `name_profile`; about 800 K numbers for each statistic are kept.
    """

    def __init__(self, model: RewardModel, encoder: Encoder, pairs: PairSet, *, seed: int = 0):
        self._made_of(model, Sums.of(model, encoder, pairs, seed))

    def _made_of(self, model: RewardModel, sums: Sums) -> None:
        self.model, self.sums, self.axes, self.crowd = model, sums, sums.axes, _float(model.crowd_weights)
        spread = model.crowd_covariance
        self._spread: Floats | None = None if spread is None else _float(spread)

    def save(self, folder: str | Path) -> None:
        """Write `explainer.safetensors` into the folder of the model, whole or not at all. It holds no text and no person."""
        self.sums.save(folder)

    @classmethod
    def load(cls, folder: str | Path, model: RewardModel) -> "Explainer":
        """What `save` wrote. Raises `ModelFileError` for anything else, and `MismatchError` where it is not of this `model`."""
        out = cls.__new__(cls)
        out._made_of(model, Sums.load(folder, model))
        return out

    def _check(self, profile: "Profile | LiveProfile | Draft") -> None:
        """Raise `MismatchError` for a profile of another model."""
        theirs = profile.model if isinstance(profile, Profile) else profile.population.fingerprint
        if theirs != self.sums.model:
            raise MismatchError(
                f"a profile of model {theirs[:12]} given to the explainer of model {self.sums.model[:12]}; "
                "weights mean nothing under another model: adapt again"
            )

    # -- in words

    def explain(self, profile: Profile | LiveProfile) -> Explanation:
        """What the person wants beyond the crowd, the strength of every axis, and, of a live profile, the choices that say most.

        Words are given as by `name_profile`: to a correlation of at least .2 whose 95 % interval, over prompts and over what is
        unknown of the person, is on one side of 0, and above what the best of all axes reaches by chance once in twenty times.

        How much a choice says is how far the rewards would move without it: the weights by -(1 - h)^-1 C g, with C the
        posterior's covariance, g the gradient of the choice's log-likelihood, and h = g' C H C g / g' C g its leverage, H its
        curvature: the exact Newton step for a choice between two (Pregibon 1981, Annals of Statistics 9: 705-724).

        Raises `MismatchError` for a profile of another model. Cost: milliseconds.
        """
        self._check(profile)
        live = profile if isinstance(profile, LiveProfile) else None
        known = profile.profile if isinstance(profile, LiveProfile) else profile
        mean = _float(known.mean) if live is None else live.mean
        covariance = None if known.covariance is None else _float(known.covariance) if live is None else live.covariance
        away = mean - self.crowd
        told = () if live is None or covariance is None else self._telling(live, covariance)
        size = float(away @ self.sums.own @ away)
        flat = size <= 1e-11 * (1e-30 + float(away @ self.sums.raw @ away))  # the rounding of float32, as in naming
        nothing = Explanation(
            user_id=known.user_id,
            n_choices=known.n_pairs,
            label=NO_DIFFERENCE,
            sure=False,
            explained=0.0,
            threshold=0.0,
            likings=(),
            telling=told,
        )
        if flat:
            return nothing
        correlation = self.sums.cross @ away / np.sqrt(size)
        threshold = float(np.quantile(np.abs(self.sums.dealt @ away).max(axis=1, initial=0.0), LEVEL) / np.sqrt(size))
        low, high = self._interval(away, covariance)
        certain = (np.abs(correlation) >= max(threshold, LEAST)) & (np.sign(low) == np.sign(correlation))
        certain &= np.sign(high) == np.sign(correlation)
        among = np.flatnonzero(certain)
        chosen, coefficient = pursuit(self.sums.gram[np.ix_(among, among)], correlation[among], FEW)
        agree = [int(among[a]) for a, c in zip(chosen, coefficient, strict=True) if c * correlation[among[a]] > 0]
        agree.sort(key=lambda a: (-abs(correlation[a]), a))
        worth, by_crowd, people = self._worth(mean), self._worth(self.crowd), self._people()
        likings = tuple(
            Liking(
                axis=self.axes[a],
                words=WORDS[self.axes[a]][int(correlation[a] < 0)],
                correlation=float(correlation[a].clip(-1, 1)),
                low=float(low[a]),
                high=float(high[a]),
                certain=bool(certain[a]),
                worth=float(worth[a]),
                crowd=float(by_crowd[a]),
                people_std=None if people is None else float(people[a]),
            )
            for a in np.argsort(-np.abs(correlation), kind="stable")
        )
        label = worded([(self.axes[a], float(correlation[a])) for a in agree])
        explained = self._explained(away, size)
        found = {"label": label, "sure": bool(agree), "explained": explained, "threshold": threshold, "likings": likings}
        return nothing.model_copy(update=found)

    def _interval(self, away: Floats, covariance: Floats | None) -> tuple[Floats, Floats]:
        """(A,) ends of the correlations' 95 % intervals."""
        sums, each = self.sums, np.broadcast_to(away, self.sums.draws.shape)
        if covariance is not None:
            size, turn = np.linalg.eigh(covariance)
            each = away + sums.draws @ (turn * np.sqrt(size.clip(min=0))).T
        own = np.einsum("bi,bij,bj->b", each, sums.owns, each)
        scale = np.sqrt(sums.size * own[:, None].clip(min=0)).clip(min=1e-300)
        tail = (1 - LEVEL) / 2
        low, high = np.quantile((sums.crosses @ each[..., None])[..., 0] / scale, [tail, 1 - tail], axis=0)
        return low, high

    def _explained(self, away: Floats, size: float) -> float:
        """R^2 of the best few axes for prompts that they were not chosen on, not below 0."""
        wrong, sums = 0.0, self.sums
        for gram, cross, own in zip(sums.fold_gram, sums.fold_cross, sums.fold_own, strict=True):
            chosen, coefficient = pursuit(sums.gram - gram, (sums.cross - cross) @ away, FEW)
            told = coefficient @ (gram[np.ix_(chosen, chosen)] @ coefficient - 2 * cross[chosen] @ away)
            wrong += float(away @ own @ away + told)
        return max(0.0, 1 - wrong / size)

    def _telling(self, live: LiveProfile, covariance: Floats) -> tuple[Telling, ...]:
        """The events without which the rewards would move most, as the root mean square within prompts."""
        history = live.history
        if not history.ids:
            return ()
        left = history.remembered(live.population.forgetting, live.now)
        terms = live.population.view.rows(history.rows.weighted(left)).terms()
        events = np.repeat(np.arange(len(history.ids)), history.n_terms), np.repeat(np.arange(len(history.ids)), history.n_pulls)
        moved = influence(terms, events, len(history.ids), live.mean, covariance)
        size = np.sqrt(np.einsum("ei,ij,ej->e", moved, self.sums.own, moved).clip(min=0) / self.sums.n_texts)
        along = moved @ self.sums.cross.T
        best = np.abs(along).argmax(axis=1)
        return tuple(
            Telling(
                event_id=history.ids[e],
                moves=float(size[e]),
                words=WORDS[self.axes[best[e]]][int(along[e, best[e]] < 0)],
            )
            for e in np.argsort(-size, kind="stable")[:TOLD].tolist()
            if size[e] > 0
        )

    # -- and edited

    def _worth(self, weights: Floats) -> Floats:
        """(A,) log-odds of one standard deviation more of each axis, the slope of the reward on it within prompts."""
        return np.asarray((self.sums.offset + self.sums.cross @ weights) / np.sqrt(self.sums.n_texts))

    def _people(self) -> Floats | None:
        """(A,) how much people differ in what each axis is worth to them, as a standard deviation about the crowd."""
        if self._spread is None:
            return None
        along = self.sums.cross
        return np.asarray(np.sqrt(np.einsum("ai,ij,aj->a", along, self._spread, along).clip(min=0) / self.sums.n_texts))

    def _place(self, axis: str) -> tuple[int, float]:
        """Where the axis stands and how much people differ along it. Raises `DataError` where it cannot be set."""
        people = self._people()
        if axis not in self.axes:
            raise DataError(f"{axis!r} is no axis that varies among these responses; expected one of {', '.join(self.axes)}")
        if people is None:
            raise DataError(
                f"{type(self.model).__name__} has no prior, against which an axis could be set; use a method with one"
            )
        place = self.axes.index(axis)
        if people[place] <= NARROW * people.max():
            raise DataError(f"people of this model do not differ in {axis!r}, so that it cannot be set; choose another axis")
        return place, float(people[place])

    def edit(
        self,
        axis: str,
        profile: Profile | LiveProfile,
        *,
        by: float | None = None,
        to: float | None = None,
        softness: float = SOFT,
    ) -> AxisEdit:
        """An axis turned down (`by` below 0), up (above 0), or off (`to` = 0).

        Args:
            axis: its name, as in the explanation.
            profile: the person, from whose place `by` counts.
            by: how far, in standard deviations of people: -1 is as far below as people are apart.
            to: what a standard deviation more of the axis is to be worth, in log-odds; the crowd's reward is in it.
            softness: by how much the choices may still argue, in standard deviations of people; towards 0 it is a fixed rule.

        Raises:
            DataError: no such axis, one along which people do not differ, not exactly one of `by` and `to`, no finite number.
            MismatchError: a profile of another model.
        """
        self._check(profile)
        place, people = self._place(axis)
        if (by is None) == (to is None):
            raise DataError(f"by is {by} and to is {to}; expected exactly one of them")
        now = float(self._worth(np.asarray(profile.mean, dtype=np.float64))[place])
        level = now + by * people if by is not None else to
        if level is None or not np.isfinite(level) or abs(level) > 100 or not HARD <= softness <= 10:
            raise DataError(
                f"{axis!r} set to {level} with softness {softness}; expected at most 100 log-odds, and {HARD} <= softness <= 10"
            )
        return AxisEdit(axis=axis, to=float(level), softness=softness)

    def terms(self, edit: AxisEdit) -> Terms:
        """The edit as a soft constraint ((a . w - level) / std)^2 / 2 on the weights: one pull, whatever the profile.

        a = s_axis^T slopes / sqrt(N), s as in `palate.living.sums`, so that a . (w - crowd) is the covariance of the personal
        reward with the axis in standard deviations; level is what `edit.to` leaves after the reward that nobody can change, and
        std is `softness` times sqrt(a' S a), S the prior's second moment about the crowd.
        """
        place, people = self._place(edit.axis)
        pull = self.sums.cross[place] / np.sqrt(self.sums.n_texts)
        level = edit.to - self.sums.offset[place] / np.sqrt(self.sums.n_texts)
        return Terms.empty(len(pull))._replace(pulls=pull[None], level=np.array([level]), std=np.array([edit.softness * people]))

    def edited(self, live: L, edit: AxisEdit) -> L:
        """The profile (or its draft) with the edit as an event, in the place of an earlier one of the same axis;
        `undo(edit.name)` ends it.

        Raises `DataError` where the event of that name is no edit, but something that was said, and `MismatchError` for a
        profile of another model. Cost: one solve; of a draft none.
        """
        self._check(live)
        said = self.terms(edit)
        if edit.name in live.event_ids:
            n_terms, n_pulls = live.brought(edit.name)
            if n_terms or not n_pulls:
                raise DataError(
                    f"event {edit.name!r} came already and is no edit of an axis, which it would replace; "
                    "expected an edit with an event_id of its own"
                )
            return live.correct(edit.name, said, edit.at)
        return live.update(said, event_id=edit.name, at=edit.at)


def influence(terms: Terms, events: tuple[Ints, Ints], n_events: int, mean: Floats, covariance: Floats) -> Floats:
    """(E, K) by how much each event moved the weights: the mean with it less the mean without it, to one Newton step.

    Args:
        terms: of all events. events: (T,) and (Q,) event of each term and pull.
        mean, covariance: the posterior's, (K,) and (K, K).

    A choice's leverage is taken to be at most .9, which hardly any has unless the covariance is no inverse curvature, as with
    types of people. A pull may have all of it.
    Cost: O(R K) after O(E K^2).
    """
    size = np.diff(terms.start, append=len(terms.offset))
    term = np.repeat(np.arange(terms.n_terms), size)
    utility = terms.offset + terms.slopes @ mean
    likely = np.zeros(0)
    if len(term):
        raised = np.exp(utility - np.maximum.reduceat(utility, terms.start)[term])
        likely = np.asarray(raised / np.add.reduceat(raised, terms.start)[term])
    gradient = np.zeros((n_events, len(mean)))
    by = events[0][term]
    np.add.at(gradient, by, (terms.weight[term] * (terms.target - likely))[:, None] * terms.slopes)
    short = (terms.pulls @ mean - terms.level) / np.square(terms.std)
    np.add.at(gradient, events[1], -short[:, None] * terms.pulls)
    step = gradient @ covariance
    along = (terms.slopes * step[by]).sum(1)
    middle = np.bincount(term, likely * along, minlength=terms.n_terms)
    curved = np.bincount(by, terms.weight[term] * likely * np.square(along - middle[term]), minlength=n_events)
    held = np.square((terms.pulls * step[events[1]]).sum(1) / terms.std)
    curved = curved + np.bincount(events[1], held, minlength=n_events)
    leverage = curved / (gradient * step).sum(1).clip(min=1e-300)
    most = np.where(np.bincount(events[1], minlength=n_events) > 0, 1 - 1e-12, 0.9)
    return np.asarray(step / (1 - np.minimum(leverage, most))[:, None])


def _float(tensor: object) -> Floats:
    """A tensor of any device as float64 numpy."""
    return np.asarray(tensor.detach().cpu().double().numpy())  # type: ignore[attr-defined]
