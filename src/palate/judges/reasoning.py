"""`Reasoning`: think about a user, criticise what is there, then score; and use the criticism to write something better.

The score is the evaluative half of feedback, the criticism the directive half: `assess` gives both for one response and `refine`
turns the second into another response. More samples make a finer score, for as much more money (test-time scaling).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from palate.data.pairs import Prompt
from palate.errors import DataError
from palate.judges.base import Brief, Question
from palate.judges.client import Chat, ChatError
from palate.judges.fences import Fence, spoken
from palate.judges.layout import Laid, laid_out
from palate.judges.memory import Memory, Raw
from palate.judges.orders import Heard, Prompted, RememberingJudge

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
        """The score of each response by itself and the critique behind it.

        Raises `DataError` for no responses, or one text in place of a list, whose every letter would be paid for.
        Cost: `samples` requests each, all at once, and more only where an answer says nothing.
        """
        if isinstance(responses, str) or not len(responses):
            raise DataError(f"responses is {responses!r:.60}; expected a list of at least one text")
        shown = self.memory.shown([Question(brief, prompt, "", "")])[0]
        asked = [_score_asked(laid_out(shown, prompt, {"response": response})) for response in responses]
        said = self._heard(asked, [(i, sample) for i in range(len(asked)) for sample in range(self.samples)], _score)
        return [_assessed([said[i, sample] for sample in range(self.samples)], one.fence) for i, one in enumerate(asked)]

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


def _score_asked(laid: Laid) -> Prompted:
    end = SCORE.format(line=laid.fence.last_line("Score", "5"))
    return Prompted(laid.asked(f"{TASK.format(what='the response')}\n\n{end}"), laid.fence)


def _score(answer: str, fence: Fence) -> float | None:
    line = fence.read(answer, "Score", rf"{NUMBER}(?:/10)?")
    return None if line is None or not LOWEST <= float(line[1]) <= HIGHEST else float(line[1])


def _assessed(said: Sequence[Heard], fence: Fence) -> Assessment:
    found = [(one.value, fence.before(one.text)) for one in said if one.value is not None]
    if not found:
        return Assessment(None, reason=f"{said[0].outcome}: {said[0].text[:200]}")
    score = sum(value for value, _ in found) / len(found)
    nearest = min(found, key=lambda one: abs(one[0] - score))
    return Assessment(score, nearest[1], tuple(text for _, text in found))
