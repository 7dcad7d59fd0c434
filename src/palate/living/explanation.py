"""What an `Explainer` says of one person: frozen, JSON in and out, and readable."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from palate.living.evidence import listed
from palate.naming import NO_DIFFERENCE

FROZEN = ConfigDict(strict=True, extra="forbid", frozen=True)
Number = Annotated[float, Field(allow_inf_nan=False)]


class Liking(BaseModel):
    """One axis of style and how it goes with what the person wants beyond the crowd.

    Attributes:
        axis: name of the statistic. words: which way the person goes along it.
        correlation: within prompts, in [-1, 1]; low, high: its 95 % interval.
        certain: whether it may be said: see `Explainer.explain`.
        worth: log-odds of one standard deviation more of it for this person, the crowd's part included; crowd: for the crowd.
        people_std: by how much people differ in that, None for a method without a prior.
    """

    model_config = FROZEN

    axis: str
    words: str
    correlation: Number
    low: Number
    high: Number
    certain: bool
    worth: Number
    crowd: Number
    people_std: Number | None


class Telling(BaseModel):
    """One event and what the profile owes to it.

    Attributes:
        event_id: its name among the person's events.
        moves: root mean square by which rewards would move without it, in log-odds within a prompt.
        words: what it argues for most.
    """

    model_config = FROZEN

    event_id: str
    moves: Number
    words: str


class Explanation(BaseModel):
    """What one person wants beyond the crowd.

    Attributes:
        label: in words, what is wanted before what is not: "longer, more formal; less hedged".
        sure: whether anything could be named with certainty; where not, the label says so.
        n_choices: how many they made; a rating is one, however many terms of the likelihood it has.
        explained: share of the person's departure from the crowd that four axes of style predict, in [0, 1].
        threshold: the correlation that the best axis reaches by chance once in twenty times.
        likings: every axis that varies, the strongest correlation first.
        telling: at most five events, the most telling first; none for a profile without its events.
    """

    model_config = FROZEN

    user_id: str
    n_choices: int
    label: str
    sure: bool
    explained: Number
    threshold: Number
    likings: Annotated[tuple[Liking, ...], BeforeValidator(listed)]
    telling: Annotated[tuple[Telling, ...], BeforeValidator(listed)]

    def text(self) -> str:
        """A few lines for the person to read, without a word that is not certain."""
        choices = f"{self.n_choices} choice{'' if self.n_choices == 1 else 's'}"
        if self.label == NO_DIFFERENCE:
            return f"After {choices}, nothing sets {self.user_id} apart from everybody else."
        if not self.sure:
            return f"After {choices}, nothing can be said with certainty of what {self.user_id} wants beyond everybody else."
        lines = [f"Beyond what everybody wants, {self.user_id} wants: {self.label}."]
        lines.append(f"From {choices}. Style explains {self.explained:.0%} of the difference.")
        for one in [liking for liking in self.likings if liking.certain][:4]:
            lines.append(
                f"- {one.words}: {one.worth:+.2f} log-odds a standard deviation of {one.axis} (everybody: {one.crowd:+.2f}); "
                f"correlation {one.correlation:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"
            )
        if self.telling:
            told = "; ".join(f"{one.event_id} ({one.words})" for one in self.telling)
            lines.append(f"The choices that say most: {told}.")
        return "\n".join(lines)
