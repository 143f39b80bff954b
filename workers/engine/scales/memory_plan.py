"""Inputs of end-to-end scale tuning, and the share of them that fits into memory at once.

The estimate counts against all of the device's memory, not against what happens to be free: the same request on the
same machine always gives the same plan, and so the same scales.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import Tensor

from app.domain.methods import SCALE_BATCH_SIZE, Scheme
from workers.engine.device.process_group import SINGLE_PROCESS, ProcessGroup
from workers.engine.memory import GROUP_BYTES, LOGITS_AT_ONCE, MOVING_BYTES, SCALES_SHARE, device_memory, graph_bytes
from workers.engine.model.block_calls import BlockCall
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.scales.families import TunedWeight, changes
from workers.engine.scales.moving_codes import moves_codes
from workers.engine.scales.step_rules import ADAM_ALONE, StepRules
from workers.numerics.floats.input_rounding import InputRounding


@dataclass(frozen=True)
class ScaleTask:
    """Input of the stage.

    schemes         of the blocks' quantized linears, by full name
    weights         of a block by its index, by full linear name
    calls           how the model calls each block on these sequences
    inputs          hidden states before the first block, (sequences, length, width), of this rank's sequences
    targets         those of the original model after the last block, the same shape
    further         both of sequences besides, which no block was tuned on
    quantized_head  dequantized weight of the head, where that is quantized too
    micro_batch     sequences that may go through a block at once with gradients
    held_bytes      memory that other tensors of the job hold
    changed         other parameters of a block that quantizing it changed, by full name
    roundings       of the inputs of a block's linears, as a server rounds them, by name inside the block
    norms           whether the blocks' norms are tuned along
    codes           whether codes move that can, where there is room
    rules           of the steps, beside Adam's
    tick            called with the steps done
    log             called with an event's name and fields when a slower way is taken
    processes           who tunes along, each over its own sequences
    """

    model: StreamedModel
    schemes: Mapping[str, Scheme]
    weights: Callable[[int], Mapping[str, TunedWeight]]
    calls: tuple[BlockCall, ...]
    inputs: Tensor
    targets: Tensor
    quantized_head: Tensor | None
    steps: int
    seed: int
    micro_batch: int
    held_bytes: int
    changed: Callable[[int], Mapping[str, Tensor]] = lambda _: MappingProxyType({})
    roundings: Callable[[int], Mapping[str, InputRounding]] = lambda _: MappingProxyType({})
    norms: bool = False
    codes: bool = False
    rules: StepRules = ADAM_ALONE
    tick: Callable[[int], None] = lambda _: None
    log: Callable[..., None] = lambda *_, **__: None
    further: tuple[Tensor, Tensor] | None = None
    processes: ProcessGroup = SINGLE_PROCESS

    @property
    def sequences(self) -> int:
        """Of this rank, with the further ones."""
        return len(self.inputs) + (0 if self.further is None else len(self.further[0]))

    @property
    def batch_size(self) -> int:
        """Sequences of this rank in every step."""
        return self.processes.share_size(SCALE_BATCH_SIZE)


@dataclass(frozen=True)
class Fit:
    """Plan by which the stage fits into memory: sequences at once, and blocks with activations computed twice.

    codes   whether codes move that can
    """

    micro_batch: int
    recomputed: int
    codes: bool = False

    def lowered(self, blocks: int) -> "Fit | None":
        """The next smaller one; None if there is none. Codes stop last."""
        if self.recomputed < blocks:
            return replace(self, recomputed=blocks)
        if self.micro_batch > 1:
            return replace(self, micro_batch=self.micro_batch // 2)
        return replace(self, codes=False) if self.codes else None


@dataclass(frozen=True)
class Skipped:
    """The reason why scales are not tuned."""

    reason: str


def find_fit(task: ScaleTask) -> Fit | Skipped:
    """The largest micro-batch that fits by an estimate, with as many blocks' activations as then still fit.

    Codes move if one sequence at a time then fits.
    """
    if task.codes and any(map(moves_codes, task.schemes.values())):
        fit = _fit(task, codes=True)
        if isinstance(fit, Fit):
            return fit
    return _fit(task, codes=False)


def _fit(task: ScaleTask, *, codes: bool) -> Fit | Skipped:
    model, blocks, length = task.model, len(task.calls), task.inputs.shape[1]
    device = model.device
    allowed = SCALES_SHARE[device.type] * device_memory(device) - task.held_bytes
    fixed = _resident_bytes(task, codes)
    micro_batch = min(task.micro_batch, task.batch_size, task.sequences)
    while True:
        sequences = micro_batch * length
        graph = graph_bytes(model) * sequences
        # The input of every block, and of one block all that autograd keeps; targets and gradients besides.
        least = fixed + graph + (blocks + 4) * sequences * task.inputs.shape[2] * model.dtype.itemsize
        if least <= allowed:
            return Fit(micro_batch, max(0, blocks - 1 - int((allowed - least) // graph)), codes)
        if micro_batch == 1:
            reason = (
                f"the whole model with gradients needs {least / 1e9:.3g} GB; {max(allowed, 0) / 1e9:.3g} GB are left"
            )
            return Skipped(reason)
        micro_batch //= 2


def _resident_bytes(task: ScaleTask, codes: bool) -> int:
    """Weights, codes and scales of all blocks, the head, and what a chunk of logits takes; codes: if they move."""
    model, linears = task.model, task.model.linears()
    item = model.dtype.itemsize
    quantized = [linears[name] for name in task.schemes]
    weights = sum(linear.weight.numel() for linear in quantized)
    groups = sum(
        max(count := linears[name].out_features * scheme.groups(linears[name].in_features), changes(scheme, count))
        for name, scheme in task.schemes.items()
    )
    others = sum(parameter.numel() for parameter in model.blocks.parameters()) - weights
    head = linears[model.layout.head].weight.numel() * (1 if task.quantized_head is None else 2)
    largest = max(linear.weight.numel() for linear in quantized)
    chunk = LOGITS_AT_ONCE[model.device.type] * (3 * item + (0 if model.device.type == "cuda" else 16))
    moving = sum(linears[name].weight.numel() for name, scheme in task.schemes.items() if codes and moves_codes(scheme))
    stored = weights - moving + moving * (MOVING_BYTES[item] + task.rules.bytes_a_code(item))
    return weights * item + stored + groups * GROUP_BYTES + (others + head + largest) * item + chunk
