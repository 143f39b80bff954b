"""`bitwright keys`: API keys, made and revoked in the database itself, so that a first key can be had."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from app.cli.opened import opened_database
from app.domain.access import Scope
from bitwright.cli.connection import DataDirOption
from bitwright.cli.render import err, out, tabbed

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from app.store.models import Tenant

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="API keys of a tenant, straight from the database.",
)

DEFAULT_TENANT = "default"
DAY = 86_400.0
TenantOption = Annotated[str, typer.Option("--tenant", help="Name of the tenant.")]


@app.command()
def create(
    name: Annotated[str, typer.Option("--name", help="What the key is for.")] = "cli",
    scope: Annotated[list[Scope] | None, typer.Option("--scope", help="May be given several times.")] = None,
    tenant: TenantOption = DEFAULT_TENANT,
    new_tenant: Annotated[bool, typer.Option("--new-tenant", help="Make the tenant, which there is not yet.")] = False,
    expires_in_days: Annotated[
        float | None, typer.Option(min=0, help="Days that it is valid; without it, until it is revoked.")
    ] = None,
    data_dir: DataDirOption = None,
) -> None:
    """Make a key and print it. It cannot be shown again."""
    from app.store.tenancy.audit import Actor, record  # noqa: PLC0415 (needs the `api` extra)
    from app.store.tenancy.keys import ensure_tenant, issue_key  # noqa: PLC0415

    seconds = None if expires_in_days is None else expires_in_days * DAY
    with opened_database(data_dir) as database, database.transaction() as session:
        owner = ensure_tenant(session, tenant) if new_tenant else _owner(session, tenant)
        scopes = frozenset(scope or [Scope.SUBMIT])
        key, plaintext = issue_key(session, owner.id, name=name, scopes=scopes, expires_in_seconds=seconds)
        record(session, Actor(owner.id), "key.created", key.id, {"scopes": " ".join(key.scopes)})
        shown = ", ".join(key.scopes)
    err().print(f"key {key.id} of tenant {tenant}, scopes: {shown}; keep it, it is not shown again")
    typer.echo(plaintext)


@app.command()
def rotate(
    key_id: Annotated[str, typer.Argument(help="Id of the key, key_...")],
    tenant: TenantOption = DEFAULT_TENANT,
    overlap_hours: Annotated[
        float, typer.Option(min=0, max=720, help="Hours for which the old key is still valid.")
    ] = 24.0,
    data_dir: DataDirOption = None,
) -> None:
    """Make a key in place of another one, which is valid until the overlap ends, and print it."""
    from app.store.tenancy.audit import Actor, record  # noqa: PLC0415 (needs the `api` extra)
    from app.store.tenancy.keys import rotate_key  # noqa: PLC0415

    with opened_database(data_dir) as database, database.transaction() as session:
        owner = _owner(session, tenant)
        key, plaintext = rotate_key(session, owner.id, key_id, overlap_seconds=overlap_hours * 3600)
        record(session, Actor(owner.id), "key.rotated", key_id, {"new_key": key.id})
    err().print(f"key {key.id} in place of {key_id}, which ends in {overlap_hours:g} hours; keep it")
    typer.echo(plaintext)


@app.command("list")
def list_keys(tenant: TenantOption = DEFAULT_TENANT, data_dir: DataDirOption = None) -> None:
    """List keys, revoked ones too; one line each, divided by tabs, when that is not for a terminal."""
    from app.store.tenancy.keys import list_keys  # noqa: PLC0415 (needs the `api` extra)

    console, table = out(), Table(box=None, pad_edge=False)
    for column in ("key", "starts with", "name", "scopes", "created", "revoked", "expires", "last used"):
        table.add_column(column, no_wrap=column == "key")
    with opened_database(data_dir) as database, database.transaction() as session:
        for key in list_keys(session, _owner(session, tenant).id):
            times = (key.created_at, key.revoked_at, key.expires_at, key.last_used_at)
            told = (at.isoformat(timespec="seconds") if at else "" for at in times)
            row = (key.id, key.start, key.name, ", ".join(key.scopes), *told)
            table.add_row(*row) if console.is_terminal else typer.echo(tabbed(*row))
    if console.is_terminal:
        console.print(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="Id of the key, key_...")],
    tenant: TenantOption = DEFAULT_TENANT,
    data_dir: DataDirOption = None,
) -> None:
    """End a key's life at once."""
    from app.store.tenancy.audit import Actor, record  # noqa: PLC0415 (needs the `api` extra)
    from app.store.tenancy.keys import revoke_key  # noqa: PLC0415

    with opened_database(data_dir) as database, database.transaction() as session:
        owner = _owner(session, tenant)
        revoke_key(session, owner.id, key_id)
        record(session, Actor(owner.id), "key.revoked", key_id)
    out().print(f"revoked {key_id}")


def _owner(session: "Session", name: str) -> "Tenant":
    """The tenant of this name. The default one is made where it is missing; a slip in another name makes none."""
    from app.store.tenancy.keys import ensure_tenant, find_tenant  # noqa: PLC0415 (needs the `api` extra)

    return (ensure_tenant if name == DEFAULT_TENANT else find_tenant)(session, name)
