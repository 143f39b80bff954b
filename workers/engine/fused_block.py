"""Hand-fused parts of decoder blocks of the Llama family, an addition to the generic path.

A tuned block is the model's own module under autograd, whatever its architecture. On a GPU, the norms, the gated MLP
and the attention of the classes below are replaced, in the loop's copy, by modules that compute the same with one
kernel where eager code has several (`workers.numerics.block_kernels`). A class that is not listed stays as it is.
"""

from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from workers.numerics.block_kernels import rms_norm, rotate, silu_mul

SILU = frozenset({"SiLU", "SiLUActivation"})


class FusedRMSNorm(nn.Module):
    """Llama's RMSNorm."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: Tensor = norm.weight
        self.eps = float(norm.variance_epsilon)

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight, self.eps)


class FusedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, hidden: Tensor) -> Tensor:
        down: Tensor = self.down_proj(silu_mul(self.gate_proj(hidden), self.up_proj(hidden)))
        return down


class FusedAttention(nn.Module):
    """Causal attention with rotary embeddings and, where the module has them, norms of queries and keys."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)
        self.head_dim = int(attention.head_dim)
        self.scaling = float(attention.scaling)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        cos, sin = (part[0] for part in position_embeddings)
        query, key, value = (
            projection(hidden_states).view(*hidden_states.shape[:-1], -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = query if self.q_norm is None else self.q_norm(query)
        key = key if self.k_norm is None else self.k_norm(key)
        output = nn.functional.scaled_dot_product_attention(
            rotate(query, cos, sin).transpose(1, 2),
            rotate(key, cos, sin).transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=self.scaling,
            enable_gqa=True,
        )
        return self.o_proj(output.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None


FUSED: MappingProxyType[str, type[nn.Module]] = MappingProxyType(
    {family + "RMSNorm": FusedRMSNorm for family in ("Llama", "Mistral", "Qwen2", "Qwen3")}
    | {family + "MLP": FusedMLP for family in ("Llama", "Mistral", "Qwen2", "Qwen3")}
    | {family + "Attention": FusedAttention for family in ("Llama", "Mistral", "Qwen2", "Qwen3")}
)
"""transformers' class name -> ours."""


def fuse(block: nn.Module) -> int:
    """Replaces in `block` what `FUSED` knows; the number of modules replaced."""
    replaced = 0
    for name, module in list(block.named_modules()):
        if name and type(module).__name__ in FUSED and _is_gated_by_silu(module):
            owner, _, leaf = name.rpartition(".")
            fused = FUSED[type(module).__name__](module)
            setattr(block.get_submodule(owner), leaf, fused)
            replaced += 1
    return replaced


def _is_gated_by_silu(module: nn.Module) -> bool:
    """True for modules without an activation, too."""
    return type(getattr(module, "act_fn", nn.SiLU())).__name__ in SILU
