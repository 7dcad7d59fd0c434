"""`palate card` and `palate push`: what a model is, written down, and the model given to others on the Hugging Face Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palate import terminal
from palate.errors import DataError

if TYPE_CHECKING:
    from palate.evaluation import Evaluation

CARD = "README.md"

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A folder written by `palate fit`.", show_default=False)]
AnyModel = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A folder written by `palate fit`, or ORG/NAME, or ORG/NAME@REVISION, on the Hugging Face Hub.",
        show_default=False,
        callback=terminal.model_folder,
    ),
]
Results = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder of a `palate compare` in which this method took part: its figures go into the card."
    ),
]
Method = Annotated[
    str | None, typer.Option(metavar="NAME", help="What the results call this model, where several methods could be it.")
]
License = Annotated[
    str | None, typer.Option("--license", metavar="ID", help="Licence of the model, such as apache-2.0; by default 'unknown'.")
]


def card(
    model: Model,
    results: Results = None,
    method: Method = None,
    license: License = None,
    repo_id: Annotated[str | None, typer.Option("--id", metavar="ORG/NAME", help="The id it will have on the Hub.")] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="A data set on the Hub that it was fitted on; may be repeated.")
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(metavar="CODE", help="A language of the texts, such as en; may be repeated.")
    ] = None,
    sample: Annotated[
        Path | None,
        typer.Option(
            metavar="ROWS", help="Choices over which the base rewards are named, as `palate bases` does; none is quoted."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the card that is there, whoever wrote it.")] = False,
) -> None:
    """Write MODEL/README.md: what the model is, how to use it, how good it is and for whom not, without naming anybody."""
    from palate.encoders.saved import ENCODER_FILE, saved_state
    from palate.models.base import load_model
    from palate.naming import name_bases
    from palate.report.card import model_card

    path = model / CARD
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists; edit it, or write it anew with --overwrite")
    fitted = load_model(model)
    text = model_card(
        fitted,
        encoder=saved_state(model) if (model / ENCODER_FILE).exists() else None,
        naming=None if sample is None else name_bases(fitted, terminal.read_choices(sample)[0], terminal.saved_encoder(model)),
        results=_results(results),
        method=method,
        repo_id=repo_id or f"ORG/{model.resolve().name}",
        license=license,
        datasets=dataset or (),
        languages=language or (),
    )
    partial = path.with_name(f"{CARD}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    terminal.say(str(path))


def push(
    model: Model,
    repo_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Its id on the Hub; made where there is none.")],
    results: Results = None,
    method: Method = None,
    license: License = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it. Without it, only you do.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch, made where there is none; by default main.")
    ] = None,
) -> None:
    """Put a model with its encoder and its card on the Hugging Face Hub, in one commit.

    MODEL/README.md is the card where it exists. The token is that of HF_TOKEN or of `hf auth login`; HF_ENDPOINT says which Hub.
    """
    from palate.alignment.hub import push_to_hub
    from palate.encoders.saved import ENCODER_FILE, saved_state
    from palate.models.base import load_model
    from palate.report.card import model_card

    text = None
    if (model / CARD).exists():
        if results is not None or method is not None or license is not None:
            raise DataError(
                f"{model / CARD} exists and is pushed as it is; leave out --results, --method and --license, or write it anew "
                "with `palate card --overwrite`"
            )
    elif model.is_dir():
        state = saved_state(model) if (model / ENCODER_FILE).exists() else None
        measured = _results(results)
        text = model_card(load_model(model), encoder=state, results=measured, method=method, repo_id=repo_id, license=license)
    commit = push_to_hub(model, repo_id, card=text, private=not public, revision=revision)
    terminal.note(f"palate.load_scorer({repo_id!r}) loads it; with revision={commit!r} it is this version for ever")
    terminal.say(f"{repo_id}@{commit}")


def _results(folder: Path | None) -> "Evaluation | None":
    from palate.evaluation import Evaluation

    if folder is None:
        return None
    path = folder / "results.jsonl" if folder.is_dir() else folder
    if not path.exists():
        raise DataError(f"{path} does not exist; expected the folder that `palate compare --out` wrote")
    return Evaluation.load(path)
