"""`palate export`, `forget` and `prune`: what a person may ask of a store of profiles, and a limit of retention, from a shell."""

import json
import time
from typing import Annotated

import typer

from palate import terminal
from palate.errors import UnknownUserError
from palate.keys_cli import Store, seconds

User = Annotated[str, typer.Argument(metavar="USER", help="The user's id.", show_default=False)]
Tenant = Annotated[str, typer.Option(help="Whose user it is.")]


def export(user: User, store: Store, tenant: Tenant = "default") -> None:
    """Everything that the store has of a user, as JSON on standard output."""
    from palate.store import open_store

    with open_store(store, make=False) as opened:
        found = opened.export(tenant, user)
    if found is None:
        raise UnknownUserError(f"there is no user {user!r} of tenant {tenant!r} in this store")
    terminal.say(json.dumps(found, ensure_ascii=False, indent=1))


def forget(user: User, store: Store, tenant: Tenant = "default") -> None:
    """Delete everything about a user, and overwrite what deleted rows left in the files. What that cannot undo: docs/store.md.

    Exit code 1: the rows are gone, but a reader still holds on to their old bytes; run it again.
    """
    from palate.store import open_store

    with open_store(store, make=False) as opened:
        found = opened.delete(tenant, user)
        due = opened.unscrubbed()
    if not found.found:
        terminal.note(f"there was no user {user!r} of tenant {tenant!r}")
    else:
        terminal.note(f"{user!r} of tenant {tenant!r} is deleted: {found.events} events")
    if due:
        terminal.note("old bytes are still in the files: a reader holds on to them; end it and run this again")
        raise typer.Exit(1)


def prune(
    store: Store,
    older: Annotated[str, typer.Option("--older-than", metavar="TIME", help="As 12h or 365d.", show_default=False)],
    idle: Annotated[bool, typer.Option("--idle", help="Delete users whole who have not been written to since.")] = False,
) -> None:
    """Forget feedback that is older than a limit of retention, and the profiles that were learned with it."""
    from palate.store import open_store

    with open_store(store, make=False) as opened:
        found = opened.prune(time.time() - seconds(older, "--older-than"), idle=idle)
    terminal.note(f"{found.events} events of {found.users} users are forgotten, and {found.deleted} users whole")
