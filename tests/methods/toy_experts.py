"""Blocks of a router and experts, as a `BlockTask`: transformers' own modules, their experts one by one."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from app.domain.methods import Scheme
from tests.methods.toy_block import _task
from workers.contracts.blocks import BlockTask
from workers.engine.model.experts import Experts, Layout

NUMBER, PLACES, WIDTH, INNER = 12, 2, 32, 48
KINDS: dict[str, Any] = {"qwen3_moe": Qwen3MoeExperts, "gpt_oss": GptOssExperts, "nemotron_h": NemotronHExperts}
COUNTS = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), NUMBER)
STARVED = 7
"""The expert that a starving block sends nothing."""


class RoutedBlock(nn.Module):
    """h + experts(h), the router a plain product; a bias keeps tokens away from one expert where it is asked to."""

    def __init__(self, kind: str, *, starves: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(6)
        original, layout, values = fused(kind, dtype, generator)
        self.experts = Experts(original, layout)
        for expert in range(NUMBER):
            for name, fields in values(expert).items():
                linear = self.experts.linear(expert, name)
                for leaf, value in fields.items():
                    setattr(linear, leaf, nn.Parameter(value.clone(), requires_grad=False))
        self.route = nn.Parameter(torch.randn(NUMBER, WIDTH, generator=generator).to(dtype) / 6, requires_grad=False)
        self.starves = starves

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, WIDTH)
        scores = nn.functional.linear(flat, self.route)
        if self.starves:
            scores = scores - 1000 * nn.functional.one_hot(torch.tensor(STARVED), NUMBER).to(scores)
        weights, chosen = torch.topk(scores.softmax(-1), PLACES, dim=-1)
        routed: Tensor = self.experts(flat, chosen, weights)
        return hidden + routed.view_as(hidden)


def fused(kind: str, dtype: torch.dtype, generator: torch.Generator) -> tuple[nn.Module, Layout, Any]:
    """A module of transformers with random numbers, its layout, and what each expert's linears hold by hand."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "moe_intermediate_size": INNER, **COUNTS}
    known = AutoConfig.for_model(kind)
    config = AutoConfig.for_model(kind, **{n: v for n, v in sizes.items() if hasattr(known, n)})
    config._experts_implementation = "eager"
    module = KINDS[kind](config).to(dtype)
    for parameter in module.parameters():
        spread = 0.3 if parameter.ndim > 2 else 0.1
        parameter.data = (torch.randn(parameter.shape, generator=generator) * spread).to(dtype)
    held = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    def values(expert: int) -> dict[str, dict[str, Tensor]]:
        own = {name: tensor[expert] for name, tensor in held.items()}
        if kind == "nemotron_h":
            return {name: {"weight": own[name]} for name in ("up_proj", "down_proj")}
        if kind == "qwen3_moe":
            gate, up = own["gate_up_proj"].chunk(2)
            return {
                n: {"weight": w} for n, w in (("gate_proj", gate), ("up_proj", up), ("down_proj", own["down_proj"]))
            }
        both, bias = own["gate_up_proj"].T, own["gate_up_proj_bias"]
        sides = {n: {"weight": both[i::2], "bias": bias[i::2]} for i, n in enumerate(("gate_proj", "up_proj"))}
        return sides | {"down_proj": {"weight": own["down_proj"].T, "bias": own["down_proj_bias"]}}

    layout = Layout.of(module)
    assert layout is not None
    return module, layout, values


def routed_task(
    kind: str = "qwen3_moe",
    scheme: Scheme | None = None,
    *,
    starves: bool = False,
    samples: int = 16,
    dtype: torch.dtype = torch.float32,
    **changed: Any,
) -> BlockTask:
    """The task of a `RoutedBlock` whose experts are all quantized alike."""
    block = RoutedBlock(kind, starves=starves, dtype=dtype)
    hidden = torch.randn(samples, 24, WIDTH, generator=torch.Generator().manual_seed(8)).to(dtype)
    hidden[..., :3] *= 4
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    scheme = scheme or Scheme(bits=3, group_size=16, symmetric=True)
    return _task(block, hidden, **({"schemes": dict.fromkeys(names, scheme)} | changed))
