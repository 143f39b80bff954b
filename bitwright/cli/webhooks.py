"""`bitwright webhooks`: addresses that the service calls when jobs come into a state, and what went to them."""

from collections.abc import Sequence
from itertools import islice
from typing import Annotated

import typer
from rich.table import Table

from bitwright.cli.connection import DataDirOption, KeyOption, UrlOption, connect
from bitwright.cli.jobs import JsonOption, print_json
from bitwright.cli.render import format_age, out, tabbed
from bitwright.webhooks.views import BY_DEFAULT, DeliveryView, NewWebhookView, WebhookView

app = typer.Typer(no_args_is_help=True, help="Addresses that the service calls when jobs come into a state.")
WebhookArgument = Annotated[str, typer.Argument(help="Id of the webhook, whe_...", show_default=False)]
DeliveryArgument = Annotated[str, typer.Argument(help="Id of the delivery, whd_...", show_default=False)]


@app.command("create")
def create(
    address: Annotated[str, typer.Argument(help="Where messages go, https://...", show_default=False)],
    event: Annotated[
        list[str] | None, typer.Option(help="A message that it gets, e.g. job.failed. May be given several times.")
    ] = None,
    description: Annotated[str, typer.Option(help="A note of your own.")] = "",
    as_json: JsonOption = False,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Make a webhook; prints its id and its secret, which is not shown again."""
    with connect(url, key, data_dir) as client:
        made = client.webhooks.create(address, events=event or BY_DEFAULT, description=description)  # type: ignore[arg-type]
    _print_secret(made, as_json=as_json)


@app.command("list")
def list_webhooks(
    as_json: JsonOption = False, url: UrlOption = None, key: KeyOption = None, data_dir: DataDirOption = None
) -> None:
    """List webhooks, oldest first; one line each, divided by tabs, when that is not for a terminal."""
    with connect(url, key, data_dir) as client:
        found = client.webhooks.list()
    if as_json:
        for webhook in found:
            print_json(webhook)
        return
    rows = [(one.id, _state(one), one.url, ", ".join(one.events)) for one in found]
    _print_rows(("webhook", "state", "address", "messages"), rows)


@app.command("delete")
def delete(
    webhook_id: WebhookArgument, url: UrlOption = None, key: KeyOption = None, data_dir: DataDirOption = None
) -> None:
    """Remove a webhook with its log."""
    with connect(url, key, data_dir) as client:
        client.webhooks.delete(webhook_id)
    out().print(f"{webhook_id} deleted")


@app.command("switch")
def switch(
    webhook_id: WebhookArgument,
    on: Annotated[bool, typer.Option("--on/--off", help="Whether it gets messages.")] = True,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Switch a webhook on or off; one that answered 410 is off until it is switched on."""
    with connect(url, key, data_dir) as client:
        webhook = client.webhooks.change(webhook_id, enabled=on)
    out().print(f"{webhook.id} {_state(webhook)}")


@app.command("rotate")
def rotate(
    webhook_id: WebhookArgument,
    overlap: Annotated[int, typer.Option(help="Seconds for which the old secret signs as well.")] = 86_400,
    as_json: JsonOption = False,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Give a webhook a new secret; prints it, and it is not shown again."""
    with connect(url, key, data_dir) as client:
        made = client.webhooks.rotate(webhook_id, overlap_seconds=overlap)
    _print_secret(made, as_json=as_json)


@app.command("test")
def send_test(
    webhook_id: WebhookArgument, url: UrlOption = None, key: KeyOption = None, data_dir: DataDirOption = None
) -> None:
    """Send a test message; prints the id of its delivery."""
    with connect(url, key, data_dir) as client:
        delivery = client.webhooks.test(webhook_id)
    typer.echo(delivery.id)


@app.command("deliveries")
def deliveries(
    webhook_id: WebhookArgument,
    status: Annotated[str | None, typer.Option(help="Only pending, delivered or failed ones.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many, newest first.")] = 20,
    as_json: JsonOption = False,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """List messages to a webhook, newest first; one line each, divided by tabs, when that is not for a terminal."""
    with connect(url, key, data_dir) as client:
        found = list(islice(client.webhooks.deliveries(webhook_id, status=status, limit=min(limit, 100)), limit))
    if as_json:
        for delivery in found:
            print_json(delivery)
        return
    rows = [(one.id, one.status, one.type, str(one.attempts), format_age(one.created_at)) for one in found]
    _print_rows(("delivery", "status", "message", "tries", "created"), rows)


@app.command("delivery")
def show_delivery(
    webhook_id: WebhookArgument,
    delivery_id: DeliveryArgument,
    as_json: JsonOption = False,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Show a message, every try to deliver it, and what the receiver said."""
    with connect(url, key, data_dir) as client:
        delivery = client.webhooks.delivery(webhook_id, delivery_id)
    if as_json:
        print_json(delivery)
        return
    _print_delivery(delivery)


@app.command("replay")
def replay(
    webhook_id: WebhookArgument,
    delivery_id: DeliveryArgument,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Send a message again, under the same message id."""
    with connect(url, key, data_dir) as client:
        delivery = client.webhooks.replay(webhook_id, delivery_id)
    out().print(f"{delivery.id} {delivery.status}")


def _state(webhook: WebhookView) -> str:
    return "on" if webhook.enabled else f"off ({webhook.disabled_why})"


def _print_secret(made: NewWebhookView, *, as_json: bool) -> None:
    if as_json:
        print_json(made)
    else:
        typer.echo(tabbed(made.id, made.secret))


def _print_rows(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    console = out()
    if not console.is_terminal:
        for row in rows:
            typer.echo(tabbed(*row))
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_delivery(delivery: DeliveryView) -> None:
    typer.echo(tabbed(delivery.id, delivery.status, delivery.type, delivery.message_id))
    for one in delivery.log:
        came = one.error or str(one.status_code)
        typer.echo(tabbed(str(one.number), one.at.isoformat(timespec="seconds"), f"{one.seconds:.3f} s", came))
        if one.answer:
            typer.echo(one.answer)
