"""Models on the Hub: real bytes through the real client and a server of our own, and a card that says what is true."""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from huggingface_hub import ModelCard, constants

import palate
from palate.encoders import Items
from palate.encoders.base import digest
from palate.encoders.saved import save_encoder
from palate.encoders.tuned import Layers, TunedEncoder
from palate.errors import DataError, MismatchError, ModelFileError, PalateError
from palate.models.base import RewardModel
from palate.naming import Name
from palate.report.card import is_local, sources

# The client still sends large files to a hub without its newest storage in a way that its HTTP library calls old.
pytestmark = [
    pytest.mark.allow_hosts(["127.0.0.1"]),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
]

TOKEN = "hf_the_writer"
ID = "ada-lab/lunch.taste_1"
ADA = "ada-the-user-whom-no-card-may-name"


# a hub: the routes that the client uses, over loopback


class Repo:
    """Commits by hash, each a mapping of paths to bytes; branches by name, the newest commit last."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        name = self.branches.get(revision, revision)
        return (name, self.commits[name]) if name in self.commits else None

    @property
    def main(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


class Hub:
    """The state of the server, what was asked of it, and how it misbehaves when told to."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.asked: list[str] = []
        self.broken: Callable[[str, str], int | None] = lambda method, path: None  # a status instead of an answer
        self.garbled: Callable[[str, bytes], bytes] = lambda path, content: content

    def downloads(self) -> list[str]:
        """Paths of the files whose content was asked for, in order."""
        return [
            line.split("/resolve/")[1].split("/", 1)[1] for line in self.asked if line.startswith("GET") and "/resolve/" in line
        ]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]  # a branch may hold a slash, so parts are unquoted after they were told apart
        self.hub.asked.append(f"{self.command} {path}")
        status = self.hub.broken(self.command, path)
        if status is not None:
            return self._send(status, {"error": "told to fail"})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            wrong = "license: nonsense" in json.loads(body)["content"]
            return self._send(
                400 if wrong else 200, {"errors": [{"message": '"license" must be known'}] if wrong else [], "warnings": []}
            )
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            self.hub.large[found[1]] = body
            return self._send(200, {})
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)(?:/(.*))?)?", path):
            return self._api(found[1], found[2], unquote((found[3] or "main").split("/")[0]), body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(found[1], unquote(found[2]), unquote(found[3]))
        return self._send(404, {})

    def _send(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def _signed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _create(self, asked: dict[str, Any]) -> None:
        if not self._signed:
            return self._send(401, {"error": "Invalid credentials in Authorization header"})
        name = f"{asked['organization']}/{asked['name']}"
        address = {"url": f"http://127.0.0.1:{self.server.server_address[1]}/{name}"}
        if name in self.hub.repos:
            return self._send(409, address)
        self.hub.repos[name] = Repo(asked.get("visibility") == "private")
        return self._send(200, address)

    def _batch(self, asked: dict[str, Any]) -> None:
        base = f"http://127.0.0.1:{self.server.server_address[1]}/lfs/"
        objects = [one | {"actions": {"upload": {"href": base + one["oid"]}}} for one in asked["objects"]]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _seen(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._signed):
            self._send(404 if self._signed else 401, {}, X_Error_Code="RepoNotFound")
            return None
        return repo

    def _api(self, name: str, verb: str | None, revision: str, body: bytes) -> None:
        repo = self._seen(name)
        if repo is None:
            return None
        if self.command == "POST" and not self._signed:
            return self._send(403, {})
        if verb == "branch":
            if revision in repo.branches:
                return self._send(409, {})
            repo.branches[revision] = repo.branches["main"]
            return self._send(200, {})
        if verb == "preupload":
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            told = [
                {"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")], "shouldIgnore": False} for f in files
            ]
            return self._send(200, {"files": told})
        if verb == "commit":
            return self._commit(name, repo, revision, body)
        at = repo.at(revision)
        if at is None:
            return self._send(404, {}, X_Error_Code="RevisionNotFound")
        if verb == "tree":
            return self._send(200, [self._entry(path, content) for path, content in sorted(at[1].items())])
        return self._send(200, {"id": name, "sha": at[0], "private": repo.private, "siblings": []})

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return {
            **{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()},
            **({"lfs": large} if path.endswith(".safetensors") else {}),
        }

    def _commit(self, name: str, repo: Repo, branch: str, body: bytes) -> None:
        at = repo.at(branch)
        assert at is not None
        files = dict(at[1])
        for line in body.splitlines():
            change = json.loads(line)
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif change["key"] == "deletedFile":
                del files[value["path"]]
        commit = repo.commit(branch, files)
        self._send(200, {"commitUrl": f"{constants.ENDPOINT}/{name}/commit/{commit}", "commitOid": commit})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._seen(name)
        if repo is None:
            return None
        at = repo.at(revision)
        if at is None:
            return self._send(404, {}, X_Error_Code="RevisionNotFound")
        if path not in at[1]:
            return self._send(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=at[0])
        content = self.hub.garbled(path, at[1][path])
        etag = self._entry(path, at[1][path])
        told = f'"{etag["lfs"]["oid"] if "lfs" in etag else etag["oid"]}"'
        return self._send(200, content, ETag=told, X_Repo_Commit=at[0])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point_at: Callable[[str, Path], None]) -> Iterator[Hub]:
    """A hub on loopback that the client takes for the real one, with an empty cache; a writer's token is set."""
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    point_at(f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "hub-cache")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def fitted() -> tuple[palate.Hierarchical, Any, palate.PairSet]:
    """A model of 40 generated users, its encoder and their choices."""
    pairs = palate.synthetic(n_users=40, n_choices=12, seed=2).pairs
    encoder = palate.load_encoder("style")
    model = palate.fit(encoder.embed(pairs), palate.Hierarchical(3, bend=0, types=(), kappa=1.0))
    assert isinstance(model, palate.Hierarchical)
    return model, encoder, pairs


def tiny(value: float = 1.0) -> palate.BradleyTerry:
    return palate.BradleyTerry(ridge=0.5).like({"direction": torch.tensor([value, -2.0, 0.25])})


# there and back


def test_a_model_goes_to_the_hub_and_comes_back(hub: Hub, fitted: Any) -> None:
    model, encoder, pairs = fitted
    commit = palate.push_to_hub(model, ID, encoder=encoder)
    repo = hub.repos[ID]
    assert repo.private
    assert repo.main.keys() == {".gitattributes", "README.md", "config.json", "encoder.json", "model.safetensors"}
    assert set(hub.large) == {hashlib.sha256(repo.main["model.safetensors"]).hexdigest()}  # it went the way of large files

    again = palate.load_model(ID)
    assert type(again) is palate.Hierarchical
    assert again.fingerprint() == model.fingerprint()
    assert again.record["hub"] == {"repo_id": ID, "commit": commit}
    assert {"data", "seed", "n_users"} <= again.record.keys()
    scorer = palate.load_scorer(ID)
    responses = ["Yes.", "It depends: there are three things to weigh, and none of them is small."]
    expected = palate.Scorer(encoder, model)
    profiles = palate.adapt(model, encoder.embed(pairs))
    user = pairs.user_ids[0]
    assert torch.equal(scorer.score("Should I?", responses), expected.score("Should I?", responses))
    profile = profiles[user]
    assert torch.equal(scorer.score("Should I?", responses, profile), expected.score("Should I?", responses, profile))


def test_only_our_files_are_asked_for_and_only_once(hub: Hub) -> None:
    palate.push_to_hub(tiny(), ID, card="# A card\n")
    repo = hub.repos[ID]
    assert repo.main["README.md"] == b"# A card\n"
    repo.commit("main", repo.main | {"pytorch_model.bin": b"\x80\x04 a pickle", "run.py": b"1/0", "encoder-x/notes.txt": b"no"})
    hub.asked.clear()
    palate.load_model(ID)
    assert sorted(hub.downloads()) == ["config.json", "model.safetensors"]
    hub.asked.clear()
    palate.load_model(ID)
    assert hub.downloads() == []  # the client's cache has them


def test_a_revision_is_that_model_for_ever(hub: Hub) -> None:
    first = palate.push_to_hub(tiny(1.0), ID)
    second = palate.push_to_hub(tiny(2.0), ID)
    on_branch = palate.push_to_hub(tiny(3.0), ID, revision="half/done")
    assert len({first, second, on_branch}) == 3
    values = {
        name: palate.load_model(ID, revision=name).state_dict()["direction"][0].item() for name in (first, "main", "half/done")
    }
    assert values == {first: 1.0, "main": 2.0, "half/done": 3.0}
    assert palate.load_model(ID, revision="half/done").record["hub"] == {"repo_id": ID, "commit": on_branch}
    assert palate.BradleyTerry.from_pretrained(ID, revision=first).fingerprint() == tiny(1.0).fingerprint()
    with pytest.raises(ModelFileError, match=r"is a BradleyTerry; expected a LoRe; load it with palate.load_model"):
        palate.LoRe.from_pretrained(ID)


def test_what_a_newer_model_lacks_is_taken_away_and_the_rest_is_left(hub: Hub, fitted: Any) -> None:
    model, encoder, _ = fitted
    palate.push_to_hub(model, ID, encoder=encoder)
    repo = hub.repos[ID]
    repo.commit("main", repo.main | {"notes.md": b"mine", f"encoder-{'0' * 12}/layers.safetensors": b"of an older encoder"})
    palate.push_to_hub(tiny(), ID)
    assert repo.main.keys() == {".gitattributes", "README.md", "config.json", "model.safetensors", "notes.md"}
    with pytest.raises(ModelFileError, match=r"has no encoder\.json"):
        palate.load_scorer(ID)


def test_a_folder_goes_with_its_own_files_only(hub: Hub, fitted: Any, tmp_path: Path) -> None:
    model, encoder, _ = fitted
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    save_encoder(encoder, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# By hand\n")
    (folder / "choices.jsonl").write_text(ADA)
    (folder / f"encoder-{'a' * 12}").mkdir()
    (folder / f"encoder-{'a' * 12}" / "layers.safetensors").write_bytes(b"of an earlier fit")
    (folder / "model.safetensors").rename(folder / "model.safetensors.next")  # a writer that died one step from the end
    palate.push_to_hub(folder, ID)
    main = hub.repos[ID].main
    assert main.keys() == {".gitattributes", "README.md", "config.json", "encoder.json", "model.safetensors"}
    assert main["README.md"] == b"---\nlicense: mit\n---\n# By hand\n"
    palate.push_to_hub(ID, "ada-lab/copy", private=False)  # from one id to another, with the encoder
    assert not hub.repos["ada-lab/copy"].private
    assert palate.load_scorer("ada-lab/copy").encoder.fingerprint == encoder.fingerprint
    with pytest.raises(DataError, match="is a folder with an encoder of its own"):
        palate.push_to_hub(folder, ID, encoder=encoder)


def test_what_an_encoder_has_learned_goes_with_it(hub: Hub, fitted: Any) -> None:
    _, base, pairs = fitted
    width = base.embed(pairs).embeddings.shape[1]
    layers = Layers(torch.zeros(width), torch.ones(width), (5,), seed=3)
    encoder = TunedEncoder(base, None, layers).train(False)
    model = palate.fit(encoder.embed(pairs), palate.BradleyTerry(ridge=0.1))
    palate.push_to_hub(model, ID, encoder=encoder)
    assert f"encoder-{encoder.weights[:12]}/layers.safetensors" in hub.repos[ID].main
    again = palate.load_scorer(ID)
    responses = ["Yes.", "It depends: there are three things to weigh."]
    assert torch.equal(again.score("Should I?", responses), palate.Scorer(encoder, model).score("Should I?", responses))


def test_a_folder_of_that_name_comes_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    palate.push_to_hub(tiny(1.0), ID)
    monkeypatch.chdir(tmp_path)
    tiny(2.0).save_pretrained(ID)
    hub.asked.clear()
    here = palate.load_model(ID)
    assert (here.state_dict()["direction"][0].item(), "hub" in here.record, hub.asked) == (2.0, False, [])
    with pytest.raises(DataError, match=r"revision is 'main', but .* is no id on the Hub"):
        palate.load_model(ID, revision="main")
    with pytest.raises(ModelFileError, match="is no folder; expected a folder"):
        palate.load_model(Path("ada-lab/nothing"))  # a Path is a folder, and nobody is asked
    assert hub.asked == []


# what is refused


def test_a_private_model_is_not_shown_to_everybody(hub: Hub) -> None:
    palate.push_to_hub(tiny(1.0), ID, private=False)
    before = hub.repos[ID].branches["main"]
    with pytest.raises(DataError, match=r"exists and everybody sees it, but a private model was asked for"):
        palate.push_to_hub(tiny(2.0), ID)
    assert hub.repos[ID].branches["main"] == before
    palate.push_to_hub(tiny(2.0), ID, private=False)
    assert hub.repos[ID].branches["main"] != before


def test_a_private_model_wants_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    palate.push_to_hub(tiny(), ID)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ModelFileError, match=r"no such model, or it is private\. Check the name\. Set HF_TOKEN, or run `hf auth"):
        palate.load_model(ID)
    assert palate.load_model(ID, token=TOKEN).fingerprint() == tiny().fingerprint()
    with pytest.raises(PalateError, match=r"does not let you at ada-lab/other \(HTTP 401\)\. Set HF_TOKEN"):
        palate.push_to_hub(tiny(), "ada-lab/other")
    assert set(hub.repos) == {ID}


def test_what_is_not_there_is_said(hub: Hub) -> None:
    with pytest.raises(ModelFileError, match=r"ada-lab/nothing is no folder here, and http://127.* has no such model"):
        palate.load_model("ada-lab/nothing")
    palate.push_to_hub(tiny(), ID)
    with pytest.raises(ModelFileError, match=r"has no revision 'v2'; expected a branch, a tag or a commit of it"):
        palate.load_model(ID, revision="v2")
    hub.repos["ada-lab/empty"] = Repo(private=False)
    with pytest.raises(ModelFileError, match=r"has no config\.json, so it is no model of palate"):
        palate.load_model("ada-lab/empty")
    for name in ("lunch", "a/b/c", "-a/b", "a b/c", ""):
        with pytest.raises(DataError, match="expected ORG/NAME, such as"):
            palate.push_to_hub(tiny(), name)
    with pytest.raises(DataError, match=r"can be no model on the Hub"):
        palate.push_to_hub(tiny(), "ada/too--many")


def test_somebody_elses_model_is_neither_downloaded_nor_overwritten(hub: Hub) -> None:
    hub.repos["bert/base"] = repo = Repo(private=False)
    repo.commit("main", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"\0" * 1000})
    with pytest.raises(ModelFileError, match=r"bert/base on the Hub is no model of palate .* is of format None"):
        palate.load_model("bert/base")
    assert hub.downloads() == ["config.json"]
    with pytest.raises(ModelFileError, match="it belongs to something else"):
        palate.push_to_hub(tiny(), "bert/base", private=False)
    assert repo.main["config.json"] == b'{"model_type": "bert"}'


def test_what_arrives_damaged_is_refused(hub: Hub) -> None:
    palate.push_to_hub(tiny(), ID)
    hub.garbled = lambda path, content: content[:-1] + bytes([content[-1] ^ 1]) if path.endswith(".safetensors") else content
    with pytest.raises(ModelFileError, match=r"is not the file that config\.json was written for"):
        palate.load_model(ID)


def test_what_arrives_cut_off_is_refused(hub: Hub) -> None:
    palate.push_to_hub(tiny(), ID)
    hub.garbled = lambda path, content: content[:100] if path == "config.json" else content
    with pytest.raises(ModelFileError, match=r"ada-lab/lunch.taste_1 on the Hub is no model of palate .* is no JSON"):
        palate.load_model(ID)


def test_a_hub_that_cannot_be_reached(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point_at: Callable[[str, Path], None]
) -> None:
    palate.push_to_hub(tiny(), ID)
    palate.load_model(ID)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert palate.load_model(ID).fingerprint() == tiny().fingerprint()  # from the cache, asking nobody
    with pytest.raises(ModelFileError, match=r"is no folder here, and the Hub may not be asked \(HF_HUB_OFFLINE is set\)"):
        palate.load_model("ada-lab/other")
    with pytest.raises(PalateError, match="may not be asked, because HF_HUB_OFFLINE is set"):
        palate.push_to_hub(tiny(), ID)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    point_at(f"http://127.0.0.1:{port}", tmp_path / "other-cache")
    began = time.perf_counter()
    with pytest.raises(
        ModelFileError, match=rf"http://127.0.0.1:{port} cannot be reached \(.*refused.*\), and its cache has no copy"
    ):
        palate.load_model(ID)
    with pytest.raises(PalateError, match=rf"the connection to http://127.0.0.1:{port} failed"):
        palate.push_to_hub(tiny(), ID)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("route", "status"), [("/api/repos/create", 500), ("/commit/", 403), ("/commit/", 413), ("/preupload/", 400)]
)
def test_a_push_that_fails_changes_nothing(hub: Hub, route: str, status: int) -> None:
    palate.push_to_hub(tiny(1.0), ID)
    before = hub.repos[ID].branches["main"]
    hub.broken = lambda method, path: status if route in path else None
    with pytest.raises(PalateError, match=f"HTTP {status}"):
        palate.push_to_hub(tiny(2.0), ID)
    hub.broken = lambda method, path: None
    assert hub.repos[ID].branches["main"] == before
    assert palate.load_model(ID).fingerprint() == tiny(1.0).fingerprint()


def test_a_card_that_the_hub_does_not_take(hub: Hub) -> None:
    with pytest.raises(DataError, match=r"the Hub did not take the files .*\"license\" must be known"):
        palate.push_to_hub(tiny(), ID, card="---\nlicense: nonsense\n---\n# Lunch\n")
    assert "config.json" not in hub.repos[ID].main


@pytest.mark.parametrize("source", ["/home/ada/encoder", "./encoder", "http://10.0.0.7:8000/v1", None])
def test_an_encoder_that_nobody_else_finds_does_not_go(hub: Hub, tmp_path: Path, source: str | None) -> None:
    tiny().save_pretrained(tmp_path)
    state = {"encoder": "joined", "parts": [{"encoder": "style"}, {"encoder": "sentence", "source": source}]}
    (tmp_path / "encoder.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"the encoder reads .*, which nobody else finds outside this machine"):
        palate.push_to_hub(tmp_path, ID, card="# Lunch")
    assert hub.asked == []


def test_an_encoder_of_another_model(hub: Hub, fitted: Any) -> None:
    model, _, _ = fitted
    with pytest.raises(MismatchError, match="push it with the encoder that it was fitted with"):
        palate.push_to_hub(model, ID, encoder=Items())
    assert hub.asked == []


# the card


@pytest.fixture(scope="module")
def compared(fitted: Any) -> palate.Evaluation:
    _, encoder, pairs = fitted
    models: dict[str, RewardModel] = {
        "bt": palate.BradleyTerry(ridge=0.01),
        "hierarchical": palate.Hierarchical(3, bend=0, types=(), kappa=1.0),
    }
    return palate.compare(pairs, encoder, models, seeds=2, shots=(0, 2, None), min_support=1, data_set="lunch | choices")


def test_the_index_of_a_card_holds_the_figures_of_the_comparison(fitted: Any, compared: palate.Evaluation) -> None:
    model, encoder, _ = fitted
    text = palate.model_card(model, encoder=encoder, results=compared, repo_id=ID, license="apache-2.0", languages=["en"])
    data = ModelCard(text).data
    found = {(r.dataset_split, r.metric_name): (r.metric_value, r.metric_args["interval_95"]) for r in data.eval_results}
    assert len(found) == 6
    for cohort in ("seen", "unseen"):
        for metric, name in (
            ("accuracy", "Accuracy, mean over users"),
            ("worst_decile", "Accuracy of the tenth of the users who"),
        ):
            true = compared.interval("hierarchical", cohort=cohort, metric=metric)
            key = next(key for key in found if key[0] == f"{cohort} users" and key[1].startswith(name))
            assert found[key] == (round(true.value, 4), [round(true.low, 4), round(true.high, 4)])
    assert (data.license, data.library_name, data.pipeline_tag, data.language) == (
        "apache-2.0",
        "palate",
        "text-classification",
        ["en"],
    )
    assert data.model_name == "lunch.taste_1"
    assert {"reward-model", "hierarchical"} <= set(data.tags)
    assert "base_model" not in data.to_dict()


def test_the_words_of_a_card(fitted: Any, compared: palate.Evaluation) -> None:
    model, encoder, pairs = fitted
    text = palate.model_card(model, encoder=encoder, results=compared, repo_id=ID)
    row = {(r["method"], r["cohort"], r["shots"]): r for r in compared.summary()}["hierarchical", "unseen", None]
    tail = compared.interval("hierarchical", metric="worst_decile")
    worst = text.partition("## Whom it serves worst")[2].partition("##")[0]
    assert f"{100 * row['worst_10']:.1f} % [{100 * tail.low:.1f}, {100 * tail.high:.1f}]" in worst
    assert f"at {100 * row['floor_10']:.1f} %." in worst
    results = text.partition("## Results")[2].partition("## Whom")[0]
    assert "### lunch \\| choices: unseen people" in results  # a bar would end a cell
    assert results.count("| **Hierarchical** |") == 2
    assert results.count("| Bradley-Terry |") == 2
    assert "Fitted on 480 choices by 40 people." in text
    assert "Only 40 people took part" in text
    assert model.fingerprint() in text
    assert encoder.fingerprint in text
    assert "no licence (`license: unknown`)" in text
    assert not any(user in text for user in pairs.user_ids)


def test_what_was_not_measured_is_said_to_be_not_measured() -> None:
    text = palate.model_card(tiny())
    assert text.count("Not measured.") == 2
    assert "Nobody has measured how good it is" in text
    assert "Fitted on an unknown number of choices by an unknown number of people." in text
    assert ModelCard(text).data.eval_results is None


def naming_of(*whats: str) -> palate.Naming:
    names = (Name(what, "longer; less formal", (), 0.5, ("length",), 0.25, (), ()) for what in whats)
    return palate.Naming(tuple(names), threshold=0.1, n_texts=50, n_prompts=10, coordinates="As fitted.")


def test_the_names_of_the_bases_go_into_a_card_and_those_of_a_person_do_not(fitted: Any) -> None:
    model, _, _ = fitted
    naming = naming_of("the crowd", "base 1", "base 12")
    assert naming.markdown() in palate.model_card(model, naming=naming)
    for user in (ADA, "base ada", "the crowd of ada"):
        with pytest.raises(DataError, match="describes a person, and a card names nobody"):
            palate.model_card(model, naming=naming_of("the crowd", user))


def test_which_of_the_results_are_this_models(compared: palate.Evaluation, fitted: Any) -> None:
    model, _, _ = fitted
    with pytest.raises(DataError, match="0 of the methods bt, hierarchical are a LoRe; say which one"):
        palate.model_card(
            palate.LoRe(2).like({"bases": torch.eye(3, 2), "mean_weights": torch.tensor([0.5, 0.5])}), results=compared
        )
    with pytest.raises(DataError, match=r"method is 'bt', for a Hierarchical; the results have bt \(BradleyTerry\)"):
        palate.model_card(model, results=compared, method="bt")
    assert palate.model_card(model, results=compared, method="hierarchical") == palate.model_card(model, results=compared)


def test_a_card_describes_a_fitted_model_and_its_own_encoder(fitted: Any) -> None:
    model, _, _ = fitted
    with pytest.raises(DataError, match="is not fitted; a card describes"):
        palate.model_card(palate.Hierarchical())
    with pytest.raises(MismatchError, match="give the encoder that the model was fitted with"):
        palate.model_card(model, encoder=Items())


def test_the_base_model_is_found_inside_the_encoder() -> None:
    state = {
        "encoder": "joined",
        "parts": [
            {"encoder": "minilm"},
            {"encoder": "tuned", "base": {"encoder": "hf", "id": "Skywork/Reward-8B"}, "lora": None},
            {"encoder": "sentence", "source": "/home/ada/secret-encoder"},
        ],
    }
    model = tiny()
    model.encoder = digest(state)
    text = palate.model_card(model, encoder=state)
    assert ModelCard(text).data.base_model == ["Skywork/Reward-8B", "sentence-transformers/all-MiniLM-L6-v2"]
    assert "secret-encoder" not in text
    assert [is_local(source) for source in sources(state)] == [False, False, True]


def test_the_example_of_a_card_runs(hub: Hub, fitted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder, _ = fitted
    palate.push_to_hub(model, ID, encoder=encoder)
    code = re.search(r"```python\n(.*?)```", hub.repos[ID].main["README.md"].decode(), flags=re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    rows = [{"user_id": user, "prompt": "Lunch?", "chosen": f"Soup {user}.", "rejected": "Bread."} for user in ("ada", "ben")]
    Path("choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    namespace: dict[str, Any] = {}
    exec(compile(code[1], "README.md", "exec"), namespace)
    assert set(namespace["profiles"]) == {"ada", "ben"}
    assert namespace["scorer"].model.fingerprint() == model.fingerprint()


# the command line


def test_card_and_push_and_rank_by_id(
    hub: Hub, fitted: Any, compared: palate.Evaluation, tmp_path: Path, palate_command: Callable[..., Any]
) -> None:
    model, encoder, _ = fitted
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    save_encoder(encoder, folder)
    compared.save(tmp_path / "results.jsonl")
    (tmp_path / "answers.jsonl").write_text('"Yes."\n"It depends: there are three things to weigh."\n')

    done = palate_command("push", folder, ID, "--results", tmp_path, "--license", "mit")
    assert done.code == 0, done.err
    commit = done.out.strip().removeprefix(f"{ID}@")
    assert commit == hub.repos[ID].branches["main"]
    assert ModelCard(hub.repos[ID].main["README.md"].decode()).data.license == "mit"
    assert not (folder / "README.md").exists()
    local = palate_command("rank", folder, tmp_path / "answers.jsonl", "--prompt", "Should I?")
    assert local.code == 0, local.err
    for name in (ID, f"{ID}@{commit}", f"{ID}@main"):
        assert palate_command("rank", name, tmp_path / "answers.jsonl", "--prompt", "Should I?") == local

    done = palate_command("card", folder, "--results", tmp_path, "--id", ID, "--dataset", "ada/lunches", "--language", "en")
    assert (done.code, done.out.strip()) == (0, str(folder / "README.md"))
    written = ModelCard((folder / "README.md").read_text()).data
    assert (written.license, written.datasets, len(written.eval_results)) == ("unknown", ["ada/lunches"], 6)
    done = palate_command("card", folder)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "edit it, or write it anew with --overwrite" in done.err
    assert palate_command("card", folder, "--overwrite").code == 0
    done = palate_command("push", folder, ID, "--license", "mit")
    assert done.code == 2
    assert "exists and is pushed as it is" in done.err
    done = palate_command("push", folder, ID, "--public")  # private it stays
    assert (done.code, hub.repos[ID].private) == (0, True)
    assert hub.repos[ID].main["README.md"] == (folder / "README.md").read_bytes()


def test_a_card_of_the_model_that_was_there_before_does_not_go(
    hub: Hub, tmp_path: Path, palate_command: Callable[..., Any]
) -> None:
    tiny().save_pretrained(tmp_path / "model")
    assert palate_command("card", tmp_path / "model").code == 0
    tiny(2.0).save_pretrained(tmp_path / "model")
    done = palate_command("push", tmp_path / "model", ID)
    assert (done.code, ID in hub.repos) == (2, False)
    assert "palate card --overwrite" in done.err
    assert palate_command("card", tmp_path / "model", "--overwrite").code == 0
    assert palate_command("push", tmp_path / "model", ID).code == 0


def test_mistakes_at_the_command_line_are_one_line(hub: Hub, tmp_path: Path, palate_command: Callable[..., Any]) -> None:
    tiny().save_pretrained(tmp_path / "model")
    for command, said in (
        (("adapt", "ada-lab/nothing", tmp_path / "rows.jsonl", "--out", tmp_path / "p"), "has no such model"),
        (("push", tmp_path / "nowhere", ID), "is no folder"),
        (("push", tmp_path / "model", "lunch"), "expected ORG/NAME"),
        (("card", tmp_path / "model", "--results", tmp_path), "results.jsonl does not exist"),
    ):
        done = palate_command(*command)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done
        assert said in done.err
