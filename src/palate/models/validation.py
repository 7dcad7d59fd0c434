"""Held-out seen users treated as new ones: adapt from a few of their choices, score the others. For `fit` alone."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from palate.data.pairs import EmbeddedPairs


def halves(data: EmbeddedPairs, seed: int) -> tuple[Tensor, Tensor]:
    """(P,) masks of support and query, half of each user's choices each, that share nothing within a user.

    Where a user's units (conversations, prompts ...) hold texts of their own, whole units go to one side. Where the same
    texts come back in many of a user's choices (a fixed catalogue, votes), the user's texts are halved instead, those only
    ever chosen and those only ever rejected apart, and a choice between texts of different halves is on neither side: a
    model that merely remembers which texts somebody chose must not look as if it knew their taste. A user without query
    cannot be validated.
    """
    user = data.user_index.repeat(2)
    text = torch.cat([data.chosen, data.rejected])
    held, of_side = _distinct(user, text)
    appears, _ = _distinct(of_side, data.unit.repeat(2))  # a user's text in a unit
    repeats = torch.zeros(len(data.user_ids), dtype=torch.bool, device=user.device)
    repeats[held[torch.bincount(appears[:, 0]) > 1, 0]] = True
    if float(repeats.float().mean()) <= 0.5:
        units, of_pair = _distinct(data.user_index, data.unit)
        support = _first_half(units[:, 0], seed, up=True)[of_pair]
        return support, ~support
    wins = torch.zeros(len(held), dtype=torch.int64, device=user.device)
    wins[of_side[: len(data)][~data.tie]] = 1  # a tie has no winner, whichever side came first
    losses = torch.zeros_like(wins)
    losses[of_side[len(data) :][~data.tie]] = 1
    stratum = held[:, 0] * 3 + torch.where(wins + losses == 2, 2, losses)
    first = _first_half(torch.unique(stratum, return_inverse=True)[1], seed, up=False)[of_side]
    chosen, rejected = first[: len(data)], first[len(data) :]
    return chosen & rejected, ~chosen & ~rejected


def _distinct(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows (n, 2) of two columns of numbers from 0, in order, and which of them each row is.

    As one number a row, which sorts a hundred times faster than rows do.
    """
    width = int(right.max()) + 1 if len(right) else 1
    key, where = torch.unique(left * width + right, return_inverse=True)
    return torch.stack([key // width, key % width], dim=1), where


def _first_half(group: Tensor, seed: int, *, up: bool) -> Tensor:
    """Mask of a random half of the members of each group; an odd one out goes to this half if `up`."""
    where = group.cpu()
    noise = torch.rand(len(where), generator=_generator(seed, "halves"), dtype=torch.float64)
    order = torch.argsort(where.double() + noise * 0.999)
    counts = torch.bincount(where)
    rank = torch.empty(len(where), dtype=torch.int64)
    rank[order] = torch.arange(len(where)) - (counts.cumsum(0) - counts)[where[order]]
    return (rank < (counts[where] + up) // 2).to(group.device)


def position(data: EmbeddedPairs, mask: Tensor, seed: int) -> Tensor:
    """(P,) place of each pair, from 0, in a random order of its user's pairs within `mask`; past any shot outside it."""
    noise = torch.rand(len(data), generator=_generator(seed, "position"), dtype=torch.float64).to(mask.device)
    inside = torch.nonzero(mask)[:, 0]
    order = inside[torch.argsort(data.user_index[inside].double() + noise[inside] * 0.999)]
    counts = torch.bincount(data.user_index[order], minlength=len(data.user_ids))
    place = torch.full((len(data),), np.iinfo(np.int64).max, device=mask.device)
    place[order] = torch.arange(len(order), device=mask.device) - (counts.cumsum(0) - counts)[data.user_index[order]]
    return place


def edge(margins: Tensor) -> Tensor:
    """() s of the smoothed error, the mean of sigma(-margin / s): a third of the median size of the margins (N,).

    It is the share of choices told wrongly, with a soft edge, whatever the margins' scale: what is compared by it is how well
    candidates tell choices apart. A log loss would prefer a timid prior to a right one wherever people are consistent, because a
    single confident mistake outweighs many right answers.
    """
    return margins.abs().median().clamp(min=1e-12) / 3 if len(margins) else margins.new_ones(())


def surely_below(ours: Tensor, theirs: Tensor) -> bool:
    """Whether the mean paired difference of the users that have both is below zero by more than its standard error."""
    away = (ours - theirs)[~torch.isnan(ours - theirs)].double()
    return len(away) > 1 and float(away.mean()) < -float(away.std()) / len(away) ** 0.5


def _generator(seed: int, purpose: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
