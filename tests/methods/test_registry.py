"""The registry has code for every method that a request may name."""

from app.domain.methods import METHODS as NAMED
from workers.engine.registry import METHODS


def test_every_method_has_code_that_keeps_what_its_entry_says() -> None:
    assert METHODS.keys() == NAMED.keys()
    for name, method in METHODS.items():
        assert method.needs_inputs == NAMED[name].needs_calibration
