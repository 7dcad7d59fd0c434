"""Giving a model to others: its files, its encoder and its card in one commit on the Hugging Face Hub, and back as a scorer."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from palate.encoders import Encoder
from palate.encoders.saved import ENCODER_FILE, save_encoder, saved_encoder, saved_state
from palate.errors import DataError, MismatchError, PalateError
from palate.models import files, hub
from palate.models.base import RewardModel, load_model
from palate.report.card import described, is_local, model_card, sources
from palate.scoring import Scorer
from palate.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"


def push_to_hub(
    model: RewardModel | str | Path,
    repo_id: str,
    *,
    encoder: Encoder | None = None,
    card: str | None = None,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Put a model on the Hub as ORG/NAME, where `palate.load_model(repo_id)` and `palate.load_scorer(repo_id)` find it.

    One commit: whoever loads meanwhile gets the old model or the new one. Only the model's own files go: `config.json`,
    `model.safetensors`, the encoder, the card. Those of an earlier push that the new model does not have are taken away.

    Args:
        model: a fitted model, or the folder of one. A folder's encoder and README.md go with it.
        repo_id: ORG/NAME; made where it does not exist.
        encoder: what the model was fitted with, so that others can score texts; of a folder it is the one that lies there.
        card: the text of README.md; by default the folder's, else `palate.model_card` without results.
        private: only you and your organisation see it. A repository that everybody sees is not written to unless this is False;
            one that is private stays so.
        revision: a branch, made where it does not exist; main by default.
        token: with write access; by default HF_TOKEN, or what `hf auth login` stored. HF_ENDPOINT says which Hub.

    Returns:
        The hash of the commit: `palate.load_model(repo_id, revision=...)` with it is this model for ever.

    Raises:
        DataError: an id that no model can have, an encoder whose weights are in a folder of this machine, a card that the Hub
            does not take, or a repository that everybody sees where `private` was asked for.
        MismatchError: the model was fitted with another encoder, or the card is about another model.
        ModelFileError: a folder without a model, or a repository that belongs to something else.
        PalateError: the Hub cannot be reached, or does not let you write.
    """
    if not hub.is_id(repo_id):
        raise DataError(f"the id is {repo_id!r}; expected ORG/NAME, such as 'my-name/lunch-taste'")
    api = hub.client(token)
    with TemporaryDirectory(prefix="palate-") as scratch:
        folder = _gathered(model, encoder, Path(scratch))
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")
        elif not (folder / CARD).exists():
            state = saved_state(folder) if (folder / ENCODER_FILE).exists() else None
            text = model_card(load_model(folder), encoder=state, repo_id=repo_id)
            (folder / CARD).write_text(text, encoding="utf-8")
        about, own = described((folder / CARD).read_text(encoding="utf-8")), load_model(folder).fingerprint()
        if about not in (None, own):
            raise MismatchError(
                f"the card is about the model {str(about)[:12]}, and this one is {own[:12]}, fitted since; write the card anew: "
                "palate card --overwrite"
            )
        with hub.errors(repo_id, revision, PalateError), hub.quiet():
            return _pushed(api, folder, repo_id, private, revision)


def load_scorer(name: str | Path, *, revision: str | None = None, token: str | None = None) -> Scorer:
    """The model and the encoder of a folder written by `palate fit`, or of ORG/NAME on the Hub: from texts to rewards.

    Arguments as in `load_model`.

    Raises:
        ModelFileError: as `load_model`, or no encoder was saved with the model.
        MismatchError: the encoder computes other features here than it did.
        MissingExtraError: a package that the encoder needs is not installed; the message has the command.
    """
    folder, origin = hub.located(name, revision=revision, token=token)
    model = load_model(folder)
    if origin is not None:
        model.record["hub"] = origin
    return Scorer(saved_encoder(folder), model)


def _gathered(model: RewardModel | str | Path, encoder: Encoder | None, scratch: Path) -> Path:
    """A folder with what will be pushed and nothing else, read back from the files as whoever loads them will."""
    if isinstance(model, RewardModel):
        model.save_pretrained(scratch)
        if encoder is not None:
            if model.encoder is not None and encoder.fingerprint != model.encoder:
                raise MismatchError(
                    f"encoder {encoder.spec!r} has fingerprint {encoder.fingerprint[:12]}, the model was fitted on "
                    f"{model.encoder[:12]}; push it with the encoder that it was fitted with"
                )
            save_encoder(encoder, scratch)
    else:
        if encoder is not None:
            raise DataError(f"{model} is a folder with an encoder of its own; leave `encoder` out, or push the model itself")
        source = hub.located(model).folder
        load_model(source).save_pretrained(scratch)  # numbers and config that belong together, whoever died while writing them
        # What an encoder of an earlier fit has learned may lie there too: only what this one's state names goes along.
        named = [*_texts(saved_state(source))] if (source / ENCODER_FILE).exists() else []
        parts = sorted({f"encoder-{text[:12]}" for text in named if re.fullmatch("[0-9a-f]{64}", text)})
        wanted = [ENCODER_FILE, CARD, *(f"{part}/{name}" for part in parts for name in hub.LEARNED)]
        for name in wanted:
            if (source / name).is_file():
                (scratch / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, scratch / name)
    if (scratch / ENCODER_FILE).exists():
        own = sorted({source for source in sources(saved_state(scratch)) if is_local(source)})
        if own:
            raise DataError(
                f"the encoder reads {', '.join(own)}, which nobody else finds outside this machine; put it on the Hub and fit "
                "with its id, or push the model without its encoder"
            )
    return scratch


def _texts(state: Any) -> Iterator[str]:
    """Every text inside JSON, keys left out."""
    if isinstance(state, str):
        yield state
    elif isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _texts(value)


def _pushed(api: "HfApi", folder: Path, repo_id: str, private: bool, revision: str | None) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        raise DataError(
            f"{repo_id} exists and everybody sees it, but a private model was asked for; push with private=False (--public), or "
            "to another id"
        )
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    there = set(api.list_repo_files(repo_id, revision=revision))
    if files.CONFIG in there:
        files.check_foreign(Path(api.hf_hub_download(repo_id, files.CONFIG, revision=revision)).parent)
    ours = {str(path.relative_to(folder).as_posix()): path for path in sorted(folder.rglob("*")) if path.is_file()}
    gone = sorted(name for name in there - set(ours) if hub.is_ours(name))
    operations: list[Any] = [CommitOperationAdd(name, path) for name, path in ours.items()]
    operations += [CommitOperationDelete(name) for name in gone]
    try:
        commit = api.create_commit(repo_id, operations, commit_message=f"Palate {__version__}", revision=revision)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, OSError):  # the client's own errors, which `hub.errors` words
            raise
        raise DataError(f"{repo_id}: the Hub did not take the files ({' '.join(str(error).split())})") from error
    return commit.oid
