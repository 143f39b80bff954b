"""All blocks of a quantized model at once on the device, their weights functions of the groups' scales, and of codes.

Codes stay as they are stored, one byte each, unless they move (`workers.engine.scales.moving_codes`). Linears of one
scheme lie one after another in flat buffers, so that one pass writes the weights of the whole model; the gradient with
respect to a weight whose code stays lives only until it is summed into its groups. Norms may be tuned along
(`workers.engine.scales.norms`). What a block computes besides is the model's own module, whatever its architecture.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor, nn

from app.domain.methods import Scheme
from workers.engine.model.block_calls import BlockCall
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.scales.families import Family, TunedWeight, changes, grouped, kind_of
from workers.engine.scales.moving_codes import MovingCodes
from workers.engine.scales.norms import Norms, tunable_norms
from workers.engine.tune.gradient_linear import GradientLinear, exact
from workers.engine.tune.tuned_block import replace_linears
from workers.numerics.floats.input_rounding import InputRounding


@dataclass(frozen=True)
class Place:
    """Location of a linear: its groups in the flat buffers of its family, and its numbers in what is flat over all.

    overall is empty where the scales stay.
    """

    family: int
    groups: slice
    overall: slice
    shape: tuple[int, int]


class GroupScales:
    """The scales of many linears as s*(1 + p), rounded to the dtype that stores them; p is fp32 (or fp64) and flat.

    moving    codes that move
    change    p of all groups, and after them of all norms
    gradient  sum over a group of D*(q - z), D the gradient with respect to the weight; times `start`, which is s or
              what takes its place, it is the gradient of p
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        schemes: Mapping[str, Scheme],
        model: StreamedModel,
        *,
        norms: bool = False,
        codes: bool = False,
    ) -> None:
        """shapes and schemes by full linear name; `put` fills in codes and scales.

        norms, codes   of their blocks, too; whether codes move that can
        """
        self.places, sizes = _places(shapes, schemes, codes)
        self.families: list[Family] = []
        self._overall: list[slice] = []
        first = 0
        for (scheme, width), count in sizes.items():
            value = torch.zeros(count, width, dtype=model.dtype, device=model.device)
            self.families.append(kind_of(scheme, codes)(count, width, scheme, value))
            self._overall.append(slice(first, first := first + changes(scheme, count)))
        self.moving: list[MovingCodes] = [family.codes for family in self.families if family.codes is not None]
        tuned = tunable_norms(model, schemes) if norms else ()
        size = first + len(tuned) * model.width
        working = torch.promote_types(model.dtype, torch.float32)
        self.change, self.gradient, self.start = (
            torch.zeros(size, dtype=working, device=model.device) for _ in range(3)
        )
        self.start[first:] = 1
        self.norms = Norms.of(tuned, self.change[first:], self.gradient[first:])

    def needs_original(self, name: str) -> bool:
        """True if `put` needs the weight that a linear was quantized from."""
        return self.families[self.places[name].family].codes is not None

    def put(self, name: str, weight: TunedWeight, original: Tensor | None = None) -> None:
        """Takes over the codes, zero points and scales of a linear; original: (out, in), where its codes move."""
        place = self.places[name]
        start = self.families[place.family].put(place.groups, weight, original)
        if start is not None:
            self.start[place.overall] = start

    @torch.no_grad()
    def write(self) -> None:
        """The weights of the present scales, as they would be stored."""
        for family, overall in zip(self.families, self._overall, strict=True):
            family.write(self.change[overall])
        self.norms.write()

    def gradients(self) -> list[Tensor]:
        """Sums over this rank's sequences, of which the ranks need those over all."""
        return [self.gradient, *(codes.gradient for codes in self.moving)]

    def restart(self) -> None:
        """No change, and no gradients of before."""
        self.change.zero_()
        for codes in self.moving:
            codes.restart()
        self.write()

    @torch.no_grad()
    def codes(self) -> dict[str, Tensor]:
        """The present codes on the host, uint8 (out, in) by full linear name; not those that stay."""
        found = {}
        for name, place in self.places.items():
            moving = self.families[place.family].codes
            if moving is not None:
                found[name] = moving.codes(place.groups).view(place.shape).cpu()
        return found

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """The present scales in the dtype that stores them, (out, groups) by full linear name; not those that stay.

        Where more than one tensor of a weight is tuned, by its name and theirs.
        """
        scales: dict[str, Tensor] = {}
        for name, place in self.places.items():
            found = self.families[place.family].stored(place.groups, self.change[place.overall])
            own = (
                {name: found}
                if isinstance(found, Tensor)
                else {f"{name}.{part}": t for part, t in (found or {}).items()}
            )
            scales |= {key: tensor.view(place.shape[0], -1) for key, tensor in own.items()}
        return scales

    def linear(
        self, names: Sequence[str], bias: nn.Parameter | None, rounding: InputRounding | None = None
    ) -> GradientLinear | None:
        """The linears of these names as one, which adds to their groups' gradients.

        None unless they lie one after another.
        """
        place = self._place(names)
        if place is None:
            return None
        family = self.families[place.family]
        receive = family.receiver(place.groups, self.gradient[place.overall])
        return GradientLinear(family.value[place.groups].view(place.shape), bias, exact(receive), rounding)

    def _place(self, names: Sequence[str]) -> Place | None:
        places = [self.places[name] for name in names if name in self.places]
        adjacent = all(
            (a.family, a.groups.stop, a.shape[1]) == (b.family, b.groups.start, b.shape[1]) for a, b in pairwise(places)
        )
        if len(places) < len(names) or not adjacent:
            return None
        first, last = places[0], places[-1]
        return Place(
            family=first.family,
            groups=slice(first.groups.start, last.groups.stop),
            overall=slice(first.overall.start, last.overall.stop),
            shape=(sum(place.shape[0] for place in places), first.shape[1]),
        )


def _places(
    shapes: Mapping[str, tuple[int, int]], schemes: Mapping[str, Scheme], codes: bool
) -> tuple[dict[str, Place], dict[tuple[Scheme, int], int]]:
    """Each linear's place, and the groups of each family by scheme and width; rows where scales stay."""
    members: dict[tuple[Scheme, int], list[str]] = {}
    for name, shape in shapes.items():
        scheme = schemes[name]
        width = scheme.width(shape[1]) if grouped(scheme, codes) else shape[1]
        members.setdefault((scheme, width), []).append(name)
    places, sizes, first = {}, {}, 0
    for number, ((scheme, width), names) in enumerate(members.items()):
        here = 0
        for name in names:
            count = math.prod(shapes[name]) // width
            overall = slice(first + changes(scheme, here), first + changes(scheme, here + count))
            places[name] = Place(number, slice(here, here := here + count), overall, shapes[name])
        sizes[scheme, width] = here
        first += changes(scheme, here)
    return places, sizes


@dataclass(frozen=True)
class ScaledBlocks:
    """The blocks of a model, one after another.

    first       the first block with a quantized linear: no gradient is asked for before it
    recomputed  blocks, from the first on, whose graphs are not kept but made again when their turn comes
    """

    blocks: Sequence[nn.Module]
    calls: Sequence[BlockCall]
    scales: GroupScales
    first: int
    recomputed: int

    @classmethod
    def load(
        cls,
        model: StreamedModel,
        calls: Sequence[BlockCall],
        schemes: Mapping[str, Scheme],
        weights: Callable[[int], Mapping[str, TunedWeight]],
        *,
        changed: Callable[[int], Mapping[str, Tensor]] = lambda _: MappingProxyType({}),
        roundings: Callable[[int], Mapping[str, InputRounding]] = lambda _: MappingProxyType({}),
        norms: bool = False,
        codes: bool = False,
        recomputed: int,
    ) -> "ScaledBlocks":
        """The blocks on the device, as they are quantized.

        schemes    of their quantized linears, whose weights `weights` gives by block
        changed    a block's other parameters that differ from the checkpoint's, by full name
        roundings  of the inputs of a block's linears, by name inside it
        norms      whether norms are tuned along
        codes      whether codes move that can
        """
        linears = model.linears()
        shapes = {name: (linears[name].out_features, linears[name].in_features) for name in schemes}
        scales = GroupScales(shapes, schemes, model, norms=norms, codes=codes)
        blocks = [
            _load_block(model, index, scales, weights(index), changed(index), roundings(index))
            for index in range(len(calls))
        ]
        quantized = [i for i, b in enumerate(blocks) if any(isinstance(m, GradientLinear) for m in b.modules())]
        scales.write()
        return cls(blocks, calls, scales, quantized[0], recomputed)

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states after the last block, (batch, length, width), from those before the first."""
        for block, call in zip(self.blocks, self.calls, strict=True):
            hidden = call(block, hidden)
        return hidden

    def add_gradients(self, hidden: Tensor, loss: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """The loss, whose gradients by the weights are added to those of the groups' scales.

        loss    of hidden states after the last block: its value, and its gradient by them
        """
        inputs: list[Tensor] = []
        outputs: list[Tensor | None] = []
        for index, (block, call) in enumerate(zip(self.blocks, self.calls, strict=True)):
            kept = index >= max(self.recomputed, self.first)
            inputs.append(hidden.detach().requires_grad_(index > self.first))
            with torch.set_grad_enabled(kept):
                hidden = call(block, inputs[-1])
            outputs.append(hidden if kept else None)
        value, gradient = loss(hidden.detach())
        for index in reversed(range(self.first, len(self.blocks))):
            output, source = outputs.pop(), inputs.pop()
            if output is None:
                with torch.enable_grad():
                    output = self.calls[index](self.blocks[index], source)
            torch.autograd.backward(output, gradient)
            if source.grad is not None:
                gradient = source.grad
        return value


def _load_block(
    model: StreamedModel,
    index: int,
    scales: GroupScales,
    weights: Mapping[str, TunedWeight],
    changed: Mapping[str, Tensor],
    roundings: Mapping[str, InputRounding],
) -> nn.Module:
    """A copy of a block with a `GradientLinear` for every quantized linear, whose original weight is never read."""
    prefix = model.layout.block(index)
    unread = {f"{name}.weight": torch.empty(0, dtype=model.dtype) for name in weights}
    with model.loaded(prefix, given=unread | {name: value.to(model.device) for name, value in changed.items()}):
        block = copy.deepcopy(model.blocks[index])
    for name, weight in weights.items():
        original = model.read(name)[f"{name}.weight"] if scales.needs_original(name) else None
        scales.put(name, weight, original)
    replace_linears(
        block,
        [name.removeprefix(prefix + ".") for name in weights],
        lambda names, bias: scales.linear([f"{prefix}.{name}" for name in names], bias, roundings.get(names[0])),
    )
    scales.norms.adopt(prefix, block)
    return block
