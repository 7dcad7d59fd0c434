"""`evaluate`: adapt users from their support, predict their test choices, and say how each of them fares."""

import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from palate.adaptation import Profiles, adapt, margin_moments, no_pairs
from palate.data.pairs import EmbeddedPairs
from palate.data.splits import nested_shots
from palate.errors import DataError
from palate.evaluation.facts import Cell, Misprediction
from palate.evaluation.metrics import calibration, moderated, user_metrics
from palate.evaluation.result import ALL, COLUMNS, Evaluation, Shots
from palate.models.base import RewardModel

N_MISPREDICTED = 10


class Labels(NamedTuple):
    """Under which names the rows of one evaluation are filed."""

    data_set: str
    method: str
    seed: int
    cohort: str
    shots: Shots


@torch.no_grad()
def evaluate(
    model: RewardModel,
    support: EmbeddedPairs | None,
    test: EmbeddedPairs,
    *,
    profiles: Profiles | None = None,
    shots: Shots = None,
    seed: int = 0,
    cohort: str = "unseen",
    method: str | None = None,
    data_set: str = "",
) -> Evaluation:
    """How well a fitted model predicts each user's choices in `test`, after learning from their choices in `support`.

    Per user, over `test`: `accuracy` of the strict pairs (a predicted tie counts half); `log_loss` in nats of the probability
    sigma(a mean / sqrt(1 + pi variance / 8)), so that what the posterior does not know counts (`RewardModel.stated`), a labelled
    tie counting half each way; `auc` with every strict pair in both orientations. Pairs count equally. Users without a strict
    test pair have no row and are counted in `cells`.

    Args:
        model: a fitted model.
        support: choices to learn from; users without any, and everybody where it is None, get the crowd's reward.
        test: choices to predict; nothing is learned from them.
        profiles: use these instead of adapting; users without one get the crowd's reward.
        shots: adapt from the first so many support choices of each user in one seeded random order, so that fewer are always
            part of more; 0 is the crowd's reward, None all choices.
        seed: of that order, and a label of the rows.
        cohort, method, data_set: labels of the rows; the method is by default the model's class.

    Raises:
        DataError: no strict test pair at all, profiles together with shots, negative shots, a model that is not fitted.
        MismatchError: other embeddings, or profiles of another model.
        ConvergenceError: predictions that are not finite.
    Cost: one `adapt` and one pass over the test texts.
    """
    if profiles is not None and shots is not None:
        raise DataError(f"profiles and shots = {shots} were both given; profiles are used as they are, so leave shots out")
    labels = Labels(data_set, type(model).__name__ if method is None else method, seed, cohort, shots)
    return evaluated(model, support, test, labels, profiles=profiles)


def evaluated(
    model: RewardModel,
    support: EmbeddedPairs | None,
    test: EmbeddedPairs,
    labels: Labels,
    *,
    profiles: Profiles | None = None,
    fit_seconds: float | None = None,
    rows: Tensor | None = None,
) -> Evaluation:
    """`evaluate` with the time that the fit took and, for the surest errors, the row (P,) of each test pair in its data set."""
    began = time.perf_counter()
    if profiles is None:
        profiles = _adapted(model, support, test.user_ids, labels)
    adapt_seconds = time.perf_counter() - began
    margin = model.calibration * moderated(*margin_moments(model, test, profiles))
    found = user_metrics(margin, test.tie, test.user_index, len(test.user_ids))
    kept = np.flatnonzero(found.n_test > 0)
    if not len(kept):
        raise DataError(f"none of the {len(test)} test pairs is strict (no tie); expected at least one to measure accuracy on")
    place = profiles.rows(test.user_ids).cpu().numpy()
    counts = np.concatenate([profiles.n_pairs.cpu().numpy(), [0]])  # place -1, no profile, reads the 0
    values = {
        **{
            name: np.full(len(kept), value, dtype=object)
            for name, value in (("data_set", labels.data_set), ("method", labels.method))
        },
        "seed": np.full(len(kept), labels.seed, dtype=np.int64),
        "shots": np.full(len(kept), ALL if labels.shots is None else labels.shots, dtype=np.int64),
        "cohort": np.full(len(kept), labels.cohort, dtype=object),
        "user": np.asarray(test.user_ids, dtype=object)[kept],
        "n_support": counts[place][kept].astype(np.int64),
        **{name: column[kept] for name, column in found._asdict().items()},
        "n_parameters": np.full(len(kept), model.n_parameters, dtype=np.int64),
        "fit_seconds": np.full(len(kept), np.nan if fit_seconds is None else fit_seconds),
        "adapt_seconds": np.full(len(kept), adapt_seconds),
    }
    unconverged = int((~profiles.converged.cpu().numpy()[place[place >= 0]]).sum())
    bins = tuple(tuple(column.tolist()) for column in calibration(margin, test.tie))
    where = (labels.data_set, labels.method, labels.seed, labels.cohort, labels.shots)
    cell = Cell(*where, len(test.user_ids) - len(kept), unconverged, bins)
    worst = () if rows is None else _mispredicted(margin, test, labels, rows)
    return Evaluation({name: values[name] for name in COLUMNS}, cells=(cell,), mispredicted=worst)


def _adapted(model: RewardModel, support: EmbeddedPairs | None, users: tuple[str, ...], labels: Labels) -> Profiles:
    """A profile for each of `users`: learned where there is support, else the crowd's weights with the population's spread."""
    learned: Profiles | None = None
    if support is not None:
        support = support.of_users(users)
        if labels.shots is not None:
            support = support[nested_shots(support, labels.shots, labels.seed)]
        if len(support):
            learned = adapt(model, support)
    if learned is None:
        return no_pairs(model, users)
    known = set(learned.user_ids)
    others = no_pairs(model, [user for user in users if user not in known])
    if not len(others):
        return learned
    covariance = None
    if learned.covariance is not None and others.covariance is not None:
        covariance = torch.cat([learned.covariance, others.covariance.to(learned.covariance)])
    return Profiles(
        learned.user_ids + others.user_ids,
        torch.cat([learned.mean, others.mean.to(learned.mean)]),
        covariance,
        torch.cat([learned.n_pairs, others.n_pairs.to(learned.n_pairs)]),
        torch.cat([learned.converged, others.n_pairs.to(learned.converged.device) == 0]),
        learned.model,
    )


def _mispredicted(margin: Tensor, test: EmbeddedPairs, labels: Labels, rows: Tensor) -> tuple[Misprediction, ...]:
    strict = torch.nonzero(~test.tie & (margin < 0))[:, 0]
    first = strict[torch.argsort(margin[strict], stable=True)[:N_MISPREDICTED]]
    users = [test.user_ids[u] for u in test.user_index[first].tolist()]
    columns = zip(users, rows[first.cpu()].tolist(), torch.sigmoid(margin[first]).tolist(), strict=True)
    return tuple(Misprediction(labels.method, labels.seed, labels.cohort, *column) for column in columns)
