"""`Evaluation`: one row per user and everything that is computed from the rows, so that anybody can recompute every figure.

Rows are kept column-wise and saved as JSON Lines; what is not about one user (how a fit went, calibration, what a split dropped,
which method failed) is kept beside them as facts and saved in a second file.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from palate.errors import DataError
from palate.evaluation import bootstrap
from palate.evaluation.bootstrap import Estimate
from palate.evaluation.facts import FACTS, Cell, Failure, Misprediction, Run, SplitFacts, packed
from palate.evaluation.metrics import WORST, Calibration, binomial_floor, worst_mean

if TYPE_CHECKING:
    from palate.data.pairs import PairSet

Metric = Literal["accuracy", "worst_decile", "log_loss", "auc"]
Shots = int | None
ALL = -1  # `shots` None in an integer column

_TYPES: Mapping[str, Any] = {
    **{"data_set": object, "method": object, "seed": np.int64, "shots": np.int64, "cohort": object, "user": object},
    **{"n_support": np.int64, "n_test": np.int64, "accuracy": np.float64, "log_loss": np.float64, "n_parameters": np.int64},
    **{"fit_seconds": np.float64, "adapt_seconds": np.float64, "auc": np.float64, "n_ties": np.int64},
}
COLUMNS = tuple(_TYPES)
_OPTIONAL = ("log_loss", "fit_seconds", "adapt_seconds")  # NaN in a column, null in a file: not measured


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Results per data set, method, seed, cohort, shots and user.

    Attributes:
        columns: `COLUMNS` by name, equally long. `shots` is -1 where all choices were used (None in `rows` and files),
            `fit_seconds` is NaN where nothing was fitted, `log_loss` where no probability was stated; `fit_seconds` and
            `adapt_seconds` are of the whole fit and of the one batched adaptation of the cohort, repeated in each of its rows.
        runs, cells, splits, failures: what is not about one user (see `palate.evaluation.facts`).
        mispredicted: the surest wrong predictions, as row numbers of `pairs`; never saved.
        pairs: the texts, for reports that may quote them; never saved.
    """

    columns: Mapping[str, NDArray[Any]]
    runs: tuple[Run, ...] = ()
    cells: tuple[Cell, ...] = ()
    splits: tuple[SplitFacts, ...] = ()
    failures: tuple[Failure, ...] = ()
    mispredicted: tuple[Misprediction, ...] = ()
    pairs: "PairSet | None" = None

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.columns.items()}
        if tuple(lengths) != COLUMNS or len(set(lengths.values())) > 1:
            raise DataError(f"columns are {lengths}; expected {', '.join(COLUMNS)}, equally long")

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> "Evaluation":
        """An evaluation of rows as `rows` gives them, without facts. Raises `DataError` naming the first row that is none."""
        values: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping) or set(row) != set(COLUMNS):
                found = sorted(set(COLUMNS) ^ set(row)) if isinstance(row, Mapping) else type(row).__name__
                raise DataError(f"row {i} differs in {found}; expected exactly the fields {', '.join(COLUMNS)}")
            for name, value in row.items():
                missing = ALL if name == "shots" else np.nan if name in _OPTIONAL else value
                values[name].append(missing if value is None else value)
        try:
            return cls({name: np.asarray(values[name], dtype=kind) for name, kind in _TYPES.items()})
        except (TypeError, ValueError) as error:
            raise DataError(f"a field has the wrong type ({error}); expected what Evaluation.save writes") from error

    @classmethod
    def concat(cls, parts: Sequence["Evaluation"]) -> "Evaluation":
        """All rows and facts of `parts`, in order; texts are kept where all parts have the same ones.

        Raises `DataError` for no parts, or for a user tested twice under one data set, method, seed, cohort and number of shots.
        """
        if not parts:
            raise DataError("0 evaluations to join; expected at least one")
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in COLUMNS}
        names = ("data_set", "method", "seed", "cohort", "shots", "user")
        twice, times = next(iter(Counter(zip(*(columns[n].tolist() for n in names), strict=True)).most_common(1)), ((), 0))
        if times > 1:
            raise DataError(f"{twice} ({', '.join(names)}) occurs {times} times; give the parts different names or seeds")
        same = all(part.pairs is parts[0].pairs for part in parts)
        facts = {name: tuple(fact for part in parts for fact in getattr(part, name)) for name in FACTS}
        quoted = tuple(m for part in parts for m in part.mispredicted) if same else ()
        return cls(columns, **facts, mispredicted=quoted, pairs=parts[0].pairs if same else None)

    def __len__(self) -> int:
        return len(self.columns["user"])

    def __repr__(self) -> str:
        users = len(np.unique(self.columns["user"].astype(str)))
        failed = f", {len(self.failures)} failures" if self.failures else ""
        return f"Evaluation({', '.join(self.methods)}: {len(self)} rows, {users} users, seeds {list(self.seeds)}{failed})"

    @property
    def methods(self) -> tuple[str, ...]:
        """In the order in which they came."""
        return tuple(dict.fromkeys(self.columns["method"].tolist()))

    @property
    def cohorts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.columns["cohort"].tolist()))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.columns["seed"].tolist()))

    @property
    def data_sets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.columns["data_set"].tolist()))

    def shots(self, cohort: str) -> tuple[Shots, ...]:
        """The numbers of choices that were tried for a cohort, ascending, None (all) last."""
        found = np.unique(self.columns["shots"][self.columns["cohort"] == cohort]).tolist()
        return (*(n for n in found if n != ALL), *([None] if ALL in found else []))

    def where(
        self,
        *,
        data_set: str | None = None,
        method: str | None = None,
        cohort: str | None = None,
        seed: int | None = None,
    ) -> "Evaluation":
        """The rows that agree with what is given, with all facts."""
        mask = np.ones(len(self), dtype=np.bool_)
        for name, value in (("data_set", data_set), ("method", method), ("cohort", cohort), ("seed", seed)):
            if value is not None:
                mask &= self.columns[name] == value
        return replace(self, columns={name: column[mask] for name, column in self.columns.items()})

    def rows(self) -> Iterator[dict[str, Any]]:
        """One JSON-able mapping per row: `shots` None is all; seconds and log loss None are not measured."""
        for row in zip(*(self.columns[name].tolist() for name in COLUMNS), strict=True):
            out = dict(zip(COLUMNS, row, strict=True))
            out["shots"] = None if out["shots"] == ALL else out["shots"]
            for name in _OPTIONAL:
                out[name] = None if np.isnan(out[name]) else out[name]
            yield out

    # -- files

    def save(self, path: str | Path) -> None:
        """Write the rows to `path` as JSON Lines and the facts beside it (`results.jsonl` -> `results.facts.json`), each whole.

        User ids are written, texts are not.
        """
        path = Path(path)
        facts = {name: [packed(fact) for fact in getattr(self, name)] for name in FACTS}
        content = {path: "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in self.rows())}
        content[_facts_path(path)] = json.dumps({"format": "palate-evaluation", "version": 1, **facts}, allow_nan=False, indent=1)
        for target, text in content.items():
            partial = target.with_name(target.name + ".partial")
            partial.write_text(text, encoding="utf-8", errors="surrogatepass")
            partial.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> "Evaluation":
        """Read what `save` wrote; the facts are empty where their file is absent. Raises `DataError` naming the broken line."""
        path = Path(path)
        rows = []
        try:
            for line in path.read_text(encoding="utf-8", errors="surrogatepass").split("\n"):
                if line:
                    rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}, line {len(rows) + 1}: {error}; expected what Evaluation.save writes") from error
        out = cls.from_rows(rows)
        beside = _facts_path(path)
        if not beside.exists():
            return out
        try:
            facts = json.loads(beside.read_text(encoding="utf-8"))
            if facts["format"] != "palate-evaluation" or facts["version"] != 1:
                raise DataError(f"{beside} is {facts['format']} version {facts['version']}; expected palate-evaluation version 1")
            found: dict[str, Any] = {name: tuple(kind(**fact) for fact in facts[name]) for name, kind in FACTS.items()}
            return replace(out, **found)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{beside} cannot be read ({error!r}); expected what Evaluation.save writes beside the rows"
            ) from error

    # -- figures

    def summary(self) -> list[dict[str, Any]]:
        """One mapping per data set, method, cohort and number of shots.

        Every figure is the mean over users within a seed, then over seeds; `accuracy_std` is the standard deviation over seeds
        (None for one seed). `worst_10` ... `worst_50`: the mean over the lowest ceil(q U) accuracies of a seed, then over seeds;
        `floor_10` ... `floor_50`: the same if every user had the mean accuracy and differed by luck alone (`binomial_floor`).
        `n_users` is the mean number per seed, `n_support` the mean choices per user.
        Costs a seeded simulation, some 10 ms per group and seed.
        """
        out = []
        for key, seeds in self._groups().items():
            accuracy = np.asarray([part["accuracy"].mean() for part in seeds])
            tail = np.asarray([[worst_mean(part["accuracy"], q) for q in WORST] for part in seeds]).mean(0).tolist()
            floor = np.mean([binomial_floor(float(p["accuracy"].mean()), p["n_test"]) for p in seeds], axis=0).tolist()
            first = dict(zip(("data_set", "method", "cohort", "shots"), key, strict=True))
            out.append(
                first
                | {"n_seeds": len(seeds), "n_users": float(np.mean([len(part["user"]) for part in seeds]))}
                | {"n_support": float(np.mean([part["n_support"].mean() for part in seeds]))}
                | {"accuracy": float(accuracy.mean()), "accuracy_std": float(accuracy.std(ddof=1)) if len(seeds) > 1 else None}
                | {"auc": float(np.mean([part["auc"].mean() for part in seeds]))}
                | {f"worst_{round(100 * q)}": value for q, value in zip(WORST, tail, strict=True)}
                | {f"floor_{round(100 * q)}": value for q, value in zip(WORST, floor, strict=True)}
                | {"n_parameters": round(float(np.mean([part["n_parameters"].mean() for part in seeds])))}
                | {name: _measured([float(part[name].mean()) for part in seeds]) for name in _OPTIONAL}
            )
        return out

    def difference(
        self,
        method: str,
        baseline: str,
        *,
        cohort: str = "unseen",
        shots: Shots = None,
        baseline_shots: Shots | Literal["same"] = "same",
        metric: Metric = "accuracy",
        data_set: str | None = None,
        seed: int = 0,
    ) -> Estimate:
        """`metric` of `method` minus that of `baseline` on the same users, with a 95 % interval (`bootstrap.interval`).

        Only users that both were tested on count, seed by seed. `baseline_shots` compares different numbers of choices: 5 choices
        of one method against all of another. The worst decile is that of each method, whoever they are.

        Raises:
            DataError: an unknown metric or data set, or no user of both.
        """
        other = shots if baseline_shots == "same" else baseline_shots
        return self._interval(data_set, cohort, (method, shots), (baseline, other), metric, seed)

    def interval(
        self,
        method: str,
        *,
        cohort: str = "unseen",
        shots: Shots = None,
        metric: Metric = "accuracy",
        data_set: str | None = None,
        seed: int = 0,
    ) -> Estimate:
        """`metric` of one method, with a 95 % interval over users and seeds. Errors as in `difference`."""
        return self._interval(data_set, cohort, (method, shots), None, metric, seed)

    def few_shot(self, *, metric: Metric = "accuracy", data_set: str | None = None) -> list[dict[str, Any]]:
        """One mapping per method and number of shots of the unseen users: `method, shots, value, low, high, n_users`."""
        data_set = self._one_data_set(data_set)
        groups = self._groups()
        out = []
        for method in self.methods:
            for shots in self.shots("unseen"):
                if (data_set, method, "unseen", shots) in groups:
                    found = self.interval(method, shots=shots, metric=metric, data_set=data_set)
                    figures = {"value": found.value, "low": found.low, "high": found.high, "n_users": found.n_users}
                    out.append({"method": method, "shots": shots, **figures})
        return out

    def calibration(
        self, method: str, *, cohort: str = "unseen", shots: Shots = None, data_set: str | None = None
    ) -> Calibration:
        """The bins of a method, added over seeds. Raises `DataError` where it was not tested."""
        wanted = (self._one_data_set(data_set), method, cohort, shots)
        bins = [cell.calibration for cell in self.cells if (cell.data_set, cell.method, cell.cohort, cell.shots) == wanted]
        if not bins:
            raise DataError(f"no calibration of {wanted} (data set, method, cohort, shots); expected one that was evaluated")
        total = bins[0]
        for more in bins[1:]:
            total = total + more
        return total

    def _one_data_set(self, data_set: str | None) -> str:
        known = self.data_sets
        if data_set is None and len(known) == 1:
            return known[0]
        if data_set not in known:
            raise DataError(
                f"data_set is {data_set!r}; expected one of {', '.join(map(repr, known)) or 'none: there are no rows'}"
            )
        return str(data_set)

    def _groups(self) -> dict[tuple[str, str, str, Shots], list[dict[str, NDArray[Any]]]]:
        """Columns of each (data set, method, cohort, shots), seed by seed, in the order of the rows."""
        if "_grouped" not in self.__dict__:
            numbers: dict[tuple[Any, ...], int] = {}
            names = ("data_set", "method", "cohort", "shots", "seed")
            keys = zip(*(self.columns[name].tolist() for name in names), strict=True)
            index = np.asarray([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
            parts = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1]) if len(index) else []
            out: dict[tuple[str, str, str, Shots], list[dict[str, NDArray[Any]]]] = {}
            for (data_set, method, cohort, shots, _), part in zip(numbers, parts, strict=True):
                key = (data_set, method, cohort, None if shots == ALL else shots)
                out.setdefault(key, []).append({name: column[part] for name, column in self.columns.items()})
            object.__setattr__(self, "_grouped", out)
        grouped: dict[tuple[str, str, str, Shots], list[dict[str, NDArray[Any]]]] = self.__dict__["_grouped"]
        return grouped

    def _interval(
        self,
        data_set: str | None,
        cohort: str,
        method: tuple[str, Shots],
        baseline: tuple[str, Shots] | None,
        metric: Metric,
        seed: int,
    ) -> Estimate:
        if metric not in get_args(Metric):
            raise DataError(f"metric is {metric!r}; expected one of {', '.join(get_args(Metric))}")
        column = "accuracy" if metric == "worst_decile" else metric
        statistic = bootstrap.worst(0.1) if metric == "worst_decile" else bootstrap.mean
        data_set = self._one_data_set(data_set)
        sides = []
        for name, shots in (method,) if baseline is None else (method, baseline):
            group = self._groups().get((data_set, name, cohort, shots), [])
            sides.append({int(part["seed"][0]): part for part in group})
        numbers: dict[str, int] = {}
        seeds = []
        for number, part in sides[0].items():
            values = dict(zip(part["user"].tolist(), part[column].tolist(), strict=True))
            other = sides[-1].get(number)
            if other is None:
                continue
            against = dict(zip(other["user"].tolist(), other[column].tolist(), strict=True))
            users = [user for user in values if user in against]
            if users:
                ids = np.asarray([numbers.setdefault(user, len(numbers)) for user in users], dtype=np.int64)
                mine = np.asarray([values[user] for user in users])
                seeds.append(bootstrap.Seed(ids, mine, None if baseline is None else np.asarray([against[u] for u in users])))
        if not seeds:
            raise DataError(f"no {cohort} user was tested with {method} and {baseline} (method, shots); tested: {self!r}")
        if any(np.isnan(values).any() for part in seeds for values in part[1:] if values is not None):
            raise DataError(f"{metric} of {method} and {baseline} (method, shots) was not measured: one states no probabilities")
        return bootstrap.interval(seeds, statistic, seed=seed)


def _measured(values: Sequence[float]) -> float | None:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else None


def _facts_path(path: Path) -> Path:
    return path.with_suffix(".facts.json")
