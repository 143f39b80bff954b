"""The registry has code for every method that a request may name."""

from app.domain.methods import METHODS as NAMED
from workers.engine.quantize.registry import METHODS, needs_text


def test_every_method_has_code_that_keeps_what_its_entry_says() -> None:
    """Of calibration text: either blocks run on it, or it is read for Fisher information or a budget, as by default."""
    assert METHODS.keys() == NAMED.keys()
    for name, info in NAMED.items():
        assert needs_text(info.spec()) == info.needs_calibration, name
    assert not METHODS["lq-lora"].needs_inputs, "weights and Fisher information are all that it looks at"
