"""NormalFloat, round to nearest: the base that QLoRA trains an adapter on (Dettmers et al., arXiv:2305.14314).

    a = max |w| of a group,  q = argmin_i |w/a - c_i|,  w_hat = a*c_q         c: quantiles of a normal distribution
    a_hat = off + m*a_code/(2^8 - 1)                                          with double quantization, computed first

Formulas, and what differs from bitsandbytes in the second level: `workers.numerics.normal_float`. Bits per weight with
groups of 64: 4.127 with double quantization, 4.25 or 4.5 with maxima in 16 or 32 bits.

Reads the weights alone, one linear at a time; cost O(out*in).
"""

import torch
from torch import Tensor

from app.domain.methods import NormalFloatSpec, Scheme
from workers.contracts.blocks import BlockTask, Method
from workers.contracts.results import BlockResult
from workers.numerics.normal_float import AbsmaxFormat, DoubleQuantization, quantize
from workers.numerics.quantized import LinearResult

QLORA = DoubleQuantization(bits=8, dtype=torch.float32, superblock=256)
"""The sizes of QLoRA's second level."""


class NormalFloat:
    @torch.no_grad()
    def quantize_block(self, task: BlockTask, spec: NormalFloatSpec) -> BlockResult:
        return BlockResult(
            {
                name: self.quantize_tensor(task.linear(name).weight, scheme, task.scale_dtype, spec)
                for name, scheme in task.schemes.items()
            }
        )

    @torch.no_grad()
    def quantize_tensor(
        self,
        weight: Tensor,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        spec: NormalFloatSpec,
        joined_amax: Tensor | None = None,
    ) -> LinearResult:
        """One linear's weight (out, in) by itself."""
        del joined_amax
        absmax: AbsmaxFormat = QLORA if spec.double_quantization else scale_dtype
        return LinearResult(quantize(weight, scheme, absmax, weight.dtype))


METHOD = Method(NormalFloatSpec, NormalFloat())
