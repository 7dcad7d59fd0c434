"""`python -m benchmarks.kill_encoder [--trials 50] [--texts 240]`: kill -9 an encoding process at random moments, and resume.

Each trial encodes generated texts with minilm in a process of its own and into a folder of its own, kills it at a moment drawn
uniformly over the time that an undisturbed run takes, resumes in another process, and compares every byte of the features with
those of the undisturbed run. Exit code 1 where a byte differs.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in another order are other bits, and a fork takes no threads along

import numpy as np
import torch

from palate.data.pairs import Text
from palate.data.synthetic import synthetic
from palate.encoders.cache import Cache, with_cache
from palate.encoders.minilm import MiniLM
from palate.encoders.upkeep import verify


def encode(encoder: MiniLM, folder: Path, texts: list[Text], out: Path | None = None) -> None:
    """What the process that may be killed does; `out` gets the SHA-256 of the features and how many texts were computed."""
    torch.set_num_threads(1)
    table = with_cache(encoder, Cache(folder / "cache")).encode(texts)
    if out is not None:
        content = table.rows(torch.arange(len(texts))).numpy().tobytes()
        out.write_text(json.dumps({"sha256": hashlib.sha256(content).hexdigest(), "encoded": encoder.encoded}))


def begun(encoder: MiniLM, folder: Path, texts: list[Text], out: Path | None = None) -> ForkProcess:
    """`encode` in a process of its own, which has the loaded model from this one."""
    folder.mkdir(exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=encode, args=(encoder, folder, texts, out))
    process.start()
    return process


def finished(encoder: MiniLM, folder: Path, texts: list[Text]) -> tuple[str, int, float]:
    """(SHA-256 of the features, texts computed, seconds) of a run that nobody disturbs."""
    start, out = time.perf_counter(), folder / "out.json"
    process = begun(encoder, folder, texts, out)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the run in {folder} ended with exit code {process.exitcode}")
    facts = json.loads(out.read_text())
    return facts["sha256"], facts["encoded"], time.perf_counter() - start


def main() -> None:
    """Run the trials and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--texts", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(arguments.seed)
    encoder, texts = MiniLM(), list(synthetic(40, 20, seed=0).pairs.texts[: arguments.texts])
    n_batches = len(encoder.plan(texts))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        expected, _, seconds = finished(encoder, root / "undisturbed", texts)
        same = inside = whole = 0
        kept = []
        for trial in range(arguments.trials):
            folder = root / str(trial)
            process = begun(encoder, folder, texts)
            time.sleep(float(rng.uniform(0, seconds)))
            process.kill()
            process.join()
            found, encoded, _ = finished(encoder, folder, texts)
            damaged = [message for shelf in (folder / "cache").iterdir() for message in verify(shelf)]
            same += found == expected and not damaged
            inside += 0 < encoded < len(texts)
            whole += encoded == 0
            kept.append(len(texts) - encoded)
            print(f"{trial + 1}: {kept[-1]} rows kept, {same} identical so far", file=sys.stderr, flush=True)
    print(f"{len(texts)} texts in {n_batches} batches, {seconds:.1f} s undisturbed; {arguments.trials} times kill -9 and resume:")
    print(f"byte-identical and every checksum right: {same} of {arguments.trials}")
    print(f"killed with some rows stored and some not: {inside}; before the first batch: {arguments.trials - inside - whole}")
    print(f"after the last: {whole}; rows kept by a killed run: {min(kept)} to {max(kept)}, on average {np.mean(kept):.0f}")
    raise SystemExit(same != arguments.trials)


if __name__ == "__main__":
    main()
