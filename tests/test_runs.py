"""Training runs on disk: the bits of `fit`, a log, checkpoints, and what is left when the process is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import palate
from palate.data.pairs import EmbeddedPairs
from palate.data.planted import Planted, two_groups
from palate.errors import DataError, MismatchError, ModelFileError
from palate.models.meta import ExactSolve, Outer, State
from palate.models.mrm import MRM
from palate.runs import train

Run = Callable[..., "tuple[int, str, str]"]


@pytest.fixture(scope="module")
def world() -> Planted:
    return two_groups(n_users=16, n_train=12, n_test=4, dim=5, separation=4.0)  # far apart: the fixed preset trains too


@pytest.fixture(scope="module")
def data(world: Planted) -> EmbeddedPairs:
    return world.train


def log(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(row.pop("seconds") >= 0 for row in rows)
    return rows


def content(path: Path) -> object:
    """The bytes of a file; of a checkpoint what is in it, because safetensors writes metadata in any order."""
    if path.parent.name != "checkpoints" or path.suffix:
        return path.read_bytes()
    state = State.load(path)
    numbers = {name: (tuple(t.shape), str(t.dtype), t.numpy().tobytes()) for name, t in state.numbers.items()}
    return state.epoch, state.steps, state.head, numbers


def files(folder: Path) -> dict[str, object]:
    """Everything a run leaves but the log, whose seconds differ, and what a kill leaves of files that were being written."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "log.jsonl")
    whole = (path for path in found if path.suffix not in (".partial", ".next") and not path.name.startswith(".tmp"))
    return {str(path.relative_to(folder)): content(path) for path in whole}


class Killed(Exception):
    pass


def stopping(at: int) -> Callable[[float, str], None]:
    """A listener that ends the training at its `at`-th word, wherever that is."""
    left = [at]

    def heard(share: float, what: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    return heard


def chosen() -> MRM:
    """The fixed preset, which chooses on held-out users when to stop; here after its eight epochs."""
    return MRM(2, inner=ExactSolve(), outer=Outer(0.05, 8, 8, "constant", warmup=0.0, ridge=1e-3))


@pytest.mark.parametrize("make", [lambda: MRM.faithful(epochs=7), chosen], ids=["faithful", "fixed"])
def test_a_run_is_a_fit_with_a_log(data: EmbeddedPairs, tmp_path: Path, make: Callable[[], MRM]) -> None:
    fitted = palate.fit(data, make(), seed=3)
    model = train(make(), data, tmp_path / "run", every=3, seed=3)
    assert model.fingerprint() == fitted.fingerprint()
    assert palate.load_model(tmp_path / "run" / "model").fingerprint() == fitted.fingerprint()
    states = list(make().epochs(data, seed=3))
    last = states[-1].number
    assert last > 3
    assert log(tmp_path / "run") == [
        {"epoch": epoch.number, "loss": None if epoch.number == 0 else epoch.loss} for epoch in states
    ]
    kept = {int(path.name.removeprefix("epoch-")) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {*range(0, last + 1, 3), last}


def test_held_out_users_are_adapted_and_logged_at_checkpoints(world: Planted, tmp_path: Path) -> None:
    plain = train(MRM.faithful(epochs=5), world.train, tmp_path / "plain", every=2)
    watched = train(MRM.faithful(epochs=5), world.train, tmp_path / "run", every=2, held_out=(world.support, world.test_unseen))
    assert watched.fingerprint() == plain.fingerprint()  # nothing is chosen by it
    rows = log(tmp_path / "run")
    assert [row["epoch"] for row in rows if "held_out_accuracy" in row] == [0, 2, 4]
    for row, epoch in zip(rows, MRM.faithful(epochs=5).epochs(world.train), strict=True):
        if "held_out_accuracy" in row:
            model = epoch.model()
            margin = palate.margins(model, world.test_unseen, palate.adapt(model, world.support))
            right = (margin > 0).double() + 0.5 * (margin == 0)
            users = [right[world.test_unseen.user_index == u].mean() for u in range(len(world.test_unseen.user_ids))]
            assert row["held_out_accuracy"] == pytest.approx(float(sum(users) / len(users)))


@pytest.mark.parametrize("make", [lambda: MRM.faithful(epochs=7), chosen], ids=["faithful", "fixed"])
@pytest.mark.parametrize("at", [2, 5, 8])
def test_stopped_anywhere_and_resumed_is_the_same_run(
    data: EmbeddedPairs, tmp_path: Path, make: Callable[[], MRM], at: int
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(make(), data, whole, every=2)
    with pytest.raises(Killed):
        train(make(), data, cut, every=2, progress=stopping(at), resume=True)
    with (cut / "log.jsonl").open("a") as file:
        file.write('{"epoch": 6, "loss": 0.')  # half a line, which a kill may leave
    (cut / "checkpoints").mkdir(exist_ok=True)
    (cut / "checkpoints" / "epoch-90.partial").write_bytes(b"half a checkpoint")
    train(make(), data, cut, every=2, resume=True)
    assert files(cut) == files(whole)
    assert log(cut) == log(whole)


def test_resuming_what_is_finished_changes_nothing_and_completes_the_model(data: EmbeddedPairs, tmp_path: Path) -> None:
    seen: list[Path] = []
    train(MRM.faithful(epochs=4), data, tmp_path / "run", every=4)
    before, lines = files(tmp_path / "run"), log(tmp_path / "run")
    (tmp_path / "run" / "model" / "config.json").unlink()  # killed between the last checkpoint and the model
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    train(MRM.faithful(epochs=4), data, tmp_path / "run", every=4, resume=True, on_save=seen.append)
    assert (files(tmp_path / "run"), log(tmp_path / "run")) == (before, lines)
    assert seen == [tmp_path / "run" / "model"]


def test_a_checkpoint_that_was_lost_costs_the_epochs_since_the_one_before(data: EmbeddedPairs, tmp_path: Path) -> None:
    train(MRM.faithful(epochs=6), data, tmp_path / "run", every=2)
    before, lines = files(tmp_path / "run"), log(tmp_path / "run")
    for number in (4, 6):
        path = tmp_path / "run" / "checkpoints" / f"epoch-{number}"
        path.write_bytes(path.read_bytes()[:-40])
    train(MRM.faithful(epochs=6), data, tmp_path / "run", every=2, resume=True)
    assert (files(tmp_path / "run"), log(tmp_path / "run")) == (before, lines)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"no checkpoint in .* can be read"):
        train(MRM.faithful(epochs=6), data, tmp_path / "run", resume=True)


def test_what_is_refused(world: Planted, data: EmbeddedPairs, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="LoRe is learned in one solve, without epochs"):
        train(palate.LoRe(), data, tmp_path / "run")
    with pytest.raises(DataError, match="every is 0"):
        train(MRM.faithful(), data, tmp_path / "run", every=0)
    with pytest.raises(DataError, match=r"16 users, such as .* are held out and trained on"):
        train(MRM.faithful(), data, tmp_path / "run", held_out=(world.train, world.test_seen))
    ties = EmbeddedPairs(data.embeddings, data.chosen, data.rejected, data.users, tie=[True] * len(data))
    with pytest.raises(DataError, match="192 pairs, all of them ties"):
        train(MRM.faithful(), ties, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(MRM.faithful(epochs=2), data, tmp_path / "run")
    before = files(tmp_path / "run")
    with pytest.raises(DataError, match=r"holds a run up to epoch 2; give resume \(--resume\)"):
        train(MRM.faithful(epochs=2), data, tmp_path / "run")
    with pytest.raises(MismatchError, match="training of data"):
        train(MRM.faithful(epochs=2), world.support, tmp_path / "run", resume=True)
    with pytest.raises(MismatchError, match="training of seed 0 cannot go on with seed 1"):
        train(MRM.faithful(epochs=2), data, tmp_path / "run", resume=True, seed=1)
    assert files(tmp_path / "run") == before


# -- the command


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "choices.jsonl"
    pairs = palate.synthetic(n_users=16, n_choices=8, seed=2).pairs
    with path.open("w") as file:
        for user, chosen, rejected, talk in zip(pairs.users, pairs.chosen, pairs.rejected, pairs.conversation, strict=True):
            row = {"user_id": user, "prompt": pairs.texts[chosen].prompt, "conversation_id": talk}
            row |= {"chosen": pairs.texts[chosen].response, "rejected": pairs.texts[rejected].response}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.mark.slow
def test_the_command_killed_and_resumed_ends_with_the_same_bits(rows: Path, palate_command: Run, tmp_path: Path) -> None:
    arguments = ("train", rows, "--method", "mrm-faithful", "--epochs", 60, "--every", 4, "--hold-out", 0.25)
    code, out, _ = palate_command(*arguments, "--out", tmp_path / "whole")
    assert (code, out.strip()) == (0, str(tmp_path / "whole" / "model"))
    cut = tmp_path / "cut"
    command = [sys.executable, "-m", "palate", *map(str, arguments), "--out", str(cut)]
    path = os.pathsep.join([str(Path(palate.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (cut / "checkpoints" / "epoch-4").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    assert not (cut / "checkpoints" / "epoch-60").exists()
    assert palate.load_model(cut / "model").is_fitted  # of the last checkpoint, and whole
    code, _, err = palate_command(*arguments, "--out", cut)
    assert (code, "--resume" in err) == (2, True)
    assert palate_command(*arguments, "--out", cut, "--resume")[0] == 0
    assert files(cut) == files(tmp_path / "whole")
    assert log(cut) == log(tmp_path / "whole")
    assert [row["epoch"] for row in log(cut) if "held_out_accuracy" in row] == list(range(0, 61, 4))


def test_the_command_trains_what_adapt_and_rank_take(rows: Path, palate_command: Run, tmp_path: Path) -> None:
    assert (
        palate_command("train", rows, "--method", "mrm-faithful", "--epochs", 3, "--rate", 0.005, "--out", tmp_path / "run")[0]
        == 0
    )
    model = palate.load_model(tmp_path / "run" / "model")
    assert model.options() == MRM.faithful(epochs=3, inner_rate=5e-3, outer_rate=5e-3).options()
    assert palate_command("adapt", tmp_path / "run" / "model", rows, "--out", tmp_path / "profiles")[0] == 0
    code, out, _ = palate_command("rank", tmp_path / "run" / "model", "--prompt", "Lunch?", stdin='"Soup."\n"Why not bread?"\n')
    assert (code, len(out.splitlines())) == (0, 2)


def test_the_command_says_what_it_cannot_do(rows: Path, palate_command: Run, tmp_path: Path) -> None:
    code, out, err = palate_command("train", rows, "--method", "lore", "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert "LoRe is learned in one solve, without epochs" in err
    code, _, err = palate_command("train", rows, "--method", "mrm", "--epochs", 3, "--out", tmp_path / "run")
    assert (code, "--epochs and --rate are those of mrm-faithful" in err) == (2, True)
    assert not (tmp_path / "run").exists()
    code, out, _ = palate_command("train", "--help")
    assert code == 0
    assert "--resume" in out
