"""The bodies of other stacks, as their clients send and read them: vLLM's and Jina's scoring routes, OpenAI's list, OpenRLHF's.

Read off vLLM's pooling models, OpenRLHF v0.11 (`serve_rm`, `remote_rm_utils`) and verl's discriminative reward path. Fields that
these clients send and that mean nothing here (`model`, `priority`, `request_id`, `truncate_prompt_tokens` ...) are accepted, so
extra fields are ignored and not refused. Whom to score for stands in `user`, as in OpenAI's bodies, in `user_id`, or, where a
client lets neither through, in the header X-Palate-User; with none of them it is the crowd.
"""

import json
import re
from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from palate.data.pairs import Message, Prompt
from palate.living.evidence import MAX_TEXT, MAX_TURNS
from palate.server.bodies import Line, Lines
from palate.server.guarding import UserId

# What chat templates put around turns; OpenRLHF decodes a sample with them, and no encoder was fitted on texts that have them.
SPECIAL = re.compile(r"<\|[^|<>]{1,40}\|>|<\uff5c[^\uff5c<>]{1,40}\uff5c>|</?s>|<(?:bos|eos|pad|unk)>|\[/?INST\]")


class ChatTurn(BaseModel):
    """One turn of a conversation; what else chat clients put there is not read."""

    model_config = ConfigDict(strict=True, extra="ignore")
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[str, Field(max_length=MAX_TEXT)]


Chat = Annotated[list[ChatTurn], Field(min_length=1, max_length=MAX_TURNS)]


class Foreign(BaseModel):
    """What these bodies have in common."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)

    model: str | None = Field(None, max_length=256, description="One of /v1/models; by default the newest that knows the user.")
    user: UserId | None = Field(None, description="For whom; without it, the crowd's reward.")
    user_id: UserId | None = Field(None, description="The same as `user`, and stronger.")

    @property
    def whose(self) -> str | None:
        """The id of whom to score for, if the body names one."""
        return self.user_id or self.user


class Usage(BaseModel):
    """Nothing is counted in tokens here; clients expect the field."""

    prompt_tokens: int = 0
    total_tokens: int = 0
    completion_tokens: int = 0


class Document(BaseModel):
    """A document as an object."""

    model_config = ConfigDict(strict=True, extra="ignore")
    text: Line


class RerankRequest(Foreign):
    """`POST /v1/rerank`, in the shape of Jina, Cohere and vLLM."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"query": "How do I start?", "documents": ["Just start.", "First, a plan ..."], "top_n": 1, "user": "ada"}
            ]
        }
    )
    query: Line = Field(description="The prompt.")
    documents: Annotated[list[Line | Document], Field(min_length=1, max_length=1000, description="The responses.")]
    top_n: int | None = Field(None, ge=1, le=1_000_000, description="At most so many; by default all.")
    return_documents: bool = True
    use_activation: bool = Field(True, description="A sigmoid over the reward, as vLLM has it; false for the raw reward.")

    def texts(self) -> list[str]:
        """The documents, whichever way they were written."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


class Reranked(BaseModel):
    """One document with its score."""

    index: int
    document: Document | None = None
    relevance_score: float


class RerankAnswer(BaseModel):
    """Best first."""

    id: str
    model: str
    usage: Usage = Usage()
    results: list[Reranked]


class TextScoreRequest(Foreign):
    """`POST /score` of vLLM: one prompt and its responses, or as many prompts as responses."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"text_1": "How do I start?", "text_2": ["Just start.", "A plan ..."], "user": "ada"}]}
    )
    text_1: Annotated[
        Line | Lines, Field(validation_alias=AliasChoices("text_1", "queries", "data_1"), description="The prompt or prompts.")
    ]
    text_2: Annotated[
        Line | Lines, Field(validation_alias=AliasChoices("text_2", "documents", "data_2", "items"), description="The responses.")
    ]
    use_activation: bool = Field(True, description="A sigmoid over the reward, as vLLM has it; false for the raw reward.")


class Scored(BaseModel):
    """One score."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreList(BaseModel):
    """One score for each response."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Scored]
    usage: Usage = Usage()


class TextsRequest(Foreign):
    """What `/classify` and `/pooling` share: texts as `input`, or one conversation as `messages`."""

    input: Line | Lines | None = Field(None, description="The responses; `prompt` is what they answer.")
    messages: Chat | None = Field(None, description="A conversation; its last turn is scored as the response to the others.")
    prompt: Line = Field("", description="What every text of `input` answers. Not a field of vLLM: its clients may leave it out.")

    def asked(self) -> tuple[Prompt, list[str]] | None:
        """The prompt and the responses, or None where the body has both or neither."""
        if (self.input is None) == (self.messages is None):
            return None
        if self.messages is not None:
            asked = _prompt(self.messages[:-1]) if len(self.messages) > 1 else ""
            return asked, [self.messages[-1].content]
        return self.prompt, [self.input] if isinstance(self.input, str) else list(self.input or [])


class ClassifyRequest(TextsRequest):
    """`POST /classify` of vLLM, which verl reads a discriminative reward from (`data[-1]["probs"][-1]`)."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"input": "Just start.", "prompt": "How?", "activation": False, "user": "ada"}]}
    )
    activation: bool = Field(
        True,
        validation_alias=AliasChoices("use_activation", "activation"),
        description="A sigmoid over the reward; verl sends false, for the raw reward.",
    )


class Classified(BaseModel):
    """One text: a single number under the one label that there is."""

    index: int
    label: str = "LABEL_0"
    probs: list[float]
    num_classes: int = 1


class ClassifyAnswer(BaseModel):
    """One number for each text."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classified]
    usage: Usage = Usage()


class PoolingRequest(TextsRequest):
    """`POST /pooling` of vLLM: raw rewards, unless an activation is asked for."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": ["Just start."], "prompt": "How?", "user": "ada"}]})
    task: str | None = Field(None, max_length=64)
    use_activation: bool = Field(False, description="A sigmoid over the reward; by default the raw reward.")


class Pooled(BaseModel):
    """One text: a vector of one number."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: list[float]


class PoolingAnswer(BaseModel):
    """One reward for each text."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Pooled]
    usage: Usage = Usage()


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "palate"
    root: str = Field(description="Fingerprint of the model, which profiles carry.")


class ModelList(BaseModel):
    """OpenAI's list."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Label(BaseModel):
    """What `labels` of OpenRLHF may carry as JSON: its requests have no field for a user."""

    model_config = ConfigDict(strict=True, extra="ignore")
    user_id: UserId | None = None
    prompt: Annotated[Line | Chat | None, Field(description="The prompt as it was before any chat template.")] = None


_LABEL: TypeAdapter[Label] = TypeAdapter(Label)


class GetRewardRequest(BaseModel):
    """`POST /get_reward` of OpenRLHF: `query` is prompt and response, decoded with the special tokens of the chat template."""

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        json_schema_extra={
            "examples": [
                {"query": ["How do I start?Just start.</s>"], "prompts": ["How do I start?"], "labels": ['{"user_id": "ada"}']}
            ]
        },
    )
    query: Lines
    prompts: Annotated[list[Line], Field(max_length=1000)] = []
    labels: Annotated[list[Line | None], Field(max_length=1000)] = []

    def samples(self) -> list[tuple[str | None, Prompt, str]]:
        """(user or None, prompt, response) of every sample.

        The prompt is cut from the front of the query where it stands there, special tokens go, and a label that is a JSON object
        may name the user and the plain prompt. Raises `ValueError` where the lists have different lengths.
        """
        n = len(self.query)
        for name, listed in (("prompts", self.prompts), ("labels", self.labels)):
            if listed and len(listed) != n:
                raise ValueError(f"{name}: {len(listed)} for {n} queries; expected one for each, or none")
        out = []
        for i, query in enumerate(self.query):
            template = self.prompts[i] if self.prompts else ""
            label = _label(self.labels[i]) if self.labels else Label()
            response = SPECIAL.sub("", query.removeprefix(template)).strip()
            prompt = SPECIAL.sub("", template).strip() if label.prompt is None else _prompt(label.prompt)
            out.append((label.user_id, prompt, response))
        return out


def _prompt(asked: str | list[ChatTurn]) -> Prompt:
    return asked if isinstance(asked, str) else tuple(Message(turn.role, turn.content) for turn in asked)


def _label(text: str | None) -> Label:
    """What a label says, where it is a JSON object of ours; any other label (a reference answer, say) says nothing."""
    if text is None or not text.lstrip().startswith("{"):
        return Label()
    try:
        read = json.loads(text)
        return _LABEL.validate_python(read)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ValidationError):
            raise ValueError('labels: an object that names no user as text; expected {"user_id": "ada"}') from error
        return Label()


class GetRewardAnswer(BaseModel):
    """One reward for each sample; `scores` are the same through a sigmoid, for filters that want them between 0 and 1."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]
