"""`palate data list` and `palate data get`: real bytes through the real client, from a hub of our own that also misbehaves."""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

from palate.data.catalogue import PUBLISHED, Published, published
from palate.data.downloads import LOCK, get
from palate.data.prism import load_prism
from palate.data.recipes import RECIPES
from palate.errors import DataError

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

REPO = "HannahRoseKirk/prism-alignment"
TALK = [
    {"turn": 0, "role": "user", "content": "Hi?", "if_chosen": None, "score": None},
    {"turn": 0, "role": "model", "content": "Yes.", "if_chosen": True, "score": 9},
    {"turn": 0, "role": "model", "content": "No.", "if_chosen": False, "score": 3},
]
ROWS = [{"user_id": "ada", "conversation_id": f"c{i}", "conversation_history": TALK} for i in range(400)]
CONVERSATIONS = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
SURVEY = b'{"user_id": "ada", "num_completed_conversations": 6}\n'
FILES = {"conversations.jsonl": CONVERSATIONS, "survey.jsonl": SURVEY, "README.md": b"# PRISM\n", "models.jsonl": b"{}\n"}
LARGE = {"conversations.jsonl"}  # what the hub keeps as a large file, with a SHA-256


class Hub:
    """One data set with its commits, what was asked for, and how it misbehaves when told to."""

    def __init__(self) -> None:
        self.commits = {"1" * 40: dict(FILES)}
        self.branches = {"main": "1" * 40}
        self.asked: list[str] = []
        self.status: Callable[[str], int | None] = lambda path: None
        self.garbled: Callable[[str, bytes], bytes] = lambda path, content: content
        self.cut = 0  # bytes of a file after which the connection is dropped, once

    def transfers(self) -> list[str]:
        return [line.split()[1].rsplit("/", 1)[1] for line in self.asked if line.startswith("GET") and "/resolve/" in line]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.asked.append(f"{self.command} {path} {self.headers.get('Range') or ''}".strip())
        if (status := self.hub.status(path)) is not None:
            return self._send(status, b"{}")
        if found := re.fullmatch(rf"/api/datasets/{REPO}/revision/(.+)", path):
            return self._told(found[1])
        if found := re.fullmatch(rf"/datasets/{REPO}/resolve/(\w+)/(.+)", path):
            return self._file(found[1], found[2])
        return self._send(404, b"{}", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def _told(self, revision: str) -> None:
        commit = self.hub.branches.get(revision, revision)
        if commit not in self.hub.commits:
            return self._send(404, b"{}", X_Error_Code="RevisionNotFound")
        siblings = [self._entry(name, content) for name, content in self.hub.commits[commit].items()]
        self._send(200, json.dumps({"id": REPO, "sha": commit, "private": False, "tags": [], "siblings": siblings}).encode())

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\x00" % len(content) + content).hexdigest()
        large = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return {"rfilename": name, "size": len(content), "blobId": blob} | ({"lfs": large} if name in LARGE else {})

    def _file(self, commit: str, name: str) -> None:
        content = self.hub.commits[commit][name]
        entry = self._entry(name, content)
        etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]
        content = self.hub.garbled(name, content)
        start = 0
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start = int(wanted[1])
        told = {"ETag": f'"{etag}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if start:
            told["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if start else 200, content[start:], **told)

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut and len(content) > self.hub.cut:
            self.wfile.write(content[: self.hub.cut])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, point_at: Callable[[str, Path], None]) -> Iterator[Hub]:
    """A hub on loopback that the client takes for the real one, with an empty cache."""
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    point_at(f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "hub-cache")
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def prism() -> Published:
    return published("prism")


def test_every_published_set_has_its_facts() -> None:
    assert len({one.name for one in PUBLISHED}) == len(PUBLISHED) == 8
    for one in PUBLISHED:
        assert all((one.what, one.page, one.licence, one.citation, one.users, one.size, one.loader)), one.name
        assert (one.repo is None) == (not one.files) == (not one.revision), one.name
    with pytest.raises(DataError, match="there is no data set 'prisma'; expected one of prism, tldr, personalllm"):
        published("prisma")
    readers = [name for one in PUBLISHED for name in one.recipes]
    ours = {"attributes", "community", "argilla-rankings", "argilla-labels", "argilla-ratings"}  # which read nothing published
    assert set(readers) == RECIPES.keys() - ours


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("attributes", "run: `palate data prepare attributes --out OUT`"),
        (
            "arena",
            "run: `palate data prepare arena TRAIN VAL TEST --out OUT` with the files of `palate data get arena-personal` or "
            "`palate data get prism-personal`",
        ),
        (
            "argilla",
            ", or `palate data prepare argilla-labels EXPORT --question QUESTION --prompt PROMPT --answers ANSWERS --out",
        ),
        ("community", "run: `palate data prepare community PART... --columns COLUMNS --answers ANSWERS --out OUT`"),
        ("prism-mrm", "CONVERSATIONS.JSONL [SURVEY.JSONL] --out OUT` with the files of `palate data get prism`"),
    ],
)
def test_a_recipe_is_no_data_set_and_is_told_how_to_be_run(
    name: str, what: str, palate_command: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = palate_command("data", "get", name)
    assert (code, out) == (2, "")
    assert f"'{name}' is prepared, not fetched; " in err
    assert what in err


def test_files_are_fetched_checked_and_recorded(hub: Hub, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    fetched = get(prism(), tmp_path / "out", progress=lambda *now: seen.append(now))
    assert (fetched.files, fetched.commit, fetched.verified) == (("conversations.jsonl", "survey.jsonl"), "1" * 40, "source")
    assert (tmp_path / "out" / "conversations.jsonl").read_bytes() == CONVERSATIONS
    assert seen == [(0, 2, "conversations.jsonl"), (1, 2, "survey.jsonl")]
    assert hub.transfers() == ["conversations.jsonl", "survey.jsonl"]  # and nothing that the loader does not read
    lock = json.loads((tmp_path / "out" / LOCK).read_text())
    assert (lock["version"], lock["repo"], lock["commit"]) == (1, REPO, "1" * 40)
    assert lock["files"]["survey.jsonl"] == {"sha256": hashlib.sha256(SURVEY).hexdigest(), "size": len(SURVEY)}
    assert load_prism(tmp_path / "out" / "conversations.jsonl")[0].user_ids == ("ada",)


def test_what_is_there_is_checked_and_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    get(prism(), tmp_path)
    hub.asked.clear()
    hub.status = lambda path: 500
    assert get(prism(), tmp_path).verified == "lock file"
    assert get(prism(), tmp_path, revision="1" * 10).verified == "lock file"
    assert hub.asked == []
    (tmp_path / "survey.jsonl").write_bytes(b"changed")
    with pytest.raises(DataError, match=r"survey\.jsonl has SHA-256 [0-9a-f]{64}; expected [0-9a-f]{64} \(.*palate-data\.json\)"):
        get(prism(), tmp_path)
    assert (tmp_path / "survey.jsonl").read_bytes() == b"changed"  # somebody's, so it is not removed
    (tmp_path / "survey.jsonl").unlink()
    hub.status = lambda path: None
    assert get(prism(), tmp_path).verified == "lock file"
    assert (tmp_path / "survey.jsonl").read_bytes() == SURVEY
    assert hub.transfers() == ["survey.jsonl"]


def test_a_file_that_was_put_there_by_hand(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "conversations.jsonl").write_bytes(CONVERSATIONS)
    assert get(prism(), tmp_path).verified == "source"
    assert hub.transfers() == ["survey.jsonl"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "survey.jsonl").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"other/survey\.jsonl has git hash .*\. Move it away"):
        get(prism(), other)
    assert (other / "survey.jsonl").read_bytes() == b"mine"


def test_a_lock_file_holds_its_commit_whatever_the_source_does(hub: Hub, tmp_path: Path) -> None:
    get(prism(), tmp_path / "first")
    hub.commits["2" * 40] = FILES | {"survey.jsonl": b'{"user_id": "new"}\n'}
    hub.branches["main"] = "2" * 40
    other = tmp_path / "other"
    other.mkdir()
    (other / LOCK).write_bytes((tmp_path / "first" / LOCK).read_bytes())  # taken to another machine
    assert get(prism(), other).commit == "1" * 40
    assert (other / "survey.jsonl").read_bytes() == SURVEY
    assert get(prism(), tmp_path / "newest").commit == "2" * 40
    assert get(prism(), tmp_path / "pinned", revision="1" * 40).commit == "1" * 40
    with pytest.raises(DataError, match=r"holds commit 1{40}, and '2{40}' was asked for; expected another folder"):
        get(prism(), other, revision="2" * 40)
    with pytest.raises(DataError, match="'main' was asked for"):
        get(prism(), other, revision="main")
    hub.commits["1" * 40]["survey.jsonl"] = b"rewritten history"
    (other / "survey.jsonl").unlink()
    with pytest.raises(DataError, match=r"survey\.jsonl is not what was published, and was removed: .* has SHA-256"):
        get(prism(), other)
    del hub.commits["1" * 40]["survey.jsonl"]
    with pytest.raises(DataError, match=r"no longer has all of conversations\.jsonl, survey\.jsonl at 1{40}"):
        get(prism(), other)


@pytest.mark.parametrize(("name", "match"), [("conversations.jsonl", "SHA-256"), ("survey.jsonl", "git hash")])
def test_bytes_that_do_not_fit_their_checksum(hub: Hub, tmp_path: Path, name: str, match: str) -> None:
    hub.garbled = lambda path, content: content.replace(b"ada", b"eve") if path == name else content  # of the same length
    with pytest.raises(DataError, match=rf"{name} is not what was published, and was removed: .* has {match} \w+; expected \w+"):
        get(prism(), tmp_path)
    assert not (tmp_path / name).exists()
    assert not (tmp_path / LOCK).exists()
    hub.garbled = lambda path, content: content
    assert get(prism(), tmp_path).verified == "source"
    assert (tmp_path / name).read_bytes() == FILES[name]


def test_a_transfer_that_stops_goes_on_where_it_was(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own attempts
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # what is written at a time
    hub.cut = 10_000
    hub.status = lambda path: 500 if hub.cut and len(hub.transfers()) > 2 else None  # and then the source is gone
    with pytest.raises(DataError, match="answered HTTP 500 about"):
        get(prism(), tmp_path)
    assert not (tmp_path / "conversations.jsonl").exists()
    assert not (tmp_path / LOCK).exists()
    (partial,) = tmp_path.glob("*.partial")
    came = partial.stat().st_size
    assert came == 2 * 8192  # two attempts of 10,000 bytes each, in whole pieces
    assert partial.read_bytes() == CONVERSATIONS[:came]
    hub.cut = 0
    hub.asked.clear()
    get(prism(), tmp_path)
    assert (tmp_path / "conversations.jsonl").read_bytes() == CONVERSATIONS
    assert [line for line in hub.asked if "conversations" in line] == [
        f"GET /datasets/{REPO}/resolve/{'1' * 40}/conversations.jsonl bytes={came}-"
    ]
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_left_of_more_than_the_file_is_begun_anew(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.status = lambda path: 500 if "conversations" in path else None
    with pytest.raises(DataError, match="answered HTTP 500 about"):
        get(prism(), tmp_path)
    (partial,) = tmp_path.glob("conversations.*.partial")
    partial.write_bytes(CONVERSATIONS * 2)  # as two processes would leave it
    hub.status = lambda path: None
    hub.asked.clear()
    get(prism(), tmp_path)
    assert (tmp_path / "conversations.jsonl").read_bytes() == CONVERSATIONS
    assert not any("bytes=" in line for line in hub.asked)


def test_a_source_that_refuses(hub: Hub, tmp_path: Path) -> None:
    nobody = Published(**{**vars(prism()), "repo": "nobody/nothing"})
    with pytest.raises(DataError, match=r"has no data set nobody/nothing, or it is private: look at https://huggingface\.co"):
        get(nobody, tmp_path)
    for status in (403, 500):
        hub.status = lambda path, status=status: status  # type: ignore[misc]
        with pytest.raises(DataError, match=f"answered HTTP {status} about {REPO}; try again later. Or get conversations"):
            get(prism(), tmp_path)
    hub.status = lambda path: 404 if "resolve" in path else None
    with pytest.raises(DataError, match="answered HTTP 404"):
        get(prism(), tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))


def test_revisions_and_files_that_are_not_there(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{REPO} has no such revision; give another --revision"):
        get(prism(), tmp_path, revision="v9")
    del hub.commits["1" * 40]["survey.jsonl"]
    with pytest.raises(
        DataError, match=r"at 'main' has no survey\.jsonl; it has README\.md, conversations\.jsonl, models\.jsonl\."
    ):
        get(prism(), tmp_path)
    hub.commits["1" * 40] = {"../survey.jsonl": SURVEY, "conversations.jsonl": CONVERSATIONS}
    wanted = Published(**{**vars(prism()), "files": ("*.jsonl",)})
    with pytest.raises(DataError, match=r"has a file named '\.\./survey\.jsonl', which would leave the folder"):
        get(wanted, tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))


def test_files_in_folders_of_a_branch_with_a_slash(hub: Hub, tmp_path: Path) -> None:
    hub.commits["3" * 40] = {f"comparisons/{part}/0000.parquet": part.encode() for part in ("train", "validation")}
    hub.branches["refs/convert/parquet"] = "3" * 40
    wanted = Published(**{**vars(published("tldr")), "repo": REPO})
    fetched = get(wanted, tmp_path)
    assert fetched.files == ("comparisons/train/0000.parquet", "comparisons/validation/0000.parquet")
    assert (tmp_path / fetched.files[1]).read_bytes() == b"validation"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "cannot be read"),
        ('{"version": 2}', "cannot be read"),
        (
            '{"version": 1, "name": "x", "repo": "other/set", "commit": "1", "files": {"a": {"sha256": "0"}}}',
            "is of other/set, not of",
        ),
        (f'{{"version": 1, "name": "prism", "repo": "{REPO}", "commit": "1", "files": {{}}}}', "another version or shape"),
        (
            f'{{"version": 1, "name": "prism", "repo": "{REPO}", "commit": "1", "files": {{"../a": {{"sha256": "0"}}}}}}',
            r"names the file '\.\./a', which is outside",
        ),
    ],
)
def test_lock_files_that_cannot_be(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(DataError, match=match):
        get(prism(), tmp_path)


def test_without_a_connection_it_says_what_to_do(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point_at: Callable[[str, Path], None],
    palate_command: Callable[..., tuple[int, str, str]],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, err = palate_command("data", "get", "prism", "--out", tmp_path)
    assert (code, out) == (2, "")
    assert "people's words CC-BY-4.0, models' answers CC-BY-NC-4.0" in err  # the terms are said before anything else
    assert "HF_HUB_OFFLINE is set" in err
    assert f"put them into {tmp_path}, and give them to `palate data prepare` (prism-mrm or prism-lore-paper or " in err
    assert "), or in Python to palate.data.prism.load_prism" in err
    assert "get conversations.jsonl, survey.jsonl from https://huggingface.co/datasets/HannahRoseKirk/prism-alignment" in err
    assert hub.asked == []
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        point_at(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path / "hub-cache")
        with pytest.raises(DataError, match=r"could not be fetched from http://127\.0\.0\.1:\d+ \(ConnectError"):
            get(prism(), tmp_path)


def test_the_commands(hub: Hub, tmp_path: Path, palate_command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = palate_command("data", "get", "prism", "--out", tmp_path)
    assert (code, out) == (0, f"{tmp_path / 'conversations.jsonl'}\n{tmp_path / 'survey.jsonl'}\n")
    assert "Licence: people's words CC-BY-4.0" in err
    assert f"commit {'1' * 40}, checked against the source" in err
    code, out, _ = palate_command("data", "list")
    assert code == 0
    for one in PUBLISHED:
        assert f"{one.name}: {one.what}\n" in out
        assert f"  licence: {one.licence}\n" in out
    code, _, err = palate_command("data", "get", "pref-personas")
    assert code == 2
    assert "pref-personas cannot be fetched from here: get it by hand from the shared folder" in err
    assert palate_command("data", "get", "nothing")[0] == 2
