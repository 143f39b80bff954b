"""KL divergence of next-token distributions, and its gradient by hand.

With p = softmax(t) of the teacher's logits t and q = softmax(u) of the student's u, of one token:

    KL(p || q) = sum_v p_v (log p_v - log q_v),    dKL/du = q - p
"""

import torch
from torch import Tensor

from workers.numerics.backend import scale_kernels


@torch.no_grad()
def divergence(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL of each token, (tokens,) fp32 or fp64, and its gradient by the student's logits, in their dtype.

    Both logits are (tokens, vocabulary). The gradient may take the place of the teacher's, which are lost.
    """
    kernels = scale_kernels(student.device, student.dtype)
    if kernels is not None:
        teacher = teacher.contiguous()
        return kernels.divergence(student.contiguous(), teacher), teacher
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_p, log_q = teacher.to(dtype).log_softmax(-1), student.to(dtype).log_softmax(-1)
    p = log_p.exp()
    each = (log_p.sub_(log_q)).mul_(p).sum(-1)
    return each, log_q.exp_().sub_(p).to(student.dtype)


def squared_distance(one: Tensor, other: Tensor) -> Tensor:
    """Sum of the squared differences of two tensors of one shape and dtype, fp64 (); squares are of fp32 or wider."""
    kernels = scale_kernels(one.device, one.dtype)
    if kernels is not None:
        return kernels.squared_distance(one.contiguous(), other.contiguous())
    working = torch.promote_types(one.dtype, torch.float32)
    return (one.to(working) - other).square_().sum(dtype=torch.float64)
