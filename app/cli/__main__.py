"""`python -m app.cli` is `bitwright`."""

from app.cli.main import app

app(prog_name="bitwright")
