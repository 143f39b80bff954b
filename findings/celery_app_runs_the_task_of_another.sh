#!/bin/bash
# Two Celery applications in one process, each with a task of the same name made by its own `app.task`: both run the same
# one of the two functions (not always the first), and so does an application that has no task. Decorated
# tasks are shared with every application of the process unless `shared=False` is given; the only sign is a warning.
# Exits 0 while that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet celery==5.7.0 kombu==5.7.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

from celery import Celery


def application(name, **options):
    app = Celery(name, broker="memory://")

    @app.task(name="rows.count", **options)
    def count():
        return name

    return app


def asked(*apps):
    """What each application's own task answers, and the kinds of warnings on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = [app.tasks["rows.count"]() for app in apps]
    return answers, sorted({warning.category.__name__ for warning in caught})


print("celery", version("celery"), "kombu", version("kombu"))
apart, quiet = asked(application("north", shared=False), application("south", shared=False))
print("with shared=False, north and south run:", *apart, quiet)
shared, warned = asked(application("north"), application("south"), Celery("without tasks", broker="memory://"))
print("north, south and one without tasks run:", *shared, warned)
as_seen = (apart, quiet) == (["north", "south"], []) and len(set(shared)) == 1 and warned == ["DuplicateTaskNameWarning"]
sys.exit(0 if as_seen else 1)
PYTHON
