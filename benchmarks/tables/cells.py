"""The cells of the table of results: every method at W4, W3 and W2, and what else the papers compare.

A cell is one job: what its request says of the quantization and of the calibration, a number of bits and a seed. Its
key never changes once it has been measured; a cell of another meaning gets another name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

GROUP_SIZE = 64
WIDTHS = (4, 3, 2)
SEEDS_OF_LEARNED = (0, 1, 2)
"""At the smallest width, for methods whose result depends on a seed."""
BUDGETS = (2.5, 2.75, 3.0, 3.5)
PAPER_STEPS = 2560
"""ApiQ's own number: 20 passes over 128 sequences, one per step."""


@dataclass(frozen=True)
class Cell:
    """One job of the table.

    arm           row of the table
    bits          column: width of a code, or the average of a budget
    quantization  the request's `quantization`, bits and all
    text          where the calibration text comes from: the file that was given, or the source of that name
    training      what the request says besides of an adapter that is trained; None where nothing is
    """

    arm: str
    bits: float
    seed: int
    quantization: Mapping[str, Any] = field(hash=False)
    text: str = "file"
    training: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def key(self) -> str:
        return f"{self.arm} {self.bits:g} {self.seed}"


@dataclass(frozen=True)
class Arm:
    """A row: the request's `quantization` but for bits, and whether a seed changes what comes of it."""

    quantization: Mapping[str, Any]
    learned: bool
    text: str = "file"


def _affine(method: str, **fields: Any) -> Mapping[str, Any]:
    return MappingProxyType({"method": method, "group_size": GROUP_SIZE} | fields)


ARMS: MappingProxyType[str, Arm] = MappingProxyType(
    {
        "rtn": Arm(_affine("rtn"), learned=False),
        "gptq": Arm(_affine("gptq"), learned=False),
        "awq": Arm(_affine("awq"), learned=False),
        "omniquant": Arm(_affine("omniquant"), learned=True),
        "signround light": Arm(_affine("signround", preset="light"), learned=True),
        "signround": Arm(_affine("signround"), learned=True),
        "signround best": Arm(_affine("signround", preset="best"), learned=True),
        "loftq": Arm(_affine("loftq", base="affine"), learned=False),
        "loftq nf": Arm(_affine("loftq", symmetric=True), learned=False),
        "apiq layer": Arm(_affine("apiq", granularity="layer", symmetric=False), learned=True),
        "apiq block": Arm(_affine("apiq", granularity="block", symmetric=False), learned=True),
        "apiq block from signround": Arm(
            _affine("apiq", granularity="block", symmetric=False, base="signround"), learned=True
        ),
    }
)
CALIBRATION_ARMS: MappingProxyType[str, Arm] = MappingProxyType(
    {
        f"{method} on {text}": Arm(_affine(method), learned=False, text=text)
        for text in ("builtin", "generated")
        for method in ("gptq", "signround")
    }
)
"""At the widths at both ends, with other calibration texts."""


def cells() -> Iterator[Cell]:
    """All cells, cheap ones first where that costs no order."""
    for bits in WIDTHS:
        for name, arm in ARMS.items():
            yield from _seeds(name, arm, bits)
    for bits in (max(WIDTHS), min(WIDTHS)):
        for name, arm in CALIBRATION_ARMS.items():
            yield from _seeds(name, arm, bits)
    for budget in BUDGETS:
        for name, fisher in (("lq-lora", False), ("lq-lora fisher", True)):
            yield Cell(name, budget, 0, {"method": "lq-lora", "bits": {"average": budget}, "fisher": fisher})
    paper = {**ARMS["apiq block"].quantization, "steps": PAPER_STEPS, "bits": 2}
    yield Cell(f"apiq block, {PAPER_STEPS} steps", 2, 0, paper)


def _seeds(name: str, arm: Arm, bits: int) -> Iterator[Cell]:
    # W4 symmetric as the peers' default; below that an offset is worth more than the code that it saves.
    quantization = {"symmetric": bits == max(WIDTHS), **arm.quantization, "bits": bits}
    for seed in SEEDS_OF_LEARNED if bits == min(WIDTHS) and arm.learned else (0,):
        yield Cell(name, bits, seed, quantization, arm.text)
