"""The methods by the name that a request uses. A new method is one more line."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from app.domain.adapters import AdapterSpec, BayesianLoRASpec, shape_for
from workers.adapters.bayesian import BayesianLoRA
from workers.adapters.grouped import GroupedAdapter
from workers.contracts import AttachAdapters, BlockMethod
from workers.methods.normal_float import NormalFloat
from workers.methods.rtn import RTN
from workers.methods.sign_round import SignRound
from workers.numerics.quantized import LinearResult

METHODS: MappingProxyType[str, BlockMethod[Any]] = MappingProxyType(
    {
        "rtn": RTN(),
        "nf": NormalFloat(),
        "signround": SignRound(),
    }
)


def attach_adapters(spec: AdapterSpec, shapes: Mapping[str, tuple[int, int]]) -> AttachAdapters:
    """What makes the adapters of a spec beside linears of these shapes (out, in), all that get one."""

    def attach(linears: Mapping[str, LinearResult], seed: int) -> dict[str, nn.Module]:
        generator = torch.Generator().manual_seed(seed)
        return {name: _adapter(spec, shapes[name], result, generator) for name, result in linears.items()}

    return attach


def _adapter(spec: AdapterSpec, shape: tuple[int, int], result: LinearResult, generator: torch.Generator) -> nn.Module:
    (out_features, in_features), device = shape, result.weight.codes.device
    if isinstance(spec, BayesianLoRASpec):
        return BayesianLoRA(spec, in_features, out_features, device=device, generator=generator)
    if result.low_rank is not None:
        return GroupedAdapter.continued(result.low_rank, spec.dropout)
    found = shape_for(spec, in_features, out_features, result.weight.scheme.group_size)
    return GroupedAdapter(found, spec.dropout, device=device, generator=generator)
