"""From an `Evaluation` to a page one can hand on: HTML with figures, Markdown, and the rows that everything is computed from.

The rows and the Markdown need no optional package; they are written first, so a missing one costs the page and nothing else.
"""

from collections.abc import Mapping
from pathlib import Path

from palate.errors import MissingExtraError
from palate.evaluation import Evaluation
from palate.report.contents import Contents, baseline_of, contents, quotations, short_rows
from palate.report.figures import figures
from palate.version import __version__

__all__ = ["main_table", "write_markdown", "write_report", "write_results"]

Quotations = Mapping[str, list[tuple[str, str, str, str]]]


def write_report(
    evaluation: Evaluation,
    folder: str | Path,
    *,
    title: str = "Does personalisation help?",
    baseline: str | None = None,
    quarantined: Mapping[str, int] | None = None,
    quote_texts: bool = False,
) -> Path:
    """Write `report.html`, `report.md` and `results.jsonl` (with `results.facts.json`) into `folder`; the path of `report.html`.

    The page is one file that asks the network for nothing. Users' ids stand in `results.jsonl` only.

    Args:
        evaluation: at least one method with rows.
        folder: made where it is missing; each file is replaced whole or not at all.
        title: of the page.
        baseline: the method to compare with; by default Bradley-Terry, or the first method without personal weights.
        quarantined: bad rows by reason, as in `ValidationReport.reasons`; None where nobody counted.
        quote_texts: show the surest wrong predictions in users' own words.

    Raises:
        DataError: no rows, an unknown baseline, or texts asked for where there are none.
        MissingExtraError: matplotlib or jinja2 is not installed; the other files are written all the same.
    Cost: a few seconds, most of it in intervals.
    """
    folder = Path(folder)
    parts = _parts(evaluation, baseline, quarantined)
    quoted = _quoted(evaluation, parts, quote_texts)
    write_results(evaluation, folder)
    _write_markdown(parts, folder, title, quoted)
    try:
        page = _page(evaluation, parts, title, quoted)
    except MissingExtraError as error:
        written = f"report.md and results.jsonl are in {folder}"
        raise MissingExtraError(f"{error} ({written}, report.html was not written)") from error
    return _write(folder / "report.html", page)


def write_results(evaluation: Evaluation, folder: str | Path) -> Path:
    """Write `results.jsonl` and `results.facts.json` (see `Evaluation.save`); the path of the former. Needs no extra."""
    path = Path(folder) / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    evaluation.save(path)
    return path


def write_markdown(
    evaluation: Evaluation,
    folder: str | Path,
    *,
    title: str = "Does personalisation help?",
    baseline: str | None = None,
    quarantined: Mapping[str, int] | None = None,
    quote_texts: bool = False,
) -> Path:
    """Write `report.md`: the words and tables of the page, without figures. Needs no extra. Arguments as in `write_report`."""
    parts = _parts(evaluation, baseline, quarantined)
    return _write_markdown(parts, Path(folder), title, _quoted(evaluation, parts, quote_texts))


def main_table(evaluation: Evaluation, *, baseline: str | None = None) -> list[dict[str, str]]:
    """One mapping per method (and data set, where there are several): accuracies, worst decile, paired differences, as text.

    What a terminal shows. Raises `DataError` as `write_report` does. Needs no extra.
    """
    against = baseline_of(evaluation, baseline)
    return [row for name in evaluation.data_sets for row in short_rows(evaluation, name, against)]


def _parts(evaluation: Evaluation, baseline: str | None, quarantined: Mapping[str, int] | None) -> list[Contents]:
    against = baseline_of(evaluation, baseline)
    out = []
    for name in evaluation.data_sets:
        methods = evaluation.where(data_set=name).methods
        out.append(contents(evaluation, name, against if against in methods else methods[0], quarantined))
    return out


def _quoted(evaluation: Evaluation, parts: list[Contents], wanted: bool) -> Quotations:
    return {part.data_set: list(quotations(evaluation, part.data_set, part.subject)) for part in parts} if wanted else {}


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="replace")  # half a character in somebody's text is no reason to fail
    partial.replace(path)
    return path


def _page(evaluation: Evaluation, parts: list[Contents], title: str, quoted: Quotations) -> str:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("the HTML report needs jinja2; run: pip install 'palate[report]'") from error
    drawn = {part.data_set: figures(evaluation, part.data_set, part.baseline, part.subject) for part in parts}
    environment = Environment(
        loader=PackageLoader("palate"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("report.html")
    return template.render(title=title, parts=parts, figures=drawn, quoted=quoted, version=__version__)


def _write_markdown(parts: list[Contents], folder: Path, title: str, quoted: Quotations) -> Path:
    lines = [f"# {_inline(title)}", ""]
    for part in parts:
        if part.data_set:
            lines += [f"## {_inline(part.data_set)}", ""]
        lines += [f"**{_inline(part.headline)}** {_inline(part.second)}", ""]
        lines += [f"> {_inline(failure)}\n" for failure in part.failures]
        for table in part.tables:
            lines += [f"### {_inline(table.title)}", ""]
            lines += [_inline(table.caption), "", _row(table.columns), _row(["---", *["---:"] * (len(table.columns) - 1)])]
            lines += [*(_row(row) for row in table.rows), ""]
        lines += ["Read with care:", "", *(f"- {_inline(caveat)}" for caveat in part.caveats), ""]
        for prompt, chosen, rejected, probability in quoted.get(part.data_set, []):
            texts = (("Prompt", prompt), ("Chosen", chosen), ("Rejected", rejected))
            lines += [f"- {name}: {_inline(text)}" for name, text in texts] + [
                f"- Probability given to the choice: {probability}",
                "",
            ]
    lines += [f"Made by Palate {__version__}. Every figure can be recomputed from `results.jsonl`.", ""]
    return _write(folder / "report.md", "\n".join(lines))


def _row(cells: "tuple[str, ...] | list[str]") -> str:
    return "| " + " | ".join(cell if cell.strip("-:") == "" else _inline(cell) for cell in cells) + " |"


def _inline(text: str) -> str:
    """One line of Markdown that shows `text` as it is: users' texts and names are not markup."""
    out = " ".join(text.split())
    for character in "\\`*_[]<>|#":
        out = out.replace(character, "&lt;" if character == "<" else "\\" + character)
    return out
