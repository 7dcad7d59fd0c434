"""What a report says, as words and formatted figures, before anything decides how it looks. HTML and Markdown show the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from palate.errors import DataError
from palate.evaluation import Estimate, Evaluation
from palate.evaluation.result import Metric

# Method names as people write them; any other name is shown as it is.
LABELS: Mapping[str, str] = {
    "attribute-prior": "Attribute prior",
    "bt": "Bradley-Terry",
    "hierarchical": "Hierarchical",
    "lore": "LoRe",
    "lore-faithful": "LoRe (as published)",
    "groups": "Bradley-Terry of groups",
    "individual": "Bradley-Terry of each user alone",
    "individual-crowd": "Bradley-Terry of each user, from the crowd's",
    "mrm": "MRM",
    "mrm-faithful": "MRM (as published)",
    "neighbours": "Nearest neighbours",
    "pal-a": "PAL-A",
    "pal-a-faithful": "PAL-A (as published)",
    "pal-b": "PAL-B",
    "pal-b-faithful": "PAL-B (as published)",
    "pref": "PReF",
    "pref-faithful": "PReF (as published)",
    "reference": "The encoder's own head",
    "scorers": "Given scorers",
    "vpl": "VPL",
    "vpl-faithful": "VPL (as published)",
}
FEW_USERS, FEW_SEEDS = 30, 10
_TITLES = {"unseen": "Users the model has never met", "seen": "Users it was fitted on, on choices held out"}
_PAIRED: tuple[tuple[str, Metric], ...] = (("accuracy", "accuracy"), ("worst decile", "worst_decile"))
_READ = (
    "Mean over users. Differences to {baseline} in points, on the same users, with 95 % intervals. Worst decile: the mean of the "
    "tenth of the users who are predicted worst; luck alone: the same if all users were equal and had only few test choices. "
    "Log loss in nats; knowing nothing costs 0.693."
)


@dataclass(frozen=True)
class Table:
    """Column heads and rows of cells under a title; the first column names the row. The caption says how to read it."""

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: int | None = None  # the row to stress


@dataclass(frozen=True)
class Contents:
    """The words and figures of one data set."""

    data_set: str
    baseline: str
    subject: str  # the method that the headline is about
    verdict: str  # "helps", "harms" or "undecided"; "alone" where there is nothing to compare with
    headline: str
    second: str
    tables: tuple[Table, ...]
    caveats: tuple[str, ...]
    failures: tuple[str, ...]


def label(method: str) -> str:
    """The method's name in words."""
    return LABELS.get(method, method)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def points(estimate: Estimate) -> str:
    """A difference of accuracies in percentage points with its interval."""
    return f"{_signed(estimate.value)} [{_signed(estimate.low)}, {_signed(estimate.high)}]"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def shots_in_words(shots: int | None) -> str:
    return "all" if shots is None else str(shots)


def baseline_of(evaluation: Evaluation, wanted: str | None) -> str:
    """The method to compare with: `wanted`, else Bradley-Terry, else one without personal weights, else the first."""
    methods = evaluation.methods
    if not methods:
        raise DataError("the evaluation has no rows; expected at least one method that was tested")
    if wanted is not None:
        if wanted not in methods:
            raise DataError(f"baseline is {wanted!r}; expected one of {', '.join(methods)}")
        return wanted
    runs = [run for run in evaluation.runs if run.method in methods]
    crowd = [run.method for run in runs if run.kind == "BradleyTerry"] + [run.method for run in runs if run.n_weights == 0]
    return crowd[0] if crowd else "bt" if "bt" in methods else methods[0]


def subject_of(evaluation: Evaluation, baseline: str) -> str:
    """The method that the headline is about: the default model where it was tested, else the first that is not the baseline.

    Never the best on the test choices: picking it there would flatter it.
    """
    others = [method for method in evaluation.methods if method != baseline]
    default = [run.method for run in evaluation.runs if run.kind == "Hierarchical" and run.method in others]
    return (default or others or [baseline])[0]


def contents(evaluation: Evaluation, data_set: str, baseline: str, quarantined: Mapping[str, int] | None) -> Contents:
    """Everything that the report says about one data set. Costs the intervals: some tenths of a second per method."""
    here = evaluation.where(data_set=data_set)
    subject = subject_of(here, baseline)
    rows = {(row["method"], row["cohort"], row["shots"]): row for row in here.summary()}
    verdict, headline, second = _headline(here, subject, baseline, rows)
    failures = [failure for failure in evaluation.failures if failure.data_set == data_set]
    said: dict[tuple[str, str, str], list[int]] = {}
    for failure in failures:
        said.setdefault((failure.method, failure.stage, failure.message), []).append(failure.seed)
    return Contents(
        data_set,
        baseline,
        subject,
        verdict,
        headline,
        second,
        _tables(here, subject, baseline, rows),
        _caveats(evaluation, here, data_set, quarantined),
        tuple(f"{label(m)} failed ({s}, seeds {', '.join(map(str, seeds))}): {why}" for (m, s, why), seeds in said.items()),
    )


def main_cohort(evaluation: Evaluation) -> str:
    """The cohort that the headline is about: unseen users where there are any."""
    return "unseen" if "unseen" in evaluation.cohorts else evaluation.cohorts[0]


def full_shots(evaluation: Evaluation, cohort: str) -> int | None:
    """The largest number of choices that was tried: all where all were."""
    tried = evaluation.shots(cohort)
    return None if None in tried else tried[-1]


Rows = Mapping[tuple[str, str, int | None], Mapping[str, Any]]


def _headline(evaluation: Evaluation, subject: str, baseline: str, rows: Rows) -> tuple[str, str, str]:
    cohort = main_cohort(evaluation)
    shots = full_shots(evaluation, cohort)
    who = "people the model has never met" if cohort == "unseen" else "people the model was fitted on"
    row = rows.get((subject, cohort, shots))
    reached = f"For {who}, {label(subject)} predicts {percent(row['accuracy'])} of their choices" if row else ""
    if subject == baseline or row is None or (baseline, cohort, shots) not in rows:
        return "alone", reached + "." if reached else f"{label(subject)} could not be tested.", "Chance is 50 %."
    gain = evaluation.difference(subject, baseline, cohort=cohort, shots=shots)
    between = f"95 % interval {_signed(gain.low)} to {_signed(gain.high)}"
    more = f"{abs(100 * gain.value):.1f} points {'more' if gain.value >= 0 else 'fewer'} than {label(baseline)}"
    crowd = ", which gives everybody the same reward" if baseline == "bt" else ""
    if gain.low > 0:
        verdict, so = "helps", "Personalisation helps here"
    elif gain.high < 0:
        verdict, so = "harms", "Personalisation does harm here"
    else:
        verdict, so = "undecided", "Whether personalisation helps here cannot be told from these data"
    tail = evaluation.difference(subject, baseline, cohort=cohort, shots=shots, metric="worst_decile")
    other = rows[(baseline, cohort, shots)]
    second = (
        f"The worst-served tenth of them is predicted at {percent(row['worst_10'])} against {percent(other['worst_10'])} "
        f"({_signed(tail.value)} points, 95 % interval {_signed(tail.low)} to {_signed(tail.high)}); if all users were equal and "
        f"differed by luck alone it would be {percent(row['floor_10'])}. Chance is 50 %. "
        f"Intervals are over {gain.n_users} users and {gain.n_seeds} random {'split' if gain.n_seeds == 1 else 'splits'}."
    )
    return verdict, f"{so}. {reached}, {more}{crowd} ({between} points).", second


def _tables(evaluation: Evaluation, subject: str, baseline: str, rows: Rows) -> tuple[Table, ...]:
    methods, cohorts = evaluation.methods, evaluation.cohorts
    strong = methods.index(subject) if subject in methods and subject != baseline else None

    def versus(method: str, cohort: str, shots: int | None, metric: Metric) -> str:
        if method == baseline or (baseline, cohort, shots) not in rows:
            return "\N{EN DASH}"
        return points(evaluation.difference(method, baseline, cohort=cohort, shots=shots, metric=metric))

    tables = []
    for cohort in sorted(cohorts, key=lambda name: name != main_cohort(evaluation)):
        shots = full_shots(evaluation, cohort)
        body = []
        for method in methods:
            row = rows.get((method, cohort, shots))
            cells = ["not tested", *["\N{EN DASH}"] * 5]
            if row is not None:
                accuracy, tail = (versus(method, cohort, shots, metric) for _, metric in _PAIRED)
                cells = [percent(row["accuracy"]), accuracy, percent(row["worst_10"]), tail]
                cells += [percent(row["floor_10"]), "not measured" if row["log_loss"] is None else f"{row['log_loss']:.3f}"]
            body.append((label(method), *cells))
        columns = ("Method", "Accuracy", "Difference", "Worst decile", "Difference", "Luck alone", "Log loss")
        tables.append(Table(_TITLES.get(cohort, cohort), _READ.format(baseline=label(baseline)), columns, tuple(body), strong))
    tried = evaluation.shots("unseen")
    if len(tried) > 1:
        shown = [
            (label(m), *(percent(rows[key]["accuracy"]) if (key := (m, "unseen", n)) in rows else "not tested" for n in tried))
            for m in methods
        ]
        known = [row["n_support"] for (_, cohort, shots), row in rows.items() if (cohort, shots) == ("unseen", None)]
        caption = "Accuracy for unseen users after learning from so many of their choices, or all where they have fewer."
        caption += f" All: {np.mean(known):.0f} on average." if known else ""
        heads = ("Choices", *map(shots_in_words, tried))
        tables.append(Table("Learning a new user", caption, heads, tuple(shown), strong))
    return (*tables, _costs(evaluation, rows))


def _costs(evaluation: Evaluation, rows: Rows) -> Table:
    cohort = main_cohort(evaluation)
    shots = full_shots(evaluation, cohort)
    body = []
    for method in evaluation.methods:
        row = rows.get((method, cohort, shots))
        if row is None:
            continue
        seconds = ["not measured" if row[name] is None else f"{row[name]:.3g} s" for name in ("fit_seconds", "adapt_seconds")]
        try:
            error = f"{100 * evaluation.calibration(method, cohort=cohort, shots=shots).error():.1f} points"
        except DataError:
            error = "not measured"
        body.append((label(method), f"{row['n_parameters']:,}", *seconds, error, f"{row['auc']:.3f}"))
    caption = (
        f"Numbers shared by all users (the encoder not counted), time of one fit, time to adapt all {cohort} users together, "
        "expected calibration error, and area under the ROC curve (mean over users)."
    )
    heads = ("Method", "Parameters", "Fit", "Adapt", "Calibration error", "AUC")
    return Table("What it costs, and how well it is calibrated", caption, heads, tuple(body))


def short_rows(evaluation: Evaluation, data_set: str, baseline: str) -> list[dict[str, str]]:
    """The main figures of each method, short enough for a terminal, where methods go by the names that were typed."""
    here = evaluation.where(data_set=data_set)
    baseline = baseline if baseline in here.methods else here.methods[0]
    cohort = main_cohort(here)
    shots = full_shots(here, cohort)
    rows = {(row["method"], row["cohort"], row["shots"]): row for row in here.summary()}
    out = []
    for method in here.methods:
        first = {"data set": data_set} if len(evaluation.data_sets) > 1 else {}
        cells = first | {"method": method}
        for name in sorted(here.cohorts):
            row = rows.get((method, name, full_shots(here, name)))
            cells[name] = "not tested" if row is None else percent(row["accuracy"])
        tail = rows.get((method, cohort, shots))
        cells["worst decile"] = "not tested" if tail is None else percent(tail["worst_10"])
        paired = method != baseline and tail is not None and (baseline, cohort, shots) in rows
        for title, metric in _PAIRED:
            found = here.difference(method, baseline, cohort=cohort, shots=shots, metric=metric) if paired else None
            cells[f"{title} vs {baseline}"] = "\N{EN DASH}" if found is None else points(found)
        out.append(cells)
    return out


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in counts.items() if n)


def _caveats(evaluation: Evaluation, here: Evaluation, data_set: str, quarantined: Mapping[str, int] | None) -> tuple[str, ...]:
    out = []
    for cohort in here.cohorts:
        per_seed = [len(np.unique(here.where(cohort=cohort, seed=seed).columns["user"].astype(str))) for seed in here.seeds]
        mean = float(np.mean(per_seed))
        rough = f" With fewer than {FEW_USERS} users, intervals are rough." if mean < FEW_USERS else ""
        out.append(f"{cohort.capitalize()} users: {mean:.0f} in each split.{rough}")
    seeds = len(here.seeds)
    if seeds < FEW_SEEDS:
        out.append(f"{seeds} random {'split' if seeds == 1 else 'splits'}; the worst decile wants {FEW_SEEDS} or more.")
    splits = [facts for facts in evaluation.splits if facts.data_set == data_set]
    if splits:
        first = splits[0]
        out.append(
            f"Split by {first.by}: {_counts(first.pairs)} (pairs, first split). Leak checks passed on every split: no pair, "
            "swapped pair or unit of a user is both learnt from and tested on."
        )
        if first.format_accuracy is not None:
            out.append(
                f"From formatting alone, {percent(first.format_accuracy)} of the choices can be told; from which side is longer, "
                f"{percent(first.length_accuracy or 0.5)}. Chance is 50 %."
            )
        ties = round(float(np.mean([facts.n_ties for facts in splits])))
        out.append(
            f"{ties:,} labelled ties: left out of accuracy, half each way in the log loss." if ties else "No labelled ties."
        )
        dropped = _counts(first.dropped)
        out.append(f"Pairs left out of the first split: {dropped}." if dropped else "No pair was left out of the first split.")
        if users := _counts(first.dropped_users):
            out.append(f"Users left out of the first split: {users}.")
    cells = [cell for cell in evaluation.cells if cell.data_set == data_set]
    if lost := max((cell.n_dropped for cell in cells), default=0):
        out.append(f"Up to {lost} users of a split had no strict test choice and have no accuracy.")
    if stopped := sum(cell.n_unconverged for cell in cells):
        out.append(f"{stopped:,} adaptations of single users stopped before the solver's tolerance.")
    if quarantined is not None:
        bad = _counts(quarantined)
        out.append(f"Bad rows, left out before anything else, by reason: {bad}." if bad else "No bad rows.")
    return tuple(out)


def quotations(evaluation: Evaluation, data_set: str, method: str) -> Sequence[tuple[str, str, str, str]]:
    """(prompt, chosen, rejected, probability in words) of the surest wrong predictions for unseen users on the first split.

    Raises `DataError` where the evaluation has no texts: it was loaded from a file, or came from embeddings.
    """
    if evaluation.pairs is None:
        raise DataError(
            "quote_texts is set, but the evaluation has no texts (loaded, joined, or of EmbeddedPairs); leave it unset"
        )
    pairs, seeds = evaluation.pairs, evaluation.where(data_set=data_set).seeds
    found = [m for m in evaluation.mispredicted if (m.method, m.cohort) == (method, "unseen") and m.seed == seeds[0]]
    return [
        (
            pairs.texts[pairs.chosen[m.row]].prompt_text,
            pairs.texts[pairs.chosen[m.row]].response,
            pairs.texts[pairs.rejected[m.row]].response,
            percent(m.probability),
        )
        for m in found
    ]
