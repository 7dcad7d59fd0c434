"""What can be asked (`Pool`) and what is known of the people who are asked (`Belief`)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palate import likelihood
from palate.adaptation import no_pairs, pair_design
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.living.terms import Rewards
from palate.models.base import RewardModel
from palate.priors import Prior
from palate.solvers import Batch

BLOCK = 2**24  # numbers of a block of outer products
# A standard normal at equal steps: on the line the trapezoidal rule converges faster than any power of its step (Trefethen and
# Weideman 2014, SIAM Review 56: 385-458), and for the steep sigma of a wide margin as fast as 64 nodes of Gauss and Hermite.
NODES = torch.linspace(-6.25, 6.25, 51, dtype=torch.float64)
SHARES = (-NODES.square() / 2).softmax(0)


class Pool(NamedTuple):
    """Q pairs that can be asked, as a model sees them: margin = offset + slopes . w. The same for everybody, or U users' own."""

    slopes: Tensor  # (Q, K), or (U, Q, K)
    offset: Tensor  # (Q,), or (U, Q)

    @classmethod
    def of(cls, model: RewardModel, pairs: EmbeddedPairs) -> "Pool":
        """The pairs of `pairs`, one a row; who answered them, and how, is not looked at. One pass over their texts."""
        model.check(pairs.embeddings, pairs.encoder)
        offset, slopes = pair_design(model, pairs)
        return cls(slopes, offset)

    @property
    def n_pairs(self) -> int:
        return int(self.slopes.shape[-2])

    @property
    def n_weights(self) -> int:
        return int(self.slopes.shape[-1])

    def margins(self, weights: Tensor) -> Tensor:
        """(U, Q) for weights (U, K): one matrix product."""
        return self.offset + self.along(weights)

    def along(self, directions: Tensor) -> Tensor:
        """(U, Q) slopes . direction for directions (U, K): margins without their offsets."""
        if self.slopes.ndim == 2:
            return directions @ self.slopes.T
        return torch.bmm(self.slopes, directions[..., None])[..., 0]

    def spread(self, matrices: Tensor) -> Tensor:
        """v^T A v for every pair and every user's symmetric A (U, K, K): (U, Q). O(U Q K^2).

        Of a common pool as the inner product of v v^T with A, so that all users are one matrix product, (U, K K) x (K K, Q), in
        blocks of pairs; of one user, or of pools of their own, as slopes A times slopes.
        """
        users, k = matrices.shape[:2]
        if self.slopes.ndim == 3 or users == 1:
            return ((self.slopes @ matrices) * self.slopes).sum(-1)
        flat, step = matrices.reshape(users, k * k), max(1, BLOCK // max(1, k * k))
        blocks = []
        for start in range(0, len(self.slopes), step):
            v = self.slopes[start : start + step]
            blocks.append(flat @ (v[:, :, None] * v[:, None, :]).reshape(len(v), k * k).T)
        return torch.cat(blocks, dim=1) if blocks else matrices.new_zeros(users, 0)

    def at(self, rows: Tensor) -> "Pool":
        """The pairs `rows` (U, t) of each user: slopes (U, t, K), offset (U, t)."""
        if self.slopes.ndim == 2:
            return Pool(self.slopes[rows], self.offset[rows])
        user = torch.arange(len(rows), device=rows.device)[:, None]
        return Pool(self.slopes[user, rows], self.offset[user, rows])

    def to(self, like: Tensor) -> "Pool":
        """The same pool with the dtype and device of `like`."""
        return Pool(self.slopes.to(like), self.offset.to(like))


def pairs_among(rewards: Rewards) -> tuple[Pool, NDArray[np.int64]]:
    """All pairs of m given responses: questions that need no text beside those at hand.

    Returns the pool of the m (m - 1) / 2 pairs and, (Q, 2), the rows of `rewards` of their first and second response.
    """
    offset, slopes = np.asarray(rewards.offset), np.asarray(rewards.slopes)
    if offset.ndim != 1 or slopes.ndim != 2 or len(slopes) != len(offset) or len(offset) < 2:
        raise DataError(f"rewards have offset {offset.shape} and slopes {slopes.shape}; expected (m,) and (m, K), m at least 2")
    first, second = np.triu_indices(len(offset), k=1)
    pool = Pool(torch.from_numpy(slopes[first] - slopes[second]), torch.from_numpy(offset[first] - offset[second]))
    return pool, np.stack([first, second], axis=1)


class Belief(NamedTuple):
    """What is known of U users: their weights, how surely, and what they have said."""

    mean: Tensor  # (U, K)
    covariance: Tensor | None  # (U, K, K); None where the method has none
    said: Batch | None  # (U, t, K) slopes of the t pairs that each was asked; None where they are not at hand
    prior: Prior | None

    @classmethod
    def before(cls, model: RewardModel, pool: Pool, users: tuple[str, ...]) -> "Belief":
        """Of users who have said nothing: as `adaptation.no_pairs` has it, the crowd's weights where nothing else is known."""
        blank, none = no_pairs(model, users), pool.slopes.new_zeros(len(users), 0)
        spread = None if blank.covariance is None else blank.covariance.to(pool.slopes)
        said = Batch(pool.slopes.new_zeros(len(users), 0, pool.n_weights), none, none, None)
        return cls(blank.mean.to(pool.slopes), spread, said, model.prior)

    def after(self, model: RewardModel, said: Batch, users: tuple[str, ...]) -> "Belief":
        """After all answers so far, by the same solve as `adapt`. Who has given none of any weight is still who they were."""
        solved = model.inference.solve(said, model.prior, users, covariance=model.prior is not None)
        silent, covariance = said.weight.sum(1) == 0, solved.covariance
        if covariance is not None and self.covariance is not None:
            covariance = torch.where(silent[:, None, None], self.covariance, covariance)
        return Belief(torch.where(silent[:, None], self.mean, solved.mean), covariance, said, model.prior)

    def information(self, curvature: Tensor | None = None) -> Tensor:
        """(U, K, K): sum over the answered pairs of curvature v v^T; sigma'(m) at the current weights by default."""
        if self.said is None:
            raise DataError(
                "this way of choosing looks at the pairs that were answered, and a profile's mean and covariance do not hold "
                "them; choose by MutualInformation() or InformationGain(), or give a living profile, or a Belief with `said`"
            )
        if curvature is None:
            curvature = likelihood.curvature(self.said.margins(self.mean))
        weighted = self.said.slopes * (curvature * self.said.weight)[..., None]
        return self.said.slopes.mT @ weighted

    def spread(self, pool: Pool) -> Tensor:
        """(U, Q) posterior variance of every margin. Raises `DataError` for a method without a covariance."""
        if self.covariance is None:
            raise DataError("information gain needs a covariance of the weights, and this method has none; use one with a prior")
        return pool.spread(self.covariance).clamp(min=0)

    def expecting(self, pool: Pool, rows: Tensor) -> "Belief":
        """The belief while answers to the pairs `rows` (U,) are still out: the covariance that is expected after them.

        E_y C_y = C - Var_y(E[w | y]) = C - g (C v)(C v)^T / s^2 by the law of total variance, with s^2 = v^T C v and g the
        share of the margin's variance that its answer explains (`explained`); the mean stays, since E_y E[w | y] = E[w]. Exact
        where w is Gaussian. O(U K^2).
        """
        asked, said, covariance = pool.at(rows[:, None]), self.said, self.covariance
        if said is not None:
            slopes, offset = (torch.cat(part, dim=1) for part in ((said.slopes, asked.slopes), (said.offset, asked.offset)))
            said = Batch(slopes, offset, torch.cat([said.weight, torch.ones_like(asked.offset)], dim=1), None)
        if covariance is not None:
            v, margin = asked.slopes[:, 0], asked.margins(self.mean)[:, 0]
            towards = torch.bmm(covariance, v[..., None])[..., 0]
            variance = (v * towards).sum(1).clamp(min=0)
            share = explained(margin, variance) / variance.clamp(min=torch.finfo(v.dtype).tiny)
            covariance = covariance - share[:, None, None] * towards[:, :, None] * towards[:, None, :]
        return self._replace(covariance=covariance, said=said)


def over_margins(of: Callable[[Tensor], Tensor], margin: Tensor, variance: Tensor) -> Tensor:
    """`of(margins (n, 51))` -> (n,) of every m ~ N(margin, variance) at its `NODES`, in the shape of `margin`.

    In float64, in blocks whose 128 KiB stay in a processor's cache (and are not asked of the system anew each time).
    """
    nodes = NODES.to(margin.device)
    mean, std = margin.reshape(-1, 1).double(), variance.reshape(-1, 1).double().sqrt()
    step = 320
    parts = [of(mean[i : i + step] + std[i : i + step] * nodes) for i in range(0, len(mean), step)]
    return torch.cat(parts).reshape(margin.shape) if parts else torch.zeros_like(margin)


def explained(margin: Tensor, variance: Tensor) -> Tensor:
    """Var_y(E[m | y]) / Var(m) of a margin m ~ N(margin, variance) and an answer y ~ Bernoulli(sigma(m)): in [0, 2 / pi].

    Cov(m, y)^2 / (Var(m) Var(y)), since y has two values; by quadrature over m; of the two answers for the rarer one, since
    1 - E y of the other would round to 0 where it is sure.
    """
    columns = torch.stack([SHARES, SHARES * NODES], dim=1).to(margin.device)

    def share(margins: Tensor) -> Tensor:
        mean, with_node = (torch.sigmoid(margins) @ columns).unbind(1)
        return with_node.square() / (mean * (1 - mean)).clamp(min=1e-300)

    return over_margins(share, -margin.abs(), variance).to(margin)


def information(margin: Tensor, variance: Tensor) -> Tensor:
    """I(y; m) = H(E sigma(m)) - E H(sigma(m)) of m ~ N(margin, variance) and an answer y ~ Bernoulli(sigma(m)), in nats."""
    shares = SHARES.to(margin.device)

    def gained(margins: Tensor) -> Tensor:
        # H(sigma(m)) = log(1 + e^-|m|) + |m| sigma(-|m|), of which E over nodes is most of the work
        size = margins.abs()
        small = torch.exp(-size)
        other = small / (1 + small)  # sigma(-|m|)
        mean = torch.where(margins < 0, other, 1 - other) @ shares
        return -(torch.xlogy(mean, mean) + torch.xlogy(1 - mean, 1 - mean)) - (torch.log1p(small) + size * other) @ shares

    return over_margins(gained, margin, variance)
