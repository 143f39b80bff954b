"""Fused parts of blocks of any family: found by their shape, taken only where they give the original's numbers.

Norms, gated MLPs and attention with rotary embeddings differ between families in ways that no name tells (what a norm
adds to its weight, which form of gelu, what happens to queries before they meet keys). So nothing is assumed: a part
that has the linears of a fused one is compared with it on the host, with random weights and inputs wide enough that
caps, clips and other activations show. What differs stays as transformers wrote it. One block of each shape is asked.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workers.engine.model.block_shape import shape_of
from workers.engine.model.fused_blocks import FusedAttention, FusedMLP, FusedRMSNorm, Parts
from workers.numerics.causal_attention import Band

Make = Callable[[nn.Module, Parts], nn.Module]
TOLERANCE = 2e-5
"""Of the largest output, in fp32."""
LENGTH = 8
"""Tokens of the comparison."""
NORMS: tuple[Make, ...] = tuple(
    partial(FusedRMSNorm, offset=offset, rounds_twice=rounds_twice)
    for offset in (0.0, 1.0)
    for rounds_twice in (True, False)
)
MLPS: tuple[Make, ...] = (partial(FusedMLP, activation="silu"), partial(FusedMLP, activation="gelu"))


def fuse_parts(blocks: nn.ModuleList, parts: Parts, keywords: Callable[[int, int], dict[str, Any]]) -> None:
    """Puts fused parts in place of the parts of blocks that compute the same.

    keywords   of block `index`'s call for so many tokens, beside its hidden states
    """
    known: dict[object, dict[str, Make]] = {}
    for index, block in enumerate(blocks):
        shape = shape_of(block)
        if shape not in known:
            known[shape] = dict(_proved(block, keywords(index, LENGTH)))
        for name, make in known[shape].items():
            block.set_submodule(name, make(block.get_submodule(name), parts))


def warm_ups(blocks: nn.ModuleList, dtype: torch.dtype, device: torch.device) -> list[Callable[[], object]]:
    """Calls on a few tokens, forward and backward, which compile the kernels of all fused parts of these blocks."""

    def ones(*shape: int) -> Tensor:
        return torch.ones(2, 16, *shape, dtype=dtype, device=device, requires_grad=True)

    calls: dict[object, Callable[[], Any]] = {}
    for part in blocks.modules():
        if isinstance(part, FusedRMSNorm):
            kind = {"offset": part.offset, "rounds_twice": part.rounds_twice}
            calls["norm", len(part.weight), part.offset, part.rounds_twice] = partial(_norm, part, ones, kind)
        elif isinstance(part, FusedMLP):
            inner = part.gate_proj.weight.shape[0]
            calls["mlp", inner, part.activation] = partial(_product, part, ones, inner)
        elif isinstance(part, FusedAttention):
            calls["attention", *part.counts, part.head_dim, part.q_norm is None] = partial(_turn, part, ones)
    return [partial(_both_ways, call) for call in calls.values()]


def _norm(part: FusedRMSNorm, ones: Callable[..., Tensor], kind: dict[str, Any]) -> Tensor:
    hidden = ones(len(part.weight))
    return part.parts.rms_norm(hidden, torch.ones_like(hidden[0, 0]).detach(), part.eps, **kind)


def _product(part: FusedMLP, ones: Callable[..., Tensor], inner: int) -> Tensor:
    return part.product(*((ones(2 * inner),) if part.together else (ones(inner), ones(inner))))


def _turn(part: FusedAttention, ones: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    width = part.head_dim
    heads = (ones(sum(part.counts), width),) if part.q_norm is None else [ones(count, width) for count in part.counts]
    angles = ones(width)[:1].detach()
    return part.parts.apply_rope(*heads, counts=part.counts, cos=angles, sin=angles)


def _both_ways(call: Callable[[], Any]) -> None:
    outputs = call()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def without_bands(block: nn.Module, keywords: dict[str, Any], bands: dict[int, Band | None]) -> dict[str, Any]:
    """The keywords of a block's call, with a `Band` for the mask where that is one and the block's attention takes it.

    bands   of masks that were looked at, by their identity: blocks that share a mask share its band, and the device is
            waited for once
    """
    mask = keywords.get("attention_mask")
    attentions = [module for module in block.modules() if isinstance(module, FusedAttention)]
    if not isinstance(mask, Tensor) or not attentions or not all(each.parts.takes_bands for each in attentions):
        return keywords
    if id(mask) not in bands:
        bands[id(mask)] = Band.of(mask)
    band = bands[id(mask)]
    return keywords if band is None else {**keywords, "attention_mask": band}


def _proved(block: nn.Module, keywords: dict[str, Any]) -> list[tuple[str, Make]]:
    """The parts of a block that fused ones stand for, inner ones first, by name inside it."""
    proved: list[tuple[str, Make]] = []
    for name, module in sorted(block.named_modules(), key=lambda item: -item[0].count(".")):
        kind = _kind(module) if name else None
        if kind is None:
            continue
        width, makes, takes_call = kind
        twin, given = _twin(module), _on_host(keywords) if takes_call else {}
        hidden = torch.randn(2, LENGTH, width, generator=torch.Generator().manual_seed(0))
        inner = [(each.removeprefix(f"{name}."), make) for each, make in proved if each.startswith(f"{name}.")]
        alike = [make for make in makes if _is_alike(twin, _made(twin, make, inner), hidden, given)]
        if alike:
            proved.append((name, min(alike, key=lambda make: _differing(twin, _made(twin, make, inner), hidden))))
    return proved


def _kind(module: nn.Module) -> tuple[int, Sequence[Make], bool] | None:
    """The width of a part's inputs, the fused parts that it may be, and whether it takes the block's call besides."""
    children, parameters = (
        set(module._modules),
        {name for name, value in module._parameters.items() if value is not None},
    )
    if isinstance(module, FusedRMSNorm | FusedMLP | FusedAttention):
        return None
    if type(module).__name__.endswith("RMSNorm") and parameters == {"weight"} and not children:
        return len(module._parameters["weight"]), NORMS, False  # type: ignore[arg-type]
    if {"gate_proj", "up_proj", "down_proj"} <= children and _are_linears(module, "gate_proj", "up_proj", "down_proj"):
        return module.get_submodule("gate_proj").in_features, MLPS, False  # type: ignore[return-value]
    if {"q_proj", "k_proj", "v_proj", "o_proj"} <= children and _are_linears(module, "q_proj", "k_proj", "v_proj"):
        return module.get_submodule("q_proj").in_features, (_AttentionAndNone,), True  # type: ignore[return-value]
    return None


class _AttentionAndNone(FusedAttention):
    """Fused attention with the outputs of transformers' modules: hidden states, and no probabilities."""

    def forward(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(*arguments, **keywords), None


def _are_linears(module: nn.Module, *names: str) -> bool:
    return all(type(module.get_submodule(name)) is nn.Linear for name in names)


def _twin(module: nn.Module) -> nn.Module:
    """A copy on the host in fp32 with random weights, of twice the usual size, and biases and norms off 0 and 1."""
    twin, generator = deepcopy(module), torch.Generator().manual_seed(1)
    for each in twin.modules():
        for name, weight in each._parameters.items():
            if weight is not None:
                value = torch.randn(weight.shape, generator=generator)
                value = value * 2 / weight.shape[-1] ** 0.5 if weight.dim() > 1 else 1 + 0.25 * value
                each._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, buffer in each._buffers.items():
            each._buffers[name] = None if buffer is None else buffer.cpu()
    return twin


def _made(twin: nn.Module, make: Make, inner: Sequence[tuple[str, Make]]) -> nn.Module | None:
    """The fused part with the twin's weights; None if it cannot be made of it."""
    parts, copied = Parts.operators(), deepcopy(twin)
    for name, make_inner in inner:
        copied.set_submodule(name, make_inner(copied.get_submodule(name), parts))
    try:
        return make(copied, parts)
    except (AttributeError, TypeError):
        return None


@torch.no_grad()
def _is_alike(twin: nn.Module, fused: nn.Module | None, hidden: Tensor, given: dict[str, Any]) -> bool:
    """True if both give the same for these hidden states."""
    if fused is None:
        return False
    try:
        outputs = [module(hidden, **given) for module in (twin, fused)]
    except Exception:  # a part that wants other arguments, or sums other shapes, is none of these
        return False
    if not isinstance(outputs[0], type(outputs[1])):
        return False
    expected, found = (output[0] if isinstance(output, tuple) else output for output in outputs)
    return found.shape == expected.shape and float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE


@torch.no_grad()
def _differing(twin: nn.Module, fused: nn.Module | None, hidden: Tensor) -> int:
    """Outputs of a part of one argument that differ in bf16, where the order of rounding shows; 0 for others."""
    if not isinstance(fused, FusedRMSNorm):
        return 0
    expected, found = (deepcopy(module).bfloat16()(hidden.bfloat16()) for module in (twin, fused))
    return int((expected != found).sum())


def _on_host(value: Any) -> Any:
    """Tensors of a call's arguments on the host, floating ones in fp32."""
    if isinstance(value, Tensor):
        return value.cpu().float() if value.is_floating_point() else value.cpu()
    if isinstance(value, tuple | list):
        return type(value)(_on_host(each) for each in value)
    return {name: _on_host(each) for name, each in value.items()} if isinstance(value, dict) else value
