"""A fitted model that goes on: new people change the population, new people's tastes add base rewards, old profiles come along.

`grow` never touches a base reward or the crowd's reward. It re-estimates the population from the new users' choices and the old
prior, which counts as the users behind it, and then adds base rewards for what the present ones leave unexplained. Each change
is kept only where new users who were held out of it gain. `palate.carry` takes the profiles of the old model along.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from palate import likelihood
from palate.adaptation import pad, pair_design
from palate.carrying import Linear, linear
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.models.base import RewardModel
from palate.models.crowd import Rescaled, standard_scale, user_folds
from palate.models.hierarchical import Hierarchical
from palate.models.mrm import MRM
from palate.models.population import Expectation
from palate.models.pref import PReF
from palate.models.validation import halves
from palate.priors import Prior
from palate.solvers import Batch, batches, posterior

ROUNDS = 10  # of EM for the population
BASE_ROUNDS = 25  # of EM for the variance of a new weight alone
SURE = 2.0  # standard errors by which held-out users have to gain
SMALL = 128  # features up to which the operator of a new base is formed whole
FEWEST = 10  # users, so that some can be held out


@torch.no_grad()
def grow(model: RewardModel, data: EmbeddedPairs, *, n_old: float | None = None, most: int = 8, seed: int = 0) -> RewardModel:
    """The model after new users: their population pooled with the old one, and base rewards that it lacked.

    1. The population. EM from the old prior, whose moments count as those of `n_old` users (sufficient statistics of a Gaussian;
       of each type, for a mixture): with w_i, C_i the Laplace posterior of new user i,
       m <- (n_old m_0 + sum_i w_i) / (n_old + U), S + m m' <- (n_old (S_0 + m_0 m_0') + sum_i (w_i w_i' + C_i)) / (n_old + U).
    2. A base reward for what is left. With s_ij = -d nll / d margin at user i's weights, its direction is the leading
       eigenvector of sum_i sum_{j != l} s_ij s_il z_ij z_il', outside the span of the bases: the second moment of the users'
       score gradients without the noise of single choices (its mean is 0 where a user's residuals share nothing). It is then
       made uncorrelated with the old bases over the pairs. The new weight has prior N(0, v), v by EM with all else fixed.
    3. Again, until a base does not pay; then as many as are left of `most` together, because each alone may be too little to see.

    Each step is judged by the log loss of new users who were held out of it, on the half of their choices that did not adapt
    them, and kept where it falls by more than two standard errors. What people without choices get changes only where the
    crowd's weights are the prior's mean (`PReF`, `MRM`); to learn the crowd anew, `fit` on everybody.

    Args:
        model: a fitted `Hierarchical`, `PReF` or linear `MRM` with an exact solve.
        data: choices of users that it was not fitted on, ten or more of them.
        n_old: users that the old prior counts as; by default those that it was fitted and grown on.
        most: most base rewards to add.
        seed: of who is held out and which choices adapt them.

    Returns:
        A new model of the same class; its `record["grown"]` has what was tried, the gains, and what was kept. Where nothing
        was kept, its numbers and its fingerprint are the old ones. Profiles of the old model can be carried (`carry`).

    Raises:
        DataError: a method that cannot grow, fewer than ten users, only ties, or no `n_old` where the record has none.
        MismatchError: the embeddings come from another encoder.
    Cost: one pass over the embeddings, then a few tens of passes for every base and fold.
    """
    old = linear(model)
    model.check(data.embeddings, data.encoder)
    if n_old is None:
        n_old = _counted(model)
    if n_old is None or not 0 <= n_old < float("inf"):
        raise DataError(
            f"n_old is {n_old} and the model's record has no number of users; expected how many users the old prior counts as"
        )
    if most < 0:
        raise DataError(f"most is {most}; expected a number of base rewards of at least 0")
    if len(data.user_ids) < FEWEST or bool(data.tie.all()):
        raise DataError(
            f"{len(data.user_ids)} users with {int((~data.tie).sum())} choices that are no ties; expected {FEWEST} users or "
            "more, some of them held out to judge by; adapt them to the model as it is"
        )
    growth = _Growth(model, old, data, seed)
    tried: list[dict[str, Any]] = []
    if old.prior is not None:
        growth.attempt("population", lambda fold: growth.population(fold, n_old), tried)
    left = most
    while left and growth.attempt("base", lambda fold: growth.bases(fold, 1), tried):
        left -= 1
    if left > 1:  # each alone may be too little to see, and all of them enough
        growth.attempt("bases together", lambda fold: growth.bases(fold, left), tried)
    out = growth.model()
    out.record = dict(model.record) | {
        "grown": [
            *model.record.get("grown", []),
            {"data": data.fingerprint(), "n_pairs": len(data), "n_users": len(data.user_ids), "seed": seed, "steps": tried},
        ]
    }
    return out


def _counted(model: RewardModel) -> float | None:
    """Users that the model was fitted and grown on, None where nobody wrote it down."""
    first = model.record.get("n_users")
    return None if first is None else float(first + sum(step["n_users"] for step in model.record.get("grown", [])))


def _rebuilt(model: RewardModel, bases: Tensor, prior: Prior) -> RewardModel:
    """The model with these bases and this population; everything else, the record apart, is as it was."""
    numbers = dict(model.state_dict()) | {"bases": bases}
    if isinstance(model, Hierarchical):
        numbers |= {"share": prior.share, "means": prior.means, "factors": prior.factors}
    elif isinstance(model, PReF):
        numbers |= {"mean": prior.means[0], "factor": prior.factors[0]}
    else:
        numbers |= {"start": prior.means[0], "spread": prior.factors[0].diagonal()}
    out = model.like({name: value.to(model.state_dict()[name]) for name, value in numbers.items()})
    out.encoder = model.encoder
    return out


class _State(NamedTuple):
    """What one set of learning users made of the model so far."""

    bases: Tensor  # (D, K)
    slopes: Tensor  # (P, K) float64
    prior: Prior | None


class _Growth:
    """The steps of `grow`, each made for every fold without its users, and once for everybody (the last state)."""

    def __init__(self, model: RewardModel, old: Linear, data: EmbeddedPairs, seed: int):
        self.before, self.data, self.kept = model, data, False
        offset, slopes = pair_design(model, data)
        self.offset = offset.double()
        self.scale = standard_scale(data)[1].double()
        self.design = Rescaled(data.differences(), self.scale)
        self.tie = data.tie if bool(data.tie.any()) else None
        self.fold = user_folds(len(data.user_ids), seed).to(data.user_index.device)
        self.support, self.query = halves(data, seed)
        prior = None if old.prior is None else old.prior.to(self.offset)
        self.start = prior
        self.folds = int(self.fold.max()) + 1
        self.states = [_State(old.bases, slopes.double(), prior)] * (self.folds + 1)

    def model(self) -> RewardModel:
        if not self.kept:
            out = self.before.like(self.before.state_dict())
            out.encoder = self.before.encoder
            return out
        last = self.states[-1]
        if last.prior is None:
            raise DataError("a kept step has a population; this model has none")
        return _rebuilt(self.before, last.bases, last.prior)

    def attempt(self, step: str, make: Callable[[int], _State | None], tried: list[dict[str, Any]]) -> bool:
        """Make the step for every fold, keep it where held-out users gain, and note what came of it."""
        made = [make(fold) for fold in range(self.folds)]
        gain = torch.cat(
            [self._loss(self.states[f], f) - self._loss(self.states[f] if one is None else one, f) for f, one in enumerate(made)]
        )
        gain = gain[~torch.isnan(gain)]
        mean, error = float(gain.mean()) if len(gain) else 0.0, float(gain.std() / len(gain) ** 0.5) if len(gain) > 1 else 0.0
        kept = len(gain) > 1 and mean > SURE * error
        everybody = make(self.folds) if kept else None
        kept = kept and everybody is not None
        tried.append({"step": step, "gain": mean, "error": error, "n_users": len(gain), "kept": kept})
        if everybody is not None and kept:
            self.states = [now if one is None else one for now, one in zip(self.states, [*made, everybody], strict=True)]
            self.kept = True
        return kept

    # -- the steps

    def population(self, fold: int, n_old: float) -> _State | None:
        state, old = self.states[fold], self.start
        if old is None:
            return None
        expect, prior = Expectation(self._parts(state, self._learners(fold))), old
        mass_old = n_old * old.share
        second_old = old.factors @ old.factors.mT + old.means[:, :, None] * old.means[:, None, :]
        for number in range(ROUNDS):
            mass, first, second = expect.step(prior, max_steps=2 if number else 8)
            mass = (mass + mass_old).clamp(min=1e-9)
            means = (first + mass_old[:, None] * old.means) / mass[:, None]
            second = (second + mass_old[:, None, None] * second_old) / mass[:, None, None]
            covariance = second - means[:, :, None] * means[:, None, :]
            if isinstance(self.before, MRM):  # its population is diagonal
                covariance = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
            factors, failed = torch.linalg.cholesky_ex((covariance + covariance.mT) / 2)
            if bool(failed.any()):
                return None  # without old users and with few new ones there is no spread to speak of
            prior = Prior(mass / mass.sum(), means, factors, old.walls)
        return state._replace(prior=prior)

    def bases(self, fold: int, n: int) -> _State | None:
        """At most `n` new base rewards at once, each with a variance of its own."""
        state, learners = self.states[fold], self._learners(fold)
        rows = torch.nonzero(learners[self.data.user_index])[:, 0]
        margin = self.offset + (state.slopes * self._weights(state, rows)[self.data.user_index]).sum(1)
        slope = -likelihood.gradient(margin, self.tie) * self.data.weight * learners[self.data.user_index]
        columns = self._leading(slope, state, n)
        if not columns.shape[1] or len(rows) < columns.shape[1]:
            return None
        told = self.design.project(columns.to(self.scale)).double()
        # Uncorrelated over the learners' pairs, with the old bases too: the same span, and the prior stays as simple as it was.
        inside = state.slopes[rows]
        turn = inside[:0].T @ told[:0]
        if inside.shape[1]:  # on the processor, the only place that has a driver for columns which depend on each other
            turn = torch.linalg.lstsq(inside.cpu(), told[rows].cpu(), driver="gelsd").solution.to(inside)
        told, raw = told - state.slopes @ turn, self.scale[:, None] * columns - state.bases.double() @ turn
        root = torch.linalg.qr(told[rows], mode="r")[1] / len(rows) ** 0.5
        if float(root.diagonal().abs().min()) < 1e-6:
            return None
        root = torch.sign(root.diagonal())[:, None] * root
        told, raw = (torch.linalg.solve_triangular(root, part, upper=True, left=False) for part in (told, raw))
        wide, slopes = torch.cat([state.bases, raw.to(state.bases)], 1), torch.cat([state.slopes, told], 1)
        wider, variance = _State(wide, slopes, None), told.new_full(columns.shape[1:], 1 / columns.shape[1])
        prior = _wider(state.prior, variance)
        expect = Expectation(self._parts(wider, learners))
        for number in range(BASE_ROUNDS):
            second = expect.step(prior, max_steps=1 if number else 8)[2].sum(0).diagonal() / expect.n_users
            prior = _wider(state.prior, second[-len(variance) :])
        return wider._replace(prior=prior)

    def _leading(self, slope: Tensor, state: _State, n: int) -> Tensor:
        """(D, at most n) leading directions of what the users' residuals share, outside the span of the bases."""
        d, user = len(self.scale), self.data.user_index
        live = self.scale > 0
        held = torch.where(live[:, None], state.bases.double() / self.scale.clamp(min=1e-30)[:, None], 0.0)
        span = torch.linalg.qr(held)[0] if held.shape[1] else held

        def apply(directions: Tensor) -> Tensor:
            directions = directions - span @ (span.T @ directions)
            own = self.design.project(directions.to(self.scale)).double() * slope[:, None]
            sums = own.new_zeros(len(self.data.user_ids), own.shape[1]).index_add_(0, user, own)
            back = self.design.back((slope[:, None] * (sums[user] - own)).to(self.scale)).double()
            return back - span @ (span.T @ back)

        if d <= SMALL:
            whole = apply(torch.eye(d, dtype=torch.float64, device=slope.device))
            values, vectors = torch.linalg.eigh((whole + whole.T) / 2)
        else:

            def product(column: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
                out = apply(torch.from_numpy(column.reshape(-1, 1)).to(slope))
                return np.asarray(out[:, 0].cpu().numpy())

            first = np.random.default_rng(0).standard_normal(d)
            operator = LinearOperator((d, d), matvec=product, dtype=np.float64)
            found, columns = eigsh(operator, k=min(n, d - 1), which="LA", v0=first, tol=1e-4, ncv=min(d, 20 + 2 * n), maxiter=300)
            values, vectors = torch.from_numpy(found).to(slope), torch.from_numpy(columns).to(slope)
        kept = torch.argsort(values, descending=True)[:n]
        vectors = vectors[:, kept[values[kept] > 1e-9 * values.abs().max()]]
        signed: Tensor = torch.sign(vectors.gather(0, vectors.abs().argmax(0, keepdim=True))) * vectors  # they have no sign
        return signed

    # -- users

    def _learners(self, fold: int) -> Tensor:
        return self.fold != fold

    def _parts(self, state: _State, users: Tensor) -> list[Batch]:
        chosen = torch.nonzero(users)[:, 0]
        counts = self.data.grouped().counts[chosen]
        return [pad(self.data, self.offset, state.slopes, chosen[rows]) for rows in batches(counts, state.slopes.shape[1])]

    def _weights(self, state: _State, rows: Tensor) -> Tensor:
        """(U, K) modes of the users of the pairs `rows` given these; the prior's mean for the others."""
        k = state.slopes.shape[1]
        if state.prior is None or not len(rows):
            return state.slopes.new_zeros(len(self.data.user_ids), k)
        out = state.prior.mean.expand(len(self.data.user_ids), -1).clone()
        part = self.data[rows]
        users = torch.unique(self.data.user_index[rows])
        for of_part in batches(part.grouped().counts, k):
            batch = pad(part, self.offset[rows], state.slopes[rows], of_part)
            out[users[of_part]] = posterior(batch, state.prior, covariance=False).mean
        return out

    def _loss(self, state: _State, fold: int) -> Tensor:
        """Mean log loss of the fold's users on their query pairs, adapted from the others; NaN without any."""
        held = (self.fold == fold)[self.data.user_index]
        weights = self._weights(state, torch.nonzero(held & self.support)[:, 0])
        margin = self.offset + (state.slopes * weights[self.data.user_index]).sum(1)
        asked = self.data.weight.double() * (held & self.query)
        loss = likelihood.nll(margin, self.tie) * asked
        total = torch.zeros(len(self.data.user_ids), dtype=torch.float64, device=loss.device)
        told = total.clone().index_add_(0, self.data.user_index, loss)
        weight = total.index_add_(0, self.data.user_index, asked)
        mine = self.fold == fold
        return told[mine] / weight[mine]


def _wider(prior: Prior | None, variance: Tensor) -> Prior:
    """The prior with more weights, N(0, variance) each, that go with no other."""
    variance, n = variance.clamp(min=1e-8), len(variance)
    if prior is None:
        return Prior.gaussian(torch.diag(variance))
    m, k = prior.means.shape
    factors = prior.factors.new_zeros(m, k + n, k + n)
    factors[:, :k, :k], factors[:, k:, k:] = prior.factors, torch.diag(variance.sqrt())
    walls = None if prior.walls is None else torch.cat([prior.walls, prior.walls.new_zeros(len(prior.walls), n)], dim=1)
    return Prior(prior.share, torch.cat([prior.means, prior.means.new_zeros(m, n)], dim=1), factors, walls)
