"""Judge `bitwright` command lines that stand in documents and deployment files, without running them."""

from collections.abc import Sequence

import typer.main
from typer.core import TyperCommand, TyperGroup

from bitwright.cli.main import app


def check_bitwright(words: Sequence[str], *, mention: bool = False) -> None:
    """Fail unless `words`, after `bitwright`, are a command and arguments that it takes.

    A mention in running text names a command, or a group of them, and may leave arguments out.

    Raises:
        Exception: typer's own, which says what is wrong.
    """
    group = typer.main.get_command(app)
    rest = list(words)
    while isinstance(group, TyperGroup) and (rest or not mention):
        name = rest.pop(0)
        if name.startswith("-"):  # an option of the group is all that is asked
            assert name in {option for each in group.params for option in each.opts}, f"bitwright has no option {name}"
            return
        context = typer.Context(group)
        command = group.get_command(context, name)
        assert command is not None, f"bitwright has no command {name}"
        group = command
    if isinstance(group, TyperCommand):
        group.make_context(group.name or "", rest, resilient_parsing=mention)
