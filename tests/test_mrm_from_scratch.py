"""The flat script is the oracle of the library's MRM as published, and it does what it says."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import palate
from palate.data.pairs import EmbeddedPairs
from palate.models.meta import GradientSteps, keyed_order, published_split

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "mrm_from_scratch.py"


@pytest.fixture(scope="module")
def scratch(script: Callable[[Path], ModuleType]) -> ModuleType:
    return script(SCRIPT)


def uneven(seed: int = 0, dim: int = 6, n_users: int = 7) -> EmbeddedPairs:
    """Users with 3 to 9 choices in conversations of two, in double precision; the last user has one conversation only."""
    rng = np.random.default_rng(seed)
    counts = 3 + np.arange(n_users) % 7
    user = np.repeat(np.arange(n_users), counts)
    place = np.concatenate([np.arange(n) for n in counts])
    unit = np.where(user == n_users - 1, 0, place // 2)
    table = torch.from_numpy(rng.standard_normal((2 * len(user), dim)))
    rows = rng.permutation(2 * len(user))
    names = [f"u{u}" for u in user]
    labels = [f"{u}-{c}" for u, c in zip(user, unit, strict=True)]
    return EmbeddedPairs(30 * table, rows[: len(user)], rows[len(user) :], names, unit=labels)


@pytest.mark.parametrize(("k", "seed", "rate"), [(2, 3, 1e-3), (3, 0, 5e-3)])
def test_the_published_training(k: int, seed: int, rate: float, scratch: ModuleType) -> None:
    """Same start, same draws, a last step with one user alone: the same bases and start after 4 epochs."""
    data, epochs = uneven(seed), 4
    z = data.embeddings.rows(data.chosen) - data.embeddings.rows(data.rejected)
    of = [torch.nonzero(data.user_index == i)[:, 0] for i in range(len(data.user_ids))]
    drawn = published_split(data, seed)

    def split(person: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        support, query = drawn(epoch)
        return torch.nonzero(support[of[person]])[:, 0], torch.nonzero(query[of[person]])[:, 0]

    def order(epoch: int) -> list[int]:
        return [int(i) for i in keyed_order(len(of), seed, epoch)]

    method = palate.MRM.faithful(k, inner_rate=rate, outer_rate=rate, epochs=epochs)
    trail = list(method.epochs(data, seed=seed))
    begin = trail[0].state.numbers
    seen: list[torch.Tensor] = []
    settings = scratch.PUBLISHED._replace(inner_rate=rate, outer_rate=rate, epochs=epochs)
    V, w0 = scratch.train(
        [z[rows] for rows in of],
        begin["bases"],
        begin["start"],
        settings,
        order,
        split,
        watch=lambda epoch, V, w0: seen.append(V.clone()),
    )
    assert float((V - begin["bases"]).abs().max()) > 2 * rate  # it went somewhere
    for mine, theirs in zip(trail[1:], seen, strict=True):
        torch.testing.assert_close(mine.state.numbers["bases"], theirs, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(trail[-1].state.numbers["start"], w0, atol=1e-8, rtol=1e-6)
    model = palate.fit(data, method, seed=seed)
    torch.testing.assert_close(model.state_dict()["bases"], scratch.SCALE * V, atol=1e-10, rtol=1e-6)

    support = uneven(seed + 10)
    profiles = palate.adapt(model, support)
    margins = palate.margins(model, support, profiles)
    z = support.embeddings.rows(support.chosen) - support.embeddings.rows(support.rejected)
    for i in range(len(support.user_ids)):
        rows = torch.nonzero(support.user_index == i)[:, 0]
        w = scratch.inner_loop(scratch.SCALE * z[rows] @ V, w0.clone().requires_grad_(), rate, 1).detach().softmax(0)
        torch.testing.assert_close(profiles.mean[i], w, atol=1e-9, rtol=0)
        torch.testing.assert_close(margins[rows], scratch.SCALE * z[rows] @ V @ w, atol=1e-8, rtol=1e-6)


def test_many_steps_of_the_inner_loop(scratch: ModuleType) -> None:
    from palate.solvers import Batch

    generator = torch.Generator().manual_seed(1)
    slopes, start = torch.randn(3, 5, 4, generator=generator).double(), torch.randn(4, generator=generator).double()
    batch = Batch(slopes, torch.zeros(3, 5).double(), torch.ones(3, 5).double(), None)
    found = GradientSteps(0.3, 6).moved(batch, start, start[:0], simplex=True)
    for i in range(3):
        expected = scratch.inner_loop(slopes[i], start.clone().requires_grad_(), 0.3, 6)
        torch.testing.assert_close(found[i], expected.detach(), atol=1e-10, rtol=0)


def test_accuracy_of_the_script_gives_half_for_nothing(scratch: ModuleType) -> None:
    people = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    assert scratch.accuracy(people, people, torch.zeros(3, 2), torch.zeros(2), scratch.PUBLISHED) == 0.5


@pytest.mark.slow
def test_the_script_runs_without_the_library_and_proves_its_claim(alone: Callable[[Path], str]) -> None:
    assert "palate" not in SCRIPT.read_text()
    assert "an inner loop that can move" in alone(SCRIPT)
