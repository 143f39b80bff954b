"""llama.cpp's mixes of types by the names that its quantizer gives them: which tensor gets which type.

The rules are those of `llama_tensor_get_type` (llama.cpp v0.5.0, `src/llama-quant.cpp`), for decoders of the Llama
kind. Names are those of tensors in a file, matched by parts as there, so that experts' count as those without. What is
no matrix, norms and routers keep their numbers, and are not asked about.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from app.domain.methods.named_schemes import SchemeName
from app.domain.methods.schemes import Scheme

N = SchemeName


class BlockPreset(StrEnum):
    """The mixes, as a request would name them."""

    Q2_K = "q2_k_m"
    """llama.cpp calls it Q2_K, as it does the type."""
    Q3_K_S = "q3_k_s"
    Q3_K_M = "q3_k_m"
    Q3_K_L = "q3_k_l"
    Q4_K_S = "q4_k_s"
    Q4_K_M = "q4_k_m"
    Q5_K_S = "q5_k_s"
    Q5_K_M = "q5_k_m"
    IQ3_M = "iq3_m"


@dataclass(frozen=True)
class MixFacts:
    """The facts of a model that the rules ask for.

    grouped   heads over key-value heads
    experts   0: there are none
    tied      whether the embeddings are the head
    """

    layers: int
    grouped: int
    experts: int
    tied: bool


Rule = Callable[[int, MixFacts], SchemeName | None]


@dataclass(frozen=True)
class _Mix:
    """Types of a mix; each rule is of the layer's number and the facts, and None means the base.

    number     of a file (`llama_ftype`)
    """

    number: int
    base: SchemeName
    value: Rule
    down: Rule
    output: SchemeName | None = None


def _always(name: SchemeName | None) -> Rule:
    return lambda *_: name


def _first(
    count: Callable[[int], int], name: SchemeName, then: SchemeName | None = None
) -> Callable[..., SchemeName | None]:
    """One type in the first layers, `count` of their number, another after them."""
    return lambda layer, facts: name if layer < count(facts.layers) else then


def _more(name: SchemeName) -> Rule:
    """A type in the first and last eighth of the layers, and in every third between them."""

    def rule(layer: int, facts: MixFacts) -> SchemeName | None:
        eighth = facts.layers // 8
        wide = layer < eighth or layer >= 7 * facts.layers // 8 or (layer - eighth) % 3 == 2
        return name if wide else None

    return rule


def _more_of_eight_experts(layer: int, facts: MixFacts) -> SchemeName | None:
    """Four bits in the first eighth of the layers, and where `_more` has more bits if there are eight experts."""
    if layer < facts.layers // 8:
        return N.Q4_K
    return _more(N.Q4_K)(layer, facts) if facts.experts == 8 else None


def _grouped(many: SchemeName, few: SchemeName | None) -> Rule:
    """A type where at least four heads share their keys and values, and another one."""
    return lambda _, facts: many if facts.grouped >= 4 else few


MIXES: MappingProxyType[BlockPreset, _Mix] = MappingProxyType(
    {
        BlockPreset.Q2_K: _Mix(10, N.Q2_K, _grouped(N.Q4_K, N.Q3_K), _always(N.Q3_K), N.Q3_K),
        BlockPreset.Q3_K_S: _Mix(11, N.Q3_K, _always(None), _always(None)),
        BlockPreset.Q3_K_M: _Mix(
            12, N.Q3_K, _first(lambda _: 2, N.Q5_K, N.Q4_K), _first(lambda n: n // 16, N.Q5_K, N.Q4_K), N.Q4_K
        ),
        BlockPreset.Q3_K_L: _Mix(13, N.Q3_K, _always(N.Q5_K), _always(N.Q5_K), N.Q5_K),
        BlockPreset.Q4_K_S: _Mix(14, N.Q4_K, _first(lambda _: 4, N.Q5_K), _first(lambda n: n // 8, N.Q5_K)),
        BlockPreset.Q4_K_M: _Mix(15, N.Q4_K, _more(N.Q6_K), _more(N.Q6_K)),
        BlockPreset.Q5_K_S: _Mix(16, N.Q5_K, _always(None), _always(None)),
        BlockPreset.Q5_K_M: _Mix(17, N.Q5_K, _more(N.Q6_K), _more(N.Q6_K)),
        BlockPreset.IQ3_M: _Mix(27, N.IQ3_S, _always(N.Q4_K), _more_of_eight_experts, N.Q4_K),
    }
)
VALUES = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")
EIGHT_EXPERTS = frozenset(
    {BlockPreset.Q2_K, BlockPreset.Q3_K_S, BlockPreset.Q3_K_M, BlockPreset.Q4_K_S, BlockPreset.Q4_K_M}
    | {BlockPreset.IQ3_M}
)
"""Mixes in which the outputs of attention get five bits in a model of eight experts."""


def block_types_of(preset: BlockPreset, facts: MixFacts, tensors: Mapping[str, int]) -> dict[str, SchemeName]:
    """The type of each matrix that is quantized, by its name in a file; `tensors` has their columns.

    Raises:
        ValueError: the columns of one are no multiple of 32, so that no type holds it.
    """
    found = {}
    for name, columns in tensors.items():
        scheme = Scheme.named(_type_of(preset, facts, name, columns)).fitted(columns)
        if not scheme.divides(columns) or scheme.name is None:
            raise ValueError(f"{name} has {columns} columns, and no type has blocks that divide them")
        found[name] = scheme.name
    return found


def _type_of(preset: BlockPreset, facts: MixFacts, name: str, columns: int) -> SchemeName:
    mix = MIXES[preset]
    if name == "output.weight" or (facts.tied and name == "token_embd.weight"):
        block = Scheme.named(mix.base).blocks
        return N.Q8_0 if block is not None and columns % block.weights else N.Q6_K
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    found: SchemeName | None = None
    if any(part in name for part in VALUES):
        found = N.Q8_0 if facts.experts == 8 else mix.value(layer, facts)
    elif "attn_k.weight" in name:
        found = N.Q8_0 if facts.experts == 8 else None
    elif "ffn_down" in name:
        found = mix.down(layer, facts)
    elif "attn_output.weight" in name:
        found = mix.output if facts.experts != 8 else N.Q5_K if preset in EIGHT_EXPERTS else None
    return found or mix.base
