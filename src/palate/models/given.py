"""Base rewards that are given: K scorers are the features, and only how people weigh them is learned.

PersonalLLM (Zollo et al. 2024) makes its users by mixing ten reward models; the attribute heads of a classifier, rubric scores
and the closeness to a reference answer are base rewards of the same kind. Nothing is estimated over texts, so a few hundred
users suffice and a profile can be read: a user is one weight for each scorer.

A user who likes some scores and dislikes others has signed weights, with a Gaussian prior whose mean and covariance are learned
by EM. A user who mixes scores has weights on the simplex with a Dirichlet prior. Their mode is taken in the softmax basis
(MacKay 1998, "Choice of basis for Laplace approximation"): there the exponents of the Dirichlet density are its concentrations
and not these less one, so it exists for every concentration, is the mean of the prior where a user said nothing, and solves a
strictly convex problem.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from palate import likelihood
from palate.data.embeddings import Embeddings
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.models import crowd
from palate.models.base import Inference, Newton, RewardModel, Simplex
from palate.models.population import Expectation
from palate.models.validation import edge, halves, position, surely_below
from palate.priors import Prior
from palate.solvers import Batch, Solution, batches, posterior

Progress = Callable[[float, str], None]  # (share done, what)
Weights = Literal["signed", "simplex"]

MOST_SCORERS = 256  # of a user's K x K covariance; more columns than that are embeddings
ROUNDS = 40  # of EM for the Gaussian
MEAN_ROUNDS = 4  # of the Dirichlet's mean
PRIOR_VARIANCE = 4.0  # of the margins, in squared log-odds, where EM starts
PSEUDO_USERS = 2.0  # that the start counts as: a covariance of few users is one
TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # log-odds for a standard deviation of the user's own mix
STRENGTHS = (0.3, 1.0, 3.0, 10.0)  # sum of the concentrations
SHOTS = ((1, 1 / 6), (2, 1 / 6), (5, 1 / 6), (10**6, 1 / 2))  # choices, and what the loss after them counts


class GivenBases(RewardModel):
    """Rewards r_i(e) = w_i . (s(e) * scale) of K given scores s(e); `fit` learns the population of the weights and nothing else.

    signed: w_i ~ N(m, S). EM with a Laplace E-step, m and S <- mean and scatter of the users' posteriors (`population`), in which
    the start, N(mu, v I) around the crowd's direction mu, counts as two users. Inference is Newton's.

    simplex: w_i >= 0, sum_k w_ik = 1, w_i ~ Dirichlet(a m) and the reward is t w_i . s. The weights minimise sum_j nll(margin_ij)
    - a sum_k m_k log w_ik (the module's docstring has the source). The mean m is that of the users' weights; the temperature t,
    in log-odds for a standard deviation of the score, and then a, have the lowest log loss on users held out of the fit. A
    higher score has to be better here: turn the sign of a cost model.

    Left open, one of the two is chosen by the smoothed error of held-out users after 1, 2, 5 and half of their choices, and
    nobody differs unless they are better predicted than by the crowd by more than one standard error. With fewer than ten users
    nobody can be held out: weights are signed. Whoever has no choices gets the crowd's reward, which is `BradleyTerry` on the
    scores.

    Args:
        weights: "signed", "simplex", or None to choose, nobody differing included.
        standardise: divide every score by its standard deviation over the texts of the training pairs. Without it scores keep the
            units they have, as in LoRe's use of PersonalLLM; results under the two are not comparable. Gaussian weights follow
            the unit; on the simplex it says how much a point of each score counts.

    Cost: a pass over the pairs and O(U n K^2) a round, n choices a user: a second for 300 users x 20 choices x 10 scorers.
    """

    scale: Tensor
    crowd: Tensor
    concentration: Tensor
    share: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, weights: Weights | None = None, *, standardise: bool = True):
        super().__init__()
        if weights is not None and weights not in get_args(Weights):
            raise DataError(f"weights is {weights!r}; expected one of {', '.join(get_args(Weights))}, or None to choose")
        self.weights, self.standardise = weights, standardise
        self.inference: Inference = Newton()
        for name in ("scale", "crowd", "concentration", "share"):
            self.register_buffer(name, torch.zeros(0))
        self.register_buffer("means", torch.zeros(0, 0))
        self.register_buffer("factors", torch.zeros(0, 0, 0))

    def options(self) -> dict[str, Any]:
        return {"weights": self.weights, "standardise": self.standardise}

    def like(self, state: Any, **options: Any) -> Self:
        out = super().like(state, **options)
        if len(out.concentration):
            out.inference = Mixed(out.concentration)
        return out

    @property
    def n_features(self) -> int:
        return len(self.scale)

    @property
    def differs(self) -> bool:
        """Whether there are personal weights: people were found to differ, or were said to."""
        return len(self.share) > 0 or len(self.concentration) > 0

    @property
    def crowd_weights(self) -> Tensor:
        """(K,) Bradley-Terry's direction on the scaled scores; (0,) where nobody differs and it is the reward itself."""
        return self.crowd if self.differs else self.crowd.new_zeros(0)

    @property
    def prior(self) -> Prior | None:
        """N(m, S) of signed weights; None on the simplex."""
        return None if len(self.share) == 0 else Prior(self.share, self.means, self.factors)

    def features(self, embeddings: Embeddings) -> Tensor:
        """(N, K): the scores in log-odds, for a weight of one."""
        return embeddings.project(torch.diag(self.scale))

    def design(self, features: Tensor) -> tuple[Tensor, Tensor]:
        if self.differs:
            return features.new_zeros(len(features)), features
        return features @ self.crowd, features[:, :0]

    def fitted(self, data: EmbeddedPairs, *, seed: int, progress: Progress) -> tuple["GivenBases", None]:
        width = data.embeddings.shape[1]
        if width > MOST_SCORERS:
            raise DataError(
                f"embeddings have {width} columns; GivenBases learns a weight for each and takes at most {MOST_SCORERS} scores. "
                "Use Hierarchical for embeddings of texts"
            )
        return _Estimation(self, data, seed, progress).run(), None


class Mixed(Simplex):
    """Mode on the simplex under Dirichlet(`concentration`), in the softmax basis; without covariance (see `dirichlet_mode`)."""

    def __init__(self, concentration: Tensor):
        self.concentration = concentration

    def solve(self, batch: Batch, prior: Prior | None, users: tuple[str, ...], *, covariance: bool = True) -> Solution:
        return dirichlet_mode(batch, self.concentration)


def dirichlet_mode(
    batch: Batch, concentration: Tensor, *, tolerance: float = 1e-9, max_steps: int = 100, start: Tensor | None = None
) -> Solution:
    """Weights on the simplex that minimise sum_j weight_ij nll(margin_ij) - sum_k a_k log w_ik, for every user.

    The mode of the posterior under Dirichlet(a) in the softmax basis. Damped Newton steps inside the simplex from the prior's
    own mode a / sum(a), or from `start` (U, K), at most 99 % of the way to the border; strictly convex, so there is one answer.
    `tolerance` is on Newton's decrement, the distance from the optimum in nats.

    Cost: O(U (n K^2 + K^3)) a step, 10 to 20 steps, in float64.
    """
    part = Batch(batch.slopes.double(), batch.offset.double(), batch.weight.double(), batch.tie)
    a = concentration.to(part.slopes)
    users = len(part.offset)
    point = (a / a.sum()).expand(users, -1).clone() if start is None else start.to(part.slopes)

    def objective(w: Tensor) -> Tensor:
        return part.loss(w) - (a * w.log()).sum(1)

    current, converged = objective(point), torch.zeros(users, dtype=torch.bool, device=a.device)
    for _ in range(max_steps):
        margin = part.margins(point)
        pull = torch.bmm(part.slopes.mT, (likelihood.gradient(margin, part.tie) * part.weight)[..., None])[..., 0] - a / point
        root = part.slopes * (likelihood.curvature(margin) * part.weight).sqrt()[..., None]
        hessian = root.mT @ root
        hessian.diagonal(dim1=1, dim2=2).add_(a / point.square())
        both = torch.cholesky_solve(torch.stack([pull, torch.ones_like(pull)], dim=2), torch.linalg.cholesky(hessian))
        level = both[..., 0].sum(1) / both[..., 1].sum(1)
        step = level[:, None] * both[..., 1] - both[..., 0]  # sums to zero
        decrement = -(pull * step).sum(1)
        converged = decrement <= tolerance
        if bool(converged.all()):
            break
        length = (0.99 * torch.where(step < 0, -point / step, torch.inf).amin(1)).clamp(max=1)
        for _ in range(40):
            trial = point + length[:, None] * step
            ahead = objective(trial)
            worse = ahead > current - 1e-4 * length * decrement + 1e-12 * current.abs()  # rounding must not read as an increase
            if not bool(worse.any()):
                break
            length = torch.where(worse, length / 2, length)
        point, current = trial, ahead
    return Solution((point / point.sum(1, keepdim=True)).to(batch.slopes), None, None, converged)


class _Population(NamedTuple):
    """Signed weights with their prior, or mixes with a concentration, of scores that count `temperature`; neither: the crowd."""

    prior: Prior | None = None
    concentration: Tensor | None = None
    temperature: float = 1.0

    @property
    def differs(self) -> bool:
        return self.prior is not None or self.concentration is not None

    def weights(self, support: Batch) -> Tensor:
        """(U, K) for a weight of one on the scores as they are."""
        if self.prior is not None:
            return posterior(support, self.prior, tolerance=1e-3, covariance=False).mean
        assert self.concentration is not None
        hot = support._replace(slopes=support.slopes * self.temperature)
        return dirichlet_mode(hot, self.concentration, tolerance=1e-4).mean * self.temperature


class _Estimation:
    """The crowd, then the kinds of weights on held-out users, then everybody. In float64: there are few numbers."""

    def __init__(self, model: GivenBases, data: EmbeddedPairs, seed: int, progress: Progress):
        self.model, self.data, self.progress = model, data, progress
        _, unit = crowd.standard_scale(data)
        self.fold = crowd.user_folds(len(data.user_ids), seed)
        found = crowd.fit_crowd(data, crowd.Rescaled(data.differences(), unit), self.fold)
        self.record: dict[str, Any] = {"ridge": {"grid": list(crowd.RIDGES), "log_loss": found.curve, "chosen": found.ridge}}
        self.like = unit
        unit = unit.double()
        self.scale = unit * len(unit) ** 0.5 if model.standardise else (unit > 0).to(unit)
        live = self.scale.clamp(min=1e-30)
        self.crowds = found.directions.double() * (unit / live)[:, None]  # (K, folds + 1)
        self.z = data.differences().project(torch.diag(self.scale).to(self.like)).double()  # (P, K)
        self.everybody = torch.arange(len(data.user_ids))
        self.support, self.query = halves(data, seed)
        self.place = position(data, self.support, seed)
        folds = range(int(self.fold.max()) + 1)
        # Too few users to hold any out are judged on choices of their own; then only a temperature hangs on it.
        self.trials = [(f, torch.nonzero(self.fold != f)[:, 0], torch.nonzero(self.fold == f)[:, 0]) for f in folds] or [
            (-1, self.everybody, self.everybody)
        ]
        self.curve: list[dict[str, Any]] = []

    def run(self) -> GivenBases:
        kind = self.model.weights
        temperature = strength = 1.0
        losses: dict[str, Tensor] = {}
        open_question = kind is None and int(self.fold.max()) >= 0
        if kind is None and not open_question:
            kind = "signed"
        if open_question:
            self.progress(0.1, "the crowd and signed weights")
            losses["crowd"] = self._judged({"weights": "crowd"}, lambda learn, f: _Population())
            losses["signed"] = self._judged({"weights": "signed"}, self._signed)
        if kind != "signed":
            self.progress(0.3, "weights on the simplex")
            temperature, strength, losses["simplex"] = self._tempered()
        if open_question:
            kind = "signed" if losses["signed"][1].nanmean() < losses["simplex"][1].nanmean() else "simplex"
            measures = list(zip(losses[kind], losses["crowd"], strict=True))
            if not any(surely_below(*pair) for pair in measures) or any(surely_below(*pair[::-1]) for pair in measures):
                kind = None
        self.progress(0.8, "everybody's weights")
        population = _Population()
        if kind == "signed":
            population = self._signed(self.everybody, -1)
        elif kind == "simplex":
            population = self._simplex(self.everybody, temperature, strength)
        chosen: dict[str, Any] = {"weights": kind or "crowd"}
        if kind == "simplex":
            chosen |= {"temperature": temperature, "strength": strength}
        return self._model(population, self.record | {"curve": self.curve, "chosen": chosen})

    def _model(self, population: _Population, record: dict[str, Any]) -> GivenBases:
        scale, crowd_weights = self.scale * population.temperature, self.crowds[:, -1] / population.temperature
        numbers = {"scale": scale, "crowd": crowd_weights}
        if population.prior is not None:
            prior = population.prior
            numbers |= {"share": prior.share, "means": prior.means, "factors": prior.factors}
        if population.concentration is not None:
            numbers["concentration"] = population.concentration
        out = self.model.like({name: value.to(self.like) for name, value in numbers.items()})
        out.record["selection"] = record
        self.progress(1.0, "done")
        return out

    # -- estimating

    def _signed(self, learn: Tensor, fold: int) -> _Population:
        """EM from N(mu, v I) with `PRIOR_VARIANCE` of the margins in all; mean and covariance are both re-estimated."""
        spread = torch.eye(self.z.shape[1]).to(self.z) * (PRIOR_VARIANCE / self.z.square().sum(1).mean().clamp(min=1e-12))
        start = Prior.gaussian(spread, self.crowds[:, fold])
        expect, prior = Expectation(self._batches(learn)), start
        for number in range(ROUNDS):
            # The modes move little from round to round: one Newton step from the last ones follows them.
            _, first, second = expect.step(prior, max_steps=1 if number else 8)
            total = expect.n_users + PSEUDO_USERS
            mean = (first[0] + PSEUDO_USERS * start.mean) / total
            moment = second[0] + PSEUDO_USERS * (spread + torch.outer(start.mean, start.mean))
            scatter = moment / total - torch.outer(mean, mean)
            prior = Prior.gaussian((scatter + scatter.T) / 2, mean)
        return _Population(prior)

    def _simplex(self, learn: Tensor, temperature: float, strength: float) -> _Population:
        """The Dirichlet of this strength whose mean is the mean of the users' weights under it, one even user added."""
        k = self.z.shape[1]
        even = torch.full((k,), 1 / k).to(self.z)
        parts = [part._replace(slopes=part.slopes * temperature) for part in self._batches(learn)]
        mean, modes = even, [even.expand(len(part.offset), -1) for part in parts]
        for _ in range(MEAN_ROUNDS):
            total = even
            for i, part in enumerate(parts):
                modes[i] = dirichlet_mode(part, strength * mean, tolerance=1e-4, start=modes[i]).mean
                total = total + modes[i].sum(0)
            mean = total / total.sum()
        return _Population(None, strength * mean, temperature)

    def _batches(self, users: Tensor) -> list[Batch]:
        users = users.to(self.z.device)
        return [self._batch(users[rows]) for rows in batches(self.data.grouped().counts[users], self.z.shape[1])]

    def _batch(self, users: Tensor, said: Tensor | None = None) -> Batch:
        """The choices of these users, only those that are `said` (P,) where given."""
        index, real = self.data.grouped().padded(users)
        weight = self.data.weight[index].to(self.z) * (real if said is None else real & said[index])
        tie = self.data.tie[index] if bool(self.data.tie.any()) else None
        return Batch(self.z[index], torch.zeros_like(weight), weight, tie)

    # -- judging

    def _tempered(self) -> tuple[float, float, Tensor]:
        """The temperature of the lowest log loss, then the strength, with the losses there. Raw scores: in their own unit.

        Two folds are enough for two numbers; what they give is judged on all of them.
        """
        size = 1.0 if self.model.standardise else float(self.z.square().mean().sqrt()) / 2**0.5

        def described(temperature: float, strength: float) -> Callable[[Tensor, int], _Population]:
            return lambda learn, fold: self._simplex(learn, temperature, strength)

        def tried(temperature: float, strength: float) -> float:
            said = {"weights": "simplex", "temperature": temperature, "strength": strength}
            return float(self._judged(said, described(temperature, strength), folds=2)[0].nanmean())

        temperature = min((t / max(size, 1e-12) for t in TEMPERATURES), key=lambda t: tried(t, 1.0))
        strength = min(STRENGTHS, key=lambda s: tried(temperature, s))
        said = {"weights": "simplex", "temperature": temperature, "strength": strength, "chosen": True}
        return temperature, strength, self._judged(said, described(temperature, strength))

    def _judged(
        self, said: dict[str, Any], describe: Callable[[Tensor, int], _Population], *, folds: int | None = None
    ) -> Tensor:
        """(2, U) log loss and smoothed error of users held out, NaN for the others; notes the means on the curve."""
        out = torch.full((2, len(self.data.user_ids)), torch.nan, dtype=torch.float64)
        for fold, learn, held in self.trials[:folds]:
            out[:, held] = self._losses(describe(learn, fold), fold, held).cpu()
        loss, error = out.nanmean(1).tolist()
        self.curve.append(said | {"log_loss": loss, "error": error})
        return out

    def _losses(self, population: _Population, fold: int, held: Tensor) -> Tensor:
        """(2, held-out users) over `SHOTS`: log loss and smoothed error (`validation.edge`)."""
        data, held = self.data, held.to(self.z.device)
        row = torch.full((len(data.user_ids),), -1, device=self.z.device)
        row[held] = torch.arange(len(held), device=self.z.device)
        mine = row[data.user_index] >= 0
        user, told = row[data.user_index][mine], (self.query * data.weight)[mine].to(self.z)
        tie = data.tie[mine]
        strict = told * ~tie  # a tie has no side that could be told wrongly
        out = self.z.new_zeros(len(held), 2)
        for shots, counts in SHOTS:
            weights = self.crowds[:, fold].expand(len(held), -1)
            if population.differs:
                weights = torch.empty_like(weights)
                for rows in batches(data.grouped().counts[held], self.z.shape[1]):
                    weights[rows] = population.weights(self._batch(held[rows], self.place < shots))
            margin = (self.z[mine] * weights[user]).sum(1)
            wrong = likelihood.probability(-margin / edge(margin[strict > 0]))
            losses = [likelihood.nll(margin, tie) * told, wrong * strict]
            out.index_add_(0, user, torch.stack(losses, dim=1) * counts)
        return (out / torch.zeros_like(out).index_add_(0, user, torch.stack([told, strict], dim=1))).T
