"""The operator's commands, which the service brings through the entry-point group `bitwright.commands`."""

from importlib.metadata import entry_points
from typing import Any

import typer
from typer.main import get_command

from bitwright.errors import RequestError

GROUP = "bitwright.commands"
OPERATOR_COMMANDS = ("serve", "demo", "api", "worker", "sweep", "migrate", "tenants", "keys", "backup", "restore", "gc")
INSTALL = "pip install 'bitwright-service[embedded]'"


def installed_commands() -> list[str]:
    """Names of the operator's commands that are installed, in the order in which they are needed."""
    installed = {point.name for point in entry_points(group=GROUP)}
    return [name for name in OPERATOR_COMMANDS if name in installed]


def operator_command(name: str) -> Any:
    """The command `name` of the service.

    Raises:
        RequestError: the service is not installed here; the hint says how to install it.
    """
    points = entry_points(group=GROUP, name=name)
    if not points:
        detail = f"`bitwright {name}` belongs to the service, which is not installed here"
        raise RequestError(detail, field="command", value=name, hint=INSTALL)
    target = next(iter(points)).load()
    if isinstance(target, typer.Typer):
        return get_command(target)
    single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    single.command(name)(target)
    return get_command(single)
