"""What everybody's live profiles share: one model's prior in float64 numpy, how fast choices age, and how often people err."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from palate.adaptation import no_pairs
from palate.data.embeddings import as_embeddings
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.living import solver
from palate.living.flips import Flips
from palate.living.history import Forgetting, History
from palate.living.problem import Components
from palate.living.profile import LiveProfile
from palate.living.rows import Rows
from palate.living.solver import Solved, mixed
from palate.living.stored import Weights, read, settings, weights
from palate.living.terms import Floats, Rewards, Terms
from palate.models.attribute_prior import AttributePrior, Informed
from palate.models.base import Newton, RewardModel
from palate.models.hierarchical import Sharpened
from palate.priors import Prior
from palate.solvers import Batch


class View(NamedTuple):
    """How a method sees a row: slopes less (sharpness - 1) times the offset, over sharpness (`models.hierarchical.Sharpened`)."""

    sharpness: float = 1.0

    def rows(self, rows: Rows) -> Rows:
        if self.sharpness == 1:
            return rows
        return rows._replace(slopes=(rows.slopes - (self.sharpness - 1) * rows.offset[:, None]) / self.sharpness)


@dataclass(frozen=True, eq=False)
class Population:
    """Everything of a model that a user's weights depend on. Made once (`of`); threads may share it.

    Attributes:
        model: the fitted model, of which nothing is changed.
        fingerprint: the model's.
        prior: the population of weights in float64, or None for a method that has its own way from choices to weights
            (LoRe's simplex, neighbours ...); there an update solves everything again with `model.inference`.
        forgetting, flips: as given to `of`.
        view: how the method sees a row.
        n_weights: K. dtype: of the profiles that it hands out.
    """

    model: RewardModel
    fingerprint: str
    prior: Components | None
    forgetting: Forgetting
    flips: Flips
    view: View
    n_weights: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        model: RewardModel,
        *,
        half_life: float | None = None,
        half_life_choices: float | None = None,
        flip_rate: float | Flips = 0.0,
    ) -> Self:
        """The population of a fitted model.

        Args:
            half_life: seconds after which a choice weighs half as much; None forgets nothing with time.
            half_life_choices: later choices of the same user after which it does. Both may be given; the weights multiply.
            flip_rate: probability that a choice is turned round, the same for everybody, or a distribution over users
                (`Flips.beta`, `learn_flip_rate`), where each user's own rate is learned from their choices.

        Raises:
            DataError: a model that is not fitted or not linear in its weights (PAL, VPL), a half-life that is not above 0, a
                flip rate outside [0, 1/2), or one above 0 for a method without a prior.
        """
        if not model.is_fitted:
            raise DataError(f"this {type(model).__name__} is not fitted; call palate.fit(data, model) and use what it returns")
        if not model.linear:
            raise DataError(
                f"{type(model).__name__} is not linear in its weights, so that choices cannot be kept as rows; adapt its users "
                "in one batch with palate.adapt, or use a linear method"
            )
        forgetting, flips = Forgetting(half_life, half_life_choices), Flips.of(flip_rate)
        forgetting.check()
        how, prior = model.inference, model.prior
        ours = type(how) in (Newton, Sharpened, Informed) and prior is not None and model.n_weights > 0
        if flips != Flips() and not ours:
            raise DataError(
                f"{type(model).__name__} has no prior to weigh flips with; expected a flip_rate of 0, not {flip_rate}"
            )
        components = Components.of(prior) if ours and prior is not None else None
        view = View(how.sharpness if isinstance(how, Sharpened) else 1.0)
        return cls(model, model.fingerprint(), components, forgetting, flips, view, model.n_weights, model.crowd_weights.dtype)

    def __repr__(self) -> str:
        name = type(self.model).__name__
        return f"Population({name}, {self.n_weights} weights, {self.forgetting}, flip rate {self.flips.mean:.3g})"

    def start(self, user_id: str) -> LiveProfile:
        """A user who has said nothing: the crowd's weights, with the prior's covariance."""
        history = History.empty(self.n_weights)
        return LiveProfile(self, user_id, history, self.solve(history, user_id))

    def from_bytes(self, data: bytes) -> LiveProfile:
        """The profile that `LiveProfile.to_bytes` wrote. Where this population forgets or errs otherwise, or knows something else
        of the user beside their choices (`AttributePrior.with_attributes`), it is solved again.

        Raises:
            ModelFileError: something else, a damaged file, or one of a newer version.
            MismatchError: a profile of another model.
        """
        user_id, history, solved, now, made_with = read(data, self.fingerprint, self.n_weights)
        live = LiveProfile(self, user_id, history, solved, now)
        return live if made_with == settings(self, user_id) else live.again()

    def weights_of(self, data: bytes) -> Weights | None:
        """The weights in what `LiveProfile.to_bytes` wrote, without reading the rest; None where `from_bytes` must be asked.

        As they were when they were written: where this population forgets with time, that is not now.
        """
        return weights(data, self)

    # -- from texts to rows

    @torch.no_grad()
    def rewards(self, embeddings: Any) -> Rewards:
        """The rewards of embedded texts (m, D) as functions of the weights, in float64. One pass over the rows."""
        table = as_embeddings(embeddings)
        self.model.check(table)
        offset, slopes = self.model.design(self.model.features(table))
        return Rewards(offset.cpu().double().numpy(), slopes.cpu().double().numpy())

    def terms(self, data: EmbeddedPairs) -> Terms:
        """Choices as terms, whoever made them, in their order."""
        self.model.check(data.embeddings, data.encoder)
        used, where = torch.unique(torch.cat([data.chosen, data.rejected]), return_inverse=True)
        rewards = self.rewards(data.embeddings.take(used))
        chosen, rejected = where.cpu().numpy().reshape(2, len(data))
        tie, weight = data.tie.cpu().numpy(), data.weight.cpu().double().numpy()
        offset = rewards.offset[chosen] - rewards.offset[rejected]
        return Terms.pairs(offset, rewards.slopes[chosen] - rewards.slopes[rejected], weight=weight, tie=tie)

    def rows(self, said: EmbeddedPairs | Terms, user_id: str) -> Rows:
        """What a user said, checked. Raises as `LiveProfile.update`."""
        if isinstance(said, EmbeddedPairs):
            others = [user for user in said.user_ids if user != user_id]
            if others:
                raise DataError(f"choices of {others[:3]} given to the profile of {user_id!r}; expected that user's alone")
            said = self.terms(said)
        said.check(self.n_weights)
        return Rows.of(said)

    # -- from rows to weights

    def components(self, user_id: str) -> Components:
        """The prior over this user's weights. Raises `DataError` for a method without one."""
        if self.prior is None:
            raise DataError(f"{type(self.model).__name__} has no prior over a user's weights; expected a method with one")
        model = self.model
        if isinstance(model, AttributePrior):
            informed = model.informed
            shift, known = model.shifts((user_id,))
            if informed is not None and bool(known[0]):
                return Components.of(Prior(informed.share, informed.means + shift[0].to(informed.means), informed.factors))
        return self.prior

    def solve(self, history: History, user_id: str, now: float | None = None, start: Floats | None = None) -> Solved:
        """The weights that a history says at `now`; `start` (M, K) are the whitened modes of a similar one."""
        rows = history.rows
        weight = history.remembered(self.forgetting, now)
        if self.n_weights == 0 or not (rows.n_terms or len(rows.level)):
            return self._nothing(user_id)
        if self.prior is None:
            return self._by_the_method(rows.weighted(weight), user_id)
        prior, seen = self.components(user_id), self.view.rows(rows.weighted(weight))
        rates = np.asarray(self.flips.rates)
        found = solver.erring(seen, prior, rates, start=None if start is None or not len(start) else start[None])
        m, k = prior.means.shape
        evidence = (found.log_evidence + np.log(self.flips.shares)[:, None]).ravel()
        mean, covariance, share = mixed(found.mean.reshape(-1, k), found.covariance.reshape(-1, k, k), evidence)
        return Solved(mean, covariance, share.reshape(-1, m).sum(1), found.u[0], bool(found.converged.all()))

    @torch.no_grad()
    def _nothing(self, user_id: str) -> Solved:
        """As `adapt` has it for a user without choices."""
        blank = no_pairs(self.model, (user_id,))
        spread = None if blank.covariance is None else blank.covariance[0].cpu().double().numpy()
        modes = np.zeros((0, self.n_weights))
        return Solved(blank.mean[0].cpu().double().numpy().copy(), spread, np.asarray(self.flips.shares), modes, True)

    @torch.no_grad()
    def _by_the_method(self, rows: Rows, user_id: str) -> Solved:
        """The method's own solve of one user."""
        if len(rows.level):
            raise DataError(f"{type(self.model).__name__} has no prior, so that nothing can be weighed against a constraint")
        offset, slopes, weight = (torch.from_numpy(column)[None] for column in rows.broken())
        batch = Batch(slopes, offset, weight, None)
        found = self.model.inference.solve(batch, self.model.prior, (user_id,))
        spread = None if found.covariance is None else found.covariance[0].cpu().double().numpy()
        mean = found.mean[0].cpu().double().numpy()
        return Solved(mean, spread, np.zeros(0), np.zeros((0, self.n_weights)), bool(found.converged[0]))
