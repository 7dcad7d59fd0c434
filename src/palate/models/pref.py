"""PReF: base rewards that every user weighs in their own way, with signs (PReF, arXiv 2503.06358).

A choice is the difference of J base rewards, a user is J free weights, and the log-odds are their inner product. The published
code starts both from a singular value decomposition of the pairs x users table of answers, regresses the pairs' factors on the
features, trains everything jointly, and finds a new user's weights by an unregularised descent from a random start.
`PReF.faithful` does that on frozen features; `PReF()` does what it is meant to do.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from palate import likelihood
from palate.data.embeddings import Embeddings
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.models import crowd
from palate.models.base import Inference, Newton, RewardModel
from palate.models.bilinear import Joint, Owners, by_pair, wide_first
from palate.models.imputation import Descent, Regulariser, published
from palate.models.validation import edge, halves, position, surely_below
from palate.priors import Prior

Progress = Callable[[float, str], None]  # (share done, what)
Start = Literal["auto", "answers", "scores"]

STRENGTHS = (0.03, 0.06, 0.12, 0.25, 0.5)  # shares of the penalty at which nobody differs any more
KAPPAS = (0.25, 1.0, 4.0, 16.0)
SHOTS = (1, 2, 5, None)  # choices after which held-out users are judged
ENOUGH_JUDGES = 5  # of a pair, for its row of the table of answers to hold more than noise


class PReF(RewardModel):
    """Factored rewards r_u(e) = mu . e + lambda_u . (V^T e) with signed weights (arXiv 2503.06358, sections 3 and 4).

    The first base reward is the crowd's, and everybody's weight on it is fixed to 1 (the paper's "bias" option): a user without
    choices gets the crowd's reward. The others are learned with an L2 penalty on both sides (the paper's regularised likelihood;
    its code penalises the unsquared norm of one side),

        min_V  sum_u min_l (sum_j nll(mu.z_uj + l.(V^T z_uj)) + |l|^2 / 2) / P + ridge / 2 |V|^2,

    by L-BFGS on V with every user's weights re-solved by Newton at each step. A ridge is stated by its strength, the square root
    of its share of the smallest ridge at which V = 0 is optimal, so that one grid serves all data. Together the two penalties are
    a nuclear norm (Srebro, Rennie and Jaakkola 2005): they choose the rank within J, and the prior of the weights, which is
    N(0, kappa I) where V is as fitted, is a full covariance in any other coordinates. Here they are those in which the margins of
    the base rewards have unit second moment, the widest first.

    The start is the paper's where there is something to decompose: a logistic factorisation of the answers that were given,
    without imputation, at rank J, regressed on the features by ridge regression. Where most choices are on pairs that fewer than
    five people judged, that table is nearly empty, and the start is the leading directions of the users' score gradients.

    Args:
        n_bases: J, or several to choose from on held-out seen users.
        strength: of the ridge, in (0, 1); None chooses among `STRENGTHS` on held-out users.
        kappa: prior variance of the weights where V is as fitted; None chooses among `KAPPAS` and 0, which is Bradley-Terry.
        start: "answers", "scores", or "auto" to decide as above.

    Cost: a few tens of passes over the features for each J, strength and fold; six seconds for 154 users x 40 choices, 273
    features (half a second where J, strength and kappa are given).
    """

    direction: Tensor
    bases: Tensor
    mean: Tensor
    factor: Tensor

    def __init__(
        self,
        n_bases: int | tuple[int, ...] = (4, 8, 16, 32),
        *,
        strength: float | None = None,
        kappa: float | None = None,
        start: Start = "auto",
    ):
        super().__init__()
        candidates = (n_bases,) if isinstance(n_bases, int) else tuple(n_bases)
        if not candidates or min(candidates) < 1:
            raise DataError(f"n_bases is {n_bases}; expected a positive number of base rewards, or several to choose from")
        if strength is not None and not 0 < strength < 1:
            raise DataError(f"strength is {strength}; expected a number between 0 and 1, or None to choose it")
        if kappa is not None and not 0 <= kappa < float("inf"):
            raise DataError(f"kappa is {kappa}; expected a finite number of at least 0, or None to choose it on held-out users")
        if start not in get_args(Start):
            raise DataError(f"start is {start!r}; expected one of {', '.join(get_args(Start))}")
        self.n_bases, self.strength, self.kappa, self.start = n_bases, strength, kappa, start
        self._faithful: dict[str, Any] | None = None
        self.inference: Inference = Newton()
        for name in ("direction", "mean"):
            self.register_buffer(name, torch.zeros(0))
        for name in ("bases", "factor"):
            self.register_buffer(name, torch.zeros(0, 0))

    @classmethod
    def faithful(cls, n_bases: int = 5, *, regulariser: Regulariser = "l2", few_shot_steps: int = 1000, seed: int = 0) -> Self:
        """The published code as far as frozen features allow (`PReF_code`, 2025).

        1. The table of answers (first P // 50 distinct pairs x users; 1 where the text that comes first in the table of texts was
           chosen, .5 for a tie) is completed from .5 by ten rounds of `impute` at rank 100, whatever J; the factors are scaled by
           the root of the singular values. Not centred: their product is a probability, not a log-odds.
        2. A linear head on the raw features is regressed on the pairs' factors: SGD at 1e-6, 50 steps of 64 answers.
        3. Head and weights are trained jointly on the cross-entropy of strict choices: SGD at 1e-3, 500 steps of 64 choices (32
           micro-batches of 2), plus .02 times the regulariser: "l2" the mean length of the pairs' differences, not squared;
           "l1" their mean 1-norm; "double_l2" also the mean length of the weights; "diag" the mean size of the off-diagonal
           products of base rewards in a micro-batch; "diag_full" also that of the diagonal's distance from 1; "none".
        4. A new user: `Descent` from N(0, 1), full-batch SGD at .01, `few_shot_steps` steps (1,000 in training, 5,000 in
           discovery), no prior. Seen users keep their rows of the table.

        Not applicable here: fine-tuning the language model (the rates are meant for that; a head alone hardly moves), bf16, and
        the head's bias, which cancels in differences. Somebody who said nothing, for whom there is no answer,
        gets the mean of the table.
        """
        if regulariser not in get_args(Regulariser):
            raise DataError(f"regulariser is {regulariser!r}; expected one of {', '.join(get_args(Regulariser))}")
        if not isinstance(n_bases, int):
            raise DataError(f"n_bases is {n_bases}; the faithful preset takes one number")
        if few_shot_steps < 1:
            raise DataError(f"few_shot_steps is {few_shot_steps}; expected at least one step")
        out = cls(n_bases)
        out._faithful = {"regulariser": regulariser, "few_shot_steps": few_shot_steps, "seed": seed}
        out.inference = Descent(few_shot_steps, 0.01, seed)
        return out

    def options(self) -> dict[str, Any]:
        n_bases = self.n_bases if isinstance(self.n_bases, int) else list(self.n_bases)
        own = {"strength": self.strength, "kappa": self.kappa, "start": self.start}
        return {"n_bases": n_bases, **own, "faithful": self._faithful}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        if options["faithful"] is not None:
            return cls.faithful(options["n_bases"], **options["faithful"])
        n_bases = options["n_bases"] if isinstance(options["n_bases"], int) else tuple(options["n_bases"])
        return cls(n_bases, strength=options["strength"], kappa=options["kappa"], start=options["start"])

    @property
    def n_features(self) -> int:
        return len(self.bases)

    @property
    def crowd_weights(self) -> Tensor:
        """The fixed preset: 0, the crowd's reward alone. The faithful one: the mean of the table of the seen users."""
        return self.mean

    @property
    def prior(self) -> Prior | None:
        return None if len(self.factor) == 0 else Prior(self.mean.new_ones(1), self.mean[None], self.factor[None])

    def features(self, embeddings: Embeddings) -> Tensor:
        """(N, 1 + K): the crowd's reward (0 in the faithful preset), then the base rewards."""
        crowd_part = self.direction if len(self.direction) else torch.zeros_like(self.bases[:, 0])
        return embeddings.project(torch.cat([crowd_part[:, None], self.bases], dim=1))

    def design(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features[:, 0], features[:, 1:]

    def fitted(self, data: EmbeddedPairs, *, seed: int, progress: Progress) -> tuple["PReF", Tensor | None]:
        if self._faithful is not None and isinstance(self.n_bases, int):
            bases, table = published(data, self.n_bases, self._faithful["regulariser"], seed)
            return self.like({"bases": bases, "mean": table.mean(0)}), table
        return _Estimation(self, data, seed, progress).run(), None


class _Estimation:
    """The fixed preset: the crowd, then J, the ridge and the prior's strength on held-out users, then everybody."""

    def __init__(self, model: PReF, data: EmbeddedPairs, seed: int, progress: Progress):
        self.model, self.data, self.seed, self.progress = model, data, seed, progress
        _, self.scale = crowd.standard_scale(data)
        self.design = crowd.Rescaled(data.differences(), self.scale)
        self.fold = crowd.user_folds(len(data.user_ids), seed)
        self.record: dict[str, Any] = {}

    def run(self) -> PReF:
        model = self.model
        found = crowd.fit_crowd(self.data, self.design, self.fold)
        self.record["ridge"] = {"grid": list(crowd.RIDGES), "log_loss": found.curve, "chosen": found.ridge}
        self.offsets = self.design.project(found.directions)
        sizes = (model.n_bases,) if isinstance(model.n_bases, int) else tuple(sorted(set(model.n_bases)))
        strengths = STRENGTHS if model.strength is None else (model.strength,)
        n_bases, strength, kappa = sizes[-1], strengths[len(strengths) // 2], 1.0 if model.kappa is None else model.kappa
        if int(self.fold.max()) >= 0 and kappa > 0 and (len(sizes) > 1 or len(strengths) > 1 or model.kappa is None):
            n_bases, strength, kappa = self._choose(sizes, strengths)
        numbers = {"direction": self.scale * found.direction, "bases": self.scale.new_zeros(len(self.scale), 0)}
        numbers |= {"mean": self.scale.new_zeros(0), "factor": self.scale.new_zeros(0, 0)}
        if kappa > 0 and len(self.data.user_ids) > 1:
            everybody = torch.arange(len(self.data), device=self.scale.device)
            joint = Joint(self.data, self.design, self.offsets[:, -1], everybody)
            bases = self._path(joint, n_bases, (strength,))[0]
            bases, spread = wide_first(bases, joint.project(bases))
            numbers |= {"bases": self.scale[:, None] * bases, "mean": torch.zeros_like(spread)}
            numbers["factor"] = torch.diag(spread * kappa**0.5)
        out = model.like(numbers)
        out.record["selection"] = self.record | {"n_bases": n_bases, "strength": strength, "kappa": kappa}
        self.progress(1.0, "PReF")
        return out

    def _path(self, joint: Joint, n_bases: int, strengths: Sequence[float]) -> list[Tensor]:
        """The bases at every strength, weakest first, each from the one before: a base that has vanished cannot come back."""
        n_bases = min(n_bases, self.design.shape[1])
        directions, largest = joint.gradients(n_bases, self.seed)
        start = self.model.start
        if start == "auto":
            pair, _, n_pairs = by_pair(joint.part)
            judges = torch.bincount(pair, minlength=n_pairs)[pair]
            start = "answers" if float((judges >= ENOUGH_JUDGES).double().mean()) >= 0.5 else "scores"
        self.record["start"] = start
        bases = directions
        if start == "answers":
            bases = joint.answers(n_bases, self.seed)
        else:  # margins of variance 4 in all, shared equally
            bases = bases * (4 / n_bases / joint.project(bases).square().mean(0).clamp(min=1e-30)).sqrt()
        out = []
        for strength in strengths:
            bases = joint.fit(bases, strength**2 * largest**2 / float(joint.total))
            out.append(bases)
        return out

    def _choose(self, sizes: Sequence[int], strengths: Sequence[float]) -> tuple[int, float, float]:
        """J, strength and kappa by held-out users after 1, 2, 5 and all choices of their first half.

        Kappa is a matter of scale: for each strength it is the one with the lowest log loss. Which strength tells choices apart
        is judged by the smoothed error, at the largest J; a smaller J, at that strength, has to win by one standard error,
        because the penalties choose the rank within J. Nobody differs (kappa 0) unless smoothed error or log loss gains more than
        one standard error over the crowd's and neither loses as much.
        """
        kappas = KAPPAS if self.model.kappa is None else (self.model.kappa,)
        folds, users = range(int(self.fold.max()) + 1), len(self.data.user_ids)
        support, query = halves(self.data, self.seed)
        place = position(self.data, support, self.seed)
        held = self.fold.to(self.data.user_index.device)[self.data.user_index]
        without = [torch.nonzero(held != f)[:, 0] for f in folds]
        joints = [Joint(self.data, self.design, self.offsets[:, f], without[f]) for f in folds]
        trials = [_Trial(self.data, self.design, self.offsets[:, f], held == f, support, query, place) for f in folds]
        crowd_alone = torch.full((2, users), torch.nan)
        for trial in trials:
            trial.judge(self.scale.new_zeros(len(self.scale), 1), 1.0, crowd_alone)
        curve: list[dict[str, float]] = []

        def judged(n_bases: int, tried: Sequence[float]) -> dict[float, tuple[float, Tensor]]:
            """For each strength its kappa, and the log loss and smoothed error (2, U) of the held-out users there."""
            table = {(s, k): torch.full((2, users), torch.nan) for s in tried for k in kappas}
            for f in folds:
                self.progress(0.1 + 0.8 * f / len(folds), f"PReF, {n_bases} base rewards")
                for strength, bases in zip(tried, self._path(joints[f], n_bases, tried), strict=True):
                    for kappa in kappas:
                        trials[f].judge(bases, kappa, table[strength, kappa])
            for (strength, kappa), losses in table.items():
                loss, error = losses.nanmean(1).tolist()
                curve.append({"n_bases": n_bases, "strength": strength, "kappa": kappa, "log_loss": loss, "error": error})
            best = {s: min(kappas, key=lambda k: float(table[s, k][0].nanmean())) for s in tried}
            return {s: (k, table[s, k]) for s, k in best.items()}

        n_bases, found = sizes[-1], judged(sizes[-1], strengths)
        strength = min(found, key=lambda s: float(found[s][1][1].nanmean()))
        kappa, losses = found[strength]
        for smaller in reversed(sizes[:-1]):
            rival, theirs = judged(smaller, (strength,))[strength]
            if surely_below(theirs[1], losses[1]):
                n_bases, kappa, losses = smaller, rival, theirs
        self.record["curve"] = curve
        measures = list(zip(losses, crowd_alone, strict=True))
        gains = any(surely_below(*pair) for pair in measures) and not any(surely_below(*pair[::-1]) for pair in measures)
        return n_bases, strength, kappa if gains or self.model.kappa is not None else 0.0


class _Trial:
    """Held-out users as new ones: adapted from some of their choices, judged on others."""

    def __init__(
        self,
        data: EmbeddedPairs,
        design: crowd.Rescaled,
        offset: Tensor,
        out: Tensor,
        support: Tensor,
        query: Tensor,
        place: Tensor,
    ):
        rows = torch.nonzero(out)[:, 0]
        part = data[rows]
        self.rows, self.part, self.design, self.offset = rows, part, design, offset[rows]
        self.users = torch.unique(data.user_index[rows])
        self.tie = part.tie if bool(part.tie.any()) else None
        self.query = query[rows].to(self.offset)
        known = [part.weight * (support & (place < (len(data) if n is None else n)))[rows] for n in SHOTS]
        self.owners = [Owners(part.user_index, len(part.user_ids), weight, self.tie) for weight in known]

    def judge(self, bases: Tensor, kappa: float, into: Tensor) -> None:
        """Put each held-out user's mean log loss and smoothed error (`validation.edge`) over queries and `SHOTS` into (2, U); NaN
        without a query."""
        slopes = self.design.project(bases)[self.rows] * kappa**0.5
        user, told = self.part.user_index, self.query * self.part.weight
        strict = told * ~self.part.tie  # a tie has no side that could be told wrongly
        total = self.offset.new_zeros(len(self.users), 2)
        for owners in self.owners:
            margin = owners.predict(slopes, self.offset)
            wrong = likelihood.probability(-margin / edge(margin[strict > 0]))
            losses = [likelihood.nll(margin, self.tie) * told, wrong * strict]
            total.index_add_(0, user, torch.stack(losses, dim=1) / len(SHOTS))
        count = torch.zeros_like(total).index_add_(0, user, torch.stack([told, strict], dim=1))
        into[:, self.users.cpu()] = (total / count).T.to(into)
