"""The floor under a personal ranking: whether its probability is right, and what it saves and costs.

    python -m benchmarks floor --seeds 4 [--polis FOLDER] --out DIR [--figures docs/figures]

Planted people, whose true rewards say exactly how much better or worse a personal ranking is than the crowd's; and Polis, where
held-out votes say it with noise. The model is fitted on seen users; the floor on one half of the unseen ones, for the people of
the other half, and the other way round. `unguarded` models are fitted with a fixed kappa, so that nothing but this floor keeps
them from personalising where there is nothing to personalise. Leaves `floor.csv` (a row a person), `floor.md` and `floor.svg`.
"""

import argparse
import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.accuracy import encoder, say
from benchmarks.drawing import Line, Panel, draw
from palate import likelihood
from palate.adaptation import adapt, pair_design
from palate.bench.protocols import RECIPES
from palate.data.embeddings import Dense
from palate.data.pairs import EmbeddedPairs
from palate.data.planted import one_crowd, two_groups
from palate.data.readers import load_valid_pairs
from palate.data.splits import split
from palate.living.floor import Floor
from palate.models.base import RewardModel
from palate.models.hierarchical import Hierarchical
from palate.training import fit

Floats = NDArray[np.float64]

BINS = (0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
THRESHOLDS = (0.3, 0.5, 0.7)
DRAWS = 2000
Z = 1.96
FEWEST = 30  # people of a point of the figure


class World(NamedTuple):
    """Choices to fit on, choices of new people, and what a personal margin gains each of them over the crowd's on the test."""

    train: EmbeddedPairs
    support: EmbeddedPairs
    test: EmbeddedPairs
    truth: Floats  # (P,) true margins of the test pairs; infinite where all that is known is what was chosen


class Person(NamedTuple):
    world: str
    seed: int
    chance: float
    gain: float  # accuracy of the personal ranking, less the crowd's


def unguarded(kappa: float) -> RewardModel:
    return Hierarchical(4, kappa=kappa, types=(), bend=0, blend=False)


def gaussian(seed: int, *, like_crowd: float, n_users: int = 200, n_train: int = 10, n_test: int = 60) -> World:
    """People in four directions of their own, of which a share `like_crowd` has none: w ~ N(0, I) or 0."""
    rng = np.random.default_rng(seed)
    frame = np.linalg.qr(rng.standard_normal((32, 5)))[0]
    weights = rng.standard_normal((2 * n_users, 4)) * (rng.random((2 * n_users, 1)) >= like_crowd)
    rewards = frame[:, 0] + weights @ frame[:, 1:].T
    each = n_train + n_test
    person = np.repeat(np.arange(2 * n_users), each)
    table = rng.standard_normal((2 * len(person), 32))
    margin = ((table[::2] - table[1::2]) * rewards[person]).sum(1)
    wins = rng.random(len(margin)) < 1 / (1 + np.exp(-margin))
    left = np.arange(0, len(table), 2)
    ids = [f"u{p:04d}" for p in person.tolist()]
    data = EmbeddedPairs(
        Dense(torch.from_numpy(table).float()), np.where(wins, left, left + 1), np.where(wins, left + 1, left), ids
    )
    early, seen = np.arange(len(person)) % each < n_train, person < n_users
    rows = seen & early, ~seen & early, ~seen & ~early
    parts = (data[torch.from_numpy(np.flatnonzero(mask))] for mask in rows)
    return World(*parts, np.where(wins, margin, -margin)[rows[2]])


def planted(seed: int, make: Callable[..., object], n_train: int = 10) -> World:
    """A world of `palate.data.planted`, with its true margins."""
    made = make(seed, n_train=n_train, n_test=60)
    base = torch.cat([made.crowd[:, None], made.directions], dim=1)  # type: ignore[attr-defined]
    test: EmbeddedPairs = made.test_unseen  # type: ignore[attr-defined]
    scores = test.embeddings.project(base).double()
    apart = scores[test.chosen] - scores[test.rejected]
    weights = made.weights_unseen.double()[test.user_index]  # type: ignore[attr-defined]
    truth = apart[:, 0] + (apart[:, 1:] * weights).sum(1)
    return World(made.train, made.support, test, truth.numpy())  # type: ignore[attr-defined]


def polis(seed: int, folder: Path, out: Path) -> World:
    recipe = RECIPES["polis"]
    pairs = recipe.keep(load_valid_pairs(folder)[0])
    data = encoder("items", out / "tables").embed(pairs)
    parts = split(pairs, by=recipe.unit(pairs), max_support=recipe.max_support, max_test=recipe.max_test, seed=seed)
    train, support, test = (data[torch.from_numpy(rows)] for rows in (parts.train, parts.support, parts.test_unseen))
    return World(train, support, test, np.full(len(test), np.inf))


def people(name: str, seed: int, world: World, model: RewardModel) -> Iterator[Person]:
    """The stated probability and the true gain of every new person. Nobody where the fit found no differences."""
    fitted = fit(world.train, model, seed=seed)
    if not fitted.n_weights:
        say(f"{name}, seed {seed}: the fit keeps the crowd's reward")
        return
    profiles = adapt(fitted, world.support)
    offset, slopes = (part.double().numpy() for part in pair_design(fitted, world.test))
    right = likelihood.probability(torch.from_numpy(world.truth)).numpy()  # how often the chosen one would be chosen again
    crowd = fitted.crowd_weights.double().numpy()
    fresh = world.support.user_ids
    for half in (0, 1):
        floor = Floor.fit(fitted, world.support.of_users(fresh[half::2]))
        for user in fresh[1 - half :: 2]:
            rows = (world.test.users == user).nonzero()[0]
            if not len(rows):
                continue
            chance = floor.better_than_crowd(profiles[user])
            tells = [np.sign(offset[rows] + slopes[rows] @ w) for w in (profiles[user].mean.double().numpy(), crowd)]
            gain = ((tells[0] - tells[1]) / 2 * (2 * right[rows] - 1)).mean()
            yield Person(name, seed, chance, float(gain))


def with_interval(values: Floats) -> str:
    """Mean in points with a 95 % bootstrap interval over people."""
    drawn = values[np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{100 * values.mean():+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def summary(found: Sequence[Person]) -> list[str]:
    """Lines of Markdown: gains with and without a floor, then stated against realised."""
    worlds = dict.fromkeys(person.world for person in found)
    lines = ["# The floor", "", "Points of accuracy over the crowd's reward, 95 % intervals over people.", ""]
    lines += [
        "| world | people | better | stated | always personal | "
        + " | ".join(f"floor {t}" for t in THRESHOLDS)
        + " | used at .5 |"
    ]
    lines += ["|---|" + "---:|" * (len(THRESHOLDS) + 5)]
    for world in worlds:
        chance, gain = (np.array([p[i] for p in found if p.world == world]) for i in (2, 3))
        better = ((gain > 0) + 0.5 * (gain == 0)).mean()
        floors = [with_interval(np.where(chance >= t, gain, 0.0)) for t in THRESHOLDS]
        cells = [
            str(len(gain)),
            f"{better:.2f}",
            f"{chance.mean():.2f}",
            with_interval(gain),
            *floors,
            f"{(chance >= 0.5).mean():.2f}",
        ]
        lines.append(f"| {world} | " + " | ".join(cells) + " |")
    lines += ["", "Stated against realised share for whom the personal ranking is better (equal ones count half).", ""]
    lines += ["| world | stated | people | mean stated | realised | gain, points |", "|---|---|---:|---:|---:|---:|"]
    for world in worlds:
        chance, gain = (np.array([p[i] for p in found if p.world == world]) for i in (2, 3))
        place = np.digitize(chance, BINS[1:-1])
        for b in np.unique(place):
            mine = place == b
            better = ((gain[mine] > 0) + 0.5 * (gain[mine] == 0)).mean()
            stated = f"{BINS[b]}-{BINS[b + 1]} | {mine.sum()} | {chance[mine].mean():.3f}"
            cells = f"{stated} | {better:.3f} | {100 * gain[mine].mean():+.2f}"
            lines.append(f"| {world} | {cells} |")
    return lines


def figure(found: Sequence[Person], path: Path) -> None:
    """The realised share against the stated one, with a 95 % interval (Wilson) where a bin has people enough."""
    worlds = list(dict.fromkeys(person.world for person in found))
    told = [world for world in worlds if "nobody" not in world and "polis" not in world]
    panels = []
    for title, shown in (
        ("planted people who differ", told),
        ("nobody differs, and Polis", [w for w in worlds if w not in told]),
    ):
        lines = [Line("as stated", (0, 1), (0, 1), look=5, theory=True)]
        for world in shown:
            look = (0, 1, 2, 3, 4, 6, 7)[len(lines) - 1]
            chance, gain = (np.array([p[i] for p in found if p.world == world]) for i in (2, 3))
            place = np.digitize(chance, BINS[1:-1])
            full = [place == b for b in np.unique(place) if (place == b).sum() >= FEWEST]
            n = np.array([mine.sum() for mine in full])
            share = np.array([((gain[mine] > 0) + 0.5 * (gain[mine] == 0)).mean() for mine in full])
            middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
            half = Z * np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
            stated = [float(chance[mine].mean()) for mine in full]
            lines.append(Line(world, stated, share.tolist(), (middle - half).tolist(), (middle + half).tolist(), look=look))
        panels.append(Panel(title, "probability stated", "share whom it truly serves better", lines))
    draw(path, panels, "Share of people whom the personal ranking serves better, against the probability that was stated.")


def main(arguments: Sequence[str]) -> None:
    """Run the seeds and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks floor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of worlds")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--polis", type=Path, help="a Polis export")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="folder of the results")
    parser.add_argument("--figures", type=Path, help="folder of the figure; by default that of --out")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    found: list[Person] = []
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        worlds = {
            "people differ, 10 choices": (gaussian(seed, like_crowd=0), unguarded(1)),
            "half are the crowd, 10 choices": (gaussian(seed, like_crowd=0.5), unguarded(1)),
            "half are the crowd, 30 choices": (gaussian(seed, like_crowd=0.5, n_train=30), unguarded(1)),
            "two groups, 10 choices": (planted(seed, two_groups), Hierarchical()),
            "nobody differs, 10 choices, unguarded": (planted(seed, one_crowd), unguarded(1)),
            "nobody differs, 30 choices, kappa 4, unguarded": (planted(seed, one_crowd, 30), unguarded(4)),
        }
        if given.polis is not None:
            votes = polis(seed, given.polis, given.out)
            worlds |= {"polis": (votes, Hierarchical()), "polis, unguarded": (votes, unguarded(1))}
        for name, (world, model) in worlds.items():
            found += people(name, seed, world, model)
        say(f"seed {seed} done")
    with (given.out / "floor.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Person._fields)
        writer.writerows(found)
    figure(found, (given.figures or given.out) / "floor.svg")
    text = "\n".join(summary(found)) + "\n"
    (given.out / "floor.md").write_text(text, encoding="utf-8")
    print(text)
