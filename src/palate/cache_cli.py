"""`palate cache`, and how the other commands use one: encoded texts are kept between runs unless --no-cache says otherwise."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palate import terminal
from palate.errors import DataError

if TYPE_CHECKING:
    from palate.data.pairs import EmbeddedPairs, PairSet
    from palate.encoders import Encoder
    from palate.encoders.upkeep import Entry

CacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        help="Where the features of encoded texts are kept between runs; by default $PALATE_CACHE, else the user's cache folder.",
        show_default=False,
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Encode every text, and keep nothing.")]
Folder = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="The cache; by default $PALATE_CACHE, else the user's.", show_default=False),
]

app = typer.Typer(no_args_is_help=True, help="Look after the features that are kept between runs.")


def encoder(spec: str, cache: Path | None = None, no_cache: bool = False) -> "Encoder":
    """The encoder named by `spec`, which keeps its rows in a cache unless `no_cache`."""
    from palate.encoders import load_encoder

    return kept(load_encoder(spec), cache, no_cache)


def kept(features: "Encoder", cache: Path | None, no_cache: bool) -> "Encoder":
    """An encoder that is there already, with the cache that the options name."""
    from palate.encoders.cache import Cache, with_cache

    if no_cache and cache is not None:
        raise DataError(f"--cache {cache} and --no-cache contradict each other; expected one of them")
    return with_cache(features, None if no_cache else Cache(cache))


def embed(features: "Encoder", pairs: "PairSet", *, prompts: bool = False) -> "EmbeddedPairs":
    """The choices as arrays, with a bar while texts are encoded and a line that says how many were; for a method that reads
    prompts, with these."""
    with terminal.progress(f"Encoding {len(pairs.texts)} texts") as advance, watched(features, advance):
        data = features.embed(pairs, prompts=prompts)
    say_encoded(features)
    return data


@contextmanager
def watched(features: "Encoder", advance: Callable[[int, int, str], None]) -> Iterator[None]:
    """While this lasts, the encoder tells `advance` how far it is."""
    from palate.encoders.cache import batched

    for part in batched(features):
        part.progress = lambda done, total, spec=part.spec: advance(done, total, f"Encoding {total} texts ({spec})")
    try:
        yield
    finally:
        for part in batched(features):
            part.progress = None


def say_encoded(features: "Encoder") -> None:
    """How many texts were encoded and how many were found, for every encoder that costs something."""
    from palate.encoders.cache import Cache, batched

    for part in batched(features):
        found = ""
        if isinstance(part.cache, Cache):
            found = f", {part.cache.found[part.spec]} found in the cache {part.cache.folder}"
        terminal.note(f"{part.spec}: {part.encoded} texts encoded{found}")


def _folder(cache: Path | None) -> Path:
    from palate.encoders.cache import default_folder

    return default_folder() if cache is None else cache


def _entries(cache: Path | None) -> "list[Entry]":
    from palate.encoders.upkeep import entries

    found = entries(_folder(cache))
    if not found:
        terminal.note(f"{_folder(cache)} holds no features")
    return found


@app.command("list")
def list_(cache: Folder = None) -> None:
    """The encoders whose features are kept, the one used last first."""
    found = _entries(cache)
    if found:
        columns = ("encoder", "fingerprint", "texts", "width", "MB", "last used")
        rows = [(e.spec, e.fingerprint[:12], e.rows, e.width, f"{e.bytes / 1e6:.1f}", _when(e.used)) for e in found]
        terminal.show(terminal.table(str(_folder(cache)), columns, rows))
    for entry in found:
        if entry.fault is not None:
            terminal.note(f"{entry.fingerprint[:12]}: {entry.fault}")


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


@app.command()
def verify(
    cache: Folder = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Forget the damaged rows, so that their texts are encoded again.")
    ] = False,
) -> None:
    """Read every row and compare it with its checksum.

    Exit code 0: everything is as it was written. 1: something is not; it is named, and with --repair forgotten.
    """
    from palate.encoders import upkeep
    from palate.encoders.shelf import repairing

    damaged = False
    for entry in _entries(cache):
        with terminal.progress(f"Reading {entry.spec}"):
            found = list(upkeep.verify(entry.folder))
        damaged |= bool(found)
        for message, _ in found:
            terminal.say(message)
        batches = sorted({batch for _, batch in found if batch is not None})
        if not found:
            terminal.say(f"{entry.spec} ({entry.fingerprint[:12]}): {entry.rows} texts, as they were written")
        elif batches and repair:
            try:
                n = upkeep.repair(entry.folder, batches)
            except BlockingIOError:
                raise DataError(f"{entry.folder} is open in another process; repair it when that has ended") from None
            terminal.note(f"{n} texts of {entry.spec} are forgotten and will be encoded again")
    if damaged:
        if not repair:
            terminal.note(f"To forget damaged batches, so that they are encoded again: {repairing(_folder(cache))}")
        raise typer.Exit(1)


@app.command()
def prune(
    cache: Folder = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="FINGERPRINT", help="Remove this encoder, named by how its fingerprint begins.")
    ] = None,
    older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", help="Remove encoders that were not used for so many days.", min=0)
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="Remove encoders, the one used longest ago first, until no more than this is left.", min=0)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
) -> None:
    """Make room: remove encoders by age, size or name, and always the bytes that nothing points at."""
    from palate.encoders import upkeep

    removals = upkeep.prune(_folder(cache), encoder=encoder, older_than=older_than, max_bytes=max_bytes, dry_run=dry_run)
    for removal in removals:
        done = "left alone" if not removal.bytes else f"{removal.bytes} bytes {'would be freed' if dry_run else 'freed'}"
        terminal.say(f"{removal.entry.spec} ({removal.entry.fingerprint[:12]}): {done}, {removal.reason}")
    if not removals:
        terminal.note(f"nothing to remove from {_folder(cache)}")
