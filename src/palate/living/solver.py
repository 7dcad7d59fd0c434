"""One user's weights, in float64 and far below a millisecond: damped Newton from the last answer.

`palate.solvers` is made for a million users in one batch; here it is one user, and the cost of an answer is that of a few
dozen calls of numpy. The answer is the same: the Laplace posterior under a mixture of Gaussians, in whitened coordinates
w = mean + L u, u ~ N(0, I), with a prior's walls as further choices. Several versions of one user's evidence (other weights
of the terms, other flip rates) can be solved side by side.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dposv

from palate.living.problem import At, Components, Problem
from palate.living.rows import Rows
from palate.living.terms import Floats

TOLERANCE = 1e-6  # of a step, in standard deviations of the prior; what it leaves is about its square
MAX_STEPS = 60
FLAT = 0.1  # least curvature that a step is divided by, where the prior alone has 1
NOISE = 64 * float(np.finfo(np.float64).eps)  # rounding of a sum must not read as an increase


class Mode(NamedTuple):
    """Where the posterior of each version and component is highest."""

    u: Floats  # (Z, M, K) whitened
    value: Floats  # (Z, M)
    hessian: Floats  # (Z, M, K, K)
    converged: NDArray[np.bool_]  # (Z, M)


def newton(problem: Problem, start: Floats | None = None) -> Mode:
    """The modes, by damped Newton from `start` (Z, M, K) or from the prior's means.

    Where somebody errs the objective is not convex, and a step goes down along the directions in which it bends downwards too
    (`_around_saddles`). A step that overshoots goes to the bottom of its line, as in `solvers.newton`. Versions leave as they
    converge.
    Cost: O(Z M (R K^2 + K^3)) a step, 2 to 4 steps from a near answer.
    """
    m, k = problem.prior.means.shape
    u = np.zeros((problem.versions, m, k)) if start is None else start
    here = problem.at(u)
    if problem.versions == 1:
        return Mode(*_descended(problem, u, here)[:4])
    found = Mode(u.copy(), here.value.copy(), here.hessian.copy(), np.zeros(u.shape[:2], dtype=np.bool_))
    left, steps = np.arange(problem.versions), MAX_STEPS
    while steps and len(left):
        u, value, hessian, done, here, taken = _descended(problem, u, here, steps, leave=len(left) > 1)
        for column, mine in zip(found, (u, value, hessian, done), strict=True):
            column[left] = mine
        steps -= taken
        stay = np.flatnonzero(~done.all(1))
        if not len(stay):
            break
        left, u, here, problem = left[stay], u[stay], At(*(column[stay] for column in here)), problem.only(stay)
    return found


class _Descended(NamedTuple):
    u: Floats
    value: Floats
    hessian: Floats
    converged: NDArray[np.bool_]
    here: At
    steps: int


def _descended(problem: Problem, u: Floats, here: At, most: int = MAX_STEPS, leave: bool = False) -> _Descended:
    """After at most so many steps, or as soon as all have converged, or, where some may leave, half of the versions."""
    converged, steps = np.zeros(u.shape[:2], dtype=np.bool_), 0
    for steps in range(1, most + 1):  # noqa: B007
        step = (_around_saddles if problem.erring else _solved)(here.hessian, here.gradient)
        trial = u - step
        ahead = problem.at(trial)
        worse = ahead.value > here.value + NOISE * np.abs(here.value)
        if worse.any():
            over = np.flatnonzero(worse.any(1))
            part = problem.only(over)
            length = np.ones(worse.shape)
            length[over] = np.where(worse[over], _length(part, u[over], step[over], here.value[over]), 1.0)
            step = length[..., None] * step
            trial = u - step
            ahead = problem.at(trial)
        u, here = trial, ahead
        converged = np.abs(step).max(-1, initial=0.0) <= TOLERANCE
        if converged.all() or (leave and 2 * converged.all(1).sum() >= len(converged)):
            break
    return _Descended(u, here.value, here.hessian, converged, here, steps)


def _solved(hessian: Floats, gradient: Floats) -> Floats:
    if hessian.shape[:2] == (1, 1):
        _, step, failed = dposv(hessian[0, 0], gradient[0, 0])
        if not failed:
            return np.asarray(step)[None, None]
    return np.asarray(np.linalg.solve(hessian, gradient[..., None]))[..., 0]


def _around_saddles(hessian: Floats, gradient: Floats) -> Floats:
    """The gradient over the absolute values of the Hessian's eigenvalues: Newton's step where these are positive, and away from a
    saddle where they are not (Dauphin et al. 2014)."""
    values, vectors = np.linalg.eigh(hessian)
    along = (vectors.swapaxes(-1, -2) @ gradient[..., None])[..., 0] / np.maximum(np.abs(values), FLAT)
    return np.asarray(vectors @ along[..., None])[..., 0]


def _length(problem: Problem, u: Floats, step: Floats, value: Floats) -> Floats:
    """(Z, M) in (0, 1): where the objective stops falling along each step, by bisection of its slope; then, where it is not
    convex, halved until it is lower than at the start."""
    low, high = np.zeros(u.shape[:2]), np.ones(u.shape[:2])
    for _ in range(16):
        middle = (low + high) / 2
        falls = (problem.at(u - middle[..., None] * step).gradient * step).sum(-1) > 0
        low, high = np.where(falls, middle, low), np.where(falls, high, middle)
    length = (low + high) / 2
    for _ in range(40):
        worse = problem.at(u - length[..., None] * step).value > value + NOISE * np.abs(value)
        if not worse.any():
            break
        length = np.where(worse, length / 2, length)
    return length


class Posterior(NamedTuple):
    """Laplace posteriors of Z versions: of every component, and mixed by their evidence."""

    mean: Floats  # (Z, M, K)
    covariance: Floats  # (Z, M, K, K)
    log_evidence: Floats  # (Z, M) with the component's share
    u: Floats  # (Z, M, K) modes, whitened: where to start next time
    converged: NDArray[np.bool_]  # (Z, M)

    def split(self, parts: int) -> "Posterior":
        """The same with (Z, ...) as (parts, Z / parts, ...)."""
        mean, covariance, log_evidence, u, converged = self
        return Posterior(
            mean.reshape(parts, -1, *mean.shape[1:]),
            covariance.reshape(parts, -1, *covariance.shape[1:]),
            log_evidence.reshape(parts, -1, *log_evidence.shape[1:]),
            u.reshape(parts, -1, *u.shape[1:]),
            converged.reshape(parts, -1, *converged.shape[1:]),
        )


def posterior(problem: Problem, start: Floats | None = None) -> Posterior:
    """Mode, covariance and log evidence of every component, as `solvers.posterior` has them before it mixes them.

    Cost: that of `newton` and two K x K factorisations.
    """
    mode, factors = newton(problem, start), problem.prior.factors
    hessian = problem.curved(mode.u, mode.hessian)
    try:
        root = np.linalg.cholesky(hessian)
    except np.linalg.LinAlgError:  # a mode on a ridge between two: what choices say in the flat directions is nothing
        values, vectors = np.linalg.eigh(hessian)
        hessian = (vectors * np.maximum(values, 1.0)[..., None, :]) @ vectors.swapaxes(-1, -2)
        root = np.linalg.cholesky(hessian)
    spread = factors @ np.linalg.inv(hessian) @ factors.swapaxes(-1, -2)
    log_det = 2 * np.log(np.diagonal(root, axis1=-2, axis2=-1)).sum(-1)
    mean = problem.prior.means + (factors @ mode.u[..., None])[..., 0]
    return Posterior(mean, spread, problem.prior.log_share - mode.value - log_det / 2, mode.u, mode.converged)


def erring(rows: Rows, prior: Components, rates: Floats, weight: Floats | None = None, start: Floats | None = None) -> Posterior:
    """Posteriors under each flip rate: arrays with G S versions, the S versions of `weight` (S, T) under the first of the rates
    (G,), then under the second, and so on. Where nobody errs the solve starts from `start` (S, M, K), and the others from there.
    """
    straight = posterior(Problem(rows, prior, weight), start)
    if not rates.any():
        return straight
    some, versions = rates > 0, len(straight.u)
    lapse = np.repeat(2 * rates[some], versions)
    again = None if weight is None else np.tile(weight, (int(some.sum()), 1))
    bent = posterior(Problem(rows, prior, again, lapse), np.tile(straight.u, (int(some.sum()), 1, 1)))
    place = np.repeat(~some, versions)
    columns = []
    for known, found in zip(straight, bent, strict=True):
        column = np.empty((len(place), *known.shape[1:]), dtype=known.dtype)
        column[place], column[~place] = np.tile(known, (int((~some).sum()), *[1] * (known.ndim - 1))), found
        columns.append(column)
    return Posterior(*columns)


class Solved(NamedTuple):
    """What a user's history says."""

    mean: Floats  # (K,)
    covariance: Floats | None  # (K, K)
    flips: Floats  # (G,) probability of each flip rate of the population; empty for a method that has none
    modes: Floats  # (M, K) whitened modes under the first flip rate: where the next solve starts
    converged: bool


def mixed(mean: Floats, covariance: Floats, log_evidence: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean (K,) and covariance (K, K) of a mixture of N Gaussians with these log weights, and the weights (N,).

    The mean of the means; the mean of the covariances plus the spread of the means.
    """
    if len(mean) == 1:
        return mean[0], covariance[0], np.ones(1)
    share = np.exp(log_evidence - log_evidence.max())
    share /= share.sum()
    centre = share @ mean
    away = mean - centre
    return centre, np.tensordot(share, covariance, 1) + (away * share[:, None]).T @ away, share
