"""Hard-concrete gates and the residual decomposition of a uniform quantizer, whose width the gates choose.

Bayesian Bits (van Baalen et al., arXiv:2005.07093, and its code). For a range [-b, b] and widths k = 2, 4, 8, 16

    s_2 = 2b/3,  s_2k = s_k/(2^k + 1)             so that s_k = 2b/(2^k - 1)
    x_2 = s_2 round(x/s_2),  e_2k = s_2k round((x - (x_2 + e_4 + .. + e_k))/s_2k)
    x_q = x_2 + z_4 (e_4 + z_8 (e_8 + z_16 e_16))

With the gates on up to k this is the plain uniform quantizer of k bits, whose levels are -(2^(k-1) - 1) .. 2^(k-1) -
1 times s_k: 3 levels at 2 bits. x is clipped to just within the range; gradients pass through rounding, and reach b
through steps and clipping.

A gate of parameter phi (Louizos et al., arXiv:1712.01312) with beta = 2/3, zeta = 1.1, gamma = -0.1:

    z = clip(sigm((log u - log(1 - u) + phi)/beta) (zeta - gamma) + gamma, 0, 1),    u ~ U(0, 1)
    q(z > 0) = sigm(phi - beta log(-gamma/zeta))
    decided:  on if sigm(beta log(-gamma/zeta) - phi) < 0.34, that is phi > -0.935
"""

from itertools import pairwise
from math import log

import torch
from torch import Tensor

WIDTHS = (2, 4, 8, 16)
"""Bits that a factor may have; one gate for each except the first."""
BETA, ZETA, GAMMA = 2 / 3, 1.1, -0.1
OFF = 0.34
"""A gate whose probability of being 0 is below this is on in the end."""
SHIFT = BETA * log(-GAMMA / ZETA)


def keep_probability(phi: Tensor) -> Tensor:
    """q(z > 0) of gates, differentiable."""
    return torch.sigmoid(phi - SHIFT)


def sample(phi: Tensor) -> Tensor:
    """Gates z in [0, 1] by torch's own generator, differentiable in phi."""
    tiny = torch.finfo(phi.dtype).tiny
    u = torch.rand_like(phi).clamp(min=tiny, max=1 - torch.finfo(phi.dtype).eps)
    stretched = torch.sigmoid((u.log() - (-u).log1p() + phi) / BETA) * (ZETA - GAMMA) + GAMMA
    return stretched.clamp(0, 1)


def decide(phi: Tensor) -> Tensor:
    """Final gates, 0 or 1."""
    return (torch.sigmoid(SHIFT - phi) < OFF).to(phi.dtype)


def residual_quantize(values: Tensor, limit: Tensor, gates: Tensor) -> Tensor:
    """x_q of values of any shape for the range [-limit, limit] and gates (z_4, z_8, z_16), each in [0, 1].

    `limit` and each of the gates broadcast with the values.
    """
    # A little inside, by more than the last bits, so that nothing rounds to a level beyond the outermost.
    inside = limit * (1 - max(1e-7, 4 * torch.finfo(values.dtype).eps))
    x = torch.minimum(torch.maximum(values, -inside), inside)
    step = limit * 2 / 3
    summed = quantized = step * _round(x / step)
    open_gates = torch.ones_like(gates[0])
    for width, gate in zip(WIDTHS, gates, strict=False):
        step = step / (2**width + 1)
        residual = step * _round((x - summed) / step)
        summed, open_gates = summed + residual, open_gates * gate
        quantized = quantized + open_gates * residual
    return quantized


def step_of(limit: Tensor, bits: int) -> Tensor:
    """s_k: the distance of the levels of that width."""
    return limit * 2 / ((1 << bits) - 1)


def decided_bits(phi: Tensor) -> int:
    """The width that decided gates (4, 8, 16 bits) leave: the last one before the first that is off."""
    on = decide(phi).tolist()
    return WIDTHS[next((index for index, gate in enumerate(on) if not gate), len(on))]


def expected_bits(phi: Tensor) -> Tensor:
    """E[bits] = 2 + 2 q4 + 4 q4 q8 + 8 q4 q8 q16 of gates (.., 3), differentiable."""
    reached = keep_probability(phi).cumprod(-1).unbind(-1)
    more = [(b - a) * probability for (a, b), probability in zip(pairwise(WIDTHS), reached, strict=True)]
    return WIDTHS[0] + torch.stack(more).sum(0)


def _round(x: Tensor) -> Tensor:
    """x rounded, with the gradient of x."""
    return x + (x.round() - x).detach()
