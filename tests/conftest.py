"""What every test runs under: no network, no downloads, fixed threads, reproducible examples.

Connections are refused by pytest-socket (see `addopts` in pyproject.toml); a test that serves itself on loopback asks for it with
`@pytest.mark.allow_hosts(["127.0.0.1"])`.
"""

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports torch or a hub client: they read these once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PALATE_CACHE"] = tempfile.mkdtemp(prefix="palate-cache-")  # not the folder of whoever runs the tests

import torch

from palate.cli import main

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)  # sums in another order are other bits

# The same examples on every run and machine: a failure seen in CI repeats on a desk. More: HYPOTHESIS_PROFILE=explore.
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["PALATE_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the real data sets, which live beside the repository and are never part of it; skips where they are absent."""
    folder = ROOT / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data sets are not on this machine (no shared/data beside the repository)")
    return folder.resolve()


@pytest.fixture(scope="session")
def script() -> Callable[[Path], ModuleType]:
    """A Python file outside the package, as a module."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def alone() -> Callable[[Path], str]:
    """Run a script in a process of its own, where warnings are errors; it has to end well, and what it printed comes back."""

    def run(path: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", str(path)],
            capture_output=True,
            text=True,
            env={"OMP_NUM_THREADS": "1", "PATH": ""},
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def palate_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run the command line in this process: `palate_command("validate", path, stdin="...")`."""

    def run(*arguments: object, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        code = left.value.code
        return Done(code if isinstance(code, int) else int(code is not None), *capsys.readouterr())

    return run


@pytest.fixture
def point_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Make the client of the hub take an address on loopback for the real one: `point_at(address, cache)`."""
    import huggingface_hub
    from huggingface_hub import constants

    def point(address: str, cache: Path) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage is not a route of a hub
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        huggingface_hub.close_session()

    return point
