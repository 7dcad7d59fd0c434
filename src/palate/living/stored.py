"""A live profile as bytes: one safetensors file with the rows, the answer, and in its head whose model it is. Nothing is run."""

import hashlib
import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from palate.errors import DataError, MismatchError, ModelFileError
from palate.living.flips import Flips
from palate.living.history import Forgetting, History
from palate.living.rows import Rows
from palate.living.solver import Solved
from palate.models.attribute_prior import AttributePrior

if TYPE_CHECKING:
    from palate.living.population import Population
    from palate.living.profile import LiveProfile

FORMAT, VERSION = "palate-live-profile", "1"
ROWS = tuple(f"rows.{name}" for name in Rows._fields)


def written(live: "LiveProfile") -> bytes:
    """See `LiveProfile.to_bytes`."""
    history, solved = live.history, live.solved
    arrays: dict[str, NDArray[Any]] = dict(zip(ROWS, history.rows, strict=True))
    arrays |= {"at": history.at, "n_terms": history.n_terms, "n_pulls": history.n_pulls, "n_choices": history.n_choices}
    arrays |= {"mean": solved.mean, "flips": solved.flips, "modes": solved.modes}
    if solved.covariance is not None:
        arrays["covariance"] = solved.covariance
    head = {
        "format": FORMAT,
        "version": VERSION,
        "model": live.population.fingerprint,
        "user_id": live.user_id,
        "ids": json.dumps(history.ids),
        "count": str(history.count),
        "now": json.dumps(live.now),
        "converged": json.dumps(solved.converged),
        "settings": settings(live.population, live.user_id),
    }
    return bytes(save({name: np.ascontiguousarray(value) for name, value in arrays.items()}, head))


class Read(NamedTuple):
    """What the bytes hold."""

    user_id: str
    history: History
    solved: Solved
    now: float | None
    settings: str


def read(data: bytes, fingerprint: str, n_weights: int) -> Read:
    """See `Population.from_bytes`."""
    try:
        arrays = load(data)
        head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ModelFileError(f"{len(data)} bytes are no live profile ({error}); expected what to_bytes returned") from error
    if head.get("format") != FORMAT or head.get("version") != VERSION:
        raise ModelFileError(
            f"the bytes are {head.get('format', 'a foreign file')} version {head.get('version')}; "
            f"expected {FORMAT} version {VERSION}"
        )
    if head.get("model") != fingerprint:
        raise MismatchError(
            f"a profile of model {str(head.get('model'))[:12]} given to model {fingerprint[:12]}; "
            "weights mean nothing under another model: adapt again from the log of events"
        )
    try:
        rows = Rows(*(arrays[name] for name in ROWS))
        columns = arrays["at"], arrays["n_terms"], arrays["n_pulls"], arrays.get("n_choices", arrays["n_terms"])
        history = History(tuple(json.loads(head["ids"])), *columns, rows, int(head["count"]))
        _check(history, n_weights)
        done, spread = bool(json.loads(head["converged"])), arrays.get("covariance")
        solved = Solved(arrays["mean"], spread, arrays["flips"], arrays["modes"], done)
        if solved.mean.shape != (n_weights,) or (solved.covariance is not None and solved.covariance.shape != (n_weights,) * 2):
            raise DataError(f"its mean has shape {solved.mean.shape} for {n_weights} weights")
        for name in ("mean", "covariance", "flips", "modes"):
            if name in arrays and not np.isfinite(arrays[name]).all():
                raise DataError(f"its {name} has a number that is NaN or infinite")
        now = json.loads(head["now"])
        if now is not None and not np.isfinite(now):
            raise DataError(f"its now is {now}")
        return Read(str(head["user_id"]), history, solved, None if now is None else float(now), str(head["settings"]))
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ModelFileError(f"no complete live profile ({error}); adapt this user again from the log of events") from error


class Weights(NamedTuple):
    """Of a stored profile what ranking needs."""

    mean: NDArray[np.float64]  # (K,)
    said: bool  # whether anything is in it


def weights(data: bytes, population: "Population") -> Weights | None:
    """The weights alone, read where they stand: a twentieth of the cost of the whole. None where the bytes are not this
    population's as it is now, or not plain to see: then `read` says why."""
    try:
        length = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + length])
        head, mean = table["__metadata__"], table["mean"]
        start, stop = mean["data_offsets"]
        own = (head["format"], head["version"], head["model"], head["settings"])
        asked = (FORMAT, VERSION, population.fingerprint, settings(population, head["user_id"]))
        if own != asked or mean["dtype"] != "F64":
            return None
        found = np.frombuffer(data[8 + length + start : 8 + length + stop], dtype="<f8")
        sound = found.shape == (population.n_weights,) and bool(np.isfinite(found).all())
        return Weights(found, head["ids"] != "[]") if sound else None
    except (KeyError, TypeError, ValueError):
        return None


def _check(history: History, n_weights: int) -> None:
    rows, n = history.rows, len(history.ids)
    counts = {"n_terms": history.n_terms, "n_pulls": history.n_pulls, "n_choices": history.n_choices, "rows.size": rows.size}
    if any(column.shape != (n,) for column in (history.at, *counts.values())[:4]) or len(set(history.ids)) != n:
        raise DataError(f"{n} event ids, {len(set(history.ids))} of them distinct, for times {history.at.shape}")
    for name, column in counts.items():
        if column.dtype.kind != "i" or int(column.min(initial=0)) < 0:
            raise DataError(f"its {name} is {column[:5]} of {column.dtype}; expected counts")
    if (rows.size < 1).any() or (history.n_choices > history.n_terms).any() or np.isinf(history.at).any():
        raise DataError(
            f"events of {history.n_choices[:5]} choices in {history.n_terms[:5]} terms of {rows.size[:5]} rows, "
            f"at {history.at[:5]}"
        )
    if history.n_terms.sum() != rows.n_terms or history.n_pulls.sum() != len(rows.level) or rows.size.sum() != len(rows.offset):
        raise DataError(f"events of {int(history.n_terms.sum())} terms with {rows.n_terms} of them")
    rows.terms().check(n_weights)


def settings(population: "Population", user_id: str) -> str:
    """What the answer depends on beside the model and the rows; of attributes only a digest of what they make of the prior."""
    forgetting, flips, model = population.forgetting, population.flips, population.model
    if not isinstance(model, AttributePrior):
        return _settings(forgetting, flips)
    moved = b"".join(part.cpu().numpy().tobytes() for part in model.shifts((user_id,)))
    return _settings(forgetting, flips, hashlib.sha256(moved).hexdigest()[:16])


@lru_cache(maxsize=64)
def _settings(forgetting: Forgetting, flips: Flips, *known: str) -> str:
    return json.dumps([forgetting, flips, *known])
