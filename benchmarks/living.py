"""Live profiles: what an update costs, whether any history is its batch, and how soon a taste that moved is found again.

    python -m benchmarks living --parts speed,histories,drift,change,flips --seeds 3 --out DIR

`histories` draws random updates, undos and corrections with Hypothesis and compares the profile with an independent float64 solve
(scipy) of what is left. `drift` fits the default model on planted users of whom some drift, learns the half-life from these, and
moves other users to another group's taste in the middle of their choices. `change` counts false alarms on users who stay and the
delay on users who move. `flips` gives noisy feedback to a model of clean users. Leaves `living.md`.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from palate.data.pairs import EmbeddedPairs
from palate.data.synthetic import Population as People
from palate.data.synthetic import SyntheticData, synthetic
from palate.living.flips import Flips
from palate.living.learning import learn_flip_rate, learn_half_life
from palate.living.population import Population
from palate.living.profile import LiveProfile
from palate.living.terms import Rewards, Terms
from palate.models.base import RewardModel
from palate.models.hierarchical import Hierarchical
from palate.training import fit

Floats = NDArray[np.float64]
DRAWS = 1000
RESTART = "a new start at a change"
SEEN = 200  # users of whom the model and the half-life are learned
BEFORE, AFTER = 40, 120  # choices of a user before and after the move
WATCHED = 40  # of those after it, for change detection and for users who stay
ASKED = 5  # choices between two looks for a change


def line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def with_types(k: int, types: int, rng: np.random.Generator) -> Hierarchical:
    """A model over k + 1 features with a mixture of Gaussians of so many types."""
    root = rng.standard_normal((types, k, k))
    covariances = torch.from_numpy(root @ root.swapaxes(1, 2) / k + 0.1 * np.eye(k))
    whole = torch.eye(k + 1, dtype=torch.float64)
    numbers = {"direction": whole[0], "bases": whole[:, 1:], "factors": torch.linalg.cholesky(covariances)}
    numbers |= {"means": torch.from_numpy(rng.standard_normal((types, k))), "frequencies": torch.zeros(k + 1, 0)}
    return Hierarchical().like({**numbers, "share": torch.full((types,), 1 / types, dtype=torch.float64)})


# -- speed


def speed() -> list[str]:
    """Microseconds of processor time of an update (median and 99th percentile of 300), of change(), and bytes of a profile."""
    rng, rows = np.random.default_rng(0), []
    for types in (1, 4):
        for k in (8, 10, 16, 32):
            population, w = Population.of(with_types(k, types, rng)), rng.standard_normal(k)
            erring = Population.of(population.model, flip_rate=Flips.beta(0.05, 5.0))
            for n in (5, 50, 200):
                slopes = rng.standard_normal((n + 1, k))
                slopes *= np.sign(slopes @ w + rng.logistic(size=n + 1))[:, None]
                said, last = Terms.pairs(np.zeros(n), slopes[:n]), Terms.pairs(np.zeros(1), slopes[n:])
                live, wary = population.start("u").update(said), erring.start("u").update(said)
                took = [timed(lambda live=live, last=last: live.update(last)) for _ in range(300)]
                flips = [timed(lambda wary=wary, last=last: wary.update(last)) for _ in range(30)]
                read = [timed(lambda live=live, of=population: of.from_bytes(live.to_bytes())) for _ in range(100)]
                micro = [np.median(took), np.quantile(took, 0.99), np.median(flips), np.median(read)]
                rows.append(line([types, k, n, *(f"{1e6 * value:.0f}" for value in micro), len(live.to_bytes())]))
    head = ["types", "K", "choices", "update, us", "p99", "with 8 flip rates", "to and from bytes, us", "bytes"]
    return ["## One update", "", line(head), line(["---:"] * len(head)), *rows]


def timed(run: object) -> float:
    assert callable(run)
    began = time.process_time()  # of this process alone: other work on the machine is not counted
    run()
    return time.process_time() - began


# -- sequential is batch


def histories(count: int) -> list[str]:
    """The largest distance between a profile after random updates, undos and corrections and scipy's answer for what is left."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    rng, worst, sizes = np.random.default_rng(0), [0.0], []
    model = with_types(3, 1, rng)
    population, mean = Population.of(model), model.means[0].numpy()
    precision = np.linalg.inv((model.factors[0] @ model.factors[0].T).numpy())
    offset, slopes = rng.standard_normal(40), 1.5 * rng.standard_normal((40, 3))
    step = st.tuples(st.sampled_from(["update", "update", "undo", "correct"]), st.integers(0, 39), st.integers(0, 10**6))

    @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(step, min_size=1, max_size=30))
    def check(steps: list[tuple[str, int, int]]) -> None:
        live, inside = population.start("u"), {}
        for kind, row, which in steps:
            said = Terms.pairs(offset[row : row + 1], slopes[row : row + 1])
            if kind == "update" or not inside:
                live = live.update(said)
                inside[live.event_ids[-1]] = row
                continue
            name = list(inside)[which % len(inside)]
            live = live.undo(name) if kind == "undo" else live.correct(name, said)
            inside.pop(name) if kind == "undo" else inside.update({name: row})
        sizes.append(len(steps))
        left = sorted(inside.values())
        if not left:
            assert not live.mean.any()
            return
        x, o = slopes[left], offset[left]

        def loss(w: Floats) -> tuple[float, Floats]:
            m, away = o + x @ w, w - mean
            value = -log_expit(m).sum() + away @ precision @ away / 2
            return float(value), -x.T @ expit(-m) + precision @ away

        def bend(w: Floats) -> Floats:
            m = o + x @ w
            return np.asarray((x.T * (expit(m) * expit(-m))) @ x + precision)

        best = minimize(loss, mean, jac=True, hess=bend, method="trust-exact", options={"gtol": 1e-11}).x
        distance = float(max(np.abs(live.mean - best).max(), np.abs(live.covariance - np.linalg.inv(bend(best))).max()))
        worst[0] = max(worst[0], distance)
        assert distance < 1e-6, (steps, distance)

    check()
    said = (
        f"{len(sizes)} histories of {np.mean(sizes):.1f} steps on average: largest distance {worst[0]:.1e} (mean and covariance)"
    )
    return ["## Sequential and batch", "", said]


# -- planted users who move


class World(NamedTuple):
    """A model of planted users, the truth behind the rest of them, and test pairs."""

    data: SyntheticData
    model: RewardModel
    seen: EmbeddedPairs
    rewards: Rewards  # of every text
    tests: NDArray[np.int64]  # (2, n)
    rng: np.random.Generator


def world(seed: int, drift: float, users: int) -> World:
    data = synthetic(SEEN + users, 40, population=People(groups=4, separation=1.5, spread=0.5, drift=drift), seed=seed)
    table = torch.from_numpy(data.text_axes).float()
    mine = data.pairs[data.pairs.user_index < SEEN]
    seen = EmbeddedPairs(table, mine.chosen, mine.rejected, mine.users)
    model = fit(seen, Hierarchical(), seed=seed)
    rng = np.random.default_rng(seed)
    first = rng.integers(len(table), size=600)
    tests = np.stack([first, (first + rng.integers(1, len(table), size=600)) % len(table)])
    return World(data, model, seen, Population.of(model).rewards(table), tests, rng)


def chosen(of: World, w: Floats) -> Terms:
    """One choice of somebody with weights w between two random texts."""
    axes, rng = of.data.text_axes, of.rng
    i = int(rng.integers(len(axes)))
    j = int((i + rng.integers(1, len(axes))) % len(axes))
    if rng.random() > expit((axes[i] - axes[j]) @ w):
        i, j = j, i
    offset, slopes = of.rewards
    return Terms.pairs(offset[i : i + 1] - offset[j : j + 1], slopes[i : i + 1] - slopes[j : j + 1])


def accuracy(of: World, live: LiveProfile, w: Floats) -> float:
    """Share of the test pairs of which the profile prefers the one that somebody with weights w does."""
    i, j = of.tests
    margin = of.rewards.offset[i] - of.rewards.offset[j] + (of.rewards.slopes[i] - of.rewards.slopes[j]) @ live.mean
    return float((np.sign(margin) == np.sign((of.data.text_axes[i] - of.data.text_axes[j]) @ w)).mean())


def tastes(of: World, moves: bool) -> list[tuple[Floats, Floats]]:
    """Weights before and after of each user whom the model does not know: a user of another group, or the same."""
    data, out = of.data, []
    for user in range(SEEN, len(data.weights)):
        other = int(of.rng.choice(np.flatnonzero(data.groups != data.groups[user]))) if moves else user
        out.append((data.weights[user], data.weights[other]))
    return out


def recovery(curves: Floats) -> float:
    """Choices after the move until the mean curve of (users, choices) is within a point of where it was before; inf for never."""
    mean = curves.mean(0)
    back = np.flatnonzero(mean[BEFORE:] >= mean[BEFORE - 1] - 0.01)
    return float(back[0] + 1) if len(back) else np.inf


def drift(seeds: Sequence[int], users: int) -> list[str]:
    """Accuracy of users who move and of users who stay, with and without the half-life that the seen users taught."""
    curves: dict[tuple[bool, str], list[Floats]] = {}
    learned = []
    for seed in seeds:
        of = world(seed, 0.5, users)
        found = learn_half_life(of.model, of.seen)
        learned.append(found.value)
        never = Population.of(of.model)
        ways = {"nothing forgotten": never, "learned half-life": Population.of(of.model, half_life_choices=found.value)}
        ways[RESTART] = never
        for moves in (True, False):
            for before, after in tastes(of, moves):
                live = {name: population.start("u") for name, population in ways.items()}
                path: dict[str, list[float]] = {name: [] for name in ways}
                for n in range(BEFORE + (AFTER if moves else WATCHED)):
                    said = chosen(of, before if n < BEFORE else after)
                    for name in ways:
                        live[name] = live[name].update(said)
                        if name == RESTART and n % ASKED == 0:
                            noticed = live[name].change()
                            live[name] = live[name].since(str(noticed.when)) if noticed.moved else live[name]
                        path[name].append(accuracy(of, live[name], before if n < BEFORE else after))
                for name in ways:
                    curves.setdefault((moves, name), []).append(np.asarray(path[name]))
    lines = [
        f"## Drift: {len(seeds)} seeds, {users} users each, moved after {BEFORE} choices; half-lives learned {learned}",
        "",
        line(
            [
                "way",
                "before",
                "1 after",
                "10",
                "20",
                "40",
                "120",
                "choices to recover",
                "stays: at 40",
                "at 80",
                "loss to nothing forgotten",
            ]
        ),
        line(["---"] + ["---:"] * 10),
    ]
    rng = np.random.default_rng(0)
    for name in ("nothing forgotten", "learned half-life", RESTART):
        moved, still, base = (np.stack(curves[key]) for key in ((True, name), (False, name), (False, "nothing forgotten")))
        drawn = [recovery(moved[rng.integers(len(moved), size=len(moved))]) for _ in range(DRAWS)]
        lost = 100 * (base - still)[:, 20:].mean(1)
        ends = np.quantile([lost[rng.integers(len(lost), size=len(lost))].mean() for _ in range(DRAWS)], [0.025, 0.975])
        low, high = np.quantile(drawn, [0.025, 0.975], method="nearest")
        at = [f"{moved.mean(0)[BEFORE - 1 + n]:.3f}" for n in (0, 1, 10, 20, 40, 120)]
        back = f"{recovery(moved):.0f} [{low:.0f}, {high:.0f}]"
        loss = f"{lost.mean():.2f} [{ends[0]:.2f}, {ends[1]:.2f}] points"
        lines.append(line([name, *at, back, f"{still.mean(0)[BEFORE - 1]:.3f}", f"{still.mean(0)[-1]:.3f}", loss]))
    return lines


def change(seeds: Sequence[int], users: int) -> list[str]:
    """False alarms among users who stay, asked after every fifth choice, and how late a move is seen."""
    alarms, delays, dated = 0, [], []
    for seed in seeds:
        of = world(seed, 0.0, users)
        population = Population.of(of.model)
        for moves in (False, True):
            for before, after in tastes(of, moves):
                live = population.start("u")
                for n in range(BEFORE + WATCHED):
                    live = live.update(chosen(of, before if n < BEFORE else after), event_id=str(n))
                    if n % ASKED or (moves and n < BEFORE):
                        continue
                    seen = live.change()
                    if seen.moved:
                        alarms += not moves
                        if moves:
                            delays.append(n + 1 - BEFORE)
                            dated.append(abs(int(seen.when or 0) - BEFORE))
                        break
    n = len(seeds) * users
    return [
        "## Change of taste, run length 1000 choices",
        "",
        f"{n} users who stay, {BEFORE + WATCHED} choices each: {alarms} false alarms (bound: one in 1000 choices).",
        f"{n} users who move after {BEFORE}: seen for {len(delays)} within {WATCHED} choices, median delay "
        f"{np.median(delays or [np.nan]):.0f} choices, median error of the date {np.median(dated or [np.nan]):.0f}.",
    ]


def flips(seeds: Sequence[int], users: int) -> list[str]:
    """Accuracy after noisy choices, of a model of clean users, with no flip rate, the true one, and what is learned."""
    rows: dict[tuple[float, str], list[float]] = {}
    learned: dict[float, list[float]] = {}
    for seed in seeds:
        of = world(seed, 0.0, users)
        for rate in (0.0, 0.1, 0.2):
            turned = of.rng.random(len(of.seen)) < rate
            sides = torch.from_numpy(turned)
            first = torch.where(sides, of.seen.rejected, of.seen.chosen)
            second = torch.where(sides, of.seen.chosen, of.seen.rejected)
            noisy = EmbeddedPairs(of.seen.embeddings, first, second, of.seen.users)
            taught = learn_flip_rate(of.model, noisy.of_users(noisy.user_ids[:60])).flips
            learned.setdefault(rate, []).append(taught.mean)
            ways = {"none": Flips(), "the true one": Flips.of(rate), "learned": taught, "a user's own": Flips.beta(0.1, 5.0)}
            live = {name: Population.of(of.model, flip_rate=way) for name, way in ways.items()}
            for taste, _ in tastes(of, False):
                said = []
                for _ in range(20):
                    one = chosen(of, taste)
                    said.append(one._replace(target=one.target[::-1]) if of.rng.random() < rate else one)
                for name, population in live.items():
                    rows.setdefault((rate, name), []).append(
                        accuracy(of, population.start("u").update(Terms.concat(said)), taste)
                    )
    lines = [
        "## People who err: accuracy after 20 choices",
        "",
        line(["flip rate", "learned", "none", "the true one", "learned", "a user's own"]),
    ]
    lines.append(line(["---:"] * 6))
    for rate, means in learned.items():
        cells = [f"{np.mean(rows[rate, name]):.4f}" for name in ("none", "the true one", "learned", "a user's own")]
        lines.append(line([rate, f"{np.mean(means):.3f}", *cells]))
    return lines


def main(arguments: Sequence[str]) -> None:
    """Run the parts and write their tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks living", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", default="speed,histories,drift,change,flips", help="which parts, with commas")
    parser.add_argument("--seeds", type=int, default=3, help="number of planted worlds")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--users", type=int, default=40, help="users of each world whom the model does not know")
    parser.add_argument("--histories", type=int, default=10_000, help="random histories")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="folder of the results")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    parts = {"speed": speed, "histories": lambda: histories(given.histories)}
    parts |= {
        name: lambda run=run: run(seeds, given.users) for name, run in (("drift", drift), ("change", change), ("flips", flips))
    }
    text = ["# Live profiles"]
    given.out.mkdir(parents=True, exist_ok=True)
    for part in given.parts.split(","):
        found = parts[part]()
        print("\n".join(found), "\n", flush=True)
        text += ["", *found]
        (given.out / "living.md").write_text("\n".join(text) + "\n", encoding="utf-8")
