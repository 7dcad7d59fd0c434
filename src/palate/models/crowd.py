"""The crowd's reward: ridge Bradley-Terry over everybody's choices, straight or bent, with the ridge chosen on held-out users.

The path over the ridges costs little more than its weakest one (`subspace`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from palate import likelihood
from palate.data.embeddings import Differences, Embeddings
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.models.pulls import evenly
from palate.models.subspace import Design, Subspace

RIDGES = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # of features whose rows have norm about one
STRONGER = 3.0  # times the ridge: what the mean taste may be shrunk to
ROUGH, ROUGH_STEPS = 1e-2, 40  # while ridges are compared: tolerance, and most passes for each


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
class Formed:
    """z as a matrix."""

    matrix: Tensor  # (P, D)

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def project(self, directions: Tensor) -> Tensor:
        return self.matrix @ directions

    def back(self, weights: Tensor) -> Tensor:
        return self.matrix.T @ weights


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


def standard_scale(data: EmbeddedPairs, most: int = 2048) -> tuple[Tensor, Tensor]:
    """Centre (D,) and scale (D,) that give rows of norm about one: x = (e - centre) * scale.

    A dense block is standardised by column over the texts of the training pairs and divided by the square root of its width; a
    one-hot block keeps one scale for all its columns, because standardising them would weigh an item by its rarity. A column that
    never varies gets scale 0. At most `most` texts, evenly spaced, are read: the standard error of a scale is then below 2 %.
    """
    used = torch.unique(torch.cat([data.chosen, data.rejected]))
    used = used[evenly(len(used), most, used.device)]
    table = data.embeddings.take(used)
    mean, variance = table.column_moments(torch.ones(len(used), device=used.device))
    centre, scale = torch.zeros_like(mean), torch.zeros_like(mean)
    for part, dense in data.embeddings.column_blocks():
        if dense:
            width = part.stop - part.start
            # Relative to the column and to its block, so that the unit of the features does not matter.
            varies = variance[part] > 1e-12 * torch.maximum(mean[part].square(), variance[part].max())
            scale[part] = torch.where(varies, (variance[part].clamp(min=1e-30) * width).rsqrt(), torch.zeros_like(variance[part]))
            centre[part] = mean[part]
        else:
            power = (variance[part] + mean[part].square()).sum()  # the mean squared norm of a row
            scale[part] = power.clamp(min=1e-30).rsqrt() if float(power) > 0 else 0.0
    if not bool((scale > 0).any()):
        raise DataError("no feature varies over the texts of the training pairs; expected embeddings that tell texts apart")
    return centre, scale


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

    directions: Tensor  # (D, folds + 1) fitted without each fold's users; the last one on everybody
    ridge: float
    losses: Tensor  # (R, U) mean log loss of each held-out user, NaN for users never held out
    stronger: Tensor  # (D, folds + 1) the same with `STRONGER` times the ridge

    @property
    def direction(self) -> Tensor:
        """(D,) fitted on everybody."""
        return self.directions[:, -1]

    @property
    def curve(self) -> list[float]:
        return _means(self.losses)

    @property
    def gain(self) -> tuple[float, float]:
        """By how much its log loss on held-out users is below a coin's, log 2, and the standard error; NaN where nobody is."""
        curve = self.curve
        if np.isnan(curve).all():
            return math.nan, math.nan
        gains = math.log(2) - self.losses[int(np.nanargmin(curve))].double()
        gains = gains[~torch.isnan(gains)]
        return float(gains.mean()), float(gains.std() / len(gains) ** 0.5)

    def nothing(self) -> "CrowdFit":
        """A crowd that agrees on nothing: every margin is 0."""
        return replace(self, directions=torch.zeros_like(self.directions), stronger=torch.zeros_like(self.stronger))


def fit_crowd(data: EmbeddedPairs, design: Design, fold: Tensor, *, ridges: Sequence[float] = RIDGES) -> CrowdFit:
    """Choose the ridge on held-out users (minimum mean log loss, users weighing the same) and fit the direction on everybody."""
    spaces = [_without(data, design, fold, f) for f in range(int(fold.max()) + 1)]
    losses = _path(data, spaces, fold, ridges)
    ridge = _best(ridges, losses)
    everybody = Subspace(design, data.tie, data.weight)
    directions = [space.solve(ridge) for space in spaces]
    if spaces:
        everybody.begin_at(torch.stack(directions, dim=1).mean(1, keepdim=True))
    directions.append(everybody.solve(ridge))
    stronger = [space.solve(STRONGER * ridge, tolerance=1e-3) for space in [*spaces, everybody]]
    return CrowdFit(torch.stack(directions, dim=1), ridge, losses, torch.stack(stronger, dim=1))


def held_out_losses(data: EmbeddedPairs, design: Design, fold: Tensor, ridges: Sequence[float]) -> tuple[Tensor, float]:
    """(U,) mean log loss of each held-out user at the best of the ridges, NaN for the others, and that ridge."""
    losses = _path(data, [_without(data, design, fold, f) for f in range(int(fold.max()) + 1)], fold, ridges)
    ridge = _best(ridges, losses)
    return losses[list(ridges).index(ridge)], ridge


def _without(data: EmbeddedPairs, design: Design, fold: Tensor, held: int) -> Subspace:
    kept = (fold != held).to(data.user_index.device)[data.user_index]
    return Subspace(design, data.tie, data.weight * kept)


def _path(data: EmbeddedPairs, spaces: Sequence[Subspace], fold: Tensor, ridges: Sequence[float]) -> Tensor:
    """(R, U) mean log loss of each held-out user at every ridge, fitted roughly, from the strongest to the weakest.

    Weaker ridges take most of the passes. Once the loss over all held-out users is above its lowest by more than two standard
    errors, the rest of the path is left out (NaN). No fold stops alone: its users may want a stronger ridge than most.
    """
    losses = torch.full((len(ridges), len(data.user_ids)), torch.nan)
    tied = data.tie if bool(data.tie.any()) else None
    held = (fold >= 0) & (fold < len(spaces))
    lowest: Tensor | None = None
    for ridge in sorted(ridges, reverse=True):
        row = losses[list(ridges).index(ridge)]
        for f, space in enumerate(spaces):
            space.solve(ridge, tolerance=ROUGH, steps=ROUGH_STEPS)
            loss = user_means(likelihood.nll(space.margins, tied)[:, None], data)[:, 0].cpu()
            row[fold == f] = loss[fold == f].to(row)
        risen = torch.zeros(0) if lowest is None else row[held] - lowest
        if lowest is None or row[held].mean() < lowest.mean():
            lowest = row[held].clone()
        elif len(risen) > 1 and risen.mean() > 2 * risen.std() / len(risen) ** 0.5:
            break
    return losses


def _means(losses: Tensor) -> list[float]:
    """NaN for a ridge that was left out, and for all of them where nobody is held out."""
    held = ~torch.isnan(losses).all(0)
    return [float(row[held].mean()) if bool(held.any()) else float("nan") for row in losses]


def _best(ridges: Sequence[float], losses: Tensor) -> float:
    """The ridge of the lowest mean loss; the middle one where nobody is held out."""
    curve = _means(losses)
    return ridges[len(ridges) // 2] if np.isnan(curve).all() else ridges[int(np.nanargmin(curve))]


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
