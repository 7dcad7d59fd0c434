"""What a well-chosen question is worth: unseen users, asked one question after another by every way of choosing.

    python -m benchmarks questions --data groups --data attributes --data polis FOLDER --seeds 20 --out DIR

For each seed of a world a model is fitted on the seen users, and the unseen users are asked, everybody at once. All ways share
the model, the estimator, the users, and the draws behind the answers.

| world | people | asked | answers | model |
|---|---|---|---|---|
| groups | `palate.synthetic`: 400 in three groups with spread | 300 pairs of a prompt each | Bradley-Terry | hierarchical |
| cloud | the same without groups: one Gaussian of ten weights | as above | Bradley-Terry | hierarchical |
| two-groups | `planted.two_groups`: 400 | 300 pairs | Bradley-Terry | hierarchical |
| attributes | PReF's 84 | 300 pairs | in both orders, as published | PReF |
| polis | as in `accuracy` | the user's own pairs, at most 40: questions with a known answer | their votes | hierarchical |

Tested are pairs of other texts: the planted ones by their true margins, Polis by held-out statements. A seed leaves
`rows/<world>.seed<n>.npz` as it is done (the curve of every user), so that seeds may be run in parts; `<world>.questions.csv` and
`questions.md` are made at the end from all rows under DIR. An empty DIR is a fresh start.

Beside these, `--data unsure` (what an "I can't say" is worth), `--data stopping` (how often the ranking is wrong where asking
stops) and `--data speed`.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palate import questions
from palate.adaptation import Profile, pair_design
from palate.alignment.best_of_n import choices, win_rate
from palate.bench.protocols import RECIPES, Texts
from palate.data.attributes import attributes
from palate.data.embeddings import Dense, Embeddings
from palate.data.pairs import EmbeddedPairs
from palate.data.planted import two_groups
from palate.data.readers import load_valid_pairs
from palate.data.synthetic import Population, synthetic
from palate.encoders import load_encoder
from palate.living.terms import Rewards
from palate.models.base import RewardModel
from palate.models.hierarchical import Hierarchical
from palate.models.pref import PReF
from palate.questions import Belief, Pool
from palate.questions.belief import explained
from palate.questions.unsure import said_of
from palate.training import fit

MEASURES = ("accuracy", "regret")
SHOWN = (0, 1, 2, 3, 4, 5, 6, 7, 10, 15, 20, 30, 40)
BASELINE = 10  # answers to random questions, against which the others are counted
REPEATS = 5  # draws of random questions, of which the mean counts
DRAWS = 2000
POOL, TESTED, TARGETS, CANDIDATES = 300, 400, 400, 16

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class World:
    """One seed of a data set: who is asked what. `wins` is the win rate (U,) of best of n under weights (U, T + 1, K)."""

    model: RewardModel
    pool: Pool
    truth: Tensor  # (U, Q)
    test: tuple[Pool, Tensor]
    targets: Pool  # pairs like those tested on, of none of the tested texts
    answers: questions.Answers
    user_ids: tuple[str, ...]
    allowed: Tensor | None = None
    wins: Callable[[Tensor], Tensor] | None = None
    candidates: tuple[Rewards, Tensor] | None = None  # 16 texts as the model sees them, and their true rewards (U, 16)


# -- worlds


def of_pairs(model: RewardModel, table: Embeddings, first: Tensor, second: Tensor) -> Pool:
    return Pool.of(model, EmbeddedPairs(table, first, second, ["nobody"] * len(first)))


def rewards_of(model: RewardModel, table: Embeddings, rows: Tensor) -> Rewards:
    offset, slopes = model.design(model.features(table.take(rows)))
    return Rewards(offset.double().numpy(), slopes.double().numpy())


def people(seed: int, population: Population) -> World:
    """Planted people of `palate.synthetic`: half are fitted on, the others asked; the style of every text is known."""
    data = synthetic(400, 40, population=population, seed=seed)
    pairs, table = data.pairs, Dense(torch.from_numpy(data.text_axes).float())
    seen = pairs.user_index < 200
    users = np.asarray(pairs.user_ids, dtype=object)[pairs.user_index[seen]]
    model = fit(EmbeddedPairs(table, pairs.chosen[seen], pairs.rejected[seen], users), Hierarchical(), seed=seed)
    rows = np.random.default_rng([seed, 1]).permutation(np.flatnonzero(~seen))[: POOL + TESTED + TARGETS]
    first, second = torch.from_numpy(pairs.chosen[rows]), torch.from_numpy(pairs.rejected[rows])
    swap = torch.from_numpy(np.random.default_rng([seed, 2]).random(len(rows)) < 0.5)
    first, second = torch.where(swap, second, first), torch.where(swap, first, second)
    difference = data.text_axes[first.numpy()] - data.text_axes[second.numpy()]
    truth = torch.from_numpy(data.weights[200:] @ difference.T).float()
    asked, tested, like = (slice(0, POOL), slice(POOL, POOL + TESTED), slice(POOL + TESTED, None))
    pool, test, targets = (of_pairs(model, table, first[part], second[part]) for part in (asked, tested, like))
    texts = torch.from_numpy(np.random.default_rng([seed, 4]).permutation(len(table))[:CANDIDATES])
    candidates = rewards_of(model, table, texts), torch.from_numpy(data.weights[200:] @ data.text_axes[texts.numpy()].T)
    tested_on = test, truth[:, tested]
    return World(model, pool, truth[:, asked], tested_on, targets, questions.noisy, pairs.user_ids[200:], candidates=candidates)


def groups_of_two(seed: int) -> World:
    """`planted.two_groups`: 200 unseen people on either side of a common reward."""
    data = two_groups(seed)
    model = fit(data.train, Hierarchical(), seed=seed)
    base = torch.cat([data.crowd[:, None], data.directions], dim=1)

    def part(pairs: EmbeddedPairs, n: int, stream: int) -> tuple[Pool, Tensor]:
        rng = np.random.default_rng([seed, stream])
        rows = torch.from_numpy(rng.permutation(len(pairs))[:n])
        swap = torch.from_numpy(rng.random(n) < 0.5)
        first = torch.where(swap, pairs.rejected[rows], pairs.chosen[rows])
        second = torch.where(swap, pairs.chosen[rows], pairs.rejected[rows])
        scores = pairs.embeddings.project(base)
        away = scores[first] - scores[second]
        return of_pairs(model, pairs.embeddings, first, second), away[:, 0] + data.weights_unseen @ away[:, 1:].T

    pool, truth = part(data.support, POOL, 1)
    targets, _ = part(data.train, TARGETS, 3)
    ids = tuple(map(str, range(len(truth))))
    return World(model, pool, truth, part(data.test_unseen, TESTED, 2), targets, questions.noisy, ids)


def of_attributes(seed: int) -> World:
    """PReF's 84 people, 24 of them unseen."""
    data = attributes(seed)
    model = fit(data.train, PReF((8, 16)), seed=seed)

    def pool(rows: Tensor) -> Pool:
        return of_pairs(model, data.embeddings, rows[:, 0], rows[:, 1])

    table = data.embeddings.rows(data.candidates.flatten()).reshape(*data.candidates.shape, -1)
    trained = torch.unique(torch.stack([data.train.chosen, data.train.rejected], dim=1).sort(1).values, dim=0)
    return World(
        model,
        pool(data.pool),
        data.margins(data.pool),
        (pool(data.test), data.margins(data.test)),
        pool(trained),
        questions.twice,
        tuple(wish.name for wish in data.unseen),
        wins=lambda weights: win_rate(choices(model, table, weights), data.rewards(data.candidates)),
        candidates=(
            rewards_of(model, data.embeddings, data.test.flatten()[:CANDIDATES]),
            data.rewards(data.test.flatten()[:CANDIDATES]),
        ),
    )


def of_polis(path: Path, least: int) -> Callable[[int], World]:
    """People of a Polis export with at least `least` pairs (agreed, disagreed) to be asked, of one half of their statements."""
    source = Texts("polis", load_valid_pairs(path)[0], RECIPES["polis"], load_encoder("items"))

    def world(seed: int) -> World:
        data, parts = source.draw(seed)
        train, support, test = (data[torch.from_numpy(rows)] for rows in (parts.train, parts.support, parts.test_unseen))
        model = fit(train, Hierarchical(), seed=seed)
        pairs_of = zip(support.user_ids, support.grouped().counts.tolist(), strict=True)
        ids = tuple(user for user, n in pairs_of if n >= least and user in test.user_ids)
        asked, truth = own(model, support, ids, seed)
        tested, expected = own(model, test, ids, seed + 1)
        offset, slopes = pair_design(model, train)
        like = torch.from_numpy(np.random.default_rng([seed, 3]).permutation(len(offset))[:TARGETS])
        targets = Pool(slopes[like], offset[like])
        return World(model, asked, truth, (tested, expected), targets, questions.certain, ids, allowed=truth != 0)

    return world


def own(model: RewardModel, data: EmbeddedPairs, ids: Sequence[str], seed: int) -> tuple[Pool, Tensor]:
    """Each user's own pairs, either way round at random, as a padded pool; margins are +-1, and 0 where there is no pair."""
    offset, slopes = pair_design(model, data)
    index, real = data.grouped().padded(torch.tensor([data.user_ids.index(user) for user in ids]))
    side = torch.randint(0, 2, index.shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0
    truth = side * real
    return Pool(slopes[index] * truth[..., None], offset[index] * truth), truth


# -- ways


class Way(NamedTuple):
    question: questions.Question
    first_random: bool = False
    at_once: int = 1


@dataclass(frozen=True, eq=False)
class Knowing:
    """No way, a yardstick: somebody who knows the truth asks, one by one, whatever moves the predictions furthest towards it.

    E_y of the share of the test pairs that would be told rightly after the answer, with the true probabilities of y and the mean
    E[w | y] of the Gaussian belief.
    """

    world: World

    def score(self, belief: Belief, pool: Pool, generator: torch.Generator) -> Tensor:
        assert belief.covariance is not None
        test, truth = self.world.test
        margin, variance = pool.margins(belief.mean), belief.spread(pool).clamp(min=1e-9)
        share, now = explained(margin, variance), test.margins(belief.mean)
        chance = torch.sigmoid(margin / (1 + torch.pi / 8 * variance).sqrt()).clamp(1e-6, 1 - 1e-6)
        likely = (
            torch.sigmoid(self.world.truth) if self.world.answers is not questions.certain else (self.world.truth > 0).float()
        )
        step = (share / variance).sqrt()
        out = torch.empty_like(margin)
        for u in range(len(margin)):
            mine, theirs = (part.slopes if part.slopes.ndim == 2 else part.slopes[u] for part in (pool, test))
            towards = (mine @ belief.covariance[u] @ theirs.T) * step[u][:, None]  # (Q, n)
            told = []
            for odds in (((1 - chance) / chance).sqrt(), -(chance / (1 - chance)).sqrt()):  # answer 1, answer 0
                right = torch.sign(now[u] + odds[u][:, None] * towards) * truth[u].sign()
                told.append(right.sum(1))
            out[u] = likely[u] * told[0] + (1 - likely[u]) * told[1]
        return out


def ways(world: World) -> dict[str, Way]:
    """Every way of choosing, random first."""
    return {
        "random": Way(questions.Random()),
        "PReF, as published": Way(questions.HessianUncertainty(), first_random=True),
        "PReF, with a prior (information gain)": Way(questions.InformationGain()),
        "mutual information": Way(questions.MutualInformation()),
        "mutual information, five at once": Way(questions.MutualInformation(), at_once=5),
        "targeted": Way(questions.Targeted(world.targets)),
        "Thompson": Way(questions.Thompson()),
        "D-optimal": Way(questions.DOptimal()),
        "asked by who knows the truth": Way(Knowing(world)),
    }


def one_seed(world: World, n_questions: int, seed: int) -> dict[str, dict[str, Floats]]:
    """Curves (U, T + 1) of every way and measure."""
    out = {}
    for name, way in ways(world).items():
        runs = []
        for repeat in range(REPEATS if name == "random" else 1):
            found = questions.ask(
                world.model,
                world.pool,
                world.truth,
                way.question,
                n_questions,
                test=world.test,
                answers=world.answers,
                user_ids=world.user_ids,
                first_random=way.first_random,
                allowed=world.allowed,
                at_once=way.at_once,
                seed=seed + 1000 * repeat,
            )
            curves = {"accuracy": found.accuracy, "regret": found.regret}
            runs.append(curves | ({} if world.wins is None else {"win rate of best of n": world.wins(found.weights)}))
        out[name] = {key: np.mean([run[key].double().numpy() for run in runs], axis=0) for key in runs[0]}
    return out


# -- figures


def answers_needed(curve: Floats, level: float) -> float:
    """Answers until `curve` (T + 1,) reaches `level`, linear between whole answers; T + 1 where it never does."""
    above = np.flatnonzero(curve >= level)
    if not len(above):
        return float(len(curve))
    t = int(above[0])
    return 0.0 if t == 0 else t - 1 + float((level - curve[t - 1]) / (curve[t] - curve[t - 1]))


def drawn_means(curves: Sequence[Sequence[Floats]]) -> list[Floats]:
    """(DRAWS + 1, T + 1) means of several ways' curves, (U, T + 1) for each seed: as they are, then over bootstrap draws.

    A draw takes seeds with replacement, and users with replacement within each (Davison and Hinkley 1997, section 3.8), the same
    for all ways.
    """
    rng, seeds = np.random.default_rng(0), len(curves[0])
    out = [np.zeros((DRAWS + 1, curves[0][0].shape[1])) for _ in curves]
    means = []
    for seed in range(seeds):
        users = len(curves[0][seed])
        share = rng.multinomial(users, np.full(users, 1 / users), size=DRAWS) / users
        means.append([np.concatenate([way[seed].mean(0)[None], share @ way[seed]]) for way in curves])
    picked = rng.integers(seeds, size=(DRAWS, seeds))
    for w, target in enumerate(out):
        stacked = np.stack([mean[w] for mean in means])  # (seeds, DRAWS + 1, T + 1)
        target[0] = stacked[:, 0].mean(0)
        target[1:] = stacked[picked.T, np.arange(1, DRAWS + 1)].mean(0)
    return out


def with_interval(values: Floats) -> tuple[float, float, float]:
    """The first of `values`, and the 95 % interval of the others."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return float(values[0]), float(low), float(high)


def needed_with_interval(ours: Sequence[Floats], random: Sequence[Floats]) -> tuple[float, float, float]:
    """Answers after which `ours` is where `random` is after `BASELINE`, with a 95 % bootstrap interval over seeds and users."""
    mine, base = drawn_means([ours, random])
    return with_interval(np.array([answers_needed(curve, level) for curve, level in zip(mine, base[:, BASELINE], strict=True)]))


def summary(name: str, curves: dict[str, dict[str, list[Floats]]]) -> list[str]:
    """Lines of Markdown about one world, from the curves (U, T + 1) of every way, measure and seed."""
    random = curves["random"]
    seeds, stages = len(random["accuracy"]), random["accuracy"][0].shape[1]
    shown = [t for t in SHOWN if t < stages]
    users = np.mean([len(curve) for curve in random["accuracy"]])
    lines = [f"## {name}", "", f"{seeds} seeds, {users:.0f} unseen users each; brackets are 95 % bootstrap intervals.", ""]
    lines += [f"| way | answers worth {BASELINE} random ones | accuracy after 5, minus random | after {BASELINE}, minus random |"]
    lines += ["|---|---|---|---|"]
    for way, found in curves.items():
        if way == "random":
            continue
        mine, base = drawn_means([found["accuracy"], random["accuracy"]])
        needed = "{:.1f} [{:.1f}, {:.1f}]".format(*needed_with_interval(found["accuracy"], random["accuracy"]))
        gains = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*with_interval(mine[:, t] - base[:, t])) for t in (5, BASELINE)]
        lines.append(f"| {way} | {needed} | {gains[0]} | {gains[1]} |")
    for measure in (name for name in random if name != "regret"):  # which tells the same, and is in the rows
        lines += ["", f"{measure.capitalize()} after so many answers:", ""]
        lines += ["| way | " + " | ".join(map(str, shown)) + " |", "|---|" + "---:|" * len(shown)]
        for way, found in curves.items():
            mean = np.mean([curve.mean(0) for curve in found[measure]], axis=0)
            lines.append(f"| {way} | " + " | ".join(f"{mean[t]:.3f}" for t in shown) + " |")
    return [*lines, ""]


# -- "I can't say"


def unsure_lines(seeds: Sequence[int]) -> list[str]:
    """Accuracy after ten questions, and the likelihood of the next choice, when an "I can't say" is a tie of some weight."""
    weights = (0.0, 0.25, 0.5, 1.0)
    lines = ["## I can't say", "", f"Planted groups, {len(seeds)} seeds, {BASELINE} questions by information gain.", ""]
    lines += ["| people, who could not say | told by | " + " | ".join(f"tie of {weight:g}" for weight in weights) + " |"]
    lines += ["|---|---|" + "---:|" * len(weights)]
    worlds = [people(seed, Population()) for seed in seeds]
    kinds: dict[str, questions.Answers] = {
        "when the two are close (threshold 1)": questions.Undecided(1.0),
        "by chance (one in four)": questions.Distracted(0.25),
    }
    for kind, how in kinds.items():
        accuracy, evidence, silent = [], [], []
        for seed, world in zip(seeds, worlds, strict=True):
            world = replace(world, answers=how)
            runs = [
                questions.ask(
                    world.model,
                    world.pool,
                    world.truth,
                    questions.InformationGain(),
                    BASELINE,
                    test=world.test,
                    answers=how,
                    unsure=weight,
                    seed=seed,
                )
                for weight in weights
            ]
            accuracy.append([float(run.accuracy[:, -1].mean()) for run in runs])
            silent.append(float(torch.isnan(runs[0].answer).double().mean()))
            first = runs[0]
            found = questions.evidence_of_unsure(world.model, world.pool, first.question, first.answer, weights=weights)
            evidence.append(list(found.values()))
        kind = f"{kind}: {np.mean(silent):.0%}"
        lines.append(f"| {kind} | accuracy | " + " | ".join(f"{value:.4f}" for value in np.mean(accuracy, axis=0)) + " |")
        lines.append(
            "| | log-likelihood of the next choice | " + " | ".join(f"{value:.4f}" for value in np.mean(evidence, axis=0)) + " |"
        )
    return [*lines, ""]


# -- stopping


def stopping_lines(seeds: Sequence[int], error: float = 0.1, most: int = 60) -> list[str]:
    """How many are asked until the best of 16 is settled, and how often it changes with all further answers, or is not the best.

    The first is what `should_stop` states. The second has in it, too, what the fitted model cannot see of a reward, which no
    answer puts right. At most 40 users a seed.
    """
    lines = ["## Stopping", "", f"Best of 16 candidates, at most {most} questions by information gain, {len(seeds)} seeds.", ""]
    lines += [f"| people | stated error | changed after {most} | not the true best | stopped | asked | best without asking |"]
    lines += ["|---|" + "---:|" * 6]
    made: dict[str, Callable[[int], World]] = {
        "groups": lambda seed: people(seed, Population()),
        "attributes": of_attributes,
    }
    for name, make in made.items():
        wrong, changed, asked, before, stopped = [], [], [], [], []
        for seed in seeds:
            world = make(seed)
            assert world.candidates is not None
            candidates, true = world.candidates
            best = true.argmax(1).tolist()
            found = questions.ask(
                world.model, world.pool, world.truth, questions.InformationGain(), most, answers=world.answers, seed=seed
            )
            going, taken = list(range(0, len(best), -(-len(best) // 40))), {}
            for t in range(most + 1):
                said = said_of(world.pool, found.question[:, :t], found.answer[:, :t], 0.0)
                solved = world.model.inference.solve(said, world.model.prior, world.user_ids)
                assert solved.covariance is not None
                for u in list(going):
                    profile = Profile(world.user_ids[u], solved.mean[u], solved.covariance[u], t, True, "")
                    state = questions.settled(profile, candidates, draws=1024)
                    if t == 0:
                        before.append(state.best == best[u])
                    if state.wrong_best <= error or t == most:
                        going.remove(u)
                        asked.append(t)
                        stopped.append(state.wrong_best <= error)
                        taken |= {u: state.best} if stopped[-1] else {}
            last = torch.from_numpy(candidates.offset) + found.weights[:, -1].double() @ torch.from_numpy(candidates.slopes).T
            wrong += [choice != best[u] for u, choice in taken.items()]
            changed += [choice != int(last[u].argmax()) for u, choice in taken.items()]
        shares = f"{np.mean(changed):.3f} | {np.mean(wrong):.3f} | {np.mean(stopped):.0%} | {np.mean(asked):.1f}"
        lines.append(f"| {name} | {error:.2f} | {shares} | {np.mean(before):.2f} |")
    return [*lines, ""]


# -- speed


def speed_lines(seeds: Sequence[int]) -> list[str]:
    """Milliseconds of one user's next question among 1,000 pairs with 16 weights."""
    draw = torch.Generator().manual_seed(seeds[0])
    factor = torch.randn(16, 16, generator=draw)
    profile = Profile("ada", torch.randn(16, generator=draw), factor @ factor.T / 16, 10, True, "")
    pool = Pool(torch.randn(1000, 16, generator=draw), torch.randn(1000, generator=draw))
    candidates = Rewards(pool.offset[:CANDIDATES].numpy(), pool.slopes[:CANDIDATES].numpy())
    targets = Pool(pool.slopes[:TARGETS], pool.offset[:TARGETS])
    rules = (questions.MutualInformation(), questions.InformationGain(), questions.Targeted(targets), questions.Thompson())
    calls: dict[str, Callable[[], object]] = {
        type(rule).__name__: lambda rule=rule: questions.next_questions(profile, pool, rule) for rule in rules
    }
    calls["MutualInformation, five at once"] = lambda: questions.next_questions(profile, pool, n=5)
    calls["MutualInformation, 100 asked before"] = lambda: questions.next_questions(profile, pool, asked=range(100))
    calls["should_stop, 16 candidates"] = lambda: questions.should_stop(profile, candidates)
    lines = [
        "## Speed",
        "",
        "One user, 1,000 pairs, 16 weights, one thread: milliseconds.",
        "",
        "| call | processor, mean | clock, median | clock, p90 |",
        "|---|---:|---:|---:|",
    ]
    for name, call in calls.items():
        taken, cpu = [], time.process_time()
        for _ in range(220):
            began = time.perf_counter()
            call()
            taken.append(1000 * (time.perf_counter() - began))
        mean, late = 1000 * (time.process_time() - cpu) / len(taken), taken[20:]
        lines.append(f"| {name} | {mean:.2f} | {np.median(late):.2f} | {np.quantile(late, 0.9):.2f} |")
    return [*lines, ""]


def main(arguments: Sequence[str]) -> None:
    """Run the worlds named on the command line and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks questions", description=(__doc__ or "").split("\n")[0])
    known = "groups, cloud, two-groups, attributes, polis FOLDER, unsure, stopping or speed"
    parser.add_argument(
        "--data", nargs="+", action="append", required=True, metavar="NAME [PATH]", help=f"{known}; several times"
    )
    parser.add_argument("--seeds", type=int, default=20, help="number of worlds")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--questions", type=int, default=15, help="answers of each user")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="folder of the results")
    given = parser.parse_args(arguments)
    made: dict[str, Callable[[int], World]] = {
        "groups": lambda seed: people(seed, Population()),
        "cloud": lambda seed: people(seed, Population(groups=1, spread=1.0)),
        "two-groups": groups_of_two,
        "attributes": of_attributes,
    }
    extra = {"unsure": unsure_lines, "stopping": stopping_lines, "speed": speed_lines}
    given.out.mkdir(parents=True, exist_ok=True)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    for name, *paths in given.data:
        if (name not in made and name not in extra and name != "polis") or len(paths) != (name == "polis"):
            parser.error(f"--data {' '.join([name, *paths])}: expected one of {known}")
        if name in extra:
            lines = extra[name](seeds)
        else:
            lines = run(
                name,
                of_polis(Path(paths[0]), given.questions) if name == "polis" else made[name],
                seeds,
                given.questions,
                given.out,
            )
        (given.out / f"{name}.questions.md").write_text("\n".join(lines), encoding="utf-8")
    parts = [path.read_text(encoding="utf-8") for path in sorted(given.out.glob("*.questions.md"))]
    text = "# Questions\n\n" + "\n".join(parts)
    (given.out / "questions.md").write_text(text, encoding="utf-8")
    print(text)


def run(name: str, make: Callable[[int], World], seeds: Sequence[int], n_questions: int, out: Path) -> list[str]:
    """Every seed of one world, each left under `out` as it is done; returns the tables of all seeds that are there."""
    for seed in seeds:
        began, cpu = time.perf_counter(), time.process_time()
        world = make(seed)
        curves = one_seed(world, n_questions, seed)
        path = out / "rows" / f"{name}.seed{seed}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        named = {f"{way}|{measure}": curve for way, by in curves.items() for measure, curve in by.items()}
        np.savez(path, **named)
        took = f"{time.perf_counter() - began:.1f} s ({time.process_time() - cpu:.1f} s of a processor)"
        told = f"{name}, seed {seed}: {took}, {world.model.n_weights} weights, {len(world.truth)} users"
        print(told, file=sys.stderr, flush=True)
    return tables(name, out)


def tables(name: str, out: Path) -> list[str]:
    """`<world>.questions.csv`, and the tables, from every seed of a world under `out`."""
    paths = {int(path.stem.split("seed")[-1]): path for path in out.glob(f"rows/{name}.seed*.npz")}
    found: dict[str, dict[str, list[Floats]]] = {}
    with (out / f"{name}.questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "way", "measure", "answers", "mean"])
        for seed in sorted(paths):
            with np.load(paths[seed], allow_pickle=False) as rows:
                for key in rows.files:
                    way, measure = key.split("|")
                    found.setdefault(way, {}).setdefault(measure, []).append(rows[key])
                    writer.writerows([seed, way, measure, t, float(value)] for t, value in enumerate(rows[key].mean(0)))
    return summary(name, found)
