"""What the published code of PReF does on frozen features: imputation, two short descents, and a third one for new users."""

from typing import Literal

import torch
from torch import Tensor

from palate import likelihood
from palate.data.pairs import EmbeddedPairs
from palate.models.base import normal_for
from palate.models.bilinear import by_pair
from palate.priors import Prior
from palate.solvers import Batch, Solution

Regulariser = Literal["none", "l2", "l1", "double_l2", "diag", "diag_full"]


class Descent:
    """Maximum likelihood by `steps` of full-batch gradient descent at `rate` from N(0, 1), without a prior: the published way.

    The mean of the losses of a user's choices is descended; the only regularisation is that it stops. Users' starts depend on the
    seed and their id alone. `converged` is False: a fixed number of steps proves nothing.
    """

    def __init__(self, steps: int, rate: float, seed: int = 0):
        self.steps, self.rate, self.seed = steps, rate, seed

    def solve(self, batch: Batch, prior: Prior | None, users: tuple[str, ...], *, covariance: bool = True) -> Solution:
        k = batch.slopes.shape[2]
        start = [normal_for(user, self.seed, k) for user in users]
        weights = (torch.stack(start) if start else torch.zeros(0, k)).to(batch.slopes)
        share = batch.weight / batch.weight.sum(1, keepdim=True).clamp(min=1e-12)
        for _ in range(self.steps):
            slope = likelihood.gradient(batch.margins(weights), batch.tie) * share
            weights = weights - self.rate * torch.bmm(batch.slopes.mT, slope[..., None])[..., 0]
        return Solution(weights, None, None, torch.zeros(len(weights), dtype=torch.bool, device=weights.device))


def impute(table: Tensor, *, rank: int = 100, rounds: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """The published completion of a table (Q, U) of answers in [0, 1] with NaN where nobody answered.

    Missing entries start at .5; in each round they are replaced by the rank-`rank` reconstruction and everything is clipped to
    [0, 1]. Where `rank` is no less than the smaller side, the reconstruction is the table itself and nothing moves from .5.

    Returns:
        U (Q, r), S (r,) and V (U, r) of the last decomposition, r = min(Q, U). Its product is not the last completion.
    Cost: `rounds` full decompositions, O(Q U min(Q, U)) each.
    """
    missing = torch.isnan(table)
    full = torch.where(missing, torch.full_like(table, 0.5), table)
    for _ in range(rounds):
        left, size, right = torch.linalg.svd(full, full_matrices=False)
        again = (left[:, :rank] * size[:rank]) @ right[:rank]
        full = torch.where(missing, again, full).clamp(0, 1)
    return left, size, right.T


def published(data: EmbeddedPairs, n_bases: int, regulariser: str, seed: int) -> tuple[Tensor, Tensor]:
    """Head (D, J) and weights (U, J) as `PReF.faithful` describes; what is random comes from `seed` alone."""
    generator, users, width = torch.Generator().manual_seed(seed), len(data.user_ids), data.embeddings.shape[1]
    pair, sign, n_pairs = by_pair(data)
    come = torch.arange(len(data), device=pair.device)
    first = torch.full((n_pairs,), len(data), device=pair.device).scatter_reduce(0, pair, come, "amin")
    row = torch.argsort(torch.argsort(first))[pair]  # pairs numbered as they come
    n_rows = min(max(1, len(data) // 50), n_pairs)
    inside = torch.nonzero(row < n_rows)[:, 0]
    answer = torch.where(data.tie, 0.5, torch.where(sign > 0, 1.0, 0.0)).double()
    cell = row[inside] * users + data.user_index[inside]
    table = torch.zeros(n_rows * users, dtype=torch.float64, device=pair.device).index_add_(0, cell, answer[inside])
    left, size, right = impute((table / torch.bincount(cell, minlength=n_rows * users)).reshape(n_rows, users))
    kept = min(n_bases, len(size))
    head = (2 * torch.rand(width, n_bases, generator=generator) - 1).to(data.weight) / width**0.5  # as a linear layer starts
    target, weights = head.new_zeros(n_rows, n_bases), head.new_zeros(users, n_bases)
    target[:, :kept], weights[:, :kept] = left[:, :kept] * size[:kept].sqrt(), right[:, :kept] * size[:kept].sqrt()
    design, sides = data.differences(), sign[:, None].to(head)
    for _ in range(50):
        batch = inside[torch.randint(len(inside), (64,), generator=generator).to(inside.device)]
        z = design.rows(batch) * sides[batch]
        head = head - 1e-6 * 2 / (64 * n_bases) * z.T @ (z @ head - target[row[batch]])
    strict = torch.nonzero(~data.tie)[:, 0]
    with torch.enable_grad():
        head, weights = head.requires_grad_(), weights.requires_grad_()
        for _ in range(500):
            batch = strict[torch.randint(len(strict), (64,), generator=generator).to(strict.device)]
            difference, own = design.rows(batch) @ head, weights[data.user_index[batch]]
            loss = likelihood.nll((difference * own).sum(1)).mean() + 0.02 * _penalty(regulariser, difference, own)
            to_head, to_weights = torch.autograd.grad(loss, (head, weights))
            with torch.no_grad():
                head -= 1e-3 * to_head
                weights -= 1e-3 * to_weights
    return head.detach(), weights.detach()


def _penalty(regulariser: str, difference: Tensor, weights: Tensor) -> Tensor:
    """The regulariser of a batch (64, J), before its factor of .02."""
    out = difference.new_zeros(())
    if regulariser == "l1":
        out = difference.abs().sum(1).mean()
    if regulariser in ("l2", "double_l2"):
        out = difference.norm(dim=1).mean()
        if regulariser == "double_l2":
            out = out + weights.norm(dim=1).mean()
    if regulariser in ("diag", "diag_full"):
        micro = difference.reshape(32, 2, -1)
        products = micro.mT @ micro
        diagonal = products.diagonal(dim1=1, dim2=2)
        out = (products.abs().sum((1, 2)) - diagonal.abs().sum(1)).mean()
        if regulariser == "diag_full":
            out = out + (diagonal - 1).abs().sum(1).mean()
    return out
