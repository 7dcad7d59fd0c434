"""Kill -9 while profiles are being learned and written: nothing acknowledged is lost, and every profile equals a fresh one.

Ten times on SQLite and, where it is installed, three on PostgreSQL, once with its server killed as well; `python -m
benchmarks.kill_store` does the same hundreds of times.
"""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def bench(root: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        from benchmarks import kill_store

        yield kill_store


@pytest.fixture(scope="module")
def place(bench: Any) -> Any:
    return bench.world()


@pytest.mark.slow
def test_ten_times_kill_9_on_sqlite(bench: Any, place: Any, tmp_path: Path) -> None:
    told, url = bench.Told(), str(tmp_path / "profiles.db")
    for number in range(10):
        bench.trial(place, url, number, told)
        assert bench.faults(place, url, told) == []
    assert len(told.acknowledged) > 20
    _the_search_for_faults_finds_them(bench, place, url, told)


def _the_search_for_faults_finds_them(bench: Any, place: Any, url: str, told: Any) -> None:
    """Each damage alone, made behind the store's back and taken back again, is found."""
    raw = sqlite3.connect(url, isolation_level=None)
    owner, name, last = raw.execute("SELECT id, user_id, last FROM palate_users ORDER BY last DESC").fetchone()
    other = f"SELECT blob FROM palate_states WHERE owner <> {owner} LIMIT 1"
    here = f"WHERE owner = {owner} AND seq = {last}"
    damages = {
        "not there|events, last|is not that of a replay": [f"DELETE FROM palate_events {here}"],
        "is not what was sent": [f"UPDATE palate_events SET payload = '{{\"row\": 10}}' {here}"],
        "the profile goes to": [f"UPDATE palate_states SET through = {last - 1} WHERE owner = {owner}"],
        "has the answer None": [f"DELETE FROM palate_answers WHERE owner = {owner}"],
        "is not there": [f"DELETE FROM palate_users WHERE id = {owner}", f"DELETE FROM palate_events WHERE owner = {owner}"],
        "not that of a replay": [f"UPDATE palate_states SET blob = ({other}) WHERE owner = {owner}"],
    }
    raw.execute("VACUUM INTO ?", (url + ".whole",))
    raw.close()
    for number, (words, statements) in enumerate(damages.items()):
        copy = f"{url}.{number}"
        Path(copy).write_bytes(Path(url + ".whole").read_bytes())
        changed = sqlite3.connect(copy, isolation_level=None)
        for statement in statements:
            assert changed.execute(statement).rowcount >= 1
        changed.close()
        found = [fault for fault in bench.faults(place, copy, told) if name in fault]
        assert any(word in fault for word in words.split("|") for fault in found), (words, found)


@pytest.mark.slow
def test_kill_9_on_postgresql_and_of_its_server(bench: Any, place: Any) -> None:
    from benchmarks.postgres import Postgres, programs

    if programs() is None:
        pytest.skip("no PostgreSQL on this machine (on Debian: apt-get install postgresql)")
    told = bench.Told()
    with Postgres() as server:
        for number in range(3):
            bench.trial(place, server.url, number, told, server if number == 1 else None)
            assert bench.faults(place, server.url, told) == []
    assert len(told.acknowledged) > 0
