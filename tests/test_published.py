"""People who come from the MRM repository: their files, their splits, their checkpoints; PRISM and TL;DR as they come."""

import hashlib
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import palate
from palate.data.draws import python_order
from palate.data.embeddings import Dense
from palate.data.prism import load_prism
from palate.data.splits import given_split
from palate.data.tldr import load_tldr
from palate.errors import DataError, MismatchError, ModelFileError
from palate.models.published import PublishedPairs, load_published_mrm, load_published_pairs

Pair = dict[str, Any]


class Hostile:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def published(folder: Path, users: dict[str, list[Pair]], dim: int = 3) -> Path:
    """`V2.pt` and `V2.json` in the published shape; a pair needs its conversation, and a split where there is one."""
    row, metadata = 0, {}
    for user, pairs in users.items():
        metadata[user] = [{"prompt": "p", "chosen_score": 1.5, "rejected_score": 2.5, **pair} for pair in pairs]
        for pair in metadata[user]:
            pair["chosen_idx"], pair["rejected_idx"], row = row, row + 1, row + 2
    table = torch.randn(row, dim, generator=torch.Generator().manual_seed(1)).bfloat16()
    torch.save(table, folder / "V2.pt")
    (folder / "V2.json").write_text(json.dumps(metadata))
    return folder / "V2.pt"


@pytest.fixture
def prism(tmp_path: Path) -> Path:
    """Nine users with 1 to 9 conversations of 1 to 3 pairs, in no order of any kind."""
    rng = np.random.default_rng(3)
    users: dict[str, list[Pair]] = {}
    for n in rng.permutation(9):
        talks = [f"c{talk}-{n}" for talk in rng.permutation(n + 1)]
        users[f"user{n * 7 % 9}"] = [{"conversation_id": talk} for talk in talks for _ in range(rng.integers(1, 4))]
    return published(tmp_path, users)


@pytest.fixture
def tldr(tmp_path: Path) -> Path:
    rng = np.random.default_rng(4)
    users: dict[str, list[Pair]] = {}
    talk = 0
    for n in rng.permutation(7):
        users[f"worker-{n}"] = []
        for _ in range(12 + n):
            talk += 1
            users[f"worker-{n}"].append({"conversation_id": talk, "split": "val" if rng.random() < 0.3 else "train"})
    return published(tmp_path, users)


def mapped(file: Path) -> bool:
    return str(file) in Path("/proc/self/maps").read_text()


# -- draws


def test_shuffles_are_those_of_python() -> None:
    for seed in (0, 1, 42, 2**32 - 1, 2**32, 2**32 + 41, 8_589_934_000):
        for n in (0, 1, 2, 3, 31, 32, 33, 64, 65, 700):
            expected = list(range(n))
            random.Random(seed).shuffle(expected)
            assert python_order(seed, n) == expected, (seed, n)


# -- embedding files


def test_an_embedding_file_is_read_in_its_order_and_stays_on_disk(tmp_path: Path) -> None:
    path = published(tmp_path, {"bo": [{"conversation_id": 7}], "ada": [{"conversation_id": 5}, {"conversation_id": 5}]})
    read = load_published_pairs(path, encoder="V2")
    data, table = read.data, torch.load(path, weights_only=True)
    assert data.users.tolist() == ["bo", "ada", "ada"]
    assert (data.chosen.tolist(), data.rejected.tolist()) == ([0, 2, 4], [1, 3, 5])
    assert data.unit.tolist() == [1, 0, 0]  # labels of "7" and "5"
    assert (data.encoder, read.given, read.part.tolist()) == ("V2", False, [None] * 3)
    assert isinstance(data.embeddings, Dense)
    assert isinstance(data.embeddings.table, Tensor)
    assert data.embeddings.table.dtype == torch.bfloat16
    assert data.embeddings.table.equal(table)
    assert mapped(path)
    assert data.differences().project(torch.eye(3)).equal(table[0::2].float() - table[1::2].float())


def test_a_file_older_than_archives_is_read_too(prism: Path) -> None:
    table = torch.load(prism, weights_only=True)
    torch.save(table, prism, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(prism)
    assert load_published_pairs(prism).data.embeddings.rows(torch.arange(len(table))).equal(table.float())


def test_the_metadata_may_stand_elsewhere(prism: Path, tmp_path: Path) -> None:
    elsewhere = (tmp_path / "V2.json").rename(tmp_path / "other.json")
    assert len(load_published_pairs(prism, elsewhere).data) == len(torch.load(prism, weights_only=True)) // 2
    with pytest.raises(DataError, match=r"V2\.json is no file"):
        load_published_pairs(prism)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (torch.zeros(6), r"a tensor \(6,\) of torch.float32; expected one dense tensor"),
        (torch.zeros(6, 2, dtype=torch.int64), "of torch.int64"),
        (torch.zeros(6, 2).to_sparse(), "expected one dense tensor"),
        ({"emb": torch.zeros(6, 2)}, "holds a dict"),
        (torch.zeros(8, 2), "has 8 rows, .* uses 6 of them in 3 pairs"),
        (torch.zeros(5, 2), r"points at rows 0\.\.5 of .* which has 5"),
        (torch.full((6, 2), float("nan")), "NaN or infinite"),
        (torch.full((6, 2), float("inf")).bfloat16(), "NaN or infinite"),
        (nn.Linear(2, 2), "could run code"),
    ],
    ids=["vector", "integers", "sparse", "dict", "too long", "too short", "nan", "inf", "module"],
)
def test_tables_that_cannot_be(tmp_path: Path, content: object, match: str) -> None:
    path = published(tmp_path, {"ada": [{"conversation_id": 1}] * 2, "bo": [{"conversation_id": 2}]}, dim=2)
    torch.save(content, path)
    with pytest.raises(DataError, match=match):
        load_published_pairs(path)


def test_a_pickle_that_would_run_code_is_not_run(prism: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    for archive in (True, False):
        torch.save(Hostile(made), prism, _use_new_zipfile_serialization=archive)
        with pytest.raises(DataError, match="could run code when read"):
            load_published_pairs(prism)
        with pytest.raises(ModelFileError, match="could run code when read"):
            load_published_mrm(prism)
    assert not made.exists()
    torch.load(prism, weights_only=False)  # the file does what it threatens where it is trusted
    assert made.exists()


def test_files_that_are_cut_or_none(prism: Path, tmp_path: Path) -> None:
    whole = prism.read_bytes()
    for broken in (whole[:-200], whole[: len(whole) // 2], b"", b"PK", b"no tensor at all"):
        prism.write_bytes(broken)
        with pytest.raises(DataError, match=r"V2\.pt (cannot be read|holds something else)"):
            load_published_pairs(prism)
    with pytest.raises(DataError, match=r"nothing\.pt is no file"):
        load_published_pairs(tmp_path / "nothing.pt")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is no JSON"),
        ("[]", "holds list; expected user id"),
        ("{}", "holds nothing; expected user id"),
        ('{"ada": {}}', "user 'ada' has {}; expected a list"),
        ('{"ada": []}', r"user 'ada' has \[\]; expected a list"),
        ('{"ada": [3]}', "pair 0 of user 'ada': it is '3'"),
        ('{"ada": [{"chosen_idx": 0, "conversation_id": 1}]}', "rejected_idx is None; expected a row"),
        ('{"ada": [{"chosen_idx": true, "rejected_idx": 1, "conversation_id": 1}]}', "chosen_idx is True"),
        ('{"ada": [{"chosen_idx": 0, "rejected_idx": 1}]}', "conversation_id is None"),
        ('{"ada": [{"chosen_idx": -1, "rejected_idx": 1, "conversation_id": 1}]}', r"points at rows -1\.\.1"),
        ('{"ada": [{"chosen_idx": 0, "rejected_idx": 1, "conversation_id": 1, "split": "test"}]}', "split is 'test'"),
        (
            '{"ada": [{"chosen_idx": 0, "rejected_idx": 1, "conversation_id": 1, "split": "val"},'
            ' {"chosen_idx": 2, "rejected_idx": 3, "conversation_id": 1}]}',
            "1 of 2 pairs have no split",
        ),
    ],
)
def test_metadata_that_cannot_be(prism: Path, text: str, match: str) -> None:
    prism.with_suffix(".json").write_text(text)
    with pytest.raises(DataError, match=match):
        load_published_pairs(prism)


# -- the published splits, told again with Python's own generator and one user at a time


def halves(users: list[str], seed: int) -> tuple[list[str], list[str]]:
    users = sorted(users)
    random.Random(seed).shuffle(users)
    return users[: len(users) // 2], users[len(users) // 2 :]


def of(user: str, seed: int) -> random.Random:
    return random.Random(seed + int(hashlib.md5(user.encode()).hexdigest(), 16) % 2**32)


@pytest.mark.parametrize(("seed", "seen_limit", "unseen_limit"), [(42, None, None), (43, 2, 1), (0, None, 3)])
def test_prism_is_split_as_published(prism: Path, seed: int, seen_limit: int | None, unseen_limit: int | None) -> None:
    read = load_published_pairs(prism)
    found = read.split(seed, seen_limit=seen_limit, unseen_limit=unseen_limit)
    metadata = json.loads(prism.with_suffix(".json").read_text())
    row_of = {int(chosen): row for row, chosen in enumerate(read.data.chosen)}
    expected: list[set[int]] = []
    for users, limit in zip(halves(list(metadata), seed), (seen_limit, unseen_limit), strict=True):
        learned, tested = set(), set()
        for user in users:
            talks = list(dict.fromkeys(pair["conversation_id"] for pair in metadata[user]))
            of(user, seed).shuffle(talks)
            first, rest = talks[: len(talks) // 2][:limit], talks[len(talks) // 2 :]
            if first and rest:
                learned |= {row_of[pair["chosen_idx"]] for pair in metadata[user] if pair["conversation_id"] in first}
                tested |= {row_of[pair["chosen_idx"]] for pair in metadata[user] if pair["conversation_id"] in rest}
        expected += [learned, tested]
    four = [found.train, found.test_seen, found.support, found.test_unseen]
    assert [set(rows.tolist()) for rows in four] == expected
    assert all(len(rows) for rows in four)
    assert sum(map(len, four)) + sum(found.dropped.values()) == len(read.data)
    assert found.dropped_users == {"one side only": 1}  # the one with a single conversation
    assert (found.by, found.seed) == ("conversation", seed)


@pytest.mark.parametrize(("seed", "seen_limit", "unseen_limit"), [(42, 8, 4), (1, None, None)])
def test_tldr_is_split_as_published(tldr: Path, seed: int, seen_limit: int | None, unseen_limit: int | None) -> None:
    read = load_published_pairs(tldr)
    found = read.split(seed, seen_limit=seen_limit, unseen_limit=unseen_limit)
    metadata = json.loads(tldr.with_suffix(".json").read_text())
    expected: list[set[int]] = []
    for users, limit in zip(halves(list(metadata), seed), (seen_limit, unseen_limit), strict=True):
        learned, tested = [], []
        for user in users:
            pool = [pair["chosen_idx"] for pair in metadata[user] if pair["split"] == "train"]
            of(user, seed).shuffle(pool)
            learned += pool[:limit]
            tested += [pair["chosen_idx"] for pair in metadata[user] if pair["split"] == "val"]
        expected += [set(learned), set(tested)]
    chosen = read.data.chosen.numpy()
    four = [found.train, found.test_seen, found.support, found.test_unseen]
    assert [set(chosen[rows].tolist()) for rows in four] == expected
    assert (found.by, sum(map(len, four)) + sum(found.dropped.values())) == ("given", len(read.data))
    assert repr(read).endswith(", split)")


def test_splits_that_cannot_be(prism: Path, tmp_path: Path) -> None:
    read = load_published_pairs(prism)
    with pytest.raises(DataError, match="seed is -1"):
        read.split(-1)
    with pytest.raises(DataError, match=r"the limits are \(None, 0\)"):
        read.split(unseen_limit=0)
    (tmp_path / "one").mkdir()
    alone = published(tmp_path / "one", {"ada": [{"conversation_id": 1}], "bo": [{"conversation_id": 2}]})
    with pytest.raises(DataError, match="none of 2 users"):
        load_published_pairs(alone).split()


# -- checkpoints


class Stack(nn.Module):
    """The published model in our words: layers without activations on .01 e, mixed by the softmax of `shared_weight`."""

    def __init__(self, dim: int, widths: tuple[int, ...], bias: bool):
        super().__init__()
        sizes = (dim, *widths)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in zip(sizes, widths, strict=False))
        self.shared_weight = nn.Parameter(torch.randn(widths[-1]))

    def forward(self, e: Tensor) -> Tensor:
        e = 0.01 * e
        for layer in self.layers:
            e = layer(e)
        return e @ self.shared_weight.softmax(0)


def stack(widths: tuple[int, ...], bias: bool, dim: int = 6) -> Stack:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = Stack(dim, widths, bias)
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=3.0)
        nn.init.normal_(made.shared_weight)
    return made


@pytest.mark.parametrize(("widths", "bias", "steps"), [((2,), False, 1), ((2,), True, 3), ((5, 4, 3), True, 2)])
def test_a_checkpoint_scores_as_there(tmp_path: Path, widths: tuple[int, ...], bias: bool, steps: int) -> None:
    """Against one copy of the published model per user and torch's own Adam."""
    data = palate.EmbeddedPairs(
        100 * torch.randn(40, 6, generator=torch.Generator().manual_seed(2)), range(0, 40, 2), range(1, 40, 2), list("abbcc" * 4)
    )
    made = stack(widths, bias)
    torch.save(made.state_dict(), tmp_path / "epoch_7.pt")
    model = load_published_mrm(tmp_path / "epoch_7.pt", inner_rate=0.05, inner_steps=steps)
    profiles = palate.adapt(model, data)
    found = palate.margins(model, data, profiles)
    expected = torch.zeros(len(data))
    for number, user in enumerate(data.user_ids):
        own, copy = data.user_index == number, stack(widths, bias)
        sides = data.embeddings.rows(data.chosen[own]), data.embeddings.rows(data.rejected[own])
        adam = torch.optim.Adam([copy.shared_weight], lr=0.05)
        for _ in range(steps):
            adam.zero_grad()
            nn.functional.softplus(copy(sides[1]) - copy(sides[0])).mean().backward()
            adam.step()
        expected[own] = (copy(sides[0]) - copy(sides[1])).detach()
        assert torch.allclose(profiles[user].mean, copy.shared_weight.softmax(0), atol=1e-6)
        assert not torch.allclose(profiles[user].mean, made.shared_weight.softmax(0), atol=1e-3)  # it moved
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_converted_checkpoint_is_saved_in_our_format(tmp_path: Path) -> None:
    path = tmp_path / "epoch_7.pt"
    torch.save(stack((2,), False).state_dict(), path)
    model = load_published_mrm(path, inner_rate=5e-3, encoder="V2")
    model.save_pretrained(tmp_path / "ours")
    again = palate.load_model(tmp_path / "ours")
    assert again.fingerprint() == model.fingerprint()
    assert again.options() == palate.MRM.faithful(2, inner_rate=5e-3, outer_rate=5e-3).options()
    assert again.record["converted"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("wrap", ["module", "state_dict", "model", "heads"])
def test_other_shapes_of_the_same_checkpoint(tmp_path: Path, wrap: str) -> None:
    state: dict[str, Any] = dict(stack((3,), False).state_dict())
    other: dict[str, Any] = {wrap: state}
    if wrap == "module":
        other = {f"module.{key}": value for key, value in state.items()}
    elif wrap == "heads":
        other = {f"layers.{k}.weight": state["layers.0.weight"][k : k + 1] for k in range(3)}
        other["shared_weight"] = state["shared_weight"]
    torch.save(state, tmp_path / "plain.pt")
    torch.save(other, tmp_path / "other.pt")
    plain, found = load_published_mrm(tmp_path / "plain.pt"), load_published_mrm(tmp_path / "other.pt")
    assert found.fingerprint() == plain.fingerprint()


GOOD = {"layers.0.weight": torch.ones(2, 3), "shared_weight": torch.ones(2)}


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"V": torch.ones(2, 3), "w0": torch.ones(2)}, r"has the keys V, w0; expected layers\.0\.weight"),
        ({}, "has the keys none"),
        ({"shared_weight": torch.ones(2)}, "has the keys shared_weight; expected"),
        (GOOD | {"score.weight": torch.ones(1, 3)}, r"layers\.0\.weight, score\.weight, shared_weight; expected"),
        ({"layers.1.weight": torch.ones(2, 3), "shared_weight": torch.ones(2)}, r"has the keys layers\.1"),
        (torch.ones(2, 3), "holds a Tensor; expected a state dictionary"),
        (GOOD | {"shared_weight": torch.ones(3)}, "3 numbers in shared_weight"),
        (GOOD | {"shared_weight": torch.ones(2, 1)}, "expected matrices and a vector"),
        (GOOD | {"layers.1.weight": torch.ones(2, 4)}, "expected each layer to read"),
        (GOOD | {"layers.0.weight": torch.tensor([[float("nan")] * 3] * 2)}, r"layers\.0\.weight is no tensor of finite"),
        (GOOD | {"shared_weight": [1.0, 2.0]}, "shared_weight is no tensor"),
        (nn.Linear(3, 2), "could run code"),
    ],
)
def test_checkpoints_that_cannot_be(tmp_path: Path, state: object, match: str) -> None:
    torch.save(state, tmp_path / "epoch_1.pt")
    with pytest.raises(ModelFileError, match=match):
        load_published_mrm(tmp_path / "epoch_1.pt")


def test_embeddings_of_another_encoder_are_refused(prism: Path, tmp_path: Path) -> None:
    """The published PRISM scripts train on V1 and test on V2."""
    torch.save({"layers.0.weight": torch.ones(2, 3), "shared_weight": torch.zeros(2)}, tmp_path / "epoch_1.pt")
    model = load_published_mrm(tmp_path / "epoch_1.pt", encoder="V1")
    with pytest.raises(MismatchError, match="encoder V2 given to a model fitted on encoder V1"):
        palate.adapt(model, load_published_pairs(prism, encoder="V2").data)
    assert len(palate.adapt(model, load_published_pairs(prism, encoder="V1").data)) == 9


def test_published_pairs_are_trained_and_evaluated(prism: Path) -> None:
    read: PublishedPairs = load_published_pairs(prism)
    split = read.split()
    model = palate.fit(read.data[split.train], palate.MRM.faithful(epochs=2))
    found = palate.evaluate(model, read.data[split.support], read.data[split.test_unseen])
    assert len(found) == len(read.data[split.test_unseen].user_ids) > 2


# -- PRISM and TL;DR as they come


def said(turn: int, role: str, content: str, chosen: bool | None = None, score: int | None = None) -> Pair:
    return {"turn": turn, "role": role, "content": content, "if_chosen": chosen, "score": score}


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prism_conversations_become_choices(tmp_path: Path) -> None:
    talk = [
        said(1, "user", "And then?"),  # turns need not be in order
        said(0, "user", "Hello!"),
        said(0, "model", "Hi.", True, 80),
        said(0, "model", "Good day.", False, 30),
        said(0, "model", "Hey.", False, 90),
        said(1, "model", "Nothing.", True, 10),  # no other answer: not a choice, but part of the history
        said(2, "user", "Why?"),
        said(2, "model", "Because.", True, 50),
        said(2, "model", "No idea.", False),
    ]
    only = [said(0, "user", "Hello!"), said(0, "model", "Hi.", True)]
    rows = [{"user_id": "ada", "conversation_id": f"a{i}", "conversation_history": talk} for i in range(2)]
    rows += [{"user_id": "bo", "conversation_id": "b0", "conversation_history": talk}]
    rows += [{"user_id": "bo", "conversation_id": "b1", "conversation_history": only}]
    pairs, report = load_prism(written(tmp_path / "conversations.jsonl", *rows), min_conversations=2)
    assert (pairs.user_ids, len(pairs), report.ok) == (("ada",), 6, True)
    found = [(pairs.texts[c].prompt_text, pairs.texts[c].response, pairs.texts[r].response)
             for c, r in zip(pairs.chosen[:3], pairs.rejected[:3], strict=True)]  # fmt: skip
    assert found == [
        ("Hello!", "Hi.", "Good day."),
        ("Hello!", "Hi.", "Hey."),
        ("user: Hello!\nassistant: Hi.\nuser: And then?\nassistant: Nothing.\nuser: Why?", "Because.", "No idea."),
    ]
    assert pairs.conversation.tolist() == ["a0"] * 3 + ["a1"] * 3
    assert pairs.margin[0] == 50
    assert np.isnan(pairs.margin[1:3]).all()  # the chosen one was scored lower, or one of them was not scored
    assert len(load_prism(tmp_path / "conversations.jsonl", min_conversations=1)[0].user_ids) == 2
    with pytest.raises(DataError, match=r"none of 2 users has 6 conversations with a choice \(at most 2\)"):
        load_prism(tmp_path / "conversations.jsonl")


@pytest.mark.parametrize("line", ["<!DOCTYPE html>", "[]", '{"user_id": "ada"}', '{"user_id": 1, "conversation_id": 2, "conversation_history": [3]}'])  # fmt: skip # noqa: E501
def test_a_file_that_is_not_prism(tmp_path: Path, line: str) -> None:
    path = tmp_path / "conversations.jsonl"
    path.write_text("\n" + line + "\n")
    with pytest.raises(DataError, match=r"line 2: .*expected PRISM's conversations\.jsonl"):
        load_prism(path)


def comparison(worker: str, number: int, choice: int = 0) -> Pair:
    summaries = [{"text": f"short {number}"}, {"text": f"long {number}"}]
    return {"info": {"post": f"post {number}"}, "summaries": summaries, "choice": choice, "worker": worker}


def test_tldr_comparisons_become_choices_split_as_published() -> None:
    train = [comparison(worker, number, number % 2) for number in range(9) for worker in ("cy", "ada", "bo", "di", "eve")]
    validation = [comparison(worker, number + 50) for number in range(2) for worker in ("di", "cy", "bo", "ada")]
    pairs, report = load_tldr(train, validation, seen_limit=5, unseen_limit=3, seed=42)
    assert report.ok
    assert pairs.user_ids == ("ada", "bo", "cy", "di")  # eve is in one part only
    split = given_split(pairs)
    seen, unseen = halves(["ada", "bo", "cy", "di"], 42)
    for users, limit, learned, tested in (
        (seen, 5, split.train, split.test_seen),
        (unseen, 3, split.support, split.test_unseen),
    ):
        assert set(pairs[learned].users) == set(pairs[tested].users) == set(users)
        for user in users:
            pool = list(range(9))
            of(user, 42).shuffle(pool)
            own = pairs[learned[pairs.users[learned] == user]]
            assert {own.texts[i].prompt_text for i in own.chosen} == {f"post {i}" for i in pool[:limit]}
            odd = own.texts[own.chosen[0]]
            number = int(odd.prompt_text.split()[1])
            assert odd.response == f"{'long' if number % 2 else 'short'} {number}"
            assert int((pairs.users[tested] == user).sum()) == 2


def test_comparisons_that_cannot_be() -> None:
    good = [comparison("ada", 1)]
    with pytest.raises(DataError, match="no worker is in both parts"):
        load_tldr(good, [comparison("bo", 1)])
    with pytest.raises(DataError, match=r"validation row 0: .*choice 2"):
        load_tldr(good, [comparison("ada", 1, 2)])
    with pytest.raises(DataError, match="train row 0: KeyError"):
        load_tldr([{"worker": "ada"}], good)
    with pytest.raises(DataError, match=r"the limits are \(0, 50\)"):
        load_tldr(good, good, seen_limit=0)
