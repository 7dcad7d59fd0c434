"""`Reasoning`: think about a user, criticise what is there, then score; and use the criticism to write something better.

The score is the evaluative half of feedback, the criticism the directive half: `assess` gives both for one response and `refine`
turns the second into another response. More samples make a finer score, for as much more money (test-time scaling).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from palate.data.pairs import Message, Prompt
from palate.errors import DataError
from palate.judges.base import Brief, Question
from palate.judges.client import Chat, ChatError, Reply, Request
from palate.judges.fences import Fence
from palate.judges.layout import Laid, laid_out
from palate.judges.memory import Memory, Raw
from palate.judges.orders import Prompted, RememberingJudge
from palate.judges.rounds import spoken

LOWEST, HIGHEST = 1, 10
SUREST = 0.99  # what a stated certainty of 100 % counts as: no model is that sure with reason, and the log of 0 is infinite
NUMBER = r"(\d{1,3}(?:\.\d{1,3})?)"
GAP = r"[\s:=]{0,3}"

TASK = """You study one particular user and judge responses as this user would. Go by what the user chose before and by what is \
known of the user, not by your own taste. First write down what this user seems to care for. Then say what is good and what is \
bad about {what}, in the eyes of this user, and what would have to change."""
SCORES = """End with one line, which scores both responses from 1 (the user would hate it) to 10 (the user would love it), such as
{line}"""
PERCENT = """End with one line, which gives the chance (0 to 100 percent) that the user would choose the first response, such as
{line}"""
SCORE = """End with one line, which scores the response from 1 (the user would hate it) to 10 (the user would love it), such as
{line}"""
REFINE = """You rewrite a response so that one particular user likes it better. You are given what is known of the user, the \
prompt, a response to it, and a critique of that response. Follow the critique where it serves the user; keep what is right and \
true. Write the new response and nothing else."""


class Assessment(NamedTuple):
    """What one response is worth to a user.

    Attributes:
        score: from 1 to 10, the mean over the samples that could be read; None where none could.
        critique: what was written before the score by the sample whose score is nearest to the mean.
        critiques: all of them.
        reason: why `score` is None.
    """

    score: float | None
    critique: str = ""
    critiques: tuple[str, ...] = ()
    reason: str | None = None


class Reasoning(RememberingJudge):
    """Think, then score both responses, or say how likely the first is to be chosen.

    Args:
        chat: the model.
        memory: what is shown of a user; the last 5 choices by default.
        answer: "scores" from 1 to 10 for both responses, of which the mean difference over orders and samples decides (`p_first`
            is .5 + difference / 18, which is no probability); or "percent", the stated probability, within [.01, .99].
        samples, temperature, tries, max_tokens, seed: as for `ChatJudge`.

    Raises:
        DataError: an unknown kind of answer; others as in `ChatJudge`.
    """

    def __init__(
        self,
        chat: Chat,
        *,
        memory: Memory | None = None,
        answer: Literal["scores", "percent"] = "scores",
        samples: int = 1,
        temperature: float = 0.0,
        tries: int = 2,
        max_tokens: int = 1024,
        seed: int = 0,
    ):
        super().__init__(chat, samples=samples, temperature=temperature, tries=tries, max_tokens=max_tokens, seed=seed)
        if answer not in ("scores", "percent"):
            raise DataError(f"answer is {answer!r}; expected 'scores' or 'percent'")
        self.memory: Memory = Raw(5) if memory is None else memory
        self.answer = answer
        self.probabilistic = answer == "percent"

    def prompted(self, questions: Sequence[Question]) -> list[Prompted]:
        """One message of instructions and one of data for each question."""
        out = []
        for question, shown in zip(questions, self.memory.shown(questions), strict=True):
            laid = laid_out(shown, question.prompt, {"first response": question.first, "second response": question.second})
            if self.answer == "scores":
                end = SCORES.format(line=laid.fence.last_line("Scores", "first 5, second 5"))
            else:
                end = PERCENT.format(line=laid.fence.last_line("Percent", "50"))
            out.append(Prompted(laid.asked(f"{TASK.format(what='each response')}\n\n{end}"), laid.fence))
        return out

    def read(self, answer: str, fence: Fence) -> float | None:
        """.5 + (first - second) / 18 of scores, or the stated probability; None outside their range or for a bare fraction."""
        if self.answer == "percent":
            found = fence.read(answer, "Percent", rf"{NUMBER}\s*(%?)")
            if found is None:
                return None
            percent = float(found[1])
            unclear = percent > 100 or (0 < percent < 1 and not found[2])  # .7 may well mean 70 %
            return None if unclear else min(max(percent / 100, 1 - SUREST), SUREST)
        found = fence.read(answer, "Scores", rf"first{GAP}{NUMBER}(?:/10)?[\s,;]{{1,3}}second{GAP}{NUMBER}(?:/10)?")
        scores = [] if found is None else [float(found[1]), float(found[2])]
        if len(scores) < 2 or not all(LOWEST <= score <= HIGHEST for score in scores):
            return None
        return 0.5 + (scores[0] - scores[1]) / (2 * (HIGHEST - LOWEST))

    def assess(self, brief: Brief | None, prompt: Prompt, responses: Sequence[str]) -> list[Assessment]:
        """The score of each response by itself and the critique behind it; `samples` requests each, all at once."""
        shown = self.memory.shown([Question(brief, prompt, "", "")])[0]
        laid = [laid_out(shown, prompt, {"response": response}) for response in responses]
        asked = [self._score_asked(one) for one in laid]
        requests = [
            Request(messages, self.temperature, self.seed + sample, self.max_tokens)
            for messages in asked
            for sample in range(self.samples)
        ]
        replies = self.chat.ask_all(requests)
        return [self._assessed(replies[i * self.samples : (i + 1) * self.samples], one.fence) for i, one in enumerate(laid)]

    def refine(self, prompt: Prompt, response: str, critique: str, *, brief: Brief | None = None) -> str:
        """A better response, written by the same model. One request.

        Raises:
            ChatError: no answer, or one that was cut off or is nothing but <think>, which is no response.
        """
        shown = self.memory.shown([Question(brief, prompt, "", "")])[0]
        laid = laid_out(shown, prompt, {"response": response, "critique": critique})
        reply = self.chat.ask(laid.asked(REFINE), temperature=self.temperature, seed=self.seed, max_tokens=self.max_tokens)
        if reply.truncated:
            raise ChatError(f"the new response was cut off at {self.max_tokens} tokens; raise max_tokens", "truncated")
        if not (better := spoken(reply.text)):
            raise ChatError("the model thought and wrote no response; raise max_tokens", "empty")
        return better

    def _score_asked(self, laid: Laid) -> tuple[Message, ...]:
        end = SCORE.format(line=laid.fence.last_line("Score", "5"))
        return laid.asked(f"{TASK.format(what='the response')}\n\n{end}")

    def _assessed(self, replies: Sequence[Reply | ChatError], fence: Fence) -> Assessment:
        found: list[tuple[float, str]] = []
        wrong = ""
        for reply in replies:
            if isinstance(reply, ChatError):
                wrong = wrong or f"{reply.kind}: {reply}"
                continue
            line = None if reply.truncated else fence.read(reply.text, "Score", rf"{NUMBER}(?:/10)?")
            if line is None or not LOWEST <= float(line[1]) <= HIGHEST:
                kind = "truncated" if reply.truncated else "unreadable"
                wrong = wrong or f"{kind}: {reply.text[:200]}"
                continue
            found.append((float(line[1]), fence.before(reply.text)))
        if not found:
            return Assessment(None, reason=wrong)
        score = sum(value for value, _ in found) / len(found)
        nearest = min(found, key=lambda one: abs(one[0] - score))
        return Assessment(score, nearest[1], tuple(text for _, text in found))
