"""The routes that other stacks already call: vLLM's, Jina's and Cohere's, OpenAI's list of models, OpenRLHF's reward server."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Security
from numpy.typing import NDArray
from scipy.special import expit

from palate.data.pairs import Prompt
from palate.server.access import Caller, needs
from palate.server.parsing import Behalf, taken, takes
from palate.server.people import Person
from palate.server.problems import Problem, documented
from palate.server.runtime import Runtime
from palate.server.shapes import (
    Classified,
    ClassifyAnswer,
    ClassifyRequest,
    Document,
    Foreign,
    GetRewardAnswer,
    GetRewardRequest,
    ModelCard,
    ModelList,
    Pooled,
    PoolingAnswer,
    PoolingRequest,
    RerankAnswer,
    Reranked,
    RerankRequest,
    Scored,
    ScoreList,
    TextScoreRequest,
)

Ranker = Annotated[Caller, Security(needs("rank"))]
Floats = NDArray[np.float64]


def router(runtime: Runtime) -> APIRouter:
    """The routes over one runtime."""
    out, started = APIRouter(tags=["other stacks"]), int(time.time())

    async def scored(
        caller: Caller, body: Foreign, behalf: str | None, prompt: Prompt, texts: Sequence[str]
    ) -> tuple[Person, Floats]:
        whose = body.whose or behalf
        who = None if whose is None else (caller.tenant, whose)
        return await runtime.scored(who, prompt, texts, _named(runtime, body.model))

    async def rerank(
        caller: Ranker, body: Annotated[RerankRequest, taken(RerankRequest)], x_palate_user: Behalf = None
    ) -> RerankAnswer:
        texts = body.texts()
        person, rewards = await scored(caller, body, x_palate_user, body.query, texts)
        order = np.argsort(-rewards, kind="stable")[: body.top_n].tolist()
        shown = expit(rewards) if body.use_activation else rewards
        results = [
            Reranked(
                index=i,
                document=Document(text=texts[i]) if body.return_documents else None,
                relevance_score=float(shown[i]),
            )
            for i in order
        ]
        return RerankAnswer(id=_id("rerank"), model=person.lane.name, results=results)

    for path, name in (("/v1/rerank", "rerank_v1"), ("/rerank", "rerank"), ("/v2/rerank", "rerank_v2")):
        summary, extra = "Rank documents, in the shape of Jina, Cohere and vLLM", takes(RerankRequest)
        out.post(path, operation_id=name, summary=summary, responses=documented(), openapi_extra=extra)(rerank)

    async def score(
        caller: Ranker, body: Annotated[TextScoreRequest, taken(TextScoreRequest)], x_palate_user: Behalf = None
    ) -> ScoreList:
        prompts = [body.text_1] if isinstance(body.text_1, str) else body.text_1
        texts = [body.text_2] if isinstance(body.text_2, str) else body.text_2
        if len(prompts) == 1:
            person, rewards = await scored(caller, body, x_palate_user, prompts[0], texts)
        elif len(prompts) == len(texts):
            pairs = zip(prompts, texts, strict=True)
            done = await asyncio.gather(*(scored(caller, body, x_palate_user, prompt, [text]) for prompt, text in pairs))
            person, rewards = done[0][0], np.concatenate([found for _, found in done])
        else:
            raise Problem(
                422, f"{len(prompts)} texts in text_1 and {len(texts)} in text_2; expected one, or as many", code="bad_data"
            )
        shown = expit(rewards) if body.use_activation else rewards
        data = [Scored(index=i, score=value) for i, value in enumerate(shown.tolist())]
        return ScoreList(id=_id("score"), created=int(time.time()), model=person.lane.name, data=data)

    for path, name in (("/score", "score_texts"), ("/v1/score", "score_texts_v1")):
        summary, extra = "Score texts, in the shape of vLLM", takes(TextScoreRequest)
        out.post(path, operation_id=name, summary=summary, responses=documented(), openapi_extra=extra)(score)

    @out.post(
        "/classify",
        operation_id="classify",
        summary="The reward as the one class of a classifier, in the shape of vLLM (verl reads it)",
        responses=documented(),
        openapi_extra=takes(ClassifyRequest),
    )
    async def classify(
        caller: Ranker, body: Annotated[ClassifyRequest, taken(ClassifyRequest)], x_palate_user: Behalf = None
    ) -> ClassifyAnswer:
        person, rewards = await scored(caller, body, x_palate_user, *_asked(body.asked()))
        shown = expit(rewards) if body.activation else rewards
        data = [Classified(index=i, probs=[value]) for i, value in enumerate(shown.tolist())]
        return ClassifyAnswer(id=_id("classify"), created=int(time.time()), model=person.lane.name, data=data)

    @out.post(
        "/pooling",
        operation_id="pooling",
        summary="The reward as a vector of one number, in the shape of vLLM",
        responses=documented(),
        openapi_extra=takes(PoolingRequest),
    )
    async def pooling(
        caller: Ranker, body: Annotated[PoolingRequest, taken(PoolingRequest)], x_palate_user: Behalf = None
    ) -> PoolingAnswer:
        person, rewards = await scored(caller, body, x_palate_user, *_asked(body.asked()))
        shown = expit(rewards) if body.use_activation else rewards
        data = [Pooled(index=i, data=[value]) for i, value in enumerate(shown.tolist())]
        return PoolingAnswer(id=_id("pool"), created=int(time.time()), model=person.lane.name, data=data)

    @out.post(
        "/get_reward",
        operation_id="get_reward",
        summary="Rewards of samples, in the shape of OpenRLHF",
        description='Samples have no field for a user: a label that is JSON, `{"user_id": "ada", "prompt": "..."}`, names one.',
        responses=documented(),
        openapi_extra=takes(GetRewardRequest),
    )
    async def get_reward(
        caller: Ranker, body: Annotated[GetRewardRequest, taken(GetRewardRequest)], x_palate_user: Behalf = None
    ) -> GetRewardAnswer:
        try:
            samples = body.samples()
        except ValueError as error:
            raise Problem(422, str(error), code="bad_data") from None

        async def one(user_id: str | None, prompt: Prompt, response: str) -> tuple[float, bool]:
            whose = user_id or x_palate_user
            person, rewards = await runtime.scored(None if whose is None else (caller.tenant, whose), prompt, [response])
            return float(rewards[0]), person.personal

        done = await asyncio.gather(*(one(*sample) for sample in samples))
        rewards = [reward for reward, _ in done]
        personal = [float(own) for _, own in done]
        return GetRewardAnswer(rewards=rewards, scores=expit(np.array(rewards)).tolist(), extra_logs={"personal": personal})

    @out.get(
        "/v1/models", operation_id="list_models", summary="The models that are served, as OpenAI has it", responses=documented()
    )
    async def models(caller: Ranker) -> ModelList:
        return ModelList(data=[ModelCard(id=lane.name, created=started, root=lane.fingerprint) for lane in runtime.lanes])

    return out


def _named(runtime: Runtime, name: str | None) -> str | None:
    """The model that a body names, where it is one of ours: clients of other stacks always send some name."""
    return name if name is not None and runtime.people.lane(name) is not None else None


def _asked(asked: tuple[Prompt, list[str]] | None) -> tuple[Prompt, list[str]]:
    if asked is None:
        raise Problem(422, "the body has both or neither of input and messages; expected one of them", code="bad_data")
    return asked


def _id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"
