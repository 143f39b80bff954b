"""The methods by the name that a request uses. A new method is one more line."""

from types import MappingProxyType
from typing import Any

from workers.contracts import BlockMethod
from workers.methods.normal_float import NormalFloat
from workers.methods.rtn import RTN
from workers.methods.sign_round import SignRound

METHODS: MappingProxyType[str, BlockMethod[Any]] = MappingProxyType(
    {
        "rtn": RTN(),
        "nf": NormalFloat(),
        "signround": SignRound(),
    }
)
