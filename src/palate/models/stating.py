"""How sure to say one is: what makes the probabilities that a chosen description of people states true of held-out users.

`selection` compares descriptions by how well they tell choices apart, which says nothing of how surely they should. Both numbers
here are chosen afterwards by the log loss of held-out users, and neither turns any choice round.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from palate import likelihood
from palate.models.selection import SHOTS, Candidate, Selection, Told

SHARPNESS = (1.0, 2.0, 4.0, 8.0, 16.0)  # of a blend's margins
CALIBRATIONS = tuple(2 ** (power / 4) for power in range(-8, 33))  # of stated log-odds


def sharpness(selection: Selection, key: Candidate) -> float:
    """By how much to multiply the margins of a blend: the lowest log loss of held-out users, over all shots.

    The size at which types are told apart best (`population.blend`) says nothing of how seldom people err.
    """
    losses = torch.zeros(len(SHARPNESS), dtype=torch.float64)
    for counts, _, told in _predicted(selection, key):
        for number, sharp in enumerate(SHARPNESS):
            stated = likelihood.damped(sharp * told.margin, sharp**2 * told.variance)
            losses[number] += counts * float((likelihood.nll(stated, told.tie) * told.asked).sum())
    return SHARPNESS[int(losses.argmin())]


def calibration(selection: Selection, key: Candidate) -> float:
    """By how much to multiply the log-odds m / sqrt(1 + pi v / 8) of a margin with posterior mean m and variance v.

    The lowest mean log loss over held-out users and shots, or rather the value nearest 1 within one standard error of it
    (temperature scaling: Guo et al. 2017). The prior under which choices are told apart best is often wider than people are,
    and where people never err a hundred times wider; the Laplace approximation then says that next to nothing is known.
    """
    n = len(selection.data.user_ids)
    losses, all_asked = torch.zeros(len(CALIBRATIONS), n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for counts, who, told in _predicted(selection, key):
        all_asked[who] += counts * told.asked.sum(1).double().cpu()
        stated = likelihood.damped(told.margin, told.variance)
        for number, scale in enumerate(CALIBRATIONS):
            losses[number, who] += counts * (likelihood.nll(scale * stated, told.tie) * told.asked).sum(1).double().cpu()
    users = all_asked > 0
    if int(users.sum()) < 2:
        return 1.0
    losses = losses[:, users] / all_asked[users]
    above = losses - losses[int(losses.mean(1).argmin())]
    near = above.mean(1) <= above.std(1) / above.shape[1] ** 0.5
    good = [scale for scale, is_near in zip(CALIBRATIONS, near.tolist(), strict=True) if is_near]
    return min(good, key=lambda scale: abs(math.log(scale)))


def _predicted(selection: Selection, key: Candidate) -> Iterator[tuple[float, Tensor, Told]]:
    """By folds, shots and parts of users: what the shot counts, who they are, and what is thought of their choices."""
    for f, (shots, counts) in itertools.product(range(selection.folds), SHOTS):
        view, prior = selection.estimated(key, f)
        held = torch.nonzero(selection.fold == f)[:, 0]
        for told in selection.told(view, f, prior, shots, spread=True):
            yield counts, held[told.rows.cpu()], told
