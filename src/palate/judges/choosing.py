"""`InContext`: a user's past choices, or a summary of them, in the prompt, and the question which of two responses comes next.

The plainest judge there is, and the yardstick for the others. Nothing is learned; a question costs two short answers.
"""

from collections.abc import Sequence

from palate.judges.base import Question
from palate.judges.client import Chat
from palate.judges.fences import Fence
from palate.judges.layout import laid_out
from palate.judges.memory import Memory, Raw
from palate.judges.orders import Prompted, RememberingJudge, side_in, side_lines

INSTRUCTIONS = """You tell which of two responses to a prompt one particular user would choose. Go by what the user chose before \
and by what is known of the user, not by your own taste.

Answer with one line and nothing else, either
{first}
or
{second}"""


class InContext(RememberingJudge):
    """Which response would this user choose, given what they chose before?

    Args:
        chat: the model.
        memory: what is shown of a user; the last 5 choices by default.
        samples, temperature, tries, max_tokens, seed: as for `ChatJudge`.
    """

    def __init__(
        self,
        chat: Chat,
        *,
        memory: Memory | None = None,
        samples: int = 1,
        temperature: float = 0.0,
        tries: int = 2,
        max_tokens: int = 64,
        seed: int = 0,
    ):
        super().__init__(chat, samples=samples, temperature=temperature, tries=tries, max_tokens=max_tokens, seed=seed)
        self.memory: Memory = Raw(5) if memory is None else memory

    def prompted(self, questions: Sequence[Question]) -> list[Prompted]:
        """One message of instructions and one of data for each question."""
        out = []
        for question, shown in zip(questions, self.memory.shown(questions), strict=True):
            laid = laid_out(shown, question.prompt, {"first response": question.first, "second response": question.second})
            out.append(Prompted(laid.asked(INSTRUCTIONS.format(**side_lines(laid.fence))), laid.fence))
        return out

    def read(self, answer: str, fence: Fence) -> float | None:
        """1 for First, 0 for Second."""
        return side_in(answer, fence)
