"""What a judge is shown of a user: `Raw` past choices, the most recent or the most similar, or an `Abstract` summary of them.

What PRIME (arXiv 2507.04607) and PLUS (arXiv 2507.13579) claim of the two can be checked with everything else left alone: a
judge takes either.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from palate.data.pairs import PairSet, Prompt, Text
from palate.encoders.base import Encoder
from palate.encoders.offline import Items, Style
from palate.errors import DataError
from palate.judges.base import Brief, Demo, Question, demos_of

SAME = 1e-6  # prompts whose directions differ by less in every feature are one and the same to their encoder
UNLIKE = ("How long does bread bake?", "Wer schrieb den Faust, und in welchem Jahr?")  # the same only to whom all prompts are


class Shown(NamedTuple):
    """What of a brief goes into one prompt."""

    text: str
    demos: tuple[Demo, ...]


class Writer(Protocol):
    """Whatever makes briefs of past choices: a summary writer, or a whole judge."""

    def study(self, past: PairSet) -> dict[str, Brief]: ...


class Memory(Protocol):
    """How a history is kept and which part of it is shown."""

    def study(self, past: PairSet) -> dict[str, Brief]:
        """A brief for every user."""
        ...

    def shown(self, questions: Sequence[Question]) -> list[Shown]:
        """What is shown with each question."""
        ...


class Raw:
    """The user's own choices: the last `k`, or the `k` whose prompts are most like the one that is asked about.

    Args:
        k: how many at most; 0 shows none, which is the judge without history.
        by: "recent" (by timestamp where all of a user's choices have one, else by the order of the rows), or "similar": the
            largest cosine of the prompts' embeddings, the most similar one last, nearest to the question. Of equals, which one
            prompt for all choices makes of everything, the later counts.
        encoder: for "similar"; one that reads prompts.

    Raises:
        DataError: k below 0, an unknown order, or "similar" without an encoder or with one that reads responses alone: `items`
            and `style` at once, others in `shown`.
    """

    def __init__(self, k: int, *, by: Literal["recent", "similar"] = "recent", encoder: Encoder | None = None):
        if k < 0 or by not in ("recent", "similar"):
            raise DataError(f"k is {k} and by is {by!r}; expected k of 0 or more, and 'recent' or 'similar'")
        if by == "similar" and encoder is None:
            raise DataError("by='similar' compares prompts and has no encoder; give one, such as load_encoder('minilm')")
        if by == "similar" and isinstance(encoder, Items | Style):
            raise _alike(encoder)
        self.k, self.by, self.encoder = k, by, encoder

    def __repr__(self) -> str:
        return f"Raw({self.k}, by={self.by!r})"

    def study(self, past: PairSet) -> dict[str, Brief]:
        """All strict choices of every user; which are shown is said later, question by question."""
        return {user: Brief(user, demos=demos, made="raw") for user, demos in demos_of(past).items()}

    def shown(self, questions: Sequence[Question]) -> list[Shown]:
        """`k` choices with each question. "similar" encodes every distinct prompt once."""
        demos = [question.brief.demos if question.brief is not None and self.k else () for question in questions]
        if self.by == "recent" or self.encoder is None:
            return [Shown("", kept[len(kept) - min(self.k, len(kept)) :]) for kept in demos]
        involved = [q.prompt for q, kept in zip(questions, demos, strict=True) if len(kept) > self.k]
        involved += [demo.prompt for kept in demos if len(kept) > self.k for demo in kept]
        rows = _unit_rows(list(dict.fromkeys(involved)), self.encoder)
        return [Shown("", self._nearest(q.prompt, kept, rows)) for q, kept in zip(questions, demos, strict=True)]

    def _nearest(self, prompt: Prompt, kept: tuple[Demo, ...], rows: Mapping[Prompt, NDArray[np.float64]]) -> tuple[Demo, ...]:
        if len(kept) <= self.k:
            return kept
        cosine = np.stack([rows[demo.prompt] for demo in kept]) @ rows[prompt]
        order = np.argsort(np.round(cosine, 9), kind="stable")  # equal prompts are equal, whatever the last bits say
        return tuple(kept[i] for i in order[-self.k :].tolist())


class Abstract:
    """A summary in words in place of the choices.

    Args:
        writer: makes the briefs; None for a judge that is only ever handed briefs from elsewhere.
    """

    def __init__(self, writer: Writer | None = None):
        self.writer = writer

    def __repr__(self) -> str:
        return f"Abstract({'' if self.writer is None else type(self.writer).__name__})"

    def study(self, past: PairSet) -> dict[str, Brief]:
        """What the writer makes of it. Raises `DataError` without a writer."""
        if self.writer is None:
            raise DataError("this memory has no writer of summaries; give Abstract(writer), or hand the judge written briefs")
        return self.writer.study(past)

    def shown(self, questions: Sequence[Question]) -> list[Shown]:
        """The text of each brief, and none of its choices."""
        return [Shown("" if question.brief is None else question.brief.text, ()) for question in questions]


def _alike(encoder: Encoder) -> DataError:
    return DataError(
        f"by='similar' compares prompts, and the encoder {encoder.spec!r} reads responses alone: to it all prompts are alike; "
        "expected one that reads prompts, such as 'minilm', an 'hf:' or an 'st:' model"
    )


def _unit_rows(prompts: Sequence[Prompt], encoder: Encoder) -> dict[Prompt, NDArray[np.float64]]:
    if not prompts:
        return {}
    rows = _directions(prompts, encoder)
    if len(prompts) > 1 and _same(rows) and _same(_directions(UNLIKE, encoder)):
        raise _alike(encoder)  # else the most recent choices would be shown as the most similar
    return dict(zip(prompts, rows, strict=True))


def _directions(prompts: Sequence[Prompt], encoder: Encoder) -> NDArray[np.float64]:
    """(N, D) rows of length 1, or 0 where the encoder knows nothing of a prompt."""
    values = encoder.encode([Text(prompt, "") for prompt in prompts]).rows(torch.arange(len(prompts))).double().cpu().numpy()
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    rows: NDArray[np.float64] = values / np.where(norms > 0, norms, 1)
    return rows


def _same(rows: NDArray[np.float64]) -> bool:
    return bool(np.ptp(rows, axis=0).max() < SAME)
