"""Splits share nothing within a user, do not depend on who else is there, and agree with the reference protocols on real data."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palate.data.embeddings import OneHot
from palate.data.leaks import MAX_FORMAT_ACCURACY, LeakReport, check_conversations, check_leaks
from palate.data.pairs import Choice, EmbeddedPairs, PairSet
from palate.data.readers import load_pairs, load_valid_pairs
from palate.data.splits import SIDES, By, Split, given_split, holdout_users, nested_shots, split
from palate.errors import DataError, LeakError


def choices(seed: int, n_users: int = 9, n_prompts: int = 5, n_pairs: int = 120) -> list[Choice]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n_pairs):
        user, prompt = rng.integers(n_users), rng.integers(n_prompts)
        a, b = rng.choice(6, size=2, replace=False)
        words = (f"response {a}", f"response {b}")
        out.append(
            Choice(f"user {user}", f"p{prompt}", *words, tie=bool(rng.random() < 0.1), conversation_id=f"k{rng.integers(7)}")
        )
    return out


def embedded(pairs: PairSet) -> EmbeddedPairs:
    return EmbeddedPairs(
        OneHot(len(pairs.texts)),
        pairs.chosen,
        pairs.rejected,
        pairs.users,
        tie=pairs.tie,
        unit=pairs.conversation,
        prompts=pairs.chosen,
    )


UNITS: list[tuple[By, bool]] = [
    ("prompt", False),
    ("conversation", False),
    ("item", False),
    ("pair", False),
    ("unit", True),
    ("item", True),
    ("pair", True),
    ("prompt", True),
]


@pytest.mark.parametrize(("by", "arrays"), UNITS)
@given(
    seed=st.integers(0, 1000),
    unseen=st.sampled_from([0.0, 0.3, 0.5]),
    test=st.sampled_from([0.2, 0.5, 0.7]),
    cap=st.sampled_from([None, 2]),
)
def test_a_split_is_a_partition_without_leaks(
    by: By, arrays: bool, seed: int, unseen: float, test: float, cap: int | None
) -> None:
    texts = PairSet.from_choices(choices(seed))
    pairs = embedded(texts) if arrays else texts
    found = split(pairs, by=by, unseen=unseen, test=test, max_support=cap, max_test=cap, seed=seed)
    parts = [getattr(found, side) for side in SIDES]
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    rows = np.concatenate(parts)
    assert len(np.unique(rows)) == len(rows)
    assert len(rows) + sum(found.dropped.values()) == len(pairs)
    users = [set(pairs.users[part]) for part in parts]
    assert users[0] == users[1]
    assert users[2] == users[3]
    assert not users[0] & users[2]
    n = len(users[0]) + len(users[2])
    assert len(users[2]) == round(unseen * n)
    assert n + sum(found.dropped_users.values()) == len(pairs.user_ids)
    if cap is not None:
        assert max(np.unique(pairs.users[part], return_counts=True)[1].max(initial=0) for part in parts) <= cap
    report = check_leaks(pairs, found, by=by)
    assert report.by == by
    # The same, without any of the code above.
    chosen, rejected = np.asarray(pairs.chosen), np.asarray(pairs.rejected)
    labels: dict[str, Callable[[int], set[Any]]] = {
        "prompt": lambda r: {texts.texts[chosen[r]].prompt if not arrays else chosen[r]},
        "conversation": lambda r: {texts.conversation[r]},
        "unit": lambda r: {texts.conversation[r]},
        "item": lambda r: {chosen[r], rejected[r]},
        "pair": lambda r: {frozenset((chosen[r], rejected[r]))},
    }
    for learnt, tested in (parts[:2], parts[2:]):
        for user in set(pairs.users[learnt]):
            for what in {by, "pair"}:
                sides: list[set[Any]] = [
                    set().union(*(labels[what](r) for r in part if pairs.users[r] == user)) for part in (learnt, tested)
                ]
                assert not sides[0] & sides[1]


@pytest.mark.parametrize("by", ["prompt", "item", "pair"])
@given(seed=st.integers(0, 50))
def test_a_users_halves_depend_on_nobody_else(by: By, seed: int) -> None:
    rows = choices(seed)
    rng = np.random.default_rng(seed)
    whole = PairSet.from_choices(rows)

    def halves(some: list[Choice], user: str) -> list[list[Choice]]:
        pairs = PairSet.from_choices(some)
        found = split(pairs, by=by, seed=3, max_support=3)
        support, test = np.concatenate([found.train, found.support]), np.concatenate([found.test_seen, found.test_unseen])
        return [[some[r] for r in np.sort(part) if some[r].user_id == user] for part in (support, test)]

    for user in whole.user_ids[:2]:
        own = [choice for choice in rows if choice.user_id == user]
        others = [choice for choice in rows if choice.user_id != user]
        order = rng.permutation(len(others))
        shuffled = [others[i] for i in order[: len(order) * 2 // 3]] + own  # others gone, and in another order
        assert halves(rows, user) == halves(shuffled, user)


def test_the_same_seed_is_the_same_split_and_another_another() -> None:
    pairs = PairSet.from_choices(choices(1))
    np.random.seed(0)  # noqa: NPY002 - the global state must not matter
    one, two, other = (split(pairs, by="pair", seed=seed) for seed in (5, 5, 6))
    for side in SIDES:
        np.testing.assert_array_equal(getattr(one, side), getattr(two, side))
    assert one.train.tolist() != other.train.tolist()
    assert repr(one).startswith("Split(by pair, seed 5: train ")


def test_the_draws_are_the_documented_ones() -> None:
    # A split named by its seed is a published fact. Here its numbers are made again with Python integers, one user at a time:
    # SplitMix64's finaliser of (hash of seed, purpose and user id) + (place of the pair + 1) * (2**64 / the golden ratio).
    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    rows = choices(1)
    found = split(PairSet.from_choices(rows), by="pair", unseen=0, seed=5, test=0.4)
    for user in {choice.user_id for choice in rows}:
        key = int.from_bytes(hashlib.sha256(f"5/0/{user}".encode()).digest()[:8], "little")
        own = [frozenset((choice.prompt, side) for side in choice[2:4]) for choice in rows if choice.user_id == user]
        units = list(dict.fromkeys(own))
        draws = [mixed((key + (place + 1) * 0x9E3779B97F4A7C15) % 2**64) for place in range(len(units))]
        n_test = -(-4 * len(units) // 10)
        support = {units[k] for k in sorted(range(len(units)), key=draws.__getitem__)[: len(units) - n_test]}
        mine = [i for i, choice in enumerate(rows) if choice.user_id == user]
        assert [i for i in mine if i in found.train] == [i for i, unit in zip(mine, own, strict=True) if unit in support]


def test_halves_are_fair() -> None:
    # 2,000 users with 2 prompts each: which of the two is tested is a fair coin, and coins of different seeds are independent.
    rows = [Choice(f"u{i}", p, "a", "b") for i in range(2000) for p in ("first", "second")]
    pairs = PairSet.from_choices(rows)
    firsts = []
    for seed in (0, 1):
        found = split(pairs, by="prompt", unseen=0, seed=seed)
        firsts.append(found.train % 2 == 0)
    for first in (*firsts, firsts[0] ^ firsts[1]):
        assert abs(first.mean() - 0.5) < 4 * 0.5 / np.sqrt(2000)


def test_items_are_halved_by_kind() -> None:
    # Likes 6 items and dislikes 4: each half must hold 3 and 2 of them, whatever the draw; 12 of the 24 pairs cross.
    rows = [Choice("u", "", f"like {i}", f"dislike {j}") for i in range(6) for j in range(4)]
    for seed in range(20):
        found = split(PairSet.from_choices(rows), by="item", unseen=0, seed=seed)
        assert (len(found.train), len(found.test_seen), found.dropped["items on different sides"]) == (6, 6, 12)


def test_units_that_share_a_pair_stay_together() -> None:
    rows = [
        Choice("u", "p", pair[0], pair[1], conversation_id=k)
        for k, pair in (("1", "ab"), ("2", "ba"), ("2", "cd"), ("3", "cd"), ("4", "ef"))
    ]
    for seed in range(10):
        found = split(PairSet.from_choices(rows), by="conversation", unseen=0, seed=seed)
        assert sorted([found.train.tolist(), found.test_seen.tolist()]) == [[0, 1, 2, 3], [4]]


def test_who_has_too_little_is_dropped_and_counted() -> None:
    rows = [Choice("ties", "p", "a", "b", tie=True), Choice("ties", "q", "a", "b", tie=True), Choice("one", "p", "a", "b")]
    rows += [Choice("two", "p", "a", "b"), Choice("two", "q", "a", "b"), Choice("six", "p", "a", "b")]
    rows += [Choice("six", "q", "a", f"c{i}") for i in range(5)]
    found = split(PairSet.from_choices(rows), by="prompt", unseen=0)
    assert found.dropped_users == {"too few pairs of support": 1, "too few strict pairs to test on": 1}
    assert found.dropped["of users with too few pairs"] == 3
    with pytest.raises(DataError, match="leaves nobody: all 4 users have fewer than 9 pairs of support"):
        split(PairSet.from_choices(rows), by="prompt", min_support=9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by": "user"}, "by is 'user'"),
        ({"by": "unit"}, "a PairSet does not have; expected 'prompt'"),
        ({"unseen": 1.0}, "unseen is 1.0"),
        ({"test": 0}, "test is 0; expected a fraction below 1, above 0"),
        ({"max_test": 0}, "max_test is 0; expected 1 or more, or None"),
        ({"min_support": 0}, "min_support is 0"),
        ({"by": "conversation"}, r"rows \[0\] \(1 of 121\) have no conversation_id"),
    ],
)
def test_arguments_of_split(change: dict[str, Any], message: str) -> None:
    pairs = PairSet.from_choices([Choice("u", "p", "a", "b"), *choices(0)])
    with pytest.raises(DataError, match=message):
        split(pairs, **({"by": "pair"} | change))


def test_units_of_arrays() -> None:
    pairs = PairSet.from_choices(choices(0))
    plain = EmbeddedPairs(OneHot(len(pairs.texts)), pairs.chosen, pairs.rejected, pairs.users)
    with pytest.raises(DataError, match="EmbeddedPairs without prompts does not have; expected 'unit'"):
        split(plain, by="prompt")
    with pytest.raises(DataError, match="'conversation', which a EmbeddedPairs does not have"):
        split(plain, by="conversation")
    with pytest.raises(DataError, match="no pairs to split"):
        split(plain[np.zeros(len(plain), dtype=bool)], by="pair")


def test_a_given_split_is_used_as_it_is() -> None:
    sides = ["test_seen", "train", None, "support", "train", "test_unseen"]
    rows = [Choice("u" if i < 3 or i == 4 else "v", "p", "a", f"b{i}", split=side) for i, side in enumerate(sides)]
    pairs = PairSet.from_choices(rows)
    found = given_split(pairs)
    assert [getattr(found, side).tolist() for side in SIDES] == [[1, 4], [0], [3], [5]]
    assert (found.dropped, found.dropped_users) == ({"no split given": 1}, {"no split given": 0})
    with pytest.raises(LeakError, match=r"user's prompt is learnt from and tested on: rows 1 and 0"):
        check_leaks(pairs, found, by="prompt")
    with pytest.raises(DataError, match=r"rows \[0\] \(1 in all\) have split 'valid'"):
        given_split(PairSet.from_choices([rows[0]._replace(split="valid")]))
    with pytest.raises(DataError, match="no row has a split"):
        given_split(PairSet.from_choices([rows[2]]))


def test_held_out_users() -> None:
    pairs = PairSet.from_choices(choices(2, n_users=11))
    kept, held = holdout_users(pairs, 0.2, seed=4)
    assert len(kept) + len(held) == len(pairs)
    assert not set(pairs.users[kept]) & set(pairs.users[held])
    assert len(set(pairs.users[held])) == 2
    assert holdout_users(embedded(pairs), 0.2, seed=4)[1].tolist() == held.tolist()
    assert len(set(pairs.users[holdout_users(pairs, 0.001)[1]])) == 1
    with pytest.raises(DataError, match=r"fraction is 1.0"):
        holdout_users(pairs, 1.0)
    with pytest.raises(DataError, match="there are 1 users"):
        holdout_users(PairSet.from_choices([Choice("u", "p", "a", "b")]), 0.5)


@given(st.integers(0, 200))
def test_shots_are_nested(seed: int) -> None:
    pairs = PairSet.from_choices(choices(seed))
    counts = np.bincount(pairs.user_index)
    before: set[int] = set()
    for shots in (0, 1, 2, 5, 10, 200):
        rows = nested_shots(pairs, shots, seed)
        assert (np.diff(rows) > 0).all()
        assert np.bincount(pairs.user_index[rows], minlength=len(counts)).tolist() == np.minimum(counts, shots).tolist()
        assert before <= set(rows.tolist())
        before = set(rows.tolist())
        assert nested_shots(embedded(pairs), shots, seed).tolist() == rows.tolist()


def test_shots_of_many_users_take_no_loop() -> None:
    rng = np.random.default_rng(0)
    n = 1_000_000
    data = EmbeddedPairs(torch.zeros(2, 1), np.zeros(n, dtype=int), np.ones(n, dtype=int), rng.integers(0, 100_000, n))
    started = time.process_time()
    rows = nested_shots(data, 5)
    assert time.process_time() - started < 5  # 0.5 s on a free core; a loop over users would take a minute on this one
    assert np.bincount(data.user_index.numpy()[rows]).max() == 5
    with pytest.raises(DataError, match="shots is -1"):
        nested_shots(data, -1)


# --- leaks, each planted ---


def planted() -> tuple[PairSet, Split]:
    pairs = PairSet.from_choices(choices(8, n_users=6, n_pairs=90))
    return pairs, split(pairs, by="pair", seed=1)


def with_sides(base: Split, **sides: Any) -> Split:
    parts = {side: np.asarray(sides.get(side, getattr(base, side)), dtype=np.int64) for side in SIDES}
    return Split(**parts, by=base.by, seed=base.seed, dropped={}, dropped_users={})


def test_a_row_on_two_sides() -> None:
    pairs, base = planted()
    row = int(base.train[0])
    with pytest.raises(LeakError, match=rf"rows \[{row}\] \(1 in all\) stand on two sides"):
        check_leaks(pairs, with_sides(base, test_seen=np.append(base.test_seen, row)), by="pair")
    with pytest.raises(DataError, match="belongs to other data"):
        check_leaks(pairs, with_sides(base, test_seen=[len(pairs)]), by="pair")


def test_a_user_both_seen_and_unseen() -> None:
    pairs, base = planted()
    moved = int(base.train[0])
    found = with_sides(base, train=base.train[1:], test_unseen=np.append(base.test_unseen, moved))
    with pytest.raises(LeakError, match=rf"1 users are both seen and unseen: user {str(pairs.users[moved])!r}"):
        check_leaks(pairs, found, by="pair")


@pytest.mark.parametrize("swap", [False, True])
def test_the_same_pair_on_both_sides(swap: bool) -> None:
    texts = ("x", "y")
    rows = [
        Choice("u", "p", "a", "b"),
        Choice("u", "p", *texts),
        Choice("u", "p", *(("y", "x") if swap else ("x", "y"))),
        Choice("v", "p", *texts),
    ]
    pairs = PairSet.from_choices(rows)
    base = split(PairSet.from_choices(choices(0)), by="pair")
    leaking = with_sides(base, train=[0, 1], test_seen=[2], support=[3], test_unseen=[])
    with pytest.raises(LeakError, match=r"pair .* learnt from and tested on: rows 1 and 2"):
        check_leaks(pairs, leaking, by="pair")
    with pytest.raises(LeakError, match="rows 1 and 2"):
        check_leaks(embedded_plain(pairs), leaking, by="pair")
    across = with_sides(base, train=[0, 1], test_seen=[], support=[], test_unseen=[3])  # the same pair by another person is fine
    assert check_leaks(pairs, across, by="pair") == LeakReport("pair", None, None, 0)


def embedded_plain(pairs: PairSet) -> EmbeddedPairs:
    return EmbeddedPairs(OneHot(len(pairs.texts)), pairs.chosen, pairs.rejected, pairs.users)


def test_the_same_unit_on_both_sides() -> None:
    rows = [
        Choice("u", "p", "a", "b", conversation_id="k"),
        Choice("u", "p", "c", "b", conversation_id="k"),
        Choice("u", "q", "a", "b"),
    ]
    pairs = PairSet.from_choices(rows[:2])
    base = split(PairSet.from_choices(choices(0)), by="pair")
    leaking = with_sides(base, train=[0], test_seen=[1], support=[], test_unseen=[])
    for by in ("prompt", "conversation", "item"):
        with pytest.raises(LeakError, match=f"a user's {by} is learnt from and tested on: rows 0 and 1 "):
            check_leaks(pairs, leaking, by=by)
    assert check_leaks(pairs, leaking, by="pair").by == "pair"


def test_the_same_conversation_on_both_sides_under_two_prompts() -> None:
    rows = [Choice("u", f"p{i}", "a", "b", conversation_id="k" if i in (0, 2, 4) else None) for i in range(4)]
    pairs = PairSet.from_choices([*rows, Choice("v", "p4", "a", "b", conversation_id="k")])
    base = split(PairSet.from_choices(choices(0)), by="pair")
    cut = with_sides(base, train=[0, 1], test_seen=[2, 3], support=[], test_unseen=[4])  # another user's "k" is another one
    assert check_leaks(pairs, cut, by="prompt").by == "prompt"
    with pytest.raises(LeakError, match=r"a user's conversation is learnt from and tested on: rows 0 and 2 \(1 tested rows"):
        check_conversations(pairs, cut)
    check_conversations(pairs, with_sides(base, train=[0, 1, 2], test_seen=[3], support=[], test_unseen=[4]))


def test_identical_texts() -> None:
    pairs = PairSet.from_choices([Choice("u", "p", "a", "b"), Choice("u", "p", "c", "c "), Choice("u", "q", "a", "b")])
    base = split(PairSet.from_choices(choices(0)), by="pair")
    with pytest.raises(LeakError, match=r"rows \[1\] \(1 in all\) compare a text with itself"):
        check_leaks(pairs, with_sides(base, train=[0, 1], test_seen=[2], support=[], test_unseen=[]), by="prompt")


WORDS = ("rain", "sun", "wind", "snow", "fog", "hail", "heat", "frost")


def worded(seed: int, n: int = 400) -> list[Choice]:
    """Choices between texts of many forms, lists and quotes among them, by people who like their texts long."""
    rng = np.random.default_rng(seed)
    forms = ("{}", "{}\n- {}\n- {}", "'{}', he said.", "[{}] {}", "{} (and {})", "{}\n", "User: {}")
    out = []
    for i in range(n):
        texts = [
            forms[rng.integers(len(forms))].format(*rng.permutation(WORDS)) + " " + " ".join(rng.choice(WORDS, k))
            for k in rng.integers(3, 60, 2)
        ]
        texts.sort(key=lambda text: -len(text) * (1 if rng.random() < 0.95 else -1))
        out.append(Choice(f"u{i % 20}", f"p{i % 40}", texts[0], texts[1]))
    return out


def test_formatting_that_says_nothing_passes_and_length_is_a_taste() -> None:
    pairs = PairSet.from_choices(worded(0))
    report = check_leaks(pairs, split(pairs, by="prompt"), by="prompt")
    assert report.n_probed == len(pairs)
    assert report.format_accuracy is not None
    assert report.format_accuracy < 0.65
    assert report.length_accuracy is not None
    assert report.length_accuracy > 0.8  # reported, not refused


FORMATTERS: dict[str, Callable[[str, str], tuple[str, str]]] = {
    "list": lambda chosen, rejected: (chosen, f"['{rejected}', '{rejected[::-1]}']"),
    "space": lambda chosen, rejected: (chosen.strip() + " ", rejected.strip()),
    "role": lambda chosen, rejected: (chosen, f"Assistant: {rejected}"),
    "repr": lambda chosen, rejected: (chosen, repr(rejected + "\n")),
    "html": lambda chosen, rejected: (chosen, rejected + " &amp; more"),
}


@pytest.mark.parametrize("kind", FORMATTERS)
@pytest.mark.parametrize("n_prompts", [40, 1])  # cross-validated by prompt, or by user
def test_sides_written_by_different_code(kind: str, n_prompts: int) -> None:
    rows = worded(1)
    written = [c._replace(prompt=f"p{i % n_prompts}") for i, c in enumerate(rows)]
    written = [c._replace(chosen=a, rejected=b) for c in written for a, b in [FORMATTERS[kind](c.chosen, c.rejected)]]
    pairs = PairSet.from_choices(written)
    with pytest.raises(
        LeakError, match=r"formatting alone tells chosen from rejected in (8|9|10)\d%.*as in rows \[\d+, .*same code"
    ):
        check_leaks(pairs, split(pairs, by="pair"), by="pair")
    believed = check_leaks(pairs, split(pairs, by="pair"), by="pair", believe_format=True)  # people may really prefer it so
    assert believed.format_accuracy is not None
    assert believed.format_accuracy > 0.75


# --- real data, against the protocols that the figures of this field's reference use ---


@pytest.fixture(scope="module")
def reference(shared: Path, script: Callable[[Path], ModuleType]) -> ModuleType:
    path = shared.parent / "tools" / "splits.py"
    if not path.is_file():
        pytest.skip("the reference splits are not on this machine")
    return script(path)


def sizes(pairs: PairSet, found: Split) -> dict[str, tuple[int, int]]:
    users = pairs.users
    support = np.unique(users[np.concatenate([found.train, found.support])], return_counts=True)
    test = dict(zip(*np.unique(users[np.concatenate([found.test_seen, found.test_unseen])], return_counts=True), strict=True))
    return {user: (int(n), int(test[user])) for user, n in zip(*support, strict=True)}


def honest(report: LeakReport) -> None:
    assert report.format_accuracy is not None
    assert report.format_accuracy < MAX_FORMAT_ACCURACY - 0.1


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the reference leaves its files open
def test_polis_as_the_reference(shared: Path, reference: ModuleType) -> None:
    _, users, _ = reference.polis(shared / "polis-ssis", seed=0)
    pairs = load_pairs(shared / "polis-ssis")
    found = split(pairs, by="item", max_support=40, max_test=40)
    expected = sorted((len(support[0]), len(test[0])) for support, test in users.values())
    assert sorted(sizes(pairs, found).values()) == expected
    assert (len(np.unique(pairs.user_index[found.train])), len(np.unique(pairs.user_index[found.support]))) == (154, 154)
    honest(check_leaks(pairs, found, by="item"))


def test_prism_as_the_reference(shared: Path, reference: ModuleType) -> None:
    file = shared / "prism-subset" / "pairs.jsonl.gz"
    pairs, report = load_valid_pairs(file)
    bad = {row.line for row in report.bad_rows}
    rows = [row for line, row in enumerate(reference.read_jsonl(file), 1) if line not in bad]
    _, users = reference.by_prompt(rows, lambda keys: None)
    n_prompts = np.array([len(np.unique(pairs.prompt_index[pairs.user_index == u])) for u in range(len(pairs.user_ids))])
    pairs = pairs[n_prompts[pairs.user_index] >= 4]
    found = split(pairs, by="prompt")
    mine = sizes(pairs, found)
    assert set(mine) == set(users)
    assert {user: sum(n) for user, n in mine.items()} == {user: len(s[0]) + len(t[0]) for user, (s, t) in users.items()}
    for user in range(len(pairs.user_ids)):  # halves of the prompts, the odd one on the test side
        own = pairs.user_index == user
        sides = [np.concatenate([found.train, found.support]), np.concatenate([found.test_seen, found.test_unseen])]
        support, test = (len(np.unique(pairs.prompt_index[side[own[side]]])) for side in sides)
        assert support == (support + test) // 2
    honest(check_leaks(pairs, found, by="prompt"))


def test_convarg_as_the_reference(shared: Path, reference: ModuleType) -> None:
    file = shared / "convarg" / "pairs.jsonl.gz"
    pairs, report = load_valid_pairs(file)
    bad = {row.line for row in report.bad_rows}
    rows = [row for line, row in enumerate(reference.read_jsonl(file), 1) if line not in bad]
    _, users = reference.at_random(rows, lambda keys: None)
    strict = pairs[~pairs.tie]
    found = split(strict, by="pair", max_support=60, max_test=100, min_support=10, min_test=10)
    assert sizes(strict, found) == {user: (len(support[0]), len(test[0])) for user, (support, test) in users.items()}
    honest(check_leaks(strict, found, by="pair"))
    with_ties = split(pairs, by="pair")
    honest(check_leaks(pairs, with_ties, by="pair"))
