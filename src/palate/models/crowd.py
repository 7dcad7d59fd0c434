"""The crowd's reward: ridge Bradley-Terry over everybody's choices, straight or bent, with the ridge chosen on held-out users.

All ridges and all folds are columns of one matrix of directions and are fitted together: a pass over the embeddings costs nearly
the same for twenty columns as for one, and passes are all that this problem costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from palate import likelihood
from palate.data.embeddings import Differences, Embeddings
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError

RIDGES = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # of features whose rows have norm about one


class Design(Protocol):
    """z (P, D) as an operator."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def project(self, directions: Tensor) -> Tensor: ...

    def back(self, weights: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Rescaled:
    """z with every column multiplied by its scale."""

    design: Differences
    scale: Tensor  # (D,)

    @property
    def shape(self) -> tuple[int, int]:
        return self.design.shape

    def project(self, directions: Tensor) -> Tensor:
        return self.design.project(directions * self.scale[:, None])

    def back(self, weights: Tensor) -> Tensor:
        return self.design.back(weights) * self.scale[:, None]


@dataclass(frozen=True)
class Beside:
    """Two designs side by side."""

    left: Design
    right: Design

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.left.shape[1] + self.right.shape[1]

    def project(self, directions: Tensor) -> Tensor:
        width = self.left.shape[1]
        return self.left.project(directions[:width]) + self.right.project(directions[width:])

    def back(self, weights: Tensor) -> Tensor:
        return torch.cat([self.left.back(weights), self.right.back(weights)])


def standard_scale(data: EmbeddedPairs, most: int = 8192) -> tuple[Tensor, Tensor]:
    """Centre (D,) and scale (D,) that give rows of norm about one: x = (e - centre) * scale.

    A dense block is standardised by column over the texts of the training pairs and divided by the square root of its width; a
    one-hot block keeps one scale for all its columns, because standardising them would weigh an item by its rarity. A column that
    never varies gets scale 0. At most `most` texts, evenly spaced, are read: the standard error of a scale is then below 1 %.
    """
    used = torch.unique(torch.cat([data.chosen, data.rejected]))
    if len(used) > most:
        used = used[torch.linspace(0, len(used) - 1, most, device=used.device).round().long()]
    table = data.embeddings.take(used)
    mean, variance = table.column_moments(torch.ones(len(used), device=used.device))
    centre, scale = torch.zeros_like(mean), torch.zeros_like(mean)
    for part, dense in data.embeddings.column_blocks():
        if dense:
            width = part.stop - part.start
            varies = variance[part] > 1e-12 * mean[part].square().clamp(min=1e-12)
            scale[part] = torch.where(varies, (variance[part].clamp(min=1e-30) * width).rsqrt(), torch.zeros_like(variance[part]))
            centre[part] = mean[part]
        else:
            power = (variance[part] + mean[part].square()).sum()  # the mean squared norm of a row
            scale[part] = power.clamp(min=1e-30).rsqrt() if float(power) > 0 else 0.0
    if not bool((scale > 0).any()):
        raise DataError("no feature varies over the texts of the training pairs; expected embeddings that tell texts apart")
    return centre, scale


def ridge_columns(
    design: Design, tie: Tensor, weights: Tensor, ridges: Tensor, *, start: Tensor | None = None, max_iter: int = 200
) -> Tensor:
    """Directions (D, C), column c minimising mean_j nll(z_j . mu_c) + ridges_c |mu_c|^2 / 2 under row weights (P, C).

    L-BFGS (scipy) on the sum over columns, which is separable, in float64 outside and the design's precision inside.
    """
    shape = (design.shape[1], len(ridges))
    share = weights / weights.sum(0)
    tied = tie[:, None] if bool(tie.any()) else None

    def objective(flat: "np.ndarray[Any, Any]") -> tuple[float, "np.ndarray[Any, Any]"]:
        mu = torch.from_numpy(flat.reshape(shape)).to(weights)
        margin = design.project(mu)
        loss = (likelihood.nll(margin, tied) * share).sum(dtype=torch.float64) + (mu.square() * ridges).sum(
            dtype=torch.float64
        ) / 2
        gradient = design.back(likelihood.gradient(margin, tied) * share) + mu * ridges
        return float(loss), gradient.double().cpu().numpy().ravel()

    first = np.zeros(shape) if start is None else start.double().cpu().numpy()
    options = {"maxiter": max_iter, "maxcor": 12, "gtol": 1e-6, "ftol": 1e-10}
    solved = minimize(objective, first.ravel(), jac=True, method="L-BFGS-B", options=options)
    return torch.from_numpy(np.asarray(solved.x).reshape(shape)).to(weights)


def user_folds(n_users: int, seed: int, *, enough: int = 100, most: int = 5) -> Tensor:
    """(U,) the fold in which each user is held out, -1 for never.

    Folds are fifths of the users. As many are used as give `enough` validated users: one where there are many, up to five
    where there are few. Fewer than ten users cannot be divided honestly: nobody is held out.
    """
    fold = torch.full((n_users,), -1, dtype=torch.int64)
    if n_users < 10:
        return fold
    order = torch.randperm(n_users, generator=torch.Generator().manual_seed(seed))
    fifth = torch.empty(n_users, dtype=torch.int64)
    fifth[order] = torch.arange(n_users) * 5 // n_users
    used = min(most, max(1, -(-enough * 5 // n_users)))
    return torch.where(fifth < used, fifth, fold)


def user_means(values: Tensor, data: EmbeddedPairs) -> Tensor:
    """(P, C) -> (U, C): each user's mean, pairs by their weight."""
    out = values.new_zeros(len(data.user_ids), values.shape[1])
    out.index_add_(0, data.user_index, values * data.weight[:, None])
    total = values.new_zeros(len(data.user_ids)).index_add_(0, data.user_index, data.weight)
    return out / total[:, None]


@dataclass(frozen=True)
class CrowdFit:
    """A fitted crowd direction on the scaled features with what validation said: one loss per ridge and held-out user."""

    direction: Tensor  # (D,) fitted on everybody
    by_fold: Tensor  # (D, folds) fitted without the fold's users
    ridge: float
    losses: Tensor  # (R, U) mean log loss of each held-out user, NaN for users never held out

    @property
    def curve(self) -> list[float]:
        held = ~torch.isnan(self.losses[0])
        return [float(row[held].mean()) if bool(held.any()) else float("nan") for row in self.losses]

    @property
    def chosen_losses(self) -> Tensor:
        """(U,) losses at the chosen ridge."""
        known = len(self.losses) > 1 and not np.isnan(self.curve).all()
        return self.losses[int(np.nanargmin(self.curve)) if known else 0]


def fit_crowd(
    data: EmbeddedPairs, design: Design, fold: Tensor, *, ridges: Sequence[float] = RIDGES, max_iter: int = 200
) -> CrowdFit:
    """Choose the ridge on held-out users (minimum mean log loss, users weighing the same) and fit the direction on everybody."""
    if len(ridges) > 1:  # a rough path to choose the ridge, then the chosen one to precision
        return sharpened(data, design, fold, fit_columns(data, design, fold, ridges, everybody=False))
    return fit_columns(data, design, fold, ridges, max_iter=max_iter)


def sharpened(data: EmbeddedPairs, design: Design, fold: Tensor, found: CrowdFit, *, factor: float = 1.0) -> CrowdFit:
    """The same crowd to precision, with `factor` times its ridge. Losses are those of the path on which the ridge was chosen."""
    folds = found.by_fold.shape[1]
    keep = torch.stack([fold != f for f in range(folds)] + [torch.ones_like(fold, dtype=torch.bool)], dim=1)
    weights = keep.to(data.weight.device)[data.user_index].to(data.weight) * data.weight[:, None]
    start = torch.cat([found.by_fold, found.direction[:, None]], dim=1)
    ridges = torch.full((folds + 1,), found.ridge * factor, device=data.weight.device)
    mu = ridge_columns(design, data.tie, weights, ridges, start=start)
    return CrowdFit(mu[:, folds], mu[:, :folds], found.ridge * factor, found.losses)


def fit_columns(
    data: EmbeddedPairs, design: Design, fold: Tensor, ridges: Sequence[float], *, max_iter: int = 60, everybody: bool = True
) -> CrowdFit:
    """One direction per ridge and fold, and the ridge with the lowest mean log loss on the held-out users, users weighing
    the same.

    Without `everybody` the direction of all users is not fitted but is the mean of the folds': a start for `sharpened`.
    """
    folds = int(fold.max()) + 1
    everybody = everybody or not folds
    keep = [fold != f for f in range(folds)] + ([torch.ones_like(fold, dtype=torch.bool)] if everybody else [])
    rows = torch.stack(keep, dim=1).to(data.weight.device)[data.user_index].to(data.weight) * data.weight[:, None]
    grid = torch.tensor(list(ridges) * len(keep), device=data.weight.device)
    mu = ridge_columns(design, data.tie, rows.repeat_interleave(len(ridges), dim=1), grid, max_iter=max_iter)
    margin = design.project(mu[:, : folds * len(ridges)])
    tied = data.tie[:, None] if bool(data.tie.any()) else None
    losses = user_means(likelihood.nll(margin, tied), data) if folds else margin.new_zeros(len(data.user_ids), 0)
    held = torch.full((len(ridges), len(data.user_ids)), torch.nan, dtype=losses.dtype)
    for f in range(folds):
        held[:, fold == f] = losses[fold == f, f * len(ridges) : (f + 1) * len(ridges)].T.cpu()
    best = int(torch.nanmean(held, dim=1).argmin()) if folds else len(ridges) // 2
    by_fold = mu[:, torch.arange(folds, device=mu.device) * len(ridges) + best]
    return CrowdFit(mu[:, folds * len(ridges) + best] if everybody else by_fold.mean(1), by_fold, float(ridges[best]), held)


class Bend:
    """Random Fourier features of the scaled dense columns: the crowd's reward may bend (Rahimi and Recht 2007).

    cos(x . omega_m / length + phase_m) sqrt(2 / M), whose inner products approximate a Gaussian kernel of that length scale on
    features of norm about one. One-hot columns take no part: an item cannot be near another.
    """

    def __init__(self, centre: Tensor, scale: Tensor, dense: Tensor, *, width: int, length: float, seed: int):
        generator = torch.Generator().manual_seed(seed)
        omega = torch.randn(len(scale), width, generator=generator).to(scale) / length
        phase = torch.rand(width, generator=generator).to(scale) * 2 * torch.pi
        self.frequencies = omega * (scale * dense)[:, None]  # act on raw embeddings
        self.phases = phase - centre @ self.frequencies
        self.gain = (2 / width) ** 0.5

    def table(self, embeddings: Embeddings) -> Tensor:
        """(N, M)."""
        return bent(embeddings, self.frequencies, self.phases).mul_(self.gain)


def bent(embeddings: Embeddings, frequencies: Tensor, phases: Tensor) -> Tensor:
    """cos(e . omega + phase) of every row, (N, M)."""
    return torch.cos(embeddings.project(frequencies).add_(phases))
