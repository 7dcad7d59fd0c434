"""Base rewards and users' weights, both unknown: the factored problem of PReF, with every user re-solved at each step.

The features of the choices are an operator, the users are rows of padded batches, and what is optimised is the bases alone.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from palate import likelihood
from palate.data.pairs import EmbeddedPairs
from palate.models import crowd
from palate.solvers import Batch, Laplace, batches, newton


def by_pair(data: EmbeddedPairs) -> tuple[Tensor, Tensor, int]:
    """The distinct pair of texts (P,) of every choice, +1 where its earlier text was chosen and -1 elsewhere, and how many."""
    low, high = torch.minimum(data.chosen, data.rejected), torch.maximum(data.chosen, data.rejected)
    distinct, pair = torch.unique(torch.stack([low, high], dim=1), dim=0, return_inverse=True)
    return pair, torch.where(data.chosen == low, 1, -1), len(distinct)


class Owners:
    """Choices gathered by an owner (their user, or their pair), as padded parts: everybody's weights in a few Newton solves."""

    def __init__(self, owner: Tensor, n_owners: int, weight: Tensor, tie: Tensor | None):
        counts = torch.bincount(owner, minlength=n_owners)
        order, first = torch.argsort(owner, stable=True), counts.cumsum(0) - counts
        self.n_owners = n_owners
        self.parts: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []  # owners, choices, weights, ties
        for rows in batches(counts, 32):
            place = torch.arange(int(counts[rows].max()), device=owner.device)
            real = place < counts[rows][:, None]
            # A place beyond an owner's choices repeats their first one, with weight 0.
            choice = order[first[rows][:, None] + torch.where(real, place, 0)]
            self.parts.append((rows, choice, weight[choice] * real, None if tie is None else tie[choice]))

    def solve(
        self, slopes: Tensor, offset: Tensor, start: Tensor | None = None, *, max_steps: int = 50, tolerance: float = 1e-5
    ) -> tuple[Tensor, Tensor]:
        """Weights (owners, K) ~ N(0, I) at their mode, and the objectives there (owners,)."""
        weights, value = slopes.new_zeros(self.n_owners, slopes.shape[1]), slopes.new_zeros(self.n_owners)
        for rows, choice, weight, tie in self.parts:
            begin = None if start is None else start[rows]
            batch = Batch(slopes[choice], offset[choice], weight, tie)
            weights[rows], value[rows], _ = newton(batch, max_steps=max_steps, tolerance=tolerance, start=begin)
        return weights, value

    def predict(self, slopes: Tensor, offset: Tensor) -> Tensor:
        """(P,) margins after learning every owner's weights from their choices, damped by what is left unknown of the weights."""
        out = torch.zeros_like(offset)
        for _, choice, weight, tie in self.parts:
            batch = Batch(slopes[choice], offset[choice], weight, tie)
            mode, _, _ = newton(batch, max_steps=20, tolerance=1e-3)
            curved = Laplace.at(batch, mode)
            variance = (batch.slopes @ curved.half.mT).square().sum(2)
            if curved.complement:
                variance = batch.slopes.square().sum(2) - variance
            out[choice] = likelihood.damped(batch.margins(mode), variance.clamp(min=0))
        return out


class Joint:
    """The joint problem over the choices `rows` of some users: bases (D, J) on the scaled features."""

    def __init__(self, data: EmbeddedPairs, design: crowd.Rescaled, offset: Tensor, rows: Tensor):
        self.design, self.rows, self.part, self.n_pairs = design, rows, data[rows], len(data)
        self.offset, self.tie = offset[rows], self.part.tie if bool(self.part.tie.any()) else None
        self.users = Owners(self.part.user_index, len(self.part.user_ids), self.part.weight, self.tie)
        self.total = self.part.weight.sum()
        self.scores = -likelihood.gradient(self.offset, self.tie) * self.part.weight

    def project(self, bases: Tensor) -> Tensor:
        projected: Tensor = self.design.project(bases)
        return projected[self.rows]

    def back(self, weights: Tensor) -> Tensor:
        onto = weights.new_zeros(self.n_pairs, weights.shape[1])
        onto[self.rows] = weights
        spread: Tensor = self.design.back(onto)
        return spread

    def gradients(self, n_bases: int, seed: int) -> tuple[Tensor, float]:
        """Leading directions (D, J) of the users' score gradients sum_j sigma(-m_uj) z_uj, and their largest singular value."""
        found, _, size = self._leading(self.project, self.back, self.design.shape[1], n_bases, seed)
        return found / found.norm(dim=0).clamp(min=1e-30), float(size[0])

    def answers(self, n_bases: int, seed: int, rounds: int = 8) -> Tensor:
        """(D, J): the logistic factorisation of the answers that were given, regressed on the features by ridge regression.

        Alternates exact solves of the users' and the pairs' weights, N(0, 1) both, from the leading singular vectors of the table
        of score residuals (0 where nobody answered).
        """
        pair, sign, n_pairs = by_pair(self.part)
        sides = sign[:, None].to(self.scores)

        def onto_pairs(weights: Tensor) -> Tensor:
            return weights.new_zeros(n_pairs, weights.shape[1]).index_add_(0, pair, sides * weights)

        _, across, _ = self._leading(lambda frame: sides * frame[pair], onto_pairs, n_pairs, n_bases, seed)
        weights = across * len(across) ** 0.5  # of variance one, as the prior has it
        owners = Owners(pair, n_pairs, self.part.weight, self.tie)
        for _ in range(rounds):
            factors, _ = owners.solve(weights[self.part.user_index] * sides, self.offset, max_steps=10)
            weights, _ = self.users.solve(factors[pair] * sides, self.offset, max_steps=10)
        return self._regress(factors[pair] * sides)

    def _leading(
        self, project: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], size: int, n_bases: int, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Leading left singular vectors times their values (size, J), right ones (U, J) and values of the matrix whose column u
        is what `back` makes of the scores of user u.

        By subspace iteration on the operator (Halko, Martinsson and Tropp 2011): the matrix is never formed.
        """
        user, n_users = self.part.user_index, len(self.part.user_ids)
        found = torch.randn(size, min(n_bases + 8, size, n_users), generator=torch.Generator().manual_seed(seed)).to(self.scores)
        for _ in range(5):
            frame = torch.linalg.qr(found)[0]
            seen = frame.new_zeros(n_users, frame.shape[1]).index_add_(0, user, self.scores[:, None] * project(frame))
            across, values, _ = torch.linalg.svd(seen, full_matrices=False)
            found = back(self.scores[:, None] * across[user])
        return found[:, :n_bases], across[:, :n_bases], values[:n_bases]

    def _regress(self, target: Tensor, ridge: float = 1e-3, steps: int = 50) -> Tensor:
        """argmin_V mean_j |target_j - z_j V|^2 + ridge |V|^2 by conjugate gradients, every column at once."""
        share = (self.part.weight / self.total)[:, None]
        remains = self.back(share * target)
        out, ahead, power = torch.zeros_like(remains), remains, remains.square().sum(0)
        enough = 1e-10 * power
        for _ in range(steps):
            pushed = self.back(share * self.project(ahead)) + ridge * ahead
            length = power / (ahead * pushed).sum(0).clamp(min=1e-30)
            out, remains = out + length * ahead, remains - length * pushed
            now = remains.square().sum(0)
            if bool((now <= enough).all()):
                break
            ahead, power = remains + now / power.clamp(min=1e-30) * ahead, now
        return out

    def fit(self, first: Tensor, ridge: float, max_iter: int = 60) -> Tensor:
        """The bases at a minimum of the joint objective, from `first`; the gradient is the partial one (envelope theorem)."""
        mode: list[Tensor] = []
        share, user = self.part.weight / self.total, self.part.user_index

        def objective(flat: "np.ndarray[Any, Any]") -> tuple[float, "np.ndarray[Any, Any]"]:
            bases = torch.from_numpy(flat.reshape(first.shape)).to(first)
            slopes = self.project(bases)
            begin = mode.pop() if mode else None
            weights, value = self.users.solve(slopes, self.offset, begin, max_steps=8, tolerance=3e-3)
            mode.append(weights)
            own = weights[user]
            slope = likelihood.gradient(self.offset + (slopes * own).sum(1), self.tie) * share
            gradient = self.back(slope[:, None] * own) + ridge * bases
            loss = value.sum(dtype=torch.float64) / self.total + ridge / 2 * bases.square().sum(dtype=torch.float64)
            return float(loss), gradient.double().cpu().numpy().ravel()

        options = {"maxiter": max_iter, "maxcor": 10, "gtol": 1e-6, "ftol": 1e-9}
        solved = minimize(objective, first.double().cpu().numpy().ravel(), jac=True, method="L-BFGS-B", options=options)
        return torch.from_numpy(np.asarray(solved.x).reshape(first.shape)).to(first)


def wide_first(bases: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """The same rewards in coordinates where margins have unit second moment: bases (D, K) and deviations (K,), widest first.

    What is less than a thousandth as wide in variance as the first is left out.
    """
    moment, axes = torch.linalg.eigh(slopes.T.double() @ slopes.double() / len(slopes))
    kept = torch.nonzero(moment > 1e-3 * moment[-1])[:, 0].flip(0)
    spread = moment[kept].sqrt()
    return bases @ (axes[:, kept] / spread).to(bases), spread.to(bases)
