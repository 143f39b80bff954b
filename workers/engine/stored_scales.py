"""Scales as each format of a job stores them: fitted once, and rounded here where one has another dtype.

A job's scales are fitted on the grid of the strictest of its formats (`workers.engine.plan.scale_dtype_of`): bf16's,
where the model's dtype is that and another format has fp16, since fp16 holds eight significant bits exactly from 2^-17
on. What is left to round is counted for each format, and told.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

import torch

from app.domain.formats import FORMATS, ExportFormat, ScaleDtype
from bitwright.errors import FormatCannotHold
from workers.numerics.quantized import AffineWeight, LinearResult
from workers.numerics.scale_grid import rescaled

CODE = "scales_rounded"


def stored_dtype(name: ExportFormat, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of a format's scales; None if it holds any. `dtype` is that of the dequantized weight."""
    wanted = FORMATS[name].scales
    half = dict.fromkeys((ScaleDtype.FLOAT16, ScaleDtype.COMMON), torch.float16)
    return {ScaleDtype.MODEL: dtype, **half}.get(wanted)


def caches_left_out(formats: Collection[ExportFormat]) -> Iterator[tuple[str, str]]:
    """Code and sentence for the caller on each format that leaves out the scales of a job's key-value cache."""
    for name in formats:
        if not name.info.kv_cache and not name.info.is_adapter:
            yield "kv_cache_left_out", f"{name.value}: the scales of the key-value cache are left out, it holds none"


@dataclass
class StoredScales:
    """Makes the result that a format's writer takes; `errors` by format, only of those that had to be rounded."""

    errors: dict[ExportFormat, float] = field(default_factory=dict)

    def of(self, name: ExportFormat, linear: str, result: LinearResult) -> LinearResult:
        """The result of the linear with the format's own scales; a weight without scales stays as it is.

        Raises:
            FormatCannotHold: a scale is beyond what the format's dtype holds.
        """
        weight = result.weight
        dtype = stored_dtype(name, weight.dtype)
        if dtype is None or not isinstance(weight, AffineWeight) or weight.scale.dtype == dtype:
            return result
        rounded, error = rescaled(weight, dtype)
        if not math.isfinite(error):
            hint = 'leave the format out, or ask for formats: ["compressed-tensors"] or ["native"]'
            detail = f"{name.value} stores scales as {dtype}, which does not hold one of {linear}"
            raise FormatCannotHold(detail, field="formats", value=name.value, hint=hint)
        if error:
            self.errors[name] = max(self.errors.get(name, 0.0), error)
        return replace(result, weight=rounded)

    def warnings(self) -> dict[str, str]:
        """By format: the sentence for the caller."""
        return {
            name.value: f"{name.value}: re-rounded scales, largest relative error {error:.2g}"
            for name, error in self.errors.items()
        }

    def report(self) -> dict[str, float]:
        """By format, for the report."""
        return {name.value: error for name, error in self.errors.items()}
