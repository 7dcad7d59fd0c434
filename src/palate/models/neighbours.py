"""Nearest-neighbour users: collaborative filtering between people, on rewards instead of ratings.

Somebody's reward is a mean of the rewards of those seen users whose rewards tell this person's choices best. No population, no
base rewards: the seen users themselves are the model, which is why it keeps them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from palate import likelihood
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.models import trials
from palate.models.base import Inference, RewardModel
from palate.models.people import Meeting, People, WholeRewards
from palate.models.validation import surely_below
from palate.priors import Prior
from palate.solvers import Batch, Solution

Progress = Callable[[float, str], None]  # (share done, what)

NEAREST = (5, 20, 80, None)  # None: all
SHARPNESS = (0.0, 0.1, 0.3, 1.0)  # 1 / temperature; 1 is what Bayes would say if everybody were one of the seen users
KEPT = "the reward vectors of seen users, without their ids: treat this model as personal data"


class Neighbours(WholeRewards, RewardModel):
    """Rewards of seen users, mixed for a new one: r_i(e) = sum_v w_iv mu_v . e over the k nearest seen users v.

    Near is who tells one's choices: s_iv = sum_j log sigma(m_vj), m_vj the margin of choice j of user i under the reward of v,
    and w_i = softmax of s_iv / temperature over the k users with the highest s_iv (equals share the last places: the first in
    the order of the model). A user without choices has everybody for neighbours, equally: the mean reward of the seen users.
    The seen users' rewards are shrunk ones (`people`), since 20 choices do not make a reward vector.

    **This model holds users**, which no other one does: the reward vectors of up to `most` seen users, in an order drawn by the
    seed and without their ids. A vector says what one person likes, so whoever has the model has that. The record says so too.

    Where held-out seen users are not surely better off than with the crowd's reward, or nobody can be held out, nobody is kept
    and the model is Bradley-Terry. With `k` and `temperature` both given there is nothing to choose: users are kept unasked.

    Args:
        k: neighbours of a user; None chooses among `NEAREST` on held-out seen users, by log loss.
        temperature: above 0, in nats; infinity weighs the k nearest equally. None chooses among the inverses of `SHARPNESS`.
        most: seen users kept, drawn by the seed where there are more. K = this many weights a user.

    Raises:
        DataError: a number outside its range.
    Cost: `fit` a cheap personal fit for each fold and one more; `adapt` O(P `most`).
    """

    nearest: Tensor
    sharpness: Tensor

    def __init__(self, k: int | None = None, *, temperature: float | None = None, most: int = 1000):
        super().__init__()
        if k is not None and k < 1:
            raise DataError(f"k is {k}; expected at least one neighbour, or None to choose on held-out users")
        if temperature is not None and not temperature > 0:
            raise DataError(f"temperature is {temperature}; expected a number above 0, or None to choose it on held-out users")
        if most < 2:
            raise DataError(f"most is {most}; expected at least two users to keep")
        self.k, self.temperature, self.most = k, temperature, most
        self.inference: Inference = Nearest(self)
        self.register_buffer("rewards", torch.zeros(0, 0))
        for name in ("nearest", "sharpness"):  # k and 1 / temperature, once they are chosen
            self.register_buffer(name, torch.zeros(()))

    def options(self) -> dict[str, Any]:
        unlimited = self.temperature == float("inf")
        return {"k": self.k, "temperature": "infinity" if unlimited else self.temperature, "most": self.most}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> "Neighbours":
        temperature = float("inf") if options["temperature"] == "infinity" else options["temperature"]  # JSON has no infinity
        return cls(options["k"], temperature=temperature, most=options["most"])

    @property
    def crowd_weights(self) -> Tensor:
        """(K,) everybody equally; (0,) where nobody is kept and the one reward is the crowd's."""
        n = self.rewards.shape[1]
        return self.rewards.new_full((n if n > 1 else 0,), 1 / max(1, n))

    def fitted(self, data: EmbeddedPairs, *, seed: int, progress: Progress) -> tuple["Neighbours", None]:
        progress(0.0, "neighbours")
        meeting = Meeting(data, seed)
        nearest = NEAREST if self.k is None else (self.k,)
        sharpness = SHARPNESS if self.temperature is None else (1 / self.temperature,)
        candidates = [(k, sharp) for k in nearest for sharp in sharpness]
        chosen, personal = (nearest[len(nearest) // 2], sharpness[len(sharpness) // 2]), False
        record: dict[str, Any] = {"crowd": meeting.record}
        if meeting.folds and len(candidates) > 1:
            losses = torch.full((1 + len(candidates), len(data.user_ids)), torch.nan, dtype=torch.float64)
            trial = trials.Trial(data, seed)
            for held, people in meeting.turns(lambda share: progress(0.8 * share, "how near a neighbour is")):
                losses[0, held.cpu()] = trial.alone(held, people.view.offset)[held].cpu().double()
                losses[1:, held.cpu()] = self._judged(trial, held, people, candidates, seed)[:, held].cpu().double()
            curve = [trials.mean(row) for row in losses]
            record |= {"crowd_alone": curve[0], "curve": [(*c, loss) for c, loss in zip(candidates, curve[1:], strict=True)]}
            best = min(range(1, len(curve)), key=lambda i: (curve[i] != curve[i], curve[i]))  # what nobody measured comes last
            personal = surely_below(losses[best], losses[0])
            chosen = candidates[best - 1] if personal else chosen
        elif len(candidates) == 1:
            personal = len(data.user_ids) > 1
        rewards, k, sharp = meeting.direction[:, None], 1, 0.0
        if personal:
            progress(0.8, "neighbours")
            people = meeting.people(-1)
            modes = people.modes[kept(len(people.modes), self.most, seed)]
            rewards = meeting.direction[:, None] + people.view.bases @ modes.T
            k, sharp = len(modes) if chosen[0] is None else min(chosen[0], len(modes)), chosen[1]
            record |= {"k": k, "sharpness": sharp, "holds": KEPT}
        numbers = {"nearest": rewards.new_tensor(k), "sharpness": rewards.new_tensor(sharp)}
        out = self.like({"rewards": meeting.scale[:, None] * rewards, **numbers})
        out.record["selection"] = record | {"users_kept": rewards.shape[1] if personal else 0}
        progress(1.0, "neighbours")
        return out, None

    def _judged(
        self, trial: trials.Trial, held: Tensor, people: People, candidates: list[tuple[int | None, float]], seed: int
    ) -> Tensor:
        modes = people.modes[kept(len(people.modes), self.most, seed)].T
        offset, slopes = people.view.offset, people.view.slopes

        def told(index: Tensor) -> Tensor:
            return offset[index][..., None] + slopes[index] @ modes

        def solve(batch: Batch, users: Tensor) -> list[Tensor]:
            known = agreement(batch)
            some = (batch.weight > 0).any(1)
            return [mixed(known, some, modes.shape[1] if k is None else k, sharp) for k, sharp in candidates]

        return trial.losses(held, torch.zeros_like(offset), told, modes.shape[1], solve)


def kept(n_users: int, most: int, seed: int) -> Tensor:
    """Which users are kept, in an order of the seed, so that a place in the model is nobody's place in the data."""
    return torch.randperm(n_users, generator=torch.Generator().manual_seed(seed))[:most]


def agreement(batch: Batch) -> Tensor:
    """(U, K) log-likelihood of a user's choices under every kept user's reward, the slopes being margins. O(U n K)."""
    tie = None if batch.tie is None else batch.tie[..., None]
    return -(likelihood.nll(batch.slopes + batch.offset[..., None], tie) * batch.weight[..., None]).sum(1)


def mixed(known: Tensor, some: Tensor, k: int, sharpness: float) -> Tensor:
    """(U, K) weights of the neighbours; equal ones for a user without choices (`some` (U,) is whether there are any)."""
    n = known.shape[1]
    if k < n:
        near = torch.argsort(known, dim=1, descending=True, stable=True)[:, :k]
        out = torch.zeros_like(known).scatter(1, near, (sharpness * known.gather(1, near)).softmax(1))
    else:
        out = (sharpness * known).softmax(1)
    return torch.where(some[:, None], out, torch.full_like(out, 1 / n))


class Nearest:
    """The neighbours of users, from a `Neighbours`; without covariance."""

    def __init__(self, model: Neighbours):
        self.model = model

    def solve(self, batch: Batch, prior: Prior | None, users: tuple[str, ...], *, covariance: bool = True) -> Solution:
        k, sharpness = int(self.model.nearest), float(self.model.sharpness)
        weights = mixed(agreement(batch), (batch.weight > 0).any(1), k, sharpness)
        return Solution(weights, None, None, torch.ones(len(weights), dtype=torch.bool, device=weights.device))
