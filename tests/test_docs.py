"""README.md and docs/ are executed, so that they cannot say what is no longer true.

In one file, in its order and in an empty folder: `python` blocks share a namespace; lines of `bash` and `console` blocks that
begin with `palate` go through the command line. What a `console` block shows below a `$` line is what standard output must be.
A block after `<!-- not run: reason -->` is left out, and there are few of them.
"""

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

import palate

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PROMISED = {"make demo", "make test", "make test-fast"}  # too long to run here; a test below sees that they exist
MOST_NOT_RUN = 3


class Block(NamedTuple):
    language: str
    code: str
    line: int
    not_run: str | None


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text, with the reason of a `not run` comment just above."""
    reason: str | None = None
    for token in MarkdownIt().parse(text):
        if token.type == "html_block":
            found = re.fullmatch(r"<!-- not run: (.*?) -->", token.content.strip())
            reason = found[1] if found else None
        else:
            if token.type == "fence":
                yield Block(token.info.strip(), token.content, _line(token), reason)
            reason = None


def _line(token: Token) -> int:
    return (token.map or [0])[0] + 1


def commands(block: Block) -> Iterator[tuple[str, str | None]]:
    """(command, its expected output or None) of a `bash` or `console` block."""
    if block.language == "console":
        for part in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            yield command, expected
    else:
        joined = block.code.replace("\\\n", " ")
        yield from ((line, None) for line in joined.splitlines() if line.strip())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_document_runs(
    path: Path,
    palate_command: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(path.read_text(encoding="utf-8")):
        if block.not_run is not None:
            continue
        if block.language == "python":
            # As many empty lines before it as the document has: a traceback then shows the document's own line.
            exec(compile("\n" * block.line + block.code, str(path), "exec"), namespace)
        elif block.language in ("bash", "console"):
            for command, expected in commands(block):
                words = shlex.split(command, comments=True)
                if " ".join(words) in PROMISED:
                    continue
                assert words[0] == "palate", f"{path.name}:{block.line}: {command!r} is neither run nor marked as not run"
                done = palate_command(*words[1:])
                stated = re.search(r"# exit code (\d)", command)
                assert done.code == (int(stated[1]) if stated else 0), (
                    f"{path.name}:{block.line}: {command}: {done.err or done.out}"
                )
                if expected is not None:
                    assert done.out.strip() == expected.strip(), f"{path.name}:{block.line}: {command}"
        else:
            assert block.language in ("", "text", "json"), f"{path.name}:{block.line}: {block.language!r} blocks are not checked"


def test_few_blocks_are_left_out_and_each_has_a_reason() -> None:
    left_out = [block for path in DOCUMENTS for block in blocks(path.read_text(encoding="utf-8")) if block.not_run is not None]
    assert len(left_out) <= MOST_NOT_RUN, [block.code for block in left_out]
    assert all(len(block.not_run or "") > 10 for block in left_out)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        for inner in token.children or []:
            target = str(inner.attrGet("href") or "")
            if inner.type == "link_open" and not target.startswith(("https:", "#")):
                assert (path.parent / target.partition("#")[0]).exists(), f"{path.name}: {target}"


def test_make_has_every_promised_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {promise.removeprefix("make ") for promise in PROMISED} <= targets


def test_every_extra_is_documented_and_every_documented_one_exists() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]) - {"dev"}
    install = (ROOT / "README.md").read_text().partition("## Install")[2].partition("## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", install, flags=re.MULTILINE)) == extras


def test_the_version_is_one() -> None:
    assert f"version: {palate.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {palate.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_blocks_are_found() -> None:
    text = "<!-- not run: it takes an hour -->\n```bash\npalate x\n```\n\n```console\n$ palate y \nseen\n$ palate z\n```\n"
    first, second = blocks(text)
    assert (first.language, first.not_run, first.line) == ("bash", "it takes an hour", 2)
    assert (second.not_run, list(commands(second))) == (None, [("palate y ", "seen\n"), ("palate z", "")])
    assert list(commands(Block("bash", "palate a \\\n  b\n\npalate c\n", 1, None))) == [
        ("palate a    b", None),
        ("palate c", None),
    ]
