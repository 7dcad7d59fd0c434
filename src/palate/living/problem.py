"""What one user's evidence is to a solver: a loss with its gradient and Hessian, in the whitened coordinates of each component.

Whoever errs: with a share `lapse` of the choices made blindly among the m responses, response j is chosen with probability
q_j = (1 - lapse) p_j + lapse / m. For a pair that is the flip rate e = lapse / 2: e + (1 - 2 e) sigma(m). -log q is not
convex; it is solved from the convex answer, so that what is found does not depend on the order in which choices came.
"""

from copy import copy
from typing import NamedTuple, Self

import numpy as np
from scipy.special import expit

from palate.living.rows import Rows
from palate.living.terms import Floats, Ints
from palate.priors import Prior


class Components(NamedTuple):
    """A `Prior` in float64 numpy."""

    log_share: Floats  # (M,)
    means: Floats  # (M, K)
    factors: Floats  # (M, K, K)
    walls: Floats | None  # (E, K)

    @classmethod
    def of(cls, prior: Prior) -> Self:
        share, means, factors = (column.detach().cpu().double().numpy() for column in (prior.share, prior.means, prior.factors))
        walls = None if prior.walls is None else prior.walls.detach().cpu().double().numpy()
        return cls(np.log(share), means, factors, walls)


class At(NamedTuple):
    """The loss of Z versions under M components at a point, with its derivatives."""

    value: Floats  # (Z, M)
    gradient: Floats  # (Z, M, K)
    hessian: Floats  # (Z, M, K, K)


class _Pairs:
    """Terms of two responses, P of them: margin m = offset + slopes . u, target t for it and 1 - t for zero."""

    def __init__(self, slopes: Floats, offset: Floats, target: Floats, weight: Floats, lapse: Floats | None):
        # (M, P, K), (M, P), (P,), (Z, 1, P), (Z, 1, 1) or None where nobody errs
        self.slopes, self.offset, self.target, self.weight, self.lapse = slopes, offset, target, weight, lapse
        self.across = slopes.swapaxes(1, 2)

    def only(self, versions: Ints) -> "_Pairs":
        return _Pairs(self.slopes, self.offset, self.target, *_versions(versions, self.weight, self.lapse))

    def margins(self, u: Floats) -> Floats:
        return (self.slopes @ u[..., None])[..., 0] + self.offset

    def at(self, u: Floats) -> At:
        m, t = self.margins(u), self.target
        p = expit(m)
        if self.lapse is None:
            value = np.logaddexp(0, m) - t * m
            slope, bend = p - t, p * (1 - p)
        else:
            sober, blind = 1 - self.lapse, self.lapse / 2
            q = sober * p + blind
            other = sober * (1 - p) + blind  # not 1 - q, which may round to zero
            value = -(t * np.log(q) + (1 - t) * np.log(other))
            meant, unmeant = sober * p / q, sober * (1 - p) / other  # how likely it was no error, had it gone this way or that
            total = t * meant + (1 - t) * unmeant
            slope = p * total - t * meant
            errs, missed = t * meant * (1 - meant), (1 - t) * unmeant * (1 - unmeant)
            bend = (total * p - errs) * (1 - p) ** 2 + (total * (1 - p) - missed) * p**2
        w = self.weight
        gradient = (self.across @ (w * slope)[..., None])[..., 0]
        return At((w * value).sum(-1), gradient, (self.across * (w * bend)[..., None, :]) @ self.slopes)


class _Choices:
    """Terms of several responses, T of them over R rows, each with one more response at zero.

    With p the softmax and q as above, r_j = target_j (1 - lapse) p_j / q_j is the share of the choice that was meant and
    R = sum_j r_j; the gradient by u_j is R p_j - r_j and the curvature sum_j (R p_j - r_j (1 - r_j / target_j)) c_j c_j^T with
    c_j the row minus its mean under p. Without lapses r = target and R = 1: the curvature is the covariance under p.
    """

    def __init__(
        self,
        slopes: Floats,
        offset: Floats,
        target: Floats,
        size: Ints,
        weight: Floats,
        lapse: Floats | None,
    ):
        self.slopes, self.offset, self.target, self.weight, self.lapse = slopes, offset, target, weight, lapse
        self.first = np.cumsum(size) - size
        self.term = np.repeat(np.arange(len(size)), size)  # of each row
        self.left = np.maximum(1 - np.add.reduceat(target, self.first), 0)  # target of the response at zero
        self.responses = (size + 1).astype(np.float64)

    def only(self, versions: Ints) -> "_Choices":
        out = copy(self)
        out.weight, out.lapse = _versions(versions, self.weight, self.lapse)
        return out

    def sums(self, rows: Floats) -> Floats:
        """(..., R) -> (..., T)."""
        return np.add.reduceat(rows, self.first, axis=-1)

    def at(self, u: Floats) -> At:
        utility, term = (self.slopes @ u[..., None])[..., 0] + self.offset, self.term
        top = np.maximum(np.maximum.reduceat(utility, self.first, axis=-1), 0)
        raised, zero = np.exp(utility - top[..., term]), np.exp(-top)
        norm = self.sums(raised) + zero
        p, p_zero = raised / norm[..., term], zero / norm
        if self.lapse is None:
            value = top + np.log(norm) - self.sums(self.target * utility)
            slope, bend, bend_zero = p - self.target, p, p_zero
        else:
            sober, blind = 1 - self.lapse, self.lapse / self.responses
            q, q_zero = sober * p + blind[..., term], sober * p_zero + blind
            value = -(self.sums(self.target * np.log(q)) + self.left * np.log(q_zero))
            meant, meant_zero = sober * p / q, sober * p_zero / q_zero
            share, share_zero = self.target * meant, self.left * meant_zero
            total = self.sums(share) + share_zero
            slope = total[..., term] * p - share
            bend = total[..., term] * p - share * (1 - meant)
            bend_zero = total * p_zero - share_zero * (1 - meant_zero)
        w = self.weight
        gradient = (self.slopes.swapaxes(1, 2) @ (w[..., term] * slope)[..., None])[..., 0]
        middle = np.add.reduceat(p[..., None] * self.slopes, self.first, axis=-2)  # (Z, M, T, K)
        centred = np.concatenate([self.slopes - middle[..., term, :], -middle], axis=-2)
        curvature = np.concatenate([w[..., term] * bend, w * bend_zero], axis=-1)
        return At((w * value).sum(-1), gradient, (centred.swapaxes(-1, -2) * curvature[..., None, :]) @ centred)


def _versions(versions: Ints, weight: Floats, lapse: Floats | None) -> tuple[Floats, Floats | None]:
    """Of some versions; where there is one for all, it stays."""
    chosen = lapse if lapse is None or len(lapse) == 1 else lapse[versions]
    return weight if len(weight) == 1 else weight[versions], chosen


class Problem:
    """The evidence of one user in Z versions, in the whitened coordinates of each component of a prior.

    Args:
        weight: (Z, T) multipliers of the terms' weights, or None for one version with the weights as they are.
        lapse: (Z,) shares of blind choices, above 0, or None where nobody errs.
    """

    def __init__(self, rows: Rows, prior: Components, weight: Floats | None = None, lapse: Floats | None = None):
        self.prior, self.pairs, self.choices = prior, None, None
        weights = rows.weight[None] if weight is None else weight * rows.weight
        lapses = None if lapse is None else lapse[:, None, None]
        self.erring = lapse is not None
        self.versions = max(len(weights), 1 if lapse is None else len(lapse))
        slopes = rows.slopes @ prior.factors  # (M, R, K)
        offset = rows.offset + prior.means @ rows.slopes.T
        if len(rows.offset) == len(rows.size):
            if len(rows.size):
                self.pairs = _Pairs(slopes, offset, rows.target, weights[:, None], lapses)
        else:
            two = rows.size == 1
            of_two = np.repeat(two, rows.size)
            if two.any():
                part = slopes[:, of_two], offset[:, of_two], rows.target[of_two], weights[:, None, two]
                self.pairs = _Pairs(*part, lapses)
            self.choices = _Choices(
                *(slopes[:, ~of_two], offset[:, ~of_two], rows.target[~of_two]),
                *(rows.size[~two], weights[:, None, ~two], lapses),
            )
        self.walls = None
        if prior.walls is not None:  # nobody errs at a wall, and it is not forgotten
            walls, ones = prior.walls @ prior.factors, np.ones(len(prior.walls))
            self.walls = _Pairs(walls, prior.means @ prior.walls.T, ones, ones[None, None], None)
        self.pull = None
        if len(rows.level):
            pulls = (rows.pulls @ prior.factors) / rows.std[:, None]
            aim = (rows.level - prior.means @ rows.pulls.T) / rows.std
            self.pull = pulls, aim, pulls.swapaxes(1, 2) @ pulls
        self.unit = np.eye(prior.means.shape[1])

    def only(self, versions: Ints) -> "Problem":
        """With these versions alone."""
        out = copy(self)
        out.versions = len(versions)
        out.pairs = None if self.pairs is None else self.pairs.only(versions)
        out.choices = None if self.choices is None else self.choices.only(versions)
        return out

    def at(self, u: Floats) -> At:
        """Of u (Z, M, K): the negative log posterior density in whitened coordinates, up to a constant."""
        value, gradient, hessian = (u * u).sum(-1) / 2, u, self.unit
        for part in (self.pairs, self.choices, self.walls):
            if part is not None:
                here = part.at(u)
                value, gradient, hessian = value + here.value, gradient + here.gradient, hessian + here.hessian
        if self.pull is not None:
            pulls, aim, gram = self.pull
            away = (pulls @ u[..., None])[..., 0] - aim
            value = value + (away * away).sum(-1) / 2
            gradient, hessian = gradient + (pulls.swapaxes(1, 2) @ away[..., None])[..., 0], hessian + gram
        if hessian.ndim < 4:
            hessian = np.broadcast_to(hessian, (*u.shape, u.shape[-1]))
        return At(value, gradient, hessian)

    def curved(self, u: Floats, hessian: Floats) -> Floats:
        """The Hessian for a Gaussian around the mode u: walls have their log barrier's curvature (`solvers.Laplace.at`)."""
        if self.walls is None:
            return hessian
        rows = self.walls.slopes / np.maximum(self.walls.margins(u), 1)[..., None]
        return hessian - self.walls.at(u).hessian + rows.swapaxes(-1, -2) @ rows
