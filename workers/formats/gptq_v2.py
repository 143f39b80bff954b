"""The `gptq-v2` format: GPTQ's words with zero points as they are, for weights of either symmetry.

`workers.formats.packed.gptq_words` has the tensors. GPTQModel and transformers read it (checkpoint_format gptq_v2);
vLLM symmetric weights of 4 and 8 bits.
"""

from collections.abc import Mapping

from torch import Tensor

from app.domain.formats import ExportFormat
from workers.formats.checkpoint import Layout, checkpoint_format
from workers.formats.packed import gptq_words
from workers.formats.packed.loading import LOADER, base_of, sections
from workers.formats.stored_linear import StoredLinear
from workers.numerics.quantized import LinearResult

LESS = 0
"""The difference of a zero point and what is stored of it."""


def compress(name: str, result: LinearResult) -> dict[str, Tensor]:
    """The stored tensors of the linear `name`, by full name; refuses what `gptq_words.compress` does."""
    return gptq_words.compress(name, result, ExportFormat.GPTQ_V2, LESS)


def decompress(name: str, tensors: Mapping[str, Tensor], stored: StoredLinear) -> LinearResult:
    """The exact inverse of `compress`; refuses what `gptq_words.decompress` does."""
    return gptq_words.decompress(name, tensors, stored, LESS)


FORMAT = checkpoint_format(
    Layout(
        compress,
        config=lambda targets, ignored: {"quantization_config": gptq_words.config(targets, ignored, "gptq_v2")},
        needs_loader=lambda _schemes: True,
        loader=LOADER,
    ),
    sections(ExportFormat.GPTQ_V2),
    base_of(ExportFormat.GPTQ_V2),
    decompress,
)
