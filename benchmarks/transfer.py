"""Does a population learned on one data set serve users of another? Figure of docs/open-questions.md.

    python -m benchmarks transfer --convarg ROWS --prism ROWS --seeds N --out DIR [--figures docs/figures]

| where the unseen users are | fitted on                                                                                      |
|----------------------------|------------------------------------------------------------------------------------------------|
| PRISM                      | the seen users of PRISM, or those of ConvArg                                                     |
| ConvArg                    | the seen users of ConvArg, or those of PRISM                                                     |
| ConvArg, half of the topics | seen users' choices in these topics, or in the other half (drawn anew for every seed)            |

Both sets are embedded by `minilm`, once (DIR/tables), and prepared as in `palate bench`. An unseen user is always adapted from
their own choices where they are tested; only what is shared comes from elsewhere. After 0 choices it is the crowd's reward that
is transferred, after all of them the way people differ, too. Rows are in DIR/rows; seeds that are there are not run again.
`--tiny` takes a few users and cheap methods: a check that it runs.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.ablations import line, with_interval
from benchmarks.accuracy import encoder, say
from benchmarks.drawing import Line, Panel, draw
from palate.bench.protocols import RECIPES
from palate.data.pairs import EmbeddedPairs, PairSet
from palate.data.readers import load_valid_pairs
from palate.data.splits import Split, split, unit_labels
from palate.evaluation import Evaluation, evaluate
from palate.models.base import RewardModel
from palate.terminal import methods
from palate.training import fit

SHOTS = (0, 1, 5, 10, None)
METHODS = "bt,lore,pref,hierarchical"
HERE, THERE = "at home", "from elsewhere"


@dataclass(frozen=True)
class Set:
    """One data set, embedded, and the topic of every choice."""

    name: str
    pairs: PairSet
    embedded: EmbeddedPairs
    topic: NDArray[np.str_]

    def split(self, seed: int) -> Split:
        recipe = RECIPES[self.name]
        return split(self.pairs, by=recipe.unit(self.pairs), max_support=recipe.max_support, max_test=recipe.max_test, seed=seed)


def read(name: str, path: Path, spec: str, out: Path, users: int | None) -> Set:
    """The choices of a recipe; of its first `users` users where a number is given."""
    pairs = RECIPES[name].keep(load_valid_pairs(path)[0])
    if users is not None:
        pairs = pairs[pairs.user_index < users]
    embedded = encoder(spec, out / "tables").embed(pairs, unit=unit_labels(pairs, RECIPES[name].unit(pairs)))
    # A debate of ConvArg is "topic — side"; both sides belong to one topic.
    prompts = [str(pairs.texts[row].prompt).rpartition(" — ")[0] for row in pairs.chosen]
    return Set(name, pairs, embedded, np.asarray(prompts))


@dataclass(frozen=True)
class Arm:
    """Where users are tested, and the choices that what they share may be learned from, by where these are."""

    where: str
    support: EmbeddedPairs
    test: EmbeddedPairs
    learned_from: Mapping[str, EmbeddedPairs]


def arms(sets: Mapping[str, Set], seed: int) -> Iterator[Arm]:
    """All arms of one seed."""
    parts = {name: one.split(seed) for name, one in sets.items()}
    train = {name: one.embedded[torch.from_numpy(parts[name].train)] for name, one in sets.items()}
    for name, other in (("prism", "convarg"), ("convarg", "prism")):
        mine, sides = sets[name].embedded, parts[name]
        support, test = mine[torch.from_numpy(sides.support)], mine[torch.from_numpy(sides.test_unseen)]
        yield Arm(name, support, test, {HERE: train[name], THERE: train[other]})
    one, sides = sets["convarg"], parts["convarg"]
    topics = np.unique(one.topic)
    tested = np.isin(one.topic, np.random.default_rng([seed, 16]).permutation(topics)[: len(topics) // 2])
    inside, outside = (_rows(one, sides.train, mask) for mask in (tested, ~tested))
    fewer = min(len(inside), len(outside))  # as many choices at home as elsewhere
    learned_from = {HERE: _some(inside, fewer, seed), THERE: _some(outside, fewer, seed)}
    yield Arm(
        "convarg, half of the topics", _rows(one, sides.support, tested), _rows(one, sides.test_unseen, tested), learned_from
    )


def _rows(one: Set, rows: NDArray[np.int64], mask: NDArray[np.bool_]) -> EmbeddedPairs:
    return one.embedded[torch.from_numpy(rows[mask[rows]])]


def _some(data: EmbeddedPairs, count: int, seed: int) -> EmbeddedPairs:
    return data[torch.from_numpy(np.sort(np.random.default_rng([seed, 17]).permutation(len(data))[:count]))]


def tested(arm: Arm, models: Mapping[str, RewardModel], seed: int) -> Evaluation:
    """Every method, fitted at home and elsewhere, on the same users and choices."""
    found = []
    for source, data in arm.learned_from.items():
        for name, model in models.items():
            fitted = fit(data, model, seed=seed)
            for shots in SHOTS:
                label = f"{name}, {source}"
                found.append(
                    evaluate(
                        fitted, arm.support, arm.test, shots=shots, seed=seed, method=label, data_set=f"transfer, {arm.where}"
                    )
                )
    return Evaluation.concat(found)


def kept(sets: Mapping[str, Set], names: str, seeds: Sequence[int], out: Path) -> Evaluation:
    """Run the seeds whose rows are not there yet; give back those of all seeds under `out`."""
    folder = out / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        path = folder / f"transfer.seed{seed}.jsonl"
        if not path.exists():
            Evaluation.concat([tested(arm, methods(names), seed) for arm in arms(sets, seed)]).save(path)
            say(f"transfer, seed {seed}: done")
    paths = sorted(folder.glob("transfer.seed*[0-9].jsonl"), key=lambda path: int(path.stem.split("seed")[-1]))
    return Evaluation.concat([Evaluation.load(path) for path in paths])


def report(found: Evaluation, path: Path) -> list[str]:
    """A table and a panel for each place: accuracy against a new user's choices, at home (with markers) and from elsewhere."""
    lines: list[str] = [f"Seeds {', '.join(map(str, found.seeds))}."]
    panels = []
    for data_set in found.data_sets:
        here = found.where(data_set=data_set)
        names = [m.removesuffix(f", {HERE}") for m in here.methods if m.endswith(HERE)]
        head = [
            "method",
            f"0 choices, {HERE}",
            THERE,
            f"all, {HERE}",
            THERE,
            f"all, {THERE} minus {HERE}",
            f"{THERE}, all minus 0",
        ]
        lines += ["", f"{data_set.removeprefix('transfer, ')}:", "", line(head), line(["---"] + ["---:"] * (len(head) - 1))]
        drawn = []
        for look, name in enumerate(names):
            home, away = f"{name}, {HERE}", f"{name}, {THERE}"
            cells = [f"{here.interval(m, shots=n).value:.3f}" for n in (0, None) for m in (home, away)]
            moved = here.difference(away, away, shots=None, baseline_shots=0)
            lines.append(line([name, *cells, with_interval(here.difference(away, home)), with_interval(moved)]))
            for method, other in ((home, False), (away, True)):
                curve = [here.interval(method, shots=n) for n in SHOTS]
                x, y = list(range(len(SHOTS))), [e.value for e in curve]
                low, high = [e.low for e in curve], [e.high for e in curve]
                drawn.append(Line("", x, y, look=look, theory=True) if other else Line(name, x, y, low, high, look))
        ticks = ["all" if n is None else str(n) for n in SHOTS]
        title = f"{data_set.removeprefix('transfer, ')} (dashed: {THERE})"
        panels.append(Panel(title, "choices of the new user", "accuracy, unseen users", drawn, ticks=ticks))
    draw(path, panels, f"Accuracy on unseen users when what is shared was learned {HERE} and, dashed, {THERE}.")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Run what is missing, draw the figure, tell the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks transfer", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--convarg", type=Path, required=True, help="rows of ConvArg")
    parser.add_argument("--prism", type=Path, required=True, help="rows of the PRISM subset")
    parser.add_argument("--methods", help="as in `palate bench`")
    parser.add_argument("--seeds", type=int, default=5, help="number of splits")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--tiny", action="store_true", help="few users, cheap methods: a check that it runs")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="folder of the results")
    parser.add_argument("--figures", type=Path, help="folder of the figure; by default that of --out")
    given = parser.parse_args(arguments)
    spec, users = ("style", 40) if given.tiny else ("minilm", None)
    sets = {name: read(name, getattr(given, name), spec, given.out, users) for name in ("prism", "convarg")}
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    names = given.methods or ("bt,individual" if given.tiny else METHODS)
    found = kept(sets, names, list(seeds), given.out)
    print("\n".join(report(found, (given.figures or given.out) / "transfer.svg")))
