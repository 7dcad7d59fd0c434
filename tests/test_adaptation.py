"""Profiles as a mapping and as a file, and the moments of margins against plain linear algebra."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import palate
from palate.adaptation import Profile, Profiles, check_profiles, margin_moments, no_pairs, pad, pair_design
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError, MismatchError, ModelFileError, UnknownUserError
from palate.priors import Prior


def model_of(prior: Prior | None = None) -> palate.Hierarchical:
    """Three features, two weights, a crowd with opinions and a population that is not centred on it."""
    prior = prior or Prior.gaussian(torch.tensor([[2.0, 0.5], [0.5, 1.0]]), torch.tensor([0.25, -0.5]))
    return palate.Hierarchical(2).like(
        {
            "direction": torch.tensor([1.0, -1.0, 0.5]),
            "bases": torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]]),
            "share": prior.share,
            "means": prior.means,
            "factors": prior.factors,
        }
    )


def some_pairs(seed: int = 0) -> EmbeddedPairs:
    """Users with 5, 1 and 3 choices, out of order, with a tie and weights."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(12, 3, generator=generator)
    users = ["cy", "al", "cy", "bo", "cy", "al", "cy", "cy", "al"]
    chosen, rejected = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8]), torch.tensor([1, 2, 3, 4, 5, 0, 9, 10, 11])
    weight = [1.0, 2.0, 0.5, 1.0, 1.0, 3.0, 1.0, 0.25, 1.0]
    return EmbeddedPairs(table, chosen, rejected, users, tie=[False] * 4 + [True] + [False] * 4, weight=weight)


def test_profiles_are_a_mapping() -> None:
    model, data = model_of(), some_pairs()
    profiles = palate.adapt(model, data)
    assert list(profiles) == ["al", "bo", "cy"]
    assert len(profiles) == 3
    assert "bo" in profiles
    assert "dee" not in profiles
    assert profiles.n_pairs.tolist() == [3, 1, 5]
    one = profiles["cy"]
    assert isinstance(one, Profile)
    assert (one.user_id, one.n_pairs, one.converged, one.model) == ("cy", 5, True, model.fingerprint())
    assert one.covariance is not None
    assert torch.equal(one.mean, profiles.mean[2])
    assert profiles.rows(["cy", "dee", "al"]).tolist() == [2, -1, 0]
    assert repr(profiles) == f"Profiles(3 users x 2 weights, model {model.fingerprint()[:12]})"
    with pytest.raises(
        UnknownUserError, match=r"no profile for user 'dee' among 3 \(such as al, bo, cy\); adapt that user first"
    ):
        _ = profiles["dee"]
    assert profiles.get("dee") is None


def test_rows_and_ids_must_agree() -> None:
    numbers = (torch.zeros(2, 1), None, torch.ones(2), torch.ones(2, dtype=torch.bool), "m")
    with pytest.raises(DataError, match="2 user ids, 1 of them distinct, for 2 rows"):
        Profiles(("al", "al"), *numbers)
    with pytest.raises(DataError, match="3 user ids, 3 of them distinct, for 2 rows"):
        Profiles(("al", "bo", "cy"), *numbers)


def test_design_and_padding_by_hand() -> None:
    model, data = model_of(), some_pairs()
    offset, slopes = pair_design(model, data)
    z = (data.embeddings.rows(data.chosen) - data.embeddings.rows(data.rejected)).numpy()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    np.testing.assert_allclose(offset, z @ state["direction"], atol=1e-5)
    np.testing.assert_allclose(slopes, z @ state["bases"], atol=1e-5)
    batch = pad(data, offset, slopes, torch.tensor([2, 1]))  # cy, bo
    assert batch.weight.tolist() == [[1.0, 0.5, 1.0, 1.0, 0.25], [1.0, 0.0, 0.0, 0.0, 0.0]]
    assert torch.equal(batch.slopes[0], slopes[[0, 2, 4, 6, 7]])
    assert torch.equal(batch.slopes[1, 0], slopes[3])
    assert batch.tie is not None
    assert batch.tie[0].tolist() == [False, False, True, False, False]


def test_only_texts_in_use_are_projected() -> None:
    data = some_pairs()
    big = torch.cat([data.embeddings.rows(torch.arange(12)), torch.full((50, 3), 1e30)])
    wide = EmbeddedPairs(big, data.chosen, data.rejected, data.users, tie=data.tie, weight=data.weight)
    model = model_of()
    for a, b in zip(pair_design(model, wide), pair_design(model, data), strict=True):
        torch.testing.assert_close(a, b)


def test_margins_and_their_variance_are_linear_algebra() -> None:
    model, data = model_of(), some_pairs()
    profiles = palate.adapt(model, data[data.user_index != 1])  # nobody knows bo
    mean, variance = margin_moments(model, data, profiles)
    offset, slopes = (x.numpy() for x in pair_design(model, data))
    for j, user in enumerate(data.users):
        w = profiles[user].mean.numpy() if user in profiles else np.zeros(2)
        assert float(mean[j]) == pytest.approx(offset[j] + slopes[j] @ w, abs=1e-5)
        spread = profiles[user].covariance if user in profiles else None
        c = np.zeros((2, 2)) if spread is None else spread.numpy()
        assert float(variance[j]) == pytest.approx(slopes[j] @ c @ slopes[j], abs=1e-5)
    torch.testing.assert_close(palate.margins(model, data, profiles), mean)
    torch.testing.assert_close(palate.margins(model, data), torch.from_numpy(offset))
    bare = palate.adapt(model, data, covariance=False)
    assert bare.covariance is None
    assert not margin_moments(model, data, bare)[1].any()


def test_no_pairs_is_the_crowd_with_the_populations_spread() -> None:
    model = model_of()
    unknown = no_pairs(model, ["new", "newer"])
    assert unknown.mean.tolist() == [[0.0, 0.0]] * 2
    assert unknown.covariance is not None
    # E[w w'] about the crowd's weights, zero: S + m m'.
    expected = torch.tensor([[2.0 + 0.0625, 0.5 - 0.125], [0.5 - 0.125, 1.0 + 0.25]])
    torch.testing.assert_close(unknown.covariance[1], expected)
    assert unknown.n_pairs.tolist() == [0, 0]
    assert no_pairs(palate.BradleyTerry().like({"direction": torch.ones(3)}), ["new"]).mean.shape == (1, 0)


def test_nobody_and_nothing() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    nothing = EmbeddedPairs(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), empty, empty, [])
    profiles = palate.adapt(model_of(), nothing)
    assert len(profiles) == 0
    assert palate.margins(model_of(), nothing, profiles).shape == (0,)


def test_profiles_of_another_model_are_refused() -> None:
    data = some_pairs()
    profiles = palate.adapt(model_of(), data)
    other = model_of(Prior.gaussian(torch.eye(2)))
    with pytest.raises(MismatchError, match=r"profiles of model \w{12} given to model \w{12}; .* adapt again"):
        palate.margins(other, data, profiles)
    with pytest.raises(MismatchError, match="adapt again"):
        check_profiles(other, profiles["al"])
    check_profiles(model_of(), profiles)


# -- as a file


@pytest.mark.parametrize("covariance", [True, False])
def test_profiles_come_back_from_their_file(covariance: bool, tmp_path: Path) -> None:
    model, data = model_of(), some_pairs()
    profiles = palate.adapt(model, data, covariance=covariance)
    profiles.save(tmp_path / "p.safetensors")
    again = Profiles.load(str(tmp_path / "p.safetensors"))
    assert again.user_ids == profiles.user_ids
    assert again.model == profiles.model
    assert torch.equal(again.mean, profiles.mean)
    assert (again.covariance is None) == (not covariance)
    assert torch.equal(palate.margins(model, data, again), palate.margins(model, data, profiles))
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


def test_ids_of_any_kind_survive(tmp_path: Path) -> None:
    ids = ("", "a\nb", 'q"', "ü\u0000", "漢")
    profiles = Profiles(ids, torch.zeros(5, 1), None, torch.ones(5), torch.ones(5, dtype=torch.bool), "m")
    profiles.save(tmp_path / "p")
    assert Profiles.load(tmp_path / "p").user_ids == ids


def test_files_that_are_no_profiles(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(ModelFileError, match="cannot be read as profiles"):
        Profiles.load(path)
    palate.adapt(model_of(), some_pairs()).save(path)
    content = path.read_bytes()
    for share in (0.0, 0.02, 0.5, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ModelFileError, match=r"p\.safetensors cannot be read as profiles: .*expected a file written by"):
            Profiles.load(path)
    save_file({"mean": torch.zeros(1, 1)}, path)
    with pytest.raises(ModelFileError, match="is a foreign file version None; expected palate-profiles version 1"):
        Profiles.load(path)
    meta = {"format": "palate-profiles", "version": "2", "model": "m", "user_ids": '["al"]'}
    save_file({"mean": torch.zeros(1, 1)}, path, metadata=meta)
    with pytest.raises(ModelFileError, match="palate-profiles version 2; expected palate-profiles version 1"):
        Profiles.load(path)
    whole = {"mean": torch.zeros(1, 1), "n_pairs": torch.ones(1), "converged": torch.ones(1)}
    for broken, tensors in (
        ({**meta, "version": "1"}, {"mean": torch.zeros(1, 1)}),
        ({**meta, "version": "1", "user_ids": "["}, whole),
        ({**meta, "version": "1", "user_ids": '["al", "bo"]'}, whole),
        ({"format": "palate-profiles", "version": "1"}, whole),
    ):
        save_file(tensors, path, metadata=broken)
        with pytest.raises(ModelFileError, match="is no complete file of profiles"):
            Profiles.load(path)
