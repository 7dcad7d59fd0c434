"""The default model: a user is a draw from a population; learn the population, then condition on what the user said.

r_i(e) = crowd(e) + w_i . V^T e with w_i ~ prior. Bradley-Terry is the prior without spread, LoRe a flat prior on a simplex, MRM a
shared start without a prior; this one has a prior with a covariance, learned, and therefore uncertainty, and a floor: with no
choices, or where people do not differ, it is the crowd's reward. Where held-out users show that nobody speaks for anybody else,
there is no crowd: everyone is known by their own choices and by how people differ.

The order of estimation: the crowd's direction and its ridge, whether there is a crowd at all, whether its reward bends, the
directions in which users' choices depart from it, the spread along them (EM), how much of all this to believe, types of people,
and whether users are blends of types. Every choice is made on held-out seen users and is written into the record with its curve.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from palate.data.embeddings import Dense, Differences, Embeddings
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.models import crowd, pulls, stating
from palate.models.base import Inference, Newton, RewardModel
from palate.models.selection import BLENDS, CROWD, KAPPAS, ROUNDS, Candidate, Crowds, Selection
from palate.models.subspace import Design
from palate.priors import Prior
from palate.solvers import Batch, Solution

Progress = Callable[[float, str], None]  # (share done, what)

TYPES = (2, 4, 12)
LENGTHS = (0.5, 1.0)
BEND_RIDGES = (1e-5, 3e-5, 1e-4, 3e-4)


class Hierarchical(RewardModel):
    """Population of users around a crowd: r_i(e) = crowd(e) + w_i . V^T e, w_i ~ mixture of Gaussians, learned.

    Args:
        n_bases: most base rewards to keep; as many are kept as hold 99.5 % of the prior variance of the margins.
        bend: random Fourier features of the crowd's reward; 0 keeps it linear. They are used only where held-out users gain.
        types: numbers of mixture components to try beside the plain Gaussian; () for none.
        kappa: multiplier of the prior covariance. None chooses it, and how people differ, on held-out users, 0 included (then
            this is Bradley-Terry); with a number nothing of that is validated, and the floor is the caller's own affair.
        prior_variance: variance of the margins under the prior from which EM starts, in squared log-odds.
        blend: whether a user is a blend of types of people, with weights that are positive and sum to one, as LoRe's are. None
            tries it where people hardly err and keeps it where held-out users gain, False does not try. True is what a model
            says that was fitted so; to fit, it is None.
        sharpness: of a blend, by how much its margins are wider than those by which a user's weights are solved (`Sharpened`): a
            number that is fitted. A likelihood with margins as wide as those of people who never err tells types that agree on
            most pairs apart no longer; one that tells them apart best is far too unsure.
        calibration: what stated log-odds are multiplied by (`models.stating.calibration`): a number that is fitted, on held-out
            users. Weights and rankings do not depend on it.
    """

    direction: Tensor
    bases: Tensor
    frequencies: Tensor
    phases: Tensor
    amplitudes: Tensor
    share: Tensor
    means: Tensor
    factors: Tensor

    def __init__(
        self,
        n_bases: int = 128,
        *,
        bend: int = 1000,
        types: tuple[int, ...] = TYPES,
        kappa: float | None = None,
        prior_variance: float = 4.0,
        blend: bool | None = None,
        sharpness: float = 1.0,
        calibration: float = 1.0,
    ):
        super().__init__()
        if n_bases < 0 or bend < 0:
            raise DataError(f"n_bases is {n_bases} and bend {bend}; expected numbers of at least 0")
        if kappa is not None and not 0 <= kappa < float("inf"):
            raise DataError(f"kappa is {kappa}; expected a finite number of at least 0, or None to choose it on held-out users")
        if not prior_variance > 0:
            raise DataError(f"prior_variance is {prior_variance}; expected a positive number")
        self.n_bases, self.bend, self.types, self.kappa, self.prior_variance = n_bases, bend, tuple(types), kappa, prior_variance
        if not 1 <= sharpness < float("inf"):
            raise DataError(f"sharpness is {sharpness}; expected a finite number of at least 1")
        if not 0 < calibration < float("inf"):
            raise DataError(f"calibration is {calibration}; expected a finite number above 0")
        self.blend, self.sharpness, self.calibration = blend, sharpness, calibration
        self.inference: Inference = Newton() if sharpness == 1 else Sharpened(sharpness)
        for name in ("direction", "phases", "amplitudes", "share"):
            self.register_buffer(name, torch.zeros(0))
        for name in ("bases", "frequencies", "means"):
            self.register_buffer(name, torch.zeros(0, 0))
        self.register_buffer("factors", torch.zeros(0, 0, 0))

    def options(self) -> dict[str, Any]:
        return {
            "n_bases": self.n_bases,
            "bend": self.bend,
            "types": list(self.types),
            "kappa": self.kappa,
            "prior_variance": self.prior_variance,
            **({} if self.blend is None else {"blend": self.blend}),  # as models that were saved before there were blends
            **({} if self.sharpness == 1 else {"sharpness": self.sharpness}),
            **({} if self.calibration == 1 else {"calibration": self.calibration}),
        }

    @property
    def n_features(self) -> int:
        return len(self.direction)

    @property
    def crowd_weights(self) -> Tensor:
        return self.direction.new_zeros(self.bases.shape[1])

    @property
    def prior(self) -> Prior | None:
        if len(self.share) == 0:
            return None
        prior = Prior(self.share, self.means, self.factors)
        return prior.positive() if self.blend else prior

    def features(self, embeddings: Embeddings) -> Tensor:
        """(N, 1 + K): the crowd's reward, then the base rewards."""
        out = embeddings.project(torch.cat([self.direction[:, None], self.bases], dim=1))
        if len(self.amplitudes):
            out[:, 0] += crowd.bent(embeddings, self.frequencies, self.phases) @ self.amplitudes
        return out

    def design(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features[:, 0], features[:, 1:]

    @property
    def n_parameters(self) -> int:
        """Numbers learned and shared by all users; the random frequencies and phases are drawn, not learned."""
        return super().n_parameters - self.frequencies.numel() - self.phases.numel()

    def fitted(self, data: EmbeddedPairs, *, seed: int, progress: Progress) -> tuple["Hierarchical", None]:
        return _Estimation(self, data, seed, progress).run(), None


class Sharpened(Newton):
    """Newton's method for a blend whose types have margins `sharpness` times as wide as those to be solved with.

    The slope of a pair for type k is m_k - m, with m the crowd's margin, the offset, which a blend's weights leave out: they sum
    to one. Wider margins are sharpness m_k - m; without choices a user still has the crowd's.
    """

    def __init__(self, sharpness: float):
        self.sharpness = sharpness

    def solve(self, batch: Batch, prior: Prior | None, users: tuple[str, ...], *, covariance: bool = True) -> Solution:
        slopes = (batch.slopes - (self.sharpness - 1) * batch.offset[..., None]) / self.sharpness
        return super().solve(batch._replace(slopes=slopes), prior, users, covariance=covariance)


class _Estimation:
    """The order in which `Hierarchical` is estimated, with what each step leaves for the next."""

    def __init__(self, model: Hierarchical, data: EmbeddedPairs, seed: int, progress: Progress):
        self.model, self.data, self.seed, self.progress = model, data, seed, progress
        self.centre, self.scale = crowd.standard_scale(data)
        self.linear = crowd.Rescaled(data.differences(), self.scale)
        self.fold = crowd.user_folds(len(data.user_ids), seed)
        self.record: dict[str, Any] = {}

    def run(self) -> Hierarchical:
        self.progress(0.0, "the crowd's reward")
        straight = crowd.fit_crowd(self.data, self.linear, self.fold)
        self.record["ridge"] = {"grid": list(crowd.RIDGES), "log_loss": straight.curve, "chosen": straight.ridge}
        straight, personal, chosen = self._around(straight)
        numbers: dict[str, Tensor] = {"direction": self.scale * straight.direction}
        bend = self._bend(straight)
        if bend is not None:
            table, bent = bend
            around = self._selection(straight, self._beside(self.data, table).project(bent.directions), bent=True)
            around.crowd_alone()
            if personal is not None:
                personal.judge(chosen)
            if personal is None or around.mean(CROWD) < personal.mean(chosen):
                self.record["bend"]["chosen"] = True
                personal, chosen = self._personal(straight, around.crowds.offsets, 0.6, bent=True)
                numbers["direction"] = self.scale * bent.direction[: len(self.scale)]
                numbers["frequencies"], numbers["phases"] = table.frequencies, table.phases
                numbers["amplitudes"] = bent.direction[len(self.scale) :] * table.gain
        if personal is not None and personal.folds:
            self.record["population"] = {"curve": personal.curve(), "chosen": chosen._asdict()}
        numbers["bases"], sharpness, calibration = self.scale.new_zeros(len(self.scale), 0), 1.0, 1.0
        if personal is not None and chosen != CROWD:
            self.progress(0.95, "how people differ")
            view, prior = personal.describe(chosen)
            numbers["bases"] = self.scale[:, None] * view.bases
            if chosen.blended:
                sharpness = stating.sharpness(personal, chosen)
                numbers["bases"] = sharpness * numbers["bases"] + (sharpness - 1) * numbers["direction"][:, None]
            elif personal.folds and self.model.kappa is None:
                calibration = stating.calibration(personal, chosen)
            numbers.update({"share": prior.share, "means": prior.means, "factors": prior.factors})
        blend = True if chosen.blended else False if self.model.blend is False else None
        out = self.model.like(numbers, blend=blend, sharpness=sharpness, calibration=calibration)
        out.record["selection"] = self.record
        self.progress(1.0, "done")
        return out

    def _around(self, straight: crowd.CrowdFit) -> tuple[crowd.CrowdFit, Selection | None, Candidate]:
        """The crowd that is worth having, and how people differ around it.

        A crowd has to tell the choices of held-out users better than a coin, by their log loss. One that does not at all is left
        out: nobody's taste is then taken for anybody else's. Where it does, but by less than one standard error, people are
        described around it and around nothing, and held-out users say which.
        """
        gain, error = straight.gain
        self.record["ridge"]["gain"] = {"mean": gain, "error": error}
        offsets = self.linear.project(straight.directions)
        personal, chosen = None, CROWD
        doubtful = self.model.kappa is None and self.model.n_bases > 0 and gain <= error
        if not doubtful or gain > 0:
            personal, chosen = self._personal(straight, offsets, 0.1, 0.175 if doubtful else 0.35)
        if not doubtful:
            return straight, personal, chosen
        nothing = straight.nothing()
        alone, own = self._personal(nothing, torch.zeros_like(offsets), 0.275, 0.175)
        if personal is not None and alone is not None:
            personal.judge(chosen)
            alone.judge(own)
            errors = {"crowd": personal.mean(chosen), "nothing": alone.mean(own)}
            self.record["ridge"]["errors"] = errors
            if not errors["nothing"] < errors["crowd"]:  # nor where nobody can be asked, who has one choice
                return straight, personal, chosen
        return nothing, alone, own

    def _selection(self, straight: crowd.CrowdFit, offsets: Tensor, *, bent: bool = False) -> Selection:
        model = self.model
        crowds = Crowds(offsets, straight.directions, straight.stronger - straight.directions, bent)
        n_bases, variance = model.n_bases, model.prior_variance
        return Selection(self.data, self.linear, self.fold, crowds, n_bases=n_bases, prior_variance=variance, seed=self.seed)

    def _personal(
        self, straight: crowd.CrowdFit, offsets: Tensor, done: float, span: float = 0.35, *, bent: bool = False
    ) -> tuple[Selection | None, Candidate]:
        """How people differ from a crowd with these margins (P, folds + 1); progress is told from `done` over `span`."""
        model = self.model
        if model.n_bases == 0 or model.kappa == 0 or len(self.data.user_ids) < 2:
            return None, CROWD
        selection = self._selection(straight, offsets, bent=bent)
        if not selection.folds:  # too few users to hold any out
            return selection, Candidate(ROUNDS[-1], rank=model.n_bases, kappa=1.0 if model.kappa is None else model.kappa)
        if model.kappa is None:
            blends = [] if model.blend is False else [number for number in BLENDS if number <= model.n_bases]
            chosen = selection.select(
                KAPPAS, model.types, blends, lambda share: self.progress(done + span * share, "how people differ")
            )
        else:  # nothing to compare, so nobody is held out
            chosen = Candidate(ROUNDS[-1], rank=model.n_bases, kappa=model.kappa)
        return selection, chosen

    # -- whether the crowd's reward bends

    def _bend(self, straight: crowd.CrowdFit) -> tuple[crowd.Bend, crowd.CrowdFit] | None:
        """The crowd's reward with random Fourier features beside the linear ones, where held-out users surely gain by it.

        A bend is worth a full fit if, on users held out of it, its log loss is below the straight crowd's by more than one
        standard error of the paired difference. `run` keeps it if the bent crowd alone then errs less than the personal rewards
        around the straight one: where people differ, a bend can also be an average over them, which knowing each of them
        makes needless.
        """
        dense = torch.zeros_like(self.scale)
        for part, is_dense in self.data.embeddings.column_blocks():
            dense[part] = float(is_dense)
        if not self.model.bend or int(self.fold.max()) < 0 or not bool((dense * self.scale).any()):
            return None
        users = self._few_texts()
        trial = self.data[users.to(self.data.user_index.device)[self.data.user_index]]
        fold = torch.where(self.fold < 2, self.fold, -1)[users]  # two folds are enough to see it
        if not bool((fold >= 0).any()):
            return None
        linear = crowd.Rescaled(trial.differences(), self.scale)
        base, _ = crowd.held_out_losses(trial, linear, fold, [straight.ridge])
        if not bool(straight.directions.any()):  # a crowd that agrees on nothing is a coin
            base = torch.full_like(base, math.log(2))
        tried: list[dict[str, Any]] = []
        best: tuple[float, crowd.Bend] | None = None
        for number, length in enumerate(LENGTHS):
            self.progress(0.5 + 0.05 * number, "whether the crowd's reward bends")
            bend = crowd.Bend(self.centre, self.scale, dense, width=self.model.bend, length=length, seed=self.seed)
            bent, ridge = crowd.held_out_losses(trial, self._beside(trial, bend), fold, BEND_RIDGES)
            gain = (base - bent)[fold >= 0].double()
            tried.append(
                {"length": length, "ridge": ridge, "gain": float(gain.mean()), "error": float(gain.std() / len(gain) ** 0.5)}
            )
            if tried[-1]["gain"] > tried[-1]["error"] and (best is None or tried[-1]["gain"] > best[0]):
                best = (tried[-1]["gain"], bend)
            if tried[-1]["gain"] < -tried[-1]["error"]:
                break  # the sharpest bend loses surely: a softer one has nothing to find
        self.record["bend"] = {"tried": tried, "chosen": False}
        if best is None:
            return None
        self.record["bend"]["length"] = max(tried, key=lambda one: float(one["gain"]))["length"]
        return best[1], crowd.fit_crowd(self.data, self._beside(self.data, best[1]), self.fold, ridges=BEND_RIDGES)

    def _beside(self, data: EmbeddedPairs, bend: crowd.Bend) -> Design:
        used, where = torch.unique(torch.cat([data.chosen, data.rejected]), return_inverse=True)
        table = Dense(bend.table(data.embeddings.take(used)))
        linear = crowd.Rescaled(data.differences(), self.scale)
        return crowd.Beside(linear, Differences(table, where[: len(data)], where[len(data) :]))

    def _few_texts(self, most: int = 4000, work: float = 8e9) -> Tensor:
        """(U,) users, evenly spaced, whose choices hold at most about `most` distinct texts, and fewer where bending so many
        takes more than `work` multiplications: enough to see whether a bend pays.

        With fewer pairs a bend pays less, so the trial errs towards the straight reward.
        """
        most = min(most, int(work / (len(self.scale) * self.model.bend)))
        texts = len(torch.unique(torch.cat([self.data.chosen, self.data.rejected])))
        users = torch.zeros(len(self.data.user_ids), dtype=torch.bool)
        kept = max(2, int(len(users) * min(1.0, most / texts)))
        users[pulls.evenly(len(users), kept)] = True
        return users
