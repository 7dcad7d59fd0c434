"""The 84 attribute users of PReF, from our own generator: seven traits with two poles each, and users who want two of them.

A user is a pair of poles of different traits, of which there are C(7, 2) x 4 = 84. The published users are a language model told
to like the two poles; here the rewards are planted, so that every question, answer and choice has a known value.
"""

import math
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palate.data.embeddings import Dense
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError

TRAITS: tuple[tuple[str, str], ...] = (
    ("concise", "verbose"),
    ("informal", "formal"),
    ("serious", "humorous"),
    ("unengaging", "engaging"),
    ("rude", "polite"),
    ("calm", "enthusiastic"),
    ("hesitant", "confident"),
)


class Wish(NamedTuple):
    """One user: two poles, each as (trait, pole), the pole 0 or 1."""

    first: tuple[int, int]
    second: tuple[int, int]

    @property
    def name(self) -> str:
        return " and ".join(TRAITS[trait][pole] for trait, pole in self)


@dataclass(frozen=True, eq=False)
class Attributes:
    """Choices of the seen users, and for the unseen ones a pool of questions, test pairs and candidates, with the truth.

    Every pair is put to a judge in both orders; two different answers are a tie, as published. The true reward of a text with
    embedding e for user u is e . (directions @ weights[u]), in natural log-odds.

    Attributes:
        train: choices of the seen users on a common set of pairs: the pairs x users table of answers has `n_answers` of every
            pair's possible answers.
        pool, test: (Q, 2) and (T, 2) rows of `embeddings`: pairs to ask unseen users, and to test what was learned.
        candidates: (M, n) rows of `embeddings`: n answers to each of M prompts, for best-of-n. The first is the base response.
        seen, unseen: the users by their wishes, in the order of `weights_seen` and `weights_unseen`; ids are their names.
        directions: (D, 7) orthonormal: what moves a text towards the second pole of each trait.
        weights_seen, weights_unseen: (U, 7) planted weights.
    """

    embeddings: Dense
    train: EmbeddedPairs
    pool: Tensor
    test: Tensor
    candidates: Tensor
    seen: tuple[Wish, ...]
    unseen: tuple[Wish, ...]
    directions: Tensor
    weights_seen: Tensor
    weights_unseen: Tensor

    def rewards(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """(U, ...) true rewards of the texts `rows` (...) for `weights` (U, 7), by default those of the unseen users."""
        weights = self.weights_unseen if weights is None else weights
        traits = self.embeddings.rows(rows.reshape(-1)) @ self.directions
        return (weights @ traits.T).reshape(len(weights), *rows.shape)

    def margins(self, pairs: Tensor, weights: Tensor | None = None) -> Tensor:
        """(U, n) true reward of the first text of each of `pairs` (n, 2) minus that of the second."""
        rewards = self.rewards(pairs, weights)
        return rewards[..., 0] - rewards[..., 1]


def wishes() -> tuple[Wish, ...]:
    """All 84 users, in a fixed order."""
    return tuple(
        Wish((a, left), (b, right)) for a, b in combinations(range(len(TRAITS)), 2) for left, right in product((0, 1), (0, 1))
    )


def attributes(
    seed: int = 0,
    *,
    n_unseen: int = 24,
    n_pairs: int = 400,
    n_answers: int = 20,
    n_pool: int = 300,
    n_test: int = 200,
    prompts: tuple[int, int] = (50, 10),
    dim: int = 32,
    scale: float = 1.5,
) -> Attributes:
    """The 84 users, some of them unseen, with vectors for texts: traits are planted directions, all else is noise of equal size.

    Args:
        seed: the same seed gives the same bits.
        n_unseen: users held back, drawn at random; the other 84 - n_unseen are seen.
        n_pairs, n_answers: distinct training pairs, and how many of the seen users answer each.
        n_pool, n_test: pairs to ask unseen users, and to test on; of texts of their own.
        prompts: how many prompts have candidates, and how many candidates each.
        dim: D, at least 7.
        scale: log-odds per standard deviation of a wanted trait. Differences of two texts have variance 2 in every trait, so that
            1.5 gives margins of standard deviation 3.

    Raises:
        DataError: a number outside its range.
    Costs milliseconds; O(texts x dim) memory.
    """
    everybody = wishes()
    counts = {"n_pairs": n_pairs, "n_pool": n_pool, "n_test": n_test, "prompts[0]": prompts[0], "prompts[1]": prompts[1]}
    for name, value in counts.items():
        if value < 1:
            raise DataError(f"{name} is {value}; expected at least 1")
    if not 1 <= n_unseen < len(everybody):
        raise DataError(f"n_unseen is {n_unseen}; expected 1 to {len(everybody) - 1} of the {len(everybody)} users")
    n_seen = len(everybody) - n_unseen
    if not 1 <= n_answers <= n_seen:
        raise DataError(f"n_answers is {n_answers}; expected 1 to {n_seen}, the number of seen users")
    if dim < len(TRAITS):
        raise DataError(f"dim is {dim}; expected at least {len(TRAITS)}, one for each trait")
    if not (math.isfinite(scale) and scale > 0):
        raise DataError(f"scale is {scale}; expected a finite number above 0")
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((dim, len(TRAITS))))[0]
    order = rng.permutation(len(everybody))
    unseen, seen = (tuple(everybody[i] for i in part.tolist()) for part in (order[:n_unseen], order[n_unseen:]))
    sizes = np.cumsum([0, 2 * n_pairs, 2 * n_pool, 2 * n_test, prompts[0] * prompts[1]])
    table = rng.standard_normal((int(sizes[-1]), dim))
    pairs, pool, test = (np.arange(a, b).reshape(-1, 2) for a, b in pairwise(sizes[:4]))

    weights = _weights(seen, scale)
    who = np.argsort(rng.random((n_pairs, n_seen)), axis=1)[:, :n_answers]  # users who answer each pair
    true = ((table[pairs[:, 0]] - table[pairs[:, 1]]) @ directions @ weights.T)[np.arange(n_pairs)[:, None], who]
    answer = judged(true, rng).ravel()
    left, right = (np.repeat(pairs[:, side], n_answers) for side in (0, 1))
    names = np.asarray([wish.name for wish in seen], dtype=object)
    shared = Dense(torch.from_numpy(table.astype(np.float32)))
    train = EmbeddedPairs(
        shared,
        np.where(answer == 0, right, left),
        np.where(answer == 0, left, right),
        names[who.ravel()],
        tie=answer == 0.5,
        unit=np.repeat(np.arange(n_pairs), n_answers),
    )
    return Attributes(
        shared,
        train,
        torch.from_numpy(pool),
        torch.from_numpy(test),
        torch.arange(int(sizes[3]), int(sizes[4])).reshape(prompts),
        seen,
        unseen,
        torch.from_numpy(directions).float(),
        torch.from_numpy(weights).float(),
        torch.from_numpy(_weights(unseen, scale)).float(),
    )


def judged(margin: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """1, 0 or 1/2 for each true margin: two Bradley-Terry answers, one for each order of the sides, which count if they agree.

    P(1) = p^2 and P(1/2) = 2 p (1 - p) with p = sigma(margin).
    """
    p = 1 / (1 + np.exp(-margin))
    both: NDArray[np.float64] = (rng.random((2, *margin.shape)) < p).mean(axis=0)
    return both


def _weights(users: tuple[Wish, ...], scale: float) -> NDArray[np.float64]:
    """(U, 7): +-scale on the two wanted traits."""
    out = np.zeros((len(users), len(TRAITS)))
    for row, wish in enumerate(users):
        for trait, pole in wish:
            out[row, trait] = scale * (2 * pole - 1)
    return out
