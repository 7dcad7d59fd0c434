"""`palate fit`: on frozen features, or with --lora and --hidden through the encoder (`palate.end_to_end`)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from palate import cache_cli, terminal
from palate.errors import DataError

if TYPE_CHECKING:
    from palate.data.pairs import PairSet
    from palate.encoders import Encoder
    from palate.models.base import RewardModel

GROUP = "Learning the features too"

Lora = Annotated[
    bool,
    typer.Option("--lora", help="Train LoRA adapters in the encoder's model, by the method's own loss.", rich_help_panel=GROUP),
]
Rank = Annotated[int, typer.Option("--lora-rank", help="Rank of the adapters.", min=1, rich_help_panel=GROUP)]
Hidden = Annotated[
    str,
    typer.Option(
        "--hidden", metavar="WIDTHS", help="Hidden layers after the features, such as 256 or 512,128.", rich_help_panel=GROUP
    ),
]
Epochs = Annotated[int, typer.Option("--epochs", help="Most passes over the users.", min=1, rich_help_panel=GROUP)]
Rate = Annotated[float, typer.Option("--rate", help="Learning rate of adapters and layers.", rich_help_panel=GROUP)]
Checkpointing = Annotated[
    bool,
    typer.Option("--checkpointing", help="Less memory: activations are computed again on the way back.", rich_help_panel=GROUP),
]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Train in bfloat16 (features are not).", rich_help_panel=GROUP)]


class Tuning(NamedTuple):
    """What the options ask for."""

    lora: bool
    rank: int
    hidden: str
    epochs: int
    rate: float
    checkpointing: bool
    bf16: bool


USUAL = Tuning(lora=False, rank=16, hidden="", epochs=10, rate=2e-4, checkpointing=False, bf16=False)


def asked(lora: bool, rank: int, hidden: str, epochs: int, rate: float, checkpointing: bool, bf16: bool) -> Tuning:
    """The options as one. Of several processes each takes its own device now, before an encoder is loaded onto one."""
    from palate.devices import Team

    Team()
    wanted = Tuning(lora, rank, hidden, epochs, rate, checkpointing, bf16)
    if not (lora or hidden) and wanted != USUAL:
        options = "--lora-rank, --epochs, --rate, --checkpointing and --bf16"
        raise DataError(
            f"{options} are of --lora and --hidden, which train the features too; give one of these, or leave them out"
        )
    return wanted


def fitted(
    features: "Encoder", pairs: "PairSet", model: "RewardModel", wanted: Tuning, *, method: str, out: Path, seed: int
) -> "RewardModel":
    """The model, fitted, and written to `out` with its encoder; of several processes the first one writes."""
    from palate.devices import Team
    from palate.encoders.saved import save_together
    from palate.training import fit

    if wanted.lora or wanted.hidden:
        features, model = _through(features, pairs, model, wanted, seed)
    else:
        data = cache_cli.embed(features, pairs, prompts=model.reads_prompts)
        with terminal.progress(f"Fitting {method}") as advance:
            model = fit(data, model, seed=seed, progress=lambda share, what: advance(round(100 * share), 100, what))
    if not Team().rank:
        save_together(model, features, out)
    return model


def _through(
    features: "Encoder", pairs: "PairSet", model: "RewardModel", wanted: Tuning, seed: int
) -> "tuple[Encoder, RewardModel]":
    from palate.encoders.tuned import LoRA
    from palate.end_to_end import Passes, fit_through

    widths = [part.strip() for part in wanted.hidden.split(",") if part.strip()]
    if not all(width.isdecimal() and int(width) for width in widths):
        raise DataError(f"--hidden is {wanted.hidden!r}; expected whole numbers above 0, separated by commas: 512,128")
    passes = Passes(epochs=wanted.epochs, rate=wanted.rate, checkpointing=wanted.checkpointing, bf16=wanted.bf16)
    with terminal.progress("Tuning") as advance:
        features, model = fit_through(
            features,
            pairs,
            model,
            lora=LoRA(wanted.rank) if wanted.lora else None,
            hidden=tuple(map(int, widths)),
            passes=passes,
            seed=seed,
            progress=lambda share, what: advance(round(100 * share), 100, what),
        )
    found = model.record["tuning"]
    gain = f"log loss of {found['held_out']} held-out users lower by {found['gain']:.4f}, standard error {found['error']:.4f}"
    terminal.note(f"tuned, pass {found['epoch']}: {gain}" if found["accepted"] else f"not tuned, no sure gain ({gain})")
    return features, model
