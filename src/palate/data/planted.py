"""Planted vectors: users and choices as arrays with a known answer, for tests and benchmarks of models that need no text.

Three worlds with known results: two groups on either side of a common reward (where a model of the crowd cannot win), one crowd
(where there is nothing to personalise), and users who mix ten scorers (PersonalLLM: best of eight answers against the worst).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palate.data.embeddings import Dense
from palate.data.pairs import EmbeddedPairs
from palate.data.simulation import names, simulate
from palate.data.synthetic import accuracy
from palate.errors import DataError

# |crowd| and |direction| of the two groups on unit-variance features (differences have variance 2). With these the true margins
# reach .788 on unseen users and the crowd's reward .68, the figures of the two-group check that the project works with.
CROWD_LENGTH = 1.065
GROUP_LENGTH = 1.065


@dataclass(frozen=True, eq=False)
class Planted:
    """Four disjoint sets of choices over shared features, and the truth: margin = (e(chosen) - e(rejected)) . (crowd + V w_u).

    Attributes:
        train, test_seen: choices of the seen users, for fitting and for testing.
        support, test_unseen: choices of the unseen users, for adapting and for testing.
        crowd: (D,) reward that all users share.
        directions: (D, K) V, what users differ about.
        weights_seen, weights_unseen: (U, K) w of the users, in the order of `user_ids` of their choices.
        oracle_seen, oracle_unseen: accuracy of the true margins on the two test sets; the best that can be expected.
        crowd_unseen: accuracy of the mean seen user's true reward on `test_unseen`; the best without personalisation.
    """

    train: EmbeddedPairs
    test_seen: EmbeddedPairs
    support: EmbeddedPairs
    test_unseen: EmbeddedPairs
    crowd: Tensor
    directions: Tensor
    weights_seen: Tensor
    weights_unseen: Tensor
    oracle_seen: float
    oracle_unseen: float
    crowd_unseen: float


def two_groups(
    seed: int = 0, *, n_users: int = 200, n_train: int = 30, n_test: int = 50, dim: int = 64, separation: float = GROUP_LENGTH
) -> Planted:
    """Two equal groups with rewards crowd + d and crowd - d, d orthogonal to the crowd's reward, logistic labels.

    With the defaults the true margins reach about .788 on unseen users (`crowd_unseen` .68). Costs 0.2 s and 16 MB.

    Args:
        seed: the same seed gives the same bits.
        n_users: seen users, and as many unseen ones.
        n_train, n_test: choices of each user for fitting (or support) and for testing.
        dim: D, at least 2.
        separation: |d|, in log-odds per standard deviation of a feature.

    Raises:
        DataError: a count below 1, fewer than 2 dimensions, a separation that is negative or not finite.
    """
    _counts({"n_users": n_users, "n_train": n_train, "n_test": n_test})
    if dim < 2:
        raise DataError(f"dim is {dim}; expected at least 2, one for the crowd and one for the groups")
    if not (math.isfinite(separation) and separation >= 0):
        raise DataError(f"separation is {separation}; expected a finite number of at least 0")
    rng = np.random.default_rng(seed)
    frame = np.linalg.qr(rng.standard_normal((dim, 2)))[0]
    crowd, directions = CROWD_LENGTH * frame[:, 0], frame[:, 1:]
    weights = separation * np.where(rng.permutation(np.arange(2 * n_users) % 2), 1.0, -1.0)[:, None]
    return _logistic(rng, crowd, directions, weights, n_train, n_test)


def one_crowd(seed: int = 0, *, n_users: int = 200, n_train: int = 30, n_test: int = 50, dim: int = 64) -> Planted:
    """Everybody has the same reward, as strong as that of one user of `two_groups`: personalisation can only do harm.

    `directions` has no columns. Arguments, errors and costs as in `two_groups`.
    """
    _counts({"n_users": n_users, "n_train": n_train, "n_test": n_test, "dim": dim})
    rng = np.random.default_rng(seed)
    crowd = rng.standard_normal(dim)
    crowd *= math.hypot(CROWD_LENGTH, GROUP_LENGTH) / np.linalg.norm(crowd)
    return _logistic(rng, crowd, np.zeros((dim, 0)), np.zeros((2 * n_users, 0)), n_train, n_test)


def simplex_types(
    alpha: float = 0.001,
    seed: int = 0,
    *,
    n_users: int = 200,
    n_prompts: int = 1000,
    n_test_prompts: int = 1000,
    common: float = 0.5,
    shots: tuple[int, int] = (45, 9),
    dim: int = 64,
) -> Planted:
    """Users who weigh ten scorers, w ~ Dirichlet(alpha 1_10), and choose the best of eight answers over the worst, without noise.

    Scorer k is a unit direction v_k of the features with v_j . v_k = `common` for j != k, as real reward models agree in part.
    Every user meets `shots[0]` (seen) or `shots[1]` (unseen) of the training prompts and all test prompts (`simulation.simulate`,
    which takes scores of real texts too). Memory is O(texts x D + choices).

    Args:
        alpha: concentration; .001 is nearly one scorer for each user, large values make everybody alike.
        seed: the same seed gives the same bits.
        n_users: seen users, and as many unseen ones.
        n_prompts, n_test_prompts: prompts with eight answers each.
        common: correlation of the rewards of two scorers, in [0, 1).
        shots: training choices of a seen and support choices of an unseen user, at most `n_prompts`.
        dim: D, at least 11.

    Raises:
        DataError: a number outside its range.
    """
    k, n_answers = 10, 8
    _counts({"n_users": n_users, "n_prompts": n_prompts, "n_test_prompts": n_test_prompts})
    if not (math.isfinite(alpha) and alpha > 0):
        raise DataError(f"alpha is {alpha}; expected a finite number above 0")
    if not 0 <= common < 1:
        raise DataError(f"common is {common}; expected a correlation of at least 0 and below 1")
    if dim <= k:
        raise DataError(f"dim is {dim}; expected at least {k + 1}, one for each scorer and one that they share")
    if not all(1 <= n <= n_prompts for n in shots):
        raise DataError(f"shots are {shots}; expected two numbers between 1 and n_prompts = {n_prompts}")
    rng = np.random.default_rng(seed)
    frame = np.linalg.qr(rng.standard_normal((dim, k + 1)))[0]
    directions = math.sqrt(common) * frame[:, :1] + math.sqrt(1 - common) * frame[:, 1:]
    table = rng.standard_normal(((n_prompts + n_test_prompts) * n_answers, dim)).astype(np.float32)
    scores = (table.astype(np.float64) @ directions).reshape(-1, n_answers, k)
    found = simulate(
        Dense(torch.from_numpy(table)), scores, alpha, rng, n_users=(n_users, n_users), n_test=n_test_prompts, shots=shots
    )
    parts = (found.train, found.test_seen, found.support, found.test_unseen)
    return _planted(parts, np.zeros(dim), directions, np.concatenate([found.weights_seen, found.weights_unseen]))


def _counts(counts: dict[str, int]) -> None:
    for name, value in counts.items():
        if value < 1:
            raise DataError(f"{name} is {value}; expected at least 1")


def _logistic(
    rng: np.random.Generator,
    crowd: NDArray[np.float64],
    directions: NDArray[np.float64],
    weights: NDArray[np.float64],
    n_train: int,
    n_test: int,
) -> Planted:
    n_users, each = len(weights) // 2, n_train + n_test
    table = rng.standard_normal((2 * len(weights) * each, len(crowd))).astype(np.float32)
    left, right = np.arange(0, len(table), 2), np.arange(1, len(table), 2)
    rewards = crowd + np.repeat(weights, each, axis=0) @ directions.T
    margin = ((table[left].astype(np.float64) - table[right]) * rewards).sum(axis=1)
    wins = rng.random(len(margin)) < 1 / (1 + np.exp(-margin))
    shape = (2, n_users, each)
    chosen, rejected = np.where(wins, left, right).reshape(shape), np.where(wins, right, left).reshape(shape)
    shared = Dense(torch.from_numpy(table))
    ids = names(n_users, n_users)

    def part(unseen: bool, columns: slice) -> EmbeddedPairs:
        mine = chosen[int(unseen), :, columns], rejected[int(unseen), :, columns]
        users = np.repeat(np.asarray(ids[unseen], dtype=object), mine[0].shape[1])
        return EmbeddedPairs(shared, mine[0].ravel(), mine[1].ravel(), users)

    first, last = slice(0, n_train), slice(n_train, None)
    parts = (part(False, first), part(False, last), part(True, first), part(True, last))
    return _planted(parts, crowd, directions, weights)


def _planted(
    parts: tuple[EmbeddedPairs, EmbeddedPairs, EmbeddedPairs, EmbeddedPairs],
    crowd: NDArray[np.float64],
    directions: NDArray[np.float64],
    weights: NDArray[np.float64],
) -> Planted:
    n_users = len(weights) // 2
    base = torch.from_numpy(np.concatenate([crowd[:, None], directions], axis=1))  # (D, 1 + K)

    def reached(pairs: EmbeddedPairs, mine: NDArray[np.float64]) -> float:
        """Accuracy of the true base rewards with weights `mine` (U, K) of the users of `pairs`."""
        scores = pairs.embeddings.project(base).double().numpy()
        difference = scores[pairs.chosen.numpy()] - scores[pairs.rejected.numpy()]
        return accuracy(difference[:, 0] + (difference[:, 1:] * mine[pairs.user_index.numpy()]).sum(axis=1))

    seen, unseen = weights[:n_users], weights[n_users:]
    return Planted(
        *parts,
        crowd=torch.from_numpy(crowd).float(),
        directions=torch.from_numpy(directions).float(),
        weights_seen=torch.from_numpy(seen).float(),
        weights_unseen=torch.from_numpy(unseen).float(),
        oracle_seen=reached(parts[1], seen),
        oracle_unseen=reached(parts[3], unseen),
        crowd_unseen=reached(parts[3], np.broadcast_to(seen.mean(axis=0), unseen.shape)),
    )
