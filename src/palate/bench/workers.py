"""Worker processes: one thread each, told through pipes (`palate.bench.worker`), and replaced when they die.

Figures do not depend on how many there are, and one that the system kills is a failed cell and no failed bench.
"""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from palate.bench import cells
from palate.bench.cells import Cell

# One thread each, whatever the libraries would take by themselves.
_THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

Told = tuple[Cell, dict[str, Any]]  # a cell, and what its worker says of it: key, seconds, failure or None
Todo = queue.SimpleQueue[Cell]
Done = queue.SimpleQueue[Told | Exception]


def finished(folder: Path, pending: Sequence[Cell], jobs: int) -> Generator[Told]:
    """The cells, each when its file is written. Closed before the last, it ends the workers; what was written stays."""
    todo: Todo = queue.SimpleQueue()
    done: Done = queue.SimpleQueue()
    for cell in pending:
        todo.put(cell)
    running, stopped = set[subprocess.Popen[bytes]](), threading.Event()
    threads = [
        threading.Thread(target=_work, args=(folder, todo, done, running, stopped), daemon=True)
        for _ in range(min(jobs, len(pending)))
    ]
    try:
        for thread in threads:
            thread.start()
        for _ in pending:
            answer = done.get()
            if isinstance(answer, Exception):
                raise answer
            yield answer
    finally:
        stopped.set()
        for process in list(running):
            process.terminate()
        for thread in threads:
            thread.join()


def _work(
    folder: Path,
    todo: Todo,
    done: Done,
    running: set[subprocess.Popen[bytes]],
    stopped: threading.Event,
) -> None:
    """One worker and the cells it is given; when it dies, its cell has failed and another takes its place."""
    try:
        while not stopped.is_set() and not todo.empty():
            with _worker(folder, running) as (process, errors):
                while not stopped.is_set():
                    try:
                        cell = todo.get_nowait()
                    except queue.Empty:
                        return
                    began = time.perf_counter()
                    told = _asked(process, cell)
                    if stopped.is_set():
                        return
                    if told is None:
                        seconds = time.perf_counter() - began
                        message = _last_words(process, errors)
                        cells.write(folder, cell, cells.failed(cell, "fit", message), seconds)
                        done.put((cell, {"seconds": round(seconds, 3), "failure": message}))
                        break
                    done.put((cell, told))
    except Exception as error:  # the main thread raises it
        done.put(error)


@contextmanager
def _worker(folder: Path, running: set[subprocess.Popen[bytes]]) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-m", "palate.bench.worker", str(folder)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=os.environ | _THREADS
        )
        running.add(process)
        try:
            yield process, errors
        finally:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()  # the end of the input is the end of the worker
            process.wait()
            running.discard(process)


def _asked(process: subprocess.Popen[bytes], cell: Cell) -> dict[str, Any] | None:
    """What the worker says of a cell, None where it died."""
    if process.stdin is None or process.stdout is None:
        return None
    try:
        process.stdin.write(json.dumps(cell.as_json()).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
        told: dict[str, Any] = json.loads(line)
    except (BrokenPipeError, ValueError):
        return None
    return told


def _last_words(process: subprocess.Popen[bytes], errors: IO[bytes]) -> str:
    code = process.wait()
    errors.seek(0)
    lines = [line for line in errors.read().decode("utf-8", "replace").splitlines() if line.strip()]
    why = f"ended with signal {-code}, as when memory runs out" if code < 0 else f"ended with code {code}"
    return f"the worker process {why}" + (f": {lines[-1].strip()}" if lines else "")
