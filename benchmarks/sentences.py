"""Texts a second of `minilm` on a processor: our batches against the loops of published code and against the library's own.

    python -m benchmarks sentences --rows convarg.jsonl.gz --rows prism.jsonl.gz [--texts 400] [--runs 5] [--threads 2]

| way                     | what is timed                                                                                    |
|-------------------------|--------------------------------------------------------------------------------------------------|
| `palate`                | `MiniLM().encode` of the distinct texts: tokens, plan and forward passes                         |
| `library`               | `SentenceTransformer.encode` of the same texts, with the batches it makes by itself (32 texts)   |
| `one by one`            | the same texts through the same model, one in a forward pass                                     |
| `one by one, every row` | the same loop over both sides of every choice, as published code runs it: the time of `one by     |
|                         | one` times the sides of a choice for every distinct text; not run, since ConvArg would take hours |

Runs of the ways alternate, so that a busy machine slows all of them; a ratio is the median of the ratios within one round. The
sample is every n-th distinct text in the order of the file. All ways must give the same features to 1e-5, or nothing is printed.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palate.data.pairs import PairSet, Text
from palate.data.readers import load_valid_pairs
from palate.encoders import MiniLM
from palate.encoders.minilm import _folder, line

Way = Callable[[Sequence[Text]], np.ndarray]


def ways() -> dict[str, Way]:
    """Each way from texts to an (N, 384) table, over the same weights."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    encoder = MiniLM()
    logging.disable_progress_bar()  # of loading
    library = SentenceTransformer(str(_folder()), device="cpu", local_files_only=True)

    def ours(texts: Sequence[Text]) -> np.ndarray:
        return encoder.encode(texts).rows(torch.arange(len(texts))).numpy()

    def theirs(texts: Sequence[Text]) -> np.ndarray:
        return np.asarray(library.encode([line(text, encoder.text) for text in texts], show_progress_bar=False))

    def loop(texts: Sequence[Text]) -> np.ndarray:
        return np.concatenate([ours([text]) for text in texts])

    return {"palate": ours, "library": theirs, "one by one": loop}


def distinct(pairs: PairSet) -> tuple[list[Text], float]:
    """(the distinct texts in use, sides of choices for each of them)."""
    used = np.unique(np.concatenate([pairs.chosen, pairs.rejected]))
    return [pairs.texts[i] for i in used.tolist()], 2 * len(pairs) / len(used)


def measure(path: Path, n_texts: int, runs: int) -> dict[str, Any]:
    """Median seconds of every way over a sample of the texts in `path`, and how many times as long as ours it takes."""
    pairs, _ = load_valid_pairs(path)
    texts, repeats = distinct(pairs)
    sample = texts[:: max(1, len(texts) // n_texts)][:n_texts]
    seconds: dict[str, list[float]] = {}
    every = ways()
    tables = {name: way(sample) for name, way in every.items()}  # not counted: the first run also warms up
    for name, table in tables.items():
        worst = float(np.abs(table - tables["palate"]).max())
        if worst > 1e-5:
            raise SystemExit(f"{name} differs from palate by {worst:.1e}; expected at most 1e-5")
    for _ in range(runs):
        for name, way in every.items():
            began = time.perf_counter()
            way(sample)
            seconds.setdefault(name, []).append(time.perf_counter() - began)
    times = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = {
        name: statistics.median(other / own for other, own in zip(found, seconds["palate"], strict=True))
        for name, found in seconds.items()
    }
    return {
        "file": path.name,
        "choices": len(pairs),
        "distinct_texts": len(texts),
        "sides_a_distinct_text": repeats,
        "texts_timed": len(sample),
        "runs": runs,
        "threads": torch.get_num_threads(),
        "seconds": times | {"one by one, every row": times["one by one"] * repeats},
        "times_as_long_as_palate": ratios | {"one by one, every row": ratios["one by one"] * repeats},
        "largest_difference": max(float(np.abs(table - tables["palate"]).max()) for table in tables.values()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m benchmarks sentences")
    parser.add_argument("--rows", type=Path, action="append", required=True, help="a file of choices; may be given several times")
    parser.add_argument("--texts", type=int, default=400, help="distinct texts that are timed")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="a folder for sentences.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    results = []
    for path in given.rows:
        if not path.exists():
            print(f"{path} is not here and is left out")
            continue
        result = measure(path, given.texts, given.runs)
        results.append(result)
        print(
            f"{result['file']}: {result['choices']:,} choices over {result['distinct_texts']:,} distinct texts, "
            f"{result['sides_a_distinct_text']:.1f} sides of a choice for each; {result['texts_timed']} texts timed, "
            f"{result['runs']} runs, {result['threads']} threads; features differ by {result['largest_difference']:.0e} at most"
        )
        for name, ratio in result["times_as_long_as_palate"].items():
            rate = result["texts_timed"] / result["seconds"][name]
            print(f"  {name:22} {rate:8.1f} distinct texts/s   {ratio:6.2f} times as long as palate")
    if given.out is not None and results:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "sentences.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
