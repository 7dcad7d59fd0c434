"""What a robust objective does to the users who are served worst, and what it costs the others.

    python -m benchmarks robust --data polis FOLDER --data prism ROWS --data planted --seeds N --out DIR

Three ways of adapting, and in each only the objective of the outer loop differs: the start, the prior or inner loop, the splits
into support and query, the number of epochs and everybody's order are the same to the bit, and nothing is chosen.

| way                           | what it is                                                                       |
|-------------------------------|----------------------------------------------------------------------------------|
| signed weights, exact solve   | 16 bases, N(w0, I), 20 epochs of all users a step                                |
| mixture, five Adam steps      | 4 bases on the simplex, 20 epochs of all users a step                            |
| published                     | `MRM.faithful`: 2 bases, one step at 1e-3, 200 epochs of two users a step         |

`planted` is two groups on either side of a common reward, one of them a fifth of the users. The worst are each objective's own,
whoever they are; the groups are named by the world. Intervals are paired, over users and seeds.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from benchmarks.ablations import (
    OUTER,
    Arm,
    Draw,
    Source,
    arguments_of,
    kept,
    line,
    mixture,
    signed,
    sources,
    with_interval,
    write,
)
from palate.data.pairs import EmbeddedPairs
from palate.data.planted import two_groups
from palate.data.splits import Split
from palate.evaluation import Estimate, Evaluation, bootstrap
from palate.evaluation.metrics import WORST
from palate.evaluation.result import ALL, Shots
from palate.models.mrm import MRM
from palate.models.objectives import RPO, CVaR, Mean, Objective

OBJECTIVES: dict[str, Objective] = {
    "mean": Mean(),
    "RPO .5/.5": RPO(0.5, 0.5),
    "RPO .3/.1": RPO(0.3, 0.1),
    "RPO .1/0": RPO(0.1, 0.0),
    "RPO .5/.5, as published": RPO(0.5, 0.5, published=True),
    "CVaR .3": CVaR(0.3),
}
FEW = ("mean", "RPO .5/.5", "RPO .5/.5, as published")  # where a fit takes long
WAYS: dict[str, Callable[[Objective, int], MRM]] = {
    "signed weights, exact solve": lambda objective, epochs: signed(objective, outer=replace(OUTER, epochs=epochs)),
    "mixture, five Adam steps": lambda objective, epochs: mixture(objective, outer=replace(OUTER, epochs=epochs)),
    "published": lambda objective, epochs: MRM.faithful(objective=objective),
}
GROUPS = ("majority", "minority")
MINORITY = 0.2


def with_minority(tiny: bool) -> Source:
    """`two_groups` with most of one group left out; a user's id says which group they are of, and of which seed's world."""

    def draw(seed: int) -> tuple[EmbeddedPairs, Split]:
        world = two_groups(seed, n_users=20, n_train=8, n_test=8, dim=10) if tiny else two_groups(seed)
        parts = (world.train, world.test_seen, world.support, world.test_unseen)
        weights = (world.weights_seen, world.weights_seen, world.weights_unseen, world.weights_unseen)
        chosen, rejected, users, counts = [], [], [], [0]
        for part, own in zip(parts, weights, strict=True):
            few = (own[:, 0] < 0).numpy()
            most = round(MINORITY / (1 - MINORITY) * int((~few).sum()))
            stays = ~few | (np.cumsum(few) <= most)
            rows = torch.from_numpy(np.flatnonzero(stays[part.user_index.numpy()]))
            names = np.asarray([f"{GROUPS[int(few[u])]}, world {seed}, {name}" for u, name in enumerate(part.user_ids)])
            chosen.append(part.chosen[rows])
            rejected.append(part.rejected[rows])
            users.append(names[part.user_index[rows].numpy()])
            counts.append(counts[-1] + len(rows))
        left, right = torch.cat(chosen), torch.cat(rejected)
        # Every choice of this world has a prompt, and two answers, of its own.
        pairs = EmbeddedPairs(world.train.embeddings, left, right, np.concatenate(users), unit=left // 2)
        sides = [np.arange(a, b) for a, b in pairwise(counts)]
        return pairs, Split(sides[0], sides[1], sides[2], sides[3], "unit", seed, {}, {})

    return Source("planted, a minority of a fifth", draw)


def arms(draw: Draw, way: str, epochs: int, seed: int, *, tiny: bool) -> Iterator[Arm]:
    names = FEW if tiny or way == "published" else tuple(OBJECTIVES)
    yield *draw(seed), {name: WAYS[way](OBJECTIVES[name], epochs) for name in names}


def estimate(
    found: Evaluation,
    method: str,
    baseline: str | None,
    statistic: bootstrap.Statistic,
    *,
    shots: Shots = None,
    users: str = "",
) -> Estimate:
    """`statistic` of unseen users' accuracies, or its difference to the baseline's, over users whose id begins with `users`."""
    columns = found.columns
    asked = (columns["cohort"] == "unseen") & (columns["shots"] == (ALL if shots is None else shots))
    asked &= np.asarray([str(user).startswith(users) for user in columns["user"]])
    numbers: dict[str, int] = {}
    seeds = []
    for seed in found.seeds:
        sides = []
        for name in (method, baseline or method):
            rows = asked & (columns["seed"] == seed) & (columns["method"] == name)
            sides.append(dict(zip(columns["user"][rows].tolist(), columns["accuracy"][rows].tolist(), strict=True)))
        both = [user for user in sides[0] if user in sides[1]]
        if both:
            ids = np.asarray([numbers.setdefault(user, len(numbers)) for user in both])
            mine, theirs = (np.asarray([side[user] for user in both]) for side in sides)
            seeds.append(bootstrap.Seed(ids, mine, theirs if baseline else None))
    return bootstrap.interval(seeds, statistic)


def tables(found: Evaluation) -> list[str]:
    """The mean objective's mean, worst shares and, where the world names them, groups; and what the others gain or lose."""
    measures: dict[str, tuple[bootstrap.Statistic, Shots, str]] = {
        "mean": (bootstrap.mean, None, ""),
        **{f"worst {round(100 * q)} %": (bootstrap.worst(q), None, "") for q in WORST},
    }
    for few in (0, 1, 5):
        measures[f"mean after {few}"] = (bootstrap.mean, few, "")
        measures[f"worst 10 % after {few}"] = (bootstrap.worst(WORST[0]), few, "")
    for group in GROUPS:
        if any(str(user).startswith(group) for user in found.columns["user"]):
            measures |= {f"{group} after {few}": (bootstrap.mean, few, group) for few in (0, 5)}
            measures[group] = (bootstrap.mean, None, group)
    others = [name for name in found.methods if name != "mean"]
    lines = [line(["unseen users", "mean", *(f"{name}, minus mean" for name in others)])]
    lines.append(line(["---"] + ["---:"] * (1 + len(others))))
    for measure, (statistic, shots, users) in measures.items():
        gains = [estimate(found, name, "mean", statistic, shots=shots, users=users) for name in others]
        alone = estimate(found, "mean", None, statistic, shots=shots, users=users)
        lines.append(line([measure, f"{alone.value:.3f}", *(with_interval(gain) for gain in gains)]))
    return lines


def main(arguments: Sequence[str]) -> None:
    """Run every way on every data set named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks robust", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--way", action="append", choices=list(WAYS), help="may be given several times; all by default")
    parser.add_argument("--epochs", type=int, default=OUTER.epochs, help="of the first two ways")
    arguments_of(parser)
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    for source in sources(parser, given.data, given.out, given.tiny):
        source = with_minority(given.tiny) if source.name.startswith("planted") else source
        for way in given.way or WAYS:
            longer = "" if given.epochs == OUTER.epochs or way == "published" else f", {given.epochs} epochs"
            name = f"robust, {source.name}, {way}{longer}"
            found = kept(name, partial(arms, source.draw, way, given.epochs, tiny=given.tiny), seeds, given.out)
            write(name, found, tables(found), given.out, "Robust objectives")
    print((given.out / "summary.md").read_text(encoding="utf-8"))
