"""The `gptq` format: GPTQ's words with zero points in their first form, for symmetric weights.

`workers.formats.packed.gptq_words` has the tensors. Every reader of GPTQ takes this form; vLLM reads of it symmetric
weights of 4 and 8 bits.
"""

from collections.abc import Mapping

from torch import Tensor

from app.domain.formats import ExportFormat
from workers.formats.checkpoint import Layout, checkpoint_format
from workers.formats.packed import gptq_words
from workers.formats.packed.loading import LOADER, base_of, sections
from workers.formats.stored_linear import StoredLinear
from workers.numerics.quantized import LinearResult

LESS = 1
"""The difference of a zero point and what is stored of it."""


def compress(name: str, result: LinearResult) -> dict[str, Tensor]:
    """The stored tensors of the linear `name`, by full name; refuses what `gptq_words.compress` does."""
    return gptq_words.compress(name, result, ExportFormat.GPTQ, LESS)


def decompress(name: str, tensors: Mapping[str, Tensor], stored: StoredLinear) -> LinearResult:
    """The exact inverse of `compress`; refuses what `gptq_words.decompress` does."""
    return gptq_words.decompress(name, tensors, stored, LESS)


FORMAT = checkpoint_format(
    Layout(
        compress,
        config=lambda targets, ignored: {"quantization_config": gptq_words.config(targets, ignored, "gptq")},
        needs_loader=lambda _schemes: True,
        loader=LOADER,
    ),
    sections(ExportFormat.GPTQ),
    base_of(ExportFormat.GPTQ),
    decompress,
)
