"""The population: what a user's K weights may be before the user has said anything.

A finite mixture of Gaussians, w ~ sum_m share_m N(mean_m, L_m L_m^T). One component at zero is the plain Gaussian prior; several
are types of people. Covariances are kept as Cholesky factors because the solver works in whitened coordinates w = mean + L u.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from palate.errors import DataError


@dataclass(frozen=True, eq=False)
class Prior:
    """A mixture of M Gaussians over K weights.

    Args:
        share: (M,) positive numbers that sum to one.
        means: (M, K).
        factors: (M, K, K) lower triangular, component m has covariance `factors[m] @ factors[m].T`.
    """

    share: Tensor
    means: Tensor
    factors: Tensor

    def __post_init__(self) -> None:
        m, k = self.means.shape
        if self.share.shape != (m,) or self.factors.shape != (m, k, k):
            raise DataError(
                f"prior has shares {tuple(self.share.shape)}, means {(m, k)} and factors {tuple(self.factors.shape)}; "
                f"expected ({m},), ({m}, {k}) and ({m}, {k}, {k})"
            )
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

    @property
    def n_weights(self) -> int:
        return int(self.means.shape[1])

    @property
    def n_components(self) -> int:
        return len(self.share)

    @property
    def mean(self) -> Tensor:
        """(K,) mean of the mixture."""
        return self.share @ self.means

    @property
    def covariance(self) -> Tensor:
        """(K, K) covariance of the mixture: the mean of the covariances plus the covariance of the means."""
        away = self.means - self.mean
        inner = torch.einsum("m,mij,mkj->ik", self.share, self.factors, self.factors)
        return inner + torch.einsum("m,mi,mk->ik", self.share, away, away)

    def scaled(self, kappa: float) -> "Prior":
        """The prior with every variance about its mean multiplied by `kappa`.

        Below 1 the mean is drawn in too, by sqrt(kappa), so that the limit at 0 is the crowd (weights zero) and nobody else.
        """
        if not kappa > 0:
            raise DataError(f"kappa is {kappa}; expected a positive number (a model without bases is the limit at 0)")
        centre = self.mean * min(1.0, kappa**0.5)
        return Prior(self.share, centre + (self.means - self.mean) * kappa**0.5, self.factors * kappa**0.5)

    def rotated(self, matrix: Tensor) -> "Prior":
        """The prior of `matrix @ w` for w from this prior; `matrix` is (K', K) of full row rank. O(M K^3)."""
        covariances = matrix @ (self.factors @ self.factors.mT) @ matrix.T
        jitter = 1e-7 * torch.diagonal(covariances, dim1=1, dim2=2).mean(1)
        eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        return Prior(self.share, self.means @ matrix.T, torch.linalg.cholesky(covariances + jitter[:, None, None] * eye))

    def to(self, like: Tensor) -> "Prior":
        """The same prior with the dtype and device of `like`."""
        return Prior(self.share.to(like), self.means.to(like), self.factors.to(like))
