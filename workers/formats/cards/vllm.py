"""vLLM's rules for a checkpoint, from the rows of its format, so that a model card promises no more than they allow."""

from collections.abc import Mapping
from types import MappingProxyType

from app.domain.formats import ExportFormat
from app.domain.fused_shapes import shape_refusals
from app.domain.methods import Scheme
from app.domain.runtimes import RuntimeSupport, Support, described


def vllm_rows(name: ExportFormat) -> tuple[RuntimeSupport, ...]:
    """The rows on vLLM and a format, the newest release first."""
    return tuple(row for row in name.info.runtimes if row.runtime == "vllm")


NO_OUTPUTS: Mapping[str, int] = MappingProxyType({})


def vllm_refusals(
    schemes: Mapping[str, Scheme],
    support: RuntimeSupport,
    outputs: Mapping[str, int] = NO_OUTPUTS,
    embeddings: str | None = None,
) -> list[str]:
    """Reasons why a row's rules refuse a checkpoint with these linears; empty if none applies.

    outputs      out_features by the same names, as far as known
    embeddings   name of the embeddings among them
    """
    refused = sorted({described(scheme) for scheme in schemes.values() if not support.loads(scheme)})
    reasons = [f"it has no kernel for {scheme}" for scheme in refused]
    packed = None if embeddings is None else schemes.get(embeddings)
    if not refused and packed is not None and not support.looks_up(packed):
        reasons.append(f"it looks no rows up in embeddings of {described(packed)}")
    shapes = shape_refusals(schemes, outputs, support).values()
    return [*reasons, *_split_fusions(schemes, support), *shapes]


def vllm_knowledge(
    name: ExportFormat,
    schemes: Mapping[str, Scheme],
    outputs: Mapping[str, int] = NO_OUTPUTS,
    embeddings: str | None = None,
) -> tuple[str, str | None]:
    """The vLLM that loads a checkpoint with these linears, where, and how we know; or why none does."""
    rows = vllm_rows(name)
    able = [row for row in rows if not vllm_refusals(schemes, row, outputs, embeddings)]
    if not able:
        return "", f"{rows[0].known()}: {vllm_refusals(schemes, rows[0], outputs, embeddings)[0]}"
    # Releases that were tested come before those whose source was read.
    known = "; ".join(row.known() for row in sorted(able, key=lambda row: row.support is not Support.TESTED))
    since = able[0].first_release(schemes.values())
    needed = f" {since} or newer" if since else ""
    untried = "" if any(row.support is Support.TESTED for row in able) else " (read in its source, not tried)"
    return f"{needed}, {known}{untried}", None


def _split_fusions(schemes: Mapping[str, Scheme], support: RuntimeSupport) -> list[str]:
    """Fused linears that differ, one of them left in 16 bits included."""
    reasons = dict[str, None]()
    for name in schemes:
        parent, _, last = name.rpartition(".")
        for fused in support.fused:
            if last in fused and len({schemes.get(f"{parent}.{linear}") for linear in fused}) > 1:
                reasons[f"it runs {', '.join(fused)} of {parent} as one, and their schemes differ"] = None
    return list(reasons)
