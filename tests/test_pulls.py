"""Costs that must not grow with the square of the users, nor with one user who chose far more than the others."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

import palate
from palate.data.pairs import EmbeddedPairs
from palate.data.planted import two_groups
from palate.models import crowd, factored, pal_fixed, population, pulls, vpl, ways
from palate.models.meta import Outer
from palate.priors import Prior
from palate.solvers import batches, chunks


def test_evenly_spaced_numbers_are_below_n() -> None:
    assert pulls.evenly(5, 7).tolist() == [0, 1, 2, 3, 4]
    assert pulls.evenly(9, 3).tolist() == [0, 4, 8]
    n = 2**24 + 4  # where single precision has no odd numbers any more
    assert pulls.evenly(n, 3).tolist() == [0, n // 2, n - 1]
    assert len(set(pulls.evenly(10_000, 2048).tolist())) == 2048


def test_leading_directions_are_singular_vectors() -> None:
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((20, 3)) * [5, 2, 1] @ np.eye(3, 6))
    rows = rows - rows.mean(0)
    found = pulls.leading(rows, 2)
    expected = torch.linalg.svd(rows, full_matrices=False).Vh[:2].T
    torch.testing.assert_close((found.T @ expected).abs(), torch.eye(2, dtype=torch.float64), atol=1e-9, rtol=0)
    assert pulls.leading(rows, 9).shape == (6, 3)  # the others would be rounding
    assert pulls.leading(rows.new_zeros(4, 6), 9).shape == (6, 0)


def test_few_users_stand_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    data = two_groups(0, n_users=40, n_train=10, dim=6).train
    everybody = pulls.of_few(data)
    assert everybody[0].tolist() == list(range(len(data)))
    assert everybody[1].tolist() == data.user_index.tolist()
    monkeypatch.setattr(pulls, "MOST", 10)
    rows, owner = pulls.of_few(data)
    assert set(owner[rows].tolist()) == set(range(10))
    assert len(torch.unique(data.user_index[rows])) == 10
    assert (owner >= 0).sum() == len(rows)
    for model in (
        palate.MRM(2, outer=Outer(epochs=4)),
        palate.VPL(4, hidden=0, ridge=3e-4, epochs=4),
    ):  # which look at no more users than that
        assert palate.fit(data, model, seed=0).is_fitted


def test_chunks_are_everybody_in_order_or_bounded() -> None:
    counts = torch.tensor([3, 0, 9, 1])
    assert [chunk.tolist() for chunk in chunks(counts, 4)] == [[0, 1, 2, 3]]
    heavy = torch.full((400,), 10)
    heavy[7] = 3010
    found = list(chunks(heavy, 32))
    assert sorted(torch.cat(found).tolist()) == list(range(400))
    padded = [len(chunk) * int(heavy[chunk].max()) for chunk in found]
    assert sum(padded) <= 2 * int(heavy.sum())  # where one padded batch would be 1,204,000 places
    assert next(iter(chunks(counts[:0], 4))).tolist() == []


def skewed() -> EmbeddedPairs:
    """Two groups, of whom one user has all their choices ten times."""
    data = two_groups(0, n_users=30, n_train=10, dim=6).train
    rows = torch.arange(len(data))
    return data[torch.cat([rows, *[rows[data.user_index == 3]] * 9])]


@pytest.mark.parametrize(
    ("module", "make"),
    [
        (factored, lambda: palate.LoRe((2, 3), steps=100)),
        (pal_fixed, lambda: palate.PAL(2, width=4)),
        (vpl, lambda: palate.VPL((2, 4), hidden=0, ridge=3e-4, epochs=4)),
        (ways, lambda: palate.MRM(2, outer=Outer(epochs=2))),
    ],
    ids=["LoRe", "PAL", "VPL", "MRM"],
)
def test_users_in_chunks_are_users_at_once(
    module: ModuleType, make: Callable[[], palate.RewardModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit does not hang on how its users are padded."""
    data, seen = skewed(), []

    def few(counts: Tensor, width: int) -> list[Tensor]:
        seen.append(len(found := list(batches(counts, width, numbers=100))))
        return found

    at_once = palate.fit(data, make(), seed=0)
    monkeypatch.setattr(module, "chunks", few)
    in_chunks = palate.fit(data, make(), seed=0)
    assert max(seen) > 1
    features = [model.features(data.embeddings) for model in (at_once, in_chunks)]
    profiles = [palate.adapt(model, data).mean for model in (at_once, in_chunks)]
    rewards = [model.score(told, own[0]) for model, told, own in zip((at_once, in_chunks), features, profiles, strict=True)]
    torch.testing.assert_close(rewards[1], rewards[0], atol=2e-3, rtol=2e-3)


def test_bases_are_refined_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = skewed()
    design = crowd.Rescaled(data.differences(), crowd.standard_scale(data)[1])
    bases = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))[0]
    offset, learn, prior = (
        torch.zeros(len(data)),
        torch.ones(len(data.user_ids), dtype=torch.bool),
        Prior.gaussian(4 * torch.eye(2)),
    )

    def refined() -> Tensor:
        return population.refine(data, design, offset, learn, bases, prior, torch.zeros(6), ridge=1e-3, max_iter=5).bases

    at_once = refined()
    monkeypatch.setattr(population, "chunks", lambda counts, width: batches(counts, width, numbers=100))
    torch.testing.assert_close(refined(), at_once, atol=1e-3, rtol=1e-3)
    assert float((at_once[:, 1:] - 2 * bases).abs().max()) > 0.01  # it moved
