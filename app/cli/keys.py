"""`bitwright keys`: API keys, made and revoked in the database itself, so that a first key can be had."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from app.cli.environment import use_data_dir
from app.domain.access import Scope
from app.settings import get_settings
from bitwright.cli.connection import DataDirOption
from bitwright.cli.render import err, out, tabbed

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from app.store.models import Tenant
    from app.store.session import Database

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="API keys of a tenant, straight from the database.",
)

DEFAULT_TENANT = "default"
TenantOption = Annotated[str, typer.Option("--tenant", help="Name of the tenant.")]


@app.command()
def create(
    name: Annotated[str, typer.Option("--name", help="What the key is for.")] = "cli",
    scope: Annotated[list[Scope] | None, typer.Option("--scope", help="May be given several times.")] = None,
    tenant: TenantOption = DEFAULT_TENANT,
    new_tenant: Annotated[bool, typer.Option("--new-tenant", help="Make the tenant, which there is not yet.")] = False,
    data_dir: DataDirOption = None,
) -> None:
    """Make a key and print it. It cannot be shown again."""
    from app.store.keys import ensure_tenant, issue_key  # noqa: PLC0415 (needs the `api` extra)

    with _database(data_dir) as database, database.transaction() as session:
        owner = ensure_tenant(session, tenant) if new_tenant else _owner(session, tenant)
        key, plaintext = issue_key(session, owner.id, name=name, scopes=frozenset(scope or [Scope.SUBMIT]))
        scopes = ", ".join(key.scopes)
    err().print(f"key {key.id} of tenant {tenant}, scopes: {scopes}; keep it, it is not shown again")
    typer.echo(plaintext)


@app.command("list")
def list_keys(tenant: TenantOption = DEFAULT_TENANT, data_dir: DataDirOption = None) -> None:
    """List keys, revoked ones too; one line each, divided by tabs, when that is not for a terminal."""
    from app.store.keys import list_keys  # noqa: PLC0415 (needs the `api` extra)

    console, table = out(), Table(box=None, pad_edge=False)
    for column in ("key", "starts with", "name", "scopes", "created", "revoked"):
        table.add_column(column, no_wrap=column == "key")
    with _database(data_dir) as database, database.transaction() as session:
        for key in list_keys(session, _owner(session, tenant).id):
            revoked = key.revoked_at.isoformat(timespec="seconds") if key.revoked_at else ""
            created = key.created_at.isoformat(timespec="seconds")
            row = (key.id, key.start, key.name, ", ".join(key.scopes), created, revoked)
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
    from app.store.keys import revoke_key  # noqa: PLC0415 (needs the `api` extra)

    with _database(data_dir) as database, database.transaction() as session:
        revoke_key(session, _owner(session, tenant).id, key_id)
    out().print(f"revoked {key_id}")


def _owner(session: "Session", name: str) -> "Tenant":
    """The tenant of this name. The default one is made where it is missing; a slip in another name makes none."""
    from app.store.keys import ensure_tenant, find_tenant  # noqa: PLC0415 (needs the `api` extra)

    return (ensure_tenant if name == DEFAULT_TENANT else find_tenant)(session, name)


@contextmanager
def _database(data_dir: "DataDirOption") -> Iterator["Database"]:
    from app.store.session import Database  # noqa: PLC0415 (needs the `api` extra)

    use_data_dir(data_dir)
    database = Database(get_settings().database_url)
    try:
        yield database
    finally:
        database.close()
