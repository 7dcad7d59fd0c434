"""The bodies of Palate's own routes: what may be sent, with its limits, and what comes back."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from palate.data.pairs import Message, Prompt
from palate.living.consent import Consent
from palate.living.events import Feedback
from palate.living.evidence import MAX_TEXT, MAX_TURNS, Turn
from palate.living.explain import HARD, SOFT
from palate.server.guarding import UserId

REPLAYED = {"Idempotent-Replayed": "true"}  # headers of an answer that an earlier request under the same key had
MOST_TEXTS = 1000  # in one request
MOST_EVENTS = 100
MOST_USERS = 100
MOST_MEMBERS = 50

Line = Annotated[str, Field(max_length=MAX_TEXT)]
Lines = Annotated[list[Line], Field(min_length=1, max_length=MOST_TEXTS)]
ModelName = Annotated[
    str | None, Field(max_length=256, description="One of /v1/models; by default the newest that knows the user.")
]


Turns = Annotated[list[Turn], Field(min_length=1, max_length=MAX_TURNS)]
Asked = Annotated[Line | Turns, Field(description="The prompt: a text, or the turns so far.")]


def prompt_of(asked: str | list[Turn]) -> Prompt:
    """The prompt as the library has it."""
    return asked if isinstance(asked, str) else tuple(Message(turn.role, turn.content) for turn in asked)


class Request(BaseModel):
    """What the library's own bodies have in common: no field that nothing reads."""

    model_config = ConfigDict(strict=True, extra="forbid")


_RANK: dict[str, Any] = {"prompt": "How do I start?", "candidates": ["Just start.", "First, write a plan with four steps."]}


class ScoreRequest(Request):
    """Responses to score for one user."""

    model_config = ConfigDict(json_schema_extra={"examples": [_RANK]})
    prompt: Asked
    candidates: Annotated[Lines, Field(description="Responses to the prompt; texts that nobody has judged are welcome.")]
    model: ModelName = None
    at_least: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            allow_inf_nan=False,
            description="Use the crowd's reward unless the personal ranking beats it with at least this probability.",
        ),
    ] = 0.0


class RankRequest(ScoreRequest):
    """Responses to rank for one user."""

    top_n: int | None = Field(None, ge=1, le=1_000_000, description="At most so many; by default all.")
    return_candidates: bool = Field(False, description="Send the texts back too.")


class RankedCandidate(BaseModel):
    """One response: its place in the request, and its reward in natural log-odds (differences are margins)."""

    index: int
    reward: float
    candidate: str | None = None


class RankAnswer(BaseModel):
    """Best first."""

    user_id: str
    model: str
    personal: bool = Field(description="False where this is the crowd's ranking: nothing is known of the user, or too little.")
    version: int = Field(description="Of the user's profile; 0 where there is none.")
    results: list[RankedCandidate]


class ScoreAnswer(BaseModel):
    """Rewards in the order of the candidates."""

    user_id: str
    model: str
    personal: bool
    version: int
    rewards: list[float]
    std: list[float] | None = Field(description="How unsure each is by what is unknown of the user; null for a method without.")


class UserRank(RankRequest):
    """One ranking of a batch."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"user_id": "ada"} | _RANK]})
    user_id: UserId


class RankBatch(Request):
    """Rankings for several users."""

    requests: Annotated[list[UserRank], Field(min_length=1, max_length=MOST_USERS)]


class RankBatchAnswer(BaseModel):
    """In the order of the requests."""

    results: list[RankAnswer]


class FeedbackBatch(Request):
    """Several events of one user: all of them are kept, or none."""

    events: Annotated[list[Feedback], Field(min_length=1, max_length=MOST_EVENTS)]


def _which(value: Any) -> str:
    keys = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return "batch" if "events" in keys else "event"


FeedbackBody = Annotated[Annotated[FeedbackBatch, Tag("batch")] | Annotated[Feedback, Tag("event")], Discriminator(_which)]


class FeedbackAnswer(BaseModel):
    """It is on the disk: whatever happens to the server now, these events are there, once."""

    user_id: str
    version: int
    event_ids: list[str] = Field(description="By which an event can be undone or corrected, in the order in which they came.")


class UserFeedback(FeedbackBatch):
    """Events of one user in a batch."""

    user_id: UserId
    idempotency_key: Annotated[str | None, Field(min_length=1, max_length=256)] = None


class FeedbackMany(Request):
    """Feedback of several users; each user's events are kept or refused on their own."""

    requests: Annotated[list[UserFeedback], Field(min_length=1, max_length=MOST_USERS)]


class Outcome(BaseModel):
    """What became of one user's events."""

    user_id: str
    status: int = Field(description="As the route for one user would answer: 200, 403, 404, 409, 422 or 503.")
    version: int | None = None
    event_ids: list[str] = []
    detail: str = Field("", description="Why not.")


class FeedbackManyAnswer(BaseModel):
    """In the order of the requests."""

    results: list[Outcome]


class QuestionRequest(Request):
    """Which two responses to show next, from prompts whose responses exist."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"pool": [_RANK], "n": 1}]})
    pool: Annotated[list["PoolEntry"], Field(min_length=1, max_length=64)]
    rule: Literal["targeted", "information", "thompson", "d-optimal", "random"] = "targeted"
    n: int = Field(1, ge=1, le=20, description="So many questions, no two of them nearly the same.")
    model: ModelName = None


class PoolEntry(Request):
    """A prompt and the responses of which any two may be shown."""

    prompt: Asked
    candidates: Annotated[list[Line], Field(min_length=2, max_length=24)]


QuestionRequest.model_rebuild()


class Question(BaseModel):
    """Show these two."""

    entry: int = Field(description="Place in the pool.")
    first: int = Field(description="Place among its candidates.")
    second: int


class QuestionAnswer(BaseModel):
    """Best first. `enough`: for every entry of the pool the best candidate is known but for an error of 5 %."""

    user_id: str
    model: str
    questions: list[Question]
    enough: bool


class HouseholdRequest(Request):
    """Responses to rank for several people at once."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"members": ["ada", "ben"], "rule": "worst-off"} | _RANK]})
    members: Annotated[list[UserId], Field(min_length=1, max_length=MOST_MEMBERS)]
    rule: Literal["mean", "worst-off"] = Field("mean", description="Best on average, or best for whoever likes it least.")
    prompt: Asked
    candidates: Lines
    model: ModelName = None
    top_n: int | None = Field(None, ge=1, le=1_000_000)


class HouseholdRanked(BaseModel):
    """One response: the group's reward, each member's own, and who likes it least."""

    index: int
    reward: float
    of_members: list[float] = Field(description="Standardised over the candidates, in the order of the members.")
    worst_off: str


class HouseholdAnswer(BaseModel):
    """Best first."""

    model: str
    rule: str
    members: list[str]
    known: list[bool] = Field(description="Whether anything is known of each member; the others count as the crowd.")
    results: list[HouseholdRanked]


class AxisChange(Request):
    """How much an axis of style shall count: `by` standard deviations of people from where it is, or `to` a strength."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"by": -1.0}, {"to": 0.0}]})
    by: float | None = Field(None, ge=-10, le=10, allow_inf_nan=False, description="-1: down, +1: up.")
    to: float | None = Field(None, ge=-100, le=100, allow_inf_nan=False, description="In log-odds; 0: off.")
    softness: float = Field(SOFT, ge=HARD, le=10, allow_inf_nan=False, description="By how much the choices may still argue.")


class UserSummary(BaseModel):
    """What the server has of one user, without their texts."""

    user_id: str
    version: int
    consent: Consent | None
    n_events: int = Field(description="Events in the log.")
    models: list[str] = Field(description="Models under which the profile is up to date.")
    model: str = Field(description="Of the numbers below.")
    n_terms: int = Field(description="Pieces of evidence in the profile.")
    weights: list[float]
    std: list[float] | None
    converged: bool
    moved: bool = Field(description="Whether the later events speak of another taste than the earlier ones.")
    moved_at: float | None = Field(description="Since when, in unix seconds, where that is so and times are known.")


class UserLine(BaseModel):
    """One user of a list."""

    user_id: str
    version: int
    n_events: int


class UserPage(BaseModel):
    """A page of users by id; `next` is what `after` of the next page is, null at the end."""

    users: list[UserLine]
    next: str | None


class ConsentAnswer(BaseModel):
    """The record is on the disk."""

    user_id: str
    version: int
    consent: Consent


class DeleteAnswer(BaseModel):
    """What was removed. `scrubbed`: nothing is left in the store's own files either."""

    user_id: str
    events: int
    scrubbed: bool


class ReadaptRequest(Request):
    """Learn every user again under a model that is loaded."""

    model: ModelName = None


class ReadaptAnswer(BaseModel):
    """How far it is."""

    model: str
    running: bool
    done: int
    failed: int
    reason: str | None = Field(None, description="Why the last one failed.")


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"
    version: str


class Readiness(BaseModel):
    """Whether requests can be answered now."""

    status: Literal["ready"]
    models: list[str]
    store: str
