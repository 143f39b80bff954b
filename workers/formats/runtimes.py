"""Which runtimes load a checkpoint, by the rules of each: for the model card, which must not promise too much."""

from collections.abc import Mapping

from app.domain.formats import FORMATS, ExportFormat
from app.domain.methods import Scheme

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that vLLM runs as one, and so needs in one scheme."""


def vllm_refusals(schemes: Mapping[str, Scheme]) -> list[str]:
    """Why vLLM's rules refuse a compressed-tensors checkpoint with these linears; empty if they do not."""
    support = next(r for r in FORMATS[ExportFormat.COMPRESSED_TENSORS].runtimes if r.runtime == "vllm")
    refused = sorted({_describe(scheme) for scheme in schemes.values() if not support.loads(scheme)})
    return [f"it has no kernel for {scheme}" for scheme in refused] + _split_fusions(schemes)


def _split_fusions(schemes: Mapping[str, Scheme]) -> list[str]:
    found = []
    for name in schemes:
        parent, _, last = name.rpartition(".")
        for fused in FUSED:
            if last == fused[0] and len({schemes.get(f"{parent}.{part}") for part in fused}) > 1:
                found.append(f"it runs {', '.join(fused)} of {parent} as one, and their schemes differ")
    return found


def _describe(scheme: Scheme) -> str:
    group = "per channel" if scheme.group_size == -1 else f"group size {scheme.group_size}"
    return f"{scheme.bits} bits, {'symmetric' if scheme.symmetric else 'asymmetric'}, {group}"
