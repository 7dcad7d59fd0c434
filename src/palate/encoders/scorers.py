"""Scores as features: K numbers of every text, from a table, from functions, or from functions that see a reference answer.

External reward models, rubrics and judges have often been run already, or are run elsewhere; here their numbers are taken as they
are, and only how people weigh them is learned (`palate.GivenBases`). PersonalLLM's ten reward models are such a table.
A text without a score is an error: 0 is a score.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from palate.data.embeddings import Dense
from palate.data.pairs import Message, Text
from palate.data.sources import Record, csv_records, file_format, records, rows_in_memory
from palate.encoders.base import Batch, BatchedEncoder, Encoder, State, digest
from palate.encoders.specs import Part, chosen
from palate.errors import DataError, MismatchError, MissingExtraError, ModelFileError

PREFIX = "score_"
TEXTS_PER_BATCH = 64
Key = tuple[str, str]  # prompt as plain text, and response


class TableScorers(Encoder):
    """K scores of every text, looked up. Spec "scores:FILE" or "scores:FILE?columns=helpful,short".

    Rows have `prompt` (text, or turns with role and content), `response`, and a column for every scorer. A prompt of one user
    turn and the same prompt as text are one prompt.

    Args:
        source: a path to JSON Lines, CSV (either may be compressed with gzip) or Parquet; or an iterable of dicts.
        columns: which columns are scores, in this order; None takes those that begin with "score_", sorted, and leaves that
            beginning out of the names.

    Raises:
        DataError: a row without a text or with a score that is no finite number, a text with two different rows of scores, a
            column that is not there. In `encode`: a text that has no scores; the message quotes it.
        MissingExtraError: Parquet without pyarrow.

    Cost: one pass over the rows; memory is that of the texts.
    """

    names: tuple[str, ...]

    def __init__(self, source: "str | os.PathLike[str] | Iterable[object]", *, columns: Sequence[str] | None = None):
        self.path = Path(source).resolve() if isinstance(source, str | os.PathLike) else None
        self.columns = None if columns is None else tuple(columns)
        if self.columns is not None and (not self.columns or len(set(self.columns)) < len(self.columns)):
            raise DataError(f"columns are {list(self.columns)}; expected at least one name, each once")
        where = "the rows" if self.path is None else str(self.path)
        used, self._scores = _read(_records(self.path, source), self.columns, where)
        self.names = tuple(used if columns is not None else (name.removeprefix(PREFIX) for name in used))
        options = () if self.columns is None else (("columns", ",".join(self.columns)),)
        self.spec = str(Part("scores", str(source) if self.path is not None else "rows", options))
        rows = (repr((key, self._scores[key])) for key in sorted(self._scores))
        self._content = hashlib.sha256("\n".join(rows).encode("utf-8", "surrogatepass")).hexdigest()

    def __len__(self) -> int:
        return len(self._scores)

    @classmethod
    def from_spec(cls, path: str, options: Mapping[str, str]) -> Self:
        """The encoder of "scores:PATH?columns=a,b"."""
        said = chosen(options, ("columns",), (), "scores").get("columns")
        return cls(path, columns=None if said is None else [name.strip() for name in said.split(",")])

    @classmethod
    def restore(cls, state: State) -> Self:
        """The encoder whose `state()` this is, from its file.

        Raises:
            ModelFileError: it was made of rows in memory, or its file is gone.
            MismatchError: the file holds other scores now.
        """
        where = state["where"]
        if where["path"] is None:
            raise ModelFileError("the saved scores were rows in memory; make the encoder again with TableScorers(rows)")
        if not Path(where["path"]).is_file():
            raise ModelFileError(f"the saved scores were read from {where['path']}, which is not there; put the file back")
        self = cls(where["path"], columns=where["columns"])
        if self._content != state["content"] or list(self.names) != state["names"]:
            raise MismatchError(
                f"{where['path']} holds other scores than when the encoder was saved, so weights learned on them would mean "
                "something else; bring the old file back, or fit again"
            )
        self.spec = where["spec"]
        return self

    def encode(self, texts: Sequence[Text]) -> Dense:
        """(N, K) float32 scores of `texts`, in their order."""
        keys = [_key(text) for text in texts]
        unknown = [key for key in dict.fromkeys(keys) if key not in self._scores]
        if unknown:
            prompt, response = unknown[0]
            raise DataError(
                f"{len(unknown)} texts have no scores, such as the response {response[:60]!r} to {prompt[:60]!r}; expected a row "
                "for each text that is used: score them as well, or leave their choices out"
            )
        return Dense(torch.tensor([self._scores[key] for key in keys], dtype=torch.float32).reshape(len(keys), len(self.names)))

    def state(self) -> State:
        return {
            "encoder": "scores",
            "version": 1,
            "where": {
                "path": None if self.path is None else str(self.path),
                "spec": self.spec,
                "columns": None if self.columns is None else list(self.columns),
            },
            "names": list(self.names),
            "content": self._content,
        }


class Scorers(BatchedEncoder):
    """K scores of every text from a function of your own: a rubric, a judge, reward models that are served elsewhere.

    `score(prompt, response)` gives K numbers; with `references` it is `score(prompt, response, reference)`, and a model that
    says how close a response is to a reference answer, as POLAR does, is a scorer like any other. The prompt is text, or turns
    (`palate.Message`) where the data has turns.

    Args:
        name: of the function, for people.
        score: must give the same numbers for the same texts.
        names: (K,) what the numbers are.
        version: what changes whenever the function, its model or its wording does. Nothing else can tell that features are
            stale: it stands in the fingerprint in place of the code.
        references: the reference answer of every prompt, by the prompt's plain text (`Text.prompt_text`); see `read_references`.
        workers: threads in which it is called; above 1 it must bear that.

    Raises:
        DataError: no names, or one twice; no version. In `encode`: not K finite numbers, a prompt without a reference.
    """

    names: tuple[str, ...]

    def __init__(
        self,
        name: str,
        score: Callable[..., Sequence[float]],
        *,
        names: Sequence[str],
        version: str,
        references: Mapping[str, str] | None = None,
        workers: int = 1,
    ):
        if isinstance(names, str) or not names or len(set(names)) < len(names):
            raise DataError(f"names are {names!r}; expected a list with the name of every score, each once")
        if not name or not version:
            raise DataError(
                f"name is {name!r} and version {version!r}; expected both: without them stale features cannot be told"
            )
        if workers < 1:
            raise DataError(f"workers is {workers}; expected at least 1")
        self.name, self.score, self.names, self.version, self.workers = name, score, tuple(names), version, workers
        self.references = None if references is None else dict(references)
        self.width = len(self.names)
        self.spec = f"scorers:{name}"

    @classmethod
    def restore(cls, state: State) -> NoReturn:
        """Raises `ModelFileError`: a state holds no code."""
        raise ModelFileError(
            f"the saved encoder calls the function {state['name']!r} (version {state['code']}), which no file holds; make it "
            "again in Python with Scorers(name, score, names=..., version=...) and pass it on"
        )

    def plan(self, texts: Sequence[Text]) -> list[Batch]:
        """Batches of `TEXTS_PER_BATCH`, in the order of the texts."""
        starts = range(0, len(texts), TEXTS_PER_BATCH)
        parts = [list(range(start, min(start + TEXTS_PER_BATCH, len(texts)))) for start in starts]
        return [Batch(rows, partial(self._compute, [texts[i] for i in rows])) for rows in parts]

    def state(self) -> State:
        known = None if self.references is None else digest({"references": sorted(self.references.items())})
        own = {"encoder": "scorers", "version": 1, "name": self.name, "code": self.version}
        return own | {"names": list(self.names), "references": known}

    def _compute(self, texts: list[Text]) -> Tensor:
        if self.workers == 1:
            return torch.tensor([self._row(text) for text in texts], dtype=torch.float32)
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(self.workers) as pool:
            return torch.tensor(list(pool.map(self._row, texts)), dtype=torch.float32)

    def _row(self, text: Text) -> list[float]:
        if self.references is None:
            row = self.score(text.prompt, text.response)
        else:
            if text.prompt_text not in self.references:
                raise DataError(f"the prompt {text.prompt_text[:60]!r} has no reference answer; expected one for each prompt")
            row = self.score(text.prompt, text.response, self.references[text.prompt_text])
        try:
            numbers = [float(number) for number in row]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != self.width or not all(map(math.isfinite, numbers)):
            raise DataError(
                f"{self.name} gave {str(row)[:60]} for the response {text.response[:60]!r}; expected {self.width} finite "
                f"numbers: {', '.join(self.names)}"
            )
        return numbers


def read_references(source: "str | os.PathLike[str] | Iterable[object]") -> dict[str, str]:
    """The reference answer of every prompt, from rows with `prompt` and `reference`: files as in `TableScorers`.

    Raises:
        DataError: a row without either, or a prompt with two different references.
    """
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    where = "the rows" if path is None else str(path)
    out: dict[str, str] = {}
    for record in _good(_records(path, source, ("prompt", "reference")), where):
        row: Any = record.row
        prompt, reference = _prompt(row, where, record.line), row.get("reference")
        if not isinstance(reference, str):
            raise DataError(f"{where}, line {record.line}: the reference is {reference!r}; expected a text")
        if out.setdefault(prompt, reference) != reference:
            raise DataError(f"{where}, line {record.line}: the prompt {prompt[:60]!r} has a second, different reference")
    return out


def _key(text: Text) -> Key:
    return text.prompt_text, text.response


def _records(path: Path | None, source: Any, required: Sequence[str] = ("prompt", "response")) -> Iterator[Record]:
    if path is None:
        return rows_in_memory(source)
    kind = file_format(path)
    if kind == "csv":
        return csv_records(path, required)
    if kind == "parquet":
        return _parquet(path)
    if kind != "jsonl":
        raise DataError(f"{path} is a folder; expected a file of rows with {', '.join(required)}")
    return records(path, kind, required)


def _parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtraError("reading Parquet needs pyarrow; install it with: pip install 'palate[data]'") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}; expected a whole Parquet file") from error
    return rows_in_memory(rows)


def _good(found: Iterator[Record], where: str) -> Iterator[Record]:
    """The records that are objects; one that is none is an error here, because a score that is missing is one later."""
    for record in found:
        if record.blank:
            continue
        if record.problem is not None:
            raise DataError(f"{where}, line {record.line}: {record.problem.message}")
        if not isinstance(record.row, Mapping):
            raise DataError(f"{where}, line {record.line}: the row is {str(record.row)[:60]}; expected an object with columns")
        yield record


def _prompt(row: Mapping[str, Any], where: str, line: int) -> str:
    """The prompt of a row as plain text."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return prompt
    try:
        turns = tuple(Message(turn["role"], turn["content"]) for turn in prompt or ())
    except (TypeError, KeyError):
        turns = ()
    if not turns or not all(isinstance(part, str) for turn in turns for part in turn):
        raise DataError(
            f"{where}, line {line}: the prompt is {str(prompt)[:60]}; expected a text, or turns with role and content"
        )
    return Text(turns, "").prompt_text


def _read(
    found: Iterator[Record], columns: Sequence[str] | None, where: str
) -> tuple[tuple[str, ...], dict[Key, tuple[float, ...]]]:
    """The names of the columns that are scores, and the scores of every text."""
    used: tuple[str, ...] = () if columns is None else tuple(columns)
    out: dict[Key, tuple[float, ...]] = {}
    for record in _good(found, where):
        row: Any = record.row
        if not used:
            used = tuple(sorted(name for name in row if isinstance(name, str) and name.startswith(PREFIX)))
            if not used:
                raise DataError(
                    f"{where} has the columns {', '.join(map(str, row))}; expected some that begin with {PREFIX!r}, or columns="
                )
        prompt, response = _prompt(row, where, record.line), row.get("response")
        if not isinstance(response, str):
            raise DataError(f"{where}, line {record.line}: the response is {str(response)[:60]}; expected a text")
        scores = tuple(_score(row.get(name), name, where, record.line) for name in used)
        if out.setdefault((prompt, response), scores) != scores:
            raise DataError(
                f"{where}, line {record.line}: the response {response[:60]!r} has other scores {scores} than in an earlier row; "
                "expected one row for a text"
            )
    if not out:
        raise DataError(f"{where} has no rows; expected some with prompt, response and scores")
    return used, out


def _score(value: Any, name: str, where: str, line: int) -> float:
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or abs(number) > torch.finfo(torch.float32).max:
        raise DataError(f"{where}, line {line}: {name} is {value!r}; expected a finite number")
    return number
