"""The files of published data sets from their sources, each with a checksum. `catalogue` says what there is.

A data set is asked for at one commit of its repository. The first download writes `palate-data.json` beside the files, with the
commit and the SHA-256 of each; every later one, on whatever machine the file is taken to, gets that commit and those bytes, or an
error. The checksums of a first download are the source's own (the hub tells them apart from the content), because no others are
known here: that first time it is the source that is trusted.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from palate.data.catalogue import Published
from palate.errors import DataError
from palate.version import __version__

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

LOCK = "palate-data.json"
_CHUNK = 2**20


class Fetched(NamedTuple):
    """Files of a data set that are what they should be: their folder, names and commit."""

    folder: Path
    files: tuple[str, ...]
    commit: str
    verified: str  # against what: the lock file, or what the source said


def get(
    wanted: Published,
    folder: "str | Path",
    *,
    revision: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Fetched:
    """The files of a data set in `folder`, fetched where they are not there, each checked against its checksum.

    A transfer that stops goes on where it was when this is called again; a file stands under its name only once it is whole and
    right, and a file that is there already is never overwritten. Where `palate-data.json` is there and every file fits it,
    nothing is asked of anybody.

    Args:
        wanted: what `catalogue.published` gave.
        folder: made where there is none.
        revision: branch, tag or commit; by default the recorded commit, or else that of `wanted`.
        progress: called with (files done, files, name).

    Raises:
        DataError: a data set that has to be fetched by hand; no connection; no such revision or files; bytes that do not fit
            their checksum; a lock file of another data set or commit.
    Cost: the transfer, and a pass over each file for its checksum.
    """
    place = Path(folder)
    if wanted.repo is None:
        raise DataError(
            f"{wanted.name} cannot be fetched from here: get it by hand from {wanted.page}, and give it to {wanted.reader}"
        )
    lock = _read_lock(place / LOCK, wanted, revision)
    if lock is not None and all((place / name).is_file() for name in lock["files"]):
        for name, entry in lock["files"].items():
            _Sum("SHA-256", entry["sha256"], str(place / LOCK)).check(place / name)
        return Fetched(place, tuple(lock["files"]), lock["commit"], "lock file")
    with _asking(wanted, place):
        return _fetched(wanted, place, lock, revision, progress)


class _Sum(NamedTuple):
    """What a file has to hash to, and who says so: SHA-256, or of a small file of the hub git's hash (SHA-1 with its size)."""

    kind: str
    value: str
    source: str

    def of(self, path: Path) -> str:
        return _hash(path, hashlib.sha256() if self.kind == "SHA-256" else hashlib.sha1(b"blob %d\x00" % path.stat().st_size))

    def check(self, path: Path) -> None:
        if (found := self.of(path)) != self.value:
            raise DataError(
                f"{path} has {self.kind} {found}; expected {self.value} ({self.source}). Move it away, and run the command again"
            )


def _fetched(
    wanted: Published,
    place: Path,
    lock: "dict[str, Any] | None",
    revision: str | None,
    progress: Callable[[int, int, str], None] | None,
) -> Fetched:
    from palate.models.hub import client

    assert wanted.repo is not None
    asked = lock["commit"] if lock else revision or wanted.revision
    info = client(None).dataset_info(wanted.repo, revision=asked, files_metadata=True)
    if info.sha is None or (lock and info.sha != lock["commit"]):
        raise DataError(f"{wanted.page} says that {asked!r} is commit {info.sha}; expected that commit (try again later)")
    there = {one.rfilename: one for one in info.siblings or []}
    names = _matching(wanted, there, asked) if lock is None else [name for name in lock["files"] if name in there]
    if lock is not None and len(names) < len(lock["files"]):
        raise DataError(
            f"{wanted.page} no longer has all of {', '.join(lock['files'])} at {asked}; expected what {place / LOCK} says"
        )
    entries: dict[str, dict[str, Any]] = {}
    for done, name in enumerate(names):
        if progress is not None:
            progress(done, len(names), name)
        path = place / name
        right = (
            _told(there[name], wanted.page) if lock is None else _Sum("SHA-256", lock["files"][name]["sha256"], str(place / LOCK))
        )
        if not path.is_file():
            _transfer(wanted.repo, info.sha, there[name], path, right)
        elif right is not None:
            right.check(path)
        entries[name] = {"sha256": _hash(path, hashlib.sha256()), "size": path.stat().st_size}
    if lock is None:
        _write_lock(place / LOCK, {"name": wanted.name, "repo": wanted.repo, "commit": info.sha, "files": entries})
    return Fetched(place, tuple(names), info.sha, "source" if lock is None else "lock file")


def _told(file: "RepoSibling", page: str) -> _Sum | None:
    """The checksum that the hub knows; None where it tells none, and the lock file begins with what came."""
    if file.lfs is not None:
        return _Sum("SHA-256", file.lfs.sha256, page)
    return None if file.blob_id is None else _Sum("git hash", file.blob_id, page)


def _transfer(repo: str, commit: str, file: "RepoSibling", path: Path, right: _Sum | None) -> None:
    """One file, continued where an earlier transfer of the same content stopped; under its name only once it is right.

    The hub's client itself begins anew after an interruption (it deletes what came), which for gigabytes is no answer.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, and not said to be exported

    from palate.models.hub import quiet

    path.parent.mkdir(parents=True, exist_ok=True)
    content = hashlib.sha256(f"{commit} {right and right.value}".encode()).hexdigest()[:12]
    partial = path.with_name(f"{path.name}.{content}.partial")
    with quiet(), partial.open("ab") as stream:
        if file.size is None or stream.tell() > file.size:
            stream.seek(0)
            stream.truncate()  # from where it stands, so that tell() below is 0 as well
        if stream.tell() != file.size:
            headers = build_hf_headers(library_name="palate", library_version=__version__)
            url = hf_hub_url(repo, file.rfilename, repo_type="dataset", revision=commit)
            http_get(url, stream, headers=headers, resume_size=stream.tell(), expected_size=file.size)
    if right is not None:
        try:
            right.check(partial)
        except DataError as error:
            partial.unlink()
            raise DataError(f"what came as {path} is not what was published, and was removed: {error}") from error
    partial.replace(path)


def _matching(wanted: Published, there: "Mapping[str, RepoSibling]", revision: str) -> list[str]:
    names = sorted(name for name in there if any(fnmatchcase(name, pattern) for pattern in wanted.files))
    unsafe = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if unsafe:
        raise DataError(f"{wanted.repo} has a file named {unsafe[0]!r}, which would leave the folder; nothing was fetched")
    exact = [pattern for pattern in wanted.files if not any(sign in pattern for sign in "*?[")]
    missing = [name for name in exact if name not in there]
    if missing or not names:
        found = ", ".join(sorted(there)[:8]) or "nothing"
        raise DataError(
            f"{wanted.repo} at {revision!r} has no {', '.join(missing or wanted.files)}; it has {found}. Give another "
            f"--revision, or get the files by hand from {wanted.page}"
        )
    return names


def _read_lock(path: Path, wanted: Published, revision: str | None) -> "dict[str, Any] | None":
    if not path.exists():
        return None
    try:
        lock = json.loads(path.read_text(encoding="utf-8"))
        held = lock["name"], lock["repo"], lock["commit"]
        sums = {name: entry["sha256"] for name, entry in lock["files"].items()}
        if lock["version"] != 1 or not sums or not all(isinstance(one, str) for one in (*held, *sums.values())):
            raise TypeError("another version or shape")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error!r}); remove it to fetch anew, trusting the source again") from error
    if held[1] != wanted.repo:
        raise DataError(f"{path} is of {held[1]}, not of {wanted.repo}; expected a folder for each data set (--out)")
    if revision is not None and _is_other(revision, held[2]):
        raise DataError(
            f"{path} holds commit {held[2]}, and {revision!r} was asked for; expected another folder (--out), or no revision"
        )
    for name in sums:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{path} names the file {name!r}, which is outside the folder; remove the lock file")
    found: dict[str, Any] = lock
    return found


def _is_other(revision: str, commit: str) -> bool:
    """Whether `revision` is surely not `commit`; a branch or tag is, because it may have moved."""
    return len(revision) < 7 or not commit.startswith(revision)


def _write_lock(path: Path, lock: "dict[str, Any]") -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps({"version": 1, **lock}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _hash(path: Path, digest: "hashlib._Hash") -> str:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _asking(wanted: Published, place: Path) -> Iterator[None]:
    """What the hub's client raises, as one line that says what was tried and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.errors import HTTPError as ClientError  # type: ignore[attr-defined]  # of a library that is not ours to name

    files = ", ".join(wanted.files)
    by_hand = f"Or get {files} from {wanted.page} on a machine that can, put them into {place}, and give them to {wanted.reader}"
    signed = "set HF_TOKEN, or run `hf auth login`"
    try:
        yield
    except GatedRepoError as error:
        raise DataError(
            f"{wanted.repo} is shown only to whom its owners let in: accept its terms on {wanted.page}, then {signed}"
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(f"{wanted.repo} has no such revision; give another --revision. {by_hand}") from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{constants.ENDPOINT} has no data set {wanted.repo}, or it is private: look at {wanted.page}, and {signed}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise DataError(f"{constants.ENDPOINT} answered HTTP {status} about {wanted.repo}; try again later. {by_hand}") from error
    except (OSError, ClientError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if constants.is_offline_mode():
            why = "HF_HUB_OFFLINE is set"
        raise DataError(
            f"{wanted.repo} could not be fetched from {constants.ENDPOINT} ({why}). What has come so far is kept: run the "
            f"command again when there is a connection. {by_hand}"
        ) from error
