"""The population: what a user's K weights may be before the user has said anything.

A finite mixture of Gaussians, w ~ sum_m share_m N(mean_m, L_m L_m^T). One component at zero is the plain Gaussian prior; several
are types of people. Covariances are kept as Cholesky factors because the solver works in whitened coordinates w = mean + L u.
Walls keep weights on one side: where every weight must be positive and their sum is one, a user is a blend of types.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from palate.errors import DataError

STEEP = 1000.0  # slope of a wall: weights of a blend stop within about a hundredth of it
LEVEL, LOOSE = 3.0, 0.01  # of a blend: standard deviations along the simplex, where it is nearly flat, and away from it


@dataclass(frozen=True, eq=False)
class Prior:
    """A mixture of M Gaussians over K weights.

    Args:
        share: (M,) positive numbers that sum to one.
        means: (M, K).
        factors: (M, K, K) lower triangular, component m has covariance `factors[m] @ factors[m].T`.
        walls: (E, K) or None. The density is multiplied by prod_e sigma(walls_e . w), as if everybody had made E more choices;
            a long row is a wall at walls_e . w = 0.
    """

    share: Tensor
    means: Tensor
    factors: Tensor
    walls: Tensor | None = None

    def __post_init__(self) -> None:
        m, k = self.means.shape
        if self.share.shape != (m,) or self.factors.shape != (m, k, k):
            raise DataError(
                f"prior has shares {tuple(self.share.shape)}, means {(m, k)} and factors {tuple(self.factors.shape)}; "
                f"expected ({m},), ({m}, {k}) and ({m}, {k}, {k})"
            )
        if self.walls is not None and (self.walls.ndim != 2 or self.walls.shape[1] != k):
            raise DataError(f"walls have shape {tuple(self.walls.shape)}; expected (any number, {k}), one column for each weight")
        if not bool((self.share > 0).all()) or abs(float(self.share.sum()) - 1) > 1e-4:
            raise DataError(f"prior shares are {self.share.tolist()}; expected positive numbers that sum to 1")

    @classmethod
    def gaussian(cls, covariance: Tensor, mean: Tensor | None = None) -> "Prior":
        """N(mean, covariance), mean 0 by default; `covariance` (K, K) symmetric, positive definite. O(K^3)."""
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if int(failed):
            raise DataError(f"covariance of shape {tuple(covariance.shape)} is not positive definite; expected one that is")
        mean = covariance.new_zeros(len(covariance)) if mean is None else mean
        return cls(covariance.new_ones(1), mean[None], factor[None])

    @classmethod
    def blend(cls, share: Tensor) -> "Prior":
        """Nearly flat on the simplex w >= 0, sum w = 1 of K types, around their shares (K,), and nearly nothing outside it.

        Its mode is the maximum likelihood of the simplex to about a hundredth (`solvers.simplex` is the exact one), but it is a
        prior like any other: the same Newton solve, a covariance, an evidence. O(K^3).
        """
        k = len(share)
        even = torch.full((k, k), 1 / k, dtype=torch.float64, device=share.device)
        flat = LEVEL**2 * (torch.eye(k, dtype=torch.float64, device=share.device) - even) + LOOSE**2 * even
        return cls(share.new_ones(1), share[None], torch.linalg.cholesky(flat).to(share)[None]).positive()

    def positive(self) -> "Prior":
        """The same prior with a wall under every weight."""
        return replace(self, walls=STEEP * torch.eye(self.n_weights, dtype=self.means.dtype, device=self.means.device))

    @property
    def n_weights(self) -> int:
        return int(self.means.shape[1])

    @property
    def n_components(self) -> int:
        return len(self.share)

    @property
    def n_walls(self) -> int:
        return 0 if self.walls is None else len(self.walls)

    @property
    def mean(self) -> Tensor:
        """(K,) mean of the mixture, without its walls."""
        return self.share @ self.means

    @property
    def covariance(self) -> Tensor:
        """(K, K) covariance of the mixture: the mean of the covariances plus the covariance of the means.

        Walls narrow it to the room they leave around the mean: their log barrier -sum_e log(walls_e . w) has the curvature
        sum_e walls_e walls_e^T / (walls_e . mean)^2 there (Dikin's ellipsoid), which is added to the precision. For an even
        blend of K types that gives variances of 1 / K^2, as under Dirichlet(1). A wall that the mean is behind adds nothing.
        """
        away = self.means - self.mean
        inner = torch.einsum("m,mij,mkj->ik", self.share, self.factors, self.factors)
        whole = inner + torch.einsum("m,mi,mk->ik", self.share, away, away)
        if self.walls is None:
            return whole
        room = self.walls.double() @ self.mean.double()
        rows = self.walls.double()[room > 0] / room[room > 0, None]
        precision = torch.linalg.inv(whole.double()) + rows.T @ rows
        narrowed: Tensor = torch.linalg.inv((precision + precision.T) / 2).to(whole)
        return narrowed

    def scaled(self, kappa: float) -> "Prior":
        """The prior with every variance about its mean multiplied by `kappa`.

        Below 1 the mean is drawn in too, by sqrt(kappa), so that the limit at 0 is the crowd (weights zero) and nobody else.
        """
        if not kappa > 0:
            raise DataError(f"kappa is {kappa}; expected a positive number (a model without bases is the limit at 0)")
        centre = self.mean * min(1.0, kappa**0.5)
        return replace(self, means=centre + (self.means - self.mean) * kappa**0.5, factors=self.factors * kappa**0.5)

    def rotated(self, matrix: Tensor) -> "Prior":
        """The prior of `matrix @ w` for w from this prior; `matrix` is (K', K) of full row rank. O(M K^3)."""
        covariances = matrix @ (self.factors @ self.factors.mT) @ matrix.T
        jitter = 1e-7 * torch.diagonal(covariances, dim1=1, dim2=2).mean(1)
        eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        walls = None if self.walls is None else self.walls @ torch.linalg.pinv(matrix)
        factors = torch.linalg.cholesky(covariances + jitter[:, None, None] * eye)
        return Prior(self.share, self.means @ matrix.T, factors, walls)

    def to(self, like: Tensor) -> "Prior":
        """The same prior with the dtype and device of `like`."""
        walls = None if self.walls is None else self.walls.to(like)
        return Prior(self.share.to(like), self.means.to(like), self.factors.to(like), walls)
