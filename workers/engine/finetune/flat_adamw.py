"""Trained parameters one after another in flat tensors: a step is a few operators, however many adapters there are.

    g  <- g * min(1, c / |g|)                            |g| over all parameters; c = clip_norm
    m  <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2   AdamW, torch's fused one; b1, b2 = 0.9, 0.999
    p  <- p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + 1e-8) + decay p)

Parameters of one learning rate are one flat tensor, of which the modules' own are views; so are their gradients.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workers.contracts.adapters import TrainableAdapter
from workers.engine.device.process_group import ProcessGroup

BETAS = (0.9, 0.999)
EPSILON = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""State that torch's AdamW keeps of a parameter."""


@dataclass(frozen=True)
class FlatGroup:
    """Parameters that share a learning rate: `rate` of their own, or the schedule's where that is None.

    members   the parameters, in the order in which they lie
    """

    members: tuple[nn.Parameter, ...]
    value: nn.Parameter
    gradient: Tensor
    rate: float | None


class FlatParameters:
    """All parameters of some modules, trained together.

    decay   of parameters without a learning rate of their own (`workers.contracts.adapters.TrainableAdapter`)
    """

    def __init__(self, modules: Iterable[TrainableAdapter], *, decay: float, clip_norm: float | None) -> None:
        """The parameters of `modules` become views of flat tensors, and stay that."""
        members: dict[float | None, list[nn.Parameter]] = {}
        for module in modules:
            for name, parameter in module.named_parameters():
                members.setdefault(module.rates.get(name), []).append(parameter)
        self._groups = [_flat(parameters, rate) for rate, parameters in members.items()]
        self._clip_norm = clip_norm
        self._adam = torch.optim.AdamW(
            [
                {"params": [group.value], "lr": 0.0, "weight_decay": decay if group.rate is None else 0.0}
                for group in self._groups
            ],
            betas=BETAS,
            eps=EPSILON,
            fused=True,
        )
        self._start()

    @property
    def count(self) -> int:
        """Trained numbers."""
        return sum(group.value.numel() for group in self._groups)

    def clear(self) -> None:
        """All gradients 0."""
        for group in self._groups:
            group.gradient.zero_()

    def sum_over(self, processes: ProcessGroup) -> None:
        """Each gradient becomes its sum over all ranks."""
        processes.sum_(*(group.gradient for group in self._groups))

    @torch.no_grad()
    def step(self, rate: float, share: float) -> Tensor:
        """Moves all parameters once; the norm of the gradient before it was limited, on the device.

        rate    of the schedule; groups with one of their own get `share` of theirs
        A gradient with a number that is not finite moves nothing but what momentum moves.
        """
        norm: Tensor = torch.stack([torch.linalg.vector_norm(group.gradient) for group in self._groups]).norm()
        factor = torch.ones_like(norm) if self._clip_norm is None else (self._clip_norm / (norm + 1e-6)).clamp(max=1)
        factor = torch.where(norm.isfinite(), factor, 0)
        for group, settings in zip(self._groups, self._adam.param_groups, strict=True):
            group.gradient.nan_to_num_(0.0, 0.0, 0.0).mul_(factor)
            settings["lr"] = rate if group.rate is None else group.rate * share
        self._adam.step()
        return norm

    @torch.no_grad()
    def hold_still(self) -> None:
        """Parameters that no longer require a gradient move no more, not by momentum either."""
        for group in self._groups:
            trained = [torch.full((member.numel(),), member.requires_grad) for member in group.members]
            self._adam.state[group.value]["exp_avg"].mul_(torch.cat(trained).to(group.value.device))

    def state(self) -> dict[str, Tensor]:
        """Copies of all that a step reads, but for its gradient, on the host."""
        tensors = {}
        for index, group in enumerate(self._groups):
            tensors[f"value.{index}"] = group.value
            for moment in MOMENTS:
                tensors[f"{moment}.{index}"] = self._adam.state[group.value][moment]
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        for index, group in enumerate(self._groups):
            group.value.copy_(state[f"value.{index}"])
            for moment in MOMENTS:
                self._adam.state[group.value][moment].copy_(state[f"{moment}.{index}"])

    def values(self) -> list[Tensor]:
        """Copies of all parameters, flat."""
        return [group.value.detach().clone() for group in self._groups]

    @torch.no_grad()
    def set_values(self, values: Iterable[Tensor]) -> None:
        """Takes over what `values` gave."""
        for group, value in zip(self._groups, values, strict=True):
            group.value.copy_(value)

    def _start(self) -> None:
        """The moments, which AdamW would make in its first step."""
        for group in self._groups:
            zeros = torch.zeros_like(group.value, requires_grad=False)
            step = torch.zeros((), dtype=torch.float32, device=group.value.device)
            self._adam.state[group.value] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def _flat(parameters: list[nn.Parameter], rate: float | None) -> FlatGroup:
    value = torch.cat([parameter.detach().flatten() for parameter in parameters])
    gradient = torch.zeros_like(value)
    first = 0
    for parameter in parameters:
        place = slice(first, first := first + parameter.numel())
        parameter.data = value[place].view(parameter.shape)
        parameter.grad = gradient[place].view(parameter.shape)
    whole = nn.Parameter(value)
    whole.grad = gradient
    return FlatGroup(tuple(parameters), whole, gradient, rate)
