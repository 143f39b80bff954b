"""Linears that a runtime refuses, by its rules: shapes of those that it runs as one, zero points in words, experts.

Read in vLLM 0.33 (`quantization/utils/fp8_utils.py`, `quantization/compressed_tensors`): of linears that run as one,
every one but the last has whole blocks of 128 rows; of an expert, gate and up have; the zero points of a linear's
outputs fill whole words of 32 bits; and there is no kernel for experts of which the weights alone are FP8.
"""

import re
from collections.abc import Iterator, Mapping

from app.domain.methods import Scheme, SchemeName
from app.domain.runtimes import RuntimeSupport

WORD_BITS = 32
EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")
EXPERTS_READ = frozenset({"gate_proj", "up_proj", "w1", "w3"})
"""Last names of an expert's linears that read hidden states."""


def shape_refusals(
    schemes: Mapping[str, Scheme], outputs: Mapping[str, int], support: RuntimeSupport
) -> dict[str, str]:
    """Reasons why a row's rules refuse linears beyond their schemes, by the linear's name.

    schemes   of the quantized linears, by module name
    outputs   out_features by the same names, as far as known
    """
    if not support.fused:
        return {}
    reasons = dict[str, str]()
    for name, scheme in schemes.items():
        if name in outputs and support.loads(scheme):
            reason = next(_reasons(name, scheme, outputs[name], support), None)
            reasons |= {} if reason is None else {name: reason}
    return reasons


def _reasons(name: str, scheme: Scheme, rows: int, support: RuntimeSupport) -> Iterator[str]:
    if not scheme.symmetric and rows * scheme.bits % WORD_BITS:
        yield (
            f"it reads zero points in words of {WORD_BITS} bits, and {name} has {rows} outputs, {scheme.bits} bits each"
        )
    if scheme.name is SchemeName.FP8A16 and is_expert(name):
        yield f"it has no kernel for experts in {scheme.name}, as {name}"
    block, (parent, _, last) = scheme.group_rows, name.rpartition(".")
    if block <= 1 or rows % block == 0:
        return
    for fused in support.fused:
        if last in fused[:-1] and not is_expert(name):
            yield f"it runs {', '.join(fused)} of {parent} as one, in blocks of {block} rows, and {last} has {rows}"
    if last in EXPERTS_READ and is_expert(name):
        yield f"it wants an expert's gate and up in blocks of {block} rows, and {name} has {rows}"


def is_expert(name: str) -> bool:
    """True if a linear of that module name is one of many experts; shared ones are linears like any other."""
    return EXPERT.search(name) is not None


def shape_warning(
    what: str, schemes: Mapping[str, Scheme], outputs: Mapping[str, int], rows: tuple[RuntimeSupport, ...]
) -> list[str]:
    """A sentence for each runtime of these rows that refuses some of the linears, naming the first.

    what   the sentence's subject, as `compressed-tensors`
    """
    said = dict[str, str]()
    for row in rows:
        reasons = shape_refusals(schemes, outputs, row)
        if reasons and row.runtime not in said:
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            said[row.runtime] = (
                f"{what}: {row.runtime} refuses linears of this model: {next(iter(reasons.values()))}{more} "
                f"({row.known()}); for it, give them another scheme by an override, or leave them in 16 bits by "
                "modules.ignore"
            )
    return list(said.values())
