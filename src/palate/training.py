"""`fit`: learn what users share. Nothing here, or in any `fitted` method, can see a test split: it is given training pairs only.

A method's own estimation lives with the method; this file is what they have in common: the check that there is something to learn
from, and the record of what a model was fitted on.
"""

import platform
import time
from collections.abc import Callable

import torch

from palate.adaptation import Profiles
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.models.base import Fittable, RewardModel
from palate.version import __version__

Progress = Callable[[float, str], None]  # (share done, what)


def _quiet(share: float, what: str) -> None:
    """The default listener: nobody."""


def fit(data: EmbeddedPairs, model: RewardModel | None = None, *, seed: int = 0, progress: Progress | None = None) -> RewardModel:
    """Learn what is shared from the training pairs of the seen users.

    Args:
        data: training pairs; hyper-parameters are chosen on held-out users among them.
        model: an unfitted model that says which method with which options; `palate.Hierarchical()` by default. It is not changed.
        seed: same seed, same data, same bits on the same machine with the same number of threads.
        progress: called with the share done and a word for what is being done.

    Returns:
        A fitted model of the same class with a `record` (data fingerprint, seed, selection, seconds, versions). It holds no user.

    Raises:
        DataError: no pairs, only ties, or features that do not vary.
    Cost: tens of passes over the embeddings; 640 users x 20 pairs at D = 4096 take seconds on two cores.
    """
    return fit_with_profiles(data, model, seed=seed, progress=progress)[0]


@torch.no_grad()
def fit_with_profiles(
    data: EmbeddedPairs, model: RewardModel | None = None, *, seed: int = 0, progress: Progress | None = None
) -> tuple[RewardModel, Profiles | None]:
    """As `fit`, and beside the model the profiles of the users it was fitted on where the method learns a table of them (the
    faithful presets); None where everybody, seen or not, is adapted in the same way."""
    if model is None:
        from palate.models.hierarchical import Hierarchical

        model = Hierarchical()
    if not isinstance(model, Fittable):
        raise DataError(f"{type(model).__name__} has nothing to fit; expected a model with a `fitted` method")
    if seed < 0:
        raise DataError(f"seed is {seed}; expected a whole number of at least 0")
    strict = int((~data.tie).sum())
    if strict == 0:
        raise DataError(f"{len(data)} pairs, {len(data) - strict} of them ties; expected at least one choice to learn from")
    began = time.perf_counter()
    fitted, weights = model.fitted(data, seed=seed, progress=progress or _quiet)
    check_finite(fitted)
    fitted.encoder = data.encoder
    fitted.record.update(
        {
            "data": data.fingerprint(),
            "n_pairs": len(data),
            "n_users": len(data.user_ids),
            "seed": seed,
            "fit_seconds": time.perf_counter() - began,
            "versions": {"palate": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }
    )
    if weights is None:
        return fitted, None
    counts = data.grouped().counts
    proven = torch.zeros_like(counts, dtype=torch.bool)  # a number of steps proves no convergence
    return fitted, Profiles(data.user_ids, weights, None, counts, proven, fitted.fingerprint())


def check_finite(model: RewardModel) -> None:
    """Raise `DataError` where a number of the model is none: a method that diverged has learned nothing."""
    bad = [name for name, value in model.state_dict().items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise DataError(
            f"{type(model).__name__} diverged: {', '.join(bad)} hold NaN or infinite numbers; "
            "try smaller rates, or scale the embeddings"
        )
