"""How sure a model says it is: the factor of its stated log-odds, chosen on held-out users."""

from pathlib import Path

import numpy as np
import pytest
import torch

import palate
from palate.bench.protocols import attribute_choices
from palate.data.planted import Planted, simplex_types, two_groups
from palate.errors import DataError
from palate.models.hierarchical import Hierarchical


def log_loss(model: palate.RewardModel, world: Planted, shots: int | None = None) -> tuple[float, float]:
    rows = list(palate.evaluate(model, world.support, world.test_unseen, shots=shots).rows())
    return tuple(float(np.mean([row[name] for row in rows])) for name in ("log_loss", "accuracy"))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def sure() -> Planted:
    """Blends of ten types who never err."""
    return simplex_types(0.1, 8, n_users=150, n_prompts=200, n_test_prompts=40, dim=16)


@pytest.fixture(scope="module")
def of_the_sure(sure: Planted) -> Hierarchical:
    model = palate.fit(sure.train, palate.Hierarchical(bend=0, types=(), blend=False))
    assert isinstance(model, Hierarchical)
    return model


def test_of_people_who_never_err_it_is_sure(of_the_sure: Hierarchical, sure: Planted) -> None:
    assert of_the_sure.record["selection"]["population"]["chosen"]["kappa"] > 1
    assert of_the_sure.calibration > 4
    timid = of_the_sure.like(dict(of_the_sure.state_dict()), calibration=1.0)
    for shots in (1, 5, None):
        (loss, right), (before, same) = (log_loss(model, sure, shots) for model in (of_the_sure, timid))
        assert right == same
        assert loss < before / 3
    scores = [log_loss(of_the_sure.like(dict(of_the_sure.state_dict()), calibration=a), sure)[0] for a in (4.0, 256.0)]
    assert log_loss(of_the_sure, sure)[0] < min(scores)


def test_of_people_who_err_it_stays_unsure() -> None:
    world = two_groups(1)
    model = palate.fit(world.train, palate.Hierarchical(bend=0, types=()))
    assert 0.7 < model.calibration < 1.5
    plain = model.like(dict(model.state_dict()), calibration=1.0)
    assert log_loss(model, world)[0] < log_loss(plain, world)[0] + 0.002


def test_ties_count_as_where_it_is_tested() -> None:
    """A judge who contradicts herself is tied: of the strict answers alone it would be 2.4 times as sure as of all."""
    data, parts = attribute_choices(0)
    model = palate.fit(data[parts.train], palate.Hierarchical(bend=0, types=()))

    def loss(scale: float) -> float:
        stating = model.like(dict(model.state_dict()), calibration=scale)
        rows = palate.evaluate(stating, data[parts.support], data[parts.test_unseen]).rows()
        return float(np.mean([row["log_loss"] for row in rows]))

    best = min(loss(scale) for scale in (0.7, 1.0, 1.4, 2.0, 2.8))
    assert loss(model.calibration) < best + 0.005
    assert loss(2.4) > best + 0.005


def test_it_is_saved_and_a_folder_without_it_has_one(of_the_sure: Hierarchical, tmp_path: Path) -> None:
    of_the_sure.save_pretrained(tmp_path)
    again = palate.RewardModel.from_pretrained(tmp_path)
    assert again.calibration == of_the_sure.calibration
    assert again.fingerprint() == of_the_sure.fingerprint()
    assert "calibration" not in Hierarchical().options()
    mean, variance = torch.tensor([2.0, -2.0]), torch.tensor([0.0, 8 / torch.pi * 3])
    assert again.stated(mean, variance).tolist() == pytest.approx([2 * again.calibration, -again.calibration])


def test_nobody_held_out_changes_nothing(sure: Planted) -> None:
    assert palate.fit(sure.train, palate.Hierarchical(kappa=1.0, bend=0)).calibration == 1


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_calibration_that_is_no_factor_is_refused(wrong: float) -> None:
    with pytest.raises(DataError, match=f"calibration is {wrong}; expected a finite number above 0"):
        palate.Hierarchical(calibration=wrong)
