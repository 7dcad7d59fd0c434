"""`SynthesizeMe`: reason about a user's own choices, write a persona from the reasoning that was right, and judge with it.

SynthesizeMe (arXiv 2506.05598) trains no weights. A user's choices are divided 70 / 30 in their order, and then

1. a judge that knows nothing of the user thinks aloud about the training choices; its reasoning is kept where it was right, and
   of several sets of such demonstrations the one is taken with which it does best on the validation choices (`bootstrap`);
2. a persona is written from these demonstrations;
3. the search is run again for a judge that is given the persona: persona and demonstrations together are the user's brief.

The published prompts were written by DSPy's MIPROv2 for Llama models and are read from its files. Ours say the same in our own
words, and texts of users stand between fences (`fences`), so the figures of the paper are not to be expected to the digit.
"""

from collections.abc import Sequence
from typing import NamedTuple

from palate.data.pairs import PairSet, Prompt
from palate.errors import DataError
from palate.judges.base import Brief, Demo, Question, demos_of
from palate.judges.bootstrap import Said, Search
from palate.judges.client import Chat, Request
from palate.judges.fences import Fence, spoken
from palate.judges.layout import laid_out
from palate.judges.memory import Shown
from palate.judges.orders import ChatJudge, Prompted, side_in, side_lines
from palate.judges.rounds import Work, answered, history, together, tried, whole_sentences

TASK = """You are shown a prompt and two responses, and you tell which of them one particular user would choose. Past choices of \
the user, with reasoning about some of them, and a description of the user may be given; if they are not, guess.

First think in a few sentences: make one to three guesses about what this user cares for, from everything that is given, and \
weigh both responses by them. It does no harm to be wrong. Then end with one line, either
{first}
or
{second}"""
PERSONA = """You describe one particular user, so that somebody else can tell which responses this user would choose. You are \
given choices of the user between two responses, with reasoning about why.

Write a short persona, of at most 150 words: what the user cares for in a response, what puts the user off, and what else these \
choices say about the person. Describe the person and not the single conversations. Write the persona and nothing else."""


class Calls(NamedTuple):
    """Requests to study one user.

    Attributes:
        least: when the first candidate of both searches is good enough.
        most: when none is, every answer can be read.
        most_with_retries: when no answer can be read before its last try.
    """

    least: int
    most: int
    most_with_retries: int


class SynthesizeMe(ChatJudge):
    """A persona and demonstrations of every user, from bootstrapped reasoning about their own choices.

    Both are in the `Brief`: readable, to be edited, and good for a judge with another model. The verdict is First or Second, each
    question in both orders; an answer that cannot be read is asked again at temperatures .25, .5 and .75 higher.

    Args:
        chat: the model that reasons, writes and judges.
        search: candidates, demonstrations and the score at which the search stops; the published ones by default.
        train_share: of a user's choices, the first so many, that demonstrations are made of; the others validate.
        temperature, tries, max_tokens, seed: as for `ChatJudge`; also of the studying.
        persona_tokens: room for a persona.

    Attributes:
        failed: users whom the last `study` could not finish, and why.

    Raises:
        DataError: a share outside (0, 1); others as in `ChatJudge`.
    """

    def __init__(
        self,
        chat: Chat,
        *,
        search: Search | None = None,
        train_share: float = 0.7,
        temperature: float = 0.0,
        tries: int = 4,
        max_tokens: int = 1024,
        persona_tokens: int = 512,
        seed: int = 0,
    ):
        super().__init__(chat, temperature=temperature, tries=tries, max_tokens=max_tokens, seed=seed)
        if not 0 < train_share < 1 or persona_tokens < 1:
            raise DataError(
                f"train_share is {train_share} and persona_tokens {persona_tokens}; expected a share between 0 and 1, room for "
                "a text"
            )
        self.search = Search() if search is None else search
        self.train_share, self.persona_tokens = train_share, persona_tokens
        self.failed: dict[str, str] = {}

    # -- studying

    def study(self, past: PairSet) -> dict[str, Brief]:
        """A persona and demonstrations for every user; a tie teaches nothing, and a user without a choice has an empty brief.

        Users whose study the server or the budget cut short are left out and named in `failed`, never judged by half a study;
        with a cache the next call goes on where this one stopped.

        Cost: `calls` requests a user, in as many rounds as the longest search takes, all users together.
        """
        work = {user: self._studied(user, _distinct(demos)) for user, demos in demos_of(past).items()}
        briefs, self.failed = together(self.chat, work)
        return briefs

    def calls(self, n_choices: int) -> Calls:
        """How many requests it takes to study a user of so many choices, before one is sent."""
        if not n_choices:
            return Calls(0, 0, 0)
        n_train = self._n_train(n_choices)
        searches = [self.search.calls(n_train, n_choices - n_train, with_nothing=second) for second in (False, True)]
        most = 1 + sum(most for _, most in searches)
        return Calls(1 + sum(least for least, _ in searches), most, most * self.tries)

    def divided(self, demos: Sequence[Demo]) -> tuple[tuple[Demo, ...], tuple[Demo, ...]]:
        """(training, validation) choices in their order, at least one on either side where there are two."""
        n = self._n_train(len(demos))
        return tuple(demos[:n]), tuple(demos[n:])

    def _n_train(self, n: int) -> int:
        return min(max(int(n * self.train_share + 1e-9), 1), max(n - 1, 1)) if n else 0

    def _studied(self, user: str, demos: Sequence[Demo]) -> Work[Brief]:
        if not demos:
            return Brief(user, made="synthesize-me: no choices")
        train, valid = self.divided(demos)
        reasons = yield from self.search.best(train, valid, lambda asked: self._said("", asked), with_nothing=False)
        persona, cut = yield from self._persona(reasons.demos or train)
        found = yield from self.search.best(train, valid, lambda asked: self._said(persona, asked), with_nothing=True)
        made = f"synthesize-me: {found.right} of {found.of} validation choices right ({reasons.right} without persona){cut}"
        return Brief(user, persona, found.demos, made, self.chat.model)

    def _said(self, persona: str, asked: Sequence[tuple[Demo, tuple[Demo, ...]]]) -> Work[list[Said]]:
        """What the judge makes of choices in the one order in which they stand, each with the demonstrations before it."""
        prompts = [_prompt(persona, shown, demo.prompt, demo.first, demo.second) for demo, shown in asked]
        said = [Said(None, "") for _ in asked]
        left = list(range(len(asked)))
        for attempt in range(self.tries):
            request = Request((), self.temperature, self.seed, self.max_tokens)
            replies = yield [tried(prompts[i].messages, request, attempt) for i in left]
            for i, reply in zip(left, replies, strict=True):
                usable = answered(reply)
                side = None if usable is None or usable.truncated else self.read(usable.text, prompts[i].fence)
                if usable is not None and side is not None:
                    said[i] = Said("First" if side else "Second", prompts[i].fence.before(usable.text))
            left = [i for i in left if said[i].answer is None]
            if not left:
                break
        return said

    def _persona(self, demos: Sequence[Demo]) -> Work[tuple[str, str]]:
        """The persona, and what is to be said about it: one that was cut off every time ends with its last whole sentence."""
        messages = history(PERSONA, demos, sides=True)
        cut = ""
        for attempt in range(self.tries):
            request = Request((), self.temperature, self.seed, self.persona_tokens)
            (reply,) = yield [tried(messages, request, attempt)]
            usable = answered(reply)
            text = "" if usable is None else spoken(usable.text)
            if usable is None or not text:
                continue
            if not usable.truncated:
                return text, ""
            cut = whole_sentences(text)
        return cut, f", persona cut off at {self.persona_tokens} tokens" if cut else ", no persona: the model wrote none"

    # -- judging

    def prompted(self, questions: Sequence[Question]) -> list[Prompted]:
        """Instructions, then persona and demonstrations of the brief, then the question."""
        out = []
        for brief, prompt, first, second in questions:
            known = Brief("") if brief is None else brief
            out.append(_prompt(known.text, known.demos, prompt, first, second))
        return out

    def read(self, answer: str, fence: Fence) -> float | None:
        """1 for First, 0 for Second."""
        return side_in(answer, fence)


def _prompt(persona: str, demos: tuple[Demo, ...], prompt: Prompt, first: str, second: str) -> Prompted:
    laid = laid_out(Shown(persona, demos), prompt, {"first response": first, "second response": second})
    return Prompted(laid.asked(TASK.format(**side_lines(laid.fence))), laid.fence)


def _distinct(demos: Sequence[Demo]) -> tuple[Demo, ...]:
    """Every pair of responses once, as it was judged first: a pair on both sides of the division would validate itself."""
    first: dict[tuple[Prompt, str, str], Demo] = {}
    for demo in demos:
        first.setdefault((demo.prompt, demo.first, demo.second), demo)
    return tuple(first.values())
