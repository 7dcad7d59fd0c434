"""What every fit has in common: the check that there is something to learn from, the record, and what it leaves alone."""

import json
import platform
from itertools import pairwise

import numpy as np
import pytest
import torch

import palate
from palate.data.pairs import EmbeddedPairs
from palate.data.planted import two_groups
from palate.errors import DataError
from palate.models.base import RewardModel
from palate.training import fit_with_profiles


@pytest.fixture(scope="module")
def data() -> EmbeddedPairs:
    return two_groups(n_users=10, n_train=6, n_test=1, dim=4).train


def small() -> palate.Hierarchical:
    return palate.Hierarchical(2, bend=0, types=())


def test_the_default_is_hierarchical(data: EmbeddedPairs) -> None:
    fitted = palate.fit(data)
    assert type(fitted) is palate.Hierarchical
    assert fitted.options() == palate.Hierarchical().options()


def test_the_record_says_how_it_came_about(data: EmbeddedPairs) -> None:
    record = palate.fit(data, small(), seed=7).record
    assert record["data"] == data.fingerprint()
    assert (record["n_pairs"], record["n_users"], record["seed"]) == (60, 10, 7)
    assert record["versions"] == {
        "palate": palate.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    assert record["fit_seconds"] > 0
    assert {"ridge", "population"} <= record["selection"].keys()
    assert json.loads(json.dumps(record, default=None))["seed"] == 7


def test_the_encoder_of_the_data_is_the_models(data: EmbeddedPairs) -> None:
    own = EmbeddedPairs(data.embeddings, data.chosen, data.rejected, data.users, encoder="of-these-texts")
    assert palate.fit(own, palate.BradleyTerry()).encoder == "of-these-texts"
    assert palate.fit(data, palate.BradleyTerry()).encoder is None


def test_the_unfitted_model_is_not_touched(data: EmbeddedPairs) -> None:
    for model in (small(), palate.BradleyTerry(), palate.LoRe(2, steps=5), palate.LoRe.faithful(2)):
        before = model.fingerprint()
        fitted = palate.fit(data, model)
        assert fitted is not model
        assert (model.fingerprint(), model.is_fitted, model.record, model.encoder) == (before, False, {}, None)


def test_only_the_faithful_presets_keep_a_table_of_users(data: EmbeddedPairs) -> None:
    assert fit_with_profiles(data, small())[1] is None
    assert fit_with_profiles(data, palate.LoRe(2, steps=5))[1] is None
    model, profiles = fit_with_profiles(data, palate.LoRe.faithful(3))
    assert profiles is not None
    assert profiles.user_ids == data.user_ids
    assert profiles.model == model.fingerprint()
    assert profiles.mean.shape == (10, 3)
    assert profiles.n_pairs.tolist() == [6] * 10
    torch.testing.assert_close(profiles.mean.mean(0), model.crowd_weights)


@pytest.mark.parametrize("method", [small(), palate.BradleyTerry(), palate.LoRe((2, 3), steps=8), palate.LoRe.faithful(2)])
def test_progress_goes_forward_from_nothing_to_all(method: RewardModel, data: EmbeddedPairs) -> None:
    heard: list[tuple[float, str]] = []
    palate.fit(data, method, progress=lambda share, what: heard.append((share, what)))
    shares = [share for share, _ in heard]
    assert all(later >= earlier - 0.01 for earlier, later in pairwise(shares))  # no bar is seen to go back
    assert 0 <= shares[0] <= shares[-1] <= 1
    assert all(what for _, what in heard)


def test_nothing_to_learn_from(data: EmbeddedPairs) -> None:
    ties = EmbeddedPairs(data.embeddings, data.chosen, data.rejected, data.users, tie=torch.ones(60, dtype=torch.bool))
    with pytest.raises(DataError, match="60 pairs, 60 of them ties; expected at least one choice to learn from"):
        palate.fit(ties, palate.BradleyTerry())
    with pytest.raises(DataError, match="0 pairs, 0 of them ties"):
        palate.fit(data[:0], palate.BradleyTerry())
    same = EmbeddedPairs(torch.ones(4, 3), torch.tensor([0, 2]), torch.tensor([1, 3]), ["al", "bo"])
    for method in (palate.BradleyTerry(), palate.LoRe(2), small()):
        with pytest.raises(DataError, match="no feature varies over the texts"):
            palate.fit(same, method)


def test_a_model_without_a_fit(data: EmbeddedPairs) -> None:
    class Given(RewardModel):
        """Scores that somebody else made."""

    with pytest.raises(DataError, match="Given has nothing to fit; expected a model with a `fitted` method"):
        palate.fit(data, Given())


def test_one_user_and_one_choice_are_enough_not_to_crash() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 2.0]])
    one = EmbeddedPairs(table, torch.tensor([0]), torch.tensor([1]), ["al"])
    two = EmbeddedPairs(table, torch.tensor([0, 2]), torch.tensor([1, 1]), ["al", "bo"])
    for data in (one, two):
        for method in (palate.BradleyTerry(), palate.LoRe(2, steps=5), palate.LoRe.faithful(2), palate.Hierarchical(2)):
            model = palate.fit(data, method)
            margin = palate.margins(model, data, palate.adapt(model, data))
            assert bool(torch.isfinite(margin).all())
            assert bool((margin > 0).all()) or isinstance(method, palate.LoRe)


def test_no_global_generator_is_read_or_moved(data: EmbeddedPairs) -> None:
    method = small()
    torch.manual_seed(1)
    before, numbers = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    first = palate.fit(data, method).fingerprint()
    assert torch.equal(torch.get_rng_state(), before)
    assert str(np.random.get_state()) == str(numbers)  # noqa: NPY002
    torch.manual_seed(2)
    assert palate.fit(data, method).fingerprint() == first
