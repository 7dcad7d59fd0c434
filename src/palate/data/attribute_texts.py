"""The 84 attribute users of PReF as choices in text, from our own sentences: what `attributes` has as vectors, to be read.

The published users are a language model told to like two poles of seven traits; neither the pairs nor the code that made them are
public. Here the answers are composed with the traits turned up and down (`palate.data.phrases`), the two wishes of a user are the
same 84, and the judge answers in both orders as published, so every choice has a true margin.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palate.data.attributes import TRAITS, judged, wishes
from palate.data.pairs import Choice, PairSet
from palate.data.phrases import AXES, LEVELS, compose, questions
from palate.errors import DataError

# The axis of the sentences that moves an answer towards the second pole of each trait, and its sign. Nothing here is rude: the
# pole "rude" is an answer without any kind words.
_AXIS: dict[tuple[str, str], tuple[str, int]] = {
    ("concise", "verbose"): ("length", 1),
    ("informal", "formal"): ("formality", 1),
    ("serious", "humorous"): ("humour", 1),
    ("unengaging", "engaging"): ("curiosity", 1),
    ("rude", "polite"): ("warmth", 1),
    ("calm", "enthusiastic"): ("enthusiasm", 1),
    ("hesitant", "confident"): ("hedging", -1),
}
_SD = math.sqrt((LEVELS**2 - 1) / 12)  # of a level drawn uniformly


@dataclass(frozen=True, eq=False)
class AttributeTexts:
    """Choices of the 84 users in English, and the truth.

    Attributes:
        pairs: their choices; `split` has the four sides, the conversation is the prompt. Ties are answers that the judge gave
            once for each side.
        margin: (P,) true reward of the chosen text minus that of the rejected one, in natural log-odds.
        weights: (84, 7) wishes of the users, in the order of `pairs.user_ids`: +-scale on the two wanted traits.
    """

    pairs: PairSet
    margin: NDArray[np.float64]
    weights: NDArray[np.float64]

    def oracle_accuracy(self) -> float:
        """Share of the strict choices that the true margins predict, the most that can be reached."""
        strict = self.margin[~self.pairs.tie]
        return float((np.sign(strict) + 1).mean() / 2)


def attribute_texts(
    seed: int = 0, *, n_unseen: int = 24, n_train: int = 40, n_test: int = 40, scale: float = 1.5
) -> AttributeTexts:
    """The choices of 84 users, some of them unseen, between composed answers to everyday questions.

    Reward of user u for a text with standardised traits t (mean 0, variance 1): w_u . t, w_u = +-scale on two traits. A judge
    answers each pair in both orders, and two different answers are a tie: P(tie) = 2 p (1 - p), p = sigma(margin). The other
    axes of style, and which sentences are used, are drawn at random and please nobody. A random half of the questions is for
    learning and the other half for testing, so that no text is on both sides.

    Args:
        seed: the same seed gives the same bits.
        n_unseen: users held back, drawn at random; 1 to 83.
        n_train, n_test: choices of each user to learn from (`train`, `support`) and to test on.
        scale: log-odds per standard deviation of a wanted trait.

    Raises:
        DataError: a number outside its range.
    Cost: two new texts a choice; the 6,720 choices of the defaults take 2 s and 25 MB.
    """
    everybody = wishes()
    if not 1 <= n_unseen < len(everybody):
        raise DataError(f"n_unseen is {n_unseen}; expected 1 to {len(everybody) - 1} of the {len(everybody)} users")
    for name, value in (("n_train", n_train), ("n_test", n_test)):
        if value < 1:
            raise DataError(f"{name} is {value}; expected at least 1")
    if not (math.isfinite(scale) and scale > 0):
        raise DataError(f"scale is {scale}; expected a finite number above 0")
    rng = np.random.default_rng(seed)
    unseen = set(rng.permutation(len(everybody))[:n_unseen].tolist())
    book = questions()
    shuffled = rng.permutation(len(book)).tolist()
    topics = {"learned": shuffled[: len(book) // 2], "tested": shuffled[len(book) // 2 :]}
    columns, signs = zip(*((AXES.index(axis), sign) for axis, sign in (_AXIS[trait] for trait in TRAITS)), strict=True)
    order = sorted(range(len(everybody)), key=lambda u: everybody[u].name)  # as a PairSet has its ids
    weights = np.zeros((len(everybody), len(TRAITS)))
    choices: list[Choice] = []
    margins: list[float] = []
    for row, number in enumerate(order):
        for trait, pole in everybody[number]:
            weights[row, trait] = scale * (2 * pole - 1)
        names = ("support", "test_unseen") if number in unseen else ("train", "test_seen")
        for name, part, count in zip(names, topics.values(), (n_train, n_test), strict=True):
            asked = rng.integers(len(part), size=count)
            levels = rng.integers(LEVELS, size=(count, 2, len(AXES)))
            traits = (levels[..., columns] - (LEVELS - 1) / 2) / _SD * np.asarray(signs)  # (count, 2, 7)
            margin = (traits[:, 0] - traits[:, 1]) @ weights[row]
            answers = judged(margin, rng)
            for i, (true, answer) in enumerate(zip(margin.tolist(), answers.tolist(), strict=True)):
                question = book[part[asked[i]]]
                said = [compose(question, dict(zip(AXES, one, strict=True)), rng) for one in levels[i].tolist()]
                if said[0] == said[1]:
                    continue  # the same levels and the same frames: nothing to choose
                if answer == 0:
                    said, true = said[::-1], -true
                choices.append(
                    Choice(
                        user_id=everybody[number].name,
                        prompt=question["prompt"],
                        chosen=said[0],
                        rejected=said[1],
                        tie=answer == 0.5,
                        conversation_id=question["prompt"],
                        split=name,
                    )
                )
                margins.append(true)
    return AttributeTexts(PairSet.from_choices(choices), np.asarray(margins), weights)
