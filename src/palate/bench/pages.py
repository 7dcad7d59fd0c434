"""The pages of a benchmark, `leaderboard.md` and `leaderboard.html`: the matrix first, then a table for every board.

Both show the same words and figures. The page is one file that asks the network for nothing.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from palate.bench.board import COHORTS, FEW, SUBJECT, Line, Verdict, lines, mean_ranks, verdict
from palate.bench.board import signed as with_interval
from palate.bench.cells import LACKS
from palate.bench.results import Board, boards, with_rows_written
from palate.errors import MissingExtraError
from palate.evaluation import Estimate
from palate.report.contents import label
from palate.version import __version__

NONE = "\N{EN DASH}"
HEADS = (
    *("method", "rank", "seen", "unseen", "worst decile", "log loss", *(f"after {n}" for n in FEW)),
    *("minus Bradley-Terry", "minus Hierarchical", "parameters", "fit, s", "adapt, ms"),
)
CAPTION = (
    "Accuracy of held-out choices, mean over users, then over seeds; unseen users after all of their choices, and after 0, 1, 2 "
    "and 5 of them. Worst decile: the tenth of the unseen users who are predicted worst. Log loss in nats; knowing nothing costs "
    "0.693. Differences of the unseen accuracy on the same users, with 95 % intervals over users and seeds. Adapting is that of "
    "all unseen users together."
)
PROMISE = (
    "In every cell Hierarchical must not be below Bradley-Terry beyond the interval, must be above every published preset, and "
    "within .003 of the best fixed one. Figures are Hierarchical minus the other, paired, after all choices. A cell is judged by "
    "the methods that were measured, and says how many these are of those that can run there."
)


class Shown(NamedTuple):
    """One board as text."""

    title: str
    note: str
    rows: tuple[tuple[str, ...], ...]
    subject: int | None  # the row to stress
    failures: tuple[str, ...]


class Cell(NamedTuple):
    """One cell of the matrix as text: `state` is kept, broken or unknown."""

    state: str
    lines: tuple[str, ...]


class Page(NamedTuple):
    """Everything that both files show."""

    headline: str
    state: str
    columns: tuple[str, ...]  # conditions
    matrix: tuple[tuple[str, tuple[Cell | None, ...]], ...]  # (data set, users) and its cells
    ranks: tuple[tuple[str, str, str], ...]
    shown: tuple[Shown, ...]


def write_pages(folder: str | Path) -> Path:
    """Make `results.jsonl`, `leaderboard.md` and `leaderboard.html` in `folder` from its cells; the path of the last.

    Cells that are missing are counted on the page, so it may be made while the bench runs.

    Raises:
        DataError: the folder holds no benchmark.
        ModelFileError: a cell is damaged.
        MissingExtraError: jinja2 is not installed; the other two files are written all the same.
    Cost: the intervals, some seconds a board of 300 users, and one board's rows in memory.
    """
    folder = Path(folder)
    made = page(with_rows_written(folder, boards(folder)))
    _write(folder / "leaderboard.md", markdown(made))
    try:
        text = _html(made)
    except MissingExtraError as error:
        raise MissingExtraError(f"{error} (leaderboard.md and results.jsonl are in {folder})") from error
    return _write(folder / "leaderboard.html", text)


def page(every: Iterable[Board]) -> Page:
    """All words and figures of the boards, which are gone through once."""
    tables: list[list[Line]] = []
    verdicts: dict[tuple[str, str, str], Verdict] = {}
    shown: list[Shown] = []
    named: dict[str, None] = {}
    missing = 0
    for board in every:
        named[board.condition] = None
        missing += board.missing
        tables.append(lines(board))
        shown.append(_shown(board, tables[-1]))
        for cohort in COHORTS:
            if cohort in board.evaluation.cohorts:
                verdicts[board.data_set, board.condition, cohort] = verdict(board, cohort)
    conditions = tuple(named)
    rows = tuple(dict.fromkeys((data_set, cohort) for data_set, _, cohort in verdicts))
    matrix = tuple(
        (f"{data_set}, {cohort}", tuple(_cell(verdicts.get((data_set, condition, cohort))) for condition in conditions))
        for data_set, cohort in rows
    )
    ranks = tuple((label(name), f"{mean:.2f}", str(count)) for name, mean, count in mean_ranks(tables))
    return Page(*_headline(list(verdicts.values()), missing), conditions, matrix, ranks, tuple(shown))


def _headline(verdicts: Sequence[Verdict], missing: int) -> tuple[str, str]:
    broken, kept = (sum(one.kept is state for one in verdicts) for state in (False, True))
    unknown = len(verdicts) - broken - kept
    said = f"Hierarchical keeps its promise in {kept} of {len(verdicts)} cells of the matrix, and breaks it in {broken}"
    said += f"; {unknown} cannot be told" if unknown else ""
    said += f". {missing} cells were not run yet" if missing else ""
    return said + ".", "broken" if broken else "unknown" if unknown or missing or not verdicts else "kept"


def _cell(found: Verdict | None) -> Cell | None:
    if found is None:
        return None
    state = {True: "kept", False: "broken", None: "unknown"}[found.kept]
    mark = {True: "yes", False: "NO", None: "not measured"}
    said = [f"{check.what}: {mark[check.kept]} ({check.figures})" for check in found.checks]
    some, seeds = found.crowd_only
    if state == "broken" and some:
        said.append(f"under {some} of {seeds} seeds held-out users did not surely gain by personal weights: the crowd's reward")
    return Cell(state, tuple(said))


def _shown(board: Board, table: Sequence[Line]) -> Shown:
    names = [line.method for line in table]
    users = {
        cohort: len({*board.evaluation.where(cohort=cohort).columns["user"].tolist()}) for cohort in board.evaluation.cohorts
    }
    note = f"{len(board.seeds)} seeds ({min(board.seeds)} to {max(board.seeds)})"
    note += "".join(f", {count} {cohort} users in all" for cohort, count in users.items())
    note += f". {board.missing} cells were not run yet" if board.missing else ""
    said: dict[tuple[str, str, str], list[int]] = {}
    for failure in board.evaluation.failures:
        said.setdefault((failure.method, failure.stage, failure.message), []).append(failure.seed)
    failures = tuple(_unmeasured(*cell, seeds) for cell, seeds in said.items())
    lacks = {m: why.partition(":")[0] for m, _, why in said if why.startswith(LACKS)}
    rows = tuple(_row(line, len(board.seeds), lacks.get(line.method)) for line in table)
    stress = names.index(SUBJECT) if SUBJECT in names else None
    return Shown(f"{board.data_set}: {board.condition}", f"{note}.", rows, stress, failures)


def _unmeasured(method: str, stage: str, why: str, seeds: Sequence[int]) -> str:
    """Why a method has no figures: it broke, or these data do not have what it reads, which is no failure."""
    if why.startswith(LACKS):
        return f"{label(method)} cannot be measured here: {why}"
    return f"{label(method)} failed ({stage}, seeds {', '.join(map(str, seeds))}): {why}"


def _row(line: Line, n_seeds: int, lacks: str | None) -> tuple[str, ...]:
    rank = NONE if line.rank is None else str(line.rank)
    some = lacks or (f"{line.n_seeds} of {n_seeds} seeds" if 0 < line.n_seeds < n_seeds else "")
    name = label(line.method) + (f" ({some})" if some else "")
    figures = [_figure(value, ".4f") for value in (line.seen, line.unseen, line.worst, line.log_loss, *line.few)]
    gains = [_gain(gain) for gain in (line.against_crowd, line.against_subject)]
    costs = [_figure(line.parameters, ",d"), _figure(line.fit_seconds, ".1f"), _figure(line.adapt_ms, ".1f")]
    return (name, rank, *figures, *gains, *costs)


def _figure(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _gain(gain: Estimate | None) -> str:
    return NONE if gain is None else with_interval(gain)


def markdown(made: Page) -> str:
    """The page as Markdown; what is broken is in capitals and bold, for there are no colours."""
    out = ["# Benchmark", "", f"**{made.headline}** {PROMISE}", "", "## Robustness", ""]
    out += _table(("data set, users", *made.columns), [(name, *(_words(cell) for cell in row)) for name, row in made.matrix])
    out += ["", "## Mean ranks", "", "Of the accuracy on unseen users, over the boards on which a method has every seed.", ""]
    out += _table(("method", "mean rank", "boards"), [(_inline(name), *rest) for name, *rest in made.ranks])
    for shown in made.shown:
        out += ["", f"## {_inline(shown.title)}", "", shown.note, ""]
        out += _table(HEADS, [tuple(map(_inline, row)) for row in shown.rows])
        out += ["", *(f"- {_inline(failure)}" for failure in shown.failures)]
    out += ["", CAPTION, "", f"Made by Palate {__version__}. Every figure can be recomputed from `results.jsonl`.", ""]
    return "\n".join(out)


def _words(cell: Cell | None) -> str:
    if cell is None:
        return NONE
    head = {"kept": "kept", "broken": "**BROKEN**", "unknown": "not measured"}[cell.state]
    return "<br>".join([head, *map(_inline, cell.lines)])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return ["| " + " | ".join(row) + " |" for row in body]


def _inline(text: str) -> str:
    """One line of Markdown that shows `text` as it is: names and messages are not markup."""
    out = " ".join(text.split())
    for character in "\\`*_[]<>|#":
        out = out.replace(character, "&lt;" if character == "<" else "\\" + character)
    return out


def _html(made: Page) -> str:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("leaderboard.html needs jinja2; run: pip install 'palate[report]'") from error
    environment = Environment(
        loader=PackageLoader("palate"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    words = {"heads": HEADS, "caption": CAPTION, "promise": PROMISE, "none": NONE, "version": __version__}
    return environment.get_template("leaderboard.html").render(page=made, **words)


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="replace")
    partial.replace(path)
    return path
