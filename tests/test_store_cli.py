"""`palate export`, `forget`, `prune` and `retire` on a real store: what a person gets, and that nothing of them is left."""

import json
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from palate.store import Consent, Event, Write, Written, open_store

Run = Callable[..., "tuple[int, str, str]"]
TEXT = "a sentence that nobody else has written"


@pytest.fixture
def url(tmp_path: Path) -> str:
    place = str(tmp_path / "profiles.db")
    old, new = (Event(f"e{n}", "choice", json.dumps({"text": TEXT}), at) for n, at in ((1, 1000.0), (2, 4e9)))
    with open_store(place) as store:
        writes = [Write("default", user, 0, (old, new), {}, Consent("ranking", "1", 1000.0)) for user in ("ada", "bob")]
        assert all(isinstance(found, Written) for found in store.write(writes))
    return place


def test_export_then_forget(url: str, palate_command: Run, tmp_path: Path) -> None:
    code, out, _ = palate_command("export", "ada", "--store", url)
    assert code == 0
    assert [json.loads(event["payload"])["text"] for event in json.loads(out)["events"]] == [TEXT, TEXT]
    assert palate_command("forget", "ada", "", "--store", url)[0] == 2  # and nobody is deleted
    code, _, err = palate_command("forget", "bob", "ada", "--store", url)
    assert code == 0
    assert all(f"{name!r} of tenant 'default' is deleted: 2 events" in err for name in ("ada", "bob"))
    assert not any(word.encode() in file.read_bytes() for file in tmp_path.iterdir() for word in ("ada", "bob", TEXT))
    code, out, err = palate_command("export", "ada", "--store", url)
    assert (code, out) == (2, "")
    assert "there is no user 'ada'" in err
    assert "there was no user" in palate_command("forget", "ada", "--store", url)[2]


def test_prune(url: str, palate_command: Run) -> None:
    assert "2 events of 2 users are forgotten" in palate_command("prune", "--store", url, "--older-than", "365d")[2]
    with open_store(url) as store:
        assert [event.event_id for event in store.events("default", "ada")] == ["e2"]
    assert "--older-than is 'soon'" in palate_command("prune", "--store", url, "--older-than", "soon")[2]


def test_who_holds_on_to_old_bytes_is_said(url: str, palate_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palate.store.open_store", partial(open_store, patience=0.1))
    reader = sqlite3.connect(url, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM palate_events").fetchone()
    code, _, err = palate_command("forget", "ada", "--store", url)
    assert (code, "a reader holds on to them; end it and run this again" in err) == (1, True)
    reader.close()
    assert palate_command("forget", "ada", "--store", url)[0] == 0
    assert b"ada" not in Path(url).read_bytes()


def test_a_model_that_is_served_no_more_is_retired(url: str, palate_command: Run, tmp_path: Path) -> None:
    assert "no model was served" in palate_command("retire", "--store", url)[2]
    with open_store(url) as store:
        for fingerprint, name in (("aa11", "taste"), ("bb22", "taste"), ("aa33", "newer")):
            store.models.add(fingerprint, name)
        states = {"aa11": b"an old profile", "aa33": b"a new profile"}
        store.write([Write("default", user, 1, states=states) for user in ("ada", "bob")])
    out = palate_command("retire", "--store", url)[1]
    assert out.count("taste") == 2
    for given, says in (
        ("taste", "2 models are 'taste'; expected one of taste (aa11), taste (bb22)"),
        ("aa", "2 models are 'aa'; expected one of taste (aa11), newer (aa33)"),
        ("gone", "0 models are 'gone'; expected one of taste (aa11), taste (bb22), newer (aa33)"),
        ("", "0 models are ''"),
    ):
        code, _, err = palate_command("retire", given, "--store", url)
        assert (code, says in " ".join(err.split())) == (2, True), err
    code, _, err = palate_command("retire", "aa1", "--store", url)
    assert (code, "model taste (aa11) is retired: 2 profiles are deleted" in err) == (0, True)
    assert not any(b"an old profile" in file.read_bytes() for file in tmp_path.iterdir())
    with open_store(url) as store:
        user = store.read("default", "ada")
        assert user is not None
        assert user.states == {"aa33": (b"a new profile", 2)}
        assert len(store.events("default", "ada")) == 2
        assert [one.retired is None for one in store.models.list()] == [False, True, True]


def test_a_mistyped_store_is_said_and_not_made(palate_command: Run, tmp_path: Path) -> None:
    """An empty new one would say that nobody of that name was ever there, and a deletion would look done."""
    url = str(tmp_path / "profile.db")
    for line in (
        ("export", "ada"),
        ("forget", "ada"),
        ("prune", "--older-than", "1d"),
        ("retire", "model"),
        ("keys", "list"),
        ("keys", "revoke", "1"),
    ):
        code, _, err = palate_command(*line, "--store", url)
        assert (code, "there is no store" in err) == (2, True), line
    assert not any(tmp_path.iterdir())
