"""What every judge behind a chat model shares: both orders, samples, second tries, and verdicts that are read strictly.

A question is always asked twice, with the responses in either order, and the verdict is the mean of the two: a judge that always
says First gives exactly one half. All requests of all questions go out together.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from palate.data.pairs import Message, PairSet, Prompt
from palate.errors import DataError
from palate.judges.base import NOT_JUDGED, Answer, Brief, Outcome, Question, Verdict
from palate.judges.client import Chat, ChatError, Reply, Request
from palate.judges.fences import Fence
from palate.judges.memory import Memory

TEMPERATURE_STEP = 0.25  # by which the n-th try of an unreadable answer is warmer, as asking the same again gives the same
ASKED_AGAIN = ("unreadable", "truncated", "empty", "malformed", "refusal")  # the model's own failures: it may do better


class Prompted(NamedTuple):
    """One order of a question, ready to be asked, and the fence its answer is read with."""

    messages: tuple[Message, ...]
    fence: Fence


class Heard(NamedTuple):
    """What one request came to: a value only where the outcome is "answered", and what the model wrote, or why it did not."""

    outcome: Outcome
    value: float | None
    text: str


class ChatJudge(ABC):
    """A judge that asks a chat model; a subclass says how to `study`, what to ask, and how to read one answer.

    Args:
        chat: the model.
        samples: answers to each order of each question; their mean counts. More than one needs a temperature above 0.
        temperature: of the first try.
        tries: how often an order is asked before an answer that cannot be read, or a refusal, stays one; each try is warmer.
        max_tokens: room for one answer.
        seed: sent with the first sample; the others and later tries have the numbers after it.

    Raises:
        DataError: numbers that are not positive, or several samples at temperature 0, which would all be the same.
    """

    probabilistic = False

    def __init__(
        self,
        chat: Chat,
        *,
        samples: int = 1,
        temperature: float = 0.0,
        tries: int = 1,
        max_tokens: int = 512,
        seed: int = 0,
    ):
        if samples < 1 or tries < 1 or max_tokens < 1 or not temperature >= 0:
            raise DataError(
                f"samples is {samples}, tries {tries}, max_tokens {max_tokens}, temperature {temperature}; "
                "expected at least 1 of the first three and a temperature from 0"
            )
        if samples > 1 and not temperature:
            raise DataError(f"{samples} samples at temperature 0 are the same answer {samples} times; raise the temperature")
        self.chat, self.samples, self.temperature = chat, samples, temperature
        self.tries, self.max_tokens, self.seed = tries, max_tokens, seed

    @abstractmethod
    def study(self, past: PairSet) -> dict[str, Brief]:
        """A brief for every user of `past`; nothing but their own rows goes into it."""

    @abstractmethod
    def prompted(self, questions: Sequence[Question]) -> list[Prompted]:
        """What is asked for every question, with its first response shown first."""

    @abstractmethod
    def read(self, answer: str, fence: Fence) -> float | None:
        """The probability or share (1, .5 or 0) for the response that was shown first; None where the answer does not say."""

    def judge(self, brief: Brief | None, prompt: Prompt, first: str, second: str) -> Verdict:
        """The verdict on one question."""
        return self.judge_all([Question(brief, prompt, first, second)])[0]

    def judge_all(self, questions: Sequence[Question]) -> list[Verdict]:
        """The verdicts in the order of the questions: 2 `samples` requests each, and more only where an answer says nothing.

        A request that fails costs its own question its verdict (`Answer.outcome` says why) and no other.
        """
        swapped = [question._replace(first=question.second, second=question.first) for question in questions]
        asked = self.prompted([*questions, *swapped])
        n = len(questions)  # a question's orders stand together, so that a budget ends between questions
        keys = [(place, sample) for i in range(n) for place in (i, i + n) for sample in range(self.samples)]
        said = self._heard(asked, keys, self.read)
        answers = {(place, sample): _answer(one, swapped=place >= n) for (place, sample), one in said.items()}
        return [
            self._verdict([answers[place, sample] for place in (i, i + n) for sample in range(self.samples)], asked[i].fence)
            for i in range(n)
        ]

    def _heard(
        self, asked: Sequence[Prompted], keys: Sequence[tuple[int, int]], read: Callable[[str, Fence], float | None]
    ) -> dict[tuple[int, int], Heard]:
        """What every (place in `asked`, sample) came to; what says nothing is asked again, warmer, `tries` times in all."""
        out: dict[tuple[int, int], Heard] = {}
        open_ = list(keys)
        for attempt in range(self.tries):
            warmth = self.temperature + TEMPERATURE_STEP * attempt
            requests = [
                Request(asked[place].messages, warmth, self.seed + sample + self.samples * attempt, self.max_tokens)
                for place, sample in open_
            ]
            for (place, sample), reply in zip(open_, self.chat.ask_all(requests), strict=True):
                out[place, sample] = _read(reply, asked[place].fence, read)
            open_ = [key for key in open_ if out[key].outcome in ASKED_AGAIN]
            if not open_:
                break
        return out

    def _verdict(self, answers: Sequence[Answer], fence: Fence) -> Verdict:
        wrong = [answer for answer in answers if answer.p_first is None]
        lost = [answer for answer in wrong if answer.outcome in NOT_JUDGED]
        thought = next((fence.before(answer.text) for answer in answers if answer.p_first is not None and not answer.swapped), "")
        means = []
        for swapped in (False, True):
            shares = [answer.p_first for answer in answers if answer.swapped is swapped and answer.p_first is not None]
            if shares:
                means.append(sum(shares) / len(shares))
        if lost or len(means) < 2:
            first = (lost or wrong)[0]
            order = "swapped" if first.swapped else "given"
            return Verdict(None, f"{first.outcome} in the {order} order: {first.text[:200]}", thought, tuple(answers))
        return Verdict(sum(means) / 2, None, thought, tuple(answers))


def _read(reply: Reply | ChatError, fence: Fence, read: Callable[[str, Fence], float | None]) -> Heard:
    if isinstance(reply, ChatError):
        return Heard(reply.kind, None, str(reply))
    value = None if reply.truncated else read(reply.text, fence)
    return Heard("truncated" if reply.truncated else "unreadable" if value is None else "answered", value, reply.text)


def _answer(said: Heard, *, swapped: bool) -> Answer:
    p_first = 1 - said.value if swapped and said.value is not None else said.value
    return Answer(swapped, said.outcome, p_first, said.text)


class RememberingJudge(ChatJudge):
    """A judge that is shown what a memory keeps of a user."""

    memory: Memory

    @property
    def failed(self) -> dict[str, str]:
        """Users of whom the memory's writer made no brief, and why."""
        return dict(getattr(getattr(self.memory, "writer", None), "failed", {}))

    def study(self, past: PairSet) -> dict[str, Brief]:
        """What the memory makes of every user."""
        return self.memory.study(past)


def side_lines(fence: Fence) -> dict[str, str]:
    """The two lines of which an answer may end with one, by what instructions call them."""
    return {side.lower(): fence.last_line("Verdict", side) for side in ("First", "Second")}


def side_in(answer: str, fence: Fence) -> float | None:
    """1 for First, 0 for Second in the last line of an answer; None where that is neither of `side_lines`."""
    found = fence.read(answer, "Verdict", "(first|second)")
    return None if found is None else float(found[1].lower() == "first")
