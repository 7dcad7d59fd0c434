"""How good the methods are: the protocols by which this library's accuracy is stated, as one command per data set.

    python -m benchmarks accuracy --data polis FOLDER --data convarg ROWS --data prism ROWS --data planted --seeds 10 --out DIR

| data  | users                        | halves of a user            | at most        | encoders                             |
|-------|------------------------------|-----------------------------|----------------|--------------------------------------|
| polis | 20 votes, 4 of either kind   | statements                  | 40 + 40 pairs  | items                                |
| convarg | 20 strict choices          | pairs, ties left out        | 60 + 100 pairs | minilm, minilm+style, items+minilm   |
| prism | 4 prompts                    | prompts                     | -              | minilm, minilm+style                 |
| planted | two groups, one crowd, simplex types | given by the generator | -         | vectors                              |

Half of the users are unseen. Texts are encoded once; the table of the sentence encoder is kept under DIR/tables. A case leaves
`rows/<case>.seed<n>.jsonl` (a row a user) after every seed; `<case>.seeds.csv` (a row a seed) and `summary.md` are made at its
end from all rows under DIR, so seeds may be run in parts, one after the other or side by side. An empty DIR is a fresh start.
"""

import argparse
import csv
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from palate.bench.protocols import RECIPES, one_table, personalllm
from palate.bench.protocols import of_busy_users as of_busy_users  # other scripts take it from here
from palate.data.embeddings import Dense, Embeddings
from palate.data.pairs import Text
from palate.data.planted import Planted, one_crowd, two_groups
from palate.data.readers import load_valid_pairs
from palate.encoders import Encoder, JoinedEncoder, State, load_encoder
from palate.evaluation import Estimate, Evaluation, compare
from palate.models.base import RewardModel
from palate.terminal import methods as methods_named

SHOTS = (0, 1, 2, 5, 10, None)
FEW = (0, 1, 2, 5)
METHODS = "bt,lore,hierarchical"
SPECS = {"polis": ("items",), "convarg": ("minilm", "minilm+style", "items+minilm"), "prism": ("minilm", "minilm+style")}

Draw = Callable[[dict[str, RewardModel], int], Evaluation]
World = Callable[[int], Planted]


@dataclass(frozen=True)
class Case:
    """One row of the protocol: `draw(methods, seed)` splits, fits and tests once. `truth` is what the planted rewards reach."""

    name: str
    draw: Draw
    truth: Callable[[int], float] | None = None


class Remembered(Encoder):
    """Another encoder whose tables are computed once and kept: in memory, a dense one also in `folder` where one is given."""

    def __init__(self, inner: Encoder, folder: Path | None = None):
        self.inner, self.spec, self.names, self.folder = inner, inner.spec, inner.names, folder
        self._tables: dict[str, Embeddings] = {}

    def state(self) -> State:
        return self.inner.state()

    def encode(self, texts: Sequence[Text]) -> Embeddings:
        digest = hashlib.sha256(self.inner.fingerprint.encode())
        for text in texts:
            digest.update(repr(tuple(text)).encode("utf-8", "surrogatepass"))
        key = digest.hexdigest()
        if key not in self._tables:
            path = None if self.folder is None else self.folder / f"{self.spec}-{key[:16]}.npy"
            if path is not None and path.exists():
                self._tables[key] = Dense(torch.from_numpy(np.load(path, allow_pickle=False)))
            else:
                self._tables[key] = table = self.inner.encode(texts)
                if path is not None and isinstance(table, Dense):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    partial = path.with_suffix(".partial.npy")
                    np.save(partial, np.asarray(table.table))
                    partial.replace(path)
        return self._tables[key]


def encoder(spec: str, folder: Path) -> Encoder:
    """As `load_encoder`, every part remembered, the sentence encoder's table also in `folder`."""
    parts = [Remembered(load_encoder(name), folder if name == "minilm" else None) for name in spec.split("+")]
    return parts[0] if len(parts) == 1 else JoinedEncoder(parts)


def polis(path: Path, out: Path) -> Iterator[Case]:
    """A user's statements are halved; up to 40 pairs (agreed, disagreed) are drawn inside either half."""
    yield from _cases("polis", path, out)


def convarg(path: Path, out: Path) -> Iterator[Case]:
    """Strict choices of users with at least 20 of them, in random halves."""
    yield from _cases("convarg", path, out)


def prism(path: Path, out: Path) -> Iterator[Case]:
    """Users with at least 4 prompts; their prompts are halved."""
    yield from _cases("prism", path, out)


def _cases(name: str, path: Path, out: Path) -> Iterator[Case]:
    recipe = RECIPES[name]
    pairs = recipe.keep(load_valid_pairs(path)[0])
    for spec in SPECS[name]:
        features, label = encoder(spec, out / "tables"), f"{name}, {spec}"

        def draw(models: dict[str, RewardModel], seed: int, features: Encoder = features, label: str = label) -> Evaluation:
            return compare(
                pairs,
                features,
                models,
                by=recipe.unit(pairs),
                seeds=[seed],
                shots=SHOTS,
                max_support=recipe.max_support,
                max_test=recipe.max_test,
                data_set=label,
            )

        yield Case(label, draw)


def planted() -> Iterator[Case]:
    """Three worlds whose best accuracy is known."""
    worlds: dict[str, tuple[World, int]] = {
        "two groups": (two_groups, 2),
        "one crowd": (one_crowd, 2),
        "simplex types, alpha .001": (partial(personalllm, 0.001), 8),
        "simplex types, alpha .1": (partial(personalllm, 0.1), 8),
    }
    for name, (world, n_answers) in worlds.items():

        def draw(
            models: dict[str, RewardModel], seed: int, name: str = name, world: World = world, n: int = n_answers
        ) -> Evaluation:
            data, parts = one_table(world(seed), n)
            return compare(data, None, models, by=lambda *_: parts, seeds=[seed], shots=SHOTS, data_set=name)

        def truth(seed: int, world: World = world) -> float:
            return world(seed).oracle_unseen

        yield Case(name, draw, truth)


CASES: dict[str, Callable[[Path, Path], Iterator[Case]]] = {"polis": polis, "convarg": convarg, "prism": prism}


def run(case: Case, names: str, seeds: Sequence[int], out: Path) -> None:
    """Every seed of a case, written after each; says on standard error what it costs."""
    for seed in seeds:
        began = time.perf_counter()
        found = case.draw(methods_named(names), seed)
        rows = out / "rows" / f"{stem(case)}.seed{seed}.jsonl"
        rows.parent.mkdir(parents=True, exist_ok=True)
        found.save(rows)
        for failure in found.failures:
            say(f"{case.name}, seed {seed}: {failure.method} failed ({failure.stage}): {failure.message}")
        fits = ", ".join(f"{r.method} {r.fit_seconds:.1f}" for r in found.runs if r.fit_seconds is not None)
        say(f"{case.name}, seed {seed}: {time.perf_counter() - began:.1f} s (fit: {fits})")
    write_summary(out, case)


def stem(case: Case) -> str:
    return case.name.replace(", ", "-").replace(" ", "_")


def per_seed(evaluation: Evaluation) -> list[dict[str, object]]:
    """One row a seed, method, cohort and number of choices."""
    out: list[dict[str, object]] = []
    for seed in evaluation.seeds:
        kept = (
            "data_set",
            "method",
            "cohort",
            "shots",
            "n_users",
            "n_support",
            "accuracy",
            "worst_10",
            "floor_10",
            "log_loss",
            "auc",
        )
        for row in evaluation.where(seed=seed).summary():
            out.append({"seed": seed} | {name: row[name] for name in kept} | {"fit_seconds": row["fit_seconds"]})
    return out


def write_summary(out: Path, case: Case) -> None:
    """Replace this case's part of `summary.md` and its rows a seed, from every seed under `out`."""
    paths = out.glob(f"rows/{stem(case)}.seed*[0-9].jsonl")
    evaluation = Evaluation.concat(
        [Evaluation.load(path) for path in sorted(paths, key=lambda path: int(path.stem.split("seed")[-1]))]
    )
    seeds = evaluation.seeds
    rows = per_seed(evaluation)
    with (out / f"{stem(case)}.seeds.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [f"## {case.name}", ""]
    truth = "" if case.truth is None else f" The planted rewards reach {np.mean([case.truth(s) for s in seeds]):.3f} unseen."
    lines += [f"{len(seeds)} seeds ({min(seeds)} to {max(seeds)}).{truth}", ""]
    lines += [*_main_table(evaluation), "", *_few_shot(evaluation), ""]
    lines += [f"- failed: {f.method}, seed {f.seed}, {f.stage}: {f.message}" for f in evaluation.failures]
    (out / f"{stem(case)}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "summary.md").write_text(
        "# Accuracy\n\nMeans over users, then over seeds; intervals are 95 %, over users and seeds, differences paired.\n\n"
        + "\n".join(path.read_text(encoding="utf-8") for path in sorted(out.glob("*.md")) if path.name != "summary.md"),
        encoding="utf-8",
    )


def _main_table(evaluation: Evaluation) -> list[str]:
    base = "bt" if "bt" in evaluation.methods else evaluation.methods[0]
    figures = {(r["method"], r["cohort"]): r for r in evaluation.summary() if r["shots"] is None}
    head = [
        "method",
        "cohort",
        "accuracy",
        f"minus {base}",
        "worst decile",
        f"minus {base}",
        "log loss",
        "parameters",
        "users",
        "choices",
        "fit, s",
    ]
    lines = [_line(head), _line(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for (method, cohort), row in figures.items():
        gains = [
            ""
            if method == base or (base, cohort) not in figures
            else _signed(evaluation.difference(method, base, cohort=cohort, metric=m))
            for m in ("accuracy", "worst_decile")
        ]
        spread = "" if row["accuracy_std"] is None else f" ({row['accuracy_std']:.3f})"
        cells = [method, cohort, f"{row['accuracy']:.4f}{spread}", gains[0], f"{row['worst_10']:.3f}", gains[1]]
        cells += [f"{row['log_loss']:.4f}", f"{row['n_parameters']:,}", f"{row['n_users']:.0f}", f"{row['n_support']:.0f}"]
        cells.append(f"{row['fit_seconds'] or 0:.1f}")
        lines.append(_line(cells))
    return lines


def _few_shot(evaluation: Evaluation) -> list[str]:
    """Unseen users after few choices: against the crowd's reward at as many, and against everybody's whole support."""
    rivals = [name for name in ("bt", "lore") if name in evaluation.methods]
    head = ["unseen users", "choices", "accuracy", *(f"minus {r}, as many" for r in rivals), *(f"minus {r}, all" for r in rivals)]
    lines = [_line(head), _line(["---"] + ["---:"] * (len(head) - 1))]
    tried = evaluation.shots("unseen")
    figures = {(r["method"], r["shots"]): r["accuracy"] for r in evaluation.summary() if r["cohort"] == "unseen"}
    for method in evaluation.methods:
        for shots in (n for n in FEW if n in tried and (method, n) in figures):
            cells = [method, str(shots), f"{figures[method, shots]:.4f}"]
            for other in (shots, None):
                for rival in rivals:
                    known = (rival, other) in figures and not (method == rival and shots == other)
                    gain = evaluation.difference(method, rival, shots=shots, baseline_shots=other) if known else None
                    cells.append("" if gain is None else _signed(gain))
            lines.append(_line(cells))
    return lines


def _signed(gain: Estimate) -> str:
    return f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> None:
    """Run the cases named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks accuracy", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--data",
        nargs="+",
        action="append",
        required=True,
        metavar="NAME [PATH]",
        help="polis FOLDER, convarg ROWS, prism ROWS, or planted; may be given several times",
    )
    parser.add_argument("--seeds", type=int, default=10, help="number of splits")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--methods", default=METHODS, help="as in `palate compare`")
    parser.add_argument("--only", default="", help="only the cases whose name contains this, such as 'minilm+style'")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="folder of the results")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    for name, *paths in given.data:
        if name not in ("planted", *CASES) or len(paths) != (name != "planted"):
            parser.error(
                f"--data {' '.join([name, *paths])}: expected one of {', '.join(f'{n} PATH' for n in CASES)}, or planted"
            )
        for case in planted() if name == "planted" else CASES[name](Path(paths[0]), given.out):
            if given.only in case.name:
                run(case, given.methods, list(seeds), given.out)
    print((given.out / "summary.md").read_text(encoding="utf-8"))
