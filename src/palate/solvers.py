"""Many small convex problems at once: every user's weights, given what each of their pairs says.

A user's pairs enter as margins `offset + slopes . w`, linear in the K weights, so that nothing here ever sees texts or the
D-dimensional embeddings. Users are rows of a padded batch; a padded pair has weight 0. All solvers are deterministic.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from palate import likelihood
from palate.priors import Prior


class Batch(NamedTuple):
    """U users with up to n pairs each: margin of pair j of user i is offset[i, j] + slopes[i, j] . w[i]."""

    slopes: Tensor  # (U, n, K)
    offset: Tensor  # (U, n)
    weight: Tensor  # (U, n), 0 where there is no pair
    tie: Tensor | None  # (U, n) bool, None where there is no tie at all

    def margins(self, weights: Tensor) -> Tensor:
        return torch.baddbmm(self.offset[..., None], self.slopes, weights[..., None])[..., 0]

    def loss(self, weights: Tensor) -> Tensor:
        """Weighted negative log-likelihood of each user, (U,)."""
        return (likelihood.nll(self.margins(weights), self.tie) * self.weight).sum(1)

    def at(self, users: Tensor) -> "Batch":
        return Batch(self.slopes[users], self.offset[users], self.weight[users], None if self.tie is None else self.tie[users])


class Sides(NamedTuple):
    """U users with up to n pairs each, for the methods that need both texts of a pair and not their difference."""

    chosen: Tensor  # (U, n, F)
    rejected: Tensor  # (U, n, F)
    weight: Tensor  # (U, n), 0 where there is no pair
    tie: Tensor | None  # (U, n) bool, None where there is no tie at all


class Solution(NamedTuple):
    """Per user: the mean of the weights, their covariance (None where the method has none), log evidence, convergence."""

    mean: Tensor  # (U, K)
    covariance: Tensor | None  # (U, K, K)
    log_evidence: Tensor | None  # (U,), Laplace, up to a constant shared by all priors
    converged: Tensor  # (U,) bool


Solver = Callable[[Batch, tuple[str, ...]], Solution]


def batches(counts: Tensor, width: int, numbers: int = 2**24) -> Iterator[Tensor]:
    """Users in chunks of similar pair counts, each chunk at most `numbers` elements when padded: indices into `counts`."""
    order = torch.argsort(counts, stable=True)
    ordered = counts[order].clamp(min=1).tolist()
    start = 0
    while start < len(ordered):
        stop, most = start, max(2 * ordered[start], 8)
        while stop < len(ordered) and ordered[stop] <= most:
            if (stop + 1 - start) * ordered[stop] * (width + 4) + (stop + 1 - start) * width * width > numbers and stop > start:
                break
            stop += 1
        yield order[start:stop]
        start = stop


def chunks(counts: Tensor, width: int, numbers: int = 2**24) -> Iterator[Tensor]:
    """As `batches`, but everybody at once and in order where that fits, padding included: what most data do."""
    most = int(counts.max()) if len(counts) else 0
    if len(counts) * (most * (width + 4) + width * width) <= numbers:
        yield torch.arange(len(counts), device=counts.device)
    else:
        yield from batches(counts, width, numbers)


def newton(batch: Batch, *, max_steps: int = 50, tolerance: float = 1e-5, start: Tensor | None = None) -> tuple[Tensor, ...]:
    """MAP of u_i ~ N(0, I) under each user's pairs, by Newton's method; a step that overshoots goes to the bottom of its line.

    Minimises sum_j weight_ij nll(margin_ij) + |u|^2 / 2. The objective is strictly convex with Hessian I + A^T A, A =
    sqrt(curvature) slopes, so the step is always defined and leads down. Where pairs are saturated the curvature says nothing of
    how far: halving the step needs hundreds of rounds at slopes of a thousand, the line's own minimum about fifteen. With
    fewer pairs than weights the step is taken in the n pairs instead of the K weights (Woodbury). Users leave the batch as they
    converge.

    Returns:
        mode (U, K), objective (U,), converged (U,) bool: the last step was below `tolerance` (in prior standard deviations).
    Cost: O(U (n K m + m^3)) a step with m = min(n, K); 4 to 8 steps are typical.
    """
    users, _, k = batch.slopes.shape
    mode = batch.slopes.new_zeros(users, k) if start is None else start.clone()
    value = batch.slopes.new_zeros(users)
    converged = torch.zeros(users, dtype=torch.bool, device=mode.device)
    active: Tensor | None = None  # None: everybody, so that the common case copies nothing
    part, point = batch, mode.clone()
    margin = part.margins(point)
    current = _objective(part, margin, point)
    noise = 64 * torch.finfo(mode.dtype).eps  # rounding of a sum must not read as an increase
    for _ in range(max_steps):
        step = -_solve(part, margin, _pull(part, margin) + point)
        trial = point + step
        ahead = part.margins(trial)
        objective = _objective(part, ahead, trial)
        worse = objective > current + noise * current.abs()
        if bool(worse.any()):
            step = torch.where(worse, _length(part, margin, point, step), torch.ones_like(current))[:, None] * step
            trial = point + step
            ahead = part.margins(trial)
            objective = _objective(part, ahead, trial)
        point, current, margin = trial, objective, ahead
        done = (step.abs() <= tolerance).all(1)
        where = slice(None) if active is None else active
        mode[where], value[where], converged[where] = point, current, done
        if bool(done.all()):
            break
        if float(done.float().mean()) > 0.25:  # gathering costs a copy; worth it only when many are done
            left = torch.nonzero(~done)[:, 0]
            active = left if active is None else active[left]
            part, point, current, margin = part.at(left), point[left], current[left], margin[left]
    return mode, value, converged


def _length(batch: Batch, margin: Tensor, point: Tensor, step: Tensor) -> Tensor:
    """(U,) in (0, 1): where the objective stops falling along each step, by bisection of its slope. O(n) a user and halving."""
    along = torch.bmm(batch.slopes, step[..., None])[..., 0]
    start, steep = (point * step).sum(1), step.square().sum(1)
    low, high = torch.zeros_like(start), torch.ones_like(start)
    for _ in range(30):
        middle = (low + high) / 2
        pull = likelihood.gradient(margin + middle[:, None] * along, batch.tie) * batch.weight
        falls = (pull * along).sum(1) + start + middle * steep < 0
        low, high = torch.where(falls, middle, low), torch.where(falls, high, middle)
    return (low + high) / 2


def _objective(batch: Batch, margin: Tensor, point: Tensor) -> Tensor:
    return (likelihood.nll(margin, batch.tie) * batch.weight).sum(1) + point.square().sum(1) / 2


def _root(batch: Batch, margin: Tensor) -> Tensor:
    """A (U, n, K) with A^T A the Hessian of the likelihood."""
    return batch.slopes * (likelihood.curvature(margin) * batch.weight).sqrt()[..., None]


def _factor(root: Tensor) -> Tensor:
    """Cholesky factor of I + A A^T (n x n) or I + A^T A (K x K), whichever is smaller."""
    pairs, k = root.shape[1:]
    gram = root @ root.mT if pairs < k else root.mT @ root
    diagonal = gram.diagonal(dim1=1, dim2=2)
    # With huge slopes the 1 drowns in the rounding of the gram matrix; what is added then is of the size of that rounding.
    diagonal.add_(1 + 4 * torch.finfo(gram.dtype).eps * diagonal.sum(1, keepdim=True))
    factor: Tensor = torch.linalg.cholesky(gram)
    return factor


def _solve(batch: Batch, margin: Tensor, right: Tensor) -> Tensor:
    """(I + A^T A)^-1 right."""
    root = _root(batch, margin)
    factor = _factor(root)
    if root.shape[1] >= root.shape[2]:
        return torch.cholesky_solve(right[..., None], factor)[..., 0]
    inner = torch.cholesky_solve(root @ right[..., None], factor)
    return right - (root.mT @ inner)[..., 0]


class Laplace(NamedTuple):
    """The curvature at the mode, from which covariances in whitened coordinates follow: (I + A^T A)^-1.

    `half` is L^-1 A (n < K; the covariance is I - half^T half) or L^-1 (otherwise; it is half^T half).
    """

    half: Tensor  # (U, min(n, K), K)
    log_det: Tensor  # (U,) of I + A^T A
    complement: bool

    @classmethod
    def at(cls, batch: Batch, mode: Tensor, walls: int = 0) -> "Laplace":
        """Of a batch whose last `walls` pairs are a prior's walls. The curvature of sigma is no guide there: a wall that is not
        touched has none, however near it is. Their log barrier has 1 / margin^2, as in `Prior.covariance`.
        """
        margin = batch.margins(mode)
        root = _root(batch, margin)
        if walls:
            barrier = batch.slopes[:, -walls:] / margin[:, -walls:, None].clamp(min=1)  # at a wall, or behind it, 1
            root = torch.cat([root[:, :-walls], barrier], dim=1)
        factor = _factor(root)
        complement = root.shape[1] < root.shape[2]
        right = root if complement else torch.eye(root.shape[2], dtype=root.dtype, device=root.device).expand_as(factor)
        half = torch.linalg.solve_triangular(factor, right, upper=False)
        return cls(half, 2 * torch.diagonal(factor, dim1=1, dim2=2).log().sum(1), complement)

    def covariance(self) -> Tensor:
        """(U, K, K)."""
        inner = self.half.mT @ self.half
        if not self.complement:
            return inner
        inner.neg_().diagonal(dim1=1, dim2=2).add_(1)
        return inner

    def total(self, share: Tensor) -> Tensor:
        """sum_i share_i C_i (K, K) without forming any C_i: one matrix product."""
        flat = (self.half * share.sqrt()[:, None, None]).flatten(0, 1)
        inner = flat.T @ flat
        return torch.eye(len(inner), dtype=inner.dtype, device=inner.device) * share.sum() - inner if self.complement else inner


def whitened(batch: Batch, prior: Prior, component: int) -> Batch:
    """The same pairs as functions of u, where w = mean + L u and u ~ N(0, I); the prior's walls are pairs like the others."""
    if prior.walls is not None:
        batch = _walled(batch, prior.walls)
    mean, factor = prior.means[component], prior.factors[component]
    return batch._replace(slopes=batch.slopes @ factor, offset=batch.offset + batch.slopes @ mean)


def _walled(batch: Batch, walls: Tensor) -> Batch:
    """The batch with one more choice of every user for each wall (E, K). A user without any pair in it gets them too."""
    users, more = len(batch.offset), len(walls)
    slopes = torch.cat([batch.slopes, walls.expand(users, -1, -1)], dim=1)
    offset = torch.cat([batch.offset, batch.offset.new_zeros(users, more)], dim=1)
    weight = torch.cat([batch.weight, batch.weight.new_ones(users, more)], dim=1)
    tie = None if batch.tie is None else torch.cat([batch.tie, batch.tie.new_zeros(users, more)], dim=1)
    return Batch(slopes, offset, weight, tie)


def posterior(batch: Batch, prior: Prior, *, max_steps: int = 50, tolerance: float = 1e-5, covariance: bool = True) -> Solution:
    """Laplace posterior of every user's weights under a (mixture of) Gaussian prior.

    For each component m, with w = mean_m + L_m u: mode by `newton`, C_m = L_m (I + A^T A)^-1 L_m^T, and log evidence
    log share_m - objective - log|I + A^T A| / 2 (Laplace; the prior's determinant cancels in whitened coordinates). Components
    are weighed by their evidence and the mixture is returned by its mean and covariance (MacKay 2003, ch. 27; the mean of a
    mixture is the mean of the components' means, its covariance theirs plus the spread of the means).
    """
    prior = prior.to(batch.slopes)
    means, spreads, evidences, converged = [], [], [], []
    for m in range(prior.n_components):
        white, factor = whitened(batch, prior, m), prior.factors[m]
        mode, value, done = newton(white, max_steps=max_steps, tolerance=tolerance)
        curved = Laplace.at(white, mode, prior.n_walls)
        means.append(prior.means[m] + mode @ factor.T)
        evidences.append(prior.share[m].log() - value - curved.log_det / 2)
        converged.append(done)
        if covariance:
            spreads.append(factor @ curved.covariance() @ factor.T)
    if len(means) == 1:
        return Solution(means[0], spreads[0] if covariance else None, evidences[0], converged[0])
    evidence = torch.stack(evidences, dim=1)  # (U, M)
    responsibility = evidence.softmax(1)
    mean = sum((responsibility[:, m, None] * w for m, w in enumerate(means)), start=torch.zeros_like(means[0]))
    spread: Tensor | None = None
    if covariance:
        spread = torch.zeros_like(spreads[0])
        for m, w in enumerate(means):
            away = w - mean
            spread += responsibility[:, m, None, None] * (spreads[m] + away[:, :, None] * away[:, None, :])
    return Solution(mean, spread, evidence.logsumexp(1), torch.stack(converged, dim=1).all(1))


class _Interior(NamedTuple):
    """Where a primal-dual method stands on the simplex, or a step of it."""

    w: Tensor  # (U, K) weights, above 0
    slack: Tensor  # (U, K) multipliers of w >= 0, above 0
    level: Tensor  # (U, 1) multiplier of sum w = 1

    def unrest(self, pull: Tensor) -> Tensor:
        """(U, K) gradient of the Lagrangian, 0 at an optimum; `pull` is the gradient of the loss at `w`."""
        return pull - self.slack + self.level

    def residual(self, pull: Tensor, centre: Tensor) -> Tensor:
        """(U,) length of the equations that define the point of the central path with w slack = centre."""
        return torch.cat([self.unrest(pull), self.w * self.slack - centre], dim=1).square().sum(1).sqrt()

    def room(self, step: "_Interior") -> Tensor:
        """(U,) how much of a step, at most all of it, leaves everything above 0."""
        value, change = torch.cat([self.w, self.slack], dim=1), torch.cat([step.w, step.slack], dim=1)
        most: Tensor = torch.where(change < 0, -value / change, torch.inf).amin(1)
        return (0.99 * most).clamp(max=1)

    def moved(self, step: "_Interior", length: Tensor) -> "_Interior":
        return _Interior(*(value + length[:, None] * change for value, change in zip(self, step, strict=True)))


def simplex(batch: Batch, *, tolerance: float = 1e-7, max_steps: int = 80) -> Solution:
    """Maximum likelihood weights on the probability simplex: the exact answer to LoRe's few-shot problem.

    Minimises sum_j weight_ij nll(margin_ij) / sum_j weight_ij over w >= 0, sum_k w_k = 1, by a primal-dual interior-point method
    (Boyd and Vandenberghe 2004, algorithm 11.2) that follows the central path w_k slack_k = centre down to `tolerance` / K: the
    duality gap is `tolerance`. Where several weights fit equally well it ends at their analytic centre.
    The optimum often lies on the boundary, where a Gaussian approximation means nothing: the covariance is None.
    Cost: O(U n K^2 + U K^3) a step, about 15 steps, in float64. Users leave the batch as they converge.
    """
    share = batch.weight.double()
    share = share / share.sum(1, keepdim=True).clamp(min=1e-12)
    part = Batch(batch.slopes.double(), batch.offset.double(), share, batch.tie)
    users, _, k = part.slopes.shape
    best, floor = part.slopes.new_full((users, k), 1 / k), tolerance / k
    converged = torch.ones(users, dtype=torch.bool, device=best.device)
    if k == 1:
        return Solution(best.to(batch.slopes), None, None, converged)
    active = torch.arange(users, device=best.device)
    point = _Interior(best.clone(), torch.full_like(best, 0.1 * k), best.new_zeros(users, 1))
    margin = part.margins(point.w)
    pull = _pull(part, margin)
    for _ in range(max_steps):
        centre = ((point.w * point.slack).mean(1, keepdim=True) * 0.1).clamp(min=floor)
        step, before = _towards(part, margin, pull, point, centre), point.residual(pull, centre)
        length = point.room(step)
        for _ in range(40):
            trial = point.moved(step, length)
            margin = part.margins(trial.w)
            pull = _pull(part, margin)
            # Rounding must not read as an increase.
            worse = trial.residual(pull, centre) > (1 - 0.01 * length) * before + 1e-14
            if not bool(worse.any()):
                break
            length = torch.where(worse, length / 2, length)
        point = trial
        centred = ((point.w * point.slack - floor).abs() <= 0.01 * floor).all(1)
        done = centred & (point.unrest(pull).abs() <= 0.1 * floor).all(1)
        best[active], converged[active] = point.w, done
        if bool(done.all()):
            break
        if float(done.float().mean()) > 0.25:  # as in `newton`
            left = torch.nonzero(~done)[:, 0]
            active, part, margin, pull = active[left], part.at(left), margin[left], pull[left]
            point = _Interior(*(value[left] for value in point))
    return Solution(best.to(batch.slopes), None, None, converged)


def _pull(batch: Batch, margin: Tensor) -> Tensor:
    """(U, K) gradient of the weighted loss."""
    slope = likelihood.gradient(margin, batch.tie) * batch.weight
    return torch.bmm(batch.slopes.mT, slope[..., None])[..., 0]


def _towards(batch: Batch, margin: Tensor, pull: Tensor, point: _Interior, centre: Tensor) -> _Interior:
    """Newton's step to the point of the central path with w slack = centre."""
    root = _root(batch, margin)
    hessian = root.mT @ root
    hessian.diagonal(dim1=1, dim2=2).add_(point.slack / point.w)
    # With the level inside, its change is small near the end and what is subtracted below does not cancel.
    downhill = pull + point.level - centre / point.w
    solved = torch.cholesky_solve(torch.stack([downhill, torch.ones_like(downhill)], dim=2), torch.linalg.cholesky(hessian))
    rise = solved[..., 0].sum(1, keepdim=True) / solved[..., 1].sum(1, keepdim=True)
    w: Tensor = rise * solved[..., 1] - solved[..., 0]
    return _Interior(w, centre / point.w - point.slack - point.slack / point.w * w, -rise)


def adam_on_logits(
    batch: Batch, start: Tensor, *, steps: int, rate: float, betas: tuple[float, float] = (0.9, 0.999)
) -> Solution:
    """Weights softmax(a) after `steps` of Adam on every user's logits a from `start` (U, K): the published few-shot routines.

    Loss: mean over the user's pairs of nll(margin). Adam (Kingma and Ba 2015) is elementwise and users share nothing, so the
    batch gives exactly what a loop over users gives. `converged` is False for everybody: a fixed number of steps proves nothing.
    """
    share = batch.weight / batch.weight.sum(1, keepdim=True).clamp(min=1e-12)
    logits = start.clone().to(batch.slopes)
    first, second = torch.zeros_like(logits), torch.zeros_like(logits)
    for step in range(1, steps + 1):
        w = logits.softmax(1)
        slope = likelihood.gradient(batch.margins(w), batch.tie) * share
        pull = torch.bmm(batch.slopes.mT, slope[..., None])[..., 0]
        pull = w * (pull - (w * pull).sum(1, keepdim=True))  # through the softmax
        first = betas[0] * first + (1 - betas[0]) * pull
        second = betas[1] * second + (1 - betas[1]) * pull.square()
        scale = (second / (1 - betas[1] ** step)).sqrt() + 1e-8
        logits = logits - rate * first / (1 - betas[0] ** step) / scale
    done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    return Solution(logits.softmax(1), None, None, done)
