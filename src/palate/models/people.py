"""The seen users one by one: what the baselines group or look up, and nothing that a model keeps by name.

The personal fit is a cheap one and has nothing to choose: around the crowd's reward, in the directions in which users' choices
pull away from it, N(m, S) by EM (`population`), and every user's weights at their posterior mode.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from palate.data.embeddings import Embeddings
from palate.data.pairs import EmbeddedPairs
from palate.models import crowd, population
from palate.models.selection import WIDE, Crowds, Selection, View
from palate.priors import Prior
from palate.solvers import batches, posterior

ROUNDS = 20  # of EM
PRIOR_VARIANCE = 4.0  # of the margins, in squared log-odds, where EM starts


class People(NamedTuple):
    """Users with a personal fit, in coordinates in which departures from the crowd are uncorrelated, the widest first."""

    view: View  # bases (D, K) on the scaled features; slopes (P, K) and the crowd's margins (P,) of all pairs
    prior: Prior
    users: Tensor  # (U',) who they are
    modes: Tensor  # (U', K)

    def white(self) -> Tensor:
        """(U', K) the modes in standard deviations of the prior."""
        away = (self.modes - self.prior.means[0]).T
        white: Tensor = torch.linalg.solve_triangular(self.prior.factors[0], away, upper=False).T
        return white


class WholeRewards:
    """Part of a model whose K base functions are whole rewards, the columns of `rewards` (D, K): of groups, or of people.

    A single column is everybody's reward, which no weight changes.
    """

    rewards: Tensor

    @property
    def n_features(self) -> int:
        return len(self.rewards)

    def features(self, embeddings: Embeddings) -> Tensor:
        """(N, K): what every column says."""
        return embeddings.project(self.rewards)

    def design(self, features: Tensor) -> tuple[Tensor, Tensor]:
        if features.shape[1] == 1:
            return features[:, 0], features[:, 1:]
        return torch.zeros_like(features[:, 0]), features


class Meeting:
    """Fits the crowd once, and people around it as each fold sees them."""

    def __init__(self, data: EmbeddedPairs, seed: int):
        _, self.scale = crowd.standard_scale(data)
        design = crowd.Rescaled(data.differences(), self.scale)
        self.fold = crowd.user_folds(len(data.user_ids), seed)
        found = crowd.fit_crowd(data, design, self.fold)
        self.record = {"ridge": found.ridge, "ridges": list(crowd.RIDGES), "log_loss": found.curve}
        self.direction = found.direction
        crowds = Crowds(design.project(found.directions), found.directions, found.stronger - found.directions)
        self.offsets = crowds.offsets
        self._selection = Selection(data, design, self.fold, crowds, n_bases=WIDE, prior_variance=PRIOR_VARIANCE, seed=seed)
        self.counts = data.grouped().counts
        self._device = data.user_index.device
        self.folds = self._selection.folds

    def turns(self, say: Callable[[float], None]) -> Iterator[tuple[Tensor, People]]:
        """For each fold the users (n,) who are held out, and the others as people; `say` hears the share done."""
        for fold in range(self.folds):
            say(fold / self.folds)
            yield torch.nonzero(self.fold == fold)[:, 0].to(self._device), self.people(fold)

    def people(self, fold: int) -> People:
        """Everybody but the users of a fold; everybody for fold -1."""
        learn = self.fold != fold if fold >= 0 else torch.ones_like(self.fold, dtype=torch.bool)
        view = self._selection.view(learn, fold)
        prior = population.after(view.learn, self._selection.start(view, fold), ROUNDS)
        users = torch.nonzero(learn)[:, 0].to(view.slopes.device)
        order = torch.cat(list(batches(self.counts[users], view.slopes.shape[1])))  # as `view.learn` has them
        view, prior = self._selection.narrowed(view, prior, None)
        modes = torch.cat([posterior(batch, prior, tolerance=1e-3, covariance=False).mean for batch in view.learn])
        back = torch.argsort(order)
        return People(view, prior, users, modes[back])
