"""Ridge Bradley-Terry for many ridges at the price of one: Newton's method inside one growing subspace.

The directions that solve the problem for one ridge nearly solve it for every other (for squared loss they are the same Krylov
space, whatever the ridge). So the gradient of whichever problem is being solved is added to one orthonormal basis Q, the choices
are projected on it once, and inside it, on a few dozen numbers, Newton's method is exact and free. A pass over the embeddings
with a single column is as cheap as a pass can be, and passes are all that this problem costs.
"""

from typing import Protocol

import torch
from torch import Tensor

from palate import likelihood

SMALL = 64  # with so few live features the whole space is taken at once


class Design(Protocol):
    """z (P, D) as an operator."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def project(self, directions: Tensor) -> Tensor: ...

    def back(self, weights: Tensor) -> Tensor: ...


class Subspace:
    """mean_j share_j nll(z_j . mu) + ridge / 2 |mu|^2, to be solved for one ridge after another.

    Args:
        design: z (P, D).
        tie: (P,) which choices count half each way.
        weight: (P,) of each choice; they are divided by their sum.
        most: directions kept at most; then the basis starts again from the current solution.
    """

    def __init__(self, design: Design, tie: Tensor, weight: Tensor, *, most: int = 256):
        self.design, self.share, self.most = design, weight / weight.sum(), most
        self.tie = tie if bool(tie.any()) else None
        self.passes = 0
        self._clear()

    def _clear(self) -> None:
        p, d = self.design.shape
        self.basis = self.share.new_zeros(d, 0)
        self.image = self.share.new_zeros(p, 0)  # z Q
        self.at = self.share.new_zeros(0, dtype=torch.float64)  # coordinates of the current solution

    @property
    def direction(self) -> Tensor:
        """(D,) the current solution."""
        return self.basis @ self.at.to(self.basis)

    @property
    def margins(self) -> Tensor:
        """(P,) z mu, of all choices, those of weight 0 included; costs no pass."""
        return self.image @ self.at.to(self.image)

    def solve(self, ridge: float, *, tolerance: float = 1e-4, steps: int = 200) -> Tensor:
        """The direction (D,) at which the gradient is below `tolerance` times the gradient at 0, or after `steps` passes.

        Starts from the last solution, so ridges go from strong to weak.
        """
        if self.basis.shape[1] == 0:
            self._begin()
        for _ in range(steps):
            self._newton(ridge)
            gradient = self._pull(self.margins) + ridge * self.direction
            new = gradient - self.basis @ (self.basis.T @ gradient)
            new -= self.basis @ (self.basis.T @ new)  # twice is enough (Kahan)
            size = float(new.norm())
            if size <= tolerance * self.scale:
                break
            if self.basis.shape[1] >= self.most:
                mu = self.direction
                self._clear()
                self._extend(mu / mu.norm())
                self.at = mu.norm().double()[None]
                new -= self.basis @ (self.basis.T @ new)
                size = float(new.norm())
            self._extend(new / size)
        self._newton(ridge)
        return self.direction

    def begin_at(self, directions: Tensor) -> None:
        """Put directions (D, C), believed to be near the solution, into the basis."""
        if self.basis.shape[1] == 0:
            self._begin()
        for column in directions.T:
            new = column - self.basis @ (self.basis.T @ column)
            new -= self.basis @ (self.basis.T @ new)
            size = float(new.norm())
            if size > 1e-3 * float(column.norm()):
                self._extend(new / size)

    def _begin(self) -> None:
        first = self._pull(torch.zeros_like(self.share))
        self.scale = float(first.norm())
        live = torch.nonzero(first)[:, 0]
        if len(live) <= SMALL:
            self.basis = self.share.new_zeros(len(first), len(live))
            self.basis[live, torch.arange(len(live), device=live.device)] = 1
            self.image = self.design.project(self.basis)
            self.at = torch.zeros(len(live), dtype=torch.float64, device=first.device)
        else:
            self._extend(first / self.scale)

    def _extend(self, column: Tensor) -> None:
        self.passes += 1
        self.basis = torch.cat([self.basis, column[:, None]], dim=1)
        self.image = torch.cat([self.image, self.design.project(column[:, None])], dim=1)
        self.at = torch.cat([self.at, self.at.new_zeros(1)])

    def _pull(self, margins: Tensor) -> Tensor:
        """z^T of the slopes of the loss, (D,)."""
        self.passes += 1
        return self.design.back((likelihood.gradient(margins, self.tie) * self.share)[:, None])[:, 0]

    def _loss(self, at: Tensor, ridge: float) -> float:
        value = likelihood.nll(self.image @ at.to(self.image), self.tie) * self.share
        return float(value.sum(dtype=torch.float64)) + ridge / 2 * float(at.square().sum())

    def _newton(self, ridge: float, steps: int = 20) -> None:
        """Newton with halving inside the basis."""
        eye = torch.eye(self.basis.shape[1], dtype=torch.float64, device=self.at.device)
        value = self._loss(self.at, ridge)
        for _ in range(steps):
            margins = self.margins
            slope = (likelihood.gradient(margins, self.tie) * self.share) @ self.image
            gradient = slope.double() + ridge * self.at
            if float(gradient.norm()) <= 1e-6 * self.scale:
                return
            weighted = self.image * (likelihood.curvature(margins) * self.share)[:, None]
            step = torch.linalg.solve((weighted.T @ self.image).double() + ridge * eye, gradient, left=True)
            length = 1.0
            while length > 1e-6:
                trial = self.at - length * step
                new = self._loss(trial, ridge)
                if new <= value:
                    break
                length /= 2
            else:
                return  # no descent left in this precision
            self.at, value = trial, new
