"""Loops over numbers that Numba compiles for this machine's processor: what torch's operators do in many passes."""

import torch

DTYPES = frozenset({torch.bfloat16, torch.float32})
"""Of tensors that loops read and write."""
