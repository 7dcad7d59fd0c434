"""Figures of the tables in benchmarks/ABLATIONS.md, for docs/open-questions.md: its numbers, nothing is run.

    python -m benchmarks pictures --out docs/figures

A cell's number is the first one in it, so that what stands in brackets behind it is left out.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.drawing import Line, Panel, draw

PAGE = Path(__file__).with_name("ABLATIONS.md")
NUMBER = re.compile(r"[-+]?\d*\.?\d+")

Table = list[list[str]]


def tables(text: str) -> dict[str, list[Table]]:
    """The tables under each second-level heading, head and rows as cells."""
    out: dict[str, list[Table]] = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        rows = [
            [cell.strip() for cell in line.strip("| ").split("|")] if line.startswith("|") else None for line in body.splitlines()
        ]
        found: list[Table] = []
        open_table = False
        for cells in rows:
            if cells is None:
                open_table = False
            elif not open_table:
                found.append([cells])
                open_table = True
            elif set("".join(cells)) - set("-: "):
                found[-1].append(cells)
        out[title] = found
    return out


def number(cell: str) -> float:
    """The first number of a cell. Raises `ValueError` where it has none."""
    found = NUMBER.search(cell.replace("*", ""))
    if found is None:
        raise ValueError(f"the cell {cell!r} of {PAGE.name} has no number; expected one to draw")
    return float(found[0])


def series(table: Table, columns: Sequence[str], rows: slice = slice(None)) -> list[Line]:
    """The named columns as lines over the rows, 0, 1, 2 ..."""
    head, body = table[0], table[1:][rows]
    return [
        Line(name, list(range(len(body))), [number(line[head.index(name)]) for line in body], look=look)
        for look, name in enumerate(columns)
    ]


def labels(table: Table, column: str, rows: slice = slice(None)) -> list[str]:
    return [line[table[0].index(column)].replace("`", "") for line in table[1:][rows]]


def bases(found: Mapping[str, list[Table]]) -> list[Panel]:
    table = found["Number of base rewards"][0]
    lines = series(table, ("MRM", "PReF", "LoRe", "Hierarchical"))
    return [Panel("Polis-ssis", "most base rewards, K", "accuracy, unseen users", lines, ticks=labels(table, "K"))]


def inner(found: Mapping[str, list[Table]]) -> list[Panel]:
    rates, batches = found["MRM: inner rate, inner steps, outer rate, order"][0], found["MRM: rho, gamma and users a step"]
    steps = series(rates, ("1 step", "5 steps", "20 steps"))
    told = [label.split()[0] for label in labels(rates, "inner rate")]
    robust = batches[0]
    gammas = [name.removeprefix("gamma ").split()[0] for name in robust[0][1:]]
    rows = [
        Line(f"rho {row[0]}", range(len(gammas)), [number(cell) for cell in row[1:]], look=k) for k, row in enumerate(robust[1:])
    ]
    return [
        Panel("MRM, mixture of four, Polis-ssis", "inner rate, Adam on the logits", "accuracy, unseen users", steps, ticks=told),
        Panel("robust objective (plain mean: .846)", "gamma", "accuracy, unseen users", rows, ticks=gammas),
    ]


def data(found: Mapping[str, list[Table]]) -> list[Panel]:
    table = found["Size of the data"][0]
    names = ("Bradley-Terry", "LoRe", "MRM", "PReF", "Hierarchical")
    users, few = slice(3, None, -1), (0, 4, 5, 6)
    choices = [table[0], *(table[1 + row] for row in reversed(few))]
    return [
        Panel(
            "all choices of each",
            "share of the 77 seen users",
            "accuracy, unseen users",
            series(table, names, users),
            ticks=("1/8", "1/4", "1/2", "all"),
        ),
        Panel(
            "all seen users", "choices of each", "accuracy, unseen users", series(choices, names), ticks=("5", "10", "20", "all")
        ),
    ]


def width(found: Mapping[str, list[Table]]) -> list[Panel]:
    table = found["Size of the base"][0]
    ticks = [f"{name}\n{dim}" for name, dim in zip(labels(table, "encoder"), labels(table, "D"), strict=True)]
    lines = series(table, ("Bradley-Terry", "Hierarchical", "worst tenth, Hierarchical"))
    return [
        Panel(
            "ConvArg",
            "encoder and D",
            "accuracy, unseen users",
            lines,
            ticks=[tick.replace(", ", "\n") for tick in ticks],
            joined=False,
        )
    ]


def robust(found: Mapping[str, list[Table]]) -> list[Panel]:
    table = found["Robust objectives: what they do to the users who are served worst"][0]
    names = table[0][2:]
    shares = slice(0, 6)
    ticks = [label.removeprefix("worst ").replace(" %", "") for label in labels(table, "unseen users", shares)]
    return [
        Panel("Polis-ssis, all choices", "worst users, %", "gain over the plain mean", series(table, names, shares), ticks=ticks),
        Panel(
            "after few choices",
            "",
            "gain over the plain mean",
            series(table, names, slice(6, None)),
            ticks=["mean\n0", "worst\n0", "worst\n1", "mean\n5", "worst\n5"],
            joined=False,
        ),
    ]


def meta(found: Mapping[str, list[Table]]) -> list[Panel]:
    table = found["MRM: what each part is worth"][0]
    rows = slice(0, 9)
    ways = ("whole", "RPO", "no meta", "start")
    ticks = ["no\nbases", *(f"exact\n{way}" for way in ways), *(f"mixed\n{way}" for way in ways)]
    return [
        Panel(
            "Polis-ssis, MRM",
            "part that is there",
            "accuracy, unseen users",
            series(table, ("unseen", "worst tenth"), rows),
            ticks=ticks,
            joined=False,
        )
    ]


PICTURES: Mapping[str, tuple[Callable[[Mapping[str, list[Table]]], list[Panel]], str]] = {
    "bases": (bases, "Accuracy against the number of base rewards."),
    "inner": (inner, "Accuracy of MRM against the inner rate and steps, and against rho and gamma."),
    "data": (data, "Accuracy against the number of seen users, and of the choices of each."),
    "width": (width, "Accuracy against the encoder's width."),
    "robust": (robust, "Gains of robust objectives over the plain mean for the worst-served users."),
    "meta": (meta, "Accuracy of MRM without each of its parts."),
}


def main(arguments: Sequence[str]) -> None:
    """Draw all figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks pictures", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="folder of the figures")
    given = parser.parse_args(arguments)
    found = tables(PAGE.read_text(encoding="utf-8"))
    for name, (panels, description) in PICTURES.items():
        draw(given.out / f"ablation-{name}.svg", panels(found), description)
        print(given.out / f"ablation-{name}.svg")
