"""A block whose linears take their weights from flat buffers and put their weights' gradients into others.

The tuned block is a copy: the loop may keep it from block to block while the model's own blocks come and go.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from workers.contracts.blocks import BlockTask, JoinsLinears
from workers.contracts.experts import RoutedExperts, experts_of
from workers.contracts.tuning import Gradients, TrainableWeights
from workers.engine.tune.gradient_linear import Backward, GradientLinear, exact
from workers.engine.tune.grouped_experts import GroupedExperts, Stack, bias_of, receiver
from workers.numerics.eight_bits import backward as eight_bits
from workers.numerics.floats.input_rounding import InputRounding
from workers.numerics.product_dtype import product_dtype

MakeLinear = Callable[[Sequence[str], nn.Parameter | None], GradientLinear | None]
"""Some linears as one, with the bias of all, by their names; None if their weights do not lie one after another."""


@dataclass(frozen=True)
class FlatWeights:
    """W_hat of one `TrainableWeights` and the gradient with respect to it, flat; the block's linears are views.

    value      W_hat in the dtype that products are computed in, as the block's linears multiply by it
    gradient   in the same dtype
    written    W_hat in the model's dtype, where methods write it; `value` itself where the two are one
    shapes     (out, in) by linear, in the order in which they lie
    """

    value: Tensor
    gradient: Tensor
    written: Tensor
    shapes: Mapping[str, tuple[int, int]]

    @classmethod
    def like(cls, example: Tensor, shapes: Mapping[str, tuple[int, int]]) -> "FlatWeights":
        """Zeros for weights of the dtype and on the device of `example`."""
        size, dtype = sum(map(math.prod, shapes.values())), product_dtype(example.device, example.dtype)
        value, gradient = (torch.zeros(size, dtype=dtype, device=example.device) for _ in range(2))
        written = value if dtype == example.dtype else torch.zeros_like(value, dtype=example.dtype)
        return cls(value, gradient, written, shapes)

    def publish(self) -> None:
        """Hands what was written to the block's linears."""
        if self.written is not self.value:
            self.value.copy_(self.written)

    def stacked(self, experts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor] | None:
        """Weight and gradient (experts, sum of out, in) of the same linears of every expert, views with one step.

        None unless each expert's lie one after another, all in the same shapes and at the same distance.
        """
        starts = dict(zip(self.shapes, accumulate(map(math.prod, self.shapes.values()), initial=0), strict=False))
        views = [self.views(names) for names in experts]
        first = views[0]
        if first is None or any(view is None or view[0].shape != first[0].shape for view in views):
            return None
        places = [starts[names[0]] for names in experts]
        steps = {after - before for before, after in pairwise(places)} or {first[0].numel()}
        if len(steps) > 1:
            return None
        out, columns = first[0].shape
        shape, strides = (len(experts), out, columns), (steps.pop(), columns, 1)
        weight, gradient = (whole.as_strided(shape, strides, places[0]) for whole in (self.value, self.gradient))
        return weight, gradient

    def views(self, names: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """Weight and gradient (sum of out, in) of linears as one; None unless they lie one after another here."""
        order = list(self.shapes)
        first = order.index(names[0]) if names[0] in order else 0
        if order[first : first + len(names)] != list(names) or len({self.shapes[n][1] for n in names}) > 1:
            return None
        starts = [0, *accumulate(map(math.prod, self.shapes.values()))]
        place = slice(starts[first], starts[first + len(names)])
        columns = self.shapes[names[0]][1]
        return self.value[place].view(-1, columns), self.gradient[place].view(-1, columns)


@dataclass
class Accumulation:
    """Ways in which the next backward treats gradients: it may add to them instead of overwriting them.

    starved   linears whose gradient stays 0
    still     the same of experts computed at once: (experts,) truth values by part, where they are
    """

    adds: bool = False
    starved: frozenset[str] = frozenset()
    still: dict[str, Tensor] = field(default_factory=dict)

    def leave(self, starved: frozenset[str]) -> None:
        """Leaves these linears as they are from now on, and no others."""
        self.starved = starved
        for part, still in self.still.items():
            prefix = f"{part}." if part else ""
            experts = {name.removeprefix(prefix).partition(".")[0] for name in starved if name.startswith(prefix)}
            still.copy_(torch.tensor([str(expert) in experts for expert in range(len(still))]))


@dataclass(frozen=True)
class TunedBlock:
    """The copy of a block, with a `GradientLinear` for every linear that is tuned and nothing else trainable.

    Experts are computed at once where their weights lie evenly. Where they are called one by one, one without tokens
    leaves its gradient as it was, so that `begin` clears all of them.
    """

    module: nn.Module
    flats: tuple[FlatWeights, ...]
    accumulation: Accumulation
    roundings: Mapping[str, InputRounding] = field(default_factory=dict)
    gradients: Gradients = "exact"

    @classmethod
    def of(cls, task: BlockTask, weights: Sequence[TrainableWeights], gradients: Gradients = "exact") -> "TunedBlock":
        """The block of a task. The copy shares no memory with it; tuned weights are left for the loop to write."""
        tuned = {name for group in weights for name in group.shapes}
        skipped: dict[int, Any] = {id(weight := task.linear(n).weight): nn.Parameter(weight[:0]) for n in tuned}
        module = copy.deepcopy(task.block, skipped).requires_grad_(False)
        module = module.to(product_dtype(task.device, task.inputs.dtype))
        flats = tuple(FlatWeights.like(task.linear(next(iter(group.shapes))).weight, group.shapes) for group in weights)
        block = cls(module, flats, Accumulation(), own_roundings(task), gradients)
        biases = {name: block._biases(part) for name, part in experts_of(module).items()}
        replace_linears(module, tuned, block._linear)
        for name, part in experts_of(module).items():
            part.seen, part.complete = None, frozenset()
            # Not a submodule: its parameters are those of the linears that it joins.
            object.__setattr__(part, "joined", block._experts(name, part, biases[name]))
        block.accumulation.leave(task.starved)
        return block

    def adopt(self, task: BlockTask) -> None:
        """The parameters and buffers of another task's block of the same shape, but for the tuned weights."""
        block = task.block
        self.accumulation.leave(task.starved)
        given = task.input_roundings()
        for name, rounding in self.roundings.items():
            theirs = given[name].amax
            if rounding.amax is not None and theirs is not None:
                rounding.amax.copy_(theirs)
        others = dict(block.named_parameters()) | dict(block.named_buffers())
        tuned = {id(m.weight) for m in self.module.modules() if isinstance(m, GradientLinear)}
        for name, tensor in [*self.module.named_parameters(), *self.module.named_buffers()]:
            if id(tensor) not in tuned:
                tensor.data.copy_(others[name])

    def begin(self, *, adds: bool) -> None:
        """Says whether the next backward adds to the gradients; else they are those of that backward alone."""
        alone = any(part.joined is None for part in experts_of(self.module).values())
        if alone and not adds:
            for flat in self.flats:
                flat.gradient.zero_()
        self.accumulation.adds = adds or alone

    def _biases(self, part: RoutedExperts) -> tuple[Tensor | None, Tensor | None]:
        return bias_of(part, part.sides), bias_of(part, [part.down])

    def _experts(
        self, name: str, part: RoutedExperts, biases: tuple[Tensor | None, Tensor | None]
    ) -> GroupedExperts | None:
        """All experts of a part at once; None where their weights do not lie evenly, or some are not tuned."""
        prefix, stacks = f"{name}." if name else "", []
        still = torch.zeros(part.number, dtype=torch.bool, device=self.flats[0].value.device)
        for linears, bias in zip((part.sides, (part.down,)), biases, strict=True):
            names = [[f"{prefix}{expert}.{linear}" for linear in linears] for expert in range(part.number)]
            if any(linear in self.roundings for own in names for linear in own):
                return None  # inputs are rounded by the linears themselves
            found = [views for flat in self.flats if (views := flat.stacked(names)) is not None]
            if not found:
                return None
            weight, gradient = found[0]
            receive = receiver(gradient, lambda: self.accumulation.adds, still)
            stacks.append(Stack(nn.Parameter(weight), bias, receive))
        self.accumulation.still[name] = still
        return GroupedExperts(stacks[0], stacks[1], part.activated)

    def _linear(self, names: Sequence[str], bias: nn.Parameter | None) -> GradientLinear | None:
        """The linears of these names as one; None unless they lie one after another in a flat buffer."""
        flats = [views for flat in self.flats if (views := flat.views(names)) is not None]
        if not flats:
            return None
        (weight, gradient), accumulation = flats[0], self.accumulation

        def receive(by_output: Tensor, x: Tensor) -> None:
            if not accumulation.starved.isdisjoint(names):
                return
            if accumulation.adds:
                gradient.addmm_(by_output.T, x)
            else:
                torch.mm(by_output.T, x, out=gradient)

        def in_eight_bits(by_output: Tensor, x: Tensor, weight: Tensor, *, by_input: bool) -> Tensor | None:
            if len(x) % eight_bits.MULTIPLE:
                return exact(receive)(by_output, x, weight, by_input=by_input)
            trained = gradient if accumulation.starved.isdisjoint(names) else None
            return eight_bits.backward(by_output, x, weight, trained, adds=accumulation.adds, by_input=by_input)

        backward: Backward = in_eight_bits if self._in_eight_bits(weight) else exact(receive)
        return GradientLinear(weight, bias, backward, self.roundings.get(names[0]))

    def _in_eight_bits(self, weight: Tensor) -> bool:
        """True if the backward products of a weight (out, in) are computed in FP8."""
        rows, columns = weight.shape
        if self.gradients == "quick":
            return eight_bits.pays(weight.device, weight.dtype, (rows, columns))
        return self.gradients == "eight_bits" and eight_bits.serves((rows, columns))


def own_roundings(task: BlockTask) -> dict[str, InputRounding]:
    """The roundings of a task's inputs, with numbers of their own, which another block's may take the place of."""
    return {
        name: rounding if rounding.amax is None else replace(rounding, amax=rounding.amax.clone())
        for name, rounding in task.input_roundings().items()
    }


def replace_linears(module: nn.Module, names: Iterable[str], make: MakeLinear) -> None:
    """Puts what `make` makes of them in place of some linears of `module`.

    Parts that can compute several linears of the same input at once (`JoinsLinears`) do so, where `make` can.
    """
    for name in names:
        single = make([name], getattr(module.get_submodule(name), "bias", None))
        if single is not None:
            module.set_submodule(name, single)
    for prefix, child in module.named_modules():
        if not isinstance(child, JoinsLinears) or not child.together:
            continue
        biases = _shared_biases([child.get_submodule(name) for name in child.together])
        joined = make([f"{prefix}.{name}" if prefix else name for name in child.together], biases)
        # Not a submodule: its parameters are those of the linears that it joins.
        object.__setattr__(child, "joined", joined)


def _shared_biases(linears: Sequence[nn.Module]) -> nn.Parameter | None:
    """The biases of some linears as one tensor, of which theirs become views."""
    biases = [getattr(linear, "bias", None) for linear in linears]
    present = [bias for bias in biases if bias is not None]
    if len(present) < len(biases):
        return None
    whole = torch.cat([bias.detach() for bias in present])
    for linear, piece in zip(linears, torch.split(whole, [len(bias) for bias in present]), strict=True):
        linear.bias = nn.Parameter(piece, requires_grad=False)
    return nn.Parameter(whole, requires_grad=False)
