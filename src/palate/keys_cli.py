"""`palate keys`: make, list and revoke the keys of the service. A key is shown once; the store keeps only its hash."""

import re
import time
from typing import TYPE_CHECKING, Annotated

import typer

from palate import terminal
from palate.errors import DataError
from palate.server.keys import mint, scopes_of

if TYPE_CHECKING:
    from palate.store import ApiKey

Store = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="URL",
        envvar="PALATE_STORE",
        help="The store of the service: a file of SQLite, or postgresql+psycopg://... A password is better off in the variable "
        "than on the command line, where others on the machine can read it.",
        show_default=False,
    ),
]
UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0}  # seconds

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke the keys of the service.")


@app.command()
def add(
    store: Store,
    tenant: Annotated[str, typer.Option(help="Whose users the key opens; other tenants' stay hidden.", show_default=False)],
    scope: Annotated[
        str,
        typer.Option(
            help="What it may do, separated by commas: rank (rank, score, ask), feedback, users (see, export, delete, consent), "
            "admin (learn users again under a new model), metrics (read the counters).",
            show_default=False,
        ),
    ],
    name: Annotated[str, typer.Option(help="For you, to know it again in the list.")] = "unnamed",
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="After so long, as 30m, 12h or 90d; by default never.", show_default=False)
    ] = None,
) -> None:
    """Make a key, and show it: this once, for it is kept nowhere. Send it as the header Authorization: Bearer KEY."""
    from palate.store import open_store

    scopes, until = scopes_of(scope), None if expires is None else time.time() + seconds(expires, "--expires")
    token, hashed = mint()
    with open_store(store) as opened:
        made = opened.keys.add(hashed, tenant, scopes, name, expires=until)
    terminal.note(f"key {made.id} of tenant {tenant!r} for {', '.join(scopes)}, {_until(until)}; it is not shown again:")
    terminal.say(token)


@app.command("list")
def list_(
    store: Store, tenant: Annotated[str | None, typer.Option(help="Only this tenant's.", show_default=False)] = None
) -> None:
    """Every key with what it may do, the revoked ones too; never the key itself."""
    from palate.store import open_store

    with open_store(store, make=False) as opened:
        found = opened.keys.list(tenant)
    if not found:
        terminal.note("there are no keys; make one with palate keys add")
        return
    columns = ("key", "tenant", "scopes", "name", "made", "state")
    rows = [(str(key.id), key.tenant, ", ".join(key.scopes), key.name, day(key.created), _state(key)) for key in found]
    terminal.show(terminal.table("Keys", columns, rows))


@app.command()
def revoke(store: Store, key: Annotated[int, typer.Argument(help="Its number in the list.", show_default=False)]) -> None:
    """End a key for good. A running service refuses it within seconds."""
    from palate.store import open_store

    with open_store(store, make=False) as opened:
        if not opened.keys.revoke(key):
            raise DataError(f"there is no key {key}; palate keys list shows those there are")
    terminal.note(f"key {key} is revoked")


def seconds(given: str, option: str) -> float:
    """A length of time, as 30m, 12h or 90d."""
    found = re.fullmatch(r"([1-9]\d{0,5})([mhd])", given)
    if found is None:
        raise DataError(f"{option} is {given!r}; expected a number and m, h or d, as in 90d")
    return int(found[1]) * UNITS[found[2]]


def day(seconds: float) -> str:
    """A moment in unix seconds as a date here."""
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def _until(expires: float | None) -> str:
    return "without an end" if expires is None else f"until {day(expires)}"


def _state(key: "ApiKey") -> str:
    if key.revoked is not None:
        return f"revoked {day(key.revoked)}"
    if key.expires is not None and key.expires <= time.time():
        return f"expired {day(key.expires)}"
    return _until(key.expires)
