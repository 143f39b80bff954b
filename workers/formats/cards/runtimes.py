"""Which runtimes load a checkpoint, by the rules of each: for the model card, which must not promise too much."""

from collections.abc import Collection, Iterable, Mapping

from app.domain.formats import DENSE_WORDS, FORMATS, ExportFormat
from app.domain.methods import Scheme
from app.domain.runtimes import RuntimeSupport, Support, described
from workers.formats.stored_linear import StoredLowRank

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that vLLM runs as one, and so needs in one scheme."""


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.32 and 0.33 take as `--max-lora-rank`."""

LORA_PATTERNS = "0.32.0"
"""The first vLLM that reads `rank_pattern` and `alpha_pattern` of an adapter; before, it scales all linears alike."""


def vllm_rows(export_format: ExportFormat = ExportFormat.COMPRESSED_TENSORS) -> tuple[RuntimeSupport, ...]:
    """What is known of vLLM and a format, the newest release first."""
    return tuple(row for row in FORMATS[export_format].runtimes if row.runtime == "vllm")


def vllm_row(export_format: ExportFormat) -> RuntimeSupport:
    """The first of `vllm_rows`."""
    return vllm_rows(export_format)[0]


def vllm_refusals(schemes: Mapping[str, Scheme], support: RuntimeSupport | None = None) -> list[str]:
    """Why vLLM's rules refuse a compressed-tensors checkpoint with these linears; empty if they do not.

    support   the rules; those of the newest release if none are given
    """
    support = support or vllm_row(ExportFormat.COMPRESSED_TENSORS)
    refused = sorted({described(scheme) for scheme in schemes.values() if not support.loads(scheme)})
    return [f"it has no kernel for {scheme}" for scheme in refused] + _split_fusions(schemes)


def vllm_knowledge(schemes: Mapping[str, Scheme]) -> tuple[str, str | None]:
    """Which vLLM loads a compressed-tensors checkpoint with these linears, where, and how we know; or why none does."""
    rows = vllm_rows()
    able = [row for row in rows if not vllm_refusals(schemes, row)]
    if not able:
        return "", f"{rows[0].known()}: {vllm_refusals(schemes, rows[0])[0]}"
    # What was tried comes before what was read.
    known = "; ".join(row.known() for row in sorted(able, key=lambda row: row.support is not Support.TESTED))
    since = able[0].first_release(schemes.values())
    needed = f" {since} or newer" if since else ""
    untried = "" if any(row.support is Support.TESTED for row in able) else " (read in its source, not tried)"
    return f"{needed}, {known}{untried}", None


def vllm_lora(factors: Collection[StoredLowRank]) -> tuple[str, int | None]:
    """How we know that vLLM serves an adapter with these factors, and its `--max-lora-rank`; None if it does not."""
    largest = max((one.rank for one in factors), default=0)
    rank = next((allowed for allowed in LORA_RANKS if largest <= allowed), None)
    patterns = f", {LORA_PATTERNS} or newer, for ranks or strengths differ" if len(set(factors)) > 1 else ""
    return vllm_row(ExportFormat.PEFT).known() + patterns, rank


def package_needed(schemes: Iterable[Scheme]) -> str:
    """The requirement of the package compressed-tensors, as pip reads it, that these linears need."""
    newer = any(DENSE_WORDS.holds(scheme) for scheme in schemes)
    return f"compressed-tensors>={DENSE_WORDS.version.removesuffix('.0')}" if newer else "compressed-tensors"


def straddling(schemes: Iterable[Scheme]) -> list[int]:
    """Their widths whose codes straddle words."""
    return sorted({scheme.bits for scheme in schemes if DENSE_WORDS.holds(scheme)})


def dense_words_warning(widths: Collection[int]) -> str:
    """What whoever loads a checkpoint with these widths should know."""
    return (
        f"compressed-tensors: for {', '.join(map(str, widths))} bits transformers needs the package compressed-tensors "
        f"{DENSE_WORDS.version} or newer; earlier releases pack them with gaps, and refuse the checkpoint"
    )


def _split_fusions(schemes: Mapping[str, Scheme]) -> list[str]:
    """Fused linears that differ, one of them left in 16 bits included."""
    found = dict[str, None]()
    for name in schemes:
        parent, _, last = name.rpartition(".")
        for fused in FUSED:
            if last in fused and len({schemes.get(f"{parent}.{part}") for part in fused}) > 1:
                found[f"it runs {', '.join(fused)} of {parent} as one, and their schemes differ"] = None
    return list(found)
