"""What position bias does to a taste, and what is left of that once it is modelled.

    python -m benchmarks.exposure [--seeds 6]

People with w ~ N(0, I) pick among five responses x with rewards x . w. The responses stand in an order that follows their first
coordinate, with noise; positions have log-odds of their own, and a fifth of the people stops after each. `Exposure.fit` learns
from 200 people with 20 picks each; then one person with w = (0, 1, -1/2) makes 3000 picks, so that the estimate's own error is
small (.03) and its bias can be seen: a taste of 0 for what stands on top, and how much of the other two is left. "live" judges
unknown depths at the crowd, as a living profile does; "again" at the person's own weights, over and over.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

import palate
from palate.living.events import Picked
from palate.living.exposure import Exposure
from palate.living.population import Population
from palate.living.reading import Level
from palate.living.terms import Rewards, Terms

Floats = NDArray[np.float64]
LOG_ODDS = np.array([0.0, -0.6, -1.0, -1.3, -1.5])
STOP, ORDERED = 0.2, 1.5
TASTE = np.array([0.0, 1.0, -0.5])


def picks(w: Floats, n: int, rng: np.random.Generator, known: float) -> list[tuple[Picked, Rewards]]:
    """`n` picks, of which a share `known` says how far was looked."""
    out, m = [], len(LOG_ODDS)
    for i in range(n):
        x = rng.standard_normal((m, 3))
        x = x[np.argsort(-(ORDERED * x[:, 0] + rng.standard_normal(m)))]
        depth = min(int(rng.geometric(STOP)), m)
        odds = np.exp((x @ w + LOG_ODDS)[:depth])
        picked = int(rng.choice(depth, p=odds / odds.sum()))
        shown = tuple(f"{i}: {j}" for j in rng.integers(10**12, size=m))
        examined = depth if rng.random() < known else None
        out.append((Picked(prompt="", shown=shown, picked=picked, examined=examined), Rewards(np.zeros(m), x)))
    return out


def estimates(known: float, seed: int) -> tuple[Floats, Floats, dict[str, Floats], float]:
    """Log-odds, their standard errors, weights by way of reading, and seconds."""
    rng, eye = np.random.default_rng(seed), torch.eye(3)
    numbers = {
        "direction": torch.zeros(3),
        "bases": eye,
        "share": torch.ones(1),
        "means": torch.zeros(1, 3),
        "factors": eye[None],
    }
    model = palate.Hierarchical().like(numbers)
    population, level = Population.of(model), Level.of(model, torch.zeros(1, 3))
    histories = {str(u): picks(rng.standard_normal(3), 20, rng, known) for u in range(200)}
    began = time.perf_counter()
    exposure = Exposure.fit(histories, population, level)
    took, many = time.perf_counter() - began, picks(TASTE, 3000, rng, known)

    def weights(said: Sequence[tuple[Picked, Rewards]], how: Exposure, near: Floats | None = None) -> Floats:
        terms = [pick.terms(rewards, exposure=how, level=level, near=near) for pick, rewards in said]
        return population.start("one").update(Terms.concat(terms)).mean

    plain = weights([(pick.model_copy(update={"examined": None}), rewards) for pick, rewards in many], Exposure())
    live = again = weights(many, exposure)
    for _ in range(6):
        again = weights(many, exposure, again)
    return np.array(exposure.log_odds), np.array(exposure.std), {"ignored": plain, "live": live, "again": again}, took


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exposure")
    parser.add_argument("--seeds", type=int, default=6)
    seeds = parser.parse_args(arguments).seeds
    print("| depths known | error of log-odds, in std | reading | w, truly 0 1 -.5 (std over seeds) | seconds to fit |")
    print("|---|---|---|---|---|")
    for known in (1.0, 0.5, 0.0):
        found = [estimates(known, 100 + seed) for seed in range(seeds)]
        errors = np.array([(log_odds - LOG_ODDS)[1:] / std[1:] for log_odds, std, _, _ in found])
        for way in found[0][2]:
            w = np.array([by_way[way] for _, _, by_way, _ in found])
            shown = ", ".join(f"{m:.2f} ({s:.2f})" for m, s in zip(w.mean(0), w.std(0, ddof=1), strict=True))
            print(f"| {known:.0%} | {np.sqrt((errors**2).mean()):.2f} | {way} | {shown} | {np.mean([f[3] for f in found]):.1f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
