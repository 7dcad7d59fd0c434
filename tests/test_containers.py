"""What can be said of Dockerfile and compose.yaml without a Docker: no secret, run as nobody, and what they name exists."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from palate.cli import app

SECRET = re.compile(r"(?i)(password|secret|token|api_?key)\s*[=:]\s*[\"']?(?!/run/secrets/|\$|$)[^\s\"']{4,}")


@pytest.fixture(scope="module")
def dockerfile(root: Path) -> list[tuple[str, str]]:
    """(instruction, rest) of every instruction, continuation lines joined."""
    text = re.sub(r"\\\n\s*", " ", (root / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in lines)]


@pytest.fixture(scope="module")
def compose(root: Path) -> Any:
    return yaml.safe_load((root / "compose.yaml").read_text(encoding="utf-8"))


def options_of(command: str) -> set[str]:
    """The options that a command of ours takes."""
    found: Any = get_command(app)
    for word in command.split():
        found = found.commands[word]
    return {name for parameter in found.params for name in parameter.opts}


def test_the_image_is_pinned_built_in_stages_and_run_by_nobody(dockerfile: list[tuple[str, str]]) -> None:
    arguments = {rest.partition("=")[0]: rest.partition("=")[2] for word, rest in dockerfile if word == "ARG"}
    images = [rest.split()[0] for word, rest in dockerfile if word == "FROM"]
    assert len(images) == 2
    for image in images:
        named = re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], image)
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-[\w-]+(@sha256:[0-9a-f]{64})?", named), named
    last = dockerfile[max(i for i, (word, _) in enumerate(dockerfile) if word == "FROM") :]
    users = [rest for word, rest in last if word == "USER"]
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", users[-1])
    words = [word for word, _ in last]
    assert "HEALTHCHECK" in words
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert not any(word == "ADD" for word, _ in dockerfile)
    installs = [rest for word, rest in dockerfile if word == "RUN" and "pip install" in rest]
    assert all("--constraint constraints.txt" in rest for rest in installs)


def test_what_is_copied_exists_and_nothing_else_is_sent_to_the_builder(root: Path, dockerfile: list[tuple[str, str]]) -> None:
    copied = {part for word, rest in dockerfile if word == "COPY" and "--from" not in rest for part in shlex.split(rest)[:-1]}
    ignored = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert all((root / part).exists() for part in copied)
    assert "*" in ignored
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied


def test_the_commands_in_them_exist(dockerfile: list[tuple[str, str]], compose: Any) -> None:
    told = {word: yaml.safe_load(rest) for word, rest in dockerfile if word in ("ENTRYPOINT", "CMD")}
    assert told["ENTRYPOINT"] == ["palate"]
    for command in (told["CMD"], compose["services"]["palate"]["command"]):
        assert command[0] == "serve"
        assert {word for word in command if word.startswith("--")} <= options_of("serve")
    health = next(rest for word, rest in dockerfile if word == "HEALTHCHECK")
    code = yaml.safe_load(health.partition("CMD ")[2])
    assert code[:2] == ["python", "-c"]
    compile(code[2], "healthcheck", "exec")
    assert "/health" in code[2]


def test_neither_file_holds_a_secret(root: Path) -> None:
    for name in ("Dockerfile", "compose.yaml"):
        for line in (root / name).read_text(encoding="utf-8").splitlines():
            assert SECRET.search(line) is None, f"{name}: {line}"
    assert SECRET.search("POSTGRES_PASSWORD: hunter2") is not None
    assert SECRET.search('ENV API_KEY="palate_abc"') is not None


def test_the_composition_is_closed_to_the_outside(compose: Any) -> None:
    service, database = compose["services"]["palate"], compose["services"]["db"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert "ports" not in database
    assert compose["networks"][database["networks"][0]]["internal"] is True
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert all("no-new-privileges:true" in one["security_opt"] for one in (service, database))
    assert service["depends_on"]["db"]["condition"] == "service_healthy"
    assert "healthcheck" in database
    assert re.fullmatch(r"postgres:\d+\.\d+-\w+", database["image"])
    assert database["environment"]["POSTGRES_PASSWORD_FILE"] == "/run/secrets/password"
    assert compose["secrets"]["password"] == {"file": "secrets/password"}
    assert "PGPASSWORD" not in str(service["environment"])
    for mount in (*service["volumes"], *database["volumes"]):
        source = mount.partition(":")[0]
        assert source.startswith("./") or source in compose["volumes"]


def test_the_password_of_the_composition_reaches_the_service_and_no_command_line(compose: Any, tmp_path: Path) -> None:
    """The entry point is run by a real shell, with a `palate` that says what it was given."""
    (tmp_path / "password").write_text("s p'a\"ce$")
    fake = tmp_path / "palate"
    fake.write_text(f"#!{sys.executable}\nimport os, sys\nprint(os.environ['PGPASSWORD'], sys.argv[1:], os.getpid())\n")
    fake.chmod(0o755)
    entry = [
        part.replace("$$", "$").replace("/run/secrets", str(tmp_path)) for part in compose["services"]["palate"]["entrypoint"]
    ]
    started = subprocess.Popen(
        [*entry, "serve", "/model", "--host", "0.0.0.0"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = started.communicate(timeout=60)
    assert out.strip() == f"s p'a\"ce$ ['serve', '/model', '--host', '0.0.0.0'] {started.pid}"  # exec: the shell became palate
