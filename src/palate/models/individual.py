"""Individual Bradley-Terry: every user has a whole reward of their own, learned from nothing but their own choices.

The baseline that personalisation has to beat from the other side: the crowd's reward knows nothing of a person, this one knows
nothing of anybody else. With `around_crowd` it is the usual fine-tuning of a common head for each user.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from palate.data.embeddings import Embeddings
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.models import crowd, pulls, trials
from palate.models.base import Inference, Newton, RewardModel
from palate.models.validation import surely_below
from palate.priors import Prior
from palate.solvers import Batch, Laplace, Solution, newton

Progress = Callable[[float, str], None]  # (share done, what)

RIDGES = (
    0.0003,
    0.001,
    0.003,
    0.01,
    0.03,
    0.1,
    0.3,
    1.0,
    3.0,
    10.0,
)  # of features whose rows have norm about one; a margin varies by 2 / ridge
MOST_JUDGED = 300  # users by whom the ridge is chosen
COVARIANCE = 64  # most weights of which a covariance is kept


class IndividualBT(RewardModel):
    """Ridge Bradley-Terry for each user alone: r_i = e . w_i, or mu . e + e . w_i around the crowd's (Bradley and Terry 1952).

    Minimises, for every user, sum_j nll(z_ij . (mu + w_i)) + ridge / 2 |w_i|^2 on features scaled to rows of norm about one
    (`crowd.standard_scale`): w_i ~ N(0, I / ridge), K = D weights. The answer lies in the span of the user's own pairs, so
    Newton's method solves n x n systems for n choices and never one of D x D (`solvers.newton`, the Woodbury identity).

    Without a crowd a user of whom nothing is known has margins of zero. With it they get the crowd's reward, and so does
    everybody where held-out users do not surely gain by rewards of their own (then K = 0, which is Bradley-Terry).

    There is a covariance up to 64 features and none beyond: it has D^2 numbers a user, a megabyte at D = 512, and says little of
    a direction in which the user has not chosen but that the prior is N(0, I / ridge).

    Args:
        around_crowd: whether users' rewards are shrunk to the crowd's instead of to zero.
        ridge: the penalty; None chooses among `RIDGES` by the log loss of choices of seen users after 1, 2, 5 and half of their
            choices. Around a crowd these are users who were held out of it.

    Raises:
        DataError: a ridge that is not positive.
    Cost: `fit` a few Newton solves for each of at most 300 users; `adapt` O(U n (D + n) n) and the padded choices, n D numbers a
    user. A profile is D numbers.
    """

    direction: Tensor
    scale: Tensor

    def __init__(self, *, around_crowd: bool = False, ridge: float | None = None):
        super().__init__()
        if ridge is not None and not 0 < ridge < float("inf"):
            raise DataError(f"ridge is {ridge}; expected a positive number, or None to choose it on choices of seen users")
        self.around_crowd, self.ridge = around_crowd, ridge
        self.inference: Inference = Own()
        for name in ("direction", "scale"):
            self.register_buffer(name, torch.zeros(0))

    def options(self) -> dict[str, Any]:
        return {"around_crowd": self.around_crowd, "ridge": self.ridge}

    @property
    def n_features(self) -> int:
        return len(self.direction)

    @property
    def crowd_weights(self) -> Tensor:
        return torch.zeros_like(self.scale)

    @property
    def prior(self) -> Prior | None:
        """N(0, I), the ridge being in the features; None where there are too many weights to write it down."""
        if not 0 < len(self.scale) <= COVARIANCE:
            return None
        eye = torch.eye(len(self.scale), dtype=self.scale.dtype, device=self.scale.device)
        return Prior(self.scale.new_ones(1), torch.zeros_like(self.scale)[None], eye[None])

    def features(self, embeddings: Embeddings) -> Tensor:
        """(N, 1 + D): the crowd's reward (0 without one), then the features in units of the prior's standard deviation."""
        own = embeddings.project(self.direction[:, None])
        if len(self.scale) == 0:
            return own
        table = embeddings.rows(torch.arange(len(embeddings), device=embeddings.device))
        return torch.cat([own, table * self.scale], dim=1)

    def design(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features[:, 0], features[:, 1:]

    def fitted(self, data: EmbeddedPairs, *, seed: int, progress: Progress) -> tuple["IndividualBT", None]:
        progress(0.0, "individual Bradley-Terry")
        _, scale = crowd.standard_scale(data)
        design = crowd.Rescaled(data.differences(), scale)
        direction, offset = torch.zeros_like(scale), scale.new_zeros(len(data))
        record: dict[str, Any] = {}
        held = torch.arange(len(data.user_ids))
        if self.around_crowd:
            fold = crowd.user_folds(len(data.user_ids), seed)
            found = crowd.fit_crowd(data, design, fold)
            record["crowd"] = {"ridge": found.ridge, "ridges": list(crowd.RIDGES), "log_loss": found.curve}
            direction = scale * found.direction
            # A held-out user's choices are around the crowd that has not seen them, as a new user's are.
            of_pair = fold.to(data.user_index.device)[data.user_index]
            offset = design.project(found.directions).gather(1, of_pair.clamp(min=0)[:, None])[:, 0]
            held = torch.nonzero(fold >= 0)[:, 0]
        held = held[pulls.evenly(len(held), MOST_JUDGED, held.device)]
        ridge, differ = (RIDGES[len(RIDGES) // 2], True) if self.ridge is None else (self.ridge, True)
        if self.ridge is None and len(held):
            trial = trials.Trial(data, seed)

            def rows(index: Tensor) -> Tensor:
                return (design.design.rows(index.reshape(-1)) * scale).reshape(*index.shape, len(scale))

            losses = trial.losses(held.to(offset.device), offset, rows, len(scale), _for_each_ridge)
            curve = [trials.mean(row) for row in losses]
            alone = trial.alone(held.to(offset.device), offset)
            record |= {"ridges": list(RIDGES), "log_loss": curve, "crowd_alone": trials.mean(alone)}
            if curve[0] == curve[0]:  # somebody had a query
                best = min(range(len(RIDGES)), key=lambda i: curve[i])
                ridge, differ = RIDGES[best], not self.around_crowd or surely_below(losses[best], alone)
        out = self.like({"direction": direction, "scale": scale / ridge**0.5 if differ else scale[:0]})
        out.record["selection"] = record | {"ridge": ridge, "personal": differ}
        progress(1.0, "individual Bradley-Terry")
        return out, None


def _for_each_ridge(batch: Batch, users: Tensor) -> list[Tensor]:
    """Weights (U, D) at every ridge, from the strongest, each from the one before."""
    out: list[Tensor] = []
    start: Tensor | None = None  # weights times the square root of the ridge
    for ridge in reversed(RIDGES):
        white = batch._replace(slopes=batch.slopes / ridge**0.5)
        start = newton(white, max_steps=20, tolerance=1e-3, start=start)[0]
        out.insert(0, start / ridge**0.5)
    return out


class Own(Newton):
    """Mode under N(0, I), in the span of a user's pairs; the covariance (Laplace) up to `COVARIANCE` weights."""

    def solve(self, batch: Batch, prior: Prior | None, users: tuple[str, ...], *, covariance: bool = True) -> Solution:
        mode, _, converged = newton(batch)
        keep = covariance and mode.shape[1] <= COVARIANCE
        return Solution(mode, Laplace.at(batch, mode).covariance() if keep else None, None, converged)
