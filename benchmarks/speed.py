"""How fast, and in how much memory: each case alone in its own process, so that its peak is its own.

    python -m benchmarks speed --out DIR [--case few-shot ...]

| case       | what is timed                                                                                                   |
|------------|-----------------------------------------------------------------------------------------------------------------|
| `few-shot` | 1,000 users x 9 choices, K = 10, D = 4096: one batched `adapt` against 500 Adam steps for one user after another |
| `fit`      | `Hierarchical()` on 640 users x 20 choices over 25,600 distinct texts, D = 4096                                  |
| `people`   | the same on features with a decaying spectrum, where people are seen to differ                                    |
| `meta`     | time to the final unseen accuracy of the published MRM loop: 640 users x 20 choices, D = 4096                    |
| `pref`     | a user's weights: one batched MAP against 5,000 SGD steps                                                        |
| `many`     | 100,000 users x 10 choices adapted at K = 8                                                                      |
| `votes`    | `Hierarchical()` on choices made of votes: 154 users x 40 choices over 150 items, one-hot                        |

Times are medians of several runs after one that is not counted, by the wall clock; `peak_mb` is the largest resident size of the
process, interpreter, torch and the case's own data included (`start_mb` is what it was before the first run).
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from examples.from_scratch import few_shot as one_user_at_a_time
from torch import Tensor

from benchmarks import loops
from palate.adaptation import Profiles, adapt, pad, pair_design
from palate.data.embeddings import Embeddings, OneHot
from palate.data.pairs import EmbeddedPairs
from palate.models.base import RewardModel
from palate.models.factored import LoRe
from palate.models.hierarchical import Hierarchical
from palate.training import fit

RUNS = 3
LOOPED = 100  # users that the one-at-a-time loop is timed on; it does not get faster with more

Result = dict[str, Any]


def median(work: Callable[[], object], runs: int = RUNS) -> float:
    """Median seconds of `work` after one uncounted run."""
    work()
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def resident_mb() -> float:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def hierarchical(bases: Tensor) -> Hierarchical:
    """A fitted model with these bases (D, K), as `fit` would leave it: adapting does not depend on how the numbers came about."""
    k = bases.shape[1]
    state = {"direction": bases.mean(1), "bases": bases, "share": torch.ones(1), "means": torch.zeros(1, k)}
    return Hierarchical().like({**state, "factors": torch.eye(k)[None]})


def lore(bases: Tensor) -> LoRe:
    """The same for LoRe."""
    k = bases.shape[1]
    return LoRe(k).like({"bases": bases, "mean_weights": torch.full((k,), 1 / k)})


def choices(bases: Tensor, n_users: int, n_pairs: int, *, n_texts: int | None = None, seed: int = 0) -> EmbeddedPairs:
    """Choices of users who mix the bases (D, K), over texts of unit variance: two for every pair, or `n_texts` shared by all."""
    generator = torch.Generator().manual_seed(seed)
    d, k = bases.shape
    p = n_users * n_pairs
    table = torch.randn(2 * p if n_texts is None else n_texts, d, generator=generator)
    if n_texts is None:
        left, right = torch.arange(0, 2 * p, 2), torch.arange(1, 2 * p, 2)
    else:
        left = torch.randint(n_texts, (p,), generator=generator)
        right = (left + torch.randint(1, n_texts, (p,), generator=generator)) % n_texts
    user = torch.arange(n_users).repeat_interleave(n_pairs)
    weights = 1.5 * torch.randn(n_users, k, generator=generator) + 0.5
    scores = table @ bases
    margin = ((scores[left] - scores[right]) * weights[user]).sum(1)
    wins = torch.rand(p, generator=generator) < torch.sigmoid(margin)
    names = [f"u{u:07d}" for u in range(n_users)]
    return EmbeddedPairs(table, torch.where(wins, left, right), torch.where(wins, right, left), [names[u] for u in user.tolist()])


def orthonormal(d: int, k: int, seed: int = 1) -> Tensor:
    frame: Tensor = torch.linalg.qr(torch.randn(d, k, generator=torch.Generator().manual_seed(seed)))[0]
    return frame


def projected(data: EmbeddedPairs, bases: Tensor) -> EmbeddedPairs:
    """The same choices over texts of which only the K base rewards are left: what adapting costs without reading embeddings."""
    table = data.embeddings.project(bases)
    return EmbeddedPairs(table, data.chosen, data.rejected, data.users)


def adapt_fresh(model: RewardModel, data: EmbeddedPairs, *, covariance: bool = True) -> Profiles:
    """`adapt` on choices that remember nothing of the last run (their order by user, their differences)."""
    return adapt(model, data[:], covariance=covariance)


def few_shot() -> Result:
    """`adapt` of Hierarchical and of LoRe against LoRe's own routine, one user after another."""
    users, n, k, d = 1000, 9, 10, 4096
    bases = orthonormal(d, k)
    data = choices(bases, users, n)
    small, start = projected(data, bases), resident_mb()
    out: Result = {"users": users, "pairs": n, "weights": k, "features": d, "start_mb": start}
    for name, make in (("hierarchical", hierarchical), ("lore", lore)):
        full, alone = make(bases), make(torch.eye(k))
        out[f"{name}_solve_s"] = median(partial(adapt_fresh, alone, small), 9)
        out[f"{name}_with_projection_s"] = median(partial(adapt_fresh, full, data), 5)
    person = torch.arange(LOOPED).repeat_interleave(n)
    z, logits = (
        data.differences().rows(torch.arange(LOOPED * n)),
        torch.randn(LOOPED, k, generator=torch.Generator().manual_seed(0)),
    )
    out["loop_users_timed"] = LOOPED
    for part, difference, directions in (("solve", z @ bases, torch.eye(k)), ("with_projection", z, bases)):
        began = time.perf_counter()
        one_user_at_a_time(difference, person, directions, logits)
        out[f"loop_{part}_s"] = (time.perf_counter() - began) * users / LOOPED
    for name in ("hierarchical", "lore"):
        for part in ("solve", "with_projection"):
            out[f"{name}_{part}_factor"] = out[f"loop_{part}_s"] / out[f"{name}_{part}_s"]
    return out


def fitting() -> Result:
    """`fit` of the default model on embeddings of the size that a large language model gives."""
    users, n, d = 640, 20, 4096
    data = choices(orthonormal(d, 5), users, n)
    return _fit_result(data, {"users": users, "pairs": n, "features": d, "texts": len(data.embeddings)}, RUNS)


def people() -> Result:
    """`fit` where the spectrum of the features decays as that of embeddings does, and people are seen to differ."""
    data = loops.people(640, 20, 1, 4096, unseen=1)[0]
    return _fit_result(data, {"users": 640, "pairs": 20, "features": 4096, "texts": len(data.embeddings)}, RUNS)


def votes() -> Result:
    """`fit` of the default model on the sizes of a Polis conversation."""
    users, n, items, rank = 154, 40, 150, 5
    generator = torch.Generator().manual_seed(0)
    taste = torch.randn(items, rank, generator=generator)
    person = torch.randn(users, rank, generator=generator)
    left = torch.randint(items, (users * n,), generator=generator)
    right = (left + torch.randint(1, items, (users * n,), generator=generator)) % items
    user = torch.arange(users).repeat_interleave(n)
    margin = ((taste[left] - taste[right]) * (person[user] + 0.5)).sum(1)
    wins = torch.rand(len(user), generator=generator) < torch.sigmoid(margin)
    data = EmbeddedPairs(
        OneHot(items), torch.where(wins, left, right), torch.where(wins, right, left), [str(u) for u in user.tolist()]
    )
    return _fit_result(data, {"users": users, "pairs": n, "features": items}, RUNS)


def _fit_result(data: EmbeddedPairs, sizes: Result, runs: int) -> Result:
    start, seconds, stages = resident_mb(), [], []
    for _ in range(runs):
        marks: list[tuple[str, float]] = []
        fresh = EmbeddedPairs(
            _again(data.embeddings), data.chosen, data.rejected, data.users
        )  # nothing remembered from the last run
        began = time.perf_counter()

        def mark(share: float, what: str, marks: list[tuple[str, float]] = marks) -> None:
            marks.append((what, time.perf_counter()))

        model = fit(fresh, progress=mark)
        ended = time.perf_counter()
        seconds.append(ended - began)
        spent: dict[str, float] = {}
        for (what, at), (_, until) in zip(marks, [*marks[1:], ("", ended)], strict=True):
            spent[what] = spent.get(what, 0.0) + until - at
        stages.append(spent)
    middle = stages[seconds.index(statistics.median_low(seconds))]
    return {
        **sizes,
        "start_mb": start,
        "fit_s": statistics.median(seconds),
        "runs": runs,
        "stages_s": middle,
        "weights": model.n_weights,
    }


def _again(table: Embeddings) -> Embeddings:
    return table.take(torch.arange(len(table))) if isinstance(table, OneHot) else table


def many() -> Result:
    """`adapt` of 100,000 users over 20,000 texts that they share, the pass over the table included."""
    users, n, k, d, texts = 100_000, 10, 8, 1024, 20_000
    bases = orthonormal(d, k)
    data = choices(bases, users, n, n_texts=texts)
    model, start = hierarchical(bases), resident_mb()
    out: Result = {"users": users, "pairs": n, "weights": k, "features": d, "texts": texts, "start_mb": start}
    out["adapt_s"] = median(partial(adapt_fresh, model, data))
    out["adapt_without_covariance_s"] = median(partial(adapt_fresh, model, data, covariance=False))
    out["stages_s"] = _stages(model, data[:])
    out["converged"] = float(adapt(model, data).converged.double().mean())
    return out


def _stages(model: RewardModel, data: EmbeddedPairs) -> dict[str, float]:
    """Where the time of one `adapt` goes, piece by piece."""
    marks = [time.perf_counter()]

    def mark() -> None:
        marks.append(time.perf_counter())

    data.grouped()
    mark()
    offset, slopes = pair_design(model, data)
    mark()
    batch = pad(data, offset, slopes, torch.arange(len(data.user_ids)))
    mark()
    model.inference.solve(batch, model.prior, data.user_ids)
    mark()
    return dict(zip(("sort by user", "project and difference", "pad", "solve"), np.diff(marks).tolist(), strict=True))


CASES: dict[str, Callable[[], Result]] = {
    "few-shot": few_shot,
    "fit": fitting,
    "people": people,
    "meta": loops.meta,
    "pref": loops.pref,
    "many": many,
    "votes": votes,
}


def machine() -> Result:
    """What the figures were taken on."""
    info = Path("/proc/cpuinfo")
    model = (
        next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), "")
        if info.exists()
        else ""
    )
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def markdown(found: Result) -> str:
    """The figures as tables, one a case."""
    about = found["machine"]
    lines = [
        "# Speed",
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['torch_threads']} torch threads; torch {about['torch']}, "
        f"numpy {about['numpy']}, Python {about['python']}; load average {about['load_before']:.1f} before the first case.",
        "",
    ]
    for name, case in found["cases"].items():
        lines += [f"## {name}", "", CASES[name].__doc__ or "", "", "| figure | value |", "| --- | ---: |"]
        for key, value in case.items():
            rows = {f"{key}: {inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
            lines += [f"| {label} | {_figure(label, v)} |" for label, v in rows.items()]
        lines.append("")
    return "\n".join(lines)


def _figure(label: str, value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if label.endswith(("_mb", "_factor")) else f"{value:.4f}"


def main(arguments: Sequence[str]) -> None:
    """Run the cases named on the command line, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", action="append", choices=list(CASES), help="may be given several times; all by default")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="folder of speed.json and speed.md")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # in the process of its own
    given = parser.parse_args(arguments)
    if given.alone:
        torch.set_num_interop_threads(1)
        result = CASES[given.case[0]]()
        print(json.dumps(result | {"peak_mb": resident_mb()}))
        return
    found: Result = {"machine": machine(), "cases": {}}
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.case or CASES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks", "speed", "--alone", "--case", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found["cases"][name] = json.loads(done.stdout.splitlines()[-1])
        (given.out / "speed.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        (given.out / "speed.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))
