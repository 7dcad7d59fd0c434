"""What the commands share: names looked up, output, progress, and errors as one line. Nothing here knows any mathematics.

Results go to standard output, everything else to standard error, so a pipe gets results only. Progress is drawn only on a
terminal. This is the one place where a method or a split has a name.
"""

import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from palate.errors import DataError, PalateError

if TYPE_CHECKING:
    from palate.data.pairs import PairSet
    from palate.data.splits import By
    from palate.data.validation import ValidationReport
    from palate.encoders import Encoder
    from palate.evaluation import Evaluation
    from palate.models.base import RewardModel

Name = TypeVar("Name", bound=str)

ENCODER_FILE = "encoder.json"
_OBEYED = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\t"), ord("\n")}, "\N{REPLACEMENT CHARACTER}")

UNITS: tuple["By", ...] = ("conversation", "prompt", "item", "pair")


def _made(home: str, **options: object) -> Callable[[], "RewardModel"]:
    """What makes an unfitted model: `home` is "module:Class" or "module:Class.preset", imported when it is first asked for."""

    def make() -> "RewardModel":
        module, path = home.split(":")
        kind: Any = import_module(f"palate.models.{module}")
        for part in path.split("."):
            kind = getattr(kind, part)
        model: RewardModel = kind(**options)
        return model

    return make


METHODS: Mapping[str, Callable[[], "RewardModel"]] = {
    "hierarchical": _made("hierarchical:Hierarchical"),
    "bt": _made("factored:BradleyTerry"),
    "lore": _made("factored:LoRe"),
    "lore-faithful": _made("factored:LoRe.faithful"),
    "pref": _made("pref:PReF"),
    "pref-faithful": _made("pref:PReF.faithful"),
    "mrm": _made("mrm:MRM"),
    "mrm-faithful": _made("mrm:MRM.faithful"),
    "pal-a": _made("pal:PAL"),
    "pal-a-faithful": _made("pal:PAL.faithful"),
    "pal-b": _made("pal:PAL", by_prompt=True),
    "pal-b-faithful": _made("pal:PAL.faithful", by_prompt=True),
    "vpl": _made("vpl:VPL"),
    "vpl-faithful": _made("vpl:VPL.faithful"),
    "individual": _made("individual:IndividualBT"),
    "individual-crowd": _made("individual:IndividualBT", around_crowd=True),
    "groups": _made("groups:GroupBT"),
    "neighbours": _made("neighbours:Neighbours"),
    "scorers": _made("given:GivenBases"),
    "reference": _made("reference:Reference"),
}


def method(name: str) -> "RewardModel":
    """A new, unfitted model of this name."""
    return METHODS[one_of(name, tuple(METHODS), "--method")]()


def methods(names: str) -> dict[str, "RewardModel"]:
    """Unfitted models for a comma-separated list, in its order."""
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed:
        raise DataError(f"--methods is {names!r}; expected names from {', '.join(METHODS)}, separated by commas")
    for name in listed:
        one_of(name, tuple(METHODS), "--methods")
    if len(set(listed)) < len(listed):
        raise DataError(f"--methods is {names!r}; expected each method once")
    return {name: METHODS[name]() for name in listed}


def shots(text: str) -> tuple[int | None, ...]:
    """Numbers of choices from `0,1,2,5,10,20,all`; `None` is all of a user's support."""
    out: list[int | None] = []
    for part in (part.strip() for part in text.split(",")):
        if part != "all" and not part.isdecimal():
            raise DataError(f"--shots has {part!r}; expected whole numbers and 'all', separated by commas: 0,1,2,5,10,20,all")
        number = None if part == "all" else int(part)
        if number not in out:
            out.append(number)
    return tuple(out)


def one_of(value: str, allowed: Sequence[Name], option: str) -> Name:
    """`value`, if it is allowed."""
    for name in allowed:
        if name == value:
            return name
    raise DataError(f"{option} is {value!r}; expected one of {', '.join(allowed)}")


def _plain(text: str) -> str:
    """Other people's text as it is: no markup, and no control character that a terminal would obey."""
    return escape(text.translate(_OBEYED))


def note(message: str) -> None:
    """A line for the person at the terminal, on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True, emoji=False).print(_plain(message))


def solves(model: "RewardModel") -> bool:
    """Whether adapting solves to a tolerance; the published methods take a fixed number of steps, and that is all there is."""
    from palate.models.base import Fixed, Newton, Simplex

    if not model.linear:
        return model.options().get("faithful") is None  # of PAL; VPL has one pass, which always ends
    return isinstance(model.inference, Newton | Simplex | Fixed)


def what_was_found(model: "RewardModel") -> str:
    """One line on whether people were found to differ."""
    if not model.n_weights:
        alone = type(model).__name__ in ("BradleyTerry", "Reference")
        return "one reward for everybody" + ("" if alone else ": no sure gain by personal ones")
    found = f"{model.n_weights} personal weights a user"
    if type(model).__name__ == "Hierarchical" and not bool(model.state_dict()["direction"].any()):
        found += "; no reward in common was found"
    return found


def say(message: str) -> None:
    """A line of the result, on standard output, as it is."""
    sys.stdout.write(message + "\n")


def show(table: Table) -> None:
    """A table of the result, on standard output; as wide as it needs where nobody's terminal limits it."""
    console = Console()
    Console(highlight=False, emoji=False, width=None if console.is_terminal else 120).print(table)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], words: Collection[int] = (0,)) -> Table:
    """A table with columns of words, such as the first one's names, and the others of figures. Cells are text, never markup."""
    out = Table(title=_plain(title) if title else None, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        out.add_column(_plain(column), justify="left" if i in words else "right", overflow="fold")
    for row in rows:
        out.add_row(*(_plain(str(cell)) for cell in row))
    return out


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error while something runs; the value reports `(done, total, what)`. Nothing is drawn off a terminal."""
    # Rich alone would draw for FORCE_COLOR too, which CI sets, and fill a log with bars.
    drawn = sys.stderr.isatty()
    parts = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*parts, console=Console(stderr=True), transient=True, disable=not drawn) as bar:
        task = bar.add_task(what, total=None)

        def advance(done: int, total: int, now: str) -> None:
            bar.update(task, completed=done, total=total, description=now)

        yield advance


@contextmanager
def errors_as_one_line(*, debug: bool) -> Iterator[None]:
    """What went wrong on purpose, or with a file, as one line and exit code 2; with `debug` the traceback instead."""
    try:
        yield
    except (PalateError, OSError) as error:
        if debug:
            raise
        fail(str(error) if isinstance(error, PalateError) else _os_message(error))


def _os_message(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename is not None and error.strerror else str(error)


def fail(message: str) -> NoReturn:
    """Say it on standard error, as one line whoever wrote it, and leave with exit code 2."""
    note(f"palate: {' '.join(message.split())}")
    raise SystemExit(2)


def read_choices(rows: Path) -> "tuple[PairSet, ValidationReport]":
    """The good choices of a file; says how many rows were set aside, which must not cost the others."""
    from palate.data.readers import load_valid_pairs

    with progress(f"Reading {rows}"):
        pairs, report = load_valid_pairs(rows)
    if not report.ok:
        note(f"{report.n_bad} of {report.rows} rows are bad and were left out; palate validate names them")
    return pairs, report


def read_candidates(path: Path) -> list[str]:
    """Responses, one JSON string a line (they have line breaks), from a file or, for `-`, from standard input."""
    named = "standard input" if str(path) == "-" else str(path)
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{named} is not UTF-8 (byte {error.start}); expected one JSON string a line, in UTF-8") from error
    out = []
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, str):
            raise DataError(f'{named}, line {i}: {line[:60]!r} is no JSON string; expected one a line, such as "Try the soup."')
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(f"{named}, line {i}: half a character (a lone surrogate), which no text can hold; remove it")
        out.append(value)
    if not out:
        raise DataError(f"{named} has no candidates; expected one JSON string a line")
    return out


def free(out: Path, overwrite: bool, option: str = "--out") -> None:
    """Refuse to write a file where there is one, unless it may be replaced. A device, such as /dev/stdout, takes everything."""
    if out.is_file() and not overwrite:
        raise DataError(f"{option} {out} exists; give another name, or --overwrite to replace it")


def free_for_profiles(out: Path, overwrite: bool) -> None:
    """Refuse to write profiles in place of older ones, unless they may be replaced, and always in place of anything else."""
    from palate.adaptation import Profiles
    from palate.errors import ModelFileError

    try:
        if out.is_file():
            Profiles.load(out)
    except ModelFileError as error:
        raise DataError(f"--out {out} exists and holds no profiles; expected a new name, or a file of `palate adapt`") from error
    free(out, overwrite)


def free_for_model(out: Path, overwrite: bool) -> None:
    """The same for a model: refused before anything is fitted, and not when it is to be written. Other files do not matter."""
    from palate.errors import ModelFileError
    from palate.models.base import load_model
    from palate.models.files import CONFIG, NUMBERS

    if out.is_file():
        raise DataError(f"--out {out} is a file; expected a folder, or a name where one can be made")
    if not any((out / name).exists() for name in (CONFIG, NUMBERS, ENCODER_FILE)):
        return
    if not overwrite:
        raise DataError(f"--out {out} holds a model; give another name, or --overwrite to replace it")
    try:
        load_model(out)
    except ModelFileError as error:
        raise DataError(f"--out {out} holds no model that can be read ({error}); expected a new name, or a model") from error


def save_encoder(encoder: "Encoder", folder: Path) -> None:
    """Beside a model, what makes the same features again (`palate.encoders.saved`)."""
    from palate.encoders.saved import save_encoder

    save_encoder(encoder, folder)


def saved_encoder(folder: Path) -> "Encoder":
    """The encoder of a model's folder, with the fingerprint that it had (`palate.encoders.saved`)."""
    from palate.encoders.saved import saved_encoder

    return saved_encoder(folder)


def model_folder(model: Path) -> Path:
    """`model`, or where the files of ORG/NAME or ORG/NAME@REVISION on the Hub now are; a folder that exists is taken first."""
    if model.exists():
        return model
    from palate.models.hub import located

    name, _, revision = str(model).partition("@")
    return located(name, revision=revision or None).folder


def show_evaluation(evaluation: "Evaluation") -> None:
    """The table of a comparison: one row a method, as the report has it."""
    from palate.report import main_table

    rows = main_table(evaluation)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    show(table("", columns, [[row.get(name, "") for name in columns] for row in rows]))
    for failure in dict.fromkeys((failure.method, failure.message) for failure in evaluation.failures):
        note("{} failed: {}".format(*failure))
