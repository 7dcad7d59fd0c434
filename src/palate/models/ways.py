"""Ways of telling users apart, for `MRM`: where each starts, and what held-out seen users say of it and of when to stop.

Nothing here sees a test choice. A way is judged on users whom neither its start nor its training has met, adapted from a few of
their choices as new users are; the crowd's reward alone is always among the candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from palate import likelihood
from palate.data.pairs import EmbeddedPairs
from palate.models import crowd, meta, pulls
from palate.models.meta import ExactSolve, GradientSteps, Inner, Numbers, Outer, Shape, State, described
from palate.models.objectives import RPO, CVaR, Mean
from palate.models.validation import edge, halves, position
from palate.solvers import chunks

if TYPE_CHECKING:
    from palate.models.mrm import MRM

Progress = Callable[[float, str], None]  # (share done, what)

INNERS: dict[str, Callable[..., Inner]] = {"GradientSteps": GradientSteps, "ExactSolve": ExactSolve}
PARTS: dict[str, Callable[..., Any]] = {**INNERS, "Outer": Outer, "Mean": Mean, "RPO": RPO, "CVaR": CVaR}
RIDGES = (3e-4, 3e-3)  # of the bases
SIGNED, MIXED = 32, 4  # most bases with weights of either sign, and on the simplex
MARGIN_VARIANCE = 4.0  # of the personal part before any learning, in squared log-odds
SHOTS = ((1, 1 / 6), (2, 1 / 6), (5, 1 / 6), (10**6, 1 / 2))  # choices, and what the error after them counts


@dataclass(frozen=True)
class Way:
    """One complete description of how users are told apart and how it is learned."""

    shape: Shape
    inner: Inner
    outer: Outer

    def plan(self, epochs: int, **more: Any) -> dict[str, Any]:
        shape = asdict(self.shape) | {"hidden": list(self.shape.hidden)}
        return {"shape": shape, "inner": described(self.inner), "outer": described(self.outer), "epochs": epochs, **more}

    def model(self, wanted: "MRM") -> "MRM":
        """The model whose options say everything that was chosen."""
        options = {"n_bases": self.shape.n_bases, "simplex": self.shape.simplex}
        return wanted.like({}, **options, inner=described(self.inner), outer=described(self.outer))


def of_plan(plan: dict[str, Any]) -> Way:
    shape, inner, outer = (dict(plan[part]) for part in ("shape", "inner", "outer"))
    kind = INNERS[inner.pop("kind")]
    del outer["kind"]
    return Way(Shape(**{**shape, "hidden": tuple(shape["hidden"])}), kind(**inner), Outer(**outer))


def tasks(data: EmbeddedPairs, numbers: Numbers, shape: Shape) -> meta.Tasks:
    direction = numbers["direction"]
    design = crowd.Rescaled(data.differences(), numbers["scale"])
    offset = design.project(direction[:, None])[:, 0] if len(direction) else data.weight.new_zeros(len(data))
    return meta.Tasks(data, numbers["scale"], offset, shape)


def fair(data: EmbeddedPairs, seed: int) -> meta.Split:
    """Halves of every user that share nothing, drawn anew each epoch. Remembered: drawing costs more than an epoch."""
    return cache(lambda epoch: halves(data, 1000 * seed + epoch + 1))


class Choice:
    """Where the fixed preset starts, and what held-out seen users say of each way and of how long to go on."""

    def __init__(self, model: "MRM", data: EmbeddedPairs, seed: int, progress: Progress):
        self.model, self.data, self.seed, self.progress = model, data, seed, progress
        self.scale = crowd.standard_scale(data)[1]
        self.fold = crowd.user_folds(len(data.user_ids), seed, enough=200)
        self.crowd = crowd.fit_crowd(data, crowd.Rescaled(data.differences(), self.scale), self.fold)
        self._parts: dict[int, _Part] = {}
        self.folds = int(self.fold.max()) + 1

    def ways(self) -> list[Way]:
        """What the arguments leave open."""
        wanted = self.model
        free = wanted.n_bases is None and wanted.simplex is None and wanted.inner is None and not wanted.widths
        out = []
        for simplex in (False, True) if free else (bool(wanted.simplex),):
            inner = wanted.inner or (GradientSteps(0.5, 5) if simplex else ExactSolve())
            k = wanted.n_bases if wanted.n_bases is not None else MIXED if simplex else SIGNED
            plain = Outer(0.05, 256, 40, "constant", warmup=0.0)
            outers = [replace(plain, ridge=ridge) for ridge in RIDGES] if wanted.outer is None else [wanted.outer]
            out += [Way(Shape(k, wanted.widths, wanted.bias, simplex), inner, outer) for outer in outers]
        return out

    def state(self, head: dict[str, Any]) -> State:
        """The start of the way that was chosen, with the plan in its head."""
        ways = self.ways()
        curve: list[dict[str, Any]] = []
        best = ways[min(len(ways), len(RIDGES)) - 1]  # without anybody to ask: exact where free, the stronger pull, half way
        epochs = best.outer.epochs // 2
        nobody = replace(ways[0], shape=Shape(0))
        if len(self.data.user_ids) < 2 or self.model.n_bases == 0:
            best, epochs = nobody, 0
        elif self.folds:
            alone = torch.cat([self._judged(f, nobody, ()) for f in range(self.folds)], dim=1)[0]
            asked = ~torch.isnan(alone)
            lowest = _mean(alone[asked])
            curve.append({"crowd": True, "error": lowest})
            best, epochs, kept, rival, doubt = nobody, 0, alone, alone, 1.0
            for number, way in enumerate(ways):
                if way.shape.simplex and not ways[number - 1].shape.simplex:
                    rival, doubt = kept, 0.75  # a mixture has no covariance: it must beat signed weights by more than a trifle
                stops = sorted({0, *(way.outer.epochs * part // 4 for part in (1, 2, 4))})
                found = torch.cat([self._judged(f, way, stops) for f in range(self.folds)], dim=1)
                for stop, errors in zip(stops, found, strict=True):
                    error, gain = _mean(errors[asked]), (rival - errors)[asked].double()
                    curve.append({"way": way.plan(stop), "error": error})
                    sure = len(gain) > 1 and float(gain.mean()) > doubt * float(gain.std() / len(gain) ** 0.5)
                    if sure and error is not None and lowest is not None and error < lowest:
                        lowest, best, epochs, kept = error, way, stop, errors
                self.progress(0.1 + 0.7 * (number + 1) / len(ways), "MRM, what held-out users say")
        numbers = self._start(self.data, best.shape, self.crowd.direction)
        best = replace(best, shape=replace(best.shape, n_bases=len(numbers["start"])))
        return meta.beginning(numbers, head | {"plan": best.plan(epochs, curve=curve)})

    def _start(self, data: EmbeddedPairs, shape: Shape, mu: Tensor) -> Numbers:
        """Bases apart from each other, the crowd's reward among them or beneath them.

        The pull of user i is the gradient of their log-likelihood at the crowd's reward, g_i = sum_j sigma(-m_ij) z_ij; its
        leading right singular vectors, centred over users, are the directions of disagreement. With signed weights they are the
        bases, after the crowd's own direction, each giving margins of equal variance; on the simplex they stand on either side
        of the crowd's reward. Hidden layers start at random, with outputs of about unit size.
        """
        design = crowd.Rescaled(data.differences(), self.scale)
        empty, k = mu.new_zeros(0), shape.n_bases
        shared = empty if shape.simplex else mu
        numbers = {"hidden": empty, "spread": empty, "direction": shared, "scale": self.scale}
        if shape.hidden and k:
            generator = torch.Generator().manual_seed(self.seed)
            sizes = [(len(mu), shape.hidden[0]), *shape.sizes]
            drawn = [torch.randn(*s, generator=generator).to(mu) * (len(s) - 1) / s[0] ** 0.5 for s in sizes]
            bases, numbers["hidden"] = drawn[0] * len(mu) ** 0.5, torch.cat([part.flatten() for part in drawn[1:]])
        elif k:
            wanted = (k + 1) // 2 * (k > 1) if shape.simplex else k - 1
            axes = torch.cat([mu[:, None], self._disagreement(data, design, mu, wanted)], dim=1)
            axes = torch.linalg.qr(axes)[0]
            axes = axes / design.project(axes).square().mean(0).sqrt().clamp(min=1e-12)
            sides = torch.cat([mu[:, None] + axes[:, 1:], mu[:, None] - axes[:, 1:]], dim=1)
            sides = sides[:, :k] if sides.shape[1] else mu[:, None]
            bases = sides if shape.simplex else axes * (MARGIN_VARIANCE / axes.shape[1]) ** 0.5
        else:
            bases = mu.new_zeros(len(mu), 0)
        count = k if shape.hidden else bases.shape[1]
        numbers["spread"] = mu.new_ones(0 if shape.simplex or isinstance(self.model.inner, GradientSteps) else count)
        return numbers | {"bases": bases, "start": mu.new_zeros(count)}

    def _disagreement(self, data: EmbeddedPairs, design: crowd.Rescaled, mu: Tensor, most: int) -> Tensor:
        """(D, at most `most`) leading directions in which users pull away from the crowd's reward `mu`."""
        margin = design.project(mu[:, None])[:, 0]
        slope = -likelihood.gradient(margin, data.tie) * data.weight
        mine, owner = pulls.of_few(data)
        found = mu.new_zeros(int(owner.max()) + 1, len(mu))
        for rows in torch.split(mine, 4096):
            found.index_add_(0, owner[rows], design.design.rows(rows) * slope[rows, None])
        return pulls.leading((found - found.mean(0)) * self.scale, min(most, len(mu) - 1))

    def _judged(self, fold: int, way: Way, stops: Sequence[int]) -> Tensor:
        """(stops, or 1 for the start; held-out users) errors of a way learned without the users of a fold."""
        part = self._part(fold)
        numbers = self._start(part.learn, way.shape, part.crowd)
        shape = replace(way.shape, n_bases=len(numbers["start"]))
        state, problem = meta.beginning(numbers, {}), tasks(part.learn, numbers, shape)
        held = tasks(part.held, numbers, shape)
        errors = [part.errors(held, way.inner, state.numbers)] if not stops or 0 in stops else []
        inner, last = way.inner if self.model.meta_learned else None, max(stops, default=0)
        objective, seed = self.model.objective, self.seed
        for after, _ in meta.train(problem, inner, way.outer, objective, part.split, state, seed=seed, until=last):
            if after.epoch in stops:
                errors.append(part.errors(held, way.inner, after.numbers))
        return torch.stack(errors)

    def _part(self, fold: int) -> "_Part":
        if fold not in self._parts:
            held = (self.fold == fold).to(self.data.user_index.device)[self.data.user_index]
            learn, other = self.data[~held], self.data[held]
            design, nobody = crowd.Rescaled(learn.differences(), self.scale), torch.full((len(learn.user_ids),), -1)
            mu = crowd.fit_crowd(learn, design, nobody, ridges=(self.crowd.ridge,)).direction
            support, query = halves(other, self.seed)
            place = position(other, support, self.seed)
            self._parts[fold] = _Part(learn, other, mu, fair(learn, self.seed), place, query)
        return self._parts[fold]


def _mean(values: Tensor) -> float | None:
    """None where nobody can be asked: a failure is no number."""
    return float(values.mean()) if len(values) else None


@dataclass(frozen=True, eq=False)
class _Part:
    """The seen users without a fold, and the fold, whose users are adapted and judged as new ones."""

    learn: EmbeddedPairs
    held: EmbeddedPairs
    crowd: Tensor  # (D,) fitted on `learn`
    split: meta.Split  # of `learn`
    place: Tensor  # (P,) of each pair of `held` in its user's support
    query: Tensor  # (P,)

    def errors(self, problem: meta.Tasks, inner: Inner, numbers: Numbers) -> Tensor:
        """(U,) smoothed error (`validation.edge`) over all shots, NaN for a user without query."""
        out = torch.zeros(len(self.held.user_ids), device=self.place.device)
        together = list(chunks(self.held.grouped().counts, problem.shape.n_bases))
        for shots, counts in SHOTS:
            parts = []
            for users in together:
                batch, asked = meta.posed(problem, numbers, users, self.place < shots, self.query)
                margin = batch.offset
                if batch.slopes.shape[2]:
                    margin = batch.margins(meta.adapted(inner, batch, numbers, simplex=problem.shape.simplex))
                parts.append((users, margin, asked if batch.tie is None else asked * ~batch.tie))
            size = edge(torch.cat([margin[asked > 0] for _, margin, asked in parts]))
            for users, margin, asked in parts:
                out[users] += counts * (likelihood.probability(-margin / size) * asked).sum(1) / asked.sum(1)
        return out
