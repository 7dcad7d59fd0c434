"""How well models like one of ours do, as its card says it: for people as Markdown, for the Hub as entries of its index."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from palate.errors import DataError
from palate.evaluation import Estimate, Evaluation
from palate.evaluation.result import Metric
from palate.models.base import RewardModel
from palate.report.contents import full_shots, label, main_cohort, percent, shots_in_words

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_METRICS: tuple[tuple[Metric, str], ...] = (
    ("accuracy", "Accuracy, mean over users"),
    ("worst_decile", "Accuracy of the tenth of the users who are predicted worst"),
    ("log_loss", "Log loss in nats, mean over users"),
)
_TASK = "Which of two responses one person prefers"


def subject_of(results: Evaluation, model: RewardModel, method: str | None) -> str:
    """What `results` calls the kind of model that `model` is. Raises `DataError` where that cannot be told."""
    kinds = {run.method: run.kind for run in results.runs}
    if method is None:
        fitting = [name for name in results.methods if kinds.get(name) == type(model).__name__]
        if not kinds and len(results.methods) == 1:
            fitting = list(results.methods)
        if len(fitting) != 1:
            raise DataError(
                f"{len(fitting)} of the methods {', '.join(results.methods)} are a {type(model).__name__}; say which one this "
                "model is (method), or give results in which it took part"
            )
        return fitting[0]
    if method not in results.methods or kinds.get(method, type(model).__name__) != type(model).__name__:
        raise DataError(
            f"method is {method!r}, for a {type(model).__name__}; the results have "
            + ", ".join(f"{name} ({kinds.get(name, 'of an unknown class')})" for name in results.methods)
        )
    return method


def indexed(results: Evaluation, subject: str) -> "list[EvalResult]":
    """One entry for each data set, cohort and figure, at the largest number of choices that was tried."""
    from huggingface_hub import EvalResult

    out = []
    for data_set, cohort, shots in _tested(results, subject):
        for metric, named in _METRICS:
            found = _interval(results, subject, data_set, cohort, shots, metric)
            out.append(
                EvalResult(
                    task_type="text-classification",
                    task_name=_TASK,
                    dataset_type=re.sub(r"[^\w./-]+", "-", data_set).strip("-") or "choices",
                    dataset_name=data_set or "choices",
                    dataset_config=f"{shots_in_words(shots)} choices to learn a person from",
                    dataset_split=f"{cohort} users",
                    metric_type="log_loss" if metric == "log_loss" else "accuracy",
                    metric_name=named,
                    metric_value=round(found.value, 4),
                    metric_args={
                        "interval_95": [round(found.low, 4), round(found.high, 4)],
                        "users": found.n_users,
                        "splits": found.n_seeds,
                    },
                )
            )
    return out


def _tested(results: Evaluation, method: str) -> list[tuple[str, str, int | None]]:
    """(data set, cohort, largest number of choices) in which a method was tested, unseen users first."""
    out = []
    for data_set in results.data_sets:
        here = results.where(data_set=data_set, method=method)
        first = main_cohort(here) if len(here) else ""
        out += [(data_set, name, full_shots(here, name)) for name in sorted(here.cohorts, key=lambda name: name != first)]
    return out


def _interval(results: Evaluation, method: str, data_set: str, cohort: str, shots: int | None, metric: Metric) -> Estimate:
    return results.interval(method, cohort=cohort, shots=shots, metric=metric, data_set=data_set)


def results_in_words(results: Evaluation | None, subject: str | None) -> str:
    """The section of results: every method of the comparison, ours in bold."""
    if results is None or subject is None:
        return "## Results\n\nNot measured. `palate compare` measures it, and `palate card MODEL --results DIR` puts it here."
    out = [
        "## Results",
        "",
        f"Of models like this one ({label(subject)}), each fitted on the training choices of a random split, never on what it is "
        "tested on; the model in this repository is not one of them. *Unseen* people were adapted from their own choices after "
        "fitting; *seen* people took part in it. Means over people, with 95 % intervals by a bootstrap over people and splits. "
        "Chance is 50 %; knowing nothing costs a log loss of 0.693.",
    ]
    for data_set in results.data_sets:
        here = results.where(data_set=data_set)
        splits = [facts for facts in results.splits if facts.data_set == data_set]
        by = f", split by {splits[0].by}" if splits else ""
        for cohort in sorted(here.cohorts, key=lambda name: name != main_cohort(here)):
            shots = full_shots(here, cohort)
            rows = []
            for method in here.methods:
                if shots not in here.where(method=method).shots(cohort):
                    continue
                figures = [_interval(results, method, data_set, cohort, shots, metric) for metric, _ in _METRICS]
                shown = [_share(figures[0]), _share(figures[1]), _floor(here, method, cohort, shots), _plain(figures[2])]
                rows.append((f"**{one_line(label(method))}**" if method == subject else one_line(label(method)), *shown))
            seeds = len(here.seeds)
            asked = f"{cohort.capitalize()} people, {shots_in_words(shots)} of their choices to learn from"
            out += ["", f"### {one_line(data_set) or 'Choices'}: {cohort} people", ""]
            out += [f"{asked}; {seeds} random {'split' if seeds == 1 else 'splits'}{by}.", ""]
            out.append(table(("Method", "Accuracy", "Worst tenth of people", "By luck alone", "Log loss"), rows))
        few = [row for row in results.few_shot(data_set=data_set) if row["method"] == subject]
        if len(few) > 1:
            out += ["", "Accuracy on unseen people by the number of their choices:", ""]
            heads = ("Choices", *(shots_in_words(row["shots"]) for row in few))
            out.append(table(heads, [(one_line(label(subject)), *(percent(row["value"]) for row in few))]))
    for method, stage in dict.fromkeys((failure.method, failure.stage) for failure in results.failures):
        out += ["", f"{one_line(label(method))} failed ({stage}); it has no figure there."]
    return "\n".join(out)


def _floor(here: Evaluation, method: str, cohort: str, shots: int | None) -> str:
    rows = here.where(method=method, cohort=cohort).summary()
    return next(percent(row["floor_10"]) for row in rows if row["shots"] == shots)


def worst_in_words(results: Evaluation | None, subject: str | None) -> str:
    """The section on the people who are predicted worst."""
    if results is None or subject is None:
        said = "Not measured. Until it is, suppose that some people are predicted no better than by a coin."
        return "## Whom it serves worst\n\n" + said
    out = []
    for data_set, cohort, shots in _tested(results, subject):
        found = _interval(results, subject, data_set, cohort, shots, "worst_decile")
        mean = _interval(results, subject, data_set, cohort, shots, "accuracy")
        luck = _floor(results.where(data_set=data_set), subject, cohort, shots)
        out.append(
            f"- {one_line(data_set) or 'Choices'}, {cohort} people: the tenth who are predicted worst are predicted at "
            f"{_share(found)}, everybody at {_share(mean)} on average. If all were alike and differed by luck alone, that tenth "
            f"would be at {luck}."
        )
    out += ["", "Who these people are was not looked into: the card knows no person."]
    return "## Whom it serves worst\n\n" + "\n".join(out)


def _share(found: Estimate) -> str:
    return f"{percent(found.value)} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _plain(found: Estimate) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown whose cells are written already."""
    side = "---:" if any(heads) else "---"  # figures under a head, facts under none
    lines = [heads, ["---", *[side] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def one_line(text: str) -> str:
    """One line that ends no cell and starts no markup: names come from files, and files from anybody."""
    return re.sub(r"([\\`*_<>|#\[\]])", r"\\\1", " ".join(text.split()))
