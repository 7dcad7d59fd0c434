"""`palate train`: a training run that logs, keeps checkpoints and goes on after it was stopped (`palate.runs`)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palate import cache_cli, terminal
from palate.errors import DataError

if TYPE_CHECKING:
    from palate.models.base import RewardModel


def train(
    rows: Annotated[Path, typer.Argument(metavar="ROWS", help="Choices, as for `palate fit`.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of log.jsonl, checkpoints/ and model/.", show_default=False)],
    encoder: Annotated[str, typer.Option(metavar="SPEC", help="How texts become features, as for `palate fit`.")] = "style",
    method: Annotated[str, typer.Option(metavar="NAME", help="A method that learns in epochs: mrm or mrm-faithful.")] = "mrm",
    every: Annotated[int, typer.Option(help="Epochs between checkpoints.", min=1)] = 10,
    hold_out: Annotated[
        float,
        typer.Option(
            help="Share of the users who are not trained on; at each checkpoint they are adapted from half of what they have, "
            "and their accuracy on the rest is logged.",
            min=0,
            max=0.9,
        ),
    ] = 0.0,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of mrm-faithful, 200 as published; mrm chooses its own.", min=1)
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Inner and outer rate of mrm-faithful: 0.001 as published for PRISM, 0.005 for TL;DR."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in DIR, to the same bits.")] = False,
    seed: Annotated[int, typer.Option(help="Same seed, same result on the same machine.", min=0)] = 0,
    cache: cache_cli.CacheFolder = None,
    no_cache: cache_cli.NoCache = False,
) -> None:
    """Learn what is shared epoch by epoch, with a log and checkpoints; killed at any moment, it goes on with --resume.

    DIR/model is a model for [bold]palate adapt[/bold] and [bold]palate rank[/bold], as of the last checkpoint.
    """
    from palate.data.splits import holdout_users, split
    from palate.runs import MODEL
    from palate.runs import train as run

    model = _model(method, epochs, rate)
    pairs, _ = terminal.read_choices(rows)
    features = cache_cli.encoder(encoder, cache, no_cache)
    data = cache_cli.embed(features, pairs)
    held_out = None
    if hold_out:
        kept, held = holdout_users(data, hold_out, seed)
        data, others = data[kept], data[held]
        halves = split(others, by="unit", unseen=0.0, seed=seed)
        held_out = others[halves.train], others[halves.test_seen]
    with terminal.progress(f"Training {method}") as advance:
        run(
            model,
            data,
            out,
            every=every,
            held_out=held_out,
            resume=resume,
            seed=seed,
            on_save=lambda folder: terminal.save_encoder(features, folder),
            progress=lambda share, what: advance(round(100 * share), 100, what),
        )
    terminal.note(f"{method}, trained on {data!r}")
    terminal.say(str(out / MODEL))


def _model(method: str, epochs: int | None, rate: float | None) -> "RewardModel":
    if epochs is None and rate is None:
        return terminal.method(method)
    if method != "mrm-faithful":
        raise DataError(f"--epochs and --rate are those of mrm-faithful; {method!r} has none: leave them out")
    from palate.models.mrm import MRM

    rate = 1e-3 if rate is None else rate
    return MRM.faithful(inner_rate=rate, outer_rate=rate, epochs=200 if epochs is None else epochs)
