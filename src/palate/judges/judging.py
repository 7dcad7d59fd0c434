"""`judged`: what a judge is worth, in the rows in which models are reported, with its bias for a place and its account beside it.

An answer that cannot be read is the judge's own failure and counts half, like a tie. A question that was never answered, because
the server failed or the budget was spent, is nobody's: it is left out, and the evaluation says under `failures` how many were.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from palate.data.pairs import PairSet
from palate.data.splits import nested_shots
from palate.errors import DataError
from palate.evaluation.facts import Cell, Failure, Run
from palate.evaluation.metrics import N_BINS, calibration, user_metrics
from palate.evaluation.result import ALL, COLUMNS, Evaluation, Shots
from palate.judges.base import Answer, Brief, Judge, Question, Verdict, shuffled
from palate.judges.client import one_run
from palate.judges.ledger import Ledger

SUREST = 1e-6  # a stated probability of 0 or 1 counts as this far from it


class Place(NamedTuple):
    """How much the order of the responses decided, over the questions with a verdict.

    Attributes:
        first_share: share of the answers for whichever response was shown first, an answer without a preference counting half;
            .5 is no bias for a place.
        agreement: share of the questions whose two orders are for the same response; where they are not, the place decided.
        questions: how many.
    """

    first_share: float | None
    agreement: float | None
    questions: int


class Judged(NamedTuple):
    """What `judged` returns.

    Attributes:
        evaluation: rows per user, as `palate.evaluation.evaluate` gives them, with place, outcomes and account in `runs`.
        verdicts: for each test choice the verdict with the chosen response as the first; None where it was not asked (a tie).
        briefs: what the judge was shown of each user.
        place: the bias for a place.
        outcomes: how many answers had which outcome.
    """

    evaluation: Evaluation
    verdicts: tuple[Verdict | None, ...]
    briefs: dict[str, Brief]
    place: Place
    outcomes: dict[str, int]

    @property
    def not_judged(self) -> int:
        """Questions that were never answered and are in no row."""
        return sum(verdict is not None and not verdict.judged for verdict in self.verdicts)


def judged(
    judge: Judge,
    support: PairSet | None,
    test: PairSet,
    *,
    briefs: Mapping[str, Brief] | None = None,
    shots: Shots = None,
    seed: int = 0,
    cohort: str = "unseen",
    method: str | None = None,
    data_set: str = "",
    ledger: Ledger | None = None,
) -> Judged:
    """How well a judge tells each user's choices in `test` after studying theirs in `support`.

    Per user: `accuracy` over the strict choices, where p_first = .5 and an unreadable answer count half; `auc` of p_first; and
    `log_loss` in nats where the judge is `probabilistic`, an unreadable answer counting as one half, else NaN. A labelled tie is
    only asked where it counts, in the log loss. The judge never learns which response was chosen, not even from the order: which
    one is asked about first is drawn from the two texts. Users whose study was cut short are not judged without it. A server that
    a `Chat` gave up is asked nothing more before the end of this call.

    Args:
        judge: the judge.
        support: choices to study; of other users than those of `test` nothing is read. None is no history.
        test: choices to tell.
        briefs: used instead of studying, for the users they are of; the others have none.
        shots: study the first so many support choices of each user, drawn as `evaluate` draws them; 0 is no history, None all.
        seed: of that draw, and a label of the rows.
        cohort, method, data_set: labels of the rows; the method is by default the judge's class.
        ledger: whose account goes into the record of the run. Where it has a budget, one user after the other is studied and
            judged, so that the budget ends with some users whole; else all are studied first, and then judged, at once.

    Raises:
        DataError: no strict test choice at all, none that was judged, or briefs together with shots.
    Cost: what the judge's `study` costs, and one `judge_all` of all test choices, or one a user where there is a budget.
    """
    if briefs is not None and shots is not None:
        raise DataError(f"briefs and shots = {shots} were both given; briefs are used as they are, so leave shots out")
    if not (~test.tie).any():
        raise DataError(f"none of the {len(test)} test choices is strict (no tie); expected at least one to measure accuracy on")
    began = time.perf_counter()
    past = _past(support, test, shots, seed)
    verdicts: list[Verdict | None] = [None] * len(test)
    known: dict[str, Brief] = {}
    in_turn = ledger is not None and ledger.limited
    with one_run():
        for users in [[user] for user in test.user_ids] if in_turn else [list(test.user_ids)]:
            own = None if past is None or briefs is not None else _of(past, users)
            found = briefs or {} if own is None else judge.study(own) if len(own) else {}
            cut_short = {} if own is None else {user: _unstudied(judge, user) for user in own.user_ids if user not in found}
            known |= {user: found[user] for user in users if user in found}
            _tell(judge, test, users, known, cut_short, verdicts)
    seconds = time.perf_counter() - began
    counts = _counts(past, test)
    labels = {"data_set": data_set, "method": method or type(judge).__name__, "seed": seed, "cohort": cohort, "shots": shots}
    place, outcomes = _place(verdicts), _outcomes(verdicts)
    record: dict[str, Any] = {"place": place._asdict(), "outcomes": outcomes}
    record |= {} if ledger is None else {"account": ledger.as_dict()}
    evaluation = _evaluation(judge, verdicts, test, labels, counts, seconds, record)
    return Judged(evaluation, tuple(verdicts), known, place, outcomes)


def _tell(
    judge: Judge,
    test: PairSet,
    users: Sequence[str],
    briefs: Mapping[str, Brief],
    cut_short: Mapping[str, Verdict],
    verdicts: list[Verdict | None],
) -> None:
    """Put in the verdicts on all choices of these users; of those whose study was cut short nothing is asked."""
    rows = np.flatnonzero(_is_of(test, users))
    for row in rows.tolist():
        verdicts[row] = cut_short.get(test.user_ids[test.user_index[row]])
    counts = ~test.tie[rows] | judge.probabilistic
    asked = rows[counts & np.asarray([verdicts[row] is None for row in rows.tolist()], dtype=np.bool_)]
    questions, turned = _questions(test, asked, briefs)
    for row, turn, verdict in zip(asked.tolist(), turned, judge.judge_all(questions), strict=True):
        verdicts[row] = verdict.turned() if turn else verdict


def _unstudied(judge: Judge, user: str) -> Verdict:
    """What there is to say of a user whose study came to no brief; a judge that knows why says so in its `failed`."""
    why = f"the study of the user came to no brief: {getattr(judge, 'failed', {}).get(user, 'the judge does not say why')}"
    return Verdict(None, why, answers=(Answer(False, "unstudied", None, why),))


def _past(support: PairSet | None, test: PairSet, shots: Shots, seed: int) -> PairSet | None:
    if support is None:
        return None
    past = _of(support, test.user_ids)
    return past if shots is None else past[nested_shots(past, shots, seed)]


def _of(pairs: PairSet, users: Sequence[str]) -> PairSet:
    return pairs[_is_of(pairs, users)] if len(pairs) else pairs


def _is_of(pairs: PairSet, users: Sequence[str]) -> NDArray[np.bool_]:
    return np.isin(np.asarray(pairs.user_ids, dtype=object), list(users))[pairs.user_index]


def _counts(past: PairSet | None, test: PairSet) -> NDArray[np.int64]:
    """Support choices of each user of `test`, (U,)."""
    found = {} if past is None else dict(zip(past.user_ids, np.bincount(past.user_index).tolist(), strict=True))
    return np.asarray([found.get(user, 0) for user in test.user_ids], dtype=np.int64)


def _questions(test: PairSet, asked: NDArray[np.int64], briefs: Mapping[str, Brief]) -> tuple[list[Question], list[bool]]:
    questions, turned = [], []
    for row in asked.tolist():
        chosen, rejected = test.texts[test.chosen[row]], test.texts[test.rejected[row]]
        turn = shuffled(chosen.response, rejected.response)
        sides = (rejected.response, chosen.response) if turn else (chosen.response, rejected.response)
        questions.append(Question(briefs.get(test.user_ids[test.user_index[row]]), chosen.prompt, *sides))
        turned.append(turn)
    return questions, turned


def _place(verdicts: list[Verdict | None]) -> Place:
    first, same = [], []
    for verdict in verdicts:
        if verdict is None or verdict.p_first is None or not verdict.answers:
            continue
        orders = []
        for swapped in (False, True):
            p = [a.p_first for a in verdict.answers if a.swapped is swapped and a.p_first is not None]
            first += [_share(1 - value if swapped else value) for value in p]
            orders.append(_share(sum(p) / len(p)))
        same.append(orders[0] == orders[1])
    if not same:
        return Place(None, None, 0)
    return Place(float(np.mean(first)), float(np.mean(same)), len(same))


def _share(p: float) -> float:
    return 1.0 if p > 0.5 else 0.0 if p < 0.5 else 0.5


def _outcomes(verdicts: list[Verdict | None]) -> dict[str, int]:
    out: dict[str, int] = {}
    for verdict in verdicts:
        for answer in () if verdict is None else verdict.answers:
            out[answer.outcome] = out.get(answer.outcome, 0) + 1
    return dict(sorted(out.items()))


def _evaluation(
    judge: Judge,
    verdicts: list[Verdict | None],
    test: PairSet,
    labels: Mapping[str, Any],
    n_support: NDArray[np.int64],
    seconds: float,
    record: Mapping[str, Any],
) -> Evaluation:
    rows = np.asarray([row for row, verdict in enumerate(verdicts) if verdict is not None and verdict.judged], dtype=np.int64)
    lost = [verdict for verdict in verdicts if verdict is not None and not verdict.judged]
    why = lost[0].reason if lost else None
    if not len(rows) or bool(test.tie[rows].all()):
        raise DataError(f"none of the {len(test)} test choices was judged: {why}; see to the server or the budget and run again")
    known = [verdicts[row] for row in rows.tolist()]
    p = torch.tensor([0.5 if one is None or one.p_first is None else one.p_first for one in known], dtype=torch.float64)
    margin = torch.logit(p, eps=SUREST) if judge.probabilistic else p - 0.5
    tie = torch.as_tensor(test.tie[rows])
    users = torch.as_tensor(test.user_index[rows])
    found = user_metrics(margin, tie, users, len(test.user_ids))
    kept = np.flatnonzero(found.n_test > 0)
    ties = np.bincount(test.user_index[test.tie], minlength=len(test.user_ids))
    columns = found._asdict() | {"n_ties": ties}
    if not judge.probabilistic:
        columns["log_loss"] = np.full(len(test.user_ids), np.nan)
    n = len(kept)
    where = {name: np.full(n, labels[name], dtype=object) for name in ("data_set", "method", "cohort")}
    shots = labels["shots"]
    values = {
        **where,
        "seed": np.full(n, labels["seed"], dtype=np.int64),
        "shots": np.full(n, ALL if shots is None else shots, dtype=np.int64),
        "user": np.asarray(test.user_ids, dtype=object)[kept],
        "n_support": n_support[kept],
        **{name: column[kept] for name, column in columns.items()},
        "n_parameters": np.zeros(n, dtype=np.int64),
        "fit_seconds": np.full(n, np.nan),
        "adapt_seconds": np.full(n, seconds),
    }
    empty = tuple((0.0,) * N_BINS for _ in range(3))
    bins = tuple(tuple(column.tolist()) for column in calibration(margin, tie)) if judge.probabilistic else empty
    at = (labels["data_set"], labels["method"], labels["seed"])
    cell = Cell(*at, labels["cohort"], shots, len(test.user_ids) - n, 0, bins)
    run = Run(*at, type(judge).__name__, 0, 0, None, record)
    failures = (
        (
            Failure(
                *at,
                labels["cohort"],
                f"{len(lost)} of {len(rows) + len(lost)} questions were not judged and are in no row: {why}",
            ),
        )
        if lost
        else ()
    )
    return Evaluation({name: values[name] for name in COLUMNS}, runs=(run,), cells=(cell,), failures=failures)
