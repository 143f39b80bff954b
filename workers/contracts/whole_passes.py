"""The rule by which many sequences go through a block at once."""

import torch
from torch import Tensor

from workers.contracts.blocks import BlockTask
from workers.contracts.experts import experts_of


def fits_at_once(task: BlockTask, inputs: Tensor) -> bool:
    """True if `inputs` (sequences, length, width) can go through the block together: a GPU, no experts, and what its
    linears read and write takes a quarter of the memory.

    A rule that does not look at the memory that happens to be free, so that a job computes the same again.
    """
    if task.device.type != "cuda" or experts_of(task.block):
        return False
    linears, tokens = [task.linear(name) for name in task.schemes], inputs[..., 0].numel()
    numbers = [tokens * (linear.in_features + linear.out_features) for linear in linears]
    memory = torch.cuda.get_device_properties(task.device).total_memory
    # Kernels of blocks address two such tensors side by side by 32 bits.
    return sum(numbers) * inputs.element_size() <= memory // 4 and 2 * max(numbers, default=0) < 1 << 31
