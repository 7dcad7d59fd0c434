"""`compare`: several methods on the same splits of the same embeddings, the test choices out of reach of every fit."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from palate.adaptation import Profiles
from palate.data.leaks import check_leaks
from palate.data.pairs import EmbeddedPairs, PairSet
from palate.data.splits import SIDES, By, Split, given_split, nested_shots, split, unit_labels
from palate.encoders import Encoder
from palate.errors import DataError, PalateError
from palate.evaluation.evaluating import Labels, evaluated
from palate.evaluation.facts import Failure, Run, SplitFacts, jsonable
from palate.evaluation.result import Evaluation, Shots
from palate.models.base import RewardModel
from palate.models.reference import bound
from palate.training import fit_with_profiles

SHOTS: tuple[Shots, ...] = (0, 1, 2, 5, 10, 20, None)

Progress = Callable[[int, int, str], None]
MakeSplit = Callable[[PairSet | EmbeddedPairs, int], Split]


def compare(
    data: PairSet | EmbeddedPairs,
    encoder: Encoder | None,
    methods: Mapping[str, RewardModel],
    *,
    by: By | MakeSplit | None = None,
    seeds: int | Sequence[int] = 3,
    shots: Sequence[Shots] = SHOTS,
    max_support: int | None = None,
    max_test: int | None = None,
    min_support: int = 1,
    believe_format: bool = False,
    data_set: str = "",
    progress: Progress | None = None,
) -> Evaluation:
    """Fit every method on the same training choices and test all of them on the same held-out ones, once for each seed.

    For each seed: draw a split (half of the users unseen, half of everybody's units held out), refuse it if it leaks, fit on
    `train` and nothing else, test seen users on `test_seen` after adapting from `train`, and unseen users on `test_unseen` after
    adapting from the first `shots` choices of `support`. The texts are encoded once for all seeds.

    A method that raises is recorded in `failures` with its message; the others go on, and no figure stands in its place.

    Args:
        data: choices; rows with a `split` column are split as it says (rows without one are dropped and counted), and the seeds
            then only reseed the fits, and draw what `max_support` and `max_test` leave of it.
        encoder: turns texts into features; None for `EmbeddedPairs`.
        methods: unfitted models by the name they have in the results. They are not changed. `Reference()` is the encoder's head.
        by: what a user's two sides must not share (`palate.split`; by default the prompt, or `unit` for `EmbeddedPairs`), or a
            function (data, seed) -> `Split` that draws the split itself; the arguments below are then its own affair.
        seeds: how many (0, 1, ...), or which.
        shots: numbers of support choices for the unseen users; None is all.
        max_support, max_test, min_support: of a user's choices, see `drawn`.
        believe_format: whether choices that formatting alone can tell are people's taste, and no leak (`check_leaks`).
        data_set: label of the rows.
        progress: called with (done, total, what is being done).

    Raises:
        DataError: no methods, no seeds, or an encoder that does not go with the data; what `drawn` raises.
        LeakError: a split, or the data themselves, can be seen through.
        PalateError: every method failed; the message has each reason.
    Cost: one encoding of the distinct texts, and seeds x methods fits.
    """
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    _check(methods, numbers, shots)
    methods, refused = _bound(methods, encoder)
    embedded, embed_by = _embedded(data, encoder, by, any(model.reads_prompts for model in methods.values()))
    say = progress or (lambda done, total, what: None)
    total, done = len(numbers) * len(methods), 0
    evaluations: list[Evaluation] = []
    splits: list[SplitFacts] = []
    runs: list[Run] = []
    failures = [Failure(data_set, name, seed, "fit", str(why)) for seed in numbers for name, why in refused.items()]
    for seed in numbers:
        say(done, total, f"checking split {seed}")
        if callable(by):
            parts = by(data, seed)
        else:
            parts = drawn(data, by=embed_by, max_support=max_support, max_test=max_test, min_support=min_support, seed=seed)
        splits.append(_split_facts(data, parts, embed_by, data_set, seed, believe_format))
        for name, model in methods.items():
            say(done, total, f"{name}, split {seed}")
            found, run = _one(model, embedded, parts, Labels(data_set, name, seed, "", None), tuple(shots), failures)
            evaluations += found
            runs += [run] if run else []
            done += 1
    say(total, total, "done")
    if not evaluations:
        reasons = "; ".join(dict.fromkeys(f"{failure.method} ({failure.stage}): {failure.message}" for failure in failures))
        raise PalateError(f"no method could be tested on any of the {len(numbers)} splits: {reasons or 'no test pairs'}")
    joined = Evaluation.concat(evaluations)
    pairs = data if isinstance(data, PairSet) else None
    return replace(joined, runs=tuple(runs), splits=tuple(splits), failures=tuple(failures), pairs=pairs)


def is_given(data: PairSet | EmbeddedPairs) -> bool:
    """Whether rows have a `split` column that says which side they are on."""
    return isinstance(data, PairSet) and any(label is not None for label in data.split)


def drawn(
    data: PairSet | EmbeddedPairs,
    *,
    by: By,
    max_support: int | None = None,
    max_test: int | None = None,
    min_support: int = 1,
    seed: int = 0,
) -> Split:
    """The split that methods of all kinds are held to: that of the `split` column where rows have one, else `palate.split`.

    Of a given split, at most `max_support` rows of a user in train and support and `max_test` in the two tests are kept, drawn at
    random; without the two it is used as it is.

    Raises:
        DataError: `min_support` above 1 with a given split, which says who is tested; what `split` or `given_split` raises.
    """
    if not isinstance(data, PairSet) or not is_given(data):
        return split(data, by=by, max_support=max_support, max_test=max_test, min_support=min_support, seed=seed)
    if min_support != 1:
        raise DataError(f"min_support is {min_support}, and the rows have a split column, which says who is tested; expected 1")
    parts = given_split(data)
    most = {"train": max_support, "test_seen": max_test, "support": max_support, "test_unseen": max_test}
    kept: dict[str, NDArray[np.int64]] = {side: getattr(parts, side) for side in SIDES}
    for side, cap in most.items():
        if cap is not None and cap < 1:
            raise DataError(f"at most {cap} rows of a user are wanted in {side}; expected 1 or more, or None for all")
        if cap is not None and len(kept[side]):
            kept[side] = kept[side][nested_shots(data[kept[side]], cap, seed)]
    beyond = sum(len(getattr(parts, side)) - len(rows) for side, rows in kept.items())
    dropped = {**parts.dropped, **({"beyond max_support or max_test": beyond} if beyond else {})}
    train, test_seen, support, test_unseen = (kept[side] for side in SIDES)
    return Split(train, test_seen, support, test_unseen, parts.by, parts.seed, dropped, parts.dropped_users)


def _check(methods: Mapping[str, RewardModel], seeds: tuple[int, ...], shots: Sequence[Shots]) -> None:
    if not methods:
        raise DataError("no methods to compare; expected at least one, such as {'bt': palate.BradleyTerry()}")
    for name, model in methods.items():
        if not isinstance(model, RewardModel):
            raise DataError(
                f"method {name!r} is a {type(model).__name__}; expected an unfitted model such as palate.BradleyTerry()"
            )
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise DataError(f"seeds are {seeds}; expected at least one whole number of 0 or more, each once")
    if len(set(shots)) != len(shots) or any(n is not None and n < 0 for n in shots) or not shots:
        raise DataError(f"shots are {tuple(shots)}; expected different numbers of 0 or more, or None for all choices")


def _bound(methods: Mapping[str, RewardModel], encoder: Encoder | None) -> tuple[dict[str, RewardModel], dict[str, PalateError]]:
    """The methods, a `Reference` as that of the encoder, and those that the encoder cannot have, with the reason."""
    out: dict[str, RewardModel] = {}
    refused: dict[str, PalateError] = {}
    for name, model in methods.items():
        try:
            out[name] = bound(model, encoder)
        except PalateError as error:
            refused[name] = error
    return out, refused


def _embedded(
    data: PairSet | EmbeddedPairs, encoder: Encoder | None, by: By | MakeSplit | None, prompts: bool
) -> tuple[EmbeddedPairs, By]:
    """The arrays, and the unit that splits and leak checks go by. Rows keep their places."""
    if isinstance(data, EmbeddedPairs):
        if encoder is not None:
            raise DataError("an encoder was given for data that are embedded already; expected encoder=None")
        return data, "unit" if by is None or callable(by) else by
    if encoder is None:
        raise DataError("choices in text need an encoder, and it is None; expected palate.load_encoder('style') or another one")
    if callable(by):
        return encoder.embed(data, prompts=prompts), "pair"
    by = "prompt" if by is None else by
    # Fits choose their hyper-parameters on held-out units of the same kind. A pair has two items and one label, so with items the
    # unit is the pair: by prompt, a catalogue judged under one question would be a single unit and leave nothing to hold out.
    return encoder.embed(data, unit=unit_labels(data, "pair" if by == "item" else by), prompts=prompts), by


def _split_facts(
    data: PairSet | EmbeddedPairs, parts: Split, by: By, data_set: str, seed: int, believe_format: bool
) -> SplitFacts:
    leaks = check_leaks(data, parts, by=by, believe_format=believe_format)
    user, tie = (np.asarray(torch.as_tensor(column).cpu()) for column in (data.user_index, data.tie))
    rows: dict[str, NDArray[np.int64]] = {side: getattr(parts, side) for side in SIDES}
    return SplitFacts(
        data_set,
        seed,
        f"{parts.by}, checked by {by}" if parts.by != by else by,
        {side: len(part) for side, part in rows.items()},
        {side: len(np.unique(user[part])) for side, part in rows.items()},
        int(tie[np.concatenate(list(rows.values()))].sum()),
        {reason: int(n) for reason, n in parts.dropped.items()},
        {reason: int(n) for reason, n in parts.dropped_users.items()},
        leaks.format_accuracy,
        leaks.length_accuracy,
    )


def _one(
    model: RewardModel,
    data: EmbeddedPairs,
    parts: Split,
    labels: Labels,
    shots: tuple[Shots, ...],
    failures: list[Failure],
) -> tuple[list[Evaluation], Run | None]:
    """One method on one split. `fit` is given `data[train]`: no test pair is in its reach."""

    def failed(stage: str, error: Exception) -> None:
        message = str(error) if isinstance(error, PalateError) else f"{type(error).__name__}: {error}"
        failures.append(Failure(labels.data_set, labels.method, labels.seed, stage, message))

    began = time.perf_counter()
    train = data[parts.train]
    try:
        fitted, table = fit_with_profiles(train, model, seed=labels.seed)
        seconds = time.perf_counter() - began
        about = (type(fitted).__name__, fitted.n_weights, fitted.n_parameters, seconds, jsonable(fitted.record))
    except Exception as error:  # whatever a method does wrong must not cost the results of the others
        failed("fit", error)
        return [], None
    support = data[parts.support]
    plan: list[tuple[str, Shots, EmbeddedPairs, NDArray[np.int64], Profiles | None]] = []
    if len(parts.test_seen):
        plan.append(("seen", None, train, parts.test_seen, table))
    if len(parts.test_unseen):
        plan += [("unseen", n, support, parts.test_unseen, None) for n in shots]
    out = []
    for cohort, n, learn, test, profiles in plan:
        names = labels._replace(cohort=cohort, shots=n)
        rows = torch.as_tensor(test) if n is None else None
        try:
            out.append(evaluated(fitted, learn, data[test], names, profiles=profiles, fit_seconds=seconds, rows=rows))
        except Exception as error:  # as above
            failed(cohort, error)
    return out, Run(labels.data_set, labels.method, labels.seed, *about)
