"""How many steps it takes: the solvers, EM, and the loops of LoRe and MRM, for docs/sample-complexity.md.

    python -m benchmarks convergence --seeds N --out DIR [--figures docs/figures] [--tiny]

| panel                | what is drawn                                                                                        |
|----------------------|------------------------------------------------------------------------------------------------------|
| one user's weights   | nats above the optimum after each step: Newton, interior point, and the published Adam on the simplex |
| the population       | evidence after each round of EM, less that of the prior that the users were drawn from                |
| what is shared       | accuracy on unseen users against the seconds of the fit, LoRe and MRM stopped after so many steps     |

The worlds are those of `python -m benchmarks complexity`, and two groups for the last panel, whose seconds are of one seed and
one machine. The table is in DIR/convergence.md. `--tiny` is a check that it runs.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.ablations import OUTER, signed
from benchmarks.ablations import line as row
from benchmarks.accuracy import say
from benchmarks.complexity import CROWD, PERSONAL, accuracy, curve, draws, linear
from benchmarks.drawing import Line, Panel, draw
from palate.adaptation import adapt
from palate.data.planted import two_groups
from palate.models import population
from palate.models.base import RewardModel
from palate.models.factored import LoRe
from palate.models.hierarchical import Hierarchical
from palate.priors import Prior
from palate.solvers import Batch, adam_on_logits, newton, posterior, simplex, whitened
from palate.training import fit

STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 50, 100, 200, 500)
ROUNDS = 40


def gaps(seed: int, steps: Sequence[int], users: int) -> dict[str, list[float]]:
    """How far each solver is from its optimum after so many steps, in nats a user: Newton and the two ways to the simplex."""
    batch, _ = draws(seed, users, 20, 8, PERSONAL / 8, CROWD)
    white = whitened(batch, Prior.gaussian(torch.eye(8, dtype=torch.float64) * PERSONAL / 8), 0)
    best = newton(white, max_steps=60, tolerance=1e-12)[1]
    out = {"Newton": [float((newton(white, max_steps=t, tolerance=0.0)[1] - best).mean()) for t in steps if t <= 10]}
    lowest = batch.loss(simplex(batch, tolerance=1e-10, max_steps=200).mean)
    start = torch.randn(users, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def above(mean: Tensor) -> float:
        return float((batch.loss(mean) - lowest).mean())

    out["simplex, interior point"] = [above(simplex(batch, tolerance=1e-10, max_steps=t).mean) for t in steps if t <= 50]
    out["simplex, Adam .1"] = [above(adam_on_logits(batch, start, steps=t, rate=0.1).mean) for t in steps]
    return out


def evidence(seed: int, rounds: int, users: int, n: int = 20, k: int = 8) -> list[float]:
    """Mean log evidence of a user after each round of EM, less that of the prior that the users were drawn from, in nats."""
    batch, _ = draws(seed, users, n, k, PERSONAL / k, CROWD)
    true, wide = (Prior.gaussian(torch.eye(k, dtype=torch.float64) * s) for s in (PERSONAL / k, 4.0))
    priors = [wide, *population.gaussian_rounds([batch], wide, rounds)]
    level = _evidence(batch, true)
    return [_evidence(batch, prior) - level for prior in priors]


def _evidence(batch: Batch, prior: Prior) -> float:
    found = posterior(batch, prior, covariance=False).log_evidence
    if found is None:
        raise ValueError("the posterior has no evidence; expected one under a Gaussian prior")
    return float(found.mean())


def races(seed: int, tiny: bool) -> dict[str, list[tuple[float, float]]]:
    """(seconds of the fit, accuracy on unseen users) of LoRe after so many Adam steps, and of MRM after so many outer steps."""
    world = two_groups(seed, n_users=20 if tiny else 200, n_train=30, n_test=2, dim=32)
    truth = world.crowd.double() + world.weights_unseen.double() @ world.directions.double().T

    def run(model: RewardModel) -> tuple[float, float]:
        began = time.perf_counter()
        found = fit(world.train, model, seed=seed)
        seconds = time.perf_counter() - began
        offset, slopes = linear(found, 32)
        mine = offset + adapt(found, world.support).mean.double() @ slopes.T
        cosine = torch.cosine_similarity(mine, truth, dim=1)
        lengths = truth.square().sum(1).tolist()
        return seconds, float(np.mean([accuracy(c, s) for c, s in zip(cosine.tolist(), lengths, strict=True)]))

    counts = (1, 5) if tiny else (1, 3, 10, 30, 100, 300, 1000)
    epochs = (0, 1) if tiny else (0, 1, 2, 5, 10, 20, 50)
    return {
        "LoRe, 2 bases, Adam .1": [run(LoRe(2, ridge=1e-4, steps=t)) for t in counts],
        "MRM, 16 bases, exact inner": [run(signed(outer=replace(OUTER, epochs=t))) for t in epochs],
        "Hierarchical, whole fit": [run(Hierarchical(bend=0))],
    }


def convergence_figure(seeds: Sequence[int], tiny: bool, path: Path) -> list[str]:
    """Solvers against steps, EM against rounds, LoRe and MRM against seconds (those of one seed: clocks differ)."""
    steps, rounds, people = (STEPS[:4], 3, 20) if tiny else (STEPS, ROUNDS, 200)
    found = [gaps(seed, steps, people) for seed in seeds]
    floor = 1e-14
    solvers = [
        curve(name, steps[: len(found[0][name])], [[max(floor, v) for v in one[name]] for one in found], look)
        for look, name in enumerate(found[0])
    ]
    climbs = [evidence(seed, rounds, people) for seed in seeds]
    falls = max(max(a - b for a, b in pairwise(climb)) for climb in climbs)
    say("convergence: solvers and EM done")
    climbing = [curve("", range(rounds + 1), climbs, 0)]
    raced = races(seeds[0], tiny)
    seconds = [
        Line(name, [second for second, _ in points], [hit for _, hit in points], look=look)
        for look, (name, points) in enumerate(raced.items())
    ]
    panels = [
        Panel("one user's weights", "steps", "above the optimum, nats a user", solvers, log="xy"),
        Panel(
            "the population, by EM",
            "rounds",
            "log evidence less the true prior's, nats a user",
            climbing,
        ),
        Panel(
            "what is shared",
            "seconds of the fit",
            "accuracy, unseen users",
            seconds,
            log="x",
        ),
    ]
    draw(path, panels, "Distance from the optimum by steps, evidence by rounds of EM, and accuracy by seconds of LoRe and MRM.")
    lines = [row(["", *(f"{t} steps" for t in steps)]), row(["---"] + ["---:"] * len(steps))]
    for one in solvers:
        lines.append(row([f"{one.name}, nats above", *(f"{value:.1e}" for value in one.y)]))
    climb = np.mean(climbs, axis=0)
    picked = sorted({n for n in (0, 1, 2, 3, 5, 10, 20, rounds) if n <= rounds})
    lines += ["", "EM, log evidence less the true prior's: " + ", ".join(f"{climb[n]:+.4f} after {n}" for n in picked) + "."]
    lines.append(f"Largest fall from one round to the next: {max(0.0, falls):.1e} nats a user.")
    for name, points in raced.items():
        lines.append(f"{name}: " + ", ".join(f"{hit:.3f} after {seconds:.2f} s" for seconds, hit in points) + ".")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Draw the figure and tell its numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks convergence", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of worlds")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--tiny", action="store_true", help="small worlds: a check that it runs")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="folder of the results")
    parser.add_argument("--figures", type=Path, help="folder of the figure; by default that of --out")
    given = parser.parse_args(arguments)
    seeds = list(range(given.first_seed, given.first_seed + given.seeds))
    given.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(convergence_figure(seeds, given.tiny, (given.figures or given.out) / "convergence.svg"))
    (given.out / "convergence.md").write_text(text + "\n", encoding="utf-8")
    print(text)
