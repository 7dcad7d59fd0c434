"""The data model keeps its promises: every text once, rows selected as they were, numbers that cannot be are refused."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palate.data.embeddings import OneHot
from palate.data.pairs import Choice, EmbeddedPairs, Message, PairSet, Text
from palate.errors import DataError

CHOICES = [
    Choice("zoe", "P", "a", "b"),
    Choice("ana", "P", "b", "a", tie=True, weight=2.0, conversation_id="k"),
    Choice("ben", "Q", "a", "c", margin=0.5, timestamp=9.0, split="train"),
    Choice("zoe", "Q", "c", "a"),
]


def test_every_text_once() -> None:
    pairs = PairSet.from_choices(CHOICES)
    assert pairs.texts == (Text("P", "a"), Text("P", "b"), Text("Q", "a"), Text("Q", "c"))
    assert pairs.user_ids == ("ana", "ben", "zoe")
    assert pairs.user_index.tolist() == [2, 0, 1, 2]
    assert pairs.prompt_index.tolist() == [0, 0, 1, 1]
    assert repr(pairs) == "PairSet(4 choices, 1 of them ties, by 3 users over 4 texts)"
    part = pairs[np.array([3, 0])]
    assert part.users.tolist() == ["zoe", "zoe"]
    assert part.texts is pairs.texts
    assert len(pairs[np.zeros(4, dtype=bool)]) == 0
    assert pairs.fingerprint() == PairSet.from_choices(CHOICES).fingerprint() != pairs[::-1].fingerprint()


def test_prompts_as_text() -> None:
    assert Text("P", "a").prompt_text == "P"
    assert Text((Message("user", "Hi"),), "a").prompt_text == "Hi"
    assert Text((Message("system", "Brief."), Message("user", "Hi")), "a").prompt_text == "system: Brief.\nuser: Hi"


def test_a_pair_of_one_text_is_refused() -> None:
    with pytest.raises(DataError, match="row 1: chosen and rejected are the same text 'b'"):
        PairSet.from_choices([CHOICES[0], Choice("ana", "P", "b", "b")])


def embedded(**changes: Any) -> EmbeddedPairs:
    arguments: dict[str, Any] = {
        "embeddings": torch.arange(15.0).reshape(5, 3),
        "chosen": [0, 4, 2, 3],
        "rejected": [1, 0, 0, 2],
        "users": ["zoe", "ana", "ana", "7"],
    }
    return EmbeddedPairs(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings": torch.full((5, 3), float("nan"))}, "NaN or infinite"),
        ({"embeddings": [[1.0]]}, "embeddings are a list"),
        ({"chosen": [0, 4, 2, 5]}, r"chosen points at rows 0..5 of a table with rows 0..4"),
        ({"rejected": [1, -1, 0, 2]}, r"rejected points at rows -1..2"),
        ({"chosen": [0.0, 1.0, 2.0, 3.0]}, r"chosen has shape \(4,\) and dtype torch.float64"),
        ({"rejected": [1, 0, 0]}, "4 chosen and 3 rejected"),
        ({"rejected": [1, 4, 0, 3]}, r"pairs \[1, 3\] compare a row with itself \(2 in all\)"),
        ({"users": ["a"]}, "1 user ids for 4 pairs"),
        ({"weight": [1, 1, 0, 1]}, "weight has minimum 0.0"),
        ({"weight": [1, 1, np.inf, 1]}, "expected finite numbers above 0"),
        ({"tie": [True]}, r"tie has shape \(1,\)"),
        ({"unit": ["a", "b"]}, r"unit has shape \(2,\)"),
        ({"prompts": [0, 1]}, "2 prompt rows for 4 pairs"),
    ],
)
def test_arrays_that_cannot_be_meant(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        embedded(**changes)


def test_selecting_grouping_and_swapping() -> None:
    data = embedded(tie=[0, 1, 0, 0], weight=[1, 2, 3, 4], unit=["x", "y", "x", "z"], prompts=[4, 4, 3, 3], encoder="f")
    assert data.user_ids == ("7", "ana", "zoe")
    assert data.unit.tolist() == [0, 1, 0, 2]
    grouped = data.grouped()
    assert grouped.order.tolist() == [3, 1, 2, 0]
    assert grouped.counts.tolist() == [1, 2, 1]
    part = data.of_users(["ana", "nobody"])
    assert (part.users.tolist(), part.weight.tolist(), part.tie.tolist()) == (["ana", "ana"], [2, 3], [True, False])
    assert part.prompts is not None
    assert (part.prompts.tolist(), part.encoder, part.user_ids) == ([4, 3], "f", ("ana",))
    swapped = data.swapped()
    assert torch.equal(swapped.differences().rows(torch.arange(4)), -data.differences().rows(torch.arange(4)))
    assert swapped.fingerprint() != data.fingerprint() == data[slice(None)].fingerprint()
    assert repr(data) == "EmbeddedPairs(4 choices by 3 users over 5 texts x 3 features)"


@given(
    st.lists(
        st.tuples(st.sampled_from("uvw"), st.sampled_from("pq"), st.sampled_from("abc"), st.sampled_from("xyz")), max_size=20
    ),
    st.data(),
)
def test_rows_are_what_went_in(events: list[tuple[str, str, str, str]], data: st.DataObject) -> None:
    pairs = PairSet.from_choices(Choice(*event) for event in events)
    rows = np.array(data.draw(st.lists(st.sampled_from(range(len(events))), max_size=9)) if events else [], dtype=np.int64)

    def listed(p: PairSet) -> list[tuple[str, ...]]:
        sides = zip(p.users, p.chosen, p.rejected, strict=True)
        return [(str(u), str(p.texts[a].prompt), p.texts[a].response, p.texts[b].response) for u, a, b in sides]

    assert listed(pairs) == events
    assert listed(pairs[rows]) == [events[i] for i in rows]
    assert len(set(pairs.texts)) == len(pairs.texts)
    table = EmbeddedPairs(OneHot(len(pairs.texts)), pairs.chosen, pairs.rejected, pairs.users)
    assert table[torch.as_tensor(rows)].users.tolist() == [events[i][0] for i in rows]
    assert int(table.grouped().counts.sum()) == len(events)


def test_a_missing_user_is_refused_and_no_pairs_are_fine() -> None:
    with pytest.raises(DataError, match=r"the user of pairs \[1\] \(1 in all\) is missing"):
        EmbeddedPairs(np.eye(4), [0, 1], [2, 3], ["ada", None])
    with pytest.raises(DataError, match="chosen has dtype"):
        EmbeddedPairs(np.eye(4), ["0"], [1], ["ada"])
    assert len(EmbeddedPairs(np.eye(4), [], [], [])) == 0
