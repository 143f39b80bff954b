"""AdamW (Loshchilov & Hutter, arXiv:1711.05101) on one tensor, all of it on the device, so that it can be captured.

    p <- p - rate*decay*p
    m <- 0.9*m + 0.1*g,   v <- 0.999*v + 0.001*g^2
    p <- p - rate * m/(1 - 0.9^t) / (sqrt(v/(1 - 0.999^t)) + epsilon)

epsilon is far below torch's 1e-8: gradients of a mean over millions of outputs are about that small, and a loss that
is multiplied by a constant (as for fp16) must make the same step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-15


@dataclass(frozen=True)
class AdamW:
    """m, v and t of one parameter: `mean` and `square` of its shape, `count` a number, all in its dtype."""

    mean: Tensor
    square: Tensor
    count: Tensor

    @classmethod
    def of(cls, parameter: Tensor) -> "AdamW":
        count = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        return cls(torch.zeros_like(parameter), torch.zeros_like(parameter), count)

    @torch.no_grad()
    def step(self, parameter: Tensor, gradient: Tensor, rate: Tensor | float, decay: float) -> None:
        """Updates `parameter`; NaN and infinities in the gradient count as 0, and `gradient` is overwritten."""
        g = gradient.nan_to_num_(0.0, 0.0, 0.0)
        self.count.add_(1)
        self.mean.lerp_(g, 1 - BETAS[0])
        self.square.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        first, second = (1 - torch.exp(self.count * math.log(beta)) for beta in BETAS)
        parameter.sub_(parameter * (rate * decay))
        parameter.sub_(rate * (self.mean / first) / ((self.square / second).sqrt() + EPSILON))

    def reset(self) -> None:
        """Sets the state before the first step."""
        for tensor in (self.mean, self.square, self.count):
            tensor.zero_()
