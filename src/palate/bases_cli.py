"""`palate bases`: what the base rewards of a model reward, in words (`palate.naming`)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palate import cache_cli, hub_cli, terminal

if TYPE_CHECKING:
    from palate.data.pairs import PairSet
    from palate.naming import Axis, Name

SHOWN = 3  # correlations of a base, the strongest first
QUOTED = 160  # characters of a text


def bases(
    model: hub_cli.AnyModel,
    rows: Annotated[
        Path,
        typer.Argument(
            metavar="ROWS",
            help="Choices whose responses are compared, as for `palate fit`; whoever made them.",
            show_default=False,
        ),
    ],
    quote_texts: Annotated[
        bool, typer.Option("--quote-texts", help="Show the pairs that each base tells apart most, in users' own words.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the intervals, and of what chance reaches.", min=0)] = 0,
    cache: cache_cli.CacheFolder = None,
    no_cache: cache_cli.NoCache = False,
) -> None:
    """Name the crowd's reward and every base reward by the statistics of style that go with them, with intervals."""
    from palate.models.base import load_model
    from palate.naming import name_bases

    fitted = load_model(model)
    pairs, _ = terminal.read_choices(rows)
    features = cache_cli.kept(terminal.saved_encoder(model), cache, no_cache)
    with terminal.progress("Naming"):
        found = name_bases(fitted, pairs, features, seed=seed)
    cells = []
    for name in found.names:
        share = "" if name.variance_share is None else f"{name.variance_share:.0%}"
        strongest = "\n".join(_said(axis) for axis in name.axes[:SHOWN])
        cells.append((name.what, name.label, f"{name.explained:.0%}", share, strongest))
    columns = ("Direction", "Rewards", "Explained by style", "Of how people differ", "Strongest correlations")
    terminal.show(terminal.table("", columns, cells, words=(0, 1, 4)))
    if quote_texts:
        for name in found.names:
            _quote(name, pairs)
    terminal.note(
        f"Correlations within the prompt over {found.n_texts} responses to {found.n_prompts} prompts, with 95 % intervals. "
        f"Chance reaches {found.threshold:.2f} once in twenty times. {found.coordinates}"
    )


def _said(axis: "Axis") -> str:
    return f"{axis.name} {axis.correlation:+.2f} [{axis.low:+.2f}, {axis.high:+.2f}]"


def _quote(name: "Name", pairs: "PairSet") -> None:
    cells = []
    for row in (*name.highest, *name.lowest):
        chosen, rejected = (_line(pairs.texts[side[row]].response) for side in (pairs.chosen, pairs.rejected))
        cells.append((row, chosen, rejected) if row in name.highest else (row, rejected, chosen))
    if cells:
        terminal.show(terminal.table(f"{name.what}: {name.label}", ("Pair", "Rewards this", "More than this"), cells, (1, 2)))


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= QUOTED else f"{line[: QUOTED - 1]}\N{HORIZONTAL ELLIPSIS}"
