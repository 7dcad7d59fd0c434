"""Users as blends of types: what is found of planted types, and what the model then is."""

from pathlib import Path

import numpy as np
import pytest
import torch

import palate
from palate.adaptation import no_pairs
from palate.data.planted import Planted, simplex_types, two_groups
from palate.errors import DataError
from palate.models import population
from palate.models.base import Newton
from palate.models.hierarchical import Hierarchical
from palate.priors import Prior
from palate.solvers import Batch

TYPES, EACH, PAIRS, K = 3, 8, 60, 4


def of_three_types(seed: int = 0) -> tuple[Batch, torch.Tensor]:
    """Users of three types who never err, and the types' rewards as (gain of the offset, weights), unit length."""
    generator = torch.Generator().manual_seed(seed)
    types = torch.nn.functional.normalize(torch.randn(TYPES, 1 + K, generator=generator), dim=1)
    types[:, 0].abs_()  # users follow the crowd, more or less
    z = torch.randn(TYPES * EACH, PAIRS, 1 + K, generator=generator)
    own = types.repeat_interleave(EACH, 0)
    z = z * torch.sign((z * own[:, None]).sum(2, keepdim=True))  # the chosen side first
    return Batch(z[..., 1:], z[..., 0], torch.ones(z.shape[:2]), None), types


def test_types_are_found_with_margins_of_one_size() -> None:
    batch, types = of_three_types()
    # Garbage of weight 0 beside the choices says nothing.
    padded = Batch(
        torch.cat([batch.slopes, torch.full((len(batch.offset), 5, K), 9.0)], 1),
        torch.cat([batch.offset, torch.zeros(len(batch.offset), 5)], 1),
        torch.cat([batch.weight, torch.zeros(len(batch.offset), 5)], 1),
        None,
    )
    found = population.blend([padded], Prior.gaussian(100 * torch.eye(K)), TYPES, size=2.0)
    rewards = torch.cat([found.gains[:, None], found.means], dim=1)
    margins = torch.cat([batch.offset[..., None], batch.slopes], dim=2).flatten(0, 1) @ rewards.T
    np.testing.assert_allclose(margins.square().mean(0).sqrt(), 2.0, rtol=1e-4)
    alike = torch.nn.functional.normalize(rewards, dim=1) @ types.T
    assert sorted(alike.argmax(1).tolist()) == [0, 1, 2]
    assert float(alike.max(1).values.min()) > 0.9
    assert found.share.tolist() == pytest.approx([1 / 3] * 3)


def test_there_are_no_more_types_than_users() -> None:
    batch, _ = of_three_types()
    assert len(population.blend([batch.at(torch.arange(2))], Prior.gaussian(torch.eye(K)), 12).share) == 2


@pytest.fixture(scope="module")
def ten_types() -> Planted:
    return simplex_types(0.001, 8, n_users=200, n_prompts=300, n_test_prompts=40, dim=16)


@pytest.fixture(scope="module")
def blended(ten_types: Planted) -> Hierarchical:
    return palate.fit(ten_types.train, palate.Hierarchical(bend=0, types=()))


def test_where_people_are_types_they_are_found_to_be_blends(blended: Hierarchical, ten_types: Planted) -> None:
    chosen = blended.record["selection"]["population"]["chosen"]
    assert chosen["blended"] == blended.n_weights == 12
    assert blended.options()["blend"] is True
    assert blended.prior is not None
    assert blended.prior.walls is not None
    found = palate.adapt(blended, ten_types.support)
    assert bool(found.converged.all())
    assert float(found.mean.min()) > 0
    assert float((found.mean.sum(1) - 1).abs().max()) < 0.1
    assert float(found.mean.max(1).values.mean()) > 0.7  # a user of one type is nearly all of it
    rows = palate.evaluate(blended, ten_types.support, ten_types.test_unseen).rows()
    plain = palate.fit(ten_types.train, palate.Hierarchical(bend=0, types=(), blend=False))
    before = palate.evaluate(plain, ten_types.support, ten_types.test_unseen).rows()
    assert plain.prior is not None
    assert plain.prior.walls is None
    assert np.mean([row["accuracy"] for row in rows]) > np.mean([row["accuracy"] for row in before]) + 0.001


def test_a_blend_says_how_sure_it_is(blended: Hierarchical, ten_types: Planted) -> None:
    assert blended.sharpness > 1  # people never err
    loss = {}
    for shots in (1, 5, None):
        rows = palate.evaluate(blended, ten_types.support, ten_types.test_unseen, shots=shots).rows()
        loss[shots] = float(np.mean([row["log_loss"] for row in rows]))
    assert (
        loss[1] < 0.1
    )  # .35 where a wall that is not touched is no bound, .20 with margins as wide as those that are solved with
    assert loss[5] < 0.03
    assert loss[None] < 0.01


def test_a_choice_leaves_less_unknown(blended: Hierarchical, ten_types: Planted) -> None:
    grouped = ten_types.support.grouped()
    first = ten_types.support[grouped.order[grouped.offsets[: len(ten_types.support.user_ids)]]]
    known = palate.adapt(blended, first)
    nothing = no_pairs(blended, ["nobody"])
    assert known.covariance is not None
    assert nothing.covariance is not None
    spread = known.covariance.diagonal(dim1=1, dim2=2).sum(1)
    assert float(spread.mean()) < float(nothing.covariance.diagonal(dim1=1, dim2=2).sum())
    assert float(known.covariance.diagonal(dim1=1, dim2=2).max()) < 0.25  # the variance of a number in [0, 1] is at most that


def test_sharpness_changes_what_is_stated_and_not_whom_a_user_is_like(blended: Hierarchical, ten_types: Planted) -> None:
    numbers = dict(blended.state_dict())
    more = (blended.sharpness - 1) * numbers["direction"][:, None]
    soft = blended.like(numbers | {"bases": (numbers["bases"] - more) / blended.sharpness}, sharpness=1.0)
    assert type(soft.inference) is Newton
    ours, theirs = (palate.adapt(model, ten_types.support) for model in (blended, soft))
    torch.testing.assert_close(ours.mean, theirs.mean, atol=1e-4, rtol=1e-3)
    wide, narrow = (
        palate.margins(model, ten_types.test_unseen, profiles) for model, profiles in ((blended, ours), (soft, theirs))
    )
    assert float(((wide > 0) == (narrow > 0)).float().mean()) > 0.999
    assert float((wide / narrow).median()) == pytest.approx(blended.sharpness, rel=0.05)
    # Somebody who said nothing gets the crowd's reward, which knows how sure it is.
    crowd = [palate.margins(model, ten_types.test_unseen) for model in (blended, soft)]
    torch.testing.assert_close(*crowd)


def test_a_blend_cannot_grow(blended: Hierarchical, ten_types: Planted) -> None:
    with pytest.raises(DataError, match="blends of types, whose weights sum to one"):
        palate.grow(blended, ten_types.support)


def test_a_sharpness_below_one_is_refused() -> None:
    for wrong in (0.5, float("nan"), float("inf")):
        with pytest.raises(DataError, match=f"sharpness is {wrong}; expected a finite number of at least 1"):
            palate.Hierarchical(sharpness=wrong)


def test_a_blend_of_nothing_known_is_the_crowd(blended: Hierarchical, ten_types: Planted) -> None:
    straight = palate.fit(ten_types.train, palate.BradleyTerry())
    correlation = np.corrcoef(palate.margins(blended, ten_types.test_unseen), palate.margins(straight, ten_types.test_unseen))
    assert correlation[0, 1] == pytest.approx(1, abs=1e-3)
    # Where shares sum to one the crowd's own reward cancels: what is left are the types'.
    features = blended.features(ten_types.train.embeddings)
    offset, slopes = blended.design(features)
    share = torch.full((blended.n_weights,), 1 / blended.n_weights)
    types = offset[:, None] + slopes
    torch.testing.assert_close(blended.score(features, share), types.mean(1), atol=1e-3, rtol=1e-3)


def test_a_blend_comes_back_from_its_folder(blended: Hierarchical, ten_types: Planted, tmp_path: Path) -> None:
    blended.save_pretrained(tmp_path / "model")
    again = palate.load_model(tmp_path / "model")
    assert isinstance(again, Hierarchical)
    assert again.fingerprint() == blended.fingerprint()
    assert again.sharpness == blended.sharpness
    assert torch.equal(palate.adapt(again, ten_types.support).mean, palate.adapt(blended, ten_types.support).mean)


def test_options_are_as_before_unless_a_blend_was_asked_for_or_found() -> None:
    assert "blend" not in palate.Hierarchical().options()
    assert palate.Hierarchical(blend=False).options()["blend"] is False
    planted = two_groups(1, n_users=30, n_train=10, n_test=2, dim=6)
    for asked, left in ((None, None), (True, None), (False, False)):  # two groups who err are no blend
        assert palate.fit(planted.train, palate.Hierarchical(bend=0, types=(), blend=asked)).blend is left
