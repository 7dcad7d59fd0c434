"""What a user's predictions are worth: accuracy, log loss, AUC and calibration, for all users at once.

Everything is a segment sum over users; no loop runs over them. A prediction is a margin in log-odds whose sign says which side
is preferred. A predicted tie (a margin of zero) counts half, so that a model that knows nothing scores .50.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palate import likelihood
from palate.errors import ConvergenceError, DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

N_BINS = 10  # of the confidence in [.5, 1]; the same as 20 bins of the probability in [0, 1]
WORST = (0.1, 0.2, 0.3, 0.4, 0.5)  # shares of the users whose mean is reported
FLOOR_DRAWS = 400


class UserMetrics(NamedTuple):
    """Columns over users, (U,) each; `accuracy` and `auc` are NaN for users with no strict pair, who are to be left out."""

    n_test: Ints  # strict pairs
    n_ties: Ints
    accuracy: Floats
    log_loss: Floats  # mean over strict pairs and ties, nats
    auc: Floats


class Calibration(NamedTuple):
    """Strict pairs by confidence max(p, 1 - p), in `N_BINS` equal bins of [.5, 1]: how many, mean confidence, share right."""

    pairs: Floats
    confidence: Floats  # sums, so that bins add up over seeds
    right: Floats

    def __add__(self, other: object) -> "Calibration":
        if not isinstance(other, Calibration):
            return NotImplemented
        return Calibration(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def error(self) -> float:
        """Expected calibration error: the mean over pairs of |share right - confidence| of their bin (Guo et al. 2017, eq. 5).

        Raises `DataError` without pairs.
        """
        if not self.pairs.sum():
            raise DataError("calibration of 0 pairs; expected at least one strict pair")
        return float(np.abs(self.right - self.confidence).sum() / self.pairs.sum())

    def curve(self) -> tuple[Floats, Floats, Floats]:
        """(mean confidence, share right, pairs) of the bins that hold any pair."""
        used = self.pairs > 0
        return self.confidence[used] / self.pairs[used], self.right[used] / self.pairs[used], self.pairs[used]


def moderated(mean: Tensor, variance: Tensor) -> Tensor:
    """The margin whose sigmoid is `likelihood.expected_probability(mean, variance)`: mean / sqrt(1 + pi variance / 8), (P,).

    Kept in log-odds, where a sure and wrong prediction has a finite loss. It never changes the sign of a margin.

    Raises:
        ConvergenceError: a margin or variance that is not finite, which would otherwise count as a wrong answer.
    """
    broken = ~(torch.isfinite(mean) & torch.isfinite(variance))
    if bool(broken.any()):
        first = int(torch.nonzero(broken)[0])
        raise ConvergenceError(
            f"{int(broken.sum())} of {len(mean)} predicted margins are not finite (the first is pair {first}); "
            "the fit diverged: raise its regularisation or look for extreme features"
        )
    mean, variance = mean.double(), variance.double()
    return mean / torch.sqrt(1 + torch.pi / 8 * variance)


def user_metrics(margin: Tensor, tie: Tensor, user_index: Tensor, n_users: int) -> UserMetrics:
    """Metrics of every user from margins (P,) in log-odds, labelled ties (P,) and the user of each pair (P,). O(P log P).

    Accuracy and AUC are over strict pairs. A labelled tie counts half each way in the log loss. Pairs count equally, whatever
    their weight in training.
    """
    loss = likelihood.nll(margin, tie).double().cpu().numpy()
    m, user, is_tie = margin.double().cpu().numpy(), user_index.cpu().numpy(), tie.cpu().numpy()
    strict = ~is_tie
    n_test = np.bincount(user[strict], minlength=n_users)
    n_all = np.bincount(user, minlength=n_users)
    right = np.bincount(user[strict], _right(m[strict]), minlength=n_users)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, as documented
        accuracy = right / n_test
        log_loss = np.bincount(user, loss, minlength=n_users) / n_all
    return UserMetrics(n_test, n_all - n_test, accuracy, log_loss, _auc(m[strict], user[strict], n_test))


def _right(margin: Floats) -> Floats:
    return np.asarray((margin > 0) + 0.5 * (margin == 0), dtype=np.float64)


def _auc(margin: Floats, user: Ints, n: Ints) -> Floats:
    """Area under the ROC curve of each user when every strict pair enters in both orientations.

    The Mann-Whitney statistic of (m, 1) and (-m, 0), ties counting half, from midranks within the user: what
    sklearn.metrics.roc_auc_score gives one user at a time, without the loop.
    """
    score, owner = np.concatenate([margin, -margin]), np.concatenate([user, user])
    order = np.lexsort((score, owner))
    score, owner = score[order], owner[order]
    if not len(score):
        return np.full(len(n), np.nan)
    new = np.concatenate([[True], (np.diff(score) != 0) | (np.diff(owner) != 0)])
    run = np.cumsum(new) - 1
    first = np.flatnonzero(new)
    length = np.diff(np.concatenate([first, [len(score)]]))
    midrank = (first + (length + 1) / 2)[run] - (2 * (np.cumsum(n) - n))[owner]  # from 1 within the user
    positive = order < len(margin)
    ranks = np.bincount(owner[positive], midrank[positive], minlength=len(n))
    with np.errstate(invalid="ignore"):
        return np.asarray((ranks - n * (n + 1) / 2) / n.astype(np.float64) ** 2)


def calibration(margin: Tensor, tie: Tensor) -> Calibration:
    """Bins over all strict pairs of margins (P,). Folding p and 1 - p together is entering every pair in both orientations."""
    m = margin.double()[~tie].cpu()
    confidence = likelihood.probability(m.abs()).numpy()
    place = np.minimum(((confidence - 0.5) * 2 * N_BINS).astype(np.int64), N_BINS - 1)
    sums = [np.bincount(place, values, minlength=N_BINS) for values in (np.ones(len(m)), confidence, _right(m.numpy()))]
    return Calibration(*(np.asarray(column, dtype=np.float64) for column in sums))


def worst_mean(accuracy: Floats, share: float) -> float:
    """Mean over the worst `share` of the users: the lowest ceil(share U) of the accuracies (U,). O(U log U)."""
    if not len(accuracy):
        raise DataError("the worst of 0 users; expected at least one")
    return float(np.sort(accuracy)[: n_worst(len(accuracy), share)].mean())


def n_worst(n_users: int, share: float) -> int:
    """ceil(share U), at least 1; a product such as .1 x 30 that is not quite whole in binary counts as whole."""
    return max(1, int(np.ceil(share * n_users - 1e-9)))


def binomial_floor(accuracy: float, n_test: Ints, shares: tuple[float, ...] = WORST, *, seed: int = 0) -> Floats:
    """What the worst `shares` of the users would average if all had the same `accuracy` and differed by luck alone.

    Each user's accuracy is Binomial(n_test, accuracy) / n_test; the mean over `FLOOR_DRAWS` seeded draws (fewer for very many
    users, for whom a draw is nearly exact) is within about .002. A worst decile at its floor is no sign of unequal service.
    """
    if not len(n_test) or n_test.min() < 1:
        raise DataError("a binomial floor needs users with at least 1 strict test pair each; drop the others")
    draws = int(np.clip(2**22 // len(n_test), 10, FLOOR_DRAWS))
    rng = np.random.default_rng(seed)
    simulated = np.sort(rng.binomial(n_test, accuracy, size=(draws, len(n_test))) / n_test, axis=1)
    return np.asarray([simulated[:, : n_worst(len(n_test), share)].mean() for share in shares])
