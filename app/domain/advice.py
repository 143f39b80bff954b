"""Warnings about valid requests that are likely to disappoint, given by a dry run and by the job."""

from collections.abc import Mapping

from app.domain.adapters import AdapterSpec, GroupedSpec, LoRASpec, QALoRASpec
from app.domain.adapters.shapes import shape_for
from app.domain.methods import METHODS, WeightSpec
from app.domain.request.combination_rules import trained_parameters
from app.domain.request.job_request import Calibration, JobRequest
from app.domain.workload import calibration_tokens
from bitwright.errors import MisalignedAdapter

STARVED = 4
"""Times fewer tokens than its preset has, from which on a method is said to be starved."""
HONOURED = 0.9
"""Share of a LoRA's parameters from which on a rank counts as honoured."""


def preset_tokens(spec: WeightSpec) -> int:
    """Calibration tokens of the preset that a spec names; of a method without presets, the default's."""
    info = METHODS.get(spec.method)
    preset = None if info is None else info.presets.get(str(getattr(spec, "preset", "")))
    usual = Calibration()
    return (preset or usual).num_samples * (preset or usual).sequence_length


def starved_calibration(request: JobRequest, tokens: int | None = None) -> str | None:
    """A warning if much less text calibrates than the method is made for.

    tokens   that differ, as far as the text has them; None: as many as are asked for
    """
    asked = calibration_tokens(request)
    used, usual = asked if tokens is None else min(asked, tokens), preset_tokens(request.quantization)
    if not asked or STARVED * used > usual:
        return None
    method = request.quantization.method
    return (
        f"calibration: {used:,} tokens calibrate, {usual / max(1, used):.0f} times fewer than the {usual:,} that "
        f"{method} is set for; expect a worse result, or raise num_samples and sequence_length, or give more text"
    )


def dishonoured_rank(
    spec: WeightSpec, adapter: AdapterSpec | None, linears: Mapping[str, tuple[int, int]]
) -> str | None:
    """A warning if an adapter cannot be what its rank promises on these linears (out, in), with the counts.

    A kind that trades shape for rank promises the parameters of the LoRA of that rank; the others promise an update of
    that rank.
    """
    quantized = {name: shape for name, shape in linears.items() if spec.scheme_of(name) is not None}
    if adapter is None:
        rank, most = spec.factors_rank(), min((min(shape) for shape in quantized.values()), default=None)
        if most is None or rank <= most:
            return None
        return f"rank: {rank} is not reached: factors have at most rank {most} on the narrowest of these linears"
    wanted = sum(adapter.rank * (out + width) for out, width in quantized.values())
    trained = trained_parameters(spec, adapter, quantized)
    least = min((_update_rank(spec, adapter, name, *shape) for name, shape in quantized.items()), default=adapter.rank)
    counts = f"it has {trained:,} trained parameters where a LoRA of that rank has {wanted:,}"
    if not isinstance(adapter, GroupedSpec) or isinstance(adapter, LoRASpec | QALoRASpec):
        if least >= adapter.rank:
            return None
        kind = adapter.model_dump()["kind"]
        why = f"an update of {kind} has at most rank {least} on the narrowest of these linears; {counts}"
    elif trained >= HONOURED * wanted:
        return None
    else:
        kind = adapter.model_dump()["kind"]
        why = f"{kind} pools inputs and repeats outputs: {counts}; smaller groups or pools leave more, or another kind"
    return f"adapter.rank: {adapter.rank} is not reached: {why}"


def _update_rank(spec: WeightSpec, adapter: AdapterSpec, name: str, out_features: int, in_features: int) -> int:
    scheme = spec.scheme_of(name)
    if not isinstance(adapter, GroupedSpec) or scheme is None:
        return min(adapter.rank, out_features, in_features)
    try:
        return shape_for(adapter, in_features, out_features, scheme.group_size).update_rank
    except (MisalignedAdapter, ValueError):
        return adapter.rank  # reported as an error
