"""Runs a script that was written before modules got their present places: `python -m tests.old_names SCRIPT`.

Bug reports come as small scripts that import the project. This table keeps those that name a module by its old place
useful, without a trace in the packages themselves.
"""

import importlib
import runpy
import sys
from types import MappingProxyType, ModuleType

PLACES = MappingProxyType(
    {
        "app.domain.errors": ("bitwright.errors",),
        "app.domain.report": ("bitwright.report",),
        "app.domain.events": ("bitwright.events", "app.domain.attempt_lines", "workers.disk.orders"),
        "app.domain.jobs": ("app.domain.request.job_request", "app.domain.job_states", "bitwright.job_states"),
        "app.domain.finetuning": ("app.domain.request.finetuning",),
        "app.domain.sources": ("app.domain.request.sources",),
        "workers.engine.pipeline": ("workers.engine.run",),
        "workers.engine.calibration": ("workers.engine.text.sequences",),
        "workers.engine.documents": ("workers.engine.text.documents",),
        "workers.engine.examples": ("workers.engine.text.examples",),
        "workers.engine.checkpoint": ("workers.engine.model.checkpoint",),
        "workers.engine.tiny_model": ("workers.tiny_model",),
    }
)
"""Old module -> where its names are now."""


def install() -> None:
    """Make the old modules importable in this process."""
    for old, places in PLACES.items():
        module = ModuleType(old)
        for place in places:
            vars(module).update(
                {
                    name: value
                    for name, value in vars(importlib.import_module(place)).items()
                    if not name.startswith("__")
                }
            )
        sys.modules[old] = module
    examples = importlib.import_module("workers.engine.text.examples")
    examples.Example.learned = property(lambda example: example.loss_mask)


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
