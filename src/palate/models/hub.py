"""A model by its id on the Hugging Face Hub: which files of a repository are asked for, and what is said where that fails.

`config.json` comes first. Only where it is ours are the others asked for, from the same commit, so that the id of somebody's
language model costs a kilobyte and not its weights. JSON and safetensors are all that is ever asked for: a pickle beside them
stays where it is. Files are kept in the Hub's own cache, and without a network what is there is used.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from palate.errors import DataError, ModelFileError, PalateError
from palate.models import files
from palate.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# The model, its encoder, and what an encoder with learned parts keeps in a folder of its own.
LEARNED = ("adapter_config.json", "adapter_model.safetensors", "layers.safetensors")
OURS = (files.CONFIG, files.NUMBERS, "encoder.json", *(f"encoder-*/{name}" for name in LEARNED))
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Place(NamedTuple):
    """A folder with a model, and where on the Hub it is from: id and commit, or None for a folder of this machine."""

    folder: Path
    origin: dict[str, str] | None


def is_id(name: str) -> bool:
    """Whether `name` could be a model on the Hub: ORG/NAME."""
    return _ID.fullmatch(name) is not None


def is_ours(path: str) -> bool:
    """Whether a file of a repository, by its path there, is one of those that a model is made of."""
    return any(fnmatchcase(path, pattern) for pattern in OURS)


def client(token: str | None) -> "HfApi":
    """The Hub's own client. Without a token it takes HF_TOKEN, or what `hf auth login` stored; HF_ENDPOINT says which Hub."""
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="palate", library_version=__version__)


def located(name: str | Path, *, revision: str | None = None, token: str | None = None) -> Place:
    """The folder `name`, or, where there is none of that name, the folder into which the files of the model ORG/NAME were put.

    Args:
        name: a folder, or an id; a `Path` is always a folder.
        revision: branch, tag or commit of an id; its main branch by default.
        token: for a private model; by default HF_TOKEN, or what `hf auth login` stored.

    Raises:
        DataError: a revision of a folder, or an id that no model can have.
        ModelFileError: the Hub cannot be reached, has no such model, does not show it, or shows something of another library.
    Cost: two small requests and the files; what is in the cache is not fetched again.
    """
    folder = Path(name)
    if folder.exists() or isinstance(name, Path) or not is_id(name):
        if revision is not None:
            raise DataError(f"revision is {revision!r}, but {folder} is no id on the Hub; expected ORG/NAME, or no revision")
        return Place(folder, None)
    api = client(token)
    with errors(name, revision, ModelFileError), quiet():
        commit = api.resolve_revision(name, revision=revision)
        config = Path(api.hf_hub_download(name, files.CONFIG, revision=commit))
        try:
            files.check_ours(config.parent)
        except ModelFileError as error:
            raise ModelFileError(f"{name} on the Hub is no model of palate that can be read here: {error}") from error
        there = api.snapshot_download(name, revision=commit, allow_patterns=list(OURS))
    return Place(Path(there), {"repo_id": name, "commit": commit.resolved})


@contextmanager
def errors(repo_id: str, revision: str | None, kind: type[PalateError]) -> Iterator[None]:
    """What the Hub's client raises, as an error of `kind` that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
    )
    from huggingface_hub.errors import HTTPError as ClientError  # type: ignore[attr-defined]  # of a library that is not ours to name

    hub = constants.ENDPOINT
    absent = f"{repo_id} is no folder here, and" if kind is ModelFileError else f"{repo_id} was not written:"
    signed = "Set HF_TOKEN, or run `hf auth login`, with a token that may"
    try:
        yield
    except PalateError:
        raise
    except HFValidationError as error:
        raise DataError(f"{repo_id!r} can be no model on the Hub ({error}); expected ORG/NAME") from error
    except GatedRepoError as error:
        raise kind(f"{repo_id} is shown only to whom its owners let in; ask them on {hub}/{repo_id}. {signed} read it") from error
    except RepositoryNotFoundError as error:
        raise kind(f"{absent} {hub} has no such model, or it is private. Check the name. {signed} reach it") from error
    except RevisionNotFoundError as error:
        raise kind(f"{repo_id} has no revision {revision!r}; expected a branch, a tag or a commit of it") from error
    except (LocalEntryNotFoundError, RevisionResolutionError) as error:
        why = f"{hub} cannot be reached"
        if constants.is_offline_mode():
            why = "the Hub may not be asked (HF_HUB_OFFLINE is set)"
        raise kind(
            f"{absent} {why} ({_first_cause(error)}), and its cache has no copy. Check the connection, or give a folder written "
            "by model.save_pretrained"
        ) from error
    except EntryNotFoundError as error:
        raise kind(
            f"{repo_id} on {hub} has no {files.CONFIG}, so it is no model of palate; expected one that palate.push_to_hub wrote"
        ) from error
    except OfflineModeIsEnabled as error:
        raise kind(f"{hub} may not be asked, because HF_HUB_OFFLINE is set; unset it and try again") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise kind(f"{hub} does not let you at {repo_id} (HTTP {status}). {signed} do that, or check its owner") from error
        raise kind(f"{hub} answered HTTP {status} about {repo_id} ({_short(error)}); try again later") from error
    except (OSError, ClientError) as error:
        raise kind(
            f"the connection to {hub} failed on {repo_id} ({type(error).__name__}: {_short(error)}); check it and try again"
        ) from error


def quiet() -> AbstractContextManager[object]:
    """The client's progress bars on a terminal only, unless HF_HUB_DISABLE_PROGRESS_BARS says something: a log is no place."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    drawn = sys.stderr.isatty() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None
    return nullcontext() if drawn else disable_progress_bars()


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {_short(error)}"


def _short(error: BaseException) -> str:
    """Its words in one line, because a message is one."""
    return " ".join(str(error).split())[:200]
