"""`palate data`: data sets that are generated here, and those that other people published, with their terms."""

import gzip
import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from palate import terminal
from palate.data import recipes

if TYPE_CHECKING:
    from palate.data.pairs import PairSet

app = typer.Typer(no_args_is_help=True, help="Make data sets, and get published ones.")

Seed = Annotated[int, typer.Option(help="Same seed, same result on the same machine.", min=0)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there under that name.")]


@app.command()
def synthetic(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="File of the rows, JSON Lines (.gz is compressed).", show_default=False)
    ],
    users: Annotated[int, typer.Option(help="Number of users.", min=1)] = 200,
    choices: Annotated[int, typer.Option(help="Choices of each user.", min=1)] = 40,
    groups: Annotated[int, typer.Option(help="Number of groups of taste; 1 is a crowd without groups.", min=1)] = 3,
    contrarians: Annotated[float, typer.Option(help="Share of users who want the opposite of the crowd.", min=0, max=1)] = 0.0,
    drift: Annotated[float, typer.Option(help="Share of users who move to another group; needs two groups.", min=0, max=1)] = 0.0,
    noise: Annotated[float, typer.Option(help="Probability that a choice is flipped.", min=0, max=0.5)] = 0.0,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write generated choices, in English, by users with known tastes."""
    from palate.data.synthetic import Population
    from palate.data.synthetic import synthetic as generated

    terminal.free(out, overwrite, "OUT")
    population = Population(groups=groups, contrarians=contrarians, drift=drift)
    with terminal.progress("Writing texts and choosing"):
        pairs = generated(users, choices, population=population, noise=noise, seed=seed).pairs
    _write(pairs, out)


@app.command()
def prepare(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help=f"One of {', '.join(recipes.RECIPES)}.", show_default=False)],
    out: Annotated[
        Path, typer.Option(metavar="OUT", help="File of the rows, JSON Lines (.gz is compressed).", show_default=False)
    ],
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help="The published files, in the order that the recipe names.", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the split; by default the published one, else 0.", min=0)] = None,
    question: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of argilla-*: the question whose answers are read.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="FIELD", help="Of argilla-*: the field with what was asked.")] = None,
    answers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Of argilla-* and community: the fields of the answers, a,b,c; or NAME=FIELD for each where the question calls "
            "them otherwise: A=first,B=second,same= (a label without a field is a tie).",
        ),
    ] = None,
    ties: Annotated[bool, typer.Option("--ties", help="Of argilla-*: equal ranks or ratings become ties, not nothing.")] = False,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="WHAT=COLUMN of what your copy calls otherwise: user, context, chosen, rejected (arena); score "
            "(personalllm-*, with {answer} and {scorer}); annotator, prompt, preferred, conversation, language (community).",
        ),
    ] = None,
    languages: Annotated[str | None, typer.Option(metavar="LIST", help="Of community*: keep these only, such as en,it.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Of personalllm-*: users are Dirichlet(alpha).  [.001 of lore, .01 of random]")
    ] = None,
    seen_limit: Annotated[
        int | None, typer.Option(help="Of tldr-*: most choices of a seen worker to learn from.  [150]", min=1)
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn published files, or an export, into rows with the split of a recipe, as `palate compare` reads them.

    Figures on different recipes are not comparable; docs/datasets.md tells them apart.
    """
    terminal.free(out, overwrite)
    options = recipes.Options(
        alpha=alpha,
        seen_limit=seen_limit,
        languages=languages,
        columns=columns,
        question=question,
        prompt=prompt,
        answers=answers,
        ties=ties,
    )
    with terminal.progress(f"Preparing {recipe}"):
        pairs, reports = recipes.prepared(recipe, files or [], seed, options=options)
    for report in reports:
        if not report.ok:
            terminal.note(report.summary())
    _write(pairs, out)


def _write(pairs: "PairSet", out: Path) -> None:
    from palate.data.pairs import Choice
    from palate.data.rows import as_row

    def known(number: float) -> float | None:
        return None if math.isnan(number) else float(number)

    partial = out.with_name(out.name + ".partial")
    with ExitStack() as stack:
        raw: BinaryIO | gzip.GzipFile = stack.enter_context(partial.open("wb"))
        if out.suffix == ".gz":  # without name and time: same seed, same bits
            raw = stack.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0))
        for i, (chosen, rejected) in enumerate(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)):
            sides = pairs.texts[chosen], pairs.texts[rejected]
            choice = Choice(
                user_id=pairs.user_ids[pairs.user_index[i]],
                prompt=sides[0].prompt,
                chosen=sides[0].response,
                rejected=sides[1].response,
                tie=bool(pairs.tie[i]),
                weight=float(pairs.weight[i]),
                margin=known(pairs.margin[i]),
                timestamp=known(pairs.timestamp[i]),
                conversation_id=pairs.conversation[i],
                split=pairs.split[i],
            )
            raw.write(json.dumps(as_row(choice), ensure_ascii=False).encode() + b"\n")
    partial.replace(out)
    terminal.note(repr(pairs))
    terminal.say(str(out))


@app.command("list")
def list_() -> None:
    """Say which published data sets there are a loader and a recipe for: source, licence, size, users."""
    from palate.data.catalogue import PUBLISHED

    for one in PUBLISHED:
        source = f"huggingface.co/datasets/{one.repo}" if one.repo else f"by hand: {one.page}"
        facts = [("source", source), ("licence", one.licence), ("users", one.users), ("size", one.size), ("cite", one.citation)]
        terminal.say(f"{one.name}: {one.what}")
        for name, value in [*facts, ("read by", one.reader)]:
            terminal.say(f"  {name}: {value}")


@app.command()
def get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of those that `palate data list` says.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the files; by default one of that name here.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(metavar="COMMIT", help="Commit, branch or tag of the source; by default the one recorded in DIR."),
    ] = None,
) -> None:
    """Fetch a published data set from its source, check every file against its checksum, and say its terms.

    The first time the commit and the checksums are recorded in DIR/palate-data.json; afterwards they have to fit. Run it again
    after an interruption: it goes on where it was.
    """
    from palate.data.catalogue import published
    from palate.data.downloads import get as fetch

    wanted = published(name)
    terminal.note(f"{wanted.name}: {wanted.what}. Licence: {wanted.licence}. Cite: {wanted.citation}")
    with terminal.progress(f"Getting {name}") as advance:
        fetched = fetch(wanted, Path(name) if out is None else out, revision=revision, progress=advance)
    terminal.note(f"commit {fetched.commit}, checked against the {fetched.verified}; read by {wanted.reader}")
    for file in fetched.files:
        terminal.say(str(fetched.folder / file))
