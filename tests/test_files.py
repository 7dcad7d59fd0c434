"""Models on disk: what comes back is what was saved, whoever is killed while saving, and everything else is refused by name."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

import palate
from palate.data.pairs import EmbeddedPairs
from palate.data.planted import two_groups
from palate.errors import DataError, ModelFileError
from palate.models import files
from palate.models.base import RewardModel
from palate.priors import Prior

GOLDEN = Path(__file__).parent / "data" / "model-v1"


def tiny_bradley_terry(value: float = 1.0) -> palate.BradleyTerry:
    return palate.BradleyTerry(ridge=0.5).like({"direction": torch.tensor([value, -2.0, 0.25])})


def tiny_hierarchical() -> palate.Hierarchical:
    """Every kind of number: a bend of 4 frequencies, 2 weights and 2 types of people, over 3 features."""
    prior = Prior(
        torch.tensor([0.75, 0.25]),
        torch.tensor([[0.5, -1.0], [2.0, 0.25]]),
        torch.tensor([[[1.0, 0.0], [0.5, 0.25]], [[0.5, 0.0], [-0.25, 2.0]]]),
    )
    out = palate.Hierarchical(2, bend=4, types=(2,), kappa=1.5).like(
        {
            "direction": torch.tensor([1.0, -0.5, 0.25]),
            "bases": torch.tensor([[1.0, 0.0], [0.5, -1.0], [0.0, 2.0]]),
            "frequencies": torch.tensor([[1.0, 0.5, 0.0, -1.0], [0.0, 2.0, 1.0, 0.5], [0.25, 0.0, -0.5, 1.0]]),
            "phases": torch.tensor([0.0, 0.5, 1.0, 3.0]),
            "amplitudes": torch.tensor([0.5, -0.25, 1.0, 0.125]),
            "share": prior.share,
            "means": prior.means,
            "factors": prior.factors,
        }
    )
    out.encoder, out.record = "enc", {"seed": 3, "selection": {"log_loss": [0.5, 0.25]}}
    return out


@pytest.fixture(scope="module")
def data() -> EmbeddedPairs:
    return two_groups(n_users=12, n_train=8, n_test=1, dim=5).train


MODELS: dict[str, Callable[[], RewardModel]] = {
    "bt": lambda: palate.BradleyTerry(),
    "bt of one ridge": lambda: palate.BradleyTerry(ridge=0.01),
    "lore": lambda: palate.LoRe((2, 3), steps=20),
    "lore of one rank": lambda: palate.LoRe(2, steps=20, rate=0.2),
    "lore-faithful": lambda: palate.LoRe.faithful(3, few_shot_rate=0.5, seed=4),
    "mrm": lambda: palate.MRM(),
    "mrm-faithful": lambda: palate.MRM.faithful(3, inner_rate=5e-3, outer_rate=5e-3, epochs=3),
    "pref": lambda: palate.PReF((2, 3), start="scores"),
    "pref, given": lambda: palate.PReF(2, strength=0.2, kappa=1.0),
    "pref, nobody differs": lambda: palate.PReF(kappa=0.0),
    "pref-faithful": lambda: palate.PReF.faithful(3, regulariser="diag", few_shot_steps=70, seed=4),
    "hierarchical, gaussian": lambda: palate.Hierarchical(3, bend=0, types=(), kappa=1.0),
    "hierarchical, selected": lambda: palate.Hierarchical(3, bend=8, types=(2,)),
    "hierarchical, nobody differs": lambda: palate.Hierarchical(kappa=0.0, bend=0),
}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, data: EmbeddedPairs, tmp_path: Path) -> None:
    model = palate.fit(data, MODELS[name]())
    model.encoder = "some encoder"
    model.save_pretrained(tmp_path / "deep" / "model")
    again = palate.load_model(tmp_path / "deep" / "model")
    assert type(again) is type(model)
    assert again.fingerprint() == model.fingerprint()
    assert again.options() == model.options()
    assert again.encoder == "some encoder"
    assert json.dumps(again.record) == json.dumps(model.record).replace("NaN", "null")
    assert {"data", "seed", "versions", "n_users", "n_pairs"} <= again.record.keys()
    assert torch.equal(palate.margins(again, data), palate.margins(model, data))
    ours, theirs = palate.adapt(model, data), palate.adapt(again, data)
    assert torch.equal(ours.mean, theirs.mean)
    assert torch.equal(palate.margins(again, data, ours), palate.margins(model, data, theirs))


@pytest.mark.parametrize("make", [tiny_bradley_terry, tiny_hierarchical])
def test_round_trip_of_double_precision_and_views(make: Callable[[], RewardModel], tmp_path: Path) -> None:
    model = make()
    wide = model.like({name: tensor.double().repeat_interleave(2, 0)[::2] for name, tensor in model.state_dict().items()})
    wide.save_pretrained(tmp_path)
    again = palate.load_model(tmp_path)
    assert again.fingerprint() == wide.fingerprint()
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.float64}


def test_a_golden_model_of_version_1_loads_forever() -> None:
    model = palate.load_model(GOLDEN)
    expected = json.loads((GOLDEN / "expected.json").read_text())
    rewards = model(torch.tensor(expected["embeddings"]), torch.tensor(expected["weights"]))
    torch.testing.assert_close(rewards, torch.tensor(expected["rewards"]))
    assert model.prior is not None
    torch.testing.assert_close(model.prior.mean, torch.tensor(expected["prior_mean"]))
    assert model.encoder == "enc"
    # Profiles carry the fingerprint: one that changes with the library would refuse every profile that exists.
    assert model.fingerprint() == expected["fingerprint"] == tiny_hierarchical().fingerprint()


def test_the_golden_numbers_are_the_formula() -> None:
    """reward = mu.e + sum_m a_m cos(omega_m.e + phi_m) + w.(V^T e), written out in plain Python."""
    import math

    expected = json.loads((GOLDEN / "expected.json").read_text())
    numbers = {name: tensor.tolist() for name, tensor in load_file(GOLDEN / files.NUMBERS).items()}
    for e, reward in zip(expected["embeddings"], expected["rewards"], strict=True):
        total = sum(m * x for m, x in zip(numbers["direction"], e, strict=True))
        for j, (phase, amplitude) in enumerate(zip(numbers["phases"], numbers["amplitudes"], strict=True)):
            total += amplitude * math.cos(phase + sum(row[j] * x for row, x in zip(numbers["frequencies"], e, strict=True)))
        for k, w in enumerate(expected["weights"]):
            total += w * sum(row[k] * x for row, x in zip(numbers["bases"], e, strict=True))
        assert total == pytest.approx(reward, abs=1e-5)


# -- atomic


def test_other_files_are_kept_and_nothing_else_is_left(tmp_path: Path) -> None:
    (tmp_path / "encoder.json").write_text("{}")
    for value in (1.0, 2.0):
        tiny_bradley_terry(value).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "encoder.json", "model.safetensors"]
    assert (tmp_path / "encoder.json").read_text() == "{}"


@pytest.mark.parametrize("fresh", [True, False])
def test_a_death_at_any_step_leaves_the_old_model_or_the_new_one(
    fresh: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Death(BaseException):
        pass

    left = [0]
    replace, fsync = Path.replace, os.fsync

    def dying(action: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Death
            return action(*arguments)

        return step

    monkeypatch.setattr(Path, "replace", dying(replace))
    monkeypatch.setattr(os, "fsync", dying(fsync))
    steps, finished = 0, False
    while not finished:
        folder = tmp_path / str(steps)
        left[0] = 99
        if not fresh:
            tiny_bradley_terry(1.0).save_pretrained(folder)
        for value in (2.0, 3.0):  # the second writer finds what the first one left
            left[0] = steps
            try:
                tiny_bradley_terry(value).save_pretrained(folder)
                finished = True
            except Death:
                finished = False
            if fresh and not (folder / files.CONFIG).exists():
                with pytest.raises(ModelFileError, match=r"has no config\.json"):
                    palate.load_model(folder)
                continue
            found = float(palate.load_model(folder).state_dict()["direction"][0])
            assert found in {1.0, 2.0, value}
            assert not finished or found == value
        left[0] = 99
        tiny_bradley_terry(4.0).save_pretrained(folder)
        assert float(palate.load_model(folder).state_dict()["direction"][0]) == 4.0
        steps += 1
    assert steps >= 5  # two flushes and three renames


def test_a_process_killed_while_it_saves_leaves_a_model_that_loads(tmp_path: Path) -> None:
    """kill -9 of a second process that saves two models in turn, at random moments, many times over one folder."""
    folder, dice, seen = tmp_path / "model", random.Random(0), set()
    models = [tiny_bradley_terry(float(value)) for value in range(2)]
    began = time.perf_counter()
    models[0].save_pretrained(folder)
    once = time.perf_counter() - began  # a busy disk takes a hundred times as long as an idle one
    whole = {model.fingerprint() for model in models}
    for trial in range(400):
        if trial >= 40 and seen == whole:  # on a busy machine forty children may not have come so far
            break
        child = os.fork()
        if child == 0:  # pragma: no cover - never returns
            while True:
                for i in range(2):  # each is the first in half of the trials, so both are met even where few saves are made
                    models[(trial + i) % 2].save_pretrained(folder)
        time.sleep(dice.uniform(0.001, 0.02 + 4 * once))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (folder / files.CONFIG).exists():
            seen.add(palate.load_model(folder).fingerprint())
            assert seen <= whole
    assert seen == whole


def test_a_model_is_read_whole_while_another_is_written(tmp_path: Path) -> None:
    folder, models = tmp_path / "model", [tiny_bradley_terry(float(value)) for value in range(2)]
    models[0].save_pretrained(folder)
    child = os.fork()
    if child == 0:  # pragma: no cover - never returns
        while True:
            for model in models:
                model.save_pretrained(folder)
                time.sleep(0.001)
    try:
        known = {model.fingerprint() for model in models}
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            assert palate.load_model(folder).fingerprint() in known
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# -- refused


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_hierarchical().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / files.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Other numbers under a matching hash: what only a bug or somebody's intention can produce."""
    numbers = {**load_file(folder / files.NUMBERS), **tensors}
    content = save({name: tensor for name, tensor in numbers.items() if tensor is not None})
    (folder / files.NUMBERS).write_bytes(content)
    edit(folder, sha256=files._sha256(content))


def test_missing_folder_and_files(saved: Path) -> None:
    with pytest.raises(ModelFileError, match=r"nowhere is no folder; expected a folder written by model\.save_pretrained"):
        palate.load_model(saved / "nowhere")
    with pytest.raises(ModelFileError, match="is no folder"):
        palate.load_model(saved / files.CONFIG)
    (saved / files.NUMBERS).unlink()
    with pytest.raises(ModelFileError, match=r"has no model\.safetensors, only a config\.json"):
        palate.load_model(saved)
    (saved / files.CONFIG).unlink()
    with pytest.raises(ModelFileError, match=r"has no config\.json"):
        palate.load_model(saved)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b'{"format": "palate-model", "class"', b"[" * 100_000])
def test_corrupt_config(saved: Path, text: bytes) -> None:
    (saved / files.CONFIG).write_bytes(text)
    with pytest.raises(ModelFileError, match=r"config\.json is no JSON .*corrupt"):
        palate.load_model(saved)


@pytest.mark.parametrize("text", ['{"model_type": "llama"}', "[1]", '{"format": "palate-profiles"}', "3"])
def test_foreign_config_is_neither_read_nor_overwritten(saved: Path, text: str) -> None:
    (saved / files.CONFIG).write_text(text)
    with pytest.raises(
        ModelFileError, match=r"config\.json is of format .*expected 'palate-model': it belongs to something else"
    ):
        palate.load_model(saved)
    with pytest.raises(ModelFileError, match="it belongs to something else"):
        tiny_bradley_terry().save_pretrained(saved)
    assert (saved / files.CONFIG).read_text() == text


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.99])
def test_truncated_numbers(saved: Path, share: float) -> None:
    path = saved / files.NUMBERS
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ModelFileError, match=r"model\.safetensors is not the file that config\.json was written for .*cut off"):
        palate.load_model(saved)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_numbers_under_their_own_hash(saved: Path, share: float) -> None:
    path = saved / files.NUMBERS
    content = path.read_bytes()[: int(share * path.stat().st_size)]
    path.write_bytes(content)
    edit(saved, sha256=files._sha256(content))
    with pytest.raises(ModelFileError, match=r"model\.safetensors is no safetensors file"):
        palate.load_model(saved)


def test_one_changed_bit(saved: Path) -> None:
    path = saved / files.NUMBERS
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ModelFileError, match="another SHA-256"):
        palate.load_model(saved)


def test_numbers_of_another_model(saved: Path, tmp_path: Path) -> None:
    tiny_bradley_terry().save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / files.NUMBERS, saved / files.NUMBERS)
    with pytest.raises(ModelFileError, match="or another model's"):
        palate.load_model(saved)


def test_newer_and_nonsensical_versions(saved: Path) -> None:
    edit(saved, format_version=2)
    with pytest.raises(
        ModelFileError, match="format_version 2, written by a newer palate; this one reads up to 1: upgrade palate"
    ):
        palate.load_model(saved)
    for version in (None, 0, "1"):
        edit(saved, format_version=version)
        with pytest.raises(ModelFileError, match=f"format_version {version!r}; expected a number from 1 to 1"):
            palate.load_model(saved)


@pytest.mark.parametrize("name", ["Oracle", None, "RewardModel", "os.system", ["LoRe"]])
def test_unknown_class(saved: Path, name: object) -> None:
    edit(saved, **{"class": name})
    with pytest.raises(ModelFileError, match=r"holds a .*expected one of BradleyTerry, LoRe, .*Hierarchical"):
        palate.load_model(saved)


@pytest.mark.parametrize(("key", "value"), [("options", [1]), ("record", None), ("sha256", 5), ("encoder", 7)])
def test_unusable_entries(saved: Path, key: str, value: object) -> None:
    edit(saved, **{key: value})
    with pytest.raises(ModelFileError, match=f"no usable {key}"):
        palate.load_model(saved)


@pytest.mark.parametrize(
    "options",
    [
        {"ridge": 1.0},
        {"n_bases": "many"},
        {"n_bases": -1},
        {"n_bases": 2, "bend": 4, "types": [2], "kappa": 1.5, "prior_variance": 4.0, "colour": 1},
        {"n_bases": 2, "types": 3},
    ],
)
def test_options_that_the_class_does_not_take(saved: Path, options: dict[str, Any]) -> None:
    edit(saved, options=options)
    with pytest.raises(ModelFileError, match="is no Hierarchical with options"):
        palate.load_model(saved)


def test_config_of_another_class(saved: Path) -> None:
    edit(saved, **{"class": "LoRe"}, options=palate.LoRe(2).options())
    with pytest.raises(
        ModelFileError, match=r"holds \['amplitudes'.*expected the numbers of a LoRe: \['bases', 'mean_weights'\]"
    ):
        palate.load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bases": None}, "expected the numbers of a Hierarchical"),
        ({"extra": torch.ones(2)}, "expected the numbers of a Hierarchical"),
        ({"direction": torch.ones(3, 1)}, r"direction has shape \(3, 1\); expected \(D\)"),
        ({"bases": torch.ones(4, 2)}, r"bases has shape \(4, 2\); expected \(D, K\) with {'D': 3"),
        ({"means": torch.ones(2, 3)}, r"means has shape \(2, 3\)"),
        ({"factors": torch.ones(2, 2, 3)}, r"factors has shape \(2, 2, 3\)"),
        ({"amplitudes": torch.ones(3)}, r"amplitudes has shape \(3,\)"),
        ({"amplitudes": torch.ones(0)}, r"amplitudes has shape \(0,\)"),
        ({"frequencies": torch.ones(0, 4)}, r"frequencies has shape \(0, 4\)"),
        ({"share": torch.zeros(0)}, r"means has shape \(2, 2\)"),
        ({"direction": torch.tensor([1.0, float("nan"), 0.0])}, "direction holds NaN or infinite numbers"),
        ({"factors": torch.full((2, 2, 2), float("inf"))}, "factors holds NaN or infinite numbers"),
        ({"phases": torch.ones(4, dtype=torch.int64)}, r"phases is torch\.int64; expected float32 or float64"),
        ({"share": torch.tensor([0.75, 0.75])}, "prior shares are"),
    ],
)
def test_numbers_that_the_class_cannot_have(saved: Path, change: dict[str, torch.Tensor | None], message: str) -> None:
    rewrite(saved, **change)
    with pytest.raises(ModelFileError, match=message):
        palate.load_model(saved)


def test_a_model_of_no_feature(saved: Path, tmp_path: Path) -> None:
    tiny_bradley_terry().save_pretrained(tmp_path / "bt")
    rewrite(tmp_path / "bt", direction=torch.zeros(0))
    with pytest.raises(ModelFileError, match="reads no feature; expected the numbers of a fitted BradleyTerry"):
        palate.load_model(tmp_path / "bt")


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not fitted, so there is nothing to save"):
        palate.BradleyTerry().save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelFileError, match="is a file; expected a folder"):
        tiny_bradley_terry().save_pretrained(tmp_path / "file")
    for wrong in (float("inf"), torch.ones(1)):
        model = tiny_bradley_terry()
        model.record["it"] = wrong
        with pytest.raises(ModelFileError, match="record of this BradleyTerry are no JSON"):
            model.save_pretrained(tmp_path / "model")

    class Private(palate.BradleyTerry):
        pass

    with pytest.raises(ModelFileError, match="a Private cannot be saved; expected one of BradleyTerry"):
        Private().like({"direction": torch.ones(2)}).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_loss_that_could_not_be_measured_is_null_on_disk(tmp_path: Path) -> None:
    model = tiny_bradley_terry()
    model.record["curve"] = [0.5, float("nan"), (1, 2)]
    model.save_pretrained(tmp_path)
    assert palate.load_model(tmp_path).record["curve"] == [0.5, None, [1, 2]]
