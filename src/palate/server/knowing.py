"""Routes about what is known of a user: what to ask them next, what they like in words, and changing it by hand."""

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated

import numpy as np
import torch
from fastapi import APIRouter, Query, Response, Security

from palate.errors import DataError, StoreBusyError
from palate.living.explanation import Explanation
from palate.living.profile import LiveProfile
from palate.living.terms import Rewards
from palate.questions import (
    DOptimal,
    MutualInformation,
    Pool,
    Random,
    Targeted,
    Thompson,
    next_questions,
    pairs_among,
    should_stop,
)
from palate.questions import Question as AnyRule
from palate.server.access import Caller, needs
from palate.server.bodies import REPLAYED, AxisChange, FeedbackAnswer, Question, QuestionAnswer, QuestionRequest, prompt_of
from palate.server.parsing import Key, User, taken, takes
from palate.server.problems import Problem, documented
from palate.server.runtime import ATTEMPTS, OutdatedError, Runtime, unknown

RULES: dict[str, Callable[[], AnyRule]] = {
    "information": MutualInformation,
    "thompson": Thompson,
    "d-optimal": DOptimal,
    "random": Random,
}


def router(runtime: Runtime) -> APIRouter:
    """The routes over one runtime."""
    out = APIRouter(prefix="/v1/users/{user_id}")

    @out.post(
        "/question",
        operation_id="next_question",
        tags=["feedback"],
        summary="Which two responses to show next, to learn most",
        responses=documented(),
        openapi_extra=takes(QuestionRequest),
    )
    async def question(
        user_id: User,
        caller: Annotated[Caller, Security(needs("rank"))],
        body: Annotated[QuestionRequest, taken(QuestionRequest)],
    ) -> QuestionAnswer:
        held, lane, life = await runtime.life((caller.tenant, user_id), runtime.lane(body.model))
        found = await asyncio.gather(*(lane.rewards(prompt_of(entry.prompt), entry.candidates) for entry in body.pool))
        questions, enough = await asyncio.to_thread(chosen, life, found, body.rule, body.n, held.version)
        return QuestionAnswer(user_id=user_id, model=lane.name, questions=questions, enough=enough)

    @out.get(
        "/explain",
        operation_id="explain_user",
        tags=["users"],
        summary="What a user likes, in words, and which of their choices say so",
        responses=documented(),
    )
    async def explain(
        user_id: User,
        caller: Annotated[Caller, Security(needs("users"))],
        model: Annotated[str | None, Query(max_length=256)] = None,
    ) -> Explanation:
        held, lane, life = await runtime.life((caller.tenant, user_id), runtime.lane(model))
        if not held.version:
            raise unknown()
        return await asyncio.to_thread(lane.explains().explain, life)

    @out.patch(
        "/axes/{axis}",
        operation_id="set_axis",
        tags=["feedback"],
        summary="Turn an axis of the explanation down, off or up",
        description='Kept as an event; `{"kind": "undo", "of": "axis:length"}` as feedback takes it back.',
        responses=documented(409),
        openapi_extra=takes(AxisChange),
    )
    async def turn(
        user_id: User,
        axis: User,
        caller: Annotated[Caller, Security(needs("feedback"))],
        response: Response,
        body: Annotated[AxisChange, taken(AxisChange)],
        idempotency_key: Key = None,
    ) -> FeedbackAnswer:
        who = caller.tenant, user_id
        said = json.dumps([axis, body.model_dump()])  # the same request later finds the profile elsewhere, so the edit differs
        for _ in range(ATTEMPTS):
            held, lane, life = await runtime.life(who)
            explainer = lane.explains()
            if axis not in explainer.axes:
                raise Problem(404, f"there is no such axis; expected one of {', '.join(explainer.axes)}", code="unknown_axis")
            edit = explainer.edit(axis, life, by=body.by, to=body.to, softness=body.softness)
            as_of = None if body.by is None else held.version  # two steps at once are two, and not the same one twice
            with suppress(OutdatedError):
                done = await runtime.feedback(who, [edit], idempotency_key, said, as_of=as_of)
                response.headers.update(REPLAYED if done.before else {})
                return FeedbackAnswer(user_id=user_id, version=done.version, event_ids=list(done.event_ids))
        raise StoreBusyError(f"{ATTEMPTS} times somebody else wrote first for this user; try again in a moment")

    return out


def chosen(life: LiveProfile, found: Sequence[Rewards], rule: str, n: int, seed: int) -> tuple[list[Question], bool]:
    """The `n` best pairs of any entry of the pool, and whether every entry's best candidate is settled.

    A pair between which nobody's weights decide (one text given twice) is not asked: its answer would tell nothing.

    Raises `DataError` for a model without weights, or a rule that needs a covariance under a method that has none.
    """
    pools, rows = zip(*(pairs_among(rewards) for rewards in found), strict=True)
    whole = Pool(torch.cat([pool.slopes for pool in pools]), torch.cat([pool.offset for pool in pools]))
    if not whole.n_weights:
        raise DataError("this model has no personal weights, so there is nothing to ask; serve a model that has")
    first = np.cumsum([0, *(len(pairs) for pairs in rows)])
    telling = whole.slopes.any(dim=1).nonzero()[:, 0].tolist()
    best: list[int] = []
    if telling:
        asked = Pool(whole.slopes[telling], whole.offset[telling])
        how: AnyRule = Targeted(asked) if rule == "targeted" else RULES[rule]()
        best = [telling[row] for row in next_questions(life, asked, how, n, seed=seed)]
    out = []
    for place in best:
        entry = int(np.searchsorted(first, place, side="right")) - 1
        a, b = rows[entry][place - first[entry]].tolist()
        out.append(Question(entry=entry, first=a, second=b))
    settled = life.covariance is not None and all(should_stop(life, rewards, seed=seed) for rewards in found)
    return out, settled
