"""The figures of a report as inline SVG. The only file that imports matplotlib; it touches no global state and no display."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from palate.errors import DataError, MissingExtraError
from palate.evaluation import Evaluation
from palate.evaluation.metrics import WORST
from palate.report.contents import full_shots, label, main_cohort

# Okabe and Ito's colours, which survive colour blindness; markers and dashes repeat what the colour says.
_LOOKS = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#AA4499", "D", ":"), ("#56B4E9", "v", "-"))
_BASELINE = ("#6b7280", "x", "--")
_STYLE = {
    **{"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "axes.spines.top": False},
    **{"axes.spines.right": False, "axes.grid": True, "grid.color": "#e5e7eb", "axes.edgecolor": "#9ca3af"},
    **{"axes.axisbelow": True, "xtick.color": "#4b5563", "ytick.color": "#4b5563", "axes.labelcolor": "#374151"},
    **{"legend.frameon": False, "lines.linewidth": 2, "svg.hashsalt": "palate", "legend.fontsize": 10},
}
SIZE = (5.6, 3.7)


class Figure(NamedTuple):
    """Inline SVG, with a title, and what it shows for those who cannot see it."""

    title: str
    svg: str
    note: str


def figures(evaluation: Evaluation, data_set: str, baseline: str, subject: str) -> list[Figure]:
    """The figures of one data set for which there is something to show.

    Raises `MissingExtraError` without matplotlib. Costs about 0.1 s a figure, and the intervals of the few-shot curves.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise MissingExtraError("the figures of a report need matplotlib; run: pip install 'palate[report]'") from error

    here = evaluation.where(data_set=data_set)
    looks = _looks(here.methods, baseline, subject)
    out = []
    with matplotlib.rc_context(_STYLE):
        for draw in (_few_shot, _per_user, _worst, _calibration, _selection):
            canvas = Canvas(figsize=SIZE, layout="constrained")
            found = draw(here, canvas.add_subplot(), looks, subject)
            if found is not None:
                title, note = found
                out.append(Figure(title, _svg(canvas, f"{draw.__name__}-{data_set}", f"{title}. {note}"), note))
    return out


Looks = Mapping[str, tuple[str, str, str]]


def _looks(methods: Sequence[str], baseline: str, subject: str) -> Looks:
    others = sorted((m for m in methods if m != baseline), key=lambda m: m != subject)
    return {baseline: _BASELINE, **{m: _LOOKS[i % len(_LOOKS)] for i, m in enumerate(others)}}


def _svg(canvas: Any, name: str, description: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Ids are hashed with the name, so that several figures on one page keep theirs apart, and no date: same figures, same bytes.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", name)
    drawn = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", drawn)
    escaped = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r' height="[^"]*"', "", drawn, count=1), count=1).replace(
        "<svg", f'<svg role="img" aria-label="{escaped}"', 1
    )


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(xmax=1))


def _few_shot(evaluation: Evaluation, axes: Any, looks: Looks, subject: str) -> tuple[str, str] | None:
    tried = evaluation.shots("unseen")
    if len(tried) < 2:
        return None
    place = {n: i for i, n in enumerate(tried)}
    curves = evaluation.few_shot()
    for i, (method, (colour, marker, dash)) in enumerate(looks.items()):
        rows = [row for row in curves if row["method"] == method]
        if rows:
            x = np.asarray([place[row["shots"]] for row in rows]) + 0.06 * (i - (len(looks) - 1) / 2)
            y, low, high = (np.asarray([row[name] for row in rows]) for name in ("value", "low", "high"))
            bars = np.clip([y - low, high - y], 0, None)
            axes.errorbar(x, y, bars, color=colour, marker=marker, ls=dash, label=label(method), capsize=2, elinewidth=1)
    axes.set_xticks(range(len(tried)), ["all" if n is None else str(n) for n in tried])
    axes.set_xlabel("choices learnt from")
    axes.set_ylabel("accuracy, unseen users")
    _percent(axes.yaxis)
    axes.legend(loc="best")
    return (
        "A few choices of a new user",
        "Accuracy for unseen users after so many of their choices (or all, where they have fewer), with 95 % intervals.",
    )


def _per_user(evaluation: Evaluation, axes: Any, looks: Looks, subject: str) -> tuple[str, str] | None:
    cohort = main_cohort(evaluation)
    shots = full_shots(evaluation, cohort)
    grid = (np.arange(200) + 0.5) / 200
    drawn = False
    for method, (colour, _, dash) in looks.items():
        curves = []
        for seed in evaluation.seeds:
            columns = evaluation.where(method=method, cohort=cohort, seed=seed).columns
            accuracy = np.sort(columns["accuracy"][columns["shots"] == (-1 if shots is None else shots)])
            if len(accuracy):
                curves.append(accuracy[np.minimum((grid * len(accuracy)).astype(int), len(accuracy) - 1)])
        if curves:
            axes.plot(grid, np.mean(curves, axis=0), color=colour, ls=dash, label=label(method))
            drawn = True
    if not drawn:
        return None
    axes.axhline(0.5, color="#9ca3af", lw=1)
    axes.set_xlabel(f"{cohort} users, from worst to best predicted")
    axes.set_ylabel("accuracy of the user")
    _percent(axes.xaxis)
    _percent(axes.yaxis)
    axes.legend(loc="lower right")
    return "User by user", "Each method's users in order of their accuracy, averaged over splits. The thin line is chance."


def _worst(evaluation: Evaluation, axes: Any, looks: Looks, subject: str) -> tuple[str, str] | None:
    cohort = main_cohort(evaluation)
    shots = full_shots(evaluation, cohort)
    rows = {row["method"]: row for row in evaluation.summary() if (row["cohort"], row["shots"]) == (cohort, shots)}
    names = [round(100 * share) for share in WORST]
    for method, (colour, marker, dash) in looks.items():
        if method in rows:
            axes.plot(
                names, [rows[method][f"worst_{q}"] for q in names], color=colour, marker=marker, ls=dash, label=label(method)
            )
    if subject in rows:
        floor = [rows[subject][f"floor_{q}"] for q in names]
        axes.plot(names, floor, color=looks[subject][0], lw=1, ls=(0, (1, 2)), label=f"luck alone ({label(subject)})")
    axes.set_xticks(names, [f"{q} %" for q in names])
    axes.set_xlabel(f"share of the {cohort} users, worst predicted first")
    axes.set_ylabel("their mean accuracy")
    _percent(axes.yaxis)
    axes.legend(loc="lower right")
    return (
        "The users who are served worst",
        "Mean accuracy of the worst 10 to 50 % of the users. Luck alone: what it would be if all were predicted equally well and "
        "differed only because each has few test choices.",
    )


def _calibration(evaluation: Evaluation, axes: Any, looks: Looks, subject: str) -> tuple[str, str] | None:
    cohort = main_cohort(evaluation)
    shots = full_shots(evaluation, cohort)
    drawn = False
    for method, (colour, marker, dash) in looks.items():
        try:
            confidence, right, count = evaluation.calibration(method, cohort=cohort, shots=shots).curve()
        except DataError:
            continue
        enough = count >= 20  # a bin of fewer pairs is noise
        axes.plot(confidence[enough], right[enough], color=colour, marker=marker, ls=dash, label=label(method))
        drawn = True
    if not drawn:
        return None
    axes.plot([0.5, 1], [0.5, 1], color="#9ca3af", lw=1)
    axes.set_xlabel("how sure the prediction was")
    axes.set_ylabel("how often it was right")
    _percent(axes.xaxis)
    _percent(axes.yaxis)
    axes.legend(loc="upper left")
    return (
        "Is it as sure as it should be?",
        f"On the thin line confidence is earned; below it, overstated. {cohort.capitalize()} users.",
    )


def _selection(evaluation: Evaluation, axes: Any, looks: Looks, subject: str) -> tuple[str, str] | None:
    """The lowest held-out error for each strength of personalisation, where the model has recorded such a curve."""
    curves: list[tuple[dict[float, float], float]] = []
    for run in evaluation.runs:
        if run.method == subject and run.data_set in evaluation.data_sets:
            found = selection_curve(run.record)
            if found is not None:
                curves.append(found)
    if not curves:
        return None
    colour = looks[subject][0]
    strengths = sorted({strength for curve, _ in curves for strength in curve})
    place = {strength: i for i, strength in enumerate(strengths)}
    for i, (curve, chosen) in enumerate(curves):
        x = sorted(curve)
        axes.plot([place[k] for k in x], [curve[k] for k in x], color=colour, lw=1.2, alpha=0.75, marker="o", ms=3)
        name = "chosen" if i == 0 else None
        if chosen in curve:
            axes.plot([place[chosen]], [curve[chosen]], color=colour, marker="o", ms=9, mfc="white", mew=2, ls="", label=name)
    axes.set_xticks(range(len(strengths)), [f"{strength:g}" for strength in strengths])
    axes.set_xlabel("strength of personalisation (0: the crowd's reward)")
    axes.set_ylabel("smoothed error, held-out seen users")
    axes.legend(loc="best")
    return (
        "How much to personalise",
        f"What {label(subject)} chose from before it saw any test choice: one line per split, lower is better.",
    )


def selection_curve(record: Mapping[str, Any]) -> tuple[dict[float, float], float] | None:
    """({strength: lowest held-out error}, the chosen strength) from a model's record; None where it has no such curve."""
    population = record.get("selection", {})
    population = population.get("population", {}) if isinstance(population, Mapping) else {}
    curve = population.get("curve", []) if isinstance(population, Mapping) else []
    lowest: dict[float, float] = {}
    for point in curve:
        strength, loss = point.get("kappa"), point.get("error")
        if isinstance(strength, int | float) and isinstance(loss, int | float):
            lowest[float(strength)] = min(float(loss), lowest.get(float(strength), np.inf))
    if len(lowest) < 2:
        return None
    chosen = population.get("chosen")
    strength = chosen.get("kappa") if isinstance(chosen, Mapping) else None
    return lowest, float(strength) if isinstance(strength, int | float) else float("nan")
