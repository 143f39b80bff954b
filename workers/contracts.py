"""The seam between the engine and the methods: what a method is given for a block, and what it must return."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from app.domain.methods import Scheme, WeightSpec
from workers.numerics.quantized import BlockResult


@dataclass(frozen=True)
class BlockTask:
    """One decoder block to quantize.

    block       the original block on `device`, weights in the model's dtype; a method may replace weights while it
                works, and leaves the module as it found it
    forward     forward(block, hidden, index) -> hidden: calls the block as the model does (masks, rotary) on
                hidden (batch, length, width) of the calibration sequences `index`
    inputs      X_q, (samples, length, width): what the quantized blocks before this one produce
    inputs_fp   X_fp, the same of the original blocks
    targets     Y = block(X_fp), (samples, length, width)
    mask        (samples, length) bool: tokens that count in the loss; None: all
    schemes     linear name inside the block -> its scheme; ignored linears are absent
    scale_dtype dtype in which the formats of this job store scales
    seed        of this block
    micro_batch sequences that fit through the block at once
    """

    index: int
    block: nn.Module
    forward: "BlockForward"
    inputs: Tensor
    inputs_fp: Tensor
    targets: Tensor
    mask: Tensor | None
    schemes: Mapping[str, Scheme]
    scale_dtype: torch.dtype
    device: torch.device
    seed: int
    micro_batch: int
    tick: Callable[[float], None]
    """Called with the share of the block that is done, 0 to 1; may be called often."""


class BlockForward(Protocol):
    def __call__(self, block: nn.Module, hidden: Tensor, index: Tensor) -> Tensor: ...


S_contra = TypeVar("S_contra", bound=WeightSpec, contravariant=True)


class BlockMethod(Protocol[S_contra]):
    """A quantization method. `needs_inputs`: whether it looks at activations (else inputs may be empty)."""

    needs_inputs: bool

    def quantize_block(self, task: BlockTask, spec: S_contra) -> BlockResult: ...
