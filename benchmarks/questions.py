"""What a well-chosen question is worth: PReF's 84 attribute users, asked one question after another.

    python -m benchmarks questions --seeds 20 --out DIR

For each seed a new world (`palate.data.attributes`), a `PReF()` fitted on the seen users, and the unseen users asked from a
common pool, everybody at once, by each way of choosing. All ways share the model, the estimator (MAP), the users, and the draws
behind the answers. Leaves `questions.csv` (a row a seed, way and number of answers) and `questions.md`.
"""

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from palate import questions
from palate.alignment.best_of_n import choices, win_rate
from palate.data.attributes import attributes
from palate.data.pairs import EmbeddedPairs
from palate.models.pref import PReF
from palate.training import fit

WAYS: dict[str, questions.Question] = {
    "random": questions.Random(),
    "Hessian score, as published": questions.HessianUncertainty(),
    "D-optimal": questions.DOptimal(),
    "information gain": questions.InformationGain(),
}
MEASURES = ("accuracy", "regret", "win_rate")
SHOWN = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40)
BASELINE = 10  # answers to random questions, against which the others are counted
DRAWS = 2000

Floats = NDArray[np.float64]


def one_seed(seed: int, n_questions: int, n_bases: tuple[int, ...]) -> tuple[dict[str, Floats], dict[str, Any]]:
    """(measures, T + 1) means over unseen users of every way, and what the fit chose."""
    world = attributes(seed)
    model = fit(world.train, PReF(n_bases), seed=seed)
    names = tuple(wish.name for wish in world.unseen)

    def pool(rows: torch.Tensor) -> questions.Pool:
        pairs = EmbeddedPairs(world.embeddings, rows[:, 0], rows[:, 1], ["nobody"] * len(rows))
        return questions.Pool.of(model, pairs)

    asked_from, tested_on, truth = pool(world.pool), pool(world.test), world.margins(world.pool)
    test = (tested_on, world.margins(world.test))
    rewards = world.rewards(world.candidates)
    table = world.embeddings.rows(world.candidates.flatten()).reshape(*world.candidates.shape, -1)
    out = {}
    for name, way in WAYS.items():
        found = questions.ask(
            model, asked_from, truth, way, n_questions, test=test, answers=questions.twice, user_ids=names, seed=seed
        )
        wins = win_rate(choices(model, table, found.weights), rewards)
        out[name] = torch.stack([found.accuracy.mean(0), found.regret.mean(0), wins.mean(0)]).double().numpy()
    return out, model.record["selection"]


def answers_needed(curve: Floats, level: float) -> float:
    """Answers until `curve` (T + 1,) reaches `level`, linear between whole answers; T + 1 where it never does."""
    above = np.flatnonzero(curve >= level)
    if not len(above):
        return float(len(curve))
    t = int(above[0])
    return 0.0 if t == 0 else t - 1 + float((level - curve[t - 1]) / (curve[t] - curve[t - 1]))


def needed_with_interval(ours: Floats, random: Floats) -> tuple[float, float, float]:
    """Answers after which the mean curve of `ours` (seeds, T + 1) is where `random` is after `BASELINE`, with a 95 % bootstrap
    interval over seeds (paired: a draw of seeds has both curves)."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(ours), size=(DRAWS, len(ours)))
    values = [answers_needed(ours[rows].mean(0), random[rows].mean(0)[BASELINE]) for rows in drawn]
    low, high = np.quantile(values, [0.025, 0.975])
    return answers_needed(ours.mean(0), random.mean(0)[BASELINE]), float(low), float(high)


def difference_with_interval(ours: Floats, theirs: Floats) -> tuple[float, float, float]:
    """Mean of ours - theirs (seeds,) with a 95 % bootstrap interval over seeds."""
    away = ours - theirs
    means = away[np.random.default_rng(0).integers(len(away), size=(DRAWS, len(away)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(away.mean()), float(low), float(high)


def summary(curves: dict[str, Floats]) -> list[str]:
    """Lines of Markdown from (seeds, measures, T + 1) of every way."""
    seeds, _, stages = next(iter(curves.values())).shape
    shown = [t for t in SHOWN if t < stages]
    lines = [f"# Questions\n\n84 attribute users, 24 of them unseen, {seeds} seeds; means over unseen users, then over seeds."]
    for m, measure in enumerate(MEASURES):
        lines += ["", f"## {measure.replace('_', ' ')} after so many answers", ""]
        lines += ["| way | " + " | ".join(map(str, shown)) + " |", "|---|" + "---:|" * len(shown)]
        lines += [f"| {name} | " + " | ".join(f"{c[:, m, t].mean():.3f}" for t in shown) + " |" for name, c in curves.items()]
    lines += ["", f"## Against random questions (95 % bootstrap intervals over {seeds} seeds)", ""]
    late = min(BASELINE, stages - 1)
    lines += [
        f"| way | answers worth {BASELINE} random ones | accuracy after 5, minus random | after {late} | win rate after {late} |",
        "|---|---|---|---|---|",
    ]
    for name, c in curves.items():
        if name == "random" or stages <= BASELINE:
            continue
        base = curves["random"]
        needed = "{:.1f} [{:.1f}, {:.1f}]".format(*needed_with_interval(c[:, 0], base[:, 0]))
        gains = [difference_with_interval(c[:, m, t], base[:, m, t]) for m, t in ((0, 5), (0, late), (2, late))]
        lines.append(f"| {name} | {needed} | " + " | ".join("{:+.4f} [{:+.4f}, {:+.4f}]".format(*gain) for gain in gains) + " |")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Run the seeds and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks questions", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20, help="number of worlds")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--questions", type=int, default=40, help="answers of each user")
    parser.add_argument("--bases", default="8,16", help="numbers of base rewards to choose from")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="folder of the results")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    sizes = tuple(int(part) for part in given.bases.split(","))
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    found: dict[str, list[Floats]] = {name: [] for name in WAYS}
    for seed in seeds:
        began = time.perf_counter()
        curves, chosen = one_seed(seed, given.questions, sizes)
        for name, curve in curves.items():
            found[name].append(curve)
        picked = {key: chosen[key] for key in ("start", "n_bases", "strength", "kappa")}
        print(f"seed {seed}: {time.perf_counter() - began:.1f} s, {picked}", file=sys.stderr, flush=True)
    stacked = {name: np.stack(curves) for name, curves in found.items()}
    with (given.out / "questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "way", "answers", *MEASURES])
        for name, curves_of in stacked.items():
            for seed, curve in zip(seeds, curves_of, strict=True):
                writer.writerows([seed, name, t, *map(float, curve[:, t])] for t in range(curve.shape[1]))
    text = "\n".join(summary(stacked)) + "\n"
    (given.out / "questions.md").write_text(text, encoding="utf-8")
    print(text)
