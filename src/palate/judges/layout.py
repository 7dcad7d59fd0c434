"""How a user's history and the responses to judge are laid out in a prompt: every text of others between the lines of a fence."""

from collections.abc import Mapping
from typing import NamedTuple

from palate.data.pairs import Message, Prompt
from palate.judges.fences import Fence, plain
from palate.judges.memory import Shown

UNKNOWN = "Nothing is known of this user: answer for most people."


class Laid(NamedTuple):
    """The part of a prompt that holds data, and its fence."""

    text: str
    fence: Fence

    def asked(self, instructions: str) -> tuple[Message, ...]:
        """A request: `instructions` and the rule of the fence from the caller, everything else from the user."""
        return Message("system", f"{instructions}\n\n{self.fence.rule()}"), Message("user", self.text)


def laid_out(shown: Shown, prompt: Prompt, responses: Mapping[str, str]) -> Laid:
    """The history of a user, then the prompt and what there is to judge.

    Args:
        shown: a summary and past choices, either of which may be missing.
        prompt: the one that is asked about.
        responses: texts by what they are called, such as {"first response": ..., "second response": ...}.
    """
    asked = plain(prompt)
    data = [shown.text, asked, *responses.values()]
    for demo in shown.demos:
        data += [plain(demo.prompt), demo.first, demo.second, demo.thought]
    fence = Fence(data)
    parts = []
    if shown.text:
        parts += ["What is known of the user:", fence.around("summary", shown.text)]
    if shown.demos:
        parts.append("What the user chose before:")
    for number, demo in enumerate(shown.demos, start=1):
        parts += [
            fence.around(f"prompt of choice {number}", plain(demo.prompt)),
            fence.around(f"first response of choice {number}", demo.first),
            fence.around(f"second response of choice {number}", demo.second),
        ]
        parts += [fence.around(f"reasoning about choice {number}", demo.thought)] if demo.thought else []
        parts.append(f"In choice {number} the user chose: {demo.answer}.")
    if not parts:
        parts.append(UNKNOWN)
    parts += ["Now this:", fence.around("prompt", asked)]
    parts += [fence.around(name, text) for name, text in responses.items()]
    return Laid("\n\n".join(parts), fence)
