"""Bradley-Terry on margins. The only log-sigmoid of the project.

A margin m is reward(chosen) - reward(rejected), in natural log-odds: P(chosen preferred) = sigma(m) = 1 / (1 + exp(-m))
(Bradley and Terry 1952). A tie is half a win each way: its loss is the mean of the loss and of the loss of the swapped pair.
Every function works elementwise on tensors of any shape, costs O(size), and stays finite for any finite margin.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus


def nll(margin: Tensor, tie: Tensor | None = None) -> Tensor:
    """Negative log-likelihood, log(1 + exp(-m)) in nats; for a tie (log(1 + exp(-m)) + log(1 + exp(m))) / 2."""
    loss = softplus(-margin)
    return loss if tie is None else torch.where(tie, loss + margin / 2, loss)  # softplus(m) = softplus(-m) + m


def gradient(margin: Tensor, tie: Tensor | None = None) -> Tensor:
    """d nll / d m = -sigma(-m); for a tie 1/2 - sigma(-m)."""
    slope = -torch.sigmoid(-margin)
    return slope if tie is None else torch.where(tie, slope + 0.5, slope)


def curvature(margin: Tensor) -> Tensor:
    """d^2 nll / d m^2 = sigma(m) sigma(-m), with or without a tie; in (0, 1/4]."""
    return torch.sigmoid(margin) * torch.sigmoid(-margin)


def probability(margin: Tensor) -> Tensor:
    """P(chosen preferred) = sigma(m)."""
    return torch.sigmoid(margin)


def damped(mean: Tensor, variance: Tensor) -> Tensor:
    """The margin that stands for N(mean, variance): mean / sqrt(1 + pi variance / 8) (MacKay 1992, eq. 10)."""
    return mean / torch.sqrt(1 + torch.pi / 8 * variance)


def expected_probability(mean: Tensor, variance: Tensor) -> Tensor:
    """P(chosen preferred) for a margin ~ N(mean, variance): sigma(`damped`).

    Within .02 of the exact integral; always between the plug-in probability and 1/2, which is what honest uncertainty does.
    """
    return torch.sigmoid(damped(mean, variance))
