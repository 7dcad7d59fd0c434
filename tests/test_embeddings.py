"""Every kind of table is the dense matrix it stands for: rows, products, adjoints and moments."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from palate.data import embeddings
from palate.data.embeddings import Dense, Differences, Embeddings, Joined, OneHot, as_embeddings
from palate.errors import DataError

N, KINDS = 13, ("float64", "float32", "float16", "memmap", "onehot", "joined")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", 4 * 7 * 5)  # several blocks, the last one shorter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


def table(kind: str, folder: Path, seed: int) -> tuple[Embeddings, Tensor]:
    """(table, the same as a float64 matrix)."""
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(N, 7))
    if kind == "float64":
        return Dense(torch.from_numpy(numbers)), torch.from_numpy(numbers)
    if kind == "float32":
        return Dense(torch.from_numpy(numbers).float()), torch.from_numpy(numbers.astype(np.float32)).double()
    if kind == "float16":
        return Dense(torch.from_numpy(numbers).half()), torch.from_numpy(numbers).half().double()
    if kind == "memmap":
        path = folder / f"{seed}.npy"
        np.save(path, numbers.astype(np.float16))
        return Dense(np.load(path, mmap_mode="r")), torch.from_numpy(numbers.astype(np.float16)).double()
    if kind == "onehot":
        column = rng.integers(-1, 9, size=N)
        whole = torch.zeros(N, 10, dtype=torch.float64)
        whole[np.flatnonzero(column >= 0), column[column >= 0]] = 2.5
        return OneHot(column, 10, scale=2.5), whole
    parts = [table(inner, folder, seed + 1) for inner in ("memmap", "onehot")]
    return Joined([part for part, _ in parts], [0.5, 3.0]), torch.cat([parts[0][1] * 0.5, parts[1][1] * 3], dim=1)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 40))
def test_tables_are_the_matrices_they_stand_for(kind: str, seed: int, folder: Path) -> None:
    found, whole = table(kind, folder, seed)
    rng = torch.Generator().manual_seed(seed)
    d = whole.shape[1]
    assert found.shape == (N, d)
    assert len(found) == N
    assert found.finite()
    index = torch.randint(N, (6,), generator=rng)
    directions = torch.randn(d, 3, generator=rng, dtype=torch.float64)
    weights = torch.randn(N, 2, generator=rng, dtype=torch.float64)
    near: Any = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(found.rows(index).double(), whole[index], **near)
    torch.testing.assert_close(found.project(directions).double(), whole @ directions, **near)
    torch.testing.assert_close(found.back(weights).double(), whole.T @ weights, **near)
    # <E V, G> = <V, E^T G>
    left = (found.project(directions[:, :2]).double() * weights).sum()
    torch.testing.assert_close(left, (directions[:, :2] * found.back(weights).double()).sum(), rtol=1e-4, atol=1e-4)
    share = torch.rand(N, generator=rng).double()
    mean, variance = found.column_moments(share)
    expected = (share[:, None] * whole).sum(0) / share.sum()
    torch.testing.assert_close(mean.double(), expected, **near)
    torch.testing.assert_close(variance.double(), (share[:, None] * (whole - expected) ** 2).sum(0) / share.sum(), **near)
    covered = [column for part, _ in found.column_blocks() for column in range(*part.indices(d))]
    assert covered == list(range(d))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_pairs", [5, 40])  # fewer and more than texts: formed once, or through the table
def test_differences(kind: str, n_pairs: int, folder: Path) -> None:
    found, whole = table(kind, folder, 3)
    rng = torch.Generator().manual_seed(n_pairs)
    chosen = torch.randint(N, (n_pairs,), generator=rng)
    rejected = (chosen + torch.randint(1, N, (n_pairs,), generator=rng)) % N
    z = whole[chosen] - whole[rejected]
    differences = Differences(found, chosen, rejected)
    directions = torch.randn(whole.shape[1], 3, generator=rng, dtype=torch.float64)
    weights = torch.randn(n_pairs, 2, generator=rng, dtype=torch.float64)
    near: Any = {"rtol": 1e-5, "atol": 3e-5}
    assert differences.shape == tuple(z.shape)
    torch.testing.assert_close(differences.project(directions).double(), z @ directions, **near)
    torch.testing.assert_close(differences.back(weights).double(), z.T @ weights, **near)
    torch.testing.assert_close(differences.rows(torch.tensor([4, 0])).double(), z[[4, 0]], **near)


def test_infinities_are_found() -> None:
    numbers = torch.zeros(9, 7)
    numbers[8, 6] = torch.inf
    assert not Dense(numbers).finite()
    assert not Joined([OneHot(9), Dense(numbers.half())]).finite()


def test_a_catalogue_is_numbers_not_a_square() -> None:
    items = OneHot(1_000_000)
    assert items.shape == (1_000_000, 1_000_000)
    assert items.project(torch.ones(1_000_000, 1)).sum() == 1_000_000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dense(torch.zeros(3)), r"embeddings have shape \(3,\)"),
        (lambda: Dense(torch.zeros(3, 2, dtype=torch.int64)), "dtype torch.int64"),
        (lambda: Dense(np.zeros((3, 2), dtype=np.int32)), "dtype int32"),
        (lambda: OneHot(torch.zeros(2, 2)), r"one-hot columns have shape \(2, 2\)"),
        (lambda: OneHot([0, 5], 3), r"span 0..5; expected -1..2"),
        (lambda: OneHot([-2, 0]), r"span -2..0; expected -1..0"),
        (lambda: OneHot(3, scale=0.0), "scale is 0.0"),
        (lambda: Joined([OneHot(3), OneHot(4)]), r"joined tables have \[3, 4\] rows"),
        (lambda: Joined([]), r"joined tables have \[\] rows"),
        (lambda: Joined([OneHot(3)], [1.0, 2.0]), "2 gains for 1 tables"),
        (lambda: as_embeddings("minilm"), "embeddings are a str"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_table(make: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()  # type: ignore[operator]
