"""A log learned in one go: the profile that its events give one after another, kept even where nobody waits for it any more."""

import asyncio
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import palate
from letters import Letters, model_of
from palate.data.pairs import PairSet
from palate.encoders import Encoder
from palate.errors import DataError
from palate.living.consent import Consent
from palate.living.draft import Draft
from palate.living.events import Correction, Undo, apply, parse_feedback
from palate.living.explain import AxisEdit
from palate.living.flips import Flips
from palate.living.population import Population
from palate.living.profile import LiveProfile
from palate.server.lanes import Lane, Room
from palate.server.learning import AT_ONCE, Said, from_log, learned, rewards
from palate.server.loading import lane_of as make_lane
from palate.server.runtime import Runtime
from palate.store import open_store
from palate.store.records import Logged

TEXTS = [f"Text {i}." for i in range(6)]
ADA = ("default", "ada")
FORGETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "by both": {"half_life": 20.0, "half_life_choices": 5.0},
    "errs": {"flip_rate": Flips.beta(0.1, 12)},
}


@cache
def sample() -> PairSet:
    return palate.synthetic(12, 8, seed=0).pairs


@cache
def lane(kind: str) -> Lane:
    scorer = palate.Scorer(Letters(), model_of())
    return make_lane("m", scorer, Population.of(scorer.model, **FORGETS[kind]), sample=sample(), room=Room(max_wait=0.0))


def one_after_another(life: LiveProfile, said: Sequence[Said], found: Any, by: Lane) -> LiveProfile:
    """As the profile does it by itself: a solve for each event."""
    for one in said:
        if isinstance(one.event, AxisEdit):
            life = by.explains().edited(life, one.event.model_copy(update={"at": one.at}))
        else:
            life = apply(life, one.event, lambda *texts: found[texts], by.reading, event_id=one.event_id, at=one.at)
    return life


Step = tuple[int, int, int, int]
STEPS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99), st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=24)


def story(steps: Sequence[Step], axes: Sequence[str]) -> list[Said]:
    """Events that can be: what is taken back or corrected is there, and may come again under the same name."""
    out: list[Said] = []
    there: list[str] = []
    for number, (kind, which, first, apart) in enumerate(steps):
        a, b = TEXTS[first], TEXTS[(first + apart) % 6]
        says: dict[str, Any] = [
            {"kind": "choice", "chosen": a, "rejected": b},
            {"kind": "choice", "chosen": a, "rejected": b, "tie": True, "weight": 2.0},
            {"kind": "pick", "shown": [a, b], "picked": which % 2},
            {"kind": "rating", "response": a, "value": which % 11, "low": 0, "high": 10},
            {"kind": "thumb", "response": a, "up": which % 2 == 0},
            {"kind": "unsure", "first": a, "second": b},
        ][which % 6]
        says["prompt"] = "Lunch?"
        name, event = f"e{which % 12}", parse_feedback(says)
        at = 1.7e9 + (which * 7) % 40  # clocks jump
        old = there[which % len(there)] if there else None
        if kind in (6, 7) and old is not None:
            out.append(Said(f"n{number}", Undo(of=old), at))
            there.remove(old)
        elif kind == 8 and old is not None and not old.startswith("axis"):
            out.append(Said(f"n{number}", Correction.model_validate({"of": old, "event": event}), at))
        elif kind == 9:
            edit = AxisEdit(axis=axes[which % len(axes)], to=0.1 * first)
            out.append(Said(f"n{number}", edit, at))
            there += [] if edit.name in there else [edit.name]
        elif name not in there:
            out.append(Said(name, event, at))
            there.append(name)
    return out


def same(a: LiveProfile, b: LiveProfile) -> None:
    assert (a.event_ids, a.history.count) == (b.event_ids, b.history.count)
    for column in ("at", "n_terms", "n_pulls", "n_choices"):
        np.testing.assert_array_equal(getattr(a.history, column), getattr(b.history, column))
    for mine, theirs in zip(a.history.rows, b.history.rows, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_allclose(a.mean, b.mean, atol=1e-6)
    np.testing.assert_allclose(a.solved.flips, b.solved.flips, atol=1e-6)
    assert a.covariance is not None
    assert b.covariance is not None
    np.testing.assert_allclose(a.covariance, b.covariance, atol=1e-6)
    assert a.converged
    assert b.converged


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(1, 9), st.sampled_from(list(FORGETS)))
def test_a_log_page_by_page_is_its_events_one_after_another(steps: list[Step], page: int, kind: str) -> None:
    by = lane(kind)
    said = story(steps, by.explains().axes)
    logged = [Logged(seq, one.event_id, one.event.kind, one.payload, one.at) for seq, one in enumerate(said, 1)]

    async def log(seq: int) -> list[Logged]:
        return logged[seq : seq + page]

    async def work() -> None:
        found = await rewards(by, said)
        slow = one_after_another(by.population.start("ada"), said, found, by)
        fast, seq = await from_log("ada", log, by)
        assert seq == len(said)
        same(fast, slow)
        same(by.population.from_bytes(fast.to_bytes()), slow)
        cut = len(said) // 2  # a profile that has events already: some of them are taken back, some corrected
        same(learned(learned(by.population.start("ada"), said[:cut], found, by), said[cut:], found, by), slow)

    asyncio.run(work())


def test_what_a_profile_refuses_a_draft_refuses_in_the_same_words() -> None:
    by = lane("plain")
    terms = by.explains().terms(AxisEdit(axis=by.explains().axes[0], to=0.0))
    life = by.population.start("ada").update(terms, event_id="a").update(terms)
    draft = Draft(by.population.start("ada")).update(terms, event_id="a").update(terms)
    assert list(draft.event_ids) == ["a", "event-1"]
    for refused in (
        lambda profile: profile.undo("z"),
        lambda profile: profile.correct("z", terms),
        lambda profile: profile.brought("z"),
        lambda profile: profile.update(terms, event_id="a"),
        lambda profile: profile.update(terms, at=float("inf")),
        lambda profile: profile.correct("a", terms, float("nan")),
        lambda profile: profile.update(terms._replace(level=np.full(1, np.nan))),
    ):
        said = []
        for profile in (life, draft):
            with pytest.raises(DataError) as caught:
                refused(profile)
            said.append(str(caught.value))
        assert said[0] == said[1]
    same(draft.solved(), life)  # a refusal leaves nothing


def test_a_page_of_more_texts_than_the_encoder_takes_at_once_is_learned() -> None:
    async def work() -> None:
        scorer = palate.Scorer(Letters(), model_of())
        by = Lane("m", scorer, Population.of(scorer.model), room=Room(max_wait=0.0, max_queue=AT_ONCE + 1))
        says = [{"kind": "choice", "prompt": str(i), "chosen": "Yes.", "rejected": "No."} for i in range(AT_ONCE)]
        said = [Said(str(i), parse_feedback(one), 1.7e9) for i, one in enumerate(says)]
        found = await rewards(by, said)
        assert len(found) == AT_ONCE
        same(learned(by.population.start("ada"), said, found, by), one_after_another(by.population.start("ada"), said, found, by))
        await by.batcher.close()

    asyncio.run(work())


@pytest.mark.parametrize("asked", ["rank", "feedback"])
def test_what_nobody_waits_for_any_more_is_learned_and_kept(tmp_path: Path, asked: str) -> None:
    events = [parse_feedback({"kind": "choice", "prompt": str(i), "chosen": "Yes.", "rejected": "No."}) for i in range(20)]

    def lane_of(encoder: Encoder, seed: int) -> Lane:
        scorer = palate.Scorer(encoder, model_of(seed))
        return Lane("m", scorer, Population.of(scorer.model), room=Room(max_wait=0.0))

    async def work() -> None:
        with open_store(str(tmp_path / "profiles.db")) as store:
            old = Runtime([lane_of(Letters(), 0)], store)
            await old.agreed(ADA, Consent(purpose="personalise", text_version="1", granted=True, at=1.7e9))
            await old.feedback(ADA, events)
            await old.close()
            encoder = Letters()
            encoder.gate.clear()
            new = Runtime([lane_of(encoder, 1)], store)
            waiting: Any = new.person(ADA) if asked == "rank" else new.feedback(ADA, events[:1])
            task = asyncio.create_task(waiting)
            await asyncio.to_thread(encoder.asked.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            encoder.gate.set()
            async with asyncio.timeout(10):
                while not (held := await new.people.held(ADA, reread=True)).lives:  # nobody asks
                    await asyncio.sleep(0.005)
            assert (sum(map(len, encoder.calls)), held.last) == (2 * len(events), len(events))
            by = lane_of(Letters(), 1)
            said = [Said(one.event_id, event, one.at) for one, event in zip(store.events(*ADA), events, strict=True)]
            same(held.lives[by.fingerprint], one_after_another(by.population.start("ada"), said, await rewards(by, said), by))
            await by.batcher.close()
            await new.close()

    asyncio.run(work())


def test_a_server_that_ends_leaves_no_learning_behind(tmp_path: Path) -> None:
    """It ends at once, and the next one begins again: the log is all that is needed."""

    async def work() -> None:
        with open_store(str(tmp_path / "profiles.db")) as store:
            server = Runtime([lane("plain")], store)
            stuck = asyncio.get_running_loop().create_future()
            server.people.call = lambda *_: stuck  # type: ignore[method-assign]
            task = asyncio.create_task(server.relearned(ADA, server.lanes[0]))
            await asyncio.sleep(0)
            await asyncio.wait_for(server.close(), 10)
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(work())
