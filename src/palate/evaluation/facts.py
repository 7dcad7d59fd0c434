"""What a comparison found out that is not about one user; each is a flat record that becomes one JSON object."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from palate.evaluation.metrics import Calibration


class Run(NamedTuple):
    """One method fitted on one split. `kind` is the name of its class, `record` the fitted model's own account."""

    data_set: str
    method: str
    seed: int
    kind: str
    n_weights: int
    n_parameters: int
    fit_seconds: float | None
    record: Mapping[str, Any]


class Cell(NamedTuple):
    """One method tested on one cohort. `bins` are the three columns of its `Calibration`."""

    data_set: str
    method: str
    seed: int
    cohort: str
    shots: int | None
    n_dropped: int  # users without a strict test pair
    n_unconverged: int  # users whose weights stopped before the solver's tolerance
    bins: tuple[tuple[float, ...], ...]

    @property
    def calibration(self) -> Calibration:
        return Calibration(*(np.asarray(column, dtype=np.float64) for column in self.bins))


class SplitFacts(NamedTuple):
    """One split: pairs and users on each side, what was left out by reason, and what the leak checks measured."""

    data_set: str
    seed: int
    by: str
    pairs: Mapping[str, int]
    users: Mapping[str, int]
    n_ties: int
    dropped: Mapping[str, int]
    dropped_users: Mapping[str, int]
    format_accuracy: float | None
    length_accuracy: float | None


class Failure(NamedTuple):
    """A method that raised; there is no figure in its place."""

    data_set: str
    method: str
    seed: int
    stage: str  # "fit", "seen" or "unseen"
    message: str


class Misprediction(NamedTuple):
    """A strict test pair that a method got wrong: its row, whose it is, and the probability given to what was chosen."""

    method: str
    seed: int
    cohort: str
    user: str
    row: int
    probability: float


FACTS: Mapping[str, type[Any]] = {"runs": Run, "cells": Cell, "splits": SplitFacts, "failures": Failure}


def packed(fact: Any) -> dict[str, Any]:
    """A fact as JSON-able values; what the record of a model holds beyond JSON is written as text."""
    return {name: jsonable(value) for name, value in fact._asdict().items()}


def jsonable(value: Any) -> Any:
    """Nested mappings and sequences as they are, NumPy and torch scalars as numbers, NaN as None, the rest as text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return str(value)
