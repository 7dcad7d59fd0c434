"""The scalar head is the one that made the logits, or there is none; and `Reference` gives the model's own rewards.

Models are built tiny from a configuration, with random weights and heads of a size that makes rewards of about one.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import palate
from palate.data.embeddings import Dense
from palate.data.pairs import Choice, EmbeddedPairs, PairSet, Text
from palate.encoders import JoinedEncoder, Style
from palate.encoders.cache import Cache
from palate.encoders.heads import TEXTS, TOLERANCE, Head, check_head, encoder_head, find_head, own_logits
from palate.encoders.huggingface import HuggingFace
from palate.errors import DataError, MismatchError, PalateError

transformers = pytest.importorskip("transformers")

Run = Callable[..., Any]
PAD, BOS, END = 0, 1, 2
TEMPLATE = "<bos>{% for turn in messages %}{{ turn['role'] }}:{{ turn['content'] }}<end>{% endfor %}"
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": END}
ATTRIBUTES = {0: "helpful", 1: "correct", 2: "short"}


def letters(template: str = TEMPLATE) -> Any:
    """A tokenizer of bytes: nothing is trained, and different texts have different tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = ["<pad>", "<bos>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<end>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


TOKENIZER = letters()


def configuration(family: str, **changes: Any) -> Any:
    common = {"vocab_size": len(TOKENIZER), "num_labels": 1, **SPECIAL}
    if family == "GPT2":
        return transformers.GPT2Config(**common | {"n_embd": 32, "n_layer": 2, "n_head": 4} | changes)
    sizes = SIZE | ({"head_dim": 8} if family == "Qwen3" else {})
    if family in ("Bert", "Roberta"):
        common["bos_token_id"] = None
    return getattr(transformers, f"{family}Config")(**common | sizes | changes)


def classifier(family: str = "Llama", seed: int = 1, kind: Any = None, **changes: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (kind or getattr(transformers, f"{family}ForSequenceClassification"))(configuration(family, **changes))
        if hasattr(model, "score"):
            model.score.weight.data.normal_()
    return model.eval().requires_grad_(False)


FAMILIES = ("Llama", "Qwen2", "Qwen3", "GPT2")


def written(text: Text) -> list[int]:
    """The tokens of a text under `TEMPLATE`, by hand."""
    turns = [("user", text.prompt)] if isinstance(text.prompt, str) else list(text.prompt)
    out = [BOS]
    for role, content in [*turns, ("assistant", text.response)]:
        out += [*TOKENIZER(f"{role}:{content}", add_special_tokens=False)["input_ids"], END]
    return out


def logits(model: Any, texts: Sequence[Text]) -> Tensor:
    """(N, H) what the model itself says of every text, one at a time."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([written(text)])).logits for text in texts]).float()


def choices() -> PairSet:
    """Choices over texts of different lengths, several for one prompt."""
    long = "Tell me, in as few words as you can and without any list, how a person should boil an egg."
    rows = [
        *(Choice(f"u{i % 3}", long, f"In water, for {i + 3} minutes.", f"{'Not ' * i}in oil.") for i in range(4)),
        *(Choice(f"u{i % 3}", f"Question {i}?", f"Yes, {'indeed ' * i}.", "No." + "!" * i) for i in range(5)),
    ]
    return PairSet.from_choices(rows)


# -- finding


@pytest.mark.parametrize("family", [*FAMILIES, "Mistral", "Gemma2", "GPTNeoX", "OPT"])
def test_the_head_of_decoders_is_found(family: str) -> None:
    changes = {"GPTNeoX": {"num_key_value_heads": None}, "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32}}.get(family, {})
    model = classifier(family, **changes)
    head = find_head(model)
    assert (head.name, head.reads, head.dtype) == ("score", "last token", torch.float32)
    assert torch.equal(head.weight, model.score.weight)
    assert head.bias.tolist() == [0.0]
    assert not any(module._forward_hooks for module in model.modules())


class Disguised(transformers.LlamaForSequenceClassification):
    """The head goes by another name and has a bias; other maps of its shape stand around it, before and after, unused or used."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.aside, self.value, self.last = (nn.Linear(config.hidden_size, 1) for _ in range(3))
        del self.score

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        hidden = self.model(input_ids, **given).last_hidden_state
        self.aside(hidden)
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.value(hidden)[:, -1])


def test_a_head_is_known_by_what_it_does() -> None:
    model = classifier(kind=Disguised)
    head = find_head(model)
    assert head.name == "value"
    assert torch.equal(head.weight, model.value.weight)
    assert torch.equal(head.bias, model.value.bias)
    assert head.bias.item() != 0


class Mean(transformers.LlamaForSequenceClassification):
    """A head on the mean over the tokens."""

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        hidden = self.model(input_ids, **given).last_hidden_state
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.score(hidden.mean(1)))


def test_a_head_on_the_mean_goes_with_features_that_are_the_mean() -> None:
    model = classifier(kind=Mean)
    assert find_head(model).reads == "mean of the tokens"
    mean = HuggingFace.from_model(model, TOKENIZER, pooling="mean")
    data = mean.embed(choices())
    theirs = logits(model, choices().texts)[:, 0]
    torch.testing.assert_close(palate.Reference.of(mean)(data.embeddings), theirs, atol=1e-4, rtol=0)
    with pytest.raises(MismatchError, match=r"hidden state that it reads \(mean of the tokens\)"):
        palate.Reference.of(HuggingFace.from_model(model, TOKENIZER))


class Bent(transformers.LlamaForSequenceClassification):
    """Rewards squeezed into (-1, 1) after the head."""

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        out = super().forward(input_ids, **given)
        out.logits = out.logits.tanh()
        return out


class Rounded(nn.Linear):
    """A layer that does not compute with the weight that it shows, as a quantised one."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.round(decimals=1))


def rounded() -> Any:
    model = classifier()
    layer = Rounded(32, 1, bias=False)
    layer.weight.data = model.score.weight.data
    model.score = layer
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: classifier(kind=transformers.LlamaModel), DataError, "no scalar head: it gives hidden states and no logits"),
        (lambda: classifier(kind=transformers.LlamaForCausalLM), DataError, "no scalar head: its logits have shape .* language"),
        (lambda: classifier("Bert"), DataError, "from 'classifier', which does not read the final hidden state"),
        (lambda: classifier("Roberta"), DataError, r"from 'classifier\.out_proj', which does not read the final hidden state"),
        (lambda: classifier(kind=Bent), DataError, r"no linear layer of this Bent writes its logits \(.*: score\)"),
        (rounded, MismatchError, r"'score' on these features is not what made the logits: on 6 texts W e \+ b differs"),
    ],
    ids=["headless", "causal", "bert", "roberta", "bent", "quantised"],
)
def test_what_has_no_linear_head_is_refused_with_the_reason(make: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        find_head(make())


def test_looking_leaves_the_model_as_it_was() -> None:
    model = classifier(attention_dropout=0.5)
    model.train()
    model.model.norm.eval()
    state = torch.get_rng_state()
    find_head(model)
    assert model.training
    assert not model.model.norm.training
    assert torch.equal(torch.get_rng_state(), state)


# -- checking


@pytest.fixture(scope="module")
def llama() -> Any:
    return classifier()


@pytest.fixture(scope="module")
def seen(llama: Any) -> tuple[Head, Tensor, Tensor]:
    """The true head, and features and logits of the built-in texts, each by a pass of its own."""
    with torch.no_grad():
        hidden = torch.cat([llama.model(torch.tensor([written(text)])).last_hidden_state[:, -1] for text in TEXTS])
    return find_head(llama), hidden, logits(llama, TEXTS)


def test_the_true_head_gives_the_logits(llama: Any, seen: tuple[Head, Tensor, Tensor]) -> None:
    head, hidden, theirs = seen
    check = check_head(head, hidden, theirs)
    assert check.n_texts == len(TEXTS)
    assert check.error < 1e-5 < check.allowed == pytest.approx(1e-4 * float(theirs.abs().max()))
    assert check.spread == pytest.approx(float(theirs.max() - theirs.min()))
    assert check.spread > 1000 * check.allowed
    torch.testing.assert_close(torch.stack([own_logits(llama, written(text)) for text in TEXTS]), theirs)


def last_linear_column(model: Any) -> Tensor:
    """What the published code takes for the head: column 0 of the last linear layer of the model without its head."""
    last = [module for module in model.model.modules() if isinstance(module, nn.Linear)][-1]
    assert last is model.model.layers[-1].mlp.down_proj
    return last.weight[:, 0][None]


PLANTED: dict[str, Callable[[Any], Tensor]] = {
    "down-projection": last_linear_column,
    "a row of it": lambda model: model.model.layers[-1].mlp.gate_proj.weight[:1],
    "permuted": lambda model: model.score.weight.roll(1, dims=1),
    "another checkpoint": lambda model: classifier(seed=2).score.weight,
    "a word of a language model": lambda model: classifier(kind=transformers.LlamaForCausalLM).lm_head.weight[7:8],
    "negated": lambda model: -model.score.weight,
    "a thousandth too long": lambda model: 1.001 * model.score.weight,
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_wrong_head_of_the_right_shape_is_refused(name: str, llama: Any, seen: tuple[Head, Tensor, Tensor]) -> None:
    head, hidden, theirs = seen
    wrong = PLANTED[name](llama)
    assert wrong.shape == head.weight.shape
    off = float((hidden @ wrong.T - theirs).abs().max())
    with pytest.raises(MismatchError, match=rf"differs from them by up to {re.escape(f'{off:.3g}')}, where .* is allowed"):
        check_head(head._replace(weight=wrong), hidden, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_rounding_passes_and_a_wrong_head_does_not(dtype: torch.dtype) -> None:
    model = classifier().to(dtype)
    encoder = HuggingFace.from_model(model, TOKENIZER)
    head, check = encoder_head(encoder)
    assert head.dtype is dtype
    assert check.error <= TOLERANCE[dtype] * float(logits(model, TEXTS).abs().max())
    wrong = head._replace(weight=last_linear_column(model).float())
    with pytest.raises(MismatchError, match="is not what made the logits"):
        check_head(wrong, encoder.hidden(TEXTS), logits(model, TEXTS))


def test_texts_that_tell_nothing_are_not_evidence(seen: tuple[Head, Tensor, Tensor]) -> None:
    head, hidden, theirs = seen
    with pytest.raises(DataError, match="the 3 texts differ by 0 in the model's own logit"):
        check_head(head, hidden[:1].expand(3, -1), theirs[:1].expand(3, -1))
    with pytest.raises(DataError, match="the 12 texts differ by 0 "):
        check_head(head._replace(weight=0 * head.weight), hidden, 0 * theirs)
    with pytest.raises(DataError, match="0 texts to check 'score' on"):
        check_head(head, hidden[:0], theirs[:0])
    with pytest.raises(DataError, match="not finite"):
        check_head(head, hidden * float("nan"), theirs)
    with pytest.raises(DataError, match=r"features \(12, 31\) and logits \(12, 1\)"):
        check_head(head, hidden[:, 1:], theirs)


# -- the model


@pytest.mark.parametrize("family", FAMILIES)
def test_margins_are_differences_of_the_models_own_logits(family: str) -> None:
    model, pairs = classifier(family), choices()
    encoder = HuggingFace.from_model(model, TOKENIZER, tokens_per_batch=512)
    reference, data = palate.Reference.of(encoder), encoder.embed(pairs)
    chosen, rejected = (logits(model, [pairs.texts[i] for i in side.tolist()])[:, 0] for side in (pairs.chosen, pairs.rejected))
    assert float((chosen - rejected).abs().min()) > 1e-3  # each margin says something
    torch.testing.assert_close(palate.margins(reference, data), chosen - rejected, atol=1e-4, rtol=0)
    torch.testing.assert_close(palate.Scorer(encoder, reference).score("Question 1?", ["Yes, indeed .", "No.!"]),
                               logits(model, [Text("Question 1?", "Yes, indeed ."), Text("Question 1?", "No.!")])[:, 0],
                               atol=1e-4, rtol=0)  # fmt: skip


def test_rewards_are_the_logits_themselves_bias_included() -> None:
    model = classifier(kind=Disguised)
    encoder = HuggingFace.from_model(model, TOKENIZER)
    data = encoder.embed(choices())
    ours = palate.Reference.of(encoder)(data.embeddings)
    torch.testing.assert_close(ours, logits(model, choices().texts)[:, 0], atol=1e-4, rtol=0)


def test_a_cache_in_half_precision_costs_its_rounding_and_no_more(tmp_path: Path) -> None:
    model, pairs = classifier(), choices()
    encoder = HuggingFace.from_model(model, TOKENIZER)
    exact = palate.margins(palate.Reference.of(encoder), encoder.embed(pairs))
    encoder.cache = Cache(tmp_path)
    reference = palate.Reference.of(encoder)  # verified past the cache: rounding would be more than float32 is allowed
    assert reference.record["head"]["error"] < 1e-5
    table = HuggingFace.from_model(model, TOKENIZER).encode(pairs.texts)
    rounding = 2**-11 * (table.rows(torch.arange(len(table))).abs() @ reference.direction.abs())  # of a reward, at the worst
    allowed = rounding[pairs.chosen] + rounding[pairs.rejected]
    assert float(allowed.max()) < 0.05
    for _ in range(2):
        off = (palate.margins(reference, encoder.embed(pairs)) - exact).abs()
        assert bool((off <= allowed + 1e-5).all())
        assert float(off.max()) > 0
    assert encoder.encoded == 0


def test_profiles_have_no_weights_and_the_model_comes_back(tmp_path: Path) -> None:
    encoder = HuggingFace.from_model(classifier(), TOKENIZER)
    model, data = palate.Reference.of(encoder), encoder.embed(choices())
    profiles = palate.adapt(model, data)
    assert profiles.mean.shape == (3, 0)
    assert profiles.n_pairs.tolist() == [4, 3, 2]
    assert bool(profiles.converged.all())
    assert torch.equal(palate.margins(model, data, profiles), palate.margins(model, data))
    assert (model.n_weights, model.n_parameters, model.prior, model.n_features) == (0, 0, None, 32)
    model.save_pretrained(tmp_path)
    again = palate.load_model(tmp_path)
    assert (again.fingerprint(), again.encoder, again.record) == (model.fingerprint(), encoder.fingerprint, model.record)
    assert torch.equal(palate.margins(again, data, profiles), palate.margins(model, data))
    assert model.record["head"]["name"] == "score"
    assert model.record["head"]["n_texts"] == len(TEXTS)


def test_it_goes_with_its_encoder_and_no_other() -> None:
    encoder, other = (HuggingFace.from_model(classifier(seed=seed), TOKENIZER) for seed in (1, 2))
    model = palate.Reference.of(encoder)
    with pytest.raises(MismatchError, match="embed the texts with the model's own encoder"):
        palate.margins(model, other.embed(choices()))
    with pytest.raises(MismatchError, match="embed the texts with the model's own encoder"):
        palate.fit(other.embed(choices()), model)
    data = encoder.embed(choices())
    nameless = EmbeddedPairs(data.embeddings, data.chosen, data.rejected, data.users)
    with pytest.raises(MismatchError, match="embeddings of an unknown encoder"):
        palate.fit(nameless, model)
    fitted = palate.fit(data, model)
    assert fitted is not model
    assert torch.equal(palate.margins(fitted, data), palate.margins(model, data))
    assert fitted.record.keys() >= {"head", "data", "seed"}
    with pytest.raises(DataError, match=r"learns nothing from choices.*palate\.Reference\.of\(encoder\)"):
        palate.fit(data, palate.Reference())
    with pytest.raises(DataError, match="not fitted"):
        palate.margins(palate.Reference(), data)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (lambda: Style(), "encoder 'style' has no scalar head, because it is no reward model"),
        (lambda: HuggingFace.from_model(classifier(kind=transformers.LlamaModel), TOKENIZER), "hidden states and no logits"),
        (lambda: HuggingFace.from_model(classifier("Bert"), TOKENIZER), "does not read the final hidden state"),
    ],
    ids=["style", "headless", "bert"],
)
def test_an_encoder_without_a_head_has_no_reference(encoder: Callable[[], Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        palate.Reference.of(encoder())


@pytest.mark.parametrize("options", [{"pooling": "mean"}, {"layer": 1}])
def test_features_that_the_head_does_not_read_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(
        MismatchError, match=r"'score' on these features is not what made the logits: on 12 texts .* \(last token\)"
    ):
        palate.Reference.of(HuggingFace.from_model(classifier(), TOKENIZER, **options))


def test_a_last_token_that_pads_is_seen() -> None:
    """transformers takes the rightmost token that does not pad, so its classifier would read the token before the end."""
    with pytest.raises(MismatchError, match="every text ends with token 2, which also pads"):
        palate.Reference.of(HuggingFace.from_model(classifier(pad_token_id=END), TOKENIZER))


def test_of_several_logits_one_is_named() -> None:
    model = classifier(num_labels=3, id2label=ATTRIBUTES)
    encoder = HuggingFace.from_model(model, TOKENIZER)
    data, pairs = encoder.embed(choices()), choices()
    theirs = logits(model, pairs.texts)
    for output, row in ((0, 0), ("correct", 1), (2, 2)):
        reference = palate.Reference.of(encoder, output=output)
        torch.testing.assert_close(palate.margins(reference, data), theirs[pairs.chosen, row] - theirs[pairs.rejected, row],
                                   atol=1e-4, rtol=0)  # fmt: skip
        assert reference.record["head"]["output"] == row
    for wrong in (None, 3, "kind"):
        with pytest.raises(DataError, match=rf"output is {wrong!r} and the head has 3 logits \(helpful, correct, short\)"):
            palate.Reference.of(encoder, output=wrong)
    for nonsense in (-1, True, 0.0):
        with pytest.raises(DataError, match="expected the number of a logit from 0"):
            palate.Reference(nonsense)  # type: ignore[arg-type]


def test_in_a_join_the_head_reads_its_own_block() -> None:
    model = classifier()
    encoder = HuggingFace.from_model(model, TOKENIZER)
    joined = JoinedEncoder([Style(), encoder], gains=[3.0, 0.5])
    data = joined.embed(choices())
    reference = palate.Reference.of(joined)
    assert not reference.direction[: len(Style.names or ())].any()
    torch.testing.assert_close(reference(data.embeddings), logits(model, choices().texts)[:, 0], atol=1e-4, rtol=0)
    with pytest.raises(DataError, match=r"0 parts of '.*' have a scalar head; expected one; encoder 'style' has no scalar head"):
        palate.Reference.of(JoinedEncoder([Style(), HuggingFace.from_model(model.model, TOKENIZER)]))


# -- comparing


def preferences(n_users: int = 8, n: int = 12) -> PairSet:
    """Everybody's own prompts, and answers that no format tells apart."""
    rng = np.random.default_rng(0)
    words = np.array(["river", "stone", "cloud", "apple", "march", "seven", "green", "lucky", "paper", "under"])
    said = [" ".join(line) for line in rng.choice(words, (2 * n_users * n, 5))]
    return PairSet.from_choices(
        [Choice(f"u{i % n_users}", f"Question {i}?", *said[2 * i : 2 * i + 2]) for i in range(n_users * n)]
    )


def test_compare_gives_it_the_encoder_and_scores_it_like_the_others() -> None:
    model, pairs = classifier(), preferences()
    encoder = HuggingFace.from_model(model, TOKENIZER)
    done = palate.compare(
        pairs, encoder, {"reference": palate.Reference(), "bt": palate.BradleyTerry(0.1)}, seeds=2, shots=(0, None)
    )
    assert not done.failures
    assert {(run.kind, run.n_weights, run.n_parameters) for run in done.runs if run.method == "reference"} == {
        ("Reference", 0, 0)
    }
    side = palate.split(pairs, by="prompt", min_support=1, seed=0).test_unseen
    score = logits(model, pairs.texts)[:, 0]
    right = (score[pairs.chosen[side]] > score[pairs.rejected[side]]).double().numpy()
    user = pairs.user_index[side]
    expected = {pairs.user_ids[u]: float(right[user == u].mean()) for u in np.unique(user)}
    for shots in (0, None):
        rows = [row for row in done.where(method="reference", cohort="unseen", seed=0).rows() if row["shots"] == shots]
        assert {row["user"]: row["accuracy"] for row in rows} == pytest.approx(expected)


def test_compare_says_why_an_encoder_has_none_and_goes_on() -> None:
    methods = {"reference": palate.Reference(), "bt": palate.BradleyTerry(0.1)}
    done = palate.compare(preferences(), Style(), methods, seeds=2, shots=(0,))
    assert done.methods == ("bt",)
    assert [(failure.method, failure.seed, failure.stage) for failure in done.failures] == [
        ("reference", 0, "fit"),
        ("reference", 1, "fit"),
    ]
    assert "'style' has no scalar head" in done.failures[0].message
    with pytest.raises(PalateError, match=r"reference \(fit\): encoder 'style' has no scalar head"):
        palate.compare(preferences(), Style(), {"reference": palate.Reference()}, seeds=1)
    embedded = Style().embed(preferences())
    with pytest.raises(PalateError, match="Reference learns nothing from choices"):
        palate.compare(embedded, None, {"reference": palate.Reference()}, seeds=1)


def test_the_command_line_knows_it(palate_command: Run, tmp_path: Path) -> None:
    """From a checkpoint on the disk to a ranking that is the reward model's own."""
    model, pairs = classifier(), preferences()
    model.save_pretrained(tmp_path / "checkpoint")
    TOKENIZER.save_pretrained(tmp_path / "checkpoint")
    named = ("user_id", "prompt", "chosen", "rejected")
    sides = zip(pairs.users, pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)
    lines = [(user, pairs.texts[i].prompt, pairs.texts[i].response, pairs.texts[j].response) for user, i, j in sides]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(dict(zip(named, line, strict=True))) + "\n" for line in lines))
    encoder = ("--encoder", f"hf:{tmp_path / 'checkpoint'}", "--no-cache")

    done = palate_command("compare", rows, *encoder, "--methods", "reference,bt", "--seeds", 1, "--out", tmp_path / "report")
    assert (done.code, "failed" in done.err) == (0, False)
    assert "reference" in done.out

    done = palate_command("fit", rows, *encoder, "--method", "reference", "--out", tmp_path / "model")
    assert done.code == 0
    assert "one reward for everybody\n" in done.err
    responses = ["Yes.", "No, and not tomorrow either.", "Perhaps."]
    given = "".join(json.dumps(response) + "\n" for response in responses)
    done = palate_command("rank", tmp_path / "model", "--prompt", "Is it?", stdin=given)
    rewards = {row["index"]: row["reward"] for row in map(json.loads, done.out.splitlines())}
    theirs = logits(model, [Text("Is it?", response) for response in responses])[:, 0]
    assert [rewards[i] for i in range(3)] == pytest.approx(theirs.tolist(), abs=1e-4)

    done = palate_command("fit", rows, "--method", "reference", "--out", tmp_path / "other")
    assert (done.code, "encoder 'style' has no scalar head" in done.err) == (2, True)
    assert not (tmp_path / "other").exists()


def test_the_bias_is_part_of_the_reward() -> None:
    assert (
        palate.Reference().like({"direction": torch.ones(3), "bias": torch.tensor(0.5)})(Dense(torch.eye(3))).tolist()
        == [1.5] * 3
    )
