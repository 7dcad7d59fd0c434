"""The factored models side by side: a reward linear in the embedding, with as many directions as the method has weights.

BradleyTerry has one direction for everybody; LoRe has K that a user mixes on the simplex. Their differences (how many directions,
what the weights may be, how they are found) are the science, so they stand in one file.

The fixed presets read features scaled on the training pairs (rows of norm about one, `crowd.standard_scale`), choose what there
is to choose on held-out seen users, and solve a new user's weights exactly. The faithful ones do what the published code does on
frozen features: raw embeddings, a division by 100, no prior, a fixed number of Adam steps from N(0, 1).
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from palate import likelihood
from palate.data.embeddings import Embeddings
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.models import crowd
from palate.models.base import Fixed, Inference, RewardModel, Simplex, Steps, normal_for
from palate.solvers import Batch, chunks

Progress = Callable[[float, str], None]  # (share done, what)

PENALTIES = (1e-5, 3e-4, 3e-3)  # ridges of LoRe's bases


class BradleyTerry(RewardModel):
    """One reward for everybody: r = mu . e, ridge Bradley-Terry over all pairs (Bradley and Terry 1952).

    Minimises mean_j nll(z_j . mu) + ridge / 2 |mu|^2 on features scaled to rows of norm about one, every pair weighing the same.

    Args:
        ridge: the penalty; None chooses among `crowd.RIDGES` on held-out users.
    """

    direction: Tensor

    def __init__(self, ridge: float | None = None):
        super().__init__()
        if ridge is not None and not ridge > 0:
            raise DataError(f"ridge is {ridge}; expected a positive number, or None to choose it on held-out users")
        self.ridge = ridge
        self.inference: Inference = Fixed()
        self.register_buffer("direction", torch.zeros(0))

    def options(self) -> dict[str, Any]:
        return {"ridge": self.ridge}

    @property
    def n_features(self) -> int:
        return len(self.direction)

    @property
    def crowd_weights(self) -> Tensor:
        return self.direction.new_zeros(0)

    def features(self, embeddings: Embeddings) -> Tensor:
        return embeddings.project(self.direction[:, None])

    def design(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features[:, 0], features[:, 1:]

    def fitted(self, data: EmbeddedPairs, *, seed: int, progress: Progress) -> tuple["BradleyTerry", None]:
        progress(0.0, "Bradley-Terry")
        _, scale = crowd.standard_scale(data)
        fold = crowd.user_folds(len(data.user_ids), seed)
        ridges = crowd.RIDGES if self.ridge is None else (self.ridge,)
        found = crowd.fit_crowd(data, crowd.Rescaled(data.differences(), scale), fold, ridges=ridges)
        out = self.like({"direction": scale * found.direction})
        out.record["selection"] = {"ridge": found.ridge, "ridges": list(ridges), "log_loss": found.curve}
        return out, None


class LoRe(RewardModel):
    """Low-rank rewards mixed on the simplex: r_i = softmax(a_i) . V^T e (LoRe, arXiv 2504.14439).

    V and the users' logits are learned jointly, minimising sum_i mean_j nll(margin_ij) by full-batch Adam from N(0, 1) starts
    (the paper's equation 10). New users get V and weights of their own (equation 11).

    The fixed preset (this constructor) scales the features, penalises the bases, ridge / 2 |V|^2 beside the mean loss of a user,
    chooses K and the ridge by the log loss of held-out seen users, and solves the convex few-shot problem exactly. `faithful` is
    the published code. (Without the penalty the random start never leaves the directions of which the data say little: votes on
    statements, three splits, .818 of unseen choices against .850.)

    Args:
        n_bases: K, or a tuple of candidates.
        ridge: the penalty, or None to choose among `PENALTIES`.
        steps: Adam steps on the joint problem.
        rate: Adam's rate.
    """

    bases: Tensor
    mean_weights: Tensor

    def __init__(
        self, n_bases: int | tuple[int, ...] = (2, 5, 10), *, ridge: float | None = None, steps: int = 400, rate: float = 0.1
    ):
        super().__init__()
        candidates = (n_bases,) if isinstance(n_bases, int) else tuple(n_bases)
        if not candidates or min(candidates) < 1:
            raise DataError(f"n_bases is {n_bases}; expected a positive number of base rewards, or several to choose from")
        if steps < 1 or not rate > 0:
            raise DataError(f"steps is {steps} and rate {rate}; expected at least one step and a positive rate")
        if ridge is not None and not 0 <= ridge < float("inf"):
            raise DataError(f"ridge is {ridge}; expected a number of at least 0, or None to choose it on held-out users")
        self.n_bases, self.ridge, self.steps, self.rate = n_bases, ridge, steps, rate
        self._faithful: dict[str, Any] | None = None
        self.inference: Inference = Simplex()
        self.register_buffer("bases", torch.zeros(0, 0))
        self.register_buffer("mean_weights", torch.zeros(0))

    @classmethod
    def faithful(cls, n_bases: int = 5, *, few_shot_rate: float = 0.1, seed: int = 0) -> Self:
        """The published code for PersonalLLM and TL;DR on frozen features (`LoRe`, June 2025; not the PRISM class of August).

        Raw embeddings, logits divided by 100, Adam at .5 for 1,000 full-batch steps from N(0, 1); seen users keep the weights of
        the joint table; a new user's logits start at N(0, 1) and take 500 Adam steps at `few_shot_rate` (.1; .5 on PRISM).
        """
        out = cls(n_bases, ridge=0.0, steps=1000, rate=0.5)
        out._faithful = {"few_shot_rate": few_shot_rate, "seed": seed}
        out.inference = Steps(500, few_shot_rate, seed)
        return out

    def options(self) -> dict[str, Any]:
        n_bases = self.n_bases if isinstance(self.n_bases, int) else list(self.n_bases)
        return {"n_bases": n_bases, "ridge": self.ridge, "steps": self.steps, "rate": self.rate, "faithful": self._faithful}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        n_bases = options["n_bases"] if isinstance(options["n_bases"], int) else tuple(options["n_bases"])
        if options["faithful"] is not None:
            return cls.faithful(options["n_bases"], **options["faithful"])
        return cls(n_bases, ridge=options.get("ridge"), steps=options["steps"], rate=options["rate"])

    @property
    def n_features(self) -> int:
        return len(self.bases)

    @property
    def crowd_weights(self) -> Tensor:
        """The mean of the weights of the users it was fitted on; the paper has no answer for somebody who said nothing."""
        return self.mean_weights

    def features(self, embeddings: Embeddings) -> Tensor:
        return embeddings.project(self.bases)

    def design(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features.new_zeros(len(features)), features

    def fitted(self, data: EmbeddedPairs, *, seed: int, progress: Progress) -> tuple["LoRe", Tensor | None]:
        if self._faithful is not None:
            if not isinstance(self.n_bases, int):
                raise DataError(f"n_bases is {self.n_bases}; the faithful preset takes one number")
            raw = data.embeddings
            scale = torch.full((raw.shape[1],), 0.01, dtype=raw.dtype, device=raw.device)
            table = _Table(data, scale, self.n_bases, 0.0, seed)
            table.run(self.steps, self.rate, lambda share: progress(share, "LoRe, as published"))
            return self._with(table, {}), table.weights()
        _, scale = crowd.standard_scale(data)
        sizes = (self.n_bases,) if isinstance(self.n_bases, int) else self.n_bases
        penalties = PENALTIES if self.ridge is None else (self.ridge,)
        candidates = [(k, ridge) for k in sizes for ridge in penalties]
        fold = crowd.user_folds(len(data.user_ids), seed, enough=1, most=1)
        best = candidates[len(candidates) // 2]
        curve: list[dict[str, Any]] = []
        if bool((fold >= 0).any()) and len(candidates) > 1:
            held = (fold >= 0).to(data.user_index.device)[data.user_index]
            learn, ask = data[~held], data[held]
            for i, (k, ridge) in enumerate(candidates):
                table = _Table(learn, scale, k, ridge, seed)
                table.run(self.steps, self.rate)
                curve.append({"n_bases": k, "ridge": ridge, "log_loss": _held_out_loss(self._with(table, {}), ask, seed)})
                progress((i + 1) / (len(candidates) + 1), "LoRe, choosing the number of bases")
            judged = [row for row in curve if row["log_loss"] is not None]
            if judged:
                found = min(judged, key=lambda row: row["log_loss"])
                best = int(found["n_bases"]), float(found["ridge"])
        table = _Table(data, scale, *best, seed)
        table.run(self.steps, self.rate)
        progress(1.0, "LoRe")
        return self._with(table, {"selection": {"n_bases": best[0], "ridge": best[1], "curve": curve}}), None

    def _with(self, table: "_Table", record: dict[str, Any]) -> "LoRe":
        out = self.like({"bases": table.scale[:, None] * table.bases, "mean_weights": table.weights().mean(0)})
        out.record.update(record)
        return out


class _Table:
    """The joint problem of LoRe: bases (D, K) and one row of logits per user, by full-batch Adam; the gradient is closed-form."""

    def __init__(self, data: EmbeddedPairs, scale: Tensor, k: int, ridge: float, seed: int):
        self.scale, self.taken = scale, 0
        self.ridge = ridge * len(data.user_ids)  # the losses of users are summed
        self.design, self.user, self.tie = crowd.Rescaled(data.differences(), scale), data.user_index, data.tie
        weight = data.weight.to(scale)
        total = weight.new_zeros(len(data.user_ids)).index_add_(0, data.user_index, weight)
        self.share = weight / total[data.user_index]  # each user's pairs weigh one together
        generator = torch.Generator().manual_seed(seed)
        self.bases = torch.randn(len(scale), k, generator=generator).to(scale)
        self.logits = torch.stack([normal_for(user, seed, k) for user in data.user_ids]).to(scale)
        self._moments = [torch.zeros_like(t) for t in (self.bases, self.bases, self.logits, self.logits)]

    def weights(self) -> Tensor:
        return self.logits.softmax(1)

    def run(self, steps: int, rate: float, progress: Callable[[float], None] | None = None) -> None:
        tied = self.tie if bool(self.tie.any()) else None
        for step in range(steps):
            w = self.weights()
            own = w[self.user]  # (P, K)
            projected = self.design.project(self.bases)
            slope = likelihood.gradient((projected * own).sum(1), tied) * self.share
            to_bases = self.design.back(slope[:, None] * own)
            if self.ridge:
                to_bases = to_bases + self.ridge * self.bases
            to_weights = torch.zeros_like(w).index_add_(0, self.user, slope[:, None] * projected)
            to_logits = w * (to_weights - (w * to_weights).sum(1, keepdim=True))
            self.taken += 1
            self._adam(self.bases, to_bases, self._moments[0], self._moments[1], rate)
            self._adam(self.logits, to_logits, self._moments[2], self._moments[3], rate)
            if progress is not None and step % 50 == 0:
                progress(step / steps)

    def _adam(self, value: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rate: float) -> None:
        first.mul_(0.9).add_(gradient, alpha=0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = (second / (1 - 0.999**self.taken)).sqrt_().add_(1e-8)
        value.addcdiv_(first, scale, value=-rate / (1 - 0.9**self.taken))


def _held_out_loss(model: LoRe, data: EmbeddedPairs, seed: int) -> float | None:
    """Mean log loss of held-out users on the second half of their units, weights solved from the first half; None of nobody."""
    from palate.models.validation import halves

    support, query = halves(data, seed)
    offset, slopes = model.design(model.features(data.embeddings))
    del offset
    z = slopes[data.chosen] - slopes[data.rejected]
    users, grouped, known = len(data.user_ids), data.grouped(), (data.weight * support).to(z)
    w = z.new_zeros(users, z.shape[1])
    for some in chunks(grouped.counts, z.shape[1]):
        index, real = grouped.padded(some)
        batch = Batch(z[index], z.new_zeros(index.shape), known[index] * real, data.tie[index])
        w[some] = Simplex().solve(batch, None, tuple(data.user_ids[i] for i in some.tolist())).mean
    loss = likelihood.nll((z * w[data.user_index]).sum(1), data.tie)
    asked = (query * data.weight).to(z)
    total = z.new_zeros(users).index_add_(0, data.user_index, loss * asked)
    count = z.new_zeros(users).index_add_(0, data.user_index, asked)
    return float((total[count > 0] / count[count > 0]).mean()) if bool((count > 0).any()) else None
