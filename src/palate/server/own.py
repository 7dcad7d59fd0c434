"""Palate's own routes: users with their consent, feedback, rankings, questions and explanations."""

import asyncio
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Response, Security
from starlette.types import ASGIApp

from palate.errors import DataError, PalateError
from palate.living.consent import Consent
from palate.living.together import mean, together, worst_off
from palate.server.access import Caller, needs
from palate.server.bodies import (
    REPLAYED,
    ConsentAnswer,
    DeleteAnswer,
    FeedbackAnswer,
    FeedbackBatch,
    FeedbackBody,
    FeedbackMany,
    FeedbackManyAnswer,
    HouseholdAnswer,
    HouseholdRanked,
    HouseholdRequest,
    Outcome,
    RankAnswer,
    RankBatch,
    RankBatchAnswer,
    RankedCandidate,
    RankRequest,
    ScoreAnswer,
    ScoreRequest,
    UserLine,
    UserPage,
    UserSummary,
    prompt_of,
)
from palate.server.direct import Answer, Asked, Direct
from palate.server.parsing import Key, User, taken, takes
from palate.server.people import Person, Who
from palate.server.problems import Problem, documented, of_error
from palate.server.runtime import RefusedError, Runtime, UnknownModelError, UnlearnedError, consent_of, unknown

RULES = {"mean": mean, "worst-off": worst_off}

Ranker = Annotated[Caller, Security(needs("rank"))]
Teacher = Annotated[Caller, Security(needs("feedback"))]
Keeper = Annotated[Caller, Security(needs("users"))]


def router(runtime: Runtime) -> APIRouter:
    """The routes over one runtime."""
    out = APIRouter(prefix="/v1")

    # -- ranking

    @out.post(
        "/users/{user_id}/rank",
        operation_id="rank",
        tags=["rank"],
        summary="Rank responses for a user",
        responses=documented(),
        openapi_extra=takes(RankRequest),
    )
    async def rank(user_id: User, caller: Ranker, body: Annotated[RankRequest, taken(RankRequest)]) -> RankAnswer:
        return await ranked(runtime, (caller.tenant, user_id), body)

    @out.post(
        "/rank",
        operation_id="rank_many",
        tags=["rank"],
        summary="Rank for several users at once",
        responses=documented(),
        openapi_extra=takes(RankBatch),
    )
    async def rank_many(caller: Ranker, body: Annotated[RankBatch, taken(RankBatch)]) -> RankBatchAnswer:
        who = [(caller.tenant, one.user_id) for one in body.requests]
        done = await asyncio.gather(*(ranked(runtime, one, asked) for one, asked in zip(who, body.requests, strict=True)))
        return RankBatchAnswer(results=done)

    @out.post(
        "/users/{user_id}/score",
        operation_id="score",
        tags=["rank"],
        summary="Score responses for a user",
        responses=documented(),
        openapi_extra=takes(ScoreRequest),
    )
    async def score(user_id: User, caller: Ranker, body: Annotated[ScoreRequest, taken(ScoreRequest)]) -> ScoreAnswer:
        who = caller.tenant, user_id
        person, rewards = await believed(runtime, who, body)
        _, lane, life = await runtime.life(who, person.lane)
        found = await lane.rewards(prompt_of(body.prompt), body.candidates)
        std = None
        if life.covariance is not None:
            variance = np.einsum("ni,ij,nj->n", found.slopes, life.covariance, found.slopes)
            std = np.sqrt(variance.clip(min=0)).tolist()
        return ScoreAnswer(
            user_id=user_id,
            model=lane.name,
            personal=person.personal,
            version=person.version,
            rewards=rewards.tolist(),
            std=std,
        )

    @out.post(
        "/households/rank",
        operation_id="rank_household",
        tags=["rank"],
        summary="Rank for several people who have to take one response",
        responses=documented(),
        openapi_extra=takes(HouseholdRequest),
    )
    async def household(caller: Ranker, body: Annotated[HouseholdRequest, taken(HouseholdRequest)]) -> HouseholdAnswer:
        lane = runtime.lane(body.model) or runtime.lanes[0]
        members = list(dict.fromkeys(body.members))
        people = [await runtime.person((caller.tenant, user_id), lane) for user_id in members]
        found = await lane.rewards(prompt_of(body.prompt), body.candidates)
        weights = {user_id: person.weights for user_id, person in zip(members, people, strict=True)}
        group = together(found, weights, lane.crowd, rule=RULES[body.rule])
        results = [
            HouseholdRanked(
                index=row,
                reward=float(group.rewards[row]),
                of_members=group.values[:, row].tolist(),
                worst_off=group.worst_off[row],
            )
            for row in group.order.tolist()[: body.top_n]
        ]
        known = [person.personal for person in people]
        return HouseholdAnswer(model=lane.name, rule=body.rule, members=members, known=known, results=results)

    # -- feedback

    @out.post(
        "/users/{user_id}/feedback",
        operation_id="give_feedback",
        tags=["feedback"],
        summary="Keep what a user did, and learn from it",
        description='One event, or `{"events": [...]}`. The answer comes when it is on the disk. It needs a consent on record.',
        responses=documented(409),
        openapi_extra=takes(FeedbackBody, "FeedbackBody"),
    )
    async def feedback(
        user_id: User,
        caller: Teacher,
        response: Response,
        body: Annotated[Any, taken(FeedbackBody, "FeedbackBody")],
        idempotency_key: Key = None,
    ) -> FeedbackAnswer:
        answer, headers = await taught(runtime, (caller.tenant, user_id), body, idempotency_key)
        response.headers.update(headers)
        return answer

    @out.post(
        "/feedback",
        operation_id="give_feedback_many",
        tags=["feedback"],
        summary="Keep what several users did",
        description="Each request is kept or refused on its own, a user's in the order given; the answer says which.",
        responses=documented(409),
        openapi_extra=takes(FeedbackMany),
    )
    async def feedback_many(caller: Teacher, body: Annotated[FeedbackMany, taken(FeedbackMany)]) -> FeedbackManyAnswer:
        async def one(asked: Any) -> Outcome:
            try:
                done = await runtime.feedback((caller.tenant, asked.user_id), asked.events, asked.idempotency_key)
            except PalateError as error:
                problem = problem_of(error)
                return Outcome(user_id=asked.user_id, status=problem.status_code, detail=str(problem.detail))
            return Outcome(user_id=asked.user_id, status=200, version=done.version, event_ids=list(done.event_ids), detail="")

        async def in_order(places: Sequence[int]) -> list[tuple[int, Outcome]]:
            return [(place, await one(body.requests[place])) for place in places]

        of_users: dict[str, list[int]] = {}
        for place, asked in enumerate(body.requests):
            of_users.setdefault(asked.user_id, []).append(place)
        found = await asyncio.gather(*map(in_order, of_users.values()))
        return FeedbackManyAnswer(results=[outcome for _, outcome in sorted(chain(*found), key=itemgetter(0))])

    # -- users

    @out.get("/users", operation_id="list_users", tags=["users"], summary="Users, page by page", responses=documented())
    async def users(
        caller: Keeper,
        after: Annotated[str, Query(max_length=256, description="`next` of the page before.")] = "",
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> UserPage:
        page = await runtime.listed(caller.tenant, after, limit)
        lines = [UserLine(user_id=one.user_id, version=one.version, n_events=one.last) for one in page]
        return UserPage(users=lines, next=lines[-1].user_id if len(lines) == limit else None)

    @out.get("/users/{user_id}", operation_id="get_user", tags=["users"], summary="A user's profile", responses=documented())
    async def user(user_id: User, caller: Keeper, model: str | None = None) -> UserSummary:
        who = caller.tenant, user_id
        held, lane, life = await runtime.life(who, runtime.lane(model))
        if not held.version:
            raise unknown()
        covariance = life.covariance
        change = await asyncio.to_thread(life.change)
        return UserSummary(
            user_id=user_id,
            version=held.version,
            consent=consent_of(held.consent),
            n_events=held.last,
            models=[other.name for other in runtime.lanes if other.fingerprint in held.lives],
            model=lane.name,
            n_terms=life.n_terms,
            weights=life.mean.tolist(),
            std=None if covariance is None else np.sqrt(np.diag(covariance).clip(min=0)).tolist(),
            converged=life.converged,
            moved=change.moved,
            moved_at=change.at if change.moved else None,
        )

    @out.put(
        "/users/{user_id}/consent",
        operation_id="record_consent",
        tags=["users"],
        summary="Put a user's consent on record, or its withdrawal",
        responses=documented(409),
        openapi_extra=takes(Consent),
    )
    async def agree(user_id: User, caller: Keeper, body: Annotated[Consent, taken(Consent)]) -> ConsentAnswer:
        version = await runtime.agreed((caller.tenant, user_id), body)
        return ConsentAnswer(user_id=user_id, version=version, consent=body)

    @out.get(
        "/users/{user_id}/export",
        operation_id="export_user",
        tags=["users"],
        summary="Everything that is stored about a user",
        responses=documented(),
    )
    async def export(user_id: User, caller: Keeper) -> dict[str, Any]:
        return await runtime.export((caller.tenant, user_id))

    @out.delete(
        "/users/{user_id}",
        operation_id="delete_user",
        tags=["users"],
        summary="Remove everything about a user",
        responses=documented(),
    )
    async def delete(user_id: User, caller: Keeper) -> DeleteAnswer:
        done = await runtime.deleted((caller.tenant, user_id))
        return DeleteAnswer(user_id=user_id, events=done.events, scrubbed=done.scrubbed)

    return out


def direct(runtime: Runtime, rest: ASGIApp) -> list[Direct]:
    """Rankings and feedback without the framework's machinery; `rest` answers what is not plain."""

    async def rank(asked: Asked) -> Answer:
        return Answer(await ranked(runtime, asked.who, asked.body), {})

    async def feedback(asked: Asked) -> Answer:
        return Answer(*await taught(runtime, asked.who, asked.body, asked.key))

    return [
        Direct("/v1/users/{user_id}/rank", "rank", RankRequest, rank, rest),
        Direct("/v1/users/{user_id}/feedback", "feedback", FeedbackBody, feedback, rest, name="FeedbackBody"),
    ]


def problem_of(error: PalateError) -> Problem:
    """The problem that an error of the runtime is."""
    if isinstance(error, RefusedError):
        return Problem(403 if error.code == "consent" else 409, str(error), code=f"refused_{error.code}")
    if isinstance(error, UnlearnedError):
        return Problem.later(503, str(error), seconds=60, code="not_learned")
    if isinstance(error, UnknownModelError):
        return Problem(404, str(error), code="unknown_model")
    return of_error(error)


async def ranked(runtime: Runtime, who: Who, body: RankRequest) -> RankAnswer:
    """The responses of a request, best first; equal rewards keep the order in which they came."""
    person, rewards = await believed(runtime, who, body)
    order = np.argsort(-rewards, kind="stable")[: body.top_n].tolist()
    values = rewards.tolist()
    texts = body.candidates if body.return_candidates else None
    return RankAnswer(
        user_id=who[1],
        model=person.lane.name,
        personal=person.personal,
        version=person.version,
        results=[RankedCandidate(index=i, reward=values[i], candidate=None if texts is None else texts[i]) for i in order],
    )


async def taught(runtime: Runtime, who: Who, body: Any, key: str | None) -> tuple[FeedbackAnswer, dict[str, str]]:
    """What to say of feedback that is kept and learned from, with the headers of the answer."""
    events = body.events if isinstance(body, FeedbackBatch) else [body]
    done = await runtime.feedback(who, events, key)
    headers = REPLAYED if done.before else {}
    return FeedbackAnswer(user_id=who[1], version=done.version, event_ids=list(done.event_ids)), headers


async def believed(runtime: Runtime, who: Who, body: ScoreRequest) -> tuple[Person, Any]:
    """Whose reward it is and the rewards: the crowd's where the user's own is not believed to be better with `at_least`."""
    prompt = prompt_of(body.prompt)
    person, rewards = await runtime.scored(who, prompt, body.candidates, body.model)
    if body.at_least and person.personal:
        lane = person.lane
        if lane.floor is None:
            raise DataError("at_least asks how sure the personal ranking is, and this server was given no floor for its model")
        _, _, life = await runtime.life(who, lane)
        if lane.floor.better_than_crowd(life.profile) < body.at_least:
            person = person._replace(personal=False, weights=lane.crowd)
            found = await lane.rewards(prompt, body.candidates)
            rewards = found.offset + found.slopes @ lane.crowd
    return person, rewards
