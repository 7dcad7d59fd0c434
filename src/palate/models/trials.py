"""Seen users held out and treated as new ones, for the baselines: learn from a few of a user's choices, be judged on others.

Every baseline has a number or two to choose, and they are all chosen alike: by the log loss, after 1, 2, 5 and all choices of one
half of a user's units, of the choices of the other half (`validation.halves`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from palate import likelihood
from palate.data.pairs import EmbeddedPairs
from palate.models.validation import halves, position
from palate.solvers import Batch, batches

SHOTS = (1, 2, 5, None)  # choices after which a user is judged; None: all of the half

Slopes = Callable[[Tensor], Tensor]  # pairs, an index of any shape (...) -> their slopes (..., K)
Solve = Callable[[Batch, Tensor], Sequence[Tensor]]  # choices of users, and who they are (U,) -> (U, K) for each candidate


class Trial:
    """How well users are told after learning from a few of their choices, for several candidates at once."""

    def __init__(self, data: EmbeddedPairs, seed: int):
        self.data = data
        self.support, self.query = halves(data, seed)
        self.place = position(data, self.support, seed)

    def losses(
        self, users: Tensor, offset: Tensor, slopes: Slopes, width: int, solve: Solve, shots: Sequence[int | None] = SHOTS
    ) -> Tensor:
        """(C, U) mean log loss of each user's queries, mean over `shots`, for C candidates; NaN for those without a query.

        Args:
            users: (U',) which users are judged; all others stay NaN.
            offset: (P,) margins of all pairs with weights zero.
            slopes: gives the slopes of pairs. width: K.
            solve: the weights that each candidate makes of a padded batch of choices; a user may have none.
        """
        counts, found = self.data.grouped().counts, []
        tied = bool(self.data.tie.any())
        for part in batches(counts[users], width):
            index, real = self.data.grouped().padded(users[part])
            z, base, weight = slopes(index), offset[index] * real, self.data.weight[index].to(offset) * real
            tie = self.data.tie[index] if tied else None
            asked = self.query[index] * weight
            total: Tensor | None = None
            for shot in shots:
                said = (self.place[index] < (len(self.data) if shot is None else shot)) & real
                # Without the places of the other choices: most users are judged after a few.
                few = torch.argsort(~said, dim=1, stable=True)[:, : max(1, int(said.sum(1).max()))]
                told = Batch(
                    z.gather(1, few[..., None].expand(-1, -1, z.shape[2])),
                    base.gather(1, few),
                    (weight * said).gather(1, few),
                    None if tie is None else tie.gather(1, few),
                )
                margins = [torch.baddbmm(base[..., None], z, w[..., None])[..., 0] for w in solve(told, users[part])]
                loss = torch.stack([(likelihood.nll(m, tie) * asked).sum(1) for m in margins])
                total = loss if total is None else total + loss
            if total is not None:
                found.append((users[part], total / len(shots) / asked.sum(1)))  # nothing asked: NaN
        out = offset.new_full((len(found[0][1]) if found else 1, len(counts)), torch.nan)
        for who, loss in found:
            out[:, who] = loss
        return out

    def alone(self, users: Tensor, margins: Tensor) -> Tensor:
        """(U,) as `losses` for a reward that learns nothing, with these margins (P,) of all pairs."""

        def nothing(index: Tensor) -> Tensor:
            return margins.new_zeros(*index.shape, 0)

        return self.losses(users, margins, nothing, 0, lambda batch, who: [margins.new_zeros(len(who), 0)], shots=(None,))[0]


def mean(losses: Tensor) -> float:
    """Mean over the users that have one; NaN where nobody has."""
    return float(losses.double().nanmean())
