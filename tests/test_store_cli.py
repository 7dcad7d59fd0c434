"""`palate export`, `forget` and `prune` on a real store: what a person gets, and that nothing of them is left."""

import json
from collections.abc import Callable
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
    assert palate_command("forget", "bob", "--store", url)[0] == 0
    assert "'ada' of tenant 'default' is deleted: 2 events" in palate_command("forget", "ada", "--store", url)[2]
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


def test_a_mistyped_store_is_said_and_not_made(palate_command: Run, tmp_path: Path) -> None:
    """An empty new one would say that nobody of that name was ever there, and a deletion would look done."""
    url = str(tmp_path / "profile.db")
    for line in (
        ("export", "ada"),
        ("forget", "ada"),
        ("prune", "--older-than", "1d"),
        ("keys", "list"),
        ("keys", "revoke", "1"),
    ):
        code, _, err = palate_command(*line, "--store", url)
        assert (code, "there is no store" in err) == (2, True), line
    assert not any(tmp_path.iterdir())
