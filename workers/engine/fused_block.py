"""Hand-fused decoder blocks of the Llama family, an addition to the generic path.

On a GPU, a block of the classes below is replaced by a module that computes the same with one kernel where eager code
has several (`workers.numerics.block_kernels`): norms, residual sums, rotary embeddings and the gated MLP. Its parts and
parameters keep their names, so that nothing else sees a difference. A class that is not listed stays as it is, and any
architecture runs without this file.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from workers.numerics import block_kernels
from workers.numerics.block_kernels import add_rms_norm, rms_norm, silu_mul, turn

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
FUSED = frozenset(f"{family}DecoderLayer" for family in FAMILIES)
"""transformers' class names."""
SILU = frozenset({"SiLU", "SiLUActivation"})


class FusedRMSNorm(nn.Module):
    """Llama's RMSNorm."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self.eps = float(norm.variance_epsilon)

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight, self.eps)


class FusedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    together = ("gate_proj", "up_proj")
    joined: nn.Module | None = None
    """gate and up as one linear, where their weights lie one after another (`workers.engine.tuned_block.join`)."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, hidden: Tensor) -> Tensor:
        both = (self.joined(hidden),) if self.joined is not None else (self.gate_proj(hidden), self.up_proj(hidden))
        down: Tensor = self.down_proj(silu_mul(*both))
        return down


class FusedAttention(nn.Module):
    """Causal attention with rotary embeddings and, where the module has them, norms of queries and keys."""

    together = ("q_proj", "k_proj", "v_proj")
    joined: nn.Module | None = None

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.q_norm, self.k_norm = (None if norm is None else FusedRMSNorm(norm) for norm in norms)
        self.head_dim = int(attention.head_dim)
        self.scaling = float(attention.scaling)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        query, key, value = self._turned(hidden_states, *(part[0] for part in position_embeddings))
        output = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=self.scaling,
            enable_gqa=True,
        )
        projected: Tensor = self.o_proj(output.transpose(1, 2).flatten(2))
        return projected

    def _turned(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned by their positions, and values, (batch, length, heads, head_dim)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        counts = [projection.weight.shape[0] // self.head_dim for projection in projections]
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        if self.joined is not None and self.q_norm is None:
            return turn(self.joined(hidden).view(shape), counts=counts, cos=cos, sin=sin)
        if self.joined is not None:
            query, key, value = self.joined(hidden).view(shape).split(counts, dim=2)
        else:
            query, key, value = (projection(hidden).view(shape) for projection in projections)
        query = query if self.q_norm is None else self.q_norm(query)
        key = key if self.k_norm is None else self.k_norm(key)
        return turn(query, key, value, counts=counts, cos=cos, sin=sin)


class FusedBlock(nn.Module):
    """h = x + attention(norm(x)), then h + mlp(norm(h)); each sum is made by the kernel that reads it next."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.self_attn = FusedAttention(block.self_attn)
        self.mlp = FusedMLP(block.mlp)
        self.input_layernorm = FusedRMSNorm(block.input_layernorm)
        self.post_attention_layernorm = FusedRMSNorm(block.post_attention_layernorm)

    def forward(self, hidden_states: Tensor, **keywords: Any) -> Tensor:
        residual, update = self.summands(hidden_states, **keywords)
        return residual + update

    def summands(self, hidden_states: Tensor, **keywords: Any) -> list[Tensor]:
        """Two tensors whose sum is the block's output, for a loss that adds them itself."""
        attended = self.self_attn(self.input_layernorm(hidden_states), **keywords)
        norm = self.post_attention_layernorm
        residual, normal = add_rms_norm(hidden_states, attended, norm.weight, norm.eps)
        return [residual, self.mlp(normal)]


def warm_ups(block: FusedBlock, dtype: torch.dtype, device: torch.device) -> list[Callable[[], object]]:
    """Calls that compile the kernels of such blocks (`workers.engine.warm_up`)."""
    attention, mlp = block.self_attn, block.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    heads = [projection.weight.shape[0] // attention.head_dim for projection in projections]
    inner, width = mlp.gate_proj.weight.shape
    return block_kernels.warm_ups((width, inner), heads, attention.head_dim, dtype, device)


def fuse(block: nn.Module) -> nn.Module:
    """The block fused, with the same parameters, where it is of a class that this file knows; else the block itself."""
    known = type(block).__name__ in FUSED and type(getattr(block.mlp, "act_fn", None)).__name__ in SILU
    return FusedBlock(block) if known else block
