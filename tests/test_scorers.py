"""Scores as features, and the model that learns how people weigh them: planted weights, and oracles that know the population."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

import palate
from palate.data.pairs import Choice, EmbeddedPairs, Message, PairSet, Text
from palate.data.planted import one_crowd
from palate.encoders import restore_encoder
from palate.encoders.scorers import Scorers, TableScorers, read_references
from palate.errors import DataError, MismatchError, MissingExtraError, ModelFileError
from palate.models.given import GivenBases, dirichlet_mode
from palate.solvers import Batch, posterior

Floats = NDArray[np.float64]
K = 10
TURNS = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Tea?"))
ROWS: list[dict[str, Any]] = [
    {"prompt": "Tea?", "response": "Yes.", "score_kind": 1.5, "score_short": -2},
    {"prompt": [{"role": "user", "content": "Tea?"}], "response": "No.", "score_kind": -0.25, "score_short": 0.0},
    {
        "prompt": [{"role": turn.role, "content": turn.content} for turn in TURNS],
        "response": "Oh, \u00e9",
        "score_kind": 3,
        "score_short": 7,
    },
]
TEXTS = [Text("Tea?", "Yes."), Text((Message("user", "Tea?"),), "No."), Text(TURNS, "Oh, \u00e9")]
SCORES = [[1.5, -2.0], [-0.25, 0.0], [3.0, 7.0]]


def scores(encoder: palate.Encoder, texts: list[Text] = TEXTS) -> list[list[float]]:
    rows: list[list[float]] = encoder.encode(texts).rows(torch.arange(len(texts))).tolist()
    return rows


# -- tables


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"scores.{kind}"
    lines = "\n".join(json.dumps(row) for row in rows)
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            out = csv.DictWriter(file, list(rows[0]))
            out.writeheader()
            out.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet", "rows"])
def test_a_table_gives_every_text_its_own_scores(kind: str, tmp_path: Path) -> None:
    plain = [{**row, "prompt": text.prompt_text} for row, text in zip(ROWS, TEXTS, strict=True)]
    encoder = TableScorers(ROWS if kind == "rows" else written(tmp_path, kind, ROWS if kind.startswith("json") else plain))
    assert encoder.names == ("kind", "short")
    assert scores(encoder, TEXTS[::-1]) == SCORES[::-1]
    assert len(encoder) == 3
    assert encoder.fingerprint == TableScorers(plain[::-1]).fingerprint  # whatever the order and the file


def test_a_text_without_scores_is_named_and_is_not_zero() -> None:
    with pytest.raises(DataError, match=r"2 texts have no scores, such as the response 'Maybe\.' to 'Tea\?'; expected a row"):
        scores(TableScorers(ROWS), [*TEXTS, Text("Tea?", "Maybe."), Text("Coffee?", "Yes."), Text("Tea?", "Maybe.")])


def test_columns_are_taken_as_they_are_asked_for() -> None:
    encoder = TableScorers(ROWS, columns=["score_short", "score_kind"])
    assert encoder.names == ("score_short", "score_kind")
    assert scores(encoder) == [row[::-1] for row in SCORES]
    assert encoder.fingerprint != TableScorers(ROWS).fingerprint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"score_short": None}, "line 4: score_short is None; expected a finite number"),
        ({"score_short": "nan"}, "score_short is 'nan'"),
        ({"score_short": 1e300}, r"score_short is 1e\+300"),
        ({"score_short": True}, "score_short is True"),
        ({"response": ["No."]}, r"the response is \['No\.'\]; expected a text"),
        ({"prompt": None}, "the prompt is None; expected a text, or turns"),
        ({"prompt": [{"role": "user"}]}, "the prompt is .*; expected a text, or turns"),
        ({"response": "Yes."}, r"the response 'Yes\.' has other scores \(0\.0, 0\.0\) than in an earlier row"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row: dict[str, Any], message: str) -> None:
    good = {"prompt": "Tea?", "response": "Of course.", "score_kind": 0, "score_short": 0}
    with pytest.raises(DataError, match=message):
        TableScorers([*ROWS, good | row])


def test_files_that_are_no_tables_of_scores(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(ROWS[0]) + "\n{half\n")
    csv_file = tmp_path / "other.csv"
    csv_file.write_text("prompt,answer\na,b\n")
    attempts: list[tuple[Callable[[], object], str]] = [
        (lambda: TableScorers(tmp_path / "nowhere.jsonl"), "does not exist"),
        (lambda: TableScorers(broken), r"broken\.jsonl, line 2: not JSON"),
        (lambda: TableScorers(csv_file), "has no column response; its columns are prompt, answer"),
        (
            lambda: TableScorers([{"prompt": "a", "response": "b", "kind": 1}]),
            "expected some that begin with 'score_', or columns=",
        ),
        (lambda: TableScorers([]), "the rows has no rows|has no rows"),
        (lambda: TableScorers([3]), "the row is 3; expected an object"),
        (lambda: TableScorers(ROWS, columns=[]), r"columns are \[\]; expected at least one name"),
        (lambda: TableScorers(ROWS, columns=["score_kind"] * 2), "each once"),
        (lambda: TableScorers.from_spec("x", {"column": "a"}), "no option 'column'"),
    ]
    for attempt, message in attempts:
        with pytest.raises(DataError, match=message):
            attempt()


def test_a_saved_table_is_read_again_and_a_changed_one_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "jsonl", ROWS)
    encoder = palate.load_encoder(f"scores:{path}?columns=score_short,score_kind")
    assert isinstance(encoder, TableScorers)
    again = TableScorers.restore(json.loads(json.dumps(encoder.state())))
    assert (again.fingerprint, again.spec, again.state()) == (encoder.fingerprint, encoder.spec, encoder.state())
    assert scores(again) == scores(encoder)
    moved = path.rename(tmp_path / "moved.jsonl")
    assert TableScorers(moved, columns=["score_short", "score_kind"]).fingerprint == encoder.fingerprint
    with pytest.raises(ModelFileError, match="which is not there; put the file back"):
        TableScorers.restore(encoder.state())
    written(tmp_path, "jsonl", [*ROWS[:2], {**ROWS[2], "score_short": 7.001}])
    with pytest.raises(MismatchError, match="holds other scores than when the encoder was saved"):
        TableScorers.restore(encoder.state())
    with pytest.raises(ModelFileError, match="rows in memory"):
        TableScorers.restore(TableScorers(ROWS).state())


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = written(tmp_path, "parquet", [{"prompt": "a", "response": "b", "score_x": 1.0}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'palate\[data\]'"):
        TableScorers(path)


# -- functions


def rubric(prompt: Any, response: str) -> list[float]:
    return [float(len(response)), float(response.count("."))]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_function_is_asked_once_for_every_text(workers: int) -> None:
    asked: list[str] = []

    def counted(prompt: Any, response: str) -> list[float]:
        asked.append(response)
        return rubric(prompt, response)

    encoder = Scorers("rubric", counted, names=["length", "stops"], version="1", workers=workers)
    texts = [Text("", "a" * i + ".") for i in range(150)]
    assert scores(encoder, texts + texts[:20]) == [[i + 1.0, 1.0] for i in [*range(150), *range(20)]]
    assert sorted(asked) == sorted(text.response for text in texts)
    assert encoder.encoded == 150


def test_what_changes_a_score_changes_the_fingerprint() -> None:
    def made(**changes: Any) -> str:
        options = {"name": "rubric", "names": ["length", "stops"], "version": "1", "references": None} | changes
        return Scorers(options.pop("name"), rubric, **options).fingerprint

    prints = [
        made(),
        made(name="other"),
        made(names=["stops", "length"]),
        made(version="2"),
        made(references={"Tea?": "Yes."}),
        made(references={"Tea?": "No."}),
    ]
    assert len(set(prints)) == len(prints)
    assert made() == prints[0]
    with pytest.raises(ModelFileError, match=r"calls the function 'rubric' \(version 1\), which no file holds"):
        Scorers.restore(Scorers("rubric", rubric, names=["a", "b"], version="1").state())


def test_closeness_to_a_reference_answer(tmp_path: Path) -> None:
    def closeness(prompt: Any, response: str, reference: str) -> list[float]:
        a, b = set(response.lower().split()), set(reference.lower().split())
        return [len(a & b) / len(a | b)]

    path = tmp_path / "references.jsonl"
    path.write_text(
        '{"prompt": "Tea?", "reference": "yes please"}\n{"prompt": [{"role": "user", "content": "Sea?"}], "reference": "no"}\n'
    )
    encoder = Scorers("overlap", closeness, names=["closeness"], version="1", references=read_references(path))
    texts = [Text("Tea?", "Yes please"), Text("Tea?", "no"), Text((Message("user", "Sea?"),), "no thanks")]
    assert scores(encoder, texts) == [[1.0], [0.0], [0.5]]
    with pytest.raises(DataError, match=r"the prompt 'Coffee\?' has no reference answer"):
        scores(encoder, [Text("Coffee?", "no")])
    for rows, message in (
        ([{"prompt": "a", "reference": 3}], "line 1: the reference is 3; expected a text"),
        ([{"prompt": "a", "reference": "x"}, {"prompt": "a", "reference": "y"}], "line 2: the prompt 'a' has a second"),
    ):
        with pytest.raises(DataError, match=message):
            read_references(rows)


@pytest.mark.parametrize("given", [[1.0], [1.0, float("nan")], 3.0, [1.0, "x"], None])
def test_what_is_no_score_is_an_error(given: Any) -> None:
    encoder = Scorers("rubric", lambda prompt, response: given, names=["length", "stops"], version="1")
    with pytest.raises(DataError, match=r"rubric gave .* for the response 'Yes\.'; expected 2 finite numbers: length, stops"):
        scores(encoder, TEXTS[:1])


def test_functions_without_names_or_version() -> None:
    for options in ({"names": []}, {"names": "ab"}, {"names": ["a", "a"]}, {"version": ""}, {"workers": 0}):
        with pytest.raises(DataError, match="expected"):
            Scorers("rubric", rubric, **({"names": ["a", "b"], "version": "1"} | options))


# -- the labels of a classifier


def test_all_the_labels_of_a_classifier_are_scores(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    from palate.encoders.huggingface import HuggingFace
    from palate.encoders.labels import LabelScores

    alphabet = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    template = "{% for turn in messages %}{{ turn['role'] }}:{{ turn['content'] }}<end>{% endfor %}"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, pad_token="<pad>", eos_token="<end>"
    )
    labels = {0: "helpful", 1: "correct", 2: "short"}
    config = transformers.Qwen2Config(
        **{"vocab_size": len(alphabet), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1},
        **{"num_labels": 3, "id2label": labels},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen2ForSequenceClassification(config).eval()
        model.score.weight.data.normal_()
    encoder = LabelScores(HuggingFace.from_model(model, tokenizer))
    assert encoder.names == ("helpful", "correct", "short")
    texts = [*TEXTS, *(Text("Tea?", "more " * i) for i in range(1, 6))]
    alone = []
    for text in texts:
        turns = [("user", text.prompt)] if isinstance(text.prompt, str) else list(text.prompt)
        ids = [i for role, said in [*turns, ("assistant", text.response)] for i in [*tokenizer(f"{role}:{said}")["input_ids"], 1]]
        with torch.no_grad():
            alone.append(model(input_ids=torch.tensor([ids])).logits[0])
    torch.testing.assert_close(torch.tensor(scores(encoder, texts)), torch.stack(alone), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = palate.load_encoder(f"labels:{tmp_path}")
    assert scores(loaded, texts) == scores(encoder, texts)
    assert restore_encoder(json.loads(json.dumps(loaded.state()))).fingerprint == loaded.fingerprint
    before = encoder.fingerprint
    with torch.no_grad():
        model.score.weight.mul_(1.5)
    assert LabelScores(HuggingFace.from_model(model, tokenizer)).fingerprint != before


# -- how people weigh scores


class World(NamedTuple):
    """Users with known weights over ten scorers that agree in part, and logistic choices between two answers."""

    weights: Floats  # (U, K)
    support: EmbeddedPairs
    z: Floats  # (U, n, K) differences of the support
    test: EmbeddedPairs
    asked: Floats  # (U, m, K) differences of the test


def world(weights: Floats, n: int, m: int, seed: int) -> World:
    rng, users = np.random.default_rng(seed), len(weights)
    shape = (users, n + m, 2)
    table = np.sqrt(0.5) * rng.standard_normal((*shape, 1)) + np.sqrt(0.5) * rng.standard_normal((*shape, K))
    margin = np.einsum("upk,uk->up", table[:, :, 0] - table[:, :, 1], weights)
    first = rng.random(margin.shape) < 1 / (1 + np.exp(-margin))
    rows = np.arange(users * (n + m) * 2).reshape(shape)
    chosen, rejected = np.where(first, rows[..., 0], rows[..., 1]), np.where(first, rows[..., 1], rows[..., 0])
    units = np.geomspace(0.1, 10, K)  # scorers come in any unit
    flat = table.reshape(-1, K)
    names = np.repeat([f"u{i:03d}" for i in range(users)], n + m).reshape(users, -1)

    def part(columns: slice) -> tuple[EmbeddedPairs, Floats]:
        sides = chosen[:, columns].ravel(), rejected[:, columns].ravel()
        z = (flat[sides[0]] - flat[sides[1]]).reshape(users, -1, K)
        return EmbeddedPairs((flat * units).astype(np.float32), *sides, names[:, columns].ravel(), unit=None), z

    return World(weights, *part(slice(0, n)), *part(slice(n, None)))


def mixed(users: int, seed: int, alpha: float = 0.1, size: float = 3.0) -> Floats:
    return size * np.random.default_rng(seed).dirichlet(np.full(K, alpha), users)


SHAPE = np.random.default_rng(99)
MEAN, ROOT = 0.45 * SHAPE.standard_normal(K), 0.2 * SHAPE.standard_normal((K, K)) + np.diag(np.linspace(1.5, 0.15, K))


def signed(users: int, seed: int) -> Floats:
    return MEAN + np.random.default_rng(seed).standard_normal((users, K)) @ ROOT.T


def knowing_the_dirichlet(z: Floats) -> Floats:
    """(U, K) posterior means under the true population, by importance sampling."""
    draws = mixed(20_000, 5)
    out = []
    for mine in z:
        log = -np.logaddexp(0, -(draws @ mine.T)).sum(1)
        share = np.exp(log - log.max())
        out.append(share @ draws / share.sum())
    return np.stack(out)


def knowing_the_gaussian(z: Floats) -> Floats:
    batch = Batch(torch.from_numpy(z), torch.zeros(z.shape[:2]).double(), torch.ones(z.shape[:2]).double(), None)
    prior = palate.priors.Prior.gaussian(torch.from_numpy(ROOT @ ROOT.T), torch.from_numpy(MEAN))
    return np.asarray(posterior(batch, prior).mean)


def accuracy(model: palate.RewardModel, data: World) -> float:
    return float((palate.margins(model, data.test, palate.adapt(model, data.support)) > 0).double().mean())


@pytest.mark.parametrize(
    ("population", "oracle", "kind"), [(mixed, knowing_the_dirichlet, "simplex"), (signed, knowing_the_gaussian, "signed")]
)
def test_planted_weights_are_found_from_twenty_choices(
    population: Callable[[int, int], Floats], oracle: Callable[[Floats], Floats], kind: str
) -> None:
    """Within a point of who knows the true population (and only the same twenty choices), and far above one reward for all."""
    train, unseen = world(population(200, 0), 20, 1, 1), world(population(150, 2), 20, 120, 3)
    model = palate.fit(train.support, palate.GivenBases())
    assert model.record["selection"]["chosen"]["weights"] == kind
    assert model.n_weights == K
    best = float((np.einsum("upk,uk->up", unseen.asked, oracle(unseen.z)) > 0).mean())
    ours, crowd = accuracy(model, unseen), accuracy(palate.fit(train.support, palate.BradleyTerry()), unseen)
    assert ours > best - 0.01
    assert ours > crowd + 0.03


@pytest.mark.parametrize(("population", "kind"), [(mixed, "simplex"), (signed, "signed")])
def test_a_profile_is_the_weights_themselves(population: Callable[[int, int], Floats], kind: Any) -> None:
    train, unseen = world(population(150, 0), 20, 1, 1), world(population(100, 2), 150, 1, 3)
    profiles = palate.adapt(palate.fit(train.support, palate.GivenBases(kind)), unseen.support)
    assert bool(profiles.converged.all())
    if kind == "simplex":
        torch.testing.assert_close(profiles.mean.sum(1), torch.ones(100))
        assert float(profiles.mean.min()) >= 0
    assert np.corrcoef(profiles.mean.numpy().ravel(), unseen.weights.ravel())[0, 1] > 0.9
    each = [np.corrcoef(ours, planted)[0, 1] for ours, planted in zip(profiles.mean.numpy(), unseen.weights, strict=True)]
    assert np.mean(each) > 0.9


def test_where_nobody_differs_it_is_bradley_terry() -> None:
    planted = one_crowd(0, n_users=40, dim=4)
    model, crowd = palate.fit(planted.train, palate.GivenBases()), palate.fit(planted.train, palate.BradleyTerry())
    assert (model.n_weights, model.record["selection"]["chosen"]["weights"]) == (0, "crowd")
    ours, theirs = (palate.margins(one, planted.test_unseen) for one in (model, crowd))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["signed", "simplex"])
def test_who_said_nothing_gets_the_crowds_reward(kind: Any) -> None:
    train = world(mixed(30, 0), 12, 5, 1)
    model, crowd = palate.fit(train.support, palate.GivenBases(kind)), palate.fit(train.support, palate.BradleyTerry())
    torch.testing.assert_close(palate.margins(model, train.test), palate.margins(crowd, train.test), atol=1e-5, rtol=1e-4)


def test_the_unit_of_a_score_does_not_matter_unless_it_is_asked_to() -> None:
    train = world(mixed(30, 0), 8, 5, 1)
    units = torch.from_numpy(np.geomspace(30, 0.2, K)).float()

    def margins(kind: Any, standardise: bool, factor: Any) -> torch.Tensor:
        table = train.support.embeddings.rows(torch.arange(len(train.support.embeddings))) * factor
        support, test = (EmbeddedPairs(table, part.chosen, part.rejected, part.users) for part in (train.support, train.test))
        model = palate.fit(support, palate.GivenBases(kind, standardise=standardise))
        return palate.margins(model, test, palate.adapt(model, support))

    for kind in ("signed", "simplex"):
        torch.testing.assert_close(margins(kind, True, 1.0), margins(kind, True, units), atol=2e-3, rtol=2e-3)
    assert (margins("simplex", False, 1.0) - margins("simplex", False, units)).abs().max() > 0.1
    torch.testing.assert_close(margins("simplex", False, 1.0), margins("simplex", False, 7.0), atol=2e-3, rtol=2e-3)


def test_the_mode_on_the_simplex_is_where_another_optimiser_ends() -> None:
    rng, a = np.random.default_rng(0), np.array([0.05, 0.4, 1.0, 0.02])
    z, weight, tie = rng.standard_normal((5, 9, 4)) * 3, rng.choice([0.0, 0.5, 2.0], (5, 9)), rng.random((5, 9)) < 0.2
    offset = rng.standard_normal((5, 9))
    solved = dirichlet_mode(Batch(*map(torch.from_numpy, (z, offset, weight, tie))), torch.from_numpy(a))
    assert bool(solved.converged.all())
    for user in range(5):

        def objective(logits: Floats, user: int = user) -> float:
            margin = offset[user] + z[user] @ softmax(logits)
            loss = np.logaddexp(0, -margin) + np.where(tie[user], margin / 2, 0)
            return float(weight[user] @ loss - a @ log_softmax(logits))

        found = minimize(objective, np.log(a), method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(solved.mean[user], softmax(found.x), atol=2e-5)


def test_who_said_nothing_has_the_mean_of_the_dirichlet() -> None:
    a = torch.tensor([0.2, 0.5, 0.05])
    nothing = Batch(torch.zeros(2, 1, 3), torch.zeros(2, 1), torch.zeros(2, 1), None)
    torch.testing.assert_close(dirichlet_mode(nothing, a).mean, (a / a.sum()).expand(2, -1))


def test_arguments_that_make_no_model() -> None:
    with pytest.raises(DataError, match="weights is 'any'; expected one of signed, simplex, or None to choose"):
        GivenBases("any")  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    wide = EmbeddedPairs(rng.standard_normal((6, 257)), [0, 1, 2], [3, 4, 5], ["a", "b", "c"])
    with pytest.raises(DataError, match=r"embeddings have 257 columns; .* takes at most 256 scores\. Use Hierarchical"):
        palate.fit(wide, GivenBases())


# -- all the way


def test_from_a_file_of_scores_to_a_ranking(tmp_path: Path, palate_command: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    rows, choices = [], []
    for p in range(60):
        table = rng.standard_normal((2, 3))
        for side in range(2):
            rows.append({"prompt": f"prompt {p}", "response": f"answer {side}"})
            rows[-1] |= {f"score_{name}": table[side, i] for i, name in enumerate(("kind", "short", "true"))}
        for u in range(20):
            taste = (2.5, -2.5)[u % 2] * table[:, 1] + table[:, 2]
            first = bool(rng.random() < 1 / (1 + np.exp(taste[1] - taste[0])))
            choices.append(Choice(f"u{u:02d}", f"prompt {p}", f"answer {1 - first}", f"answer {int(first)}"))
    encoder = TableScorers(rows)
    pairs = PairSet.from_choices(choices)
    model = palate.fit(encoder.embed(pairs), palate.GivenBases())
    profiles = palate.adapt(model, encoder.embed(pairs))
    assert profiles["u00"].mean[1] > 0.5 > -0.5 > profiles["u01"].mean[1]
    scorer = palate.Scorer(encoder, model)
    for user, sign in (("u00", 1), ("u01", -1)):
        best = scorer.rank("prompt 3", ["answer 0", "answer 1"], profiles[user])[0]["corpus_id"]
        taste = [sign * 2.5 * row["score_short"] + row["score_true"] for row in rows[6:8]]
        assert best == int(np.argmax(taste))
    table, said = written(tmp_path, "jsonl", rows), tmp_path / "choices.jsonl"
    said.write_text(
        "\n".join(
            json.dumps({"user_id": c.user_id, "prompt": c.prompt, "chosen": c.chosen, "rejected": c.rejected}) for c in choices
        )
    )
    options = ("--encoder", f"scores:{table}", "--method", "scorers", "--out", tmp_path / "model")
    assert palate_command("fit", said, *options).code == 0
    assert type(palate.load_model(tmp_path / "model")).__name__ == "GivenBases"
