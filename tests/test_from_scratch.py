"""The flat script is the oracle of the library's LoRe, and it does what it says."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import palate
from palate.data.pairs import EmbeddedPairs
from palate.data.planted import two_groups
from palate.models.base import normal_for
from palate.models.factored import _Table
from palate.solvers import Batch, adam_on_logits
from palate.training import fit_with_profiles

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "from_scratch.py"


@pytest.fixture(scope="module")
def scratch(script: Callable[[Path], ModuleType]) -> ModuleType:
    return script(SCRIPT)


def wide(data: EmbeddedPairs) -> tuple[EmbeddedPairs, torch.Tensor]:
    """The same choices in double precision, and their differences z (P, D).

    The published settings are chaotic: after 1,000 steps at .5 the last bit of single precision has become the first digit of a
    weight. In double precision two correct programs still agree.
    """
    rows = torch.arange(len(data.embeddings))
    data = EmbeddedPairs(data.embeddings.rows(rows).double(), data.chosen, data.rejected, data.users)
    return data, data.embeddings.rows(data.chosen) - data.embeddings.rows(data.rejected)


def starts(data: EmbeddedPairs, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    table = _Table(data, torch.ones(data.embeddings.shape[1], dtype=torch.float64), k, 0.0, seed)
    return table.bases.clone(), table.logits.clone()


@pytest.mark.parametrize(("k", "seed"), [(3, 0), (1, 2)])
def test_the_published_joint_training(k: int, seed: int, scratch: ModuleType) -> None:
    data, z = wide(two_groups(seed, n_users=12, n_train=40, n_test=1, dim=8).train)
    model, profiles = fit_with_profiles(data, palate.LoRe.faithful(k), seed=seed)
    bases, mixture = scratch.train(z, data.user_index, *starts(data, k, seed))
    assert profiles is not None
    torch.testing.assert_close(profiles.mean, mixture, atol=1e-4, rtol=0)
    found = model.state_dict()["bases"]
    torch.testing.assert_close(found * scratch.SCALE, bases, atol=1e-3, rtol=1e-4)
    expected = (z @ bases * mixture[data.user_index]).sum(1) / 100
    torch.testing.assert_close(palate.margins(model, data, profiles), expected, atol=1e-3, rtol=0)


def test_penalised_training_is_adam_on_the_penalised_loss(scratch: ModuleType) -> None:
    data, z = wide(two_groups(1, n_users=12, n_train=40, n_test=1, dim=8).train)
    ridge, n_users = 0.02, 12
    table = _Table(data, torch.ones(8, dtype=torch.float64), 3, ridge, 0)
    bases, logits = (start.requires_grad_() for start in starts(data, 3, 0))
    adam = torch.optim.Adam([bases, logits], lr=0.1)
    for _ in range(50):
        margin = ((z @ bases) * logits.softmax(1)[data.user_index]).sum(1)
        loss = torch.nn.functional.softplus(-margin).sum() / 40 + n_users * ridge / 2 * bases.square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    table.run(50, 0.1)
    torch.testing.assert_close(table.bases, bases.detach(), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(table.logits, logits.detach(), atol=1e-8, rtol=1e-8)


def test_the_published_few_shot_routine(scratch: ModuleType) -> None:
    planted = two_groups(1, n_users=9, n_train=7, n_test=1, dim=6)
    model = palate.fit(wide(planted.train)[0], palate.LoRe.faithful(4, seed=5))
    support, z = wide(planted.support)
    found = palate.adapt(model, support)
    start = torch.stack([normal_for(user, 5, 4) for user in support.user_ids]).double()
    bases = model.state_dict()["bases"] * scratch.SCALE
    expected = scratch.few_shot(z, support.user_index, bases, start)
    torch.testing.assert_close(found.mean, expected, atol=1e-5, rtol=0)


def test_adam_on_logits_is_the_loop_over_users(scratch: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([1, 9, 4, 2])
    person = torch.repeat_interleave(torch.arange(4), counts)
    z, bases = torch.randn(len(person), 5, generator=generator), 30 * torch.randn(5, 3, generator=generator)
    start = torch.randn(4, 3, generator=generator)
    slopes, weight = torch.full((4, 9, 3), 7.0), torch.zeros(4, 9)
    for user, count in enumerate(counts.tolist()):
        slopes[user, :count], weight[user, :count] = z[person == user] @ bases / scratch.SCALE, 1
    found = adam_on_logits(Batch(slopes, torch.zeros(4, 9), weight, None), start, steps=500, rate=0.1)
    torch.testing.assert_close(found.mean, scratch.few_shot(z, person, bases, start), atol=1e-5, rtol=0)


def test_accuracy_of_the_script_gives_half_for_nothing(scratch: ModuleType) -> None:
    z, person = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0, 1, 1, 1])
    assert scratch.accuracy(z, person, torch.zeros(2, 3), torch.full((2, 3), 1 / 3)) == 0.5


def test_the_script_runs_without_the_library_and_proves_its_claim(alone: Callable[[Path], str]) -> None:
    assert "palate" not in SCRIPT.read_text()
    assert "LoRe with 3 base rewards" in alone(SCRIPT)
