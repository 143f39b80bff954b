"""The registry has code for every method that a request may name."""

from app.domain.methods import METHODS as NAMED
from workers.engine.quantize.registry import METHODS


def test_every_method_has_code() -> None:
    assert METHODS.keys() == NAMED.keys()


def test_methods_that_look_at_weights_alone_read_no_text() -> None:
    read_none = {name for name, info in NAMED.items() if not info.needs_calibration}
    assert {"rtn", "nf", "loftq"} <= read_none
    assert read_none.isdisjoint({"gptq", "awq", "omniquant", "signround", "apiq", "lq-lora"})
    assert not NAMED["lq-lora"].spec().observes_inputs(), "weights and Fisher information are all that it looks at"
