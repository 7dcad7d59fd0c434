"""Group Bradley-Terry: a few kinds of people, one reward for each, and a new user is in one of them.

The step between one reward for everybody and one for each person, as anyone would build it: a cheap profile of every seen user,
k-means of the profiles, Bradley-Terry in every cluster.
"""

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from palate import likelihood
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.models import trials
from palate.models.base import Inference, RewardModel
from palate.models.bilinear import Owners
from palate.models.people import Meeting, People, WholeRewards
from palate.models.validation import surely_below
from palate.priors import Prior
from palate.solvers import Batch, Solution

Progress = Callable[[float, str], None]  # (share done, what)

GROUPS = (2, 4, 8, 16)


class GroupBT(WholeRewards, RewardModel):
    """G groups of people with a reward each: r_i(e) = sum_g P(g | choices of i) mu_g . e.

    P(g | choices) is proportional to share_g prod_j sigma(m_gj), m_gj the margin of choice j under mu_g: an exact posterior, a
    sum of log-likelihoods, and a user's K = G weights are these probabilities. A user without choices has the groups' shares.

    Groups are clusters (k-means, scikit-learn) of the seen users' weights in standard deviations of their population (`people`).
    A group's reward is the crowd's plus what its members' choices together say, fitted as one person's would be: Bradley-Terry
    with the population's own prior N(m, S), which the many choices of a large group outweigh.

    One group is the crowd's reward, which is Bradley-Terry. More have to be surely better on held-out seen users.

    Args:
        n_groups: G, or several to choose from, 1 being always one of them; None for `GROUPS`. A number is taken as it is.

    Raises:
        DataError: a number of groups below 1.
    Cost: `fit` a cheap personal fit for each fold and one more; `adapt` O(P G), without iterations.
    """

    share: Tensor

    def __init__(self, n_groups: int | tuple[int, ...] | None = None):
        super().__init__()
        candidates = (n_groups,) if isinstance(n_groups, int) else tuple(n_groups or GROUPS)
        if min(candidates) < 1 or n_groups == ():
            raise DataError(f"n_groups is {n_groups}; expected a positive number of groups, or several to choose from")
        self.n_groups = n_groups
        self.inference: Inference = Membership(self)
        self.register_buffer("rewards", torch.zeros(0, 0))
        self.register_buffer("share", torch.zeros(0))

    def options(self) -> dict[str, Any]:
        return {"n_groups": list(self.n_groups) if isinstance(self.n_groups, tuple) else self.n_groups}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        n_groups = options["n_groups"]
        return cls(tuple(n_groups) if isinstance(n_groups, list) else n_groups)

    @property
    def crowd_weights(self) -> Tensor:
        """(G,) the shares of the groups; (0,) where there is one group, whose reward is everybody's."""
        return self.share if len(self.share) > 1 else self.share[:0]

    def fitted(self, data: EmbeddedPairs, *, seed: int, progress: Progress) -> tuple["GroupBT", None]:
        progress(0.0, "groups of people")
        meeting = Meeting(data, seed)
        sizes = (self.n_groups,) if isinstance(self.n_groups, int) else tuple(sorted({*(self.n_groups or GROUPS)} - {1}))
        record: dict[str, Any] = {"crowd": meeting.record}
        chosen = sizes[0] if isinstance(self.n_groups, int) else 1
        if not isinstance(self.n_groups, int) and meeting.folds and sizes:
            losses = torch.full((1 + len(sizes), len(data.user_ids)), torch.nan, dtype=torch.float64)
            trial = trials.Trial(data, seed)
            for held, people in meeting.turns(lambda share: progress(0.8 * share, "how many groups of people")):
                losses[0, held.cpu()] = trial.alone(held, people.view.offset)[held].cpu().double()
                for row, size in enumerate(sizes, start=1):
                    losses[row, held.cpu()] = (
                        _judged(trial, held, people, *grouped(data, people, size, seed))[held].cpu().double()
                    )
            curve = [trials.mean(row) for row in losses]
            record |= {"n_groups": [1, *sizes], "log_loss": curve}
            best = min(range(len(curve)), key=lambda i: (curve[i] != curve[i], curve[i]))  # what nobody measured comes last
            if surely_below(losses[best], losses[0]):
                chosen = (1, *sizes)[best]
        direction = meeting.direction
        rewards, share = direction[:, None], direction.new_ones(1)
        if chosen > 1 and len(data.user_ids) > 1:
            progress(0.8, "groups of people")
            people = meeting.people(-1)
            weights, share = grouped(data, people, chosen, seed)
            rewards = direction[:, None] + people.view.bases @ weights.T
        out = self.like({"rewards": meeting.scale[:, None] * rewards, "share": share})
        out.record["selection"] = record | {"chosen": len(share), "share": share.tolist()}
        progress(1.0, "groups of people")
        return out, None


def grouped(data: EmbeddedPairs, people: People, n_groups: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights (G, K) of the groups around the crowd, and their shares of the users (G,), the largest group first.

    There are never more groups than people who differ; where no feature differs in any pair there is one, the crowd.
    """
    white = people.white()
    if not white.shape[1]:
        return white.new_zeros(1, 0), white.new_ones(1)
    means = KMeans(min(n_groups, len(torch.unique(white, dim=0))), n_init=4, random_state=seed).fit(white.double().cpu().numpy())
    label = torch.as_tensor(np.asarray(means.labels_), device=white.device).long()
    order = torch.argsort(torch.bincount(label), descending=True, stable=True)
    label = torch.argsort(order)[label]
    member = torch.full((len(data.user_ids),), -1, device=label.device)
    member[people.users] = label
    rows = torch.nonzero(member[data.user_index] >= 0)[:, 0]
    slopes, mean, factor = people.view.slopes[rows], people.prior.means[0], people.prior.factors[0]
    tie = data.tie[rows] if bool(data.tie.any()) else None
    owners = Owners(member[data.user_index[rows]], len(order), data.weight[rows].to(slopes), tie)
    weights, _ = owners.solve(slopes @ factor, people.view.offset[rows] + slopes @ mean)
    return mean + weights @ factor.T, torch.bincount(label).to(slopes) / len(label)


def _judged(trial: trials.Trial, held: Tensor, people: People, weights: Tensor, share: Tensor) -> Tensor:
    """(U,) losses of the held-out users when they are in one of the groups."""
    margins = people.view.offset[:, None] + people.view.slopes @ weights.T

    def solve(batch: Batch, users: Tensor) -> list[Tensor]:
        return [membership(batch, share)]

    return trial.losses(held, torch.zeros_like(people.view.offset), margins.__getitem__, len(share), solve)[0]


def membership(batch: Batch, share: Tensor) -> Tensor:
    """(U, G) posterior probability of every group, the slopes of a pair being its margins in the groups. O(U n G)."""
    tie = None if batch.tie is None else batch.tie[..., None]
    loss = (likelihood.nll(batch.slopes + batch.offset[..., None], tie) * batch.weight[..., None]).sum(1)
    return (share.to(loss).log() - loss).softmax(1)


class Membership:
    """The exact posterior over the groups of a `GroupBT`; without covariance, because the weights are probabilities."""

    def __init__(self, model: GroupBT):
        self.model = model

    def solve(self, batch: Batch, prior: Prior | None, users: tuple[str, ...], *, covariance: bool = True) -> Solution:
        done = torch.ones(len(batch.offset), dtype=torch.bool, device=batch.offset.device)
        return Solution(membership(batch, self.model.share), None, None, done)
