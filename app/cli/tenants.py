"""`bitwright tenants`: tenants, their quotas, models and Hub tokens, straight from the database."""

import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from pydantic import SecretStr, ValidationError
from rich.table import Table

from app.cli.opened import opened_database
from app.settings import get_settings
from bitwright.cli.connection import DataDirOption
from bitwright.cli.render import err, out, tabbed
from bitwright.errors import FieldProblem, InvalidRequest, shorten
from bitwright.tenancy import Quotas, TenantChange, TenantRequest

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from app.store.models import Tenant

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Tenants with quotas, models and Hub tokens, straight from the database.",
)
QUOTA = re.compile(r"([a-z_]+)=(-?[0-9]{1,19})?")
Asked = TypeVar("Asked", TenantRequest, TenantChange)
NameArgument = Annotated[str, typer.Argument(help="Name of the tenant.")]
QuotaOption = Annotated[
    list[str] | None,
    typer.Option("--quota", help="NAME=NUMBER, or NAME= for the service's own; may be given several times."),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option("--allow-model", help="Pattern of a model that it may use, e.g. 'org/*'; without any, all."),
]
RootOption = Annotated[
    list[str] | None,
    typer.Option("--model-root", help="Folder below the service's that it may read; without any, all of them."),
]


@app.command()
def create(
    name: NameArgument,
    quota: QuotaOption = None,
    allow_model: ModelOption = None,
    model_root: RootOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Make a tenant and print its id. `bitwright keys create --tenant NAME` makes its first key."""
    from app.store.tenancy.tenants import create_tenant  # noqa: PLC0415 (needs the `api` extra)

    fields = {"name": name, "quotas": _quotas(quota), "allowed_models": allow_model, "model_roots": model_root}
    asked = _valid(TenantRequest, fields)
    with opened_database(data_dir) as database, database.transaction() as session:
        tenant = create_tenant(session, asked)
        _record(session, tenant, "tenant.created")
    typer.echo(tenant.id)


@app.command("set")
def change(
    name: NameArgument,
    quota: QuotaOption = None,
    allow_model: ModelOption = None,
    model_root: RootOption = None,
    all_models: Annotated[bool, typer.Option("--all-models", help="Any model again.")] = False,
    all_roots: Annotated[bool, typer.Option("--all-model-roots", help="All of the service's folders again.")] = False,
    data_dir: DataDirOption = None,
) -> None:
    """Change what is given; the rest stays."""
    fields: dict[str, object] = {"quotas": _quotas(quota)} if quota else {}
    fields |= {"allowed_models": allow_model} if allow_model or all_models else {}
    fields |= {"model_roots": model_root} if model_root or all_roots else {}
    _change(name, _valid(TenantChange, fields), data_dir)


@app.command()
def suspend(name: NameArgument, data_dir: DataDirOption = None) -> None:
    """Refuse its keys, and let its queued jobs wait; what runs goes on."""
    _change(name, TenantChange(suspended=True), data_dir)


@app.command()
def resume(name: NameArgument, data_dir: DataDirOption = None) -> None:
    """Let a suspended tenant go on."""
    _change(name, TenantChange(suspended=False), data_dir)


@app.command()
def delete(name: NameArgument, data_dir: DataDirOption = None) -> None:
    """Remove a tenant that has no job and no upload, with its keys and its use."""
    from app.store.tenancy.keys import find_tenant  # noqa: PLC0415 (needs the `api` extra)
    from app.store.tenancy.tenants import delete_tenant  # noqa: PLC0415

    with opened_database(data_dir) as database, database.transaction() as session:
        tenant = find_tenant(session, name)
        delete_tenant(session, tenant.id)
        _record(session, tenant, "tenant.deleted")
    out().print(f"deleted {name}")


@app.command("list")
def list_tenants(data_dir: DataDirOption = None) -> None:
    """List tenants with their quotas and what they use; one line each, divided by tabs, when that is not for a
    terminal.
    """
    from app.store.tenancy.quotas import used_by  # noqa: PLC0415 (needs the `api` extra)
    from app.store.tenancy.tenants import own_quotas, tenants_page  # noqa: PLC0415

    console, table = out(), Table(box=None, pad_edge=False)
    for column in ("tenant", "id", "suspended", "queued", "running", "bytes", "own quotas"):
        table.add_column(column, no_wrap=column == "id")
    with opened_database(data_dir) as database, database.reading() as session:
        after = None
        while True:
            page = tenants_page(session, after=after, limit=200)
            for tenant in page.items:
                used = used_by(session, tenant.id)
                own = own_quotas(tenant.quotas).model_dump(exclude_none=True)
                quotas = " ".join(f"{quota}={value}" for quota, value in own.items())
                counts = (used.queued_jobs, used.running_jobs, used.storage_bytes)
                row = (tenant.name, tenant.id, "yes" if tenant.suspended_at else "", *map(str, counts), quotas)
                table.add_row(*row) if console.is_terminal else typer.echo(tabbed(*row))
            if (after := page.next_cursor) is None:
                break
    if console.is_terminal:
        console.print(table)


@app.command()
def usage(name: NameArgument, data_dir: DataDirOption = None) -> None:
    """List what a tenant used, a line for each month, divided by tabs: month, jobs, seconds of GPUs and of CPUs, bytes
    uploaded, made and downloaded, and money.
    """
    from app.store.tenancy.keys import find_tenant  # noqa: PLC0415 (needs the `api` extra)
    from app.store.tenancy.usage import months_of  # noqa: PLC0415

    with opened_database(data_dir) as database, database.reading() as session:
        months = months_of(session, find_tenant(session, name).id, get_settings().price_currency)
    for month in months:
        cost = "" if month.cost is None else f"{month.cost.amount} {month.cost.currency}"
        sizes = (month.uploaded_bytes, month.stored_bytes, month.downloaded_bytes)
        numbers = map(str, (month.jobs, month.gpu_seconds, month.cpu_seconds, *sizes))
        typer.echo(tabbed(month.month, *numbers, cost))


@app.command("hub-token")
def hub_token(
    name: NameArgument,
    erase: Annotated[bool, typer.Option("--erase", help="Forget it instead.")] = False,
    data_dir: DataDirOption = None,
) -> None:
    """Keep a Hub token of a tenant, read from standard input, encrypted; it fetches in place of the service's."""
    from app.store.tenancy.hub_tokens import Vault, checked_token, erase_token, keep_token  # noqa: PLC0415 (`api` extra)
    from app.store.tenancy.keys import find_tenant  # noqa: PLC0415

    if not erase and sys.stdin.isatty():
        err().print("the token, then Enter:")
    text = "" if erase else checked_token(SecretStr(sys.stdin.readline().strip()), "token")
    with opened_database(data_dir) as database, database.transaction() as session:
        tenant = find_tenant(session, name)
        if erase:
            erase_token(session, tenant.id)
        else:
            keep_token(session, Vault(get_settings().token_keys), text, tenant_id=tenant.id)
        _record(session, tenant, "hub_token.erased" if erase else "hub_token.set")
    out().print(f"{'erased' if erase else 'kept'} the Hub token of {name}")


@app.command("token-key")
def token_key() -> None:
    """Print a new key for BITWRIGHT_TOKEN_KEYS. To rotate: put it before the old one everywhere, then renew-tokens."""
    from cryptography.fernet import Fernet  # noqa: PLC0415 (needs the `api` extra)

    typer.echo(Fernet.generate_key().decode())


@app.command("renew-tokens")
def renew(data_dir: DataDirOption = None) -> None:
    """Encrypt all kept Hub tokens with the first of BITWRIGHT_TOKEN_KEYS, so that the others can go."""
    from app.store.tenancy.hub_tokens import Vault, renew_tokens  # noqa: PLC0415 (needs the `api` extra)
    from app.store.webhooks.endpoints import renew_secrets  # noqa: PLC0415

    with opened_database(data_dir) as database, database.transaction() as session:
        vault = Vault(get_settings().token_keys)
        count = renew_tokens(session, vault) + renew_secrets(session, vault)
    out().print(f"renewed {count} tokens")


def _change(name: str, asked: TenantChange, data_dir: DataDirOption) -> None:
    from app.store.tenancy.keys import find_tenant  # noqa: PLC0415 (needs the `api` extra)
    from app.store.tenancy.tenants import change_tenant  # noqa: PLC0415

    with opened_database(data_dir) as database, database.transaction() as session:
        tenant = change_tenant(session, find_tenant(session, name).id, asked)
        _record(session, tenant, "tenant.changed")
    out().print(f"changed {name}")


def _record(session: "Session", tenant: "Tenant", action: str) -> None:
    from app.store.tenancy.audit import Actor, record  # noqa: PLC0415 (needs the `api` extra)

    record(session, Actor(tenant.id), action, tenant.id, {"name": tenant.name})


def _quotas(given: list[str] | None) -> dict[str, object]:
    """Quotas by name; None for those that are the service's again.

    Raises:
        InvalidRequest: a word is no quota.
    """
    values: dict[str, object] = {}
    for text in given or ():
        match = QUOTA.fullmatch(text)
        if match is None or match[1] not in Quotas.model_fields:
            hint = f"give NAME=NUMBER; names are {', '.join(Quotas.model_fields)}"
            raise InvalidRequest("this is no quota", field="--quota", value=text, hint=hint)
        values[match[1]] = int(match[2]) if match[2] else None
    return values


def _valid(kind: type[Asked], fields: Mapping[str, object]) -> Asked:
    """The fields as a request of this kind.

    Raises:
        InvalidRequest: names each that is not valid.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems = tuple(
            FieldProblem(
                field=".".join(map(str, item["loc"])),
                code="invalid_value",
                detail=item["msg"][0].lower() + item["msg"][1:],
                value=shorten(item["input"]),
            )
            for item in error.errors()
        )
        raise InvalidRequest(f"{problems[0].field}: {problems[0].detail}", errors=problems) from error
