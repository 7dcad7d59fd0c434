"""Work on many users at once, each of whom needs several rounds of questions: `together`, and what writers of briefs share.

The work on one user is a generator that yields the requests of a round and is sent their replies. A round of all users goes out
as one batch, so that slow servers are kept busy; what a user's requests are depends on that user's own replies alone.
"""

from collections.abc import Generator, Mapping, Sequence
from typing import TypeVar

from palate.data.pairs import Message
from palate.judges.base import NOT_JUDGED, Demo
from palate.judges.client import Chat, ChatError, Reply, Request
from palate.judges.fences import Fence, plain
from palate.judges.orders import TEMPERATURE_STEP

T = TypeVar("T")
Work = Generator[list[Request], list[Reply | ChatError], T]


def together(chat: Chat, work: Mapping[str, Work[T]]) -> tuple[dict[str, T], dict[str, str]]:
    """What the work on each user came to, and why it came to nothing for the users where it raised a `ChatError`.

    Cost: as many rounds as the longest work has; the requests of a round are `chat.workers` at once.
    """
    done: dict[str, T] = {}
    failed: dict[str, str] = {}
    replies: dict[str, list[Reply | ChatError] | None] = dict.fromkeys(work)
    while replies:
        asked: dict[str, list[Request]] = {}
        for user, said in replies.items():
            try:
                asked[user] = next(work[user]) if said is None else work[user].send(said)
            except StopIteration as end:
                done[user] = end.value
            except ChatError as error:
                failed[user] = f"{error.kind}: {error}"
        answers = iter(chat.ask_all([request for requests in asked.values() for request in requests]))
        replies = {user: [next(answers) for _ in requests] for user, requests in asked.items()}
    return {user: done[user] for user in work if user in done}, failed


def tried(messages: Sequence[Message], request: Request, attempt: int) -> Request:
    """`request` with these messages as it is asked for the n-th time: warmer and with another seed, or it would be the same."""
    warmth = request.temperature + TEMPERATURE_STEP * attempt
    return request._replace(messages=tuple(messages), temperature=warmth, seed=(request.seed or 0) + attempt)


def answered(reply: Reply | ChatError) -> Reply | None:
    """The reply; None where it is a failure of the model, which may be asked again.

    Raises:
        ChatError: a failure of the server or of the budget, of which no second try is begun.
    """
    if isinstance(reply, ChatError):
        if reply.kind in NOT_JUDGED:
            raise reply
        return None
    return reply


def history(instructions: str, demos: Sequence[Demo], *, sides: bool) -> tuple[Message, ...]:
    """A request about past choices alone: what to do from the caller, every text of the choices between the lines of a fence.

    Args:
        instructions: what to write.
        demos: the choices, in the order in which they are shown.
        sides: name the responses first and second, as they were shown to the judge; else chosen and rejected.
    """
    fence = Fence([text for demo in demos for text in (plain(demo.prompt), demo.first, demo.second, demo.thought)])
    parts = []
    for number, demo in enumerate(demos, start=1):
        names = ("first", "second") if sides else ("chosen", "rejected")
        responses = (demo.first, demo.second) if sides else (demo.chosen, demo.rejected)
        parts.append(fence.around(f"prompt of choice {number}", plain(demo.prompt)))
        parts += [fence.around(f"{name} response of choice {number}", text) for name, text in zip(names, responses, strict=True)]
        if sides:
            parts += [fence.around(f"reasoning about choice {number}", demo.thought)] if demo.thought else []
            parts.append(f"In choice {number} the user chose: {demo.answer}.")
    return Message("system", f"{instructions}\n\n{fence.rule()}"), Message("user", "\n\n".join(parts))


def whole_sentences(text: str, words: int | None = None) -> str:
    """A text that was cut, or its first so many words, up to the end of its last whole sentence; as it is where it has none."""
    pieces = text.split()
    cut = text if words is None or len(pieces) <= words else " ".join(pieces[:words])
    end = max(cut.rfind(mark) for mark in ".!?\n\u3002\uff01\uff1f")
    return cut[: end + 1].strip() if end > 0 else cut.strip()
