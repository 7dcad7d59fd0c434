"""How people differ, and how much of it to believe: the personal part of `Hierarchical`, chosen on held-out seen users.

A candidate is a way to describe the population: for how long EM runs, along how many directions people differ, whether the
directions are refined by the likelihood, how wide the prior is, whether there are types of people. One thing is chosen after the
other by the smoothed error of held-out users who are adapted from 1, 2, 5 and half of their choices, as new users would be.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palate import likelihood
from palate.data.pairs import EmbeddedPairs
from palate.models import crowd, population
from palate.models.validation import halves, position
from palate.priors import Prior
from palate.solvers import Batch, batches, posterior

ROUNDS = (0, 5, 10, 20, 40)
WIDTHS = (0.03, 0.1, 0.3, 1.0)  # kappas with which rounds are compared
RANKS = (1, 2, 4, 8, 16, 32, 64)
REFINEMENTS = (1e-4, 1e-3)  # ridge of the refined bases
MIXED = 16  # most directions in which types are looked for
KAPPAS = (0.003, 0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 16.0, 64.0, 256.0)
SHOTS = ((1, 1 / 6), (2, 1 / 6), (5, 1 / 6), (10**6, 1 / 2))  # choices, and what the loss after them counts


class Candidate(NamedTuple):
    """One way to describe how people differ."""

    rounds: int  # of EM
    shrunk: bool = False  # whether the mean taste is the crowd's with ten times the ridge
    rank: int | None = None  # directions kept; None: all that matter
    refined: float = 0.0  # ridge of the refinement of the bases; 0: not refined
    fitted: bool = False  # after a refinement: whether EM re-estimates the spread
    kappa: float = 1.0
    types: int = 0  # mixture components; 0: a plain Gaussian


CROWD = Candidate(0, rank=0, kappa=0.0)  # nobody differs


@dataclass(frozen=True)
class View:
    """What a set of learning users sees: bases found without anybody else, and every pair's slopes in them."""

    bases: Tensor  # (D, K) on the scaled features
    slopes: Tensor  # (P, K), all pairs
    offset: Tensor  # (P,) the crowd's margin, the crowd fitted without the held-out users
    learn: list[Batch]


@dataclass(frozen=True)
class Crowds:
    """The crowd as each fold sees it; the last column is everybody's."""

    offsets: Tensor  # (P, folds + 1) margins, bent or not
    directions: Tensor  # (D, folds + 1) the linear part on the scaled features
    shifts: Tensor  # (D, folds + 1) from there to the crowd with ten times the ridge


class Selection:
    """Estimates and compares candidates; `select` chooses one, `describe` fits it on everybody."""

    def __init__(
        self,
        data: EmbeddedPairs,
        design: crowd.Rescaled,
        fold: Tensor,
        crowds: Crowds,
        *,
        n_bases: int,
        prior_variance: float,
        seed: int,
    ):
        self.data, self.design, self.fold, self.crowds = data, design, fold, crowds
        self.n_bases, self.prior_variance, self.seed = n_bases, prior_variance, seed
        self.folds = int(fold.max()) + 1
        self.losses: dict[Candidate, Tensor] = {}
        self.support, self.query = halves(data, seed)
        self.place = position(data, self.support, seed)
        self.known: dict[tuple[int, Candidate], tuple[View, Prior]] = {}  # by fold

    def mean(self, key: Candidate) -> float:
        return float(torch.nanmean(self.losses[key]))

    def complete(self, key: Candidate) -> bool:
        """Whether every fold has judged the candidate; means over different users do not compare."""
        return all(not bool(torch.isnan(self.losses[key][self.fold == f]).all()) for f in range(self.folds))

    def worse(self, key: Candidate, than: Candidate) -> tuple[float, float]:
        """How much higher the loss of `key` is than that of `than`, and the standard error over the users that have both."""
        difference = (self.losses[key] - self.losses[than]).double()
        difference = difference[~torch.isnan(difference)]
        n = len(difference)
        return float(difference.mean()) if n else 0.0, float(difference.std() / n**0.5) if n > 1 else float("inf")

    # -- choosing

    def crowd_alone(self) -> None:
        """Note the loss of a population in which nobody differs."""
        for f in range(self.folds):
            self._note(CROWD, f, View(self.data.weight[:0, None], self.data.weight[:, None], self.crowds.offsets[:, f], []), None)

    def select(self, kappas: Sequence[float], types: Sequence[int], progress: Callable[[float], None]) -> Candidate:
        """A refinement, and types, have to be better than what is simpler by more than one standard error over users, and the
        smallest kappa within one of the best is taken. To leave the crowd takes two: the best of a hundred candidates flatters
        itself."""
        self.crowd_alone()
        for f in range(self.folds):
            progress(0.3 * f / self.folds)
            view = self.view(self.fold != f, f)
            for shrunk in (False, True):
                first = self.start(view, f, shrunk)
                learned = population.gaussian_rounds(view.learn, first, ROUNDS[-1])
                for number, prior in enumerate(itertools.chain([first], learned)):
                    if number in ROUNDS:
                        self.known[f, Candidate(number, shrunk)] = view, prior
        wide = [Candidate(number, shrunk, kappa=kappa) for shrunk in (False, True) for number in ROUNDS for kappa in WIDTHS]
        start = self._try(wide, wide[0], lambda share: progress(0.3 + 0.15 * share))
        width = self.known[0, start._replace(kappa=1.0)][0].bases.shape[1]
        ranks = [rank for rank in RANKS if rank < width] if start.rounds else []
        widths = sorted({start.kappa, 1.0})
        narrow = [start._replace(rank=rank, kappa=kappa) for rank in ranks for kappa in widths]
        best = self._try(narrow, start, lambda share: progress(0.45 + 0.1 * share))
        refined = [start._replace(kappa=1.0, refined=ridge, fitted=fitted) for ridge in REFINEMENTS for fitted in (False, True)]
        # A refinement is dear: the first fold says which one, and whether it is worth the others.
        promising = self._try(refined, best, lambda share: progress(0.55 + 0.05 * share), folds=1, among=0)
        if promising != best:
            self._try([promising], best, lambda share: progress(0.6 + 0.1 * share))
            loss, error = self.worse(promising, best)
            best = promising if -loss > error else best
        scaled = [best._replace(kappa=kappa) for kappa in kappas]
        self._try(scaled, best, lambda share: progress(0.7 + 0.1 * share))
        lowest = min([CROWD, *scaled], key=self.mean)
        mixed = [lowest._replace(types=number) for number in types] if lowest != CROWD else []
        best = self._try(mixed, lowest, lambda share: progress(0.8 + 0.2 * share))
        if best.types and -self.worse(best, lowest)[0] > self.worse(best, lowest)[1]:
            lowest, scaled = best, [best]
        loss, error = self.worse(CROWD, lowest)
        if loss <= 2 * error:
            return CROWD
        return next(key for key in scaled if key == lowest or self.worse(key, lowest)[0] <= self.worse(key, lowest)[1])

    def _try(
        self,
        keys: Sequence[Candidate],
        beside: Candidate,
        progress: Callable[[float], None],
        *,
        folds: int | None = None,
        among: int | None = None,
    ) -> Candidate:
        """Note the loss of each candidate on the first `folds` folds; return the best one, `beside` included."""
        for f in range(self.folds if folds is None else folds):
            progress(f / self.folds)
            for key in keys:
                if key not in self.losses or bool(torch.isnan(self.losses[key][self.fold == f]).all()):
                    self._note(key, f, *self._estimated(key, f))
        users = self.fold >= 0 if among is None else self.fold == among
        return min([beside, *keys], key=lambda key: float(torch.nanmean(self.losses[key][users])))

    def _estimated(self, key: Candidate, fold: int) -> tuple[View, Prior]:
        """The candidate on the fold's learning users, from the nearest simpler one, which is kept."""
        if (fold, key) not in self.known:
            self.known[fold, key] = self._step(key, self.fold != fold, fold, lambda simpler: self._estimated(simpler, fold))
        return self.known[fold, key]

    def _step(
        self, key: Candidate, learn: Tensor, fold: int, simpler: Callable[[Candidate], tuple[View, Prior]]
    ) -> tuple[View, Prior]:
        if key.types:
            view, prior = simpler(key._replace(types=0))
            view, prior = self.narrowed(view, prior, min(MIXED, view.bases.shape[1]), rounds=0)
            return view, population.mixture(view.learn, prior, key.types, seed=self.seed)
        if key.kappa != 1:
            view, prior = simpler(key._replace(kappa=1.0))
            return view, prior.scaled(key.kappa)
        if key.fitted:
            view, prior = simpler(key._replace(fitted=False))
            return view, population.after(view.learn, prior, 5)
        if key.refined:
            return self._refined(*simpler(key._replace(refined=0.0, rank=None)), learn, key.refined, fold)
        return self.narrowed(*simpler(key._replace(rank=None)), key.rank)

    def describe(self, key: Candidate) -> tuple[View, Prior]:
        """The candidate estimated on everybody, in the coordinates of `population.compress`."""
        everybody = torch.ones(len(self.data.user_ids), dtype=torch.bool)

        def estimate(wanted: Candidate) -> tuple[View, Prior]:
            if wanted == Candidate(wanted.rounds, wanted.shrunk):
                view = self.view(everybody, -1)
                return view, population.after(view.learn, self.start(view, -1, wanted.shrunk), wanted.rounds)
            return self._step(wanted, everybody, -1, estimate)

        return self.narrowed(*estimate(key), None)

    # -- estimating

    def view(self, learn: Tensor, fold: int) -> View:
        """The wide basis of the learning users: up to `n_bases` directions, their margins of unit variance in all."""
        offset = self.crowds.offsets[:, fold]
        bases = self._bases(learn, offset, fold)
        slopes = self.design.project(bases)
        size = slopes.square().sum(1).mean().sqrt().clamp(min=1e-12)
        return View(bases / size, slopes / size, offset, self._batches(slopes / size, offset, learn))

    def start(self, view: View, fold: int, shrunk: bool) -> Prior:
        """N(m, s I) where the margins have variance `prior_variance`; m moves the crowd to its more strongly ridged self."""
        k = view.bases.shape[1]
        spread = torch.eye(k, dtype=view.slopes.dtype, device=view.slopes.device) * self.prior_variance
        if not shrunk:
            return Prior.gaussian(spread)
        return Prior.gaussian(
            spread, view.bases.T @ self.crowds.shifts[:, fold] / view.bases.square().sum(0)
        )  # orthogonal columns

    def narrowed(self, view: View, prior: Prior, rank: int | None, rounds: int = 5) -> tuple[View, Prior]:
        """The `rank` directions that hold most of the prior variance of the margins, and a few rounds of EM among them alone.

        Without a rank, those that hold all but half a percent.
        """
        turn, prior = population.compress(view.slopes, prior, most=rank)
        learn = [batch._replace(slopes=batch.slopes @ turn) for batch in view.learn]
        view = View(view.bases @ turn, view.slopes @ turn, view.offset, learn)
        return view, prior if rank is None else population.after(view.learn, prior, rounds)

    def _refined(self, view: View, prior: Prior, learn: Tensor, ridge: float, fold: int, most: int = 32) -> tuple[View, Prior]:
        turn, prior = population.compress(view.slopes, prior, most=most)
        direction = self.crowds.directions[:, fold]
        found = population.refine(self.data, self.design, view.offset, learn, view.bases @ turn, prior, direction, ridge=ridge)
        slopes = self.design.project(found.bases)
        return View(found.bases, slopes, view.offset, self._batches(slopes, view.offset, learn)), found.prior

    def _bases(self, learn: Tensor, offset: Tensor, fold: int) -> Tensor:
        """(D, K) orthonormal directions: the crowd's own, with both ridges, and those in which users' choices pull away from it.

        The pull of user i is the gradient of their log-likelihood at the crowd's reward, g_i = sum_j sigma(-m_ij) z_ij,
        centred over users; its leading right singular vectors are the directions of disagreement. With no more columns than
        bases, all of them.
        """
        scale = self.design.scale
        live = torch.nonzero(scale)[:, 0]
        if len(live) <= self.n_bases:
            bases = scale.new_zeros(len(scale), len(live))
            bases[live, torch.arange(len(live), device=bases.device)] = 1
            return bases
        slope = -likelihood.gradient(offset, self.data.tie) * self.data.weight
        pulls = self._pulls(slope, learn)  # (U, D)
        pulls = pulls - pulls.mean(0)
        size, left = torch.linalg.eigh((pulls @ pulls.T).double())
        size, left = size.flip(0), left.flip(1)
        kept = max(0, min(self.n_bases - 2, int((size > 1e-6 * size[0].clamp(min=1e-30)).sum())))
        right = pulls.T @ (left[:, :kept] / size[:kept].sqrt()).to(pulls)
        own = torch.stack([self.crowds.directions[:, fold], self.crowds.shifts[:, fold]], dim=1)
        orthonormal: Tensor = torch.linalg.qr(torch.cat([own, right], dim=1))[0]
        return orthonormal

    def _pulls(self, slope: Tensor, learn: Tensor, most: int = 2048) -> Tensor:
        """(U', D) the pull of each learning user; of at most `most` users, evenly spaced, which bounds memory and time."""
        users = torch.nonzero(learn)[:, 0].to(slope.device)
        if len(users) > most:
            users = users[torch.linspace(0, len(users) - 1, most, device=users.device).round().long()]
        grouped, scale, out = self.data.grouped(), self.design.scale, []
        for part in torch.split(users, max(1, 2**24 // max(1, len(scale) * int(grouped.counts.max())))):
            index, real = self._places(part)
            rows = index[real]
            owner = torch.repeat_interleave(torch.arange(len(part), device=rows.device), grouped.counts[part])
            z = self.design.design.rows(rows) * slope[rows, None]
            out.append(z.new_zeros(len(part), z.shape[1]).index_add_(0, owner, z))
        return torch.cat(out) * scale

    def _batches(self, slopes: Tensor, offset: Tensor, users: Tensor) -> list[Batch]:
        chosen = torch.nonzero(users)[:, 0].to(slopes.device)
        out = []
        for rows in batches(self.data.grouped().counts[chosen], slopes.shape[1]):
            index, real = self._places(chosen[rows])
            out.append(Batch(slopes[index], offset[index] * real, self.data.weight[index] * real, self._ties(index)))
        return out

    def _places(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """(U, n) indices of the users' pairs and the mask of the real ones."""
        grouped = self.data.grouped()
        counts = grouped.counts[users]
        column = torch.arange(int(counts.max()), device=counts.device)
        real = column < counts[:, None]
        return grouped.order[torch.where(real, grouped.offsets[users][:, None] + column, 0)], real

    def _ties(self, index: Tensor) -> Tensor | None:
        return self.data.tie[index] if bool(self.data.tie.any()) else None

    # -- judging

    def _note(self, key: Candidate, fold: int, view: View, prior: Prior | None) -> None:
        values = self.losses.setdefault(key, torch.full((len(self.data.user_ids),), torch.nan))
        values[self.fold == fold] = self._loss(view, fold, prior)

    def _loss(self, view: View, fold: int, prior: Prior | None) -> Tensor:
        """(held-out users of the fold,) smoothed error on their query pairs, over all shots; NaN for a user without query.

        The mean of sigma(-margin / s), s a third of the fold's median margin: the share of choices told wrongly, with a soft
        edge. What is compared is how well candidates tell choices apart. A log loss would prefer a timid prior to a right
        one wherever people are consistent, because a single confident mistake outweighs many right answers.
        """
        held = torch.nonzero(self.fold == fold)[:, 0].to(view.slopes.device)
        out = torch.zeros(len(held), device=view.slopes.device)
        for shots, counts in SHOTS:
            parts = []
            for rows in batches(self.data.grouped().counts[held], view.slopes.shape[1]):
                index, real = self._places(held[rows])
                asked = (self.query[index] & real & ~self.data.tie[index]) * self.data.weight[index]
                whole = Batch(view.slopes[index], view.offset[index] * real, asked, self._ties(index))
                margin = whole.offset
                if prior is not None:
                    said = whole._replace(weight=((self.place[index] < shots) & real) * self.data.weight[index])
                    margin = whole.margins(posterior(said, prior, tolerance=1e-3, covariance=False).mean)
                parts.append((rows, margin, asked))
            size = torch.cat([margin[asked > 0].abs() for _, margin, asked in parts]).median().clamp(min=1e-12) / 3
            for rows, margin, asked in parts:
                # A user without query divides nothing by nothing and stays NaN.
                out[rows] += counts * (likelihood.probability(-margin / size) * asked).sum(1) / asked.sum(1)
        return out.cpu()

    def curve(self) -> list[dict[str, Any]]:
        """Every candidate with its mean smoothed error and the number of users behind it: JSON-able."""
        return [
            key._asdict() | {"error": self.mean(key), "users": int((~torch.isnan(values)).sum())}
            for key, values in self.losses.items()
        ]
