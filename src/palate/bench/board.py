"""What a benchmark says: a table of figures for each data set and condition, and whether the default model holds its promise.

The promise, in every cell of the matrix: Hierarchical is not below Bradley-Terry beyond the interval, is above every published
preset, and is within .003 of the best other one. Differences are paired: the same users under the same seeds. A method that is
told more of people than their choices is no part of it. Few benches run every method, so each part says how many of them it was
held against; it is not measured only where there was none.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from palate.bench.cells import LACKS
from palate.bench.results import Board
from palate.evaluation import Estimate
from palate.evaluation.metrics import worst_mean
from palate.evaluation.result import ALL
from palate.models.attribute_prior import AttributePrior

SUBJECT, CROWD, PUBLISHED = "hierarchical", "bt", "-faithful"
PRESETS = tuple(f"{name}{PUBLISHED}" for name in ("lore", "pref", "mrm", "pal-a", "pal-b", "vpl"))
OTHERS = (CROWD, "lore", "pref", "mrm", "pal-a", "pal-b", "vpl", "individual", "individual-crowd", "groups", "neighbours")
MARGIN = 0.003
FEW = (0, 1, 2, 5)
COHORTS = ("unseen", "seen")


class Line(NamedTuple):
    """One method on one board. Accuracies are means over users, then over seeds; None was not measured.

    `rank` is that of the unseen accuracy among methods with figures for every seed; equal accuracies share the better rank.
    """

    method: str
    rank: int | None
    seen: float | None
    unseen: float | None
    worst: float | None  # decile of the unseen
    log_loss: float | None
    few: tuple[float | None, ...]  # unseen, after `FEW` choices
    against_crowd: Estimate | None
    against_subject: Estimate | None
    parameters: int | None
    fit_seconds: float | None
    adapt_ms: float | None
    n_seeds: int


class Check(NamedTuple):
    """One part of the promise: kept, broken, or (None) held against nothing, with the figures and the counts in words."""

    what: str
    kept: bool | None
    figures: str


class Verdict(NamedTuple):
    """One cell of the robustness matrix. `crowd_only` says under how many of the seeds Hierarchical found no personal part."""

    data_set: str
    condition: str
    cohort: str
    checks: tuple[Check, ...]
    crowd_only: tuple[int, int] = (0, 0)

    @property
    def kept(self) -> bool | None:
        """False where any part is broken, None where none is and some were held against nothing."""
        found = [check.kept for check in self.checks]
        return False if False in found else None if None in found else True


def lines(board: Board) -> list[Line]:
    """The methods from best to worst, those that cannot be ranked last. Costs the intervals, some 10 ms a method and seed."""
    means = _means(board)
    ranked = sorted((-means[name, "unseen", ALL]["accuracy"], name) for name in board.complete if (name, "unseen", ALL) in means)
    rank = {name: 1 + sum(other < value for other, _ in ranked) for value, name in ranked}
    order = [name for _, name in ranked] + [name for name in board.methods if name not in rank]
    return [_line(board, name, rank.get(name), means) for name in order]


Means = Mapping[tuple[str, str, int], Mapping[str, float]]


def _line(board: Board, name: str, rank: int | None, means: Means) -> Line:
    unseen = means.get((name, "unseen", ALL), {})
    seen = means.get((name, "seen", ALL), {})
    few = tuple(means.get((name, "unseen", n), {}).get("accuracy") for n in FEW)
    runs = [run for run in board.evaluation.runs if run.method == name]
    seconds = [run.fit_seconds for run in runs if run.fit_seconds is not None]
    adapt = unseen.get("adapt_seconds")
    return Line(
        name,
        rank,
        seen.get("accuracy"),
        unseen.get("accuracy"),
        unseen.get("worst"),
        unseen.get("log_loss"),
        few,
        difference(board, name, CROWD),
        difference(board, name, SUBJECT),
        round(float(np.mean([run.n_parameters for run in runs]))) if runs else None,
        float(np.mean(seconds)) if seconds else None,
        None if adapt is None else 1000 * adapt,
        len({run.seed for run in runs}),
    )


def _means(board: Board) -> Means:
    """(method, cohort, shots) -> figures: within a seed over users, then over seeds."""
    columns = board.evaluation.columns
    numbers: dict[tuple[Any, ...], int] = {}
    keys = zip(*(columns[name].tolist() for name in ("method", "cohort", "shots", "seed")), strict=True)
    index = np.asarray([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    if not len(index):
        return {}
    parts = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    seeds: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for (method, cohort, shots, _), part in zip(numbers, parts, strict=True):
        found = {name: float(columns[name][part].mean()) for name in ("accuracy", "log_loss", "adapt_seconds")}
        seeds.setdefault((method, cohort, shots), []).append(found | {"worst": worst_mean(columns["accuracy"][part], 0.1)})
    return {key: {name: float(np.mean([one[name] for one in of])) for name in of[0]} for key, of in seeds.items()}


def difference(board: Board, method: str, other: str, cohort: str = "unseen") -> Estimate | None:
    """Accuracy of one minus that of the other after all choices; None for itself, and where nobody was tested on both."""
    if method == other:
        return None
    tested = []
    for name in (method, other):
        columns = board.evaluation.columns
        rows = (columns["method"] == name) & (columns["cohort"] == cohort) & (columns["shots"] == ALL)
        tested.append(set(zip(columns["seed"][rows].tolist(), columns["user"][rows].tolist(), strict=True)))
    if not tested[0] & tested[1]:
        return None
    return board.evaluation.difference(method, other, cohort=cohort, data_set=board.data_set)


def verdict(board: Board, cohort: str) -> Verdict:
    """Whether the promise is kept on this board for these users, as far as it was measured.

    Methods without figures for every seed do not count: the figures say of how many presets and others they are.
    """
    complete = board.complete
    if SUBJECT not in complete:
        unknown = Check("Hierarchical", None, "it has no figures for every seed")
        return Verdict(board.data_set, board.condition, cohort, (unknown,))
    informed = {run.method for run in board.evaluation.runs if run.kind == AttributePrior.__name__}
    others = [name for name in complete if name != SUBJECT and name not in informed]
    gains = {name: found for name in others if (found := difference(board, SUBJECT, name, cohort)) is not None}
    published = {name: gain for name, gain in gains.items() if name.endswith(PUBLISHED)}
    fixed = {name: gain for name, gain in gains.items() if not name.endswith(PUBLISHED)}
    lacking = {failure.method for failure in board.evaluation.failures if failure.message.startswith(LACKS)}
    return Verdict(
        board.data_set,
        board.condition,
        cohort,
        (_not_below(gains.get(CROWD)), _above(published, lacking), _near(fixed, lacking)),
        (sum(run.n_weights == 0 for run in board.evaluation.runs if run.method == SUBJECT), len(board.seeds)),
    )


def _not_below(gain: Estimate | None) -> Check:
    what = "not below Bradley-Terry beyond the interval"
    return Check(what, None, "Bradley-Terry was not measured") if gain is None else Check(what, gain.high >= 0, signed(gain))


def _above(gains: Mapping[str, Estimate], lacking: Set[str]) -> Check:
    what = "above every published preset"
    if not gains:
        return Check(what, None, "none was measured")
    name = min(gains, key=lambda name: gains[name].value)
    return Check(what, gains[name].value > 0, f"nearest {name}, {signed(gains[name])}; {_of(gains, PRESETS, lacking)} presets")


def _near(gains: Mapping[str, Estimate], lacking: Set[str]) -> Check:
    what = f"within {MARGIN:g} of the best fixed one"
    if not gains:
        return Check(what, None, "no other was measured")
    name = min(gains, key=lambda name: gains[name].value)
    return Check(what, gains[name].value >= -MARGIN, f"best {name}, {signed(gains[name])}; {_of(gains, OTHERS, lacking)} others")


def _of(gains: Mapping[str, Estimate], every: Sequence[str], lacking: Set[str]) -> str:
    """How many of the methods that can run on this data set were measured; those of other names are not counted."""
    possible = set(every) - lacking
    return f"{len(possible & gains.keys())} of {len(possible)}"


def mean_ranks(tables: Sequence[Sequence[Line]]) -> list[tuple[str, float, int]]:
    """(method, mean rank, boards on which it has one), best first."""
    found: dict[str, list[int]] = {}
    for table in tables:
        for line in table:
            if line.rank is not None:
                found.setdefault(line.method, []).append(line.rank)
    return sorted(((name, float(np.mean(ranks)), len(ranks)) for name, ranks in found.items()), key=lambda row: row[1])


def signed(gain: Estimate) -> str:
    return f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
