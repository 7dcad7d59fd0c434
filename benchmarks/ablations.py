"""The open questions of the methods, one at a time: one thing varies, everything else stays as it is.

    python -m benchmarks ablations --what NAME --data polis FOLDER --seeds N --out DIR

| NAME      | what varies                                                                                                     |
|-----------|-----------------------------------------------------------------------------------------------------------------|
| bases     | K = 1, 2, 4 ... 64 base rewards of MRM, PReF, LoRe and the default model, as LoRe's Table 6                      |
| data      | nested subsets of the seen users, and of each one's training choices, as PReF's figures 3 and 4                 |
| base      | the encoder: `style`, `minilm`, both, and `minilm` cut to 128, 64 and 16 principal components                   |
| inner     | MRM's inner rate and steps, outer rate, and how far the outer gradient looks through the inner loop             |
| rho-gamma | MRM's robust objective, rho x gamma, and the users a step, with clipping and without                            |
| meta      | MRM without the inner loop in training, with the robust objective, without training, without bases              |

Every setting is fitted on the same training choices and tested on the same unseen users; the first method is what the others
are measured against. `inner`, `rho-gamma` and `meta` vary a `Told` MRM, which chooses nothing for itself, so that nothing but the
setting differs. Files as in `accuracy`: rows a user after every seed, then a table from all rows under DIR. `--tiny` is a check
that it runs: small worlds, few settings.
"""

import argparse
import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.accuracy import encoder, of_busy_users, say
from palate.bench.protocols import one_table
from palate.data.embeddings import Dense
from palate.data.pairs import EmbeddedPairs, PairSet
from palate.data.planted import two_groups
from palate.data.readers import load_valid_pairs
from palate.data.splits import By, Split, nested_shots, split, unit_labels
from palate.data.synthetic import synthetic
from palate.evaluation import Estimate, Evaluation, compare
from palate.models.base import RewardModel
from palate.models.factored import BradleyTerry, LoRe
from palate.models.hierarchical import Hierarchical
from palate.models.meta import ExactSolve, GradientSteps, Inner, Outer
from palate.models.mrm import MRM
from palate.models.objectives import RPO, Mean, Objective
from palate.models.pref import PReF
from palate.models.ways import Choice

SHOTS = (0, 1, 5, None)
SIZES = (1, 2, 4, 8, 16, 32, 64)
COMPONENTS = (128, 64, 16)
OUTER = Outer(0.05, 256, 20, "constant", warmup=0.0, ridge=1e-3)  # the stronger pull and the most epochs of the fixed preset

Draw = Callable[[int], tuple[EmbeddedPairs, Split]]  # seed -> choices and what each may be used for
Arm = tuple[EmbeddedPairs, Split, dict[str, RewardModel]]


@dataclass(frozen=True)
class Source:
    """One data set. `encoded` is the same choices by another encoder, None where there are no texts."""

    name: str
    draw: Draw
    encoded: "Callable[[str], Source] | None" = None


class Study(Protocol):
    """All arms of one seed; `tiny` is for a check that it runs."""

    def __call__(self, source: Source, seed: int, *, tiny: bool) -> Iterator[Arm]: ...


class Told(MRM):
    """An MRM that does as it is told: bases, inner loop, objective and number of epochs are those given, and the start is that
    of the fixed preset. Nothing is chosen on held-out users, so two of them differ in nothing but their arguments."""

    def fitted(self, data: EmbeddedPairs, *, seed: int, progress: Callable[[float, str], None]) -> tuple[MRM, None]:
        if self.published or self.outer is None:
            return super().fitted(data, seed=seed, progress=progress)
        choice = Choice(self, data, seed, progress)
        choice.folds = 0  # nobody is asked
        state = choice.state({"options": self.options(), "seed": seed, "data": data.fingerprint()})
        plan = state.head["plan"] | {"epochs": self.outer.epochs if state.head["plan"]["shape"]["n_bases"] else 0}
        for epoch in self.epochs(data, seed=seed, state=replace(state, head=state.head | {"plan": plan})):
            last = epoch
        return last.model(), None


def signed(
    objective: Objective | None = None, *, inner: Inner | None = None, outer: Outer = OUTER, meta_learned: bool = True
) -> Told:
    """16 bases, weights of either sign, solved exactly."""
    solve = inner or ExactSolve()
    return Told(16, simplex=False, inner=solve, outer=outer, objective=objective, meta_learned=meta_learned)


def mixture(
    objective: Objective | None = None, *, inner: Inner | None = None, outer: Outer = OUTER, meta_learned: bool = True
) -> Told:
    """Four bases mixed on the simplex, five Adam steps from the common start."""
    steps = inner or GradientSteps(0.5, 5)
    return Told(4, simplex=True, inner=steps, outer=outer, objective=objective, meta_learned=meta_learned)


# -- data sets


def texts(name: str, pairs: PairSet, spec: str, by: By, out: Path, most: tuple[int | None, int | None]) -> Source:
    """Choices in text, embedded once."""

    @cache
    def embedded() -> EmbeddedPairs:
        return encoder(spec, out / "tables").embed(pairs, unit=unit_labels(pairs, "pair" if by == "item" else by))

    def draw(seed: int) -> tuple[EmbeddedPairs, Split]:
        return embedded(), split(pairs, by=by, max_support=most[0], max_test=most[1], seed=seed)

    return Source(f"{name}, {spec}", draw, lambda other: texts(name, pairs, other, by, out, most))


def polis(path: Path, out: Path) -> Source:
    return texts("polis", load_valid_pairs(path)[0], "items", "item", out, (40, 40))


def convarg(path: Path, out: Path) -> Source:
    pairs = load_valid_pairs(path)[0]
    return texts("convarg", of_busy_users(pairs[~pairs.tie], 20), "minilm+style", "pair", out, (60, 100))


def prism(path: Path, out: Path) -> Source:
    pairs = load_valid_pairs(path)[0]
    strict = pairs[~pairs.tie]
    return texts("prism", of_busy_users(strict, 4, strict.prompt_index), "minilm+style", "prompt", out, (None, None))


def made(name: str, out: Path, tiny: bool) -> Source:
    """`planted`: two groups on either side of a common reward; `synthetic`: answers of composed style."""
    if name == "synthetic":
        users, choices = (16, 12) if tiny else (200, 40)
        return texts("synthetic", synthetic(users, choices).pairs, "style", "conversation", out, (None, None))

    def draw(seed: int) -> tuple[EmbeddedPairs, Split]:
        return one_table(two_groups(seed, n_users=12, n_train=8, n_test=8, dim=10) if tiny else two_groups(seed), 2)

    return Source("planted, two groups", draw)


READ: dict[str, Callable[[Path, Path], Source]] = {"polis": polis, "convarg": convarg, "prism": prism}
MADE = ("planted", "synthetic")


def sources(parser: argparse.ArgumentParser, given: Sequence[Sequence[str]], out: Path, tiny: bool) -> Iterator[Source]:
    """The data sets named on the command line."""
    for name, *paths in given:
        if name not in (*READ, *MADE) or len(paths) != (name in READ):
            known = ", ".join([*(f"{n} PATH" for n in READ), *MADE])
            parser.error(f"--data {' '.join([name, *paths])}: expected one of {known}")
        yield READ[name](Path(paths[0]), out) if name in READ else made(name, out, tiny)


# -- what varies


def bases(source: Source, seed: int, *, tiny: bool) -> Iterator[Arm]:
    """Every method with at most K base rewards; what else it chooses, it chooses for itself."""
    sizes = SIZES[1:2] if tiny else SIZES
    methods: dict[str, RewardModel] = {"Bradley-Terry": BradleyTerry()}
    methods |= {f"MRM, K = {k}": MRM(k) for k in sizes} | {f"PReF, K = {k}": PReF(k) for k in sizes}
    methods |= {f"LoRe, K = {k}": LoRe(k) for k in sizes} | {f"Hierarchical, K <= {k}": Hierarchical(k) for k in sizes}
    yield *source.draw(seed), methods


def data(source: Source, seed: int, *, tiny: bool) -> Iterator[Arm]:
    """An eighth, a quarter, half and all of the seen users; 5, 10, 20 and all of each one's training choices."""
    pairs, parts = source.draw(seed)
    for users, choices in ((1.0, None), (0.5, None)) if tiny else nested_settings():
        train, owner = fewer(pairs, parts.train, users, choices, seed), _users(pairs)
        seen = parts.test_seen[np.isin(owner[parts.test_seen], owner[train])]
        label = f"{users:.3g} of the users x {'all' if choices is None else choices}"  # their number may differ by seed
        methods: dict[str, RewardModel] = {"Bradley-Terry": BradleyTerry(), "LoRe": LoRe(), "MRM": MRM(), "PReF": PReF()}
        methods["Hierarchical"] = Hierarchical()
        yield pairs, replace(parts, train=train, test_seen=seen), {f"{name}, {label}": model for name, model in methods.items()}


def nested_settings() -> tuple[tuple[float, int | None], ...]:
    """(share of the seen users, choices of each): everything first, then fewer users, then fewer choices."""
    return ((1.0, None), (0.5, None), (0.25, None), (0.125, None), (1.0, 20), (1.0, 10), (1.0, 5))


def fewer(pairs: EmbeddedPairs, train: NDArray[np.int64], users: float, choices: int | None, seed: int) -> NDArray[np.int64]:
    """Training rows of a share of the seen users, `choices` of each: fewer are always a part of more."""
    owner = _users(pairs)[train]
    known = np.random.default_rng([seed, 5]).permutation(np.unique(owner))
    kept = train[np.isin(owner, known[: max(2, round(users * len(known)))])]
    return kept if choices is None else kept[nested_shots(pairs[torch.from_numpy(kept)], choices, seed)]


def _users(pairs: EmbeddedPairs) -> NDArray[np.int64]:
    return np.asarray(pairs.user_index.cpu().numpy(), dtype=np.int64)


def base(source: Source, seed: int, *, tiny: bool) -> Iterator[Arm]:
    """Encoders of growing width. Principal components are those of the texts of the training choices."""
    if source.encoded is None:
        raise SystemExit(f"--what base: {source.name} has no texts to encode; expected choices in text, such as synthetic")

    def arm(pairs: EmbeddedPairs, parts: Split, name: str) -> Arm:
        label = f"{name}, D = {pairs.embeddings.shape[1]}"
        return pairs, parts, {f"Bradley-Terry, {label}": BradleyTerry(), f"Hierarchical, {label}": Hierarchical()}

    for spec in ("style",) if tiny else ("style", "minilm", "minilm+style"):
        pairs, parts = source.encoded(spec).draw(seed)
        yield arm(pairs, parts, spec)
        if spec == "minilm" or tiny:
            for count in (3,) if tiny else COMPONENTS:
                yield arm(components(pairs, parts, count), parts, f"{spec}, components")


def components(pairs: EmbeddedPairs, parts: Split, count: int) -> EmbeddedPairs:
    """The same choices with the leading principal components of the training texts as features."""
    train = torch.from_numpy(parts.train)
    rows = pairs.embeddings.rows(torch.unique(torch.cat([pairs.chosen[train], pairs.rejected[train]])))
    axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:count].T
    table = Dense(pairs.embeddings.project(axes))
    return EmbeddedPairs(table, pairs.chosen, pairs.rejected, pairs.users, tie=pairs.tie, weight=pairs.weight, unit=pairs.unit)


def inner_loop(source: Source, seed: int, *, tiny: bool) -> Iterator[Arm]:
    """One factor at a time around the mixture of the fixed preset, then the exact solve, then the published code."""
    rates, counts = ((0.5,), (5,)) if tiny else ((0.001, 0.01, 0.1, 0.5, 1.0), (1, 5, 20))
    tried = {f"Adam, rate {rate:g}, {n} steps": GradientSteps(rate, n) for rate in rates for n in counts}
    methods: dict[str, RewardModel] = {"Adam, rate 0.5, 5 steps": mixture()}  # what the others are measured against
    methods |= {name: mixture(inner=steps) for name, steps in tried.items()}
    methods["gradient descent, rate 5, 5 steps"] = mixture(inner=GradientSteps(5.0, 5, adam=False))
    methods["Adam, rate 0.5, 5 steps, first order"] = mixture(inner=GradientSteps(0.5, 5, second_order=False))
    if not tiny:
        methods["Adam, rate 0.1, 1 steps, first order"] = mixture(inner=GradientSteps(0.1, 1, second_order=False))
        for rate in (0.001, 0.01, 0.2):
            methods[f"outer rate {rate:g}"] = mixture(outer=replace(OUTER, rate=rate))
    methods["exact solve"] = signed()
    methods["exact solve, first order"] = signed(inner=ExactSolve(implicit=False))
    if not tiny:
        methods["published, rates 0.001"] = MRM.faithful()
        methods["published, rates 0.001, first order"] = MRM.faithful(second_order=False)
        methods["published, rates 0.005"] = MRM.faithful(inner_rate=5e-3, outer_rate=5e-3)
    yield *source.draw(seed), methods


def rho_gamma(source: Source, seed: int, *, tiny: bool) -> Iterator[Arm]:
    """The robust objective on the mixture: rho x gamma at all users a step, then smaller batches, clipped at 1 and not."""
    hard, smooth = ((0.5,), (0.5,)) if tiny else ((0.1, 0.3, 0.5, 0.8), (0.0, 0.1, 0.5, 2.0))
    methods: dict[str, RewardModel] = {"mean": mixture()}
    methods |= {f"RPO, rho {r:g}, gamma {g:g}": mixture(RPO(r, g)) for r in hard for g in smooth}
    methods["RPO, as published"] = mixture(RPO(0.5, 0.5, published=True))
    if not tiny:
        three: dict[str, Objective] = {"mean": Mean(), "RPO": RPO(), "RPO, as published": RPO(0.5, 0.5, published=True)}
        for batch in (2, 8, 32):
            outer = replace(OUTER, batch=batch, rate=0.01)
            methods |= {f"{name}, {batch} users a step": mixture(o, outer=outer) for name, o in three.items()}
        free = replace(OUTER, batch=8, rate=0.01, clip=1e9)
        methods |= {f"{name}, 8 users a step, no clipping": mixture(o, outer=free) for name, o in three.items()}
    yield *source.draw(seed), methods


def meta(source: Source, seed: int, *, tiny: bool) -> Iterator[Arm]:
    """What each part of MRM is worth."""
    still = replace(OUTER, epochs=0)
    methods: dict[str, RewardModel] = {"no bases": Told(0, simplex=False, inner=ExactSolve(), outer=OUTER)}
    for name, kind in {"exact": signed, "mixture": mixture}.items():
        methods[name] = kind()
        methods[f"{name}, with RPO"] = kind(RPO())
        methods[f"{name}, no meta-learning"] = kind(meta_learned=False)
        methods[f"{name}, the start, untrained"] = kind(outer=still)
    if not tiny:
        methods["MRM(), chosen on held-out users"] = MRM()
        methods["published"] = MRM.faithful()
        methods["published, no RPO"] = MRM.faithful(objective=Mean())
        methods["published, no meta-learning"] = MRM.faithful(meta_learned=False)
        methods["published, one base"] = MRM.faithful(1)
    yield *source.draw(seed), methods


STUDIES: dict[str, Study] = {"bases": bases, "data": data, "base": base, "inner": inner_loop}
STUDIES |= {"rho-gamma": rho_gamma, "meta": meta}


# -- running, keeping, telling


def kept(name: str, arms: Callable[[int], Iterable[Arm]], seeds: Iterable[int], out: Path) -> Evaluation:
    """Run every seed, keep its rows, and give back those of all seeds under `out`, in the order of the seeds."""
    folder, stem = out / "rows", file_stem(name)
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        found = []
        for pairs, parts, methods in arms(seed):
            found.append(compare(pairs, None, methods, by=lambda *_, p=parts: p, seeds=[seed], shots=SHOTS, data_set=name))
        one = Evaluation.concat(found)
        one.save(folder / f"{stem}.seed{seed}.jsonl")
        for failure in one.failures:
            say(f"{name}, seed {seed}: {failure.method} failed ({failure.stage}): {failure.message}")
        say(f"{name}, seed {seed}: {sum(run.fit_seconds or 0 for run in one.runs):.1f} s of fitting")
    paths = sorted(folder.glob(f"{stem}.seed*[0-9].jsonl"), key=lambda path: int(path.stem.split("seed")[-1]))
    return Evaluation.concat([Evaluation.load(path) for path in paths])


def file_stem(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_")


def write(name: str, found: Evaluation, lines: Sequence[str], out: Path, title: str) -> None:
    """The figures as `<name>.csv`, the lines as `<name>.md`, and `summary.md` from all of the latter."""
    rows = found.summary()
    with (out / f"{file_stem(name)}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    head = [f"## {name}", "", f"{len(found.seeds)} seeds ({min(found.seeds)} to {max(found.seeds)}).", ""]
    failed = [f"- failed: {f.method}, seed {f.seed}, {f.stage}: {f.message}" for f in found.failures]
    (out / f"{file_stem(name)}.md").write_text("\n".join([*head, *lines, "", *failed]) + "\n", encoding="utf-8")
    parts = [path.read_text(encoding="utf-8") for path in sorted(out.glob("*.md")) if path.name != "summary.md"]
    note = "Means over users, then over seeds; intervals are 95 %, over users and seeds, differences paired."
    (out / "summary.md").write_text(f"# {title}\n\n{note}\n\n" + "\n".join(parts), encoding="utf-8")


def table(found: Evaluation) -> list[str]:
    """One line a method: what it learned, how it fares, and what that is against the first."""
    first = found.methods[0]
    by = {(row["method"], row["cohort"], row["shots"]): row for row in found.summary()}
    weights = {method: sorted({run.n_weights for run in found.runs if run.method == method}) for method in found.methods}
    head = [
        "method",
        "weights",
        "shared numbers",
        "seen",
        "unseen",
        f"minus {first}",
        "after 1",
        "after 5",
        "worst tenth",
        "fit, s",
    ]
    lines = [line(head), line(["---"] + ["---:"] * (len(head) - 1))]
    for method in found.methods:
        if any((method, "unseen", shots) not in by for shots in (1, 5, None)):
            continue  # what failed is said below
        all_of, seen = by[method, "unseen", None], by.get((method, "seen", None))
        gain = "" if method == first or (first, "unseen", None) not in by else with_interval(found.difference(method, first))
        cells = [
            method,
            " to ".join(map(str, weights[method][:: max(1, len(weights[method]) - 1)])),
            f"{all_of['n_parameters']:,}",
            "" if seen is None else f"{seen['accuracy']:.3f}",
        ]
        cells += [f"{all_of['accuracy']:.3f}", gain, *(f"{by[method, 'unseen', n]['accuracy']:.3f}" for n in (1, 5))]
        lines.append(line([*cells, f"{all_of['worst_10']:.3f}", f"{all_of['fit_seconds'] or 0:.1f}"]))
    return lines


def with_interval(gain: Estimate) -> str:
    return f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """What the two commands have in common."""
    names = "polis FOLDER, convarg ROWS, prism ROWS, planted or synthetic; may be given several times"
    parser.add_argument("--data", nargs="+", action="append", required=True, metavar="NAME [PATH]", help=names)
    parser.add_argument("--seeds", type=int, default=5, help="number of splits")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--tiny", action="store_true", help="small worlds, few settings: a check that it runs")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="folder of the results")


def main(arguments: Sequence[str]) -> None:
    """Run the studies named on the command line on every data set."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ablations", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--what", action="append", required=True, choices=list(STUDIES), help="may be given several times")
    arguments_of(parser)
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    for source in sources(parser, given.data, given.out, given.tiny):
        for what in given.what:
            name = f"{what}, {source.name}" if what != "base" else f"base, {source.name.split(',')[0]}"
            found = kept(name, partial(STUDIES[what], source, tiny=given.tiny), seeds, given.out)
            write(name, found, table(found), given.out, "Ablations")
    print((given.out / "summary.md").read_text(encoding="utf-8"))
