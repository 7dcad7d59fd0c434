"""Models of transformers as encoders: the same numbers however texts are batched, and no text that is not what it seems.

The oracle is a flat loop that gives one text at a time, without padding, to the model of transformers itself.
"""

import copy
import importlib.util
import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from palate.data.pairs import Choice, Message, PairSet, Text
from palate.encoders import restore_encoder
from palate.encoders.formatting import Formatter
from palate.encoders.huggingface import HuggingFace
from palate.encoders.plans import LEAST_SHARED, LIVE, by_length, by_prefix
from palate.encoders.prefixes import Reading, obstacle, rows_sharing
from palate.errors import DataError, MismatchError, MissingExtraError, ModelFileError
from palate.models.hierarchical import Hierarchical
from palate.training import fit

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("jinja2", "tokenizers", "transformers")),
    reason="the extra hf is not installed",
)

TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}<|{{ turn['role'] }}|>\n{{ turn['content'] | trim }}{{ eos_token }}\n{% endfor %}"
)
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
QUESTION = "Why is the sky blue, and why is it red in the evening when the sun goes down behind the hills?"
TEXTS = [
    *(Text(QUESTION, "Because of scattering. " * n) for n in (1, 2, 5, 11)),
    *(Text(QUESTION + " Be brief.", answer) for answer in ("Air.", "Air scatters blue.", "Air scatters blue light most.")),
    Text(
        (Message("system", "Be kind."), Message("user", QUESTION), Message("assistant", "Air."), Message("user", "More?")), "No."
    ),
    Text("Hi", "Hello!"),
    Text("", "An answer to nothing."),
]


def tokenizer(template: str | None = TEMPLATE) -> Any:
    """A small byte-level vocabulary without a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([text.prompt_text + text.response for text in TEXTS], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=template)
    wrapped.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    return wrapped


def model(name: str, seed: int = 0) -> Any:
    """Two layers of random weights, of the architecture of that name."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 420,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    grouped = {**sizes, **ends, "num_key_value_heads": 2}
    config: Any = {
        "Llama": lambda: transformers.LlamaConfig(**grouped),
        "Qwen2": lambda: transformers.Qwen2Config(**grouped),
        "Qwen3": lambda: transformers.Qwen3Config(**grouped, head_dim=8),
        "GPT2": lambda: transformers.GPT2Config(vocab_size=420, n_embd=32, n_layer=2, n_head=4, n_positions=512, **ends),
        "Mistral": lambda: transformers.MistralConfig(**grouped, sliding_window=12),
        "Bert": lambda: transformers.BertConfig(**sizes),
        "Roberta": lambda: transformers.RobertaConfig(**sizes | {"max_position_embeddings": 514}, pad_token_id=1),
    }[name.removesuffix("ForSequenceClassification").removesuffix("ForCausalLM")]()
    kind = name if "For" in name else f"{name}Model"
    if kind.endswith("Classification"):
        config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, kind)(config).eval()


def table(encoder: HuggingFace, texts: list[Text]) -> Tensor:
    return encoder.encode(texts).rows(torch.arange(len(texts)))


def flat(whole: Any, ids: list[list[int]], pooling: str = "last") -> Tensor:
    """Row by row, as transformers computes it."""
    rows = []
    for line in ids:
        with torch.no_grad():
            hidden = whole.base_model(input_ids=torch.tensor([line])).last_hidden_state[0]
        rows.append(hidden[-1] if pooling == "last" else hidden.mean(0))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer()


@pytest.fixture(scope="module")
def folder(words: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward-model")
    model("LlamaForSequenceClassification").save_pretrained(path)
    words.save_pretrained(path)
    return path


SHARING = ["Llama", "Qwen2", "Qwen3", "GPT2", "LlamaForCausalLM", "Qwen3ForSequenceClassification"]
WHOLE = {"Bert": "not causal", "Roberta": "not causal", "Mistral": "DynamicSlidingWindowLayer"}


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("name", [*SHARING, *WHOLE])
def test_features_do_not_depend_on_how_texts_are_batched(name: str, pooling: Any) -> None:
    whole, words = model(name), tokenizer()
    expected = None
    for side in ("right", "left"):
        for share in (True, False):
            words.padding_side = side
            encoder = HuggingFace.from_model(whole, words, pooling=pooling, share_prefix=share)
            if expected is None:
                expected = flat(whole, encoder.tokens(TEXTS), pooling)
                assert float(expected.std(0).min()) > 1e-3  # texts differ, so that agreement means something
            torch.testing.assert_close(table(encoder, TEXTS), expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(torch.cat([table(encoder, [text]) for text in TEXTS]), expected, atol=1e-5, rtol=0)
            with torch.no_grad():
                torch.testing.assert_close(encoder.hidden(TEXTS), expected, atol=1e-5, rtol=0)
            assert encoder.reading.side == (side if name not in ("Bert", "Roberta") else "right")
            if not share:
                assert encoder.not_shared == "switched off"
            elif name in WHOLE:
                assert WHOLE[name] in str(encoder.not_shared)
            else:
                assert encoder.not_shared is None
                # Seven texts share two prompts: one batch for them, one for the rest.
                assert [sorted(batch.rows) for batch in encoder.plan(TEXTS)] == [list(range(7)), [7, 8, 9]]


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_a_prompt_is_computed_once_for_all_its_candidates(name: str, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = HuggingFace.from_model(model(name), words)
    candidates = [Text(QUESTION, f"Answer {i}.") for i in range(8)]
    table(encoder, candidates)  # the probe
    seen: list[int] = []
    inner = encoder.model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].numel())
        return inner(*args, **kwargs)

    counting.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]
    monkeypatch.setattr(encoder.model, "forward", counting)
    table(encoder, candidates)
    ids = encoder.tokens(candidates)
    assert sum(map(len, ids)) > 3 * sum(seen)
    assert len(seen) == 2


def test_the_layer_asked_for_is_the_layer_read(words: Any) -> None:
    whole = model("Qwen3")
    ids = HuggingFace.from_model(whole, words).tokens(TEXTS)
    for layer in (0, 1, 2):
        encoder = HuggingFace.from_model(whole, words, layer=layer)
        with torch.no_grad():
            every = [whole(input_ids=torch.tensor([line]), output_hidden_states=True).hidden_states for line in ids]
        torch.testing.assert_close(table(encoder, TEXTS), torch.stack([h[layer][0, -1] for h in every]), atol=1e-5, rtol=0)
    last = HuggingFace.from_model(whole, words)
    assert torch.equal(table(last, TEXTS), table(encoder, TEXTS))
    assert last.fingerprint != encoder.fingerprint  # said differently, and nothing relies on their being equal
    with pytest.raises(DataError, match=r"layer is 3; expected None or 0 .* to 2"):
        HuggingFace.from_model(whole, words, layer=3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_half_precision_is_close_and_another_encoder(dtype: torch.dtype, tolerance: float, words: Any) -> None:
    exact, half = HuggingFace.from_model(model("Llama"), words), HuggingFace.from_model(model("Llama").to(dtype), words)
    expected, found = table(exact, TEXTS), table(half, TEXTS)
    assert half.not_shared is None
    assert found.dtype == torch.float32
    assert 0 < float((found - expected).abs().max()) < tolerance * float(expected.abs().max())
    assert half.state()["dtype"] == str(dtype).removeprefix("torch.")
    assert half.fingerprint != exact.fingerprint


def test_two_devices_give_what_one_gives_and_follow_the_weights(words: Any) -> None:
    whole = model("Llama")
    one = HuggingFace.from_model(whole, words, tokens_per_batch=64)
    two = HuggingFace.from_model(copy.deepcopy(whole), words, tokens_per_batch=64, device=["cpu", "cpu"])
    heard: list[tuple[int, int]] = []
    two.progress = lambda done, total: heard.append((done, total))
    assert len(two.plan(TEXTS)) > 3
    assert torch.equal(table(one, TEXTS), table(two, TEXTS))
    assert heard[-1] == (len(TEXTS), len(TEXTS))
    assert two.fingerprint == one.fingerprint
    with torch.no_grad():
        for parameter in (*one.model.parameters(), *two.model.parameters()):
            parameter.mul_(1.5)
    assert torch.equal(table(one, TEXTS), table(two, TEXTS))


def test_an_error_on_one_device_ends_the_run(words: Any) -> None:
    encoder = HuggingFace.from_model(model("Llama"), words, tokens_per_batch=64, device=["cpu", "cpu"])
    with torch.no_grad():
        encoder.model.norm.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="finite: False"):
        encoder.encode(TEXTS)


def test_the_probe_sees_a_cache_that_lies(words: Any) -> None:
    whole = model("Llama")
    assert obstacle(whole, Reading(), 400) is None
    real = whole.forward

    def forgetful(
        input_ids: Any, position_ids: Any = None, past_key_values: Any = None, use_cache: Any = None, **rest: Any
    ) -> Any:
        if past_key_values is not None:  # as a model that starts to count again after the cache
            position_ids = torch.zeros_like(position_ids)
        return real(input_ids, position_ids=position_ids, past_key_values=past_key_values, use_cache=use_cache, **rest)

    whole.forward = forgetful
    encoder = HuggingFace.from_model(whole, words)
    expected = flat(model("Llama"), encoder.tokens(TEXTS))
    torch.testing.assert_close(table(encoder, TEXTS), expected, atol=1e-5, rtol=0)
    assert encoder.reading.causal
    assert "a probe gave other features" in str(encoder.not_shared)


def test_a_window_longer_than_a_short_probe_is_seen(words: Any) -> None:
    """GPT-Neo counts its window over places in the cache, padded ones included, and has an ordinary cache."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 420,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": 512,
    }
    for window, reason in ((40, "a probe gave other features"), (2000, "a window of 2000 tokens")):
        config = transformers.GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], window_size=window)
        config.bos_token_id, config.eos_token_id = 0, 1
        with torch.random.fork_rng():
            torch.manual_seed(0)
            whole = transformers.GPTNeoModel(config).eval()
        encoder = HuggingFace.from_model(whole, words)
        texts = [Text(QUESTION * n, f"Answer {i}. " * i) for n in (1, 2) for i in (1, 3)]
        torch.testing.assert_close(table(encoder, texts), flat(whole, encoder.tokens(texts)), atol=1e-5, rtol=0)
        assert reason in str(encoder.not_shared)


@pytest.mark.parametrize("name", ["T5Model", "BartForSequenceClassification"])
def test_an_encoder_decoder_is_refused(name: str, words: Any, tmp_path: Path) -> None:
    import transformers

    sizes: dict[str, Any] = {
        "T5Model": {"d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
        "BartForSequenceClassification": {"encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 512},
    }[name]
    config = getattr(transformers, "T5Config" if name == "T5Model" else "BartConfig")(vocab_size=420, d_model=32, **sizes)
    whole = getattr(transformers, name)(config)
    with pytest.raises(DataError, match=f"{name} is an encoder-decoder; expected a decoder or an encoder alone"):
        HuggingFace.from_model(whole, words)
    whole.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.raises(ModelFileError, match="is an encoder-decoder"):
        HuggingFace(str(tmp_path))


def test_sharing_needs_no_equal_lengths() -> None:
    whole = model("GPT2")
    lines = [[*range(5, 30), 7, 8], [*range(5, 30), 9], [*range(40, 60), 1, 2, 3, 4]]
    for pooling in ("last", "mean"):
        found = rows_sharing(
            whole, [(lines[0][:25], [lines[0][25:], lines[1][25:]]), (lines[2][:18], [lines[2][18:]])], Reading(pooling)
        )
        torch.testing.assert_close(found.detach(), flat(whole, lines, pooling), atol=1e-5, rtol=0)


# -- plans


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60)), min_size=1, max_size=30),
    st.integers(20, 400),
)
def test_every_row_stands_in_one_batch_within_bounds(shapes: list[tuple[int, int]], budget: int) -> None:
    ids = [[prompt] * 30 + [100 + i] * rest for i, (prompt, rest) in enumerate(shapes)]
    groups, left = by_prefix(ids, [prompt for prompt, _ in shapes], budget)
    rows = [i for batch in groups for group in batch for i in group.rows]
    assert sorted(rows + left) == list(range(len(ids)))
    for batch in groups:
        for group in batch:
            start = ids[group.rows[0]][: group.prefix]
            assert group.prefix >= LEAST_SHARED
            assert all(ids[i][: group.prefix] == start and len(ids[i]) > group.prefix for i in group.rows)
        n, longest = sum(len(group.rows) for group in batch), max(len(ids[i]) for group in batch for i in group.rows)
        assert n == 1 or n * longest <= LIVE * budget + n * 60
        assert len(batch) == 1 or len(batch) * 30 <= budget
    for batch_of_rows in by_length(ids, left, budget):
        assert len(batch_of_rows) == 1 or len(batch_of_rows) * max(len(ids[i]) for i in batch_of_rows) <= budget


def test_a_plan_depends_on_the_texts_alone(words: Any) -> None:
    plans = [[batch.rows for batch in HuggingFace.from_model(model("Llama", seed), words).plan(TEXTS)] for seed in (0, 1)]
    assert plans[0] == plans[1]


# -- the formatter


def test_chat_is_the_template_and_nothing_else(words: Any) -> None:
    format = Formatter(words, None, 500)
    asked = Text((Message("system", "Be kind."), Message("user", "Hi")), " Hello! ")
    ids = format([asked]).ids[0]
    assert words.decode(ids) == "<s><|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n"
    assert ids.count(words.bos_token_id) == 1
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Hello! "},
    ]
    assert ids == words.apply_chat_template(turns)["input_ids"]
    assert format([Text("Hi", "Yes")]).ids == format([Text((Message("user", "Hi"),), "Yes")]).ids


def test_plain_is_two_lines_with_the_tokenizers_own_start() -> None:
    words = tokenizer(None)
    encoder = HuggingFace.from_model(model("GPT2"), words)
    assert encoder.state()["format"] == "plain"
    assert encoder.state()["template"] is None
    assert words.decode(encoder.tokens([Text("Hi", "Yes")])[0]) == "<s>Hi\nYes"
    with pytest.raises(DataError, match="has no chat template"):
        Formatter(words, "chat", 100)
    with pytest.raises(DataError, match="template is 'llama'"):
        Formatter(words, "llama", 100)  # type: ignore[arg-type]


def test_a_start_token_twice_is_refused(words: Any) -> None:
    twice = tokenizer("{{ bos_token }}" + TEMPLATE)
    with pytest.raises(DataError, match=r"text 0 begins with '<s>' twice"):
        HuggingFace.from_model(model("Llama"), twice).encode(TEXTS)
    plain = HuggingFace.from_model(model("Llama"), tokenizer(None))
    assert plain.tokens([Text("<s>Hi", "Yes")])[0].count(plain.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (Text("Hi", "['a', 'b']"), "text 1: the response is a list"),
        (Text("Hi", "[]"), "text 1: the response is a list"),
        (Text("Hi", '[{"role": "assistant", "content": "x"}]'), "text 1: the response is a list"),
        (Text("<s><|user|>\nHi</s>\n", "x"), r"text 1: the user turn 0 of the prompt holds '<\|user\|>' at character 3"),
        (
            Text("Before <|assistant|> after", "x"),
            r"text 1: the user turn 0 of the prompt holds '<\|assistant\|>' at character 7",
        ),
        (Text((Message("user", "Hi"), Message("assistant", "a<|user|>")), "x"), "text 1: the assistant turn 1 .* at character 1"),
        (Text("Hi", "x<|user|>"), r"text 1: the response holds '<\|user\|>' at character 1"),
    ],
)
def test_texts_that_are_not_what_they_seem(words: Any, text: Text, where: str) -> None:
    with pytest.raises(DataError, match=where):
        HuggingFace.from_model(model("Llama"), words).encode([TEXTS[0], text])


def test_headers_that_are_no_special_tokens_are_known_from_the_template() -> None:
    words = tokenizer("{% for turn in messages %}### {{ turn['role'] | title }}:\n[INST]{{ turn['content'] }}\n{% endfor %}")
    format = Formatter(words, "chat", 500)
    for response in ("### User: hi", "so [INST] it"):
        with pytest.raises(DataError, match="which only the template may write"):
            format([Text("Hi", response)])
    assert format([Text("Is x < y > z a list [1, 2]?", "[1, 2] # yes, <b>bold</b> and <pad>")]).ids


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_a_special_token_in_a_text_is_its_characters(template: str | None) -> None:
    words = tokenizer(template)
    words.add_special_tokens({"pad_token": "<pad>"})
    encoder = HuggingFace.from_model(model("Llama"), words)
    fingerprint = encoder.fingerprint
    usual = encoder.tokens(TEXTS)
    odd = [
        Text("What do <s> and </s> mean?", "<s>old</s> is new</s>"),
        Text((Message("user", "</s>"), Message("assistant", " </s><pad> "), Message("user", "Hi\U000f0000")), "<s></s> "),
        Text("Hi", "Hello!"),
    ]
    ids = encoder.tokens(odd)
    assert encoder.spelled == 2
    for text, line in zip(odd, ids, strict=True):
        written = encoder.formatter._written(0, text)
        assert words.decode(line) == ("" if template else "<s>") + written
        turns = 2 if text is not odd[1] else 4
        assert line.count(words.bos_token_id) == 1  # what the template or the tokenizer writes, and no more
        assert line.count(words.eos_token_id) == (turns if template else 0)
        assert words.pad_token_id not in line
    assert encoder.tokens(TEXTS) == usual
    assert encoder.spelled == 0
    assert encoder.fingerprint == fingerprint
    # The good texts beside it are what they are alone.
    torch.testing.assert_close(table(encoder, [*odd, *TEXTS])[3:], table(encoder, TEXTS), atol=1e-5, rtol=0)
    short = HuggingFace.from_model(model("Llama"), words, max_tokens=30)
    cut = short.tokens([Text("</s> word " * 40, "The </s> end.")])[0]
    assert (len(cut), short.truncated, short.spelled) == (30, 1, 1)
    assert cut.count(words.eos_token_id) == (2 if template else 0)


def test_what_ends_a_turn_is_told_from_what_opens_one() -> None:
    words = tokenizer("{% for turn in messages %}<s>{{ turn['role'] }}\n{{ turn['content'] }}</s>\n{% endfor %}")  # as SmolLM2
    format = Formatter(words, None, 500)
    assert format([Text("Hi", "so </s> it")]).spelled == [0]
    with pytest.raises(DataError, match="the response holds '<s>' at character 3, which only the template may write"):
        format([Text("Hi", "so <s>user")])


def test_a_special_token_that_a_template_rewrites_is_refused() -> None:
    words = tokenizer("{% for turn in messages %}<|user|>{{ turn['content'] | replace('</s>', '<s>') }}{% endfor %}")
    with pytest.raises(DataError, match="text 1 holds '</s>', which this tokenizer and its template do not let through"):
        Formatter(words, None, 500)([TEXTS[8], Text("Hi", "a</s>")])


def test_a_template_that_leaves_the_response_out_is_refused() -> None:
    deaf = TEMPLATE.replace("messages %}", "messages if turn['role'] != 'assistant' %}")
    with pytest.raises(DataError, match="does not write the response, so that all candidates would have the same features"):
        HuggingFace.from_model(model("Llama"), tokenizer(deaf))
    with pytest.raises(DataError, match="cannot be chosen"):
        HuggingFace.from_model(model("Llama"), tokenizer({"tools": TEMPLATE}))  # type: ignore[arg-type]


def test_a_long_text_loses_the_start_of_its_prompt_and_is_counted(words: Any) -> None:
    long = Text("word " * 60, "The end.")
    encoder = HuggingFace.from_model(model("Llama"), words, max_tokens=40)
    whole = HuggingFace.from_model(model("Llama"), words)
    ids, all_ids = encoder.tokens([TEXTS[8], long, Text("Hi", "word " * 60)]), whole.tokens([long])[0]
    assert (encoder.truncated, encoder.truncated_responses, whole.truncated) == (2, 1, 0)
    assert [len(line) for line in ids[1:]] == [40, 40]
    assert words.decode(ids[1]).startswith("<s><|user|>\n")
    assert words.decode(ids[1]).endswith("</s>\n<|assistant|>\nThe end.</s>\n")
    assert ids[1][-30:] == all_ids[-30:]
    assert encoder.fingerprint != whole.fingerprint
    assert encoder.tokens([Text((), "word " * 60)])[0][-30:] == whole.tokens([Text((), "word " * 60)])[0][-30:]
    with pytest.raises(DataError, match="max_tokens is 3, but the template opens with"):
        HuggingFace.from_model(model("Llama"), words, max_tokens=3).tokens([long])
    with pytest.raises(DataError, match="max_tokens is 1000; expected 2 to 512"):
        HuggingFace.from_model(model("Llama"), words, max_tokens=1000)


def test_a_date_does_not_change_features(words: Any) -> None:
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
    encoder = HuggingFace.from_model(model("Llama"), tokenizer(TEMPLATE + dated))
    assert words.decode(encoder.tokens([TEXTS[8]])[0]).endswith("</s>\n26 Jul 2024")
    assert encoder.state()["date"] == "26 Jul 2024"
    with pytest.raises(DataError, match="writes today's date"):
        HuggingFace.from_model(model("Llama"), tokenizer(TEMPLATE + "{{ strftime_now('%d') }}"))


def test_a_prompt_that_the_template_refuses() -> None:
    words = tokenizer("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TEMPLATE)
    with pytest.raises(DataError, match=r"text 7: the chat template refuses turns of \['system', .*no system turn"):
        HuggingFace.from_model(model("Llama"), words).encode(TEXTS)


def test_odd_texts_are_encoded(words: Any) -> None:
    encoder = HuggingFace.from_model(model("Llama"), words)
    assert torch.isfinite(table(encoder, [Text("\ud800", "\ud800"), Text("", ""), Text("今天", "😄\x00")])).all()
    assert encoder.encode([]).shape == (0, 32)


@pytest.mark.parametrize("name", ["Roberta", "MPNet", "GPT2"])
def test_the_longest_text_that_a_model_knows_has_a_row(name: str) -> None:
    """Positions of RoBERTa and its kin begin after the one of the padding."""
    import transformers

    if name == "MPNet":
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        whole = transformers.MPNetModel(transformers.MPNetConfig(vocab_size=420, **sizes, max_position_embeddings=514)).eval()
    else:
        whole = model(name)
    encoder = HuggingFace.from_model(whole, tokenizer(None), pooling="mean")
    assert encoder.formatter.max_tokens == 512
    assert torch.isfinite(table(encoder, [Text("word " * 600, "The end.")])).all()
    assert encoder.truncated == 1


# -- files, state, fingerprint


def test_a_folder_is_loaded_and_restored(folder: Path, words: Any) -> None:
    state = torch.get_rng_state()
    encoder = HuggingFace(str(folder))
    assert torch.equal(state, torch.get_rng_state())
    assert type(encoder.model).__name__ == "LlamaForSequenceClassification"
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    expected = flat(model("LlamaForSequenceClassification"), encoder.tokens(TEXTS))
    torch.testing.assert_close(table(encoder, TEXTS), expected, atol=1e-5, rtol=0)
    again = restore_encoder(json.loads(json.dumps(encoder.state())))
    assert again.fingerprint == encoder.fingerprint
    assert torch.equal(table(again, TEXTS), table(encoder, TEXTS))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="a folder has one version"):
        HuggingFace(str(folder), revision="main")
    with torch.no_grad():
        logits = encoder.model(**encoder.inputs(TEXTS[:1])).logits[0]
    torch.testing.assert_close(logits, encoder.model.score(table(encoder, TEXTS[:1]))[0], atol=1e-5, rtol=0)


def test_where_the_files_are_is_no_part_of_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert HuggingFace(str(moved)).fingerprint == HuggingFace(str(folder)).fingerprint


@pytest.mark.parametrize("changed", ["weights", "template", "tokenizer", "config"])
def test_a_checkpoint_that_changed_is_refused(changed: str, folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    before = HuggingFace(str(own))
    if changed == "weights":
        other = model("LlamaForSequenceClassification", seed=1)
        other.save_pretrained(own)
    elif changed == "template":
        (own / "chat_template.jinja").write_text(TEMPLATE + " ")
    elif changed == "tokenizer":
        found = json.loads((own / "tokenizer.json").read_text())
        found["model"]["merges"].pop()
        (own / "tokenizer.json").write_text(json.dumps(found))
    else:
        found = json.loads((own / "config.json").read_text())
        (own / "config.json").write_text(json.dumps(found | {"rms_norm_eps": 0.1}))
    assert HuggingFace(str(own)).fingerprint != before.fingerprint
    with pytest.raises(MismatchError, match=rf"is not what it was when the encoder was saved: .*{changed} \(saved"):
        restore_encoder(before.state())


def test_a_model_fitted_with_another_template_refuses(words: Any) -> None:
    whole = model("Llama")
    rows = [Choice(f"u{i % 3}", QUESTION, f"Answer {i}.", f"Reply {i}.") for i in range(12)]
    pairs = PairSet.from_choices(rows)
    fitted = fit(HuggingFace.from_model(whole, words).embed(pairs), Hierarchical(), seed=0)
    other = HuggingFace.from_model(whole, tokenizer(TEMPLATE.replace("\n", " "))).embed(pairs)
    fitted.check(HuggingFace.from_model(whole, words).embed(pairs).embeddings, HuggingFace.from_model(whole, words).fingerprint)
    with pytest.raises(MismatchError):
        fitted.check(other.embeddings, other.encoder)


def test_the_fingerprint_follows_weights_in_memory_and_not_how_it_runs(words: Any) -> None:
    encoder = HuggingFace.from_model(model("Llama"), words)
    before = encoder.fingerprint
    padded_left = tokenizer()
    padded_left.padding_side = "left"
    same = HuggingFace.from_model(model("Llama"), padded_left, share_prefix=False, tokens_per_batch=50)
    assert same.fingerprint == before
    same.encode(TEXTS)
    assert same.fingerprint == before
    with torch.no_grad():
        encoder.model.norm.weight[0] += 1e-3
    assert encoder.fingerprint != before
    changed = encoder.fingerprint
    encoder.model.norm.weight.data.mul_(2)  # not counted by torch
    assert encoder.fingerprint != changed
    changed = encoder.fingerprint
    encoder.model.norm.weight.data = torch.ones(32)
    assert encoder.fingerprint != changed
    assert HuggingFace.from_model(model("Llama"), words, pooling="mean").fingerprint != before
    assert "sky" not in json.dumps(encoder.state())
    with pytest.raises(ModelFileError, match="made of a model in memory"):
        restore_encoder(encoder.state())


def test_training_goes_through_hidden_and_encoding_does_not(words: Any) -> None:
    encoder = HuggingFace.from_model(model("Llama"), words)
    encoder.hidden(TEXTS).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.model.layers.parameters())
    encoder.model.train()
    with pytest.raises(DataError, match="training mode"):
        encoder.encode(TEXTS)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers the old way
def test_lora_layers_are_read(words: Any) -> None:
    peft = pytest.importorskip("peft")
    plain = HuggingFace.from_model(model("LlamaForCausalLM"), words)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model("LlamaForCausalLM"), config)
    encoder = HuggingFace.from_model(adapted, words)
    assert encoder.not_shared is None
    assert float((table(encoder, TEXTS) - table(plain, TEXTS)).abs().max()) > 1e-3
    on, features = encoder.fingerprint, table(encoder, TEXTS)
    with adapted.disable_adapter():
        assert encoder.fingerprint != on
        torch.testing.assert_close(table(encoder, TEXTS), table(plain, TEXTS), atol=1e-5, rtol=0)
    assert encoder.fingerprint == on
    adapted.merge_adapter()  # writes through .data
    assert encoder.fingerprint != on
    adapted.unmerge_adapter()
    adapted.add_adapter("other", config)
    adapted.set_adapter("other")
    both = encoder.fingerprint
    adapted.set_adapter("default")
    assert encoder.fingerprint != both
    torch.testing.assert_close(table(encoder, TEXTS), features, atol=1e-5, rtol=0)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(table(encoder, TEXTS), flat(merged, encoder.tokens(TEXTS)), atol=1e-4, rtol=0)
    assert encoder.fingerprint != plain.fingerprint


def test_weights_that_are_missing_are_not_drawn(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    own = shutil.copytree(folder, tmp_path / "own")
    weights = load_file(own / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=r"has no weights for score.weight \(1 missing"):
        HuggingFace(str(own))
    (own / "model.safetensors").rename(own / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"has no model\.safetensors; expected weights in safetensors"):
        HuggingFace(str(own))


def test_an_adapter_beside_the_weights_is_not_loaded_unseen(folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    (own / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": null}')
    with pytest.raises(ModelFileError, match="has an adapter of peft; expected a whole model"):
        HuggingFace(str(own))


def test_a_damaged_file_is_said(folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    (own / "model.safetensors").write_bytes((own / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ModelFileError, match="cannot be loaded"):
        HuggingFace(str(own))
    (own / "config.json").write_text("{")
    with pytest.raises(ModelFileError, match="cannot be loaded"):
        HuggingFace(str(own))


def test_sharded_weights_are_all_hashed(words: Any, tmp_path: Path) -> None:
    model("Qwen2ForCausalLM").save_pretrained(tmp_path, max_shard_size="20KB")
    words.save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    before = HuggingFace(str(tmp_path))
    expected = flat(model("Qwen2ForCausalLM"), before.tokens(TEXTS))
    torch.testing.assert_close(table(before, TEXTS), expected, atol=1e-5, rtol=0)
    raw = bytearray(shards[-1].read_bytes())
    raw[-1] ^= 1
    shards[-1].write_bytes(bytes(raw))
    assert HuggingFace(str(tmp_path)).fingerprint != before.fingerprint


def test_code_of_a_repository_is_not_run(folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    (own / "evil.py").write_text("raise SystemExit('it ran')\nclass Evil: ...\n")
    found = json.loads((own / "config.json").read_text())
    remote = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (own / "config.json").write_text(json.dumps(found | remote))
    with pytest.raises(ModelFileError, match="cannot be loaded"):
        HuggingFace(str(own))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: HuggingFace(str(path / "nowhere")), "there is no folder"),
        (lambda path: HuggingFace("no/such-model"), "neither a folder nor a repository of the hub that can be had"),
        (lambda path: HuggingFace(str(path), dtype="int8"), "dtype is 'int8'; expected one of float32, float16, bfloat16"),
        (lambda path: HuggingFace(str(path), pooling="max"), "pooling is 'max'"),
        (lambda path: HuggingFace(str(path), device=[]), "device is an empty list"),
        (lambda path: HuggingFace(str(path), tokens_per_batch=0), "tokens_per_batch is 0"),
    ],
)
def test_options_that_cannot_be(make: Callable[[Path], Any], message: str, folder: Path) -> None:
    with pytest.raises(DataError, match=message):
        make(folder)


def test_without_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'palate\[hf\]'"):
        HuggingFace(str(folder))
