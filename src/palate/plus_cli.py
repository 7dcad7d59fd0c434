"""What `palate judge --method plus` does before anybody is judged: sum up the seen users, and fit the reward on their choices."""

from typing import TYPE_CHECKING, NamedTuple, Self

from palate import terminal
from palate.errors import DataError

if TYPE_CHECKING:
    from palate.data.pairs import PairSet
    from palate.data.splits import By
    from palate.encoders import Encoder
    from palate.judges.client import Chat
    from palate.judges.plus import Summaries
    from palate.judges.reward import PlusReward


class Unfitted(NamedTuple):
    """PLUS before anything is asked: what sums up the seen users, and whose choices the reward is then fitted on."""

    writer: "Summaries"
    encoder: "Encoder"
    told: "PairSet"
    held: "PairSet"
    n_summaries: int
    interactions: int | None
    seed: int

    @classmethod
    def of(
        cls,
        chat: "Chat",
        encoder: "Encoder",
        train: "PairSet",
        by: "By | None",
        n_summaries: int,
        interactions: int | None,
        seed: int,
    ) -> Self:
        """Of the seen users' choices, those that are summed up and those that the reward is fitted on: no summary saw its answer.

        Raises `DataError` for an encoder that PLUS cannot use, before the summaries are paid for.
        """
        from palate.data.splits import split
        from palate.encoders.base import usual_unit
        from palate.judges.plus import Summaries
        from palate.judges.reward import reads_new_texts

        reads_new_texts(encoder)
        parts = split(train, by=usual_unit(train) if by is None else by, unseen=0.0, seed=seed)
        told, held = train[parts.train], train[parts.test_seen]
        return cls(Summaries(chat, seed=seed), encoder, told, held, n_summaries, interactions, seed)

    def fitted(self) -> "tuple[PlusReward, str | None]":
        """The reward, whose writer sums up the unseen users, and which seen users it had to be fitted without, and why.

        Raises `DataError` where that is all of them. Cost: one request for each seen user.
        """
        import numpy as np

        from palate.judges.plus import Summaries
        from palate.judges.reward import INTERACTIONS, PlusReward

        writer, told, held, n = self.writer, self.told, self.held, self.n_summaries
        without = None
        with terminal.progress("Summing up the seen users"):
            summaries = writer.study(told)
        if writer.failed:
            user, why = next(iter(writer.failed.items()))
            without = f"{len(writer.failed)} of {len(told.user_ids)} seen users have no summary, such as {user!r}: {why}"
            held = held[~np.isin(held.users, list(writer.failed))]
            if not len(held):
                raise DataError(f"{without}; nobody is left to fit the reward on: see to the server or the budget and run again")
            without = f"{without}; the reward was fitted without them"
            terminal.note(without)
        with terminal.progress("Fitting the reward"):
            k = INTERACTIONS if self.interactions is None else self.interactions
            reward = PlusReward.fit(held, self.encoder, summaries, interactions=k, seed=self.seed)
        reward.writer = writer if n == 1 else Summaries(writer.chat, n_summaries=n, reward=reward, seed=self.seed)
        return reward, without
