"""Label noise, few-shot curves and the prior: figures of docs/open-questions.md, from cells of `palate bench`.

    python -m benchmarks noise --what noise --data polis=FOLDER --data attributes --seeds N --out DIR [--figures docs/figures]

| --what | what varies                                                                                                      |
|--------|------------------------------------------------------------------------------------------------------------------|
| noise  | the share of swapped choices among those that are learned from, 0 to .4; tests stay as they are                  |
| shots  | the choices that a new user is adapted from, 0 to all, for every method                                          |
| prior  | `Hierarchical` without its personal part, with its prior's width forced, nearly flat, and without types          |

DIR is a folder of `palate bench`: what was run is not run again, and a stopped run goes on. A figure is drawn, and a table told,
from all that is there, other seeds and methods included. `--tiny` is a check that it runs.

With flips of probability p, P(chosen) is q(m) = p + (1 - 2p) sigma(m): the best guess of the clean choice is the same for every
p < 1/2, so nothing is lost but information. `worth` says how much: the Fisher information of a flipped choice about the margin,
((1 - 2p) sigma')^2 / (q (1 - q)), over that of a clean one, sigma'. It is a bound, met by somebody who knows p.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.ablations import line, with_interval
from benchmarks.drawing import COLOURS, Line, Panel, draw
from palate.bench.plan import Plan
from palate.bench.protocols import source
from palate.bench.results import Board, boards
from palate.bench.running import run, start
from palate.data.conditions import Condition
from palate.encoders import load_encoder
from palate.evaluation import Estimate, Evaluation
from palate.models.base import RewardModel
from palate.models.hierarchical import Hierarchical
from palate.terminal import methods

RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
SHOTS = (0, 1, 2, 5, 10, 20, None)
NOISE = "bt,lore,pref,mrm,hierarchical,lore-faithful,pref-faithful"
EVERY = NOISE + ",individual,individual-crowd,groups,neighbours"
SPREADS = (0.5, 1.5, 3.0)  # standard deviations of the margins for which `worth` is drawn, in log-odds


def prior_arms() -> dict[str, RewardModel]:
    """The default model, then one thing taken away or forced at a time; with a number as kappa the spread is not chosen."""
    arms: dict[str, RewardModel] = {
        "as it is": Hierarchical(),
        "no types, no blends": Hierarchical(types=(), blend=False),
        "no personal part": Hierarchical(0),
    }
    forced = {"a hundredth": 0.01, "a tenth": 0.1, "as EM found": 1.0, "ten times": 10.0, "hundred times": 100.0}
    arms |= {f"prior variance {name}": Hierarchical(kappa=kappa) for name, kappa in forced.items()}
    return arms | {"no prior (1e6 times)": Hierarchical(kappa=1e6)}


def flipped(margin: NDArray[np.float64], p: float) -> NDArray[np.float64]:
    """q(m) = p + (1 - 2p) sigma(m), the probability of the recorded choice."""
    return p + (1 - 2 * p) / (1 + np.exp(-margin))


def worth(p: float, spread: float) -> float:
    """What a choice flipped with probability `p` says of the margin, in clean choices, for margins ~ N(0, spread^2)."""
    g = np.linspace(-8, 8, 4001)
    margin, mass = spread * g, np.exp(-(g**2) / 2)
    curvature = flipped(margin, 0.0) * flipped(-margin, 0.0)
    q, other = flipped(margin, p), flipped(-margin, p)  # they sum to one; neither is rounded to zero
    return float((mass * ((1 - 2 * p) * curvature) ** 2 / (q * other)).sum() / (mass * curvature).sum())


def condition(rate: float) -> Condition:
    return Condition("flip", rate) if rate else Condition("clean")


# -- from boards to figures and tables


@dataclass(frozen=True)
class Compared:
    """Rows of the methods and seeds that all of some boards have: no figure is of other seeds than the one beside it."""

    data_set: str
    condition: str
    methods: list[str]
    rows: Evaluation

    def estimate(self, method: str, shots: int | None) -> Estimate:
        return self.rows.interval(method, shots=shots)

    @property
    def seeds(self) -> str:
        return f"seeds {', '.join(map(str, sorted(self.rows.seeds)))}"


def compared(found: Sequence[Board]) -> list[Compared]:
    """Of boards of one data set."""
    held = [{(run.method, run.seed) for run in board.evaluation.runs} for board in found]
    names = [name for name in found[0].methods if all(any(name == method for method, _ in of) for of in held)]
    seeds = [seed for seed in found[0].seeds if all((name, seed) in of for of in held for name in names)]
    if not names or not seeds:
        raise SystemExit(f"{found[0].data_set}: no method has one seed under all conditions; run the same command to its end")
    out = []
    for board in found:
        rows = [row for row in board.evaluation.rows() if row["method"] in names and row["seed"] in seeds]
        out.append(Compared(board.data_set, board.condition, names, Evaluation.from_rows(rows)))
    return out


def by_data_set(found: Sequence[Board]) -> Iterator[list[Board]]:
    for data_set in dict.fromkeys(board.data_set for board in found):
        yield [board for board in found if board.data_set == data_set]


def measured(points: Mapping[float, Estimate], name: str, look: int) -> Line:
    """A line with its intervals."""
    x = sorted(points)
    found = [points[value] for value in x]
    return Line(name, x, [e.value for e in found], [e.low for e in found], [e.high for e in found], look)


def told(e: Estimate) -> str:
    return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"


def noise_report(found: Sequence[Board], path: Path) -> list[str]:
    """Accuracy against the flip rate, all of a new user's choices; one panel a data set, and one for `worth`."""
    lines: list[str] = []
    panels = []
    for group in by_data_set(found):
        by = {Condition.named(one.condition).amount: one for one in compared(group)}  # 0 is clean
        data_set, names, rates = group[0].data_set, by[0.0].methods, sorted(by)
        lines += ["", f"{data_set}; {by[0.0].seeds}", "", line(["method", *(f"{rate:g}" for rate in rates)])]
        lines.append(line(["---"] + ["---:"] * len(rates)))
        drawn = []
        for look, name in enumerate(names):
            points = {rate: by[rate].estimate(name, None) for rate in rates}
            drawn.append(measured(points, name, look))
            lines.append(line([name, *(told(points[rate]) for rate in rates)]))
        panels.append(Panel(data_set, "share of swapped training choices", "accuracy, unseen users, clean tests", drawn))
    shares = np.linspace(0, 0.5, 51).tolist()
    theory = [
        Line(f"margins of s.d. {s:g}", shares, [worth(p, s) for p in shares], look=k, theory=True) for k, s in enumerate(SPREADS)
    ]
    panels.append(Panel("theory", "share of swapped choices, p", "worth of a choice, in clean choices", theory))
    draw(path, panels, "Accuracy on unseen users against the share of swapped training choices, and what such a choice is worth.")
    return lines


def shots_report(found: Sequence[Board], path: Path) -> list[str]:
    """Accuracy against the number of a new user's choices; the last point is all of them, at their mean number. The figure has
    the first eight methods, the table all."""
    lines: list[str] = []
    panels = []
    for board in (one for group in by_data_set(found) for one in compared(group)):
        drawn, tried = [], board.rows.shots("unseen")
        unseen = board.rows.where(cohort="unseen")
        everything = next(row["n_support"] for row in unseen.summary() if row["shots"] is None)
        lines += ["", f"{board.data_set}; {board.seeds}", ""]
        lines.append(line(["method", *("all" if n is None else str(n) for n in tried)]))
        lines.append(line(["---"] + ["---:"] * len(tried)))
        widest = 0.0
        for look, name in enumerate(board.methods):
            points = {n: board.estimate(name, n) for n in tried}
            widest = max(widest, *((e.high - e.low) / 2 for e in points.values()))
            curve = measured({everything if n is None else n: e for n, e in points.items()}, name, look)
            drawn.append(curve._replace(low=None, high=None))  # so many bands would hide the lines
            lines.append(line([name, *(f"{points[n].value:.3f}" for n in tried)]))
        lines += ["", f"Half the width of a 95 % interval is {widest:.3f} at most."]
        panels.append(Panel(board.data_set, "choices of the new user", "accuracy, unseen users", drawn[: len(COLOURS)]))
    draw(path, panels, "Accuracy on unseen users against the number of their choices.")
    return lines


def prior_report(found: Sequence[Board], path: Path) -> list[str]:
    """Accuracy of every arm after 5 and all choices, and what that is against the default."""
    lines: list[str] = []
    panels = []
    for board in (one for group in by_data_set(found) for one in compared(group)):
        names = board.methods
        first = names[0]
        head = ["what", "after 2", "after 5", "all", f"all, minus {first}", "log loss, all"]
        lines += ["", f"{board.data_set}, {board.condition}; {board.seeds}", "", line(head)]
        lines.append(line(["---"] + ["---:"] * (len(head) - 1)))
        loss = {r["method"]: r["log_loss"] for r in board.rows.summary() if r["cohort"] == "unseen" and r["shots"] is None}
        for name in names:
            cells = [f"{board.estimate(name, n).value:.3f}" for n in (2, 5, None)]
            cells.append("" if name == first else with_interval(board.rows.difference(name, first)))
            lines.append(line([name, *cells, f"{loss[name]:.3f}"]))
        labels = [name.replace("prior variance ", "").replace(" (1e6 times)", "") for name in names]
        drawn = [
            measured({k: board.estimate(name, n) for k, name in enumerate(names)}, label, look)
            for look, (n, label) in enumerate({2: "after 2", 5: "after 5", None: "all choices"}.items())
        ]
        short = [label.replace(" ", "\n") for label in labels]
        panels.append(
            Panel(f"{board.data_set}, {board.condition}", "", "accuracy, unseen users", drawn, ticks=short, joined=False)
        )
    draw(path, panels, "Accuracy of the default model on unseen users without parts of its prior.")
    return lines


REPORTS = {"noise": noise_report, "shots": shots_report, "prior": prior_report}


def plan_of(what: str, data: Sequence[str], names: str | None, seeds: Sequence[int], tiny: bool) -> Plan:
    """The cells of one question."""
    sources = [source(text, load_encoder) for text in data]
    rates = {"noise": RATES[:2] if tiny else RATES, "shots": RATES[:1], "prior": (0.0, 0.2)}[what]
    if what == "prior":
        models = dict(list(prior_arms().items())[:3]) if tiny else prior_arms()
    else:
        models = methods(names or ("bt,individual" if tiny else NOISE if what == "noise" else EVERY))
    return Plan(sources, models, seeds, tuple(condition(rate) for rate in rates), SHOTS)


def main(arguments: Sequence[str]) -> None:
    """Run what is missing for one question, draw its figure, tell its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks noise", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--what", required=True, choices=list(REPORTS))
    parser.add_argument("--data", action="append", required=True, help="as in `palate bench`; may be given several times")
    parser.add_argument("--methods", help="as in `palate bench`; not for prior, whose arms are given")
    parser.add_argument("--seeds", type=int, default=5, help="number of draws")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--tiny", action="store_true", help="few settings: a check that it runs")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="folder of a bench")
    parser.add_argument("--figures", type=Path, help="folder of the figure; by default that of --out")
    given = parser.parse_args(arguments)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    plan = plan_of(given.what, given.data, given.methods, list(seeds), given.tiny)
    run(start(plan, given.out), given.out)
    wanted = {c.name for c in plan.conditions}
    found = [board for board in boards(given.out) if board.condition in wanted and board.evaluation.methods]
    told_lines = REPORTS[given.what](found, (given.figures or given.out) / f"{given.what}.svg")
    print("\n".join(told_lines))
