"""Tests of imports that are not looked through for garbage."""

import gc
import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from app.many_imports import many_imports

PREPARED = """
import gc, json, sys
from workers.child.preparation import prepare
prepare("cpu")
scipy = "scipy.optimize" in sys.modules
print(json.dumps({"scipy": scipy, "frozen": gc.get_freeze_count(), "enabled": gc.isenabled()}))
import scipy.linalg
"""


def test_nothing_is_collected_meanwhile_and_what_was_imported_stays_out_of_collections() -> None:
    counts: list[str] = []
    gc.callbacks.append(lambda phase, _: counts.append(phase))
    try:
        with many_imports():
            kept = [[number] for number in range(100_000)]
            assert not gc.isenabled()
        assert counts == []
        assert gc.isenabled()
        assert gc.get_freeze_count() > len(kept)
    finally:
        gc.callbacks.pop()
        gc.unfreeze()


def test_packages_are_left_out_inside_alone() -> None:
    sys.modules.pop("this", None)
    with many_imports(["this", "json"]):
        assert find_spec("this") is None
        with pytest.raises(ImportError):
            import this  # noqa: F401
        assert json is sys.modules["json"]
    gc.unfreeze()
    assert find_spec("this") is not None


def test_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with many_imports():
            pass
        assert not gc.isenabled()
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()


@pytest.mark.slow
def test_prepared_attempt_lacks_what_models_of_language_do_not_need_and_ends_without_a_complaint() -> None:
    """scipy is there for whoever asks for it later; libraries that count what they hold at the end find nothing."""
    done = subprocess.run([sys.executable, "-c", PREPARED], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["scipy"] is False
    assert told["enabled"] is True
    assert told["frozen"] > 100_000
    assert "leaked" not in done.stderr
