"""The 84 attribute users: who they are, what they want, and whether their answers follow the planted rewards."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from palate.data.attributes import TRAITS, attributes, judged, wishes
from palate.errors import DataError


def test_there_are_84_different_users_of_two_traits() -> None:
    everybody = wishes()
    assert len(everybody) == 84 == len({wish.name for wish in everybody})
    assert all(first[0] < second[0] for first, second in everybody)
    poles = [name for pair in TRAITS for name in pair]
    assert len(poles) == 14 == len(set(poles))
    for pole in poles:  # each pole goes with the 12 poles of the six other traits
        assert sum(pole in wish.name.split(" and ") for wish in everybody) == 12
    assert everybody[0].name == "concise and informal"


def test_the_world_is_as_asked_for() -> None:
    world = attributes(3, n_unseen=30, n_pairs=50, n_answers=7, n_pool=40, n_test=20, prompts=(6, 5), dim=9, scale=2.0)
    assert len(world.seen) + len(world.unseen) == 84 == len(set(world.seen) | set(world.unseen))
    assert len(world.unseen) == 30
    assert len(world.train) == 350
    assert set(world.train.user_ids) <= {wish.name for wish in world.seen}
    assert (world.pool.shape, world.test.shape, world.candidates.shape) == ((40, 2), (20, 2), (6, 5))
    used = torch.cat([world.train.chosen, world.train.rejected, world.pool.flatten(), world.test.flatten()])
    assert len(torch.unique(used)) == 2 * (50 + 40 + 20)  # no text has two uses
    assert not set(world.candidates.flatten().tolist()) & set(used.tolist())
    judged_pairs = torch.stack([torch.minimum(world.train.chosen, world.train.rejected), world.train.user_index], dim=1)
    assert len(torch.unique(judged_pairs, dim=0)) == 350  # nobody answers a pair twice
    torch.testing.assert_close(world.directions.T @ world.directions, torch.eye(7), atol=1e-5, rtol=0)


def test_users_want_their_two_poles() -> None:
    world = attributes(1, scale=2.5)
    for users, weights in ((world.seen, world.weights_seen), (world.unseen, world.weights_unseen)):
        for wish, row in zip(users, weights, strict=True):
            expected = np.zeros(7)
            for name in wish.name.split(" and "):
                trait = next(i for i, poles in enumerate(TRAITS) if name in poles)
                expected[trait] = -2.5 if name == TRAITS[trait][0] else 2.5
            np.testing.assert_array_equal(row, expected)
    traits = world.embeddings.rows(world.pool.flatten()) @ world.directions
    reward = traits @ world.weights_unseen[4]
    torch.testing.assert_close(world.margins(world.pool)[4], reward[0::2] - reward[1::2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(world.rewards(world.candidates[:2], world.weights_seen[:3]).shape, torch.Size([3, 2, 10]))


def test_the_judge_answers_in_both_orders() -> None:
    """P(1) = p^2, P(1/2) = 2 p (1 - p), P(0) = (1 - p)^2, for 200,000 draws each: standard errors of about .001."""
    for margin in (-1.0, 0.0, 2.0):
        p = 1 / (1 + np.exp(-margin))
        found = judged(np.full(200_000, margin), np.random.default_rng(0))
        for value, share in ((1.0, p**2), (0.5, 2 * p * (1 - p)), (0.0, (1 - p) ** 2)):
            assert (found == value).mean() == pytest.approx(share, abs=0.005)


def test_answers_and_ties_follow_the_planted_rewards() -> None:
    world = attributes(0)
    order = [world.seen.index(next(w for w in world.seen if w.name == user)) for user in world.train.user_ids]
    weights = world.weights_seen[order]
    pairs = torch.stack([world.train.chosen, world.train.rejected], dim=1)
    margin = world.margins(pairs, weights)[world.train.user_index, torch.arange(len(pairs))]
    p = torch.sigmoid(margin)
    assert float(world.train.tie.float().mean()) == pytest.approx(float((2 * p * (1 - p)).mean()), abs=0.02)
    strict = ~world.train.tie
    agreed = (p**2 / (p**2 + (1 - p) ** 2))[strict]  # of a chosen side; symmetric in the sign of the margin
    assert float((margin[strict] > 0).float().mean()) == pytest.approx(float(torch.maximum(agreed, 1 - agreed).mean()), abs=0.02)


def test_the_same_seed_gives_the_same_bits() -> None:
    first, again, other = attributes(5), attributes(5), attributes(6)
    assert first.train.fingerprint() == again.train.fingerprint() != other.train.fingerprint()
    assert first.unseen == again.unseen != other.unseen


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attributes(n_unseen=84), "n_unseen is 84; expected 1 to 83"),
        (lambda: attributes(n_answers=61), "n_answers is 61; expected 1 to 60"),
        (lambda: attributes(n_pool=0), "n_pool is 0; expected at least 1"),
        (lambda: attributes(prompts=(3, 0)), r"prompts\[1\] is 0"),
        (lambda: attributes(dim=6), "dim is 6; expected at least 7"),
        (lambda: attributes(scale=0.0), r"scale is 0\.0; expected a finite number above 0"),
    ],
)
def test_worlds_that_cannot_be(make: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()
