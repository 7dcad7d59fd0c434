"""PLUS: what a user likes, summed up in words by a model that reads the history (`Summaries`).

In PLUS (arXiv 2507.13579) a summariser writes a "##Summary" of a user's choices, and a reward model scores responses to a prompt
that begins with it (`PlusReward`). The summariser is trained by PPO with log sigma(r_chosen - r_rejected) of a choice that it has
not seen as the reward. That needs a model whose weights can be changed; what is offered here is the same signal without it: of
`n_summaries` the one is kept that the reward model does best with on a held-out choice of the user.

A summary also serves a chat model as it is: `InContext(chat, memory=Abstract(Summaries(chat)))`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from palate import likelihood
from palate.data.pairs import PairSet
from palate.errors import DataError
from palate.judges.base import Brief, Demo, demos_of
from palate.judges.client import Chat, Request
from palate.judges.fences import spoken
from palate.judges.rounds import Work, answered, history, together, tried, whole_sentences

TASK = """You sum up what one particular user likes in responses, so that a reward model can tell which of two responses to \
another prompt this user would choose. You are given past choices of the user: a prompt, the response that was chosen and the \
one that was rejected.

Say what the chosen responses have in common and the rejected ones lack: content, values, tone, length, form. Do not retell the \
conversations. Write in a few sentences, under a heading that is exactly

##Summary"""
HEADING = re.compile(r"^[ \t]*#{1,6}[ \t]*summary[ \t]*:?[ \t]*(.*)$", re.IGNORECASE | re.MULTILINE)


class Rewards(Protocol):
    """What the best of several summaries is chosen with: a fitted `PlusReward`."""

    def margins(self, pairs: PairSet, briefs: Mapping[str, Brief]) -> Tensor: ...


class Summary(NamedTuple):
    """One summary, and whether it had to be cut at the limit."""

    text: str
    cut: bool


class Summaries:
    """Writes a summary of every user's choices: a `Writer` for `Abstract`, and what `PlusReward` reads.

    Args:
        chat: the model that writes.
        n_summaries: written for each user, of which one is kept.
        reward: a fitted reward model that chooses; needed for more than one.
        temperature: by default 0 for one summary and 1, as published, for several.
        max_tokens: the published limit; a longer summary ends with its last whole sentence within it.
        tries: how often it is asked before an answer without a heading or without text counts as none.
        n_past: the last so many choices are read; None for all of them.
        seed: sent with the first request; the others have the numbers after it.

    Attributes:
        failed: users of whom the last `study` has no summary, and why.

    Raises:
        DataError: numbers that are not positive, several summaries without a reward model, or at temperature 0.
    """

    def __init__(
        self,
        chat: Chat,
        *,
        n_summaries: int = 1,
        reward: Rewards | None = None,
        temperature: float | None = None,
        max_tokens: int = 256,
        tries: int = 3,
        n_past: int | None = None,
        seed: int = 0,
    ):
        warmth = (0.0 if n_summaries == 1 else 1.0) if temperature is None else temperature
        counts = {"n_summaries": n_summaries, "max_tokens": max_tokens, "tries": tries, "n_past": 1 if n_past is None else n_past}
        wrong = [f"{name} is {value}" for name, value in counts.items() if value < 1]
        if wrong or not warmth >= 0:
            raise DataError(f"{', '.join(wrong) or f'temperature is {warmth}'}; expected at least 1 (a temperature from 0)")
        if n_summaries > 1 and (reward is None or not warmth):
            raise DataError(
                f"n_summaries is {n_summaries}, temperature {warmth} and the reward model {reward!r}; expected a fitted "
                "PlusReward to choose with, and a temperature above 0, or they are all the same"
            )
        self.chat, self.n_summaries, self.reward, self.temperature = chat, n_summaries, reward, warmth
        self.max_tokens, self.tries, self.n_past, self.seed = max_tokens, tries, n_past, seed
        self.failed: dict[str, str] = {}

    def study(self, past: PairSet) -> dict[str, Brief]:
        """A summary for every user; a tie teaches nothing, and a user without a choice has an empty brief.

        Of several summaries the one is kept under which the reward model gives the user's last strict row the largest
        log sigma(r_chosen - r_rejected); no summary has seen that row, and where it is the only one the first is kept. Users of
        whom none could be read, or whom the server or the budget cut short, are left out and named in `failed`.

        Cost: `n_summaries` requests a user; with several, as many encodings of two texts a user.
        """
        held = _last(past) if self.n_summaries > 1 else np.zeros(0, dtype=np.int64)
        seen = np.setdiff1d(np.arange(len(past)), held)
        kept = demos_of(past[seen]) if len(held) else demos_of(past)
        all_of = {user: kept.get(user, ()) for user in past.user_ids}
        work = {user: self._written(demos) for user, demos in all_of.items()}
        written, self.failed = together(self.chat, work)
        briefs = {user: self._briefs(user, found, all_of[user]) for user, found in written.items()}
        for user in [user for user, found in briefs.items() if not found]:
            del briefs[user]
            self.failed[user] = f"unreadable: no text under a heading ##Summary in {self.tries} tries"
        return self._best(past[held], briefs) if len(held) else {user: found[0] for user, found in briefs.items()}

    def calls(self, n_choices: int) -> int:
        """Requests to study a user of so many choices, second tries of answers that cannot be read not counted."""
        return self.n_summaries if n_choices else 0

    def _written(self, demos: Sequence[Demo]) -> Work[list[Summary | None]]:
        if not demos:
            return []
        messages = history(TASK, demos if self.n_past is None else demos[-self.n_past :], sides=False)
        out: list[Summary | None] = [None] * self.n_summaries
        left = list(range(self.n_summaries))
        for attempt in range(self.tries):
            asked = [
                Request((), self.temperature, self.seed + i + attempt * (self.n_summaries - 1), self.max_tokens) for i in left
            ]
            replies = yield [tried(messages, request, attempt) for request in asked]
            for i, reply in zip(left, replies, strict=True):
                usable = answered(reply)
                out[i] = None if usable is None else summary_in(usable.text, self.max_tokens, cut=usable.truncated)
            left = [i for i in left if out[i] is None]
            if not left:
                break
        return out

    def _briefs(self, user: str, found: Sequence[Summary | None], demos: Sequence[Demo]) -> list[Brief]:
        if not demos:
            return [Brief(user, made="plus: no choices")]
        made = f"plus: summary of {len(demos) if self.n_past is None else min(self.n_past, len(demos))} choices"
        limit = f", cut at {self.max_tokens} tokens"
        written = [one for one in found if one is not None]
        return [Brief(user, text, (), made + (limit if cut else ""), self.chat.model) for text, cut in written]

    def _best(self, held: PairSet, briefs: Mapping[str, Sequence[Brief]]) -> dict[str, Brief]:
        """Of each user's briefs the first with the largest log-likelihood of the user's row in `held`."""
        out = {user: found[0] for user, found in briefs.items()}
        best = {user: -np.inf for user in briefs}
        for i in range(self.n_summaries):
            now = {user: found[i] for user, found in briefs.items() if i < len(found)}
            rows = held[np.isin(held.users, list(now))] if now else held[:0]
            if self.reward is None or not len(rows):
                continue
            scores = (-likelihood.nll(self.reward.margins(rows, now))).double()
            for user, score in zip(rows.users.tolist(), scores.tolist(), strict=True):
                if score > best[user]:
                    out[user], best[user] = now[user], score
        return out


def summary_in(answer: str, max_tokens: int, *, cut: bool = False) -> Summary | None:
    """What stands under the last heading ##Summary of an answer; None without one, or with nothing under it.

    A text of more words than `max_tokens` has more tokens too: a server that does not keep to the limit is held to it by words.
    """
    answer = spoken(answer)
    headings = list(HEADING.finditer(answer))
    if not headings:
        return None
    text = f"{headings[-1][1]}\n{answer[headings[-1].end() :]}".strip()
    if cut or len(text.split()) > max_tokens:
        text, cut = whole_sentences(text, max_tokens), True
    return Summary(text, cut) if text else None


def _last(past: PairSet) -> NDArray[np.int64]:
    """Rows of the last strict choice of every user who has two or more, (H,); "last" as in `demos_of`."""
    strict = np.flatnonzero(~past.tie)
    out = []
    for user in range(len(past.user_ids)):
        rows = strict[past.user_index[strict] == user]
        times = past.timestamp[rows]
        if len(rows) > 1:
            out.append(rows[-1] if np.isnan(times).any() else rows[np.argsort(times, kind="stable")[-1]])
    return np.asarray(out, dtype=np.int64)
