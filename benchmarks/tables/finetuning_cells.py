"""The cells of the table of finetuning: every adapter at 4, 3 and 2 bits on one base, with as many parameters each.

The base is SignRound's, asymmetric, so that every adapter can be folded into it; only the arm that starts from ApiQ has
a base of its own. Two budgets of parameters: that of the LoRA of rank 3, which QA-HiRA aligned to the groups can meet
within 4 %, and that of rank 16, which it cannot.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from benchmarks.tables.cells import GROUP_SIZE, SEEDS_OF_LEARNED, WIDTHS, Cell

STEPS, BATCH_SIZE, LENGTH = 100, 8, 512
BASE: Mapping[str, Any] = MappingProxyType({"method": "signround", "group_size": GROUP_SIZE, "symmetric": False})
QUANTIZED, SIXTEEN_BIT = "quantized", "16bit"


@dataclass(frozen=True)
class AdapterArm:
    """A row of the table.

    kind     of the adapter
    ranks    the request's rank by budget; no entry where the kind cannot meet it within 5 %
    rates    learning rates by budget, as `benchmarks.tables.learning_rates` found them
    merge    how it is folded into the base afterwards
    apiq     whether base and start are ApiQ's
    fields   what else the request says of the adapter
    """

    kind: str
    ranks: Mapping[int, int]
    rates: Mapping[int, float]
    merge: str = SIXTEEN_BIT
    apiq: bool = False
    fields: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


ARMS: MappingProxyType[str, AdapterArm] = MappingProxyType(
    {
        "qlora": AdapterArm("lora", {3: 3, 16: 16}, {3: 1e-3, 16: 5e-4}),
        "qa-lora": AdapterArm("qa-lora", {3: 6, 16: 31}, {3: 1.6e-2, 16: 4e-3}, QUANTIZED),
        "q-bara": AdapterArm("q-bara", {3: 3, 16: 16}, {3: 2e-3, 16: 1e-3}),
        "qa-hira": AdapterArm("qa-hira", {3: 3}, {3: 3.2e-2}, QUANTIZED),
        # The gates' rate of the time: in 100 steps none closes.
        "bayesian-lora": AdapterArm(
            "bayesian-lora", {3: 3, 16: 16}, {3: 2e-3, 16: 5e-4}, fields={"gate_learning_rate": 0.05}
        ),
        # The default rate of the gates, which follows from the steps, so that they can close.
        "bayesian-lora closing gates": AdapterArm("bayesian-lora", {3: 3, 16: 16}, {3: 2e-3, 16: 5e-4}),
        "lora from apiq": AdapterArm("lora", {3: 3, 16: 16}, {3: 1e-3, 16: 5e-4}, apiq=True),
    }
)
BUDGETS = (3, 16)
"""Ranks of the LoRA with as many parameters."""


def finetuning_cells() -> Iterator[Cell]:
    """All cells: those of one base one after another."""
    for bits in WIDTHS:
        for seed in SEEDS_OF_LEARNED if bits == min(WIDTHS) else (0,):
            for budget in BUDGETS:
                for name, arm in ARMS.items():
                    if budget in arm.ranks:
                        yield cell(name, arm, budget, bits, seed)


def cell(name: str, arm: AdapterArm, budget: int, bits: int, seed: int) -> Cell:
    """One job: alpha is the rank, so that every update has the factor 1."""
    rank = arm.ranks[budget]
    quantization = {**BASE, "bits": bits}
    if arm.apiq:
        quantization |= {"method": "apiq", "granularity": "block", "base": "signround", "rank": rank, "alpha": rank}
    training = {
        "adapter": {"kind": arm.kind, "rank": rank, "alpha": float(rank), **arm.fields},
        "finetune": {
            "steps": STEPS,
            "batch_size": BATCH_SIZE,
            "sequence_length": LENGTH,
            "learning_rate": arm.rates[budget],
            "schedule": "cosine",
            "validation_share": 0.0,
        },
        "merge": arm.merge,
    }
    return Cell(f"{name}, rank {budget}", bits, seed, quantization, training=training)
