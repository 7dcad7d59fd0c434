"""The judges that read text, through their own command, against the chat server of the tests; the longer job of the benchmark.

    python -m benchmarks judges --data polis=FOLDER --data prism=ROWS ... --seeds N --out DIR [--base-url URL --model NAME]

For every data set (as `palate bench` names and prepares it) and seed, some unseen users and some of their choices are drawn and
written as rows with a `split` column; `palate judge` is run on them with every judge, and `palate compare` with two models, so
that all are held to the same choices. DIR/report.html and DIR/results.jsonl have everything; what is whole is not run again, and
a judge that could not judge everything goes on, with the answers that it has. Exit code 1: something is missing still, and the
report says what.

Without --base-url the server is the one of tests/judge_server.py on this machine: a counter of words, no language model. Its
answers are slow at times and fail at times. Its accuracy says that the pipeline is whole, and nothing about judges.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.accuracy import say
from palate.bench.protocols import Texts, source
from palate.cache_cli import encoder
from palate.data.pairs import Prompt
from palate.data.splits import SIDES
from palate.errors import DataError
from palate.evaluation import Evaluation
from palate.evaluation.comparison import drawn
from palate.evaluation.facts import Failure
from palate.report import write_report

JUDGES = ("in-context", "reasoning", "synthesize-me", "plus")
MODELS = "bt,hierarchical"
PLUS_ENCODER = "minilm"  # not that of the data: `items` knows no response under the summary of a new user
SUPPORT = 20  # choices to study: what a prompt can hold


@contextmanager
def stub() -> Iterator[tuple[str, str]]:
    """(URL, model) of the server of the tests: one answer in fifty is a refusal to be tried again, one in fifty is slow."""
    from tests.judge_server import JudgeServer, Status, answered

    chance = random.Random(0)

    def moody(body: dict[str, object]) -> str | Status:
        mood = chance.random()
        if mood < 0.02:
            return Status(429, {"Retry-After": "0"}, "busy")
        server.delay = 0.2 if mood > 0.98 else 0.0
        return answered(body)

    with JudgeServer() as server:
        server.answer = moody
        yield server.url, "word-counter"


def turns(prompt: Prompt) -> "str | list[dict[str, str]]":
    return prompt if isinstance(prompt, str) else [{"role": turn.role, "content": turn.content} for turn in prompt]


def write_rows(data: Texts, seed: int, users: int, most: int, path: Path) -> None:
    """Rows of one seed: everything that is learned from, and at most `most` choices of each of `users` unseen users."""
    pairs = data.pairs
    parts = drawn(pairs, by=data.by, max_support=SUPPORT, max_test=most, seed=seed)
    unseen = sorted(set(pairs.users[parts.test_unseen].tolist()))
    asked = set(np.random.default_rng(seed).permutation(unseen)[:users].tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as out:
        for side in SIDES:
            for row in getattr(parts, side).tolist():
                user = str(pairs.users[row])
                if side in ("support", "test_unseen") and user not in asked:
                    continue
                first, second = pairs.texts[int(pairs.chosen[row])], pairs.texts[int(pairs.rejected[row])]
                prompt = turns(first.prompt)
                chosen, rejected = (
                    one.response if isinstance(prompt, str) else [{"role": "assistant", "content": one.response}]
                    for one in (first, second)
                )
                line = {"user_id": user, "prompt": prompt, "chosen": chosen, "rejected": rejected, "split": side}
                line |= {"tie": bool(pairs.tie[row]), "conversation_id": pairs.conversation[row]}
                out.write(json.dumps(line) + "\n")


def palate(*words: str) -> int:
    environment = os.environ | {"OPENAI_API_KEY": os.environ.get("OPENAI_API_KEY", "none")}
    return subprocess.run([sys.executable, "-m", "palate", *words], env=environment, check=False).returncode


def run(data: Texts, seed: int, asked: argparse.Namespace, url: str, model: str) -> list[Evaluation]:
    """Everything of one data set and seed, and under `failures` what is missing of it."""
    folder, found = asked.out / data.name / f"seed{seed}", []
    rows = folder / f"{data.name}.jsonl"
    if not rows.exists():
        write_rows(data, seed, asked.users, asked.choices, rows)
    codes, compared = dict[str, int](), folder / "models"
    if not (compared / "results.jsonl").exists():
        unit = ("--split-by", data.by)
        once = ("--seeds", "1", "--encoder", data.encoder.spec, "--out", str(compared))
        codes["models"] = palate("compare", str(rows), "--methods", MODELS, *unit, *once)
    for method in asked.judges.split(","):
        own = folder / method
        if not whole(own / "results.jsonl"):
            spec = ("--encoder", PLUS_ENCODER) if method == "plus" else ()
            to = ("--base-url", url, "--model", model, "--method", method, "--out", str(own), "--workers", "4", *spec)
            codes[method] = palate("judge", str(rows), *to)
    for name in ("models", *asked.judges.split(",")):
        found.append(read(folder / name / "results.jsonl", data.label, seed, name, codes.get(name, 0)))
    return found


def read(results: Path, label: str, seed: int, name: str, code: int) -> Evaluation:
    """The rows of a run and what it left out, under the labels of the report; a run without either has failed."""
    ran = Evaluation.load(results) if results.exists() else Evaluation.from_rows([])
    failures = tuple(failure._replace(data_set=label, seed=seed) for failure in ran.failures)
    if not failures and (code or not len(ran)):
        why = f"the command ended with exit code {code} and has said why; its answers are in {results.parent}"
        failures = (Failure(label, name, seed, "unseen", why),)
    for failure in failures:
        say(f"{results.parent}: {failure.method}: {failure.message}")
    rows = (row | {"data_set": label, "seed": seed} for row in ran.rows() if row["shots"] is None)
    return replace(Evaluation.from_rows(rows), failures=failures)


def whole(results: Path) -> bool:
    """Whether a run is there that left nothing out."""
    return results.exists() and not Evaluation.load(results).failures


def main(given: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks judges", description=__doc__)
    parser.add_argument("--data", action="append", required=True, help="polis=FOLDER, convarg=ROWS, prism=ROWS; several times")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--users", type=int, default=20, help="unseen users a seed")
    parser.add_argument("--choices", type=int, default=10, help="choices to tell, a user")
    parser.add_argument("--judges", default=",".join(JUDGES))
    parser.add_argument("--base-url")
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args(given)
    if (asked.base_url is None) != (asked.model is None):
        raise DataError("--base-url and --model go together: where the server is, and what it calls the model")
    found: list[Evaluation] = []
    with stub() if asked.base_url is None else _given(asked) as (url, model):
        for text in asked.data:
            data = source(text, encoder)
            if not isinstance(data, Texts):
                raise DataError(f"--data {text} has no texts to read; expected polis=FOLDER, convarg=ROWS or prism=ROWS")
            for seed in range(asked.seeds):
                found += run(data, seed, asked, url, model)
    everything = Evaluation.concat(found)
    everything.save(asked.out / "results.jsonl")
    write_report(everything, asked.out)
    for line in everything.summary():
        if line["cohort"] == "unseen":
            say(f"{line['data_set']:28s} {line['method']:14s} {line['accuracy']:.3f}  worst decile {line['worst_10']:.3f}")
    if everything.failures:
        raise SystemExit(1)


@contextmanager
def _given(asked: argparse.Namespace) -> Iterator[tuple[str, str]]:
    yield asked.base_url, asked.model
