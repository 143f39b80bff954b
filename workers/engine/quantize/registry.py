"""The methods by the name that a request uses. A new method is one more line."""

from types import MappingProxyType
from typing import Any

from app.domain.methods import WeightSpec
from workers.contracts.blocks import BlockMethod
from workers.methods.apiq import ApiQ
from workers.methods.awq import AWQ
from workers.methods.gptq import GPTQ
from workers.methods.loftq import LoftQ
from workers.methods.lq_lora import LQLoRA
from workers.methods.normal_float import NormalFloat
from workers.methods.omniquant import OmniQuant
from workers.methods.rtn import RTN
from workers.methods.sign_round import SignRound

METHODS: MappingProxyType[str, BlockMethod[Any]] = MappingProxyType(
    {
        "rtn": RTN(),
        "nf": NormalFloat(),
        "gptq": GPTQ(),
        "awq": AWQ(),
        "omniquant": OmniQuant(),
        "signround": SignRound(),
        "loftq": LoftQ(),
        "apiq": ApiQ(),
        "lq-lora": LQLoRA(),
    }
)


def method_of(spec: WeightSpec) -> BlockMethod[Any]:
    """The code of the spec's method."""
    return METHODS[spec.method]
