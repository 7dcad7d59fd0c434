"""A whole service against what no client of ours would send. The long run: `python -m benchmarks.fuzz_server`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from palate.client import Client

pytestmark = [pytest.mark.slow, pytest.mark.allow_hosts(["127.0.0.1"])]


@pytest.fixture(scope="module")
def fuzz(root: Path) -> Iterator[Any]:
    """benchmarks.fuzz_server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        from benchmarks import fuzz_server

        yield fuzz_server


@pytest.fixture(scope="module")
def service(fuzz: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with fuzz.served(fuzz.small_lane(), tmp_path_factory.mktemp("service")) as running:
        yield running


def test_hostile_bytes_are_refused_and_the_service_lives(fuzz: Any, service: Any) -> None:
    assert fuzz.wrong_answers(service) == []
    assert service.failures() == {}
    with Client(service.url, service.key) as client:
        assert client.ready()["status"] == "ready"
        assert len(client.rank("ada", "Lunch?", ["Soup.", "Toast."]).results) == 2


def test_schemathesis_finds_nothing(fuzz: Any, service: Any) -> None:
    """Examples, data that fits and data that does not, of every operation; all checks."""
    code, said = fuzz.schemathesis(service, 2, 0, "--phases", "examples,fuzzing")
    assert code == 0, said[-5000:]
    assert service.failures() == {}
    answers = service.answers()
    assert {"200", "422"} <= set(answers), answers


def test_neither_log_nor_metrics_hold_what_was_sent(fuzz: Any, service: Any) -> None:
    with Client(service.url, service.key) as client:
        client.consent("user-4711-planted", "personalise", "2026-01")
        choice = {"kind": "choice", "prompt": "Lunch?", "chosen": fuzz.PLANTED, "rejected": "Toast."}
        client.feedback("user-4711-planted", choice)
        client.rank("user-4711-planted", fuzz.PLANTED, [fuzz.PLANTED, "Toast."])
    log = service.log.read_text(encoding="utf-8")
    seen = log + service.metrics.render()[0].decode()
    for planted in (fuzz.PLANTED, "user-4711-planted", service.key, service.key[7:]):
        assert planted not in seen
    assert '"route": "/v1/users/{user_id}/rank"' in log
