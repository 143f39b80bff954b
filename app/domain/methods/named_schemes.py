"""Schemes that go by a name: number formats with an element type, a scale type and activations of their own.

A row says all that the formulas need (`floats.float_grids`); formats and runtimes go by the name. Sources:
the presets of the package compressed-tensors 0.20, and the OCP Microscaling Formats specification 1.0.
"""

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticKnownError

from app.domain.methods import block_types
from app.domain.methods.block_types import BlockType

WHOLE = -1
"""In place of a number of rows or columns: all of them."""


class SchemeName(StrEnum):
    """The names, as a request has them in `scheme`."""

    FP8 = "fp8"
    FP8_TENSOR = "fp8-tensor"
    FP8_BLOCK = "fp8-block"
    FP8A16 = "fp8a16"
    INT8 = "int8"
    NVFP4 = "nvfp4"
    NVFP4A16 = "nvfp4a16"
    MXFP4 = "mxfp4"
    MXFP4A16 = "mxfp4a16"
    MXFP8 = "mxfp8"
    MXFP8A16 = "mxfp8a16"
    Q2_K = "q2_k"
    Q3_K = "q3_k"
    Q4_K = "q4_k"
    Q5_K = "q5_k"
    Q6_K = "q6_k"
    IQ3_S = "iq3_s"
    IQ4_NL = "iq4_nl"
    IQ4_XS = "iq4_xs"
    Q2_0 = "q2_0"
    Q4_0 = "q4_0"
    Q4_1 = "q4_1"
    Q5_0 = "q5_0"
    Q5_1 = "q5_1"
    Q8_0 = "q8_0"


class BlockPreset(StrEnum):
    """llama.cpp's mixes of types, as a request has them in `scheme`: each matrix's type follows from its name."""

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


class Element(StrEnum):
    """The type of a code."""

    INTEGER = "integer"
    E4M3 = "e4m3"
    """FP8 without infinities: largest 448, NaN 0x7F."""
    E2M1 = "e2m1"
    """FP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""


class ScaleType(StrEnum):
    """The type of a stored scale."""

    FLOAT = "float"
    """16 or 32 bits: the dtype that the job's formats store scales in."""
    E4M3 = "e4m3"
    """8 bits, after a factor of the whole tensor in fp32 (`global_scale`, a divisor)."""
    E8M0 = "e8m0"
    """8 bits: a power of two, its exponent plus 127."""

    @property
    def stored_bits(self) -> int | None:
        """Bits of a scale; None: those of the formats' dtype."""
        return None if self is ScaleType.FLOAT else 8


NameOfScheme = SchemeName | BlockPreset
ALL_NAMES: tuple[NameOfScheme, ...] = (*SchemeName, *BlockPreset)


def find_name(value: object) -> NameOfScheme:
    """The scheme or mix of a name, of upper or lower case.

    Raises:
        PydanticKnownError: there is none.
    """
    plain = value.lower() if isinstance(value, str) else ""
    for each in ALL_NAMES:
        if plain == each.value:
            return each
    raise PydanticKnownError("enum", {"expected": " or ".join(repr(each.value) for each in ALL_NAMES)})


NamedChoice = Annotated[
    NameOfScheme,
    BeforeValidator(find_name),
    WithJsonSchema({"type": "string", "enum": [each.value for each in ALL_NAMES]}),
]
"""A field's value: the name of a scheme or of a mix."""


@dataclass(frozen=True)
class Activations:
    """The rounding of a linear's inputs while a runtime serves the checkpoint.

    columns      consecutive inputs of a token that share a scale; `WHOLE`: all of them
    every_token  whether all tokens share one scale, known before
    scale        type of the scales
    calibrated   whether a number from calibration text is stored: the largest magnitude of the inputs
    """

    element: Element
    bits: int
    columns: int
    scale: ScaleType = ScaleType.FLOAT
    every_token: bool = False
    calibrated: bool = False


@dataclass(frozen=True)
class NamedScheme:
    """The facts of a name.

    group_size   consecutive columns that share a scale; `WHOLE`: all
    rows         consecutive rows that do; `WHOLE`: all
    whole_groups whether the columns of a linear must be whole groups; else the last group has what is left
    activations  None: they stay in 16 bits
    blocks       the type that llama.cpp's files store it in, which says all of its numbers; None: it is none of those
    """

    title: str
    element: Element
    bits: int
    group_size: int
    scale: ScaleType = ScaleType.FLOAT
    rows: int = 1
    whole_groups: bool = True
    activations: Activations | None = None
    blocks: BlockType | None = None

    @property
    def calibrated(self) -> bool:
        """True if a number from calibration text is stored beside the weight."""
        return self.activations is not None and self.activations.calibrated


_E4M3, _E2M1 = Element.E4M3, Element.E2M1
_TOKEN = Activations(_E4M3, 8, WHOLE)
_MX4, _MX8 = (Activations(e, b, 32, ScaleType.E8M0) for e, b in ((_E2M1, 4), (_E4M3, 8)))


def _in_blocks(title: str, bits: int, kind: BlockType) -> NamedScheme:
    return NamedScheme(f"{title}, for llama.cpp", Element.INTEGER, bits, kind.columns, blocks=kind)


_BLOCKS = {
    SchemeName.Q2_K: _in_blocks("2-bit codes in super-blocks, 2.625 bits a weight", 2, block_types.Q2_K),
    SchemeName.Q3_K: _in_blocks("3-bit codes in super-blocks, 3.4375 bits a weight", 3, block_types.Q3_K),
    SchemeName.Q4_K: _in_blocks("4-bit codes in super-blocks, 4.5 bits a weight", 4, block_types.Q4_K),
    SchemeName.Q5_K: _in_blocks("5-bit codes in super-blocks, 5.5 bits a weight", 5, block_types.Q5_K),
    SchemeName.Q6_K: _in_blocks("6-bit codes in super-blocks, 6.5625 bits a weight", 6, block_types.Q6_K),
    SchemeName.IQ3_S: _in_blocks("A lattice of 3.25 bits in super-blocks, 3.4375 bits a weight", 3, block_types.IQ3_S),
    SchemeName.IQ4_NL: _in_blocks("4-bit codes of uneven levels, 4.5 bits a weight", 4, block_types.IQ4_NL),
    SchemeName.IQ4_XS: _in_blocks("The same in super-blocks, 4.25 bits a weight", 4, block_types.IQ4_XS),
    SchemeName.Q2_0: _in_blocks("2-bit codes in blocks of 64, 2.25 bits a weight", 2, block_types.Q2_0),
    SchemeName.Q4_0: _in_blocks("4-bit codes in blocks of 32, 4.5 bits a weight", 4, block_types.Q4_0),
    SchemeName.Q4_1: _in_blocks("4-bit codes in blocks of 32 with an offset, 5 bits a weight", 4, block_types.Q4_1),
    SchemeName.Q5_0: _in_blocks("5-bit codes in blocks of 32, 5.5 bits a weight", 5, block_types.Q5_0),
    SchemeName.Q5_1: _in_blocks("5-bit codes in blocks of 32 with an offset, 6 bits a weight", 5, block_types.Q5_1),
    SchemeName.Q8_0: _in_blocks("8-bit codes in blocks of 32, 8.5 bits a weight", 8, block_types.Q8_0),
}

SCHEMES: MappingProxyType[SchemeName, NamedScheme] = MappingProxyType(
    {
        SchemeName.FP8: NamedScheme("FP8, a scale per row, activations per token", _E4M3, 8, WHOLE, activations=_TOKEN),
        SchemeName.FP8_TENSOR: NamedScheme(
            "FP8, one scale, activations with one calibrated scale",
            _E4M3,
            8,
            WHOLE,
            rows=WHOLE,
            activations=Activations(_E4M3, 8, WHOLE, every_token=True, calibrated=True),
        ),
        SchemeName.FP8_BLOCK: NamedScheme(
            "FP8, a scale per block of 128 x 128, activations per 128 inputs",
            _E4M3,
            8,
            128,
            rows=128,
            whole_groups=False,
            activations=Activations(_E4M3, 8, 128),
        ),
        SchemeName.FP8A16: NamedScheme("FP8 weights alone, a scale per row", _E4M3, 8, WHOLE),
        SchemeName.INT8: NamedScheme(
            "INT8, a scale per row, activations per token (W8A8)",
            Element.INTEGER,
            8,
            WHOLE,
            activations=Activations(Element.INTEGER, 8, WHOLE),
        ),
        SchemeName.NVFP4: NamedScheme(
            "NVFP4, groups of 16, activations too (W4A4)",
            _E2M1,
            4,
            16,
            ScaleType.E4M3,
            activations=Activations(_E2M1, 4, 16, ScaleType.E4M3, calibrated=True),
        ),
        SchemeName.NVFP4A16: NamedScheme("NVFP4 weights alone, groups of 16", _E2M1, 4, 16, ScaleType.E4M3),
        SchemeName.MXFP4: NamedScheme(
            "MXFP4, groups of 32, activations too", _E2M1, 4, 32, ScaleType.E8M0, activations=_MX4
        ),
        SchemeName.MXFP4A16: NamedScheme("MXFP4 weights alone, groups of 32", _E2M1, 4, 32, ScaleType.E8M0),
        SchemeName.MXFP8: NamedScheme(
            "MXFP8, groups of 32, activations too", _E4M3, 8, 32, ScaleType.E8M0, activations=_MX8
        ),
        SchemeName.MXFP8A16: NamedScheme("MXFP8 weights alone, groups of 32", _E4M3, 8, 32, ScaleType.E8M0),
        **_BLOCKS,
    }
)
ALL_SCHEMES = frozenset(SchemeName)
BLOCK_SCHEMES = frozenset(_BLOCKS)
"""Those of llama.cpp's files."""
PRESET_SCHEMES = ALL_SCHEMES - BLOCK_SCHEMES
"""Those that compressed-tensors has presets of."""
COARSE = frozenset(
    name
    for name, row in SCHEMES.items()
    if (row.element, row.scale) == (_E2M1, ScaleType.E8M0) or (row.blocks and row.blocks.code_bits <= 4)
)
"""Those for which codes that move end to end get more steps and text: MXFP4, whose scales hardly can move, and
llama.cpp's of at most 4 bits."""
COMPENSATED = frozenset(name for name, row in SCHEMES.items() if row.blocks and row.blocks.code_bits <= 6)
"""llama.cpp's types that learned rounding begins in as GPTQ makes them, and whose codes move:
all but that of 8 bits."""
COARSE_BITS = 3
"""The most bits of integers whose codes move end to end."""
