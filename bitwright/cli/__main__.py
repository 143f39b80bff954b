"""`python -m bitwright.cli` is `bitwright`."""

from bitwright.cli.main import app

app(prog_name="bitwright")
