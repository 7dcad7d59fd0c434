"""`palate serve`: profiles behind HTTP (`palate.server`)."""

import json
import tempfile
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palate import terminal
from palate.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from palate.data.pairs import PairSet
    from palate.server.lanes import Lane

NEEDS = ("fastapi", "httptools", "prometheus_client", "sqlalchemy", "structlog", "uvicorn")


def serve(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[MODEL]", help="A folder written by `palate fit`, or ORG/NAME on the Hugging Face Hub."),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Serve a model of generated people; needs no MODEL.")] = False,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="PALATE_STORE",
            help="Where profiles are kept: a file (SQLite), or postgresql+psycopg://user@host/name. By default profiles.db; with "
            "--demo a file that goes with the process.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback only with API keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key, PEM.")] = None,
    sample: Annotated[
        Path | None,
        typer.Option(metavar="ROWS", help="Choices like those to come: for explanations, and for reading thumbs and ratings."),
    ] = None,
    previous: Annotated[
        list[Path] | None,
        typer.Option(metavar="MODEL", help="A model that goes on ranking users whom MODEL has not learned yet; may be repeated."),
    ] = None,
    readapt: Annotated[bool, typer.Option("--readapt", help="Learn every user under MODEL, in the background.")] = False,
    half_life: Annotated[
        float | None, typer.Option(metavar="DAYS", help="After so many days a choice weighs half as much.", min=0.001)
    ] = None,
    flip_rate: Annotated[float, typer.Option(help="Probability that a choice is a slip.", min=0, max=0.49)] = 0.0,
    per_second: Annotated[
        float | None, typer.Option(metavar="N", help="Requests a second of one key, on average; by default no limit.", min=0.01)
    ] = None,
    consent_version: Annotated[
        str | None, typer.Option(metavar="V", help="The version of the consent text that feedback needs; by default any.")
    ] = None,
) -> None:
    """Serve a model over HTTP: rank and score for each user, keep and learn from feedback, explain, export, delete.

    Without API keys ([bold]palate keys add[/bold]) it answers on this machine only. Stop it with SIGTERM or Ctrl-C:
    requests under way are answered first. The routes are at /docs.

    Example: [dim]palate serve --demo[/dim]
    """
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"the service needs {', '.join(missing)}; run: pip install 'palate[serve]'")
    if (model is None) != demo:
        raise DataError("expected a MODEL, or --demo for a model of generated people, and not both")
    from palate.server.access import KeyRing
    from palate.server.app import create_app
    from palate.server.guarding import Limits
    from palate.server.observing import Log
    from palate.server.running import check_address, check_tls, leave_on_term, run
    from palate.server.runtime import Runtime
    from palate.store import open_store

    leave_on_term()
    check_tls(tls_cert, tls_key)
    with ExitStack() as until:
        if store is None:
            folder = Path(until.enter_context(tempfile.TemporaryDirectory(prefix="palate-demo-"))) if demo else Path()
            store = str(folder / "profiles.db")
        profiles = until.enter_context(open_store(store))
        keys = bool(profiles.keys.list())  # revoked ones too: taking the last one away does not open the door
        check_address(host, keys=keys)
        seconds = None if half_life is None else 86400 * half_life
        scheme, shown = "http" if tls_cert is None else "https", f"[{host}]" if ":" in host else host
        address = f"{scheme}://{shown}:{port}"
        lanes = _demo(address) if demo or model is None else []
        if model is not None:
            lanes = _loaded([model, *(previous or ())], sample, seconds, flip_rate)
        for lane in lanes:
            profiles.models.add(lane.fingerprint, lane.name)
        limits = Limits() if per_second is None else Limits(per_second=per_second, burst=max(1.0, 2 * per_second))
        app = create_app(
            Runtime(lanes, profiles, text_version=consent_version),
            keys=KeyRing(profiles.keys) if keys else None,
            limits=limits,
            log=Log(),
            tls=tls_cert is not None,
            readapt=readapt,
        )
        if not keys:
            terminal.note("no API keys: everybody on this machine may ask everything; make keys with `palate keys add`")
        names = ", ".join(lane.name for lane in lanes)
        terminal.note(f"{address} serves {names}; profiles are in {profiles.name}")
        run(app, host=host, port=port, certificate=tls_cert, key=tls_key)


def _loaded(folders: list[Path], sample: Path | None, half_life: float | None, flip_rate: float) -> "list[Lane]":
    from palate.server.loading import load_lane

    pairs: PairSet | None = None if sample is None else terminal.read_choices(sample)[0]
    names: list[str] = []
    lanes = []
    for folder in folders:
        path = terminal.model_folder(folder)
        name = str(folder) if path != folder else folder.resolve().name
        name = name if name not in names else f"{name}-{len(names) + 1}"
        names.append(name)
        with terminal.progress(f"Loading {folder}"):
            lanes.append(load_lane(path, name=name, sample=pairs, half_life=half_life, flip_rate=flip_rate))
    return lanes


def _demo(address: str) -> "list[Lane]":
    from palate.server.demo import demo

    with terminal.progress("Generating people and fitting them"):
        made = demo()
    body = json.dumps({"prompt": made.prompt, "candidates": [text[:60] for text in made.responses]}, ensure_ascii=True)
    quoted = body.replace("'", "'\\''")
    terminal.say(f"curl {address}/v1/users/ada/rank -H 'content-type: application/json' -d '{quoted}'")
    return [made.lane]
