"""`palate export`, `forget`, `prune` and `retire`: what a person may ask of a store of profiles, a limit of retention, and the
end of a model, from a shell."""

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from palate import terminal
from palate.errors import DataError, StoreBusyError, StoreFullError, UnknownUserError
from palate.keys_cli import Store, day, seconds

if TYPE_CHECKING:
    from palate.store import Model
    from palate.store.database import ProfileStore

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


def forget(
    users: Annotated[list[str], typer.Argument(metavar="USER...", help="The ids of users.", show_default=False)],
    store: Store,
    tenant: Tenant = "default",
) -> None:
    """Delete everything about users, and overwrite what deleted rows left in the files. What that cannot undo: docs/store.md.

    The files are written anew once, however many users are named. Exit code 1: the rows are gone, but a reader still holds on to
    their old bytes, or there is no room for a copy of the store; run it again.
    """
    from palate.store import open_store
    from palate.store.records import check_user

    for user in users:
        check_user(tenant, user)  # before anybody is deleted
    with open_store(store, make=False) as opened:
        for user in dict.fromkeys(users):
            found = opened.delete(tenant, user, scrub=False)
            if not found.found:
                terminal.note(f"there was no user {user!r} of tenant {tenant!r}")
            else:
                terminal.note(f"{user!r} of tenant {tenant!r} is deleted: {found.events} events")
        _scrub(opened)


def prune(
    store: Store,
    older: Annotated[str, typer.Option("--older-than", metavar="TIME", help="As 12h or 365d.", show_default=False)],
    idle: Annotated[bool, typer.Option("--idle", help="Delete users whole who have not been written to since.")] = False,
) -> None:
    """Forget feedback that is older than a limit of retention, and the profiles that were learned with it.

    Exit code 1: as for palate forget.
    """
    from palate.store import open_store

    with open_store(store, make=False) as opened:
        found = opened.prune(time.time() - seconds(older, "--older-than"), idle=idle, scrub=False)
        terminal.note(f"{found.events} events of {found.users} users are forgotten, and {found.deleted} users whole")
        _scrub(opened)


def retire(
    store: Store,
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Its name, or the beginning of its fingerprint; without one, lists the models."),
    ] = None,
) -> None:
    """Delete every profile under a model that is served no more, and overwrite its bytes. What users said stays.

    A server that still has the model would write its profiles again: end it first. Exit code 1: as for palate forget.
    """
    from palate.store import open_store

    with open_store(store, make=False) as opened:
        known = opened.models.list()
        if model is None:
            _show(known)
            return
        found = [one for one in known if one.name == model or (model and one.fingerprint.startswith(model))]
        if len(found) != 1:
            named = ", ".join(f"{one.name} ({one.fingerprint[:12]})" for one in found or known) or "none"
            raise DataError(f"{len(found)} models are {model!r}; expected one of {named}")
        (one,) = found
        profiles = opened.models.retire(one.fingerprint)
        terminal.note(f"model {one.name} ({one.fingerprint[:12]}) is retired: {profiles} profiles are deleted, no feedback")
        _scrub(opened)


def _show(models: "list[Model]") -> None:
    if not models:
        terminal.note("no model was served with this store")
        return
    rows = [(one.name, one.fingerprint[:12], day(one.added), "" if one.retired is None else day(one.retired)) for one in models]
    terminal.show(terminal.table("Models", ("model", "fingerprint", "first served", "retired"), rows, words=range(4)))


def _scrub(opened: "ProfileStore") -> None:
    """Overwrite what is due; leaves with 1 where that is not possible now."""
    try:
        opened.scrub()
    except (StoreBusyError, StoreFullError) as error:
        full = isinstance(error, StoreFullError)
        why = "there is no room for a copy of the store; make some" if full else "a reader holds on to them; end it"
        terminal.note(f"old bytes are still in the files: {why} and run this again")
        raise typer.Exit(1) from None
