"""What a meta-learner makes of the losses of several users: their mean, or more of those who are served worst.

An objective is a function from the losses of B users (B,) to one number. All but the published RPO are weighted means whose
weights are constants to the gradient: non-negative, summing to one, so no user is ever un-learned and the size of a step does not
depend on how many users there are. `gradient_weights` says what any of them really does to each user.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from palate.errors import DataError


class Objective(Protocol):
    """(B,) losses of users -> () what is minimised."""

    def __call__(self, losses: Tensor) -> Tensor: ...


def gradient_weights(objective: Objective, losses: Tensor) -> Tensor:
    """(B,) the derivative of the objective by each user's loss: how much each user is learned from. One backward pass."""
    with torch.enable_grad():
        points = losses.detach().clone().requires_grad_()
        (found,) = torch.autograd.grad(objective(points), points)
    return found


@dataclass(frozen=True)
class Mean:
    """Every user counts the same: sum_i L_i / B."""

    def __call__(self, losses: Tensor) -> Tensor:
        return _filled(losses).mean()


@dataclass(frozen=True)
class RPO:
    """Robust personalisation objective of MRM (arXiv 2601.18731): users whose loss is above a quantile count more.

    With threshold t = quantile(L, 1 - rho), linear between order statistics, and weight_i = sigma((L_i - t) / gamma):

        sum_i weight_i L_i / sum_i weight_i,    t and the weights being constants to the gradient.

    At gamma = 0 only the users at or above the threshold count, and equally. gamma -> infinity is the mean, one user is that
    user's loss. Departure from the published code, which `published` repeats: there the threshold and the weights are
    differentiated too and the sum is not divided by anything, so a user at the threshold can get a large negative gradient (-10
    with 64 users), the step grows with B, and with a hard mask (gamma <= 0, only losses strictly above t) one user alone is
    never learned from.

    Args:
        rho: share of the users that count as hard, in (0, 1].
        gamma: smoothness in nats; 0 (or less) is a hard mask.
        published: the objective of the published code, to the digit.

    Raises:
        DataError: rho outside (0, 1], gamma not a number, and, when called, losses of nobody. Costs a sort of B numbers.
    """

    rho: float = 0.5
    gamma: float = 0.5
    published: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.rho <= 1:
            raise DataError(f"rho is {self.rho}; expected a share of users above 0 and at most 1")
        if self.gamma != self.gamma:
            raise DataError("gamma is NaN; expected a number of nats, 0 for a hard mask")

    def __call__(self, losses: Tensor) -> Tensor:
        if self.published:
            return self._as_published(_filled(losses))
        known = _filled(losses).detach()
        threshold = torch.quantile(known, 1 - self.rho)
        hard = (known >= threshold).to(known)  # at or above: the worst user always counts
        weight = torch.sigmoid((known - threshold) / self.gamma) if self.gamma > 0 else hard
        return (weight / weight.sum() * losses).sum()

    def _as_published(self, losses: Tensor) -> Tensor:
        threshold = torch.quantile(losses, 1 - self.rho)
        if self.gamma > 0:
            return (torch.sigmoid((losses - threshold) / self.gamma) * losses).sum()
        return ((losses > threshold).to(losses).detach() * losses).sum()


@dataclass(frozen=True)
class CVaR:
    """Mean loss of the worst share q of the users: the conditional value at risk (Rockafellar and Uryasev 2000).

    The q B users with the highest losses count equally, the last of them in part where q B is no whole number; q = 1 is the mean,
    q <= 1 / B the maximum. Raises `DataError` for q outside (0, 1] and, when called, losses of nobody. Costs a sort of B numbers.
    """

    q: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.q <= 1:
            raise DataError(f"q is {self.q}; expected a share of users above 0 and at most 1")

    def __call__(self, losses: Tensor) -> Tensor:
        known = _filled(losses).detach()
        mass = self.q * len(known)
        rank = torch.empty_like(known)
        rank[torch.argsort(known, descending=True, stable=True)] = torch.arange(len(known)).to(known)
        weight = (mass - rank).clamp(0, 1)
        return (weight / weight.sum() * losses).sum()


def _filled(losses: Tensor) -> Tensor:
    if losses.ndim != 1 or len(losses) == 0:
        raise DataError(f"losses have shape {tuple(losses.shape)}; expected (B,) with at least one user")
    return losses
