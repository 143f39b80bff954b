"""Largest magnitudes that linears share because a runtime joins them, read before the first of them is rounded."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from app.domain.weight_targets import KeptPart, Target
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.weights_only.expert_parts import outputs_of
from workers.formats.fused_linears import FUSED
from workers.numerics.joined import shares_scale
from workers.numerics.row_parts import row_parts


class JoinedScales:
    """Reads each tensor of a set once, when its first linear is asked for.

    linears   by the tensor that holds them
    """

    def __init__(self, checkpoint: Checkpoint, linears: Mapping[str, Sequence[Target | KeptPart]]) -> None:
        self._checkpoint, self._amax = checkpoint, dict[str, Tensor]()
        own = [target for parts in linears.values() for target in parts if isinstance(target, Target)]
        self._targets = {target.name: target for target in own if shares_scale(target.scheme)}
        self._in_tensor = dict[str, list[Target]]()
        for target in self._targets.values():
            self._in_tensor.setdefault(target.tensor, []).append(target)

    def amax(self, name: str) -> Tensor | None:
        """Largest magnitude of a linear and of those that are joined with it, fp32 (); None: its scheme shares none."""
        target = self._targets.get(name)
        if target is None:
            return None
        return torch.stack([self._of(other) for other in self._companions(target)]).max()

    def _companions(self, target: Target) -> list[Target]:
        parent, _, last = target.name.rpartition(".")
        names = next((fused for fused in FUSED if last in fused), (last,))
        found = [self._targets.get(f"{parent}.{name}") for name in names]
        return [other for other in found if other is not None and other.scheme == target.scheme]

    def _of(self, target: Target) -> Tensor:
        if target.name not in self._amax:
            tensor = self._checkpoint.read(target.tensor)
            for other in self._in_tensor[target.tensor]:
                place = other.place
                weight = tensor if place is None else outputs_of(tensor[place.expert], place, other.shape[0])
                self._amax[other.name] = _largest(weight)
        return self._amax[target.name]


def _largest(weight: Tensor) -> Tensor:
    parts = row_parts(weight.shape[0], weight.shape[1], weight.device)
    return torch.stack([weight[rows].abs().max().float() for rows in parts]).max()
