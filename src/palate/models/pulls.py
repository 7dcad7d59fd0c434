"""Where users pull away from the crowd's reward, for the methods that begin there, and what bounds the cost of looking."""

import torch
from torch import Tensor

from palate.data.pairs import EmbeddedPairs

MOST = 2048  # users whose pulls are looked at: enough to see in which directions they lie, and few enough for their Gram matrix


def evenly(n: int, most: int, device: torch.device | None = None) -> Tensor:
    """(min(n, most),) of the numbers below n, evenly spaced."""
    if n <= most:
        return torch.arange(n, device=device)
    # Single precision rounds the last of more than 2^24 up.
    return torch.linspace(0, n - 1, most, device=device).round().long().clamp(max=n - 1)


def of_few(data: EmbeddedPairs) -> tuple[Tensor, Tensor]:
    """(P',) the pairs of at most `MOST` users, evenly spaced, and (P,) the place of each pair's user among them, else -1."""
    users = evenly(len(data.user_ids), MOST, data.user_index.device)
    place = torch.full((len(data.user_ids),), -1, device=users.device)
    place[users] = torch.arange(len(users), device=users.device)
    owner = place[data.user_index]
    return torch.nonzero(owner >= 0)[:, 0], owner


def leading(pulls: Tensor, most: int) -> Tensor:
    """(D, K) the at most `most` leading right singular vectors of the users' pulls (U, D), centred; none that is mere rounding.

    O(U^2 D + U^3), which is why U is at most `MOST`.
    """
    size, left = torch.linalg.eigh((pulls @ pulls.T).double())
    size, left = size.flip(0), left.flip(1)
    kept = max(0, min(most, int((size > 1e-6 * size[0].clamp(min=1e-30)).sum())))
    found: Tensor = pulls.T @ (left[:, :kept] / size[:kept].sqrt()).to(pulls)
    return found
