"""One spec of every kind of adapter."""

from app.domain.adapters import (
    AdapterSpec,
    BayesianLoRASpec,
    LoRASpec,
    QABLoRASpec,
    QAHiRASpec,
    QALoRASpec,
    QBaRASpec,
)

SPECS: list[AdapterSpec] = [
    LoRASpec(rank=4),
    QALoRASpec(rank=4),
    QBaRASpec(rank=4),
    QAHiRASpec(rank=2),
    QABLoRASpec(rank=3),
    BayesianLoRASpec(rank=4),
]
