"""The crowd's ridge: a path that is cut short chooses what the whole path would."""

import math

import pytest
import torch

from palate import likelihood
from palate.data.embeddings import Dense
from palate.data.pairs import EmbeddedPairs
from palate.models import crowd
from palate.models.subspace import Subspace

N_USERS, N_PAIRS, WIDTH = 60, 12, 80


def world(seed: int, *, apart: float) -> EmbeddedPairs:
    """Choices by a common direction; a fifth of the users, the first ones, follow another by the share `apart`."""
    generator = torch.Generator().manual_seed(seed)
    n = N_USERS * N_PAIRS
    table = torch.randn(2 * n, WIDTH, generator=generator) / WIDTH**0.5
    axes = torch.randn(2, WIDTH, generator=generator)
    user = torch.arange(N_USERS).repeat_interleave(N_PAIRS)
    own = torch.where((user < N_USERS // 5)[:, None], (1 - apart) * axes[0] + apart * axes[1], axes[0])
    left = torch.arange(0, 2 * n, 2)
    margin = 3 * ((table[left] - table[left + 1]) * own).sum(1)
    wins = torch.rand(n, generator=generator) < torch.sigmoid(margin)
    chosen, rejected = torch.where(wins, left, left + 1), torch.where(wins, left + 1, left)
    return EmbeddedPairs(Dense(table), chosen, rejected, [f"u{u:02d}" for u in user.tolist()])


def whole_path(data: EmbeddedPairs, design: crowd.Rescaled, fold: torch.Tensor) -> torch.Tensor:
    """(R, U) losses at every ridge, one independent solve for each."""
    losses = torch.full((len(crowd.RIDGES), N_USERS), torch.nan)
    for f in range(int(fold.max()) + 1):
        kept = (fold != f)[data.user_index]
        for r, ridge in enumerate(crowd.RIDGES):
            space = Subspace(design, data.tie, data.weight * kept)
            space.solve(ridge, tolerance=1e-6)
            loss = likelihood.nll(space.margins).reshape(N_USERS, N_PAIRS).mean(1)
            losses[r, fold == f] = loss[fold == f]
    return losses


@pytest.mark.parametrize("apart", [0.0, 1.0])
def test_a_path_cut_short_chooses_the_ridge_of_the_whole_path(apart: float) -> None:
    cut = 0
    for seed in range(6):
        data = world(seed, apart=apart)
        design = crowd.Rescaled(data.differences(), crowd.standard_scale(data)[1])
        fold = crowd.user_folds(N_USERS, seed)
        assert int(fold.max()) > 1  # several folds, which disagree where `apart` is 1
        found = crowd.fit_crowd(data, design, fold)
        best = whole_path(data, design, fold).mean(1)
        assert best[crowd.RIDGES.index(found.ridge)] <= best.min() + 1e-3  # nats: rough solves may take the neighbour
        cut += int(torch.isnan(found.losses).all(1).any())
    assert cut  # and some paths were cut, or nothing is shown


def test_what_a_crowd_is_worth_is_its_held_out_users_gain_over_a_coin() -> None:
    for apart, seed in ((0.0, 0), (1.0, 1)):
        data = world(seed, apart=apart)
        design = crowd.Rescaled(data.differences(), crowd.standard_scale(data)[1])
        fold = crowd.user_folds(N_USERS, seed)
        found = crowd.fit_crowd(data, design, fold)
        gains = math.log(2) - whole_path(data, design, fold)[crowd.RIDGES.index(found.ridge)]
        assert not torch.isnan(gains).any()  # five folds: everybody is held out of one
        mean, error = found.gain
        assert mean == pytest.approx(float(gains.mean()), abs=2e-3)  # nats: the solves of the path are rough
        assert error == pytest.approx(float(gains.std()) / N_USERS**0.5, rel=0.05)
        assert mean > error
    nobody = crowd.fit_crowd(data, design, torch.full((N_USERS,), -1))
    assert all(math.isnan(number) for number in nobody.gain)
    none = found.nothing()
    assert not none.directions.any()
    assert not none.stronger.any()
    assert none.ridge == found.ridge
