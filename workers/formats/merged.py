"""The merged format: an ordinary checkpoint of the weights that the quantized linears stand for.

    name.weight     the model's dtype (out, in)     `LinearResult.dequantize`, low-rank correction included

It is as large as the original and loads wherever the original does. Where the adapter ships as a `peft` checkpoint of
the same job, the correction is left out, and this is the base that the adapter belongs to: peft adds
(alpha / rank) * B @ A to exactly these weights.
"""

from torch import Tensor

from workers.numerics.quantized import LinearResult


def compress(name: str, result: LinearResult) -> dict[str, Tensor]:
    """The stored tensor of the linear `name`, by full name."""
    return {f"{name}.weight": result.dequantize()}
