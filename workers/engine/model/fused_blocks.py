"""Hand-fused decoder blocks of the Llama family, an addition to the generic path.

A block of the classes below is replaced by a module that computes the same in fewer passes: norms, residual sums,
rotary embeddings and the gated MLP by one kernel each on a GPU (`workers.numerics.backends.block_kernels`), by few
operators on a CPU (`workers.numerics.backends.block_operators`), where attention is written by hand, too. Its parts and
parameters keep their names, so that nothing else sees a difference. A class that is not listed stays as it is, and any
architecture runs without this file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workers.contracts.blocks import JoinsLinears, SplitOutput
from workers.numerics.backend import compiled_block_kernels, cpu_block_kernels, triton_serves
from workers.numerics.backends import block_operators
from workers.numerics.backends.protocols import BlockKernels
from workers.numerics.causal_attention import Band
from workers.numerics.windowed_attention import attend_within

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
FUSED = frozenset(f"{family}DecoderLayer" for family in FAMILIES)
"""transformers' class names."""
SILU = frozenset({"SiLU", "SiLUActivation"})


@dataclass(frozen=True)
class Parts:
    """Functions of a fused block; `workers.numerics.backends.block_kernels` describes them.

    attend             causal attention, or with a mask: (q, k, v, mask, scaling) -> (batch, length, heads * width)
    packs_gate_up      whether `silu_mul` is as quick on gate and up packed in one tensor
    takes_bands        whether `attend` takes a `Band` in place of a mask
    """

    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    silu_mul: Callable[..., Tensor]
    gelu_mul: Callable[..., Tensor]
    apply_rope: Callable[..., tuple[Tensor, Tensor, Tensor]]
    attend: Callable[..., Tensor]
    packs_gate_up: bool
    takes_bands: bool

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype) -> "Parts | None":
        """The parts that serve a device; None if there are none for it."""
        if device.type == "cpu":
            return cls._of(cpu_block_kernels(dtype), block_operators.attend, on_gpu=False)
        return cls.kernels() if triton_serves(device, dtype) else None

    @classmethod
    def kernels(cls) -> "Parts":
        """Triton's."""
        return cls._of(compiled_block_kernels(), attend_within, on_gpu=True)

    @classmethod
    def operators(cls) -> "Parts":
        """torch's."""
        return cls._of(block_operators, block_operators.attend, on_gpu=False)

    @classmethod
    def _of(cls, kernels: BlockKernels, attend: Callable[..., Tensor], *, on_gpu: bool) -> "Parts":
        functions = (kernels.rms_norm, kernels.add_rms_norm, kernels.silu_mul, kernels.gelu_mul, kernels.apply_rope)
        return cls(*functions, attend=attend, packs_gate_up=on_gpu, takes_bands=on_gpu)


class FusedRMSNorm(nn.Module):
    """Llama's RMSNorm, or one of its kind.

    offset         what is added to the weight
    rounds_twice   whether the normed input is rounded before the product with the weight, too
    watch          what passes its outputs on, where somebody needs their gradient; the weight itself gets none
    """

    watch: Callable[[Tensor], Tensor] | None = None

    def __init__(self, norm: Any, parts: Parts, *, offset: float = 0.0, rounds_twice: bool = True) -> None:
        super().__init__()
        self.parts = parts
        self.weight: nn.Parameter = norm.weight
        self.eps = epsilon(norm)
        self.offset, self.rounds_twice = offset, rounds_twice

    def forward(self, hidden: Tensor) -> Tensor:
        kind = {"offset": self.offset, "rounds_twice": self.rounds_twice}
        return self.watched(self.parts.rms_norm(hidden, self.weight, self.eps, **kind))

    def watched(self, normal: Tensor) -> Tensor:
        """Outputs of this norm, whoever computed them."""
        return normal if self.watch is None else self.watch(normal)


def epsilon(norm: Any) -> float:
    """The epsilon of a norm of transformers, by either of its names there.

    Raises:
        AttributeError: it has none.
    """
    return float(norm.eps if "eps" in vars(norm) else norm.variance_epsilon)


class FusedMLP(JoinsLinears):
    """down(silu(gate(x)) * up(x)), or with gelu's tanh form."""

    def __init__(self, mlp: Any, parts: Parts, activation: Literal["silu", "gelu"] = "silu") -> None:
        super().__init__()
        self.parts = parts
        self.activation = activation
        self.together = ("gate_proj", "up_proj") if parts.packs_gate_up else ()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, hidden: Tensor) -> Tensor:
        both = (self.joined(hidden),) if self.joined is not None else (self.gate_proj(hidden), self.up_proj(hidden))
        down: Tensor = self.down_proj(self.product(*both))
        return down

    def product(self, *gate_up: Tensor) -> Tensor:
        """The activated gate times up, of the two or of both packed in one."""
        return self.parts.silu_mul(*gate_up) if self.activation == "silu" else self.parts.gelu_mul(*gate_up)


class FusedAttention(JoinsLinears):
    """Causal attention with rotary embeddings and, where the module has them, norms of queries and keys."""

    together = ("q_proj", "k_proj", "v_proj")

    def __init__(self, attention: Any, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.head_dim = int(attention.head_dim)
        self.counts = [linear.weight.shape[0] // self.head_dim for linear in (self.q_proj, self.k_proj, self.v_proj)]
        self.q_norm, self.k_norm = (_fused_norm(norm, parts) for norm in norms)
        self.scaling = float(attention.scaling)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | Band | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Tensor:
        query, key, value = self._turned(hidden_states, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, 0)
        projected: Tensor = self.o_proj(self.parts.attend(query, key, value, attention_mask, self.scaling))
        return projected

    def _turned(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned by their positions, and values, (batch, length, heads, head_dim)."""
        projections, counts = (self.q_proj, self.k_proj, self.v_proj), self.counts
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        if self.joined is not None and self.q_norm is None:
            return self.parts.apply_rope(self.joined(hidden).view(shape), counts=counts, cos=cos, sin=sin)
        if self.joined is not None:
            query, key, value = self.joined(hidden).view(shape).split(counts, dim=2)
        else:
            query, key, value = (projection(hidden).view(shape) for projection in projections)
        query = query if self.q_norm is None else self.q_norm(query)
        key = key if self.k_norm is None else self.k_norm(key)
        return self.parts.apply_rope(query, key, value, counts=counts, cos=cos, sin=sin)


def _fused_norm(norm: nn.Module | None, parts: Parts) -> FusedRMSNorm | None:
    return norm if norm is None or isinstance(norm, FusedRMSNorm) else FusedRMSNorm(norm, parts)


class FusedBlock(nn.Module, SplitOutput):
    """h = x + attention(norm(x)), then h + mlp(norm(h)); each sum is made by the kernel that reads it next."""

    def __init__(self, block: Any, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.self_attn = FusedAttention(block.self_attn, parts)
        self.mlp = FusedMLP(block.mlp, parts)
        self.input_layernorm = FusedRMSNorm(block.input_layernorm, parts)
        self.post_attention_layernorm = FusedRMSNorm(block.post_attention_layernorm, parts)

    def forward(self, hidden_states: Tensor, **keywords: Any) -> Tensor:
        residual, update = self.residual_and_update(hidden_states, **keywords)
        return residual + update

    def residual_and_update(self, hidden_states: Tensor, **keywords: Any) -> list[Tensor]:
        attended = self.self_attn(self.input_layernorm(hidden_states), **keywords)
        norm = self.post_attention_layernorm
        residual, normal = self.parts.add_rms_norm(hidden_states, attended, norm.weight, norm.eps)
        return [residual, self.mlp(norm.watched(normal))]


def warm_ups(block: FusedBlock, dtype: torch.dtype, device: torch.device) -> list[Callable[[], object]]:
    """Calls that compile the kernels of such blocks (`workers.engine.quantize.kernel_warm_up`)."""
    attention, mlp = block.self_attn, block.mlp
    heads = attention.counts
    inner, width = mlp.gate_proj.weight.shape
    return compiled_block_kernels().warm_ups((width, inner), heads, attention.head_dim, dtype, device)


def fuse(block: nn.Module, parts: Parts) -> nn.Module:
    """The block fused, with the same parameters, where it is of a class that this file knows; else the block itself."""
    known = type(block).__name__ in FUSED and type(getattr(block.mlp, "act_fn", None)).__name__ in SILU
    return FusedBlock(block, parts) if known else block
