"""How people differ, and how much of it to believe: the personal part of `Hierarchical`, chosen on held-out seen users.

A candidate is a way to describe the population: for how long EM runs, along how many directions people differ, whether the
directions are refined by the likelihood, how wide the prior is, whether there are types of people, whether users are blends of
them. One thing is chosen after the other by the smoothed error of held-out users who are adapted from 1, 2, 5 and half of their
choices, as new users would be.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palate import likelihood
from palate.data.embeddings import CACHE_BYTES
from palate.data.pairs import EmbeddedPairs
from palate.models import crowd, population, pulls
from palate.models.validation import edge, halves, position
from palate.priors import Prior
from palate.solvers import Batch, batches, posterior

ROUNDS = (0, 10, 40)
WIDTHS = (0.03, 0.1, 0.3, 1.0)  # kappas with which rounds are compared
RANKS = (1, 2, 4, 8, 16)
REFINED = 32  # most directions that are refined
REFINEMENTS = (1e-4, 1e-3)  # ridge of the refined bases, the bolder one first
WIDE = 128  # directions among which people's differences are looked for, however few are kept
MIXED = 16  # most directions in which types are looked for
BLENDS = (12, 24)  # types that a user may be a blend of
FREE = 16384.0  # kappa under which types are found: any prior to speak of would draw the users' weights together
KAPPAS = (0.003, 0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0)
SHOTS = ((1, 1 / 6), (2, 1 / 6), (5, 1 / 6), (10**6, 1 / 2))  # choices, and what the loss after them counts


class Candidate(NamedTuple):
    """One way to describe how people differ."""

    rounds: int  # of EM
    rank: int | None = None  # directions kept; None: all that matter
    refined: float = 0.0  # ridge of the refinement of the bases; 0: not refined
    kappa: float = 1.0
    types: int = 0  # mixture components; 0: a plain Gaussian
    blended: int = 0  # types that users are blends of; 0: signed weights of any size


CROWD = Candidate(0, rank=0, kappa=0.0)  # nobody differs


@dataclass(frozen=True)
class View:
    """What a set of learning users sees: bases found without anybody else, and every pair's slopes in them."""

    bases: Tensor  # (D, K) on the scaled features
    slopes: Tensor  # (P, K), all pairs
    offset: Tensor  # (P,) the crowd's margin, the crowd fitted without the held-out users
    learn: list[Batch]


class Told(NamedTuple):
    """What is thought of all choices of some held-out users."""

    rows: Tensor  # (U,) which users of the fold
    margin: Tensor  # (U, n)
    variance: Tensor  # (U, n)
    asked: Tensor  # (U, n) what a pair counts: 0 where it is no query
    tie: Tensor  # (U, n)


@dataclass(frozen=True)
class Crowds:
    """The crowd as each fold sees it; the last column is everybody's."""

    offsets: Tensor  # (P, folds + 1) margins, bent or not
    directions: Tensor  # (D, folds + 1) the linear part on the scaled features
    shifts: Tensor  # (D, folds + 1) from there to the crowd with `crowd.STRONGER` times the ridge
    bent: bool = False  # whether the margins have a part that is not in the directions


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

    def judge(self, key: Candidate) -> None:
        """Note the loss of one candidate, unless it is known."""
        if key not in self.losses:
            self._try([], key, lambda share: None)

    def select(
        self, kappas: Sequence[float], types: Sequence[int], blends: Sequence[int], progress: Callable[[float], None]
    ) -> Candidate:
        """What empirical Bayes itself says (EM to its end, every direction, kappa 1), unless held-out users say otherwise.

        A departure from it has to be better by more than two standard errors over users (fewer directions, and types of people,
        by one), because the best of many candidates flatters itself; of the kappas up to 1 the smallest within one error of the
        best is taken; and the whole has to beat the crowd by one, or a crowd that bends by two. Where no width of the prior
        beats the crowd by one there is nothing to describe, and where none beats it by two the bases are not refined. Users are
        blends of types only where the best kappa is above 1, by one error.
        Around a crowd that agrees on nothing there is no floor, as the other answer says nothing of anybody: a user is known by
        their own choices, and where all directions are kept the prior from which EM starts is what has to be beaten.
        """
        alone = not bool(self.crowds.offsets.any())
        self.crowd_alone()
        for f in range(self.folds):
            progress(0.3 * f / self.folds)
            view = self.view(self.fold != f, f)
            first = self.start(view, f)
            learned = population.gaussian_rounds(view.learn, first, ROUNDS[-1])
            for number, prior in enumerate(itertools.chain([first], learned)):
                if number in ROUNDS:
                    self.known[f, Candidate(number)] = view, prior
        width = self.known[0, Candidate(0)][0].bases.shape[1]
        cap = self.n_bases if self.n_bases < width else None
        best = Candidate(ROUNDS[0 if alone and cap is None else -1], rank=cap)
        wide = [Candidate(number, rank=cap, kappa=kappa) for number in ROUNDS for kappa in WIDTHS]
        promising = self._try(wide, best, lambda share: progress(0.3 + 0.2 * share))
        loss, error = self.worse(CROWD, promising)
        if loss <= error and not alone:
            return CROWD
        best = self._surely(promising, best)._replace(kappa=1.0)
        narrow = [best._replace(rank=rank) for rank in RANKS if rank < (cap or width)] if best.rounds else []
        best = self._surely(self._try(narrow, best, lambda share: progress(0.5 + 0.1 * share)), best, errors=1)
        # A refinement is dear: only where people surely differ, and the first fold says which one, and whether to go on.
        hopeful = best
        for ridge in REFINEMENTS if loss > 2 * error and self.n_bases > 1 else ():
            refined = best._replace(rank=None, refined=ridge)
            hopeful = self._try([refined], hopeful, lambda share: progress(0.6 + 0.05 * share), folds=1)
            if hopeful == best:
                break  # a refinement that moves less has less to offer
        if hopeful != best:
            best = self._surely(self._try([hopeful], best, lambda share: progress(0.65 + 0.05 * share)), best)
        scaled = [best._replace(kappa=kappa) for kappa in kappas]
        lowest = self._surely(self._try(scaled, best, lambda share: progress(0.7 + 0.1 * share)), best)
        if lowest.kappa <= 1 and not alone:  # a spread that is surely wider than EM found needs no caution towards the crowd
            lowest = next(key for key in scaled if key.kappa >= lowest.kappa or self._near(key, lowest))
        best = lowest
        # A crowd that bends was kept because no personal part did better than it: one around it has more to show.
        if not alone and self._surely(best, CROWD, errors=2 if self.crowds.bent else 1) == CROWD:
            return CROWD
        mixed = [best._replace(types=number) for number in types]
        mixture = self._surely(self._try(mixed, best, lambda share: progress(0.8 + 0.1 * share)), best, errors=1)
        # People who err are no blends of a few types: of noise a dozen types make more of it (two groups, 30 users: .715 against
        # .733). Only where a spread surely wider than EM's is right does it pay, and the first fold says whether to go on.
        if best.kappa <= 1 or self.crowds.bent:
            return mixture
        # A refinement that did not surely help at kappa 1 can still show types that few directions hide.
        sources = dict.fromkeys(source._replace(kappa=FREE) for source in (best, hopeful))
        blended = [source._replace(blended=number) for source in sources for number in blends]
        if self._try(blended, mixture, lambda share: progress(0.9 + 0.03 * share), folds=1) == mixture:
            return mixture
        return self._surely(self._try(blended, mixture, lambda share: progress(0.93 + 0.07 * share)), mixture, errors=1)

    def _near(self, key: Candidate, lowest: Candidate) -> bool:
        """Whether its loss is within one standard error of the lowest."""
        loss, error = self.worse(key, lowest)
        return loss <= error

    def _surely(self, key: Candidate, than: Candidate, errors: float = 2) -> Candidate:
        """`key` if it is better than the other by more than so many standard errors over users, else the other."""
        loss, error = self.worse(than, key)
        return key if loss > errors * error else than

    def _try(
        self, keys: Sequence[Candidate], beside: Candidate, progress: Callable[[float], None], *, folds: int | None = None
    ) -> Candidate:
        """Note the loss of each candidate on the first `folds` folds; return the best one on them, `beside` included."""
        folds = self.folds if folds is None else folds
        for f in range(folds):
            progress(f / self.folds)
            for key in [beside, *keys]:
                if key not in self.losses or bool(torch.isnan(self.losses[key][self.fold == f]).all()):
                    self._note(key, f, *self.estimated(key, f))
        users = (self.fold >= 0) & (self.fold < folds)
        return min([beside, *keys], key=lambda key: float(torch.nanmean(self.losses[key][users])))

    def estimated(self, key: Candidate, fold: int) -> tuple[View, Prior]:
        """The candidate on the fold's learning users, from the nearest simpler one, which is kept."""
        if (fold, key) not in self.known:
            self.known[fold, key] = self._step(key, self.fold != fold, fold, lambda simpler: self.estimated(simpler, fold))
        return self.known[fold, key]

    def _step(
        self, key: Candidate, learn: Tensor, fold: int, simpler: Callable[[Candidate], tuple[View, Prior]]
    ) -> tuple[View, Prior]:
        if key == Candidate(key.rounds):
            view = self.view(learn, fold)
            return view, population.after(view.learn, self.start(view, fold), key.rounds)
        if key.blended:
            return self._blended(*self.narrowed(*simpler(key._replace(blended=0)), None), key.blended, learn, fold)
        if key.types:
            view, prior = simpler(key._replace(types=0))
            view, prior = self.narrowed(view, prior, min(MIXED, view.bases.shape[1]), rounds=0)
            return view, population.mixture(view.learn, prior, key.types, seed=self.seed)
        if key.kappa != 1:
            view, prior = simpler(key._replace(kappa=1.0))
            return view, prior.scaled(key.kappa)
        if key.refined:
            return self._refined(*simpler(key._replace(refined=0.0, rank=None)), learn, key.refined, fold)
        return self.narrowed(*simpler(key._replace(rank=None)), key.rank)

    def describe(self, key: Candidate) -> tuple[View, Prior]:
        """The candidate estimated on everybody, in the coordinates of `population.compress`; a blend in those of its types."""
        everybody = torch.ones(len(self.data.user_ids), dtype=torch.bool)

        def estimate(wanted: Candidate) -> tuple[View, Prior]:
            return self._step(wanted, everybody, -1, estimate)

        return estimate(key) if key.blended else self.narrowed(*estimate(key), None)

    # -- estimating

    def view(self, learn: Tensor, fold: int) -> View:
        """The wide basis of the learning users: up to `WIDE` directions, their margins of unit variance in all."""
        offset = self.crowds.offsets[:, fold]
        bases = self._bases(learn, offset, fold)
        slopes = self.design.project(bases)
        size = slopes.square().sum(1).mean().sqrt().clamp(min=1e-12)
        return View(bases / size, slopes / size, offset, self._batches(slopes / size, offset, learn))

    def start(self, view: View, fold: int) -> Prior:
        """N(m, s I) where the margins have variance `prior_variance`; m moves the crowd to its more strongly ridged self.

        What the crowd's direction says of the people in it beyond that, their own weights say better.
        """
        k = view.bases.shape[1]
        spread = torch.eye(k, dtype=view.slopes.dtype, device=view.slopes.device) * self.prior_variance
        square = view.bases.square().sum(0)  # the columns are orthogonal
        return Prior.gaussian(spread, view.bases.T @ self.crowds.shifts[:, fold] / square)

    def narrowed(self, view: View, prior: Prior, rank: int | None, rounds: int = 5) -> tuple[View, Prior]:
        """The `rank` directions that hold most of the prior variance of the margins, and a few rounds of EM among them alone.

        Without a rank, those that hold all but half a percent.
        """
        turn, prior = population.compress(view.slopes, prior, most=rank)
        learn = [batch._replace(slopes=batch.slopes @ turn) for batch in view.learn]
        view = View(view.bases @ turn, view.slopes @ turn, view.offset, learn)
        return view, prior if rank is None else population.after(view.learn, prior, rounds)

    def _refined(self, view: View, prior: Prior, learn: Tensor, ridge: float, fold: int) -> tuple[View, Prior]:
        """Bases refined inside the span of the view's: on its few coordinates, without another pass over the embeddings."""
        size = 1 / view.bases[:, 0].norm()
        frame = view.bases * size  # orthonormal, as `_bases` left it
        inside = crowd.Formed(view.slopes * size)
        turn, prior = population.compress(view.slopes, prior, most=min(REFINED, self.n_bases - 1))  # and the shift
        direction = frame.T @ self.crowds.directions[:, fold]
        found = population.refine(self.data, inside, view.offset, learn, turn / size, prior, direction, ridge=ridge)
        slopes = inside.project(found.bases)
        return View(frame @ found.bases, slopes, view.offset, self._batches(slopes, view.offset, learn)), found.prior

    def _blended(self, view: View, prior: Prior, types: int, learn: Tensor, fold: int) -> tuple[View, Prior]:
        """Users as blends of types: weight k is a user's share of type k, and with shares that sum to one the crowd cancels."""
        found = population.blend(view.learn, prior, types, seed=self.seed)
        direction = self.crowds.directions[:, fold]
        bases = view.bases @ found.means.T + direction[:, None] * (found.gains - 1)
        slopes = view.slopes @ found.means.T + view.offset[:, None] * (found.gains - 1)
        return View(bases, slopes, view.offset, self._batches(slopes, view.offset, learn)), Prior.blend(found.share)

    def _bases(self, learn: Tensor, offset: Tensor, fold: int) -> Tensor:
        """(D, K) orthonormal directions: the crowd's own, with both ridges, and those in which users' choices pull away from it.

        The pull of user i is the gradient of their log-likelihood at the crowd's reward, g_i = sum_j sigma(-m_ij) z_ij,
        centred over users; its leading right singular vectors are the directions of disagreement. With no more columns than
        that, all of them.
        """
        wide = max(WIDE, self.n_bases)
        scale = self.design.scale
        live = torch.nonzero(scale)[:, 0]
        if len(live) <= wide:
            bases = scale.new_zeros(len(scale), len(live))
            bases[live, torch.arange(len(live), device=bases.device)] = 1
            return bases
        slope = -likelihood.gradient(offset, self.data.tie) * self.data.weight
        found = self._pulls(slope, learn)  # (U, D)
        right = pulls.leading(found - found.mean(0), wide - 2)
        axes = torch.cat([self.crowds.directions[:, fold, None], self.crowds.shifts[:, fold, None], right], dim=1)
        axes = axes[:, axes.any(0)]  # none of a crowd that agrees on nothing, and nobody pulls where all choices are ties
        some = axes if axes.shape[1] else torch.nn.functional.one_hot(live[:1], len(scale)).T.to(scale)
        orthonormal: Tensor = torch.linalg.qr(some)[0]
        return orthonormal

    def _pulls(self, slope: Tensor, learn: Tensor) -> Tensor:
        """(U', D) the pull of each learning user, of at most `pulls.MOST` of them."""
        users = torch.nonzero(learn)[:, 0].to(slope.device)
        users = users[pulls.evenly(len(users), pulls.MOST, users.device)]
        grouped, scale, out = self.data.grouped(), self.design.scale, []
        for part in torch.split(users, max(1, CACHE_BYTES // max(1, 4 * len(scale) * int(grouped.counts.max())))):
            index, real = self.data.grouped().padded(part)
            rows = index[real]
            owner = torch.repeat_interleave(torch.arange(len(part), device=rows.device), grouped.counts[part])
            z = self.design.design.rows(rows) * slope[rows, None]
            out.append(z.new_zeros(len(part), z.shape[1]).index_add_(0, owner, z))
        return torch.cat(out) * scale

    def _batches(self, slopes: Tensor, offset: Tensor, users: Tensor) -> list[Batch]:
        chosen = torch.nonzero(users)[:, 0].to(slopes.device)
        out = []
        for rows in batches(self.data.grouped().counts[chosen], slopes.shape[1]):
            index, real = self.data.grouped().padded(chosen[rows])
            out.append(Batch(slopes[index], offset[index] * real, self.data.weight[index] * real, self._ties(index)))
        return out

    def _ties(self, index: Tensor) -> Tensor | None:
        return self.data.tie[index] if bool(self.data.tie.any()) else None

    # -- judging

    def _note(self, key: Candidate, fold: int, view: View, prior: Prior | None) -> None:
        values = self.losses.setdefault(key, torch.full((len(self.data.user_ids),), torch.nan))
        values[self.fold == fold] = self._loss(view, fold, prior)

    def _loss(self, view: View, fold: int, prior: Prior | None) -> Tensor:
        """(held-out users of the fold,) smoothed error (`validation.edge`) on their query pairs, over all shots; NaN for a user
        without query."""
        out = torch.zeros(int((self.fold == fold).sum()), device=view.slopes.device)
        for shots, counts in SHOTS:
            parts = self.told(view, fold, prior, shots)
            parts = [part._replace(asked=part.asked * ~part.tie) for part in parts]
            size = edge(torch.cat([part.margin[part.asked > 0] for part in parts]))
            for rows, margin, _, asked, _ in parts:
                # A user without query divides nothing by nothing and stays NaN.
                out[rows] += counts * (likelihood.probability(-margin / size) * asked).sum(1) / asked.sum(1)
        return out.cpu()

    def told(self, view: View, fold: int, prior: Prior | None, shots: int, *, spread: bool = False) -> list[Told]:
        """The fold's held-out users after so many choices, by parts; the variances are 0 unless asked for by `spread`."""
        held = torch.nonzero(self.fold == fold)[:, 0].to(view.slopes.device)
        parts = []
        for rows in batches(self.data.grouped().counts[held], view.slopes.shape[1]):
            index, real = self.data.grouped().padded(held[rows])
            asked = (self.query[index] & real) * self.data.weight[index]
            margin, variance = view.offset[index] * real, torch.zeros(())
            if prior is not None:
                said = (self.place[index] < shots) & real
                few = torch.argsort(~said, dim=1, stable=True)[:, : int(said.sum(1).max())]  # without the padding
                told, slopes = index.gather(1, few), view.slopes[index]
                weight = said.gather(1, few) * self.data.weight[told]
                support = Batch(view.slopes[told], view.offset[told], weight, self._ties(told))
                found = posterior(support, prior, tolerance=1e-3, covariance=spread)
                margin = torch.baddbmm(margin[..., None], slopes, found.mean[..., None])[..., 0]
                variance = variance if found.covariance is None else (slopes @ found.covariance * slopes).sum(2).clamp(min=0)
            parts.append(Told(rows, margin, variance, asked, self.data.tie[index]))
        return parts

    def curve(self) -> list[dict[str, Any]]:
        """Every candidate with its mean smoothed error and the number of users behind it: JSON-able."""
        return [
            key._asdict() | {"error": self.mean(key), "users": int((~torch.isnan(values)).sum())}
            for key, values in self.losses.items()
        ]
