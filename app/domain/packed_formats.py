"""Formats of packed words that other packages run: their rows of the table of formats (`app.domain.formats`)."""

from app.domain.format_info import (
    BITSANDBYTES_PACKAGE,
    GPTQMODEL,
    MLX_LM,
    TRANSFORMERS,
    VLLM,
    VLLM_CPU,
    VLLM_FUSED,
    EmbeddingRule,
    FormatInfo,
    LowRankRule,
    Offsets,
    ScaleDtype,
)
from app.domain.methods import PER_CHANNEL, Form, SchemeName
from app.domain.mlx_rules import mlx_refusals
from app.domain.runtimes import RuntimeSupport, Support

GPTQ_BITS, MLX_BITS = frozenset({2, 3, 4, 8}), frozenset({2, 3, 4, 5, 6, 8})
MLX_SCHEMES = frozenset({SchemeName.MXFP4A16, SchemeName.MXFP8A16})
THROUGH_TRANSFORMERS = "from_pretrained of transformers goes through it, but for experts, which it packs none of"
MARLIN_GROUPS = frozenset({PER_CHANNEL, 32, 64, 128})


def _by_loader(bits: frozenset[int], schemes: frozenset[SchemeName] = frozenset()) -> RuntimeSupport:
    """The row of transformers for a format whose artifact has a loader of its own."""
    note = "through the loader in the artifact, as a model with plain linears"
    return RuntimeSupport("transformers", Support.TESTED, bits, note=note, version=TRANSFORMERS, schemes=schemes)


GPTQ = FormatInfo(
    title="GPTQ",
    summary="Packed words of GPTQModel and AutoGPTQ, zero points in their first form: symmetric weights.",
    kinds=frozenset({Form.AFFINE}),
    low_rank=LowRankRule.BESIDE,
    bits=GPTQ_BITS,
    symmetries=frozenset({True}),
    scales=ScaleDtype.COMMON,
    group_multiple=32,
    output_multiple=32,
    runtimes=(
        _by_loader(GPTQ_BITS),
        RuntimeSupport(
            "gptqmodel",
            Support.BY_RULES,
            GPTQ_BITS,
            group_sizes=frozenset({PER_CHANNEL, 32, 64, 128, 256, 512, 1024}),
            note=THROUGH_TRANSFORMERS,
            version=GPTQMODEL,
        ),
        RuntimeSupport(
            "vllm",
            Support.BY_RULES,
            frozenset({4, 8}),
            note="one scheme for q, k, v and one for gate, up",
            version=VLLM,
            devices="NVIDIA GPUs",
            group_sizes=MARLIN_GROUPS,
            fused=VLLM_FUSED,
        ),
        RuntimeSupport(
            "vllm",
            Support.TESTED,
            frozenset({4}),
            note="the same for fused linears",
            version=VLLM_CPU,
            devices="CPUs",
            group_sizes=MARLIN_GROUPS,
            fused=VLLM_FUSED,
        ),
    ),
)

GPTQ_V2 = FormatInfo(
    title="GPTQ, second form",
    summary="The same words with zero points as they are (checkpoint_format gptq_v2): of either symmetry.",
    kinds=frozenset({Form.AFFINE}),
    low_rank=LowRankRule.BESIDE,
    bits=GPTQ_BITS,
    symmetries=frozenset({True, False}),
    scales=ScaleDtype.COMMON,
    group_multiple=32,
    output_multiple=32,
    runtimes=(
        _by_loader(GPTQ_BITS),
        RuntimeSupport(
            "gptqmodel",
            Support.BY_RULES,
            GPTQ_BITS,
            group_sizes=frozenset({PER_CHANNEL, 32, 64, 128, 256, 512, 1024}),
            note=THROUGH_TRANSFORMERS,
            version=GPTQMODEL,
        ),
        RuntimeSupport(
            "vllm",
            Support.BY_RULES,
            frozenset({4, 8}),
            asymmetric_bits=frozenset(),
            note="symmetric weights alone; one scheme for q, k, v and one for gate, up",
            version=VLLM,
            devices="NVIDIA GPUs",
            group_sizes=MARLIN_GROUPS,
            fused=VLLM_FUSED,
        ),
    ),
)

AWQ = FormatInfo(
    title="AWQ (GEMM)",
    summary="Four-bit words of AutoAWQ in the order of its GEMM kernels, with a zero point for each group.",
    kinds=frozenset({Form.AFFINE}),
    low_rank=LowRankRule.BESIDE,
    bits=frozenset({4}),
    symmetries=frozenset({True, False}),
    scales=ScaleDtype.COMMON,
    group_multiple=32,
    output_multiple=32,
    uniform=True,
    runtimes=(
        _by_loader(frozenset({4})),
        RuntimeSupport(
            "gptqmodel",
            Support.BY_RULES,
            frozenset({4}),
            group_sizes=MARLIN_GROUPS,
            note=THROUGH_TRANSFORMERS,
            version=GPTQMODEL,
        ),
        RuntimeSupport(
            "vllm",
            Support.BY_RULES,
            frozenset({4}),
            note="q, k, v all quantized or none, and gate, up",
            version=VLLM,
            devices="NVIDIA GPUs of compute capability 7.5 or newer",
            group_sizes=MARLIN_GROUPS,
            fused=VLLM_FUSED,
        ),
        RuntimeSupport(
            "vllm",
            Support.TESTED,
            frozenset({4}),
            note="the same for fused linears",
            version=VLLM_CPU,
            devices="CPUs",
            group_sizes=MARLIN_GROUPS,
            fused=VLLM_FUSED,
        ),
    ),
)

MLX = FormatInfo(
    title="MLX",
    summary="A dense stream of codes with scale and bias for each group, or MXFP4 and MXFP8, for Apple's machines.",
    kinds=frozenset({Form.AFFINE, Form.FLOAT}),
    low_rank=LowRankRule.BESIDE,
    bits=MLX_BITS,
    symmetries=frozenset({True, False}),
    scales=ScaleDtype.MODEL,
    asymmetric_bits=MLX_BITS - {8},
    group_multiple=32,
    group_sizes=frozenset({32, 64, 128}),
    offsets=Offsets.MODEL,
    embeddings=EmbeddingRule.ANY,
    schemes=MLX_SCHEMES,
    library="mlx",
    model_check=mlx_refusals,
    runtimes=(
        _by_loader(MLX_BITS, MLX_SCHEMES),
        RuntimeSupport(
            "mlx-lm",
            Support.BY_RULES,
            MLX_BITS,
            asymmetric_bits=MLX_BITS - {8},
            group_sizes=frozenset({32, 64, 128}),
            note="its own arithmetic in 16 bits rounds product and sum: in bfloat16 by up to 0.06 of a step at "
            "4 bits, 1 at 8",
            version=MLX_LM,
            schemes=MLX_SCHEMES,
        ),
    ),
)

BITSANDBYTES = FormatInfo(
    title="bitsandbytes NF4",
    summary="Four-bit NormalFloat as QLoRA's library stores it; the base that peft trains on.",
    kinds=frozenset({Form.CODEBOOK}),
    low_rank=LowRankRule.BESIDE,
    bits=frozenset({4}),
    symmetries=frozenset({True}),
    group_multiple=32,
    group_sizes=frozenset({32, 64, 128, 256, 512, 1024, 2048, 4096}),
    runtimes=(
        _by_loader(frozenset({4})),
        RuntimeSupport(
            "bitsandbytes",
            Support.BY_RULES,
            frozenset({4}),
            note=f"{THROUGH_TRANSFORMERS}; groups of 32 since 0.50",
            version=BITSANDBYTES_PACKAGE,
        ),
    ),
)
