"""How people differ, by empirical Bayes: the prior over users' weights that makes the seen users' choices most likely.

EM with a Laplace E-step. For every user the mode w_i and covariance C_i of the weights given the current prior; then the prior is
re-estimated from the modes *and* their covariances, S <- mean_i (w_i w_i^T + C_i), so that a user of whom little is known
does not count as one who has no taste. All users are rows of a few padded batches; no step loops over users.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.cluster import KMeans
from torch import Tensor

from palate import likelihood
from palate.data.pairs import EmbeddedPairs
from palate.models.subspace import Design
from palate.priors import Prior
from palate.solvers import Batch, Laplace, chunks, newton, posterior, whitened


class Expectation:
    """The E-step over all users: the sums that the M-step needs. Keeps the modes to start the next one from."""

    def __init__(self, parts: Sequence[Batch]):
        self.parts = list(parts)
        self.n_users = sum(len(part.offset) for part in self.parts)
        self.modes: list[list[Tensor]] = [[] for _ in self.parts]  # weights, per part and component

    def step(self, prior: Prior, *, max_steps: int = 4) -> tuple[Tensor, Tensor, Tensor]:
        """Mass (M,), first moments (M, K) and second moments (M, K, K) of the weights under the posterior."""
        m, k = prior.means.shape
        mass, first, second = prior.means.new_zeros(m), torch.zeros_like(prior.means), prior.means.new_zeros(m, k, k)
        for number, part in enumerate(self.parts):
            solved, evidence = [], []
            for c in range(m):
                white = whitened(part, prior, c)
                start = None
                if len(self.modes[number]) == m:
                    away = self.modes[number][c] - prior.means[c]
                    start = torch.linalg.solve_triangular(prior.factors[c], away.T, upper=False).T
                mode, value, _ = newton(white, max_steps=max_steps, tolerance=1e-2, start=start)
                curved = Laplace.at(white, mode, prior.n_walls)
                solved.append((prior.means[c] + mode @ prior.factors[c].T, curved))
                evidence.append(prior.share[c].log() - value - curved.log_det / 2)
            responsibility = torch.stack(evidence, dim=1).softmax(1)  # (U, M)
            self.modes[number] = [w for w, _ in solved]
            for c, (w, curved) in enumerate(solved):
                share = responsibility[:, c]
                mass[c] += share.sum()
                first[c] += share @ w
                second[c] += (w * share[:, None]).T @ w + prior.factors[c] @ curved.total(share) @ prior.factors[c].T
        return mass, first, second

    def weights(self) -> Tensor:
        """(U, K) modes under a single-component prior, in the order of the parts."""
        return torch.cat([modes[0] for modes in self.modes])


def gaussian_rounds(parts: Sequence[Batch], prior: Prior, rounds: int) -> Iterator[Prior]:
    """The prior N(m, S) after each round, S <- mean_i ((w_i - m)(w_i - m)^T + C_i).

    The mean stays where it is: re-estimated freely it over-fits (Polis-ssis unseen .884 against .888). Stopping early keeps
    S near its wide start in the directions of which the data say little; how many rounds is chosen on held-out users.
    """
    expect, mean = Expectation(parts), prior.means[0]
    for number in range(rounds):
        # The modes move little from round to round: one Newton step from the last ones follows them.
        _, first, second = expect.step(prior, max_steps=1 if number else 8)
        cross = torch.outer(first[0], mean)
        prior = Prior.gaussian(_solid((second[0] - cross - cross.T) / expect.n_users + torch.outer(mean, mean)), mean)
        yield prior


def after(parts: Sequence[Batch], prior: Prior, rounds: int) -> Prior:
    """The prior after so many rounds of `gaussian_rounds`; itself after none."""
    for learned in gaussian_rounds(parts, prior, rounds):
        prior = learned
    return prior


def mixture(
    parts: Sequence[Batch], prior: Prior, components: int, *, rounds: int = 10, strength: float = 5.0, seed: int = 0
) -> Prior:
    """A mixture of Gaussians with means of their own: types of people (one component: a Gaussian whose mean is free).

    Starts from k-means of the users' modes under `prior`, in its own metric. Each covariance is shrunk towards the pooled
    one with the weight of `strength` users, so a small type cannot collapse onto its members.
    """
    if not prior.means.shape[1]:  # no feature differs in any pair: there is one type, everybody
        return prior
    expect = Expectation(parts)
    expect.step(prior, max_steps=20)
    modes = expect.weights()
    white = torch.linalg.solve_triangular(prior.factors[0], modes.T, upper=False).T
    components = min(components, len(torch.unique(modes, dim=0)))  # of users who said the same k-means makes no more
    kmeans = KMeans(components, n_init=4, random_state=seed).fit(white.double().cpu().numpy())
    label = torch.as_tensor(np.asarray(kmeans.labels_), device=modes.device).long()
    share = torch.bincount(label, minlength=components).to(modes) / len(modes)
    means = torch.stack([modes[label == c].mean(0) for c in range(components)])
    away = modes - means[label]
    inside = _solid(away.T @ away / len(modes) + 0.02 * prior.factors[0] @ prior.factors[0].T)
    found = Prior(share, means, torch.linalg.cholesky(inside).expand(components, -1, -1))
    expect = Expectation(parts)
    for _ in range(rounds):
        mass, first, second = expect.step(found)
        means = first / mass.clamp(min=1e-6)[:, None]
        scatter = second - mass[:, None, None] * means[:, :, None] * means[:, None, :]
        pooled = scatter.sum(0) / expect.n_users
        covariances = (scatter + strength * pooled) / (mass + strength)[:, None, None]
        share = (mass + 1) / (expect.n_users + components)
        found = Prior(share / share.sum(), means, torch.linalg.cholesky(_solid(covariances)))
    return found


@dataclass(frozen=True)
class Blend:
    """Types of people to be blended: type k's margins are gain_k offset + slopes . mean_k."""

    gains: Tensor  # (T,)
    means: Tensor  # (T, K)
    share: Tensor  # (T,) of the users nearest to each, every type counting one user more


def blend(parts: Sequence[Batch], prior: Prior, types: int, *, seed: int = 0, size: float = 2.0) -> Blend:
    """Types of people by k-means of the users' rewards, for users who are blends of them (`Prior.blend`).

    A user's reward is offset + slopes . mode under `prior`; how long it is says how many choices they made and not what they
    like, so all get margins of unit root mean square over everybody's pairs, in which metric they are clustered, and the types'
    margins get root mean square `size`: where people never err, a likelihood of saturated margins tells types that agree on
    most pairs apart no longer (ten types, nine choices each, `size` 2: .9996 of the choices of new users, 16: .998, 32: .991).
    Cost: one solve of everybody, a K x K moment, and k-means of U rows.
    """
    modes = torch.cat([posterior(part, prior, tolerance=1e-3, covariance=False).mean for part in parts])
    rows = [torch.cat([part.offset[..., None], part.slopes], dim=2).double() for part in parts]
    moment = sum(torch.einsum("unk,un,unl->kl", z, part.weight.double(), z) for z, part in zip(rows, parts, strict=True))
    moment = _solid(torch.as_tensor(moment) / sum(float(part.weight.sum()) for part in parts))
    factor = torch.linalg.cholesky(moment)  # margins of reward r have mean square |factor^T r|^2
    rewards = torch.cat([modes.new_ones(len(modes), 1), modes], dim=1).double() @ factor
    rewards = rewards / rewards.norm(dim=1, keepdim=True).clamp(min=1e-12)
    kmeans = KMeans(min(types, len(torch.unique(rewards, dim=0))), n_init=4, random_state=seed).fit(rewards.cpu().numpy())
    centres = torch.as_tensor(kmeans.cluster_centers_, dtype=torch.float64, device=modes.device)
    centres = size * centres / centres.norm(dim=1, keepdim=True).clamp(min=1e-12)
    raw = torch.linalg.solve_triangular(factor, centres, upper=False, left=False)
    count = torch.bincount(torch.as_tensor(np.asarray(kmeans.labels_)).long(), minlength=len(raw)).to(modes) + 1
    return Blend(raw[:, 0].to(modes), raw[:, 1:].to(modes), count / count.sum())


@dataclass(frozen=True)
class Refined:
    """Bases by maximum likelihood: users' margins are offset + z . shift + u . (z V) with u ~ N(0, I)."""

    bases: Tensor  # (D, 1 + K) on the scaled features, the shift first
    prior: Prior  # weight 1 on the shift, N(0, 1) on the others


def refine(
    data: EmbeddedPairs,
    design: Design,
    offset: Tensor,
    learn: Tensor,
    bases: Tensor,
    prior: Prior,
    direction: Tensor,
    *,
    ridge: float,
    max_iter: int = 30,
) -> Refined:
    """Refine bases (D, K) by the likelihood itself, every user's weights being re-solved at each step (variable projection).

    Minimises over the shift and V, by L-BFGS, sum_i min_u (sum_j nll(margin_ij) + |u_i|^2 / 2) / P + ridge / 2 (|mu +
    shift|^2 + |V|^2), with mu the crowd's `direction` (D,): a crowd that is too sure of itself gives way to the people in it.
    By the envelope theorem the gradient is the partial one at the users' modes. Over factors of any sufficient rank the
    penalty is sqrt(ridge / P) times the nuclear norm of the matrix of users' rewards (Srebro, Rennie and Jaakkola 2005), so the
    rank needs no choice of its own. Starts from the bases and the Gaussian prior that EM found.
    """
    rows = torch.nonzero(learn.to(data.user_index.device)[data.user_index])[:, 0]
    part = data[rows]
    tie = part.tie if bool(part.tie.any()) else None
    share = part.weight / part.weight.sum()
    modes = bases.new_zeros(len(part.user_ids), bases.shape[1])
    first = torch.cat([bases @ prior.means[0][:, None], bases @ prior.factors[0]], dim=1)

    anchor = torch.zeros_like(first)
    anchor[:, 0] = direction

    together = []  # users with the places of their pairs, and these pairs' weights and ties
    for users in chunks(part.grouped().counts, bases.shape[1]):
        index, real = part.grouped().padded(users)
        together.append((users, index, part.weight[index] * real, None if tie is None else tie[index]))

    def objective(flat: "np.ndarray[Any, Any]") -> tuple[float, "np.ndarray[Any, Any]"]:
        current = torch.from_numpy(flat.reshape(first.shape)).to(bases)
        projected = design.project(current)[rows]
        base, slopes, value = offset[rows] + projected[:, 0], projected[:, 1:], torch.zeros((), dtype=torch.float64)
        for users, index, weight, tied in together:
            batch = Batch(slopes[index], base[index], weight, tied)
            modes[users], found, _ = newton(batch, max_steps=8, tolerance=3e-3, start=modes[users])
            value = value + found.sum(dtype=torch.float64).cpu()
        own = modes[part.user_index]
        margin = base + (slopes * own).sum(1)
        slope = likelihood.gradient(margin, tie) * share
        spread = current.new_zeros(len(data), first.shape[1])
        spread[rows] = torch.cat([slope[:, None], slope[:, None] * own], dim=1)
        heavy = current + anchor
        gradient = design.back(spread) + ridge * heavy
        loss = float(value) / float(part.weight.sum()) + ridge / 2 * float(heavy.square().sum(dtype=torch.float64))
        return loss, gradient.double().cpu().numpy().ravel()

    options = {"maxiter": max_iter, "maxcor": 10, "gtol": 1e-6, "ftol": 1e-9}
    solved = minimize(objective, first.double().cpu().numpy().ravel(), jac=True, method="L-BFGS-B", options=options)
    found = torch.from_numpy(np.asarray(solved.x).reshape(first.shape)).to(bases)
    mean = torch.zeros_like(found[0])
    mean[0] = 1
    spread = torch.ones_like(mean)
    spread[0] = 1e-2  # the shift is everybody's; a standard deviation of a tenth keeps the prior solid
    return Refined(found, Prior.gaussian(torch.diag(spread), mean))


def _solid(covariance: Tensor) -> Tensor:
    """Symmetric and safely positive definite in float32."""
    covariance = (covariance + covariance.mT) / 2
    size = torch.diagonal(covariance, dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return covariance + 1e-5 * size[..., None, None] * eye


def compress(slopes: Tensor, prior: Prior, *, most: int | None = None, discard: float = 0.005) -> tuple[Tensor, Prior]:
    """Coordinates in which the slopes of the pairs (P, K) have unit second moment and the prior is diagonal, largest first.

    The `most` largest are kept; without a number, all but those that together hold less than `discard` of the prior variance.

    Returns:
        (K, K') matrix to multiply the bases and the slopes with, and the prior of the K' new weights.
    """
    if not slopes.shape[1]:  # no feature differs in any pair: there is no direction to keep
        return slopes.new_zeros(0, 0), prior
    moment = slopes.T.double() @ slopes.double() / max(len(slopes), 1)
    size, axes = torch.linalg.eigh(moment)
    seen = size > 1e-7 * size.max()
    root = axes[:, seen] * size[seen].sqrt()  # (K, K1), moment = root root^T
    inverse = axes[:, seen] / size[seen].sqrt()
    spread = prior.covariance.double() + torch.outer(prior.mean.double(), prior.mean.double())
    variance, turn = torch.linalg.eigh(root.T @ spread @ root)
    variance, turn = variance.flip(0), turn.flip(1)
    tail = variance.flip(0).cumsum(0).flip(0) / variance.sum().clamp(min=1e-30)
    kept = max(1, int((tail > discard).sum())) if most is None else min(most, len(variance))
    onto = (root @ turn[:, :kept]).T.to(prior.means)  # new weights = onto @ old weights
    return (inverse @ turn[:, :kept]).to(slopes), prior.rotated(onto)
