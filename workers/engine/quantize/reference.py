"""The reference row of a report: what round to nearest makes of the job's schemes, on the job's evaluation text.

The windows go through every block once more, with its linears rounded to nearest in place of its weights;
`Activations` has
their hidden states. It comes before the method sees the block, and leaves the block as it was, so that no code depends
on whether there is a reference. `app.domain.workload` says when there is one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from app.domain.methods import Scheme
from bitwright.report import Figures
from workers.engine.device.process_group import ProcessGroup
from workers.engine.evaluate import measure
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.activations import Activations
from workers.engine.text.sequences import Sequences
from workers.methods.rtn import quantize_weight


@contextmanager
def rounded(
    linears: Mapping[str, nn.Linear], schemes: Mapping[str, Scheme], scale_dtype: torch.dtype
) -> Iterator[None]:
    """The linears that have a scheme, by name, with their weights rounded to nearest; as they were afterwards."""
    kept = {name: linears[name].weight for name in schemes}
    try:
        for name, scheme in schemes.items():
            value = quantize_weight(kept[name], scheme, scale_dtype).dequantize()
            linears[name].weight = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for name, weight in kept.items():
            linears[name].weight = weight


def measure_reference(
    model: StreamedModel, stream: Activations, sequences: Sequences, head: Tensor | None, processes: ProcessGroup
) -> Figures | None:
    """The row, after the last block; None if `stream` has no reference.

    head    dequantized weight of the head where that is quantized: it is rounded to nearest anyway

    Raises:
        NumericalFailure: the rounded model's output is not finite.
    """
    if stream.reference is None:
        return None
    found = measure(
        model,
        stream.original,
        stream.reference,
        sequences,
        quantized_head=head,
        tick=lambda _: None,
        processes=processes,
    )
    return Figures(perplexity=found.perplexity, kl_divergence=found.kl_divergence, top1_agreement=found.top1_agreement)
