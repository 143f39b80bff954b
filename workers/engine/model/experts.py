"""Mixtures of experts as ordinary linears: one `nn.Linear` for each expert and projection, in place of fused tensors.

transformers keeps a layer's experts in two tensors, (experts, 2 * inner, width) and (experts, width, inner), in four
layouts that flags of `use_experts_implementation` tell apart. `unfuse` replaces such a module by one with children
"0", "1", ... of `gate_proj`, `up_proj` and `down_proj`, so that hooks, schemes and results see linears like any other.
The activation is the module's own, with gate and up in its own order.

    y_t = sum over the chosen e of  p_te * down_e(act(gate_e(x_t), up_e(x_t)))

Tokens are sorted by expert once; each expert gets its rows, and the sums run over the k places of a token, in its
order, as transformers' grouped path does. Routers and the gates of shared experts are no linears to quantize.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import UnsupportedArchitecture
from workers.contracts.experts import RoutedExperts
from workers.engine.model.conversions import Slice

GATE_UP, UP, DOWN, BIAS = "gate_up_proj", "up_proj", "down_proj", "_bias"
SORTED_BEFORE: dict[str, "Layout"] = {}
"""By class name: modules that are given every expert's rows already, zeros where a token is not the expert's."""


@dataclass(frozen=True)
class Layout:
    """The layout of a fused module: flags of `use_experts_implementation`, under its names."""

    is_concatenated: bool = True
    is_transposed: bool = False
    has_bias: bool = False
    has_gate: bool = True
    has_post_expert_norm: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> "Layout | None":
        """The layout of a module; None if it holds no fused experts that are known."""
        if type(module).__name__ in SORTED_BEFORE:
            return SORTED_BEFORE[type(module).__name__]
        found = ((name, getattr(module, name, None)) for name in cls.__dataclass_fields__)
        flags = {name: flag for name, flag in found if isinstance(flag, bool)}
        return cls(**flags) if flags.keys() == cls.__dataclass_fields__.keys() else None

    @property
    def fused(self) -> str:
        """Name of the tensor that experts' inputs are multiplied by."""
        return GATE_UP if self.has_gate else UP

    def sides(self, inner: int) -> dict[str, slice]:
        """Rows of that tensor by the linear that they are; `inner` of each."""
        if not self.has_gate:
            return {"up_proj": slice(0, inner)}
        if self.is_concatenated:
            return {"gate_proj": slice(0, inner), "up_proj": slice(inner, 2 * inner)}
        return {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}

    def names(self) -> set[str]:
        """Parameters of such a module."""
        names = {self.fused, DOWN}
        return names | {f"{name}{BIAS}" for name in names} if self.has_bias else names


# Llama 4 multiplies inputs by the router's scores, not outputs: (experts * tokens, width), in the experts' order.
SORTED_BEFORE["Llama4TextExperts"] = Layout(is_transposed=True)


class Experts(RoutedExperts):
    """A fused module's experts, one by one.

    Called as the original is: (hidden (tokens, width), chosen (tokens, k), weights (tokens, k)) -> (tokens, width).
    """

    def __init__(self, original: nn.Module, layout: Layout) -> None:
        super().__init__()
        fused = original.get_parameter(layout.fused)
        self.number = len(fused)
        out, width = fused.shape[:0:-1] if layout.is_transposed else fused.shape[1:]
        inner = out // 2 if layout.has_gate else out
        self.layout = layout
        self.sides = tuple(layout.sides(inner))
        self.computes_all = type(original).__name__ in SORTED_BEFORE
        self.described = str(sorted((k, v) for k, v in vars(original).items() if isinstance(v, int | float | str)))
        sizes = {**dict.fromkeys(self.sides, (width, inner)), DOWN: (inner, width)}
        for expert in range(self.number):
            linears = {n: nn.Linear(*s, layout.has_bias, "meta", fused.dtype) for n, s in sizes.items()}
            self.add_module(str(expert), nn.ModuleDict(linears).requires_grad_(False))
        for name in layout.names():
            del original._parameters[name]
        for name, child in original.named_children():
            if any(True for _ in child.parameters()) or any(True for _ in child.buffers()):
                self.add_module(name, child)
        # Not a submodule: of its own it has only the activation left, which may be a method.
        object.__setattr__(self, "original", original)
        self.train(original.training)

    def activated(self, sides: Tensor) -> Tensor:
        original: Any = self.original
        if not self.layout.has_gate:
            activated: Tensor = original.act_fn(sides)
            return activated
        if self.computes_all:
            gate, up = sides.chunk(2, dim=-1)
            weighted: Tensor = up * original.act_fn(gate)
            return weighted
        if not self.layout.is_concatenated:
            sides = torch.stack(sides.chunk(2, dim=-1), dim=-1).flatten(-2)
        gated: Tensor = original._apply_gate(sides)
        return gated

    def finished(self, rows: Tensor) -> Tensor:
        original: Any = self.original
        if not self.layout.has_post_expert_norm:
            return rows
        normed: Tensor = original.post_expert_norm(rows)
        return normed

    def forward(self, hidden: Tensor, chosen: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        if chosen is None or weights is None:
            return self._sorted_before(hidden)
        places = chosen.shape[-1]
        _, order = torch.sort(chosen.flatten(), stable=True)
        counts = torch.zeros(self.number, dtype=torch.int64, device=hidden.device)
        counts.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
        self._count(counts)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        rows: Tensor = _Spread.apply(hidden, order, back, places)  # type: ignore[no-untyped-call]
        outputs = self._computed(rows, counts, lambda: hidden, order // places)
        sorted_weights: Tensor = _Sorted.apply(weights.flatten(), order, back)  # type: ignore[no-untyped-call]
        outputs = self.finished(outputs) * sorted_weights.unsqueeze(-1)
        together: Tensor = _Collect.apply(outputs, order, back, places)  # type: ignore[no-untyped-call]
        return together.to(hidden.dtype)

    def _sorted_before(self, hidden: Tensor) -> Tensor:
        """The same where the caller has sorted and weighted: hidden (experts * tokens, width)."""
        each = hidden.view(self.number, -1, hidden.shape[-1])
        if self.seen is not None:
            self._count((each != 0).any(-1).sum(-1))
        counts = torch.full((self.number,), each.shape[1], dtype=torch.int64, device=hidden.device)
        # Each token is some expert's, so that the sum over experts has it with its own router's weight.
        return self._computed(hidden, counts, lambda: torch.cat([hidden[:0], each.sum(0)]), None)

    def _count(self, counts: Tensor) -> None:
        if self.seen is not None:
            self.seen += counts

    def _computed(self, rows: Tensor, counts: Tensor, every: Callable[[], Tensor], tokens: Tensor | None) -> Tensor:
        """The experts' outputs for their rows, before what `finished` does.

        every    gives the hidden states of all tokens, for experts that are called on all
        tokens   number of each row's token
        """
        if self.joined is not None:
            return self.joined(rows, counts)
        if rows.is_meta:  # nobody is routed anywhere: each is called, so that a walk without weights sees all linears
            made = [self._expert(expert, rows) for expert in range(self.number)]
            return made[0]
        sizes = counts.tolist()  # the one wait for the device
        owners = [None] * self.number if tokens is None else torch.split(tokens, sizes)
        parts = [
            self._complete(expert, own, every(), owner) if expert in self.complete else self._expert(expert, own)
            for expert, (own, owner) in enumerate(zip(torch.split(rows, sizes), owners, strict=True))
            if len(own) or expert in self.complete
        ]
        return torch.cat(parts) if parts else rows[:0]

    def _complete(self, expert: int, own: Tensor, every: Tensor, owner: Tensor | None) -> Tensor:
        """One expert's outputs for its own rows, its linears having seen every token."""
        if owner is not None:
            return self._expert(expert, every)[owner]
        return self._expert(expert, torch.cat([own, every]))[: len(own)]

    def _expert(self, expert: int, rows: Tensor) -> Tensor:
        linears = self.get_submodule(str(expert))
        sides = torch.cat([linears.get_submodule(name)(rows) for name in self.sides], dim=-1)
        down: Tensor = linears.get_submodule(self.down)(self.activated(sides))
        return down


class _Spread(torch.autograd.Function):
    """hidden (tokens, width) -> (tokens * places, width), sorted by expert; backwards a sum over places in order."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, back: Tensor, places: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.places = places
        return hidden[order // places]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return _by_token(gradients[0][back], ctx.places), None, None, None


class _Sorted(torch.autograd.Function):
    """values (rows,) in another order; backwards the order before, with nothing added up."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return values[order]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return gradients[0][back], None, None


class _Collect(torch.autograd.Function):
    """(tokens * places, width), sorted by expert -> (tokens, width), a sum over places in order."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, order: Tensor, back: Tensor, places: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.places = places
        return _by_token(outputs[back], places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return gradients[0][order // ctx.places], None, None, None


def _by_token(rows: Tensor, places: int) -> Tensor:
    """(tokens * places, width) -> the sum of each token's rows."""
    return rows.view(-1, places, rows.shape[-1]).sum(1)


def unfuse(model: nn.Module, blocks: str) -> dict[str, Slice]:
    """Replaces every module of fused experts in the model; their linears' places in the fused tensors, by full name.

    blocks   name of the list of decoder blocks; experts outside it stay as they are

    Raises:
        UnsupportedArchitecture: a block holds fused experts in a layout that is not known.
    """
    slices: dict[str, Slice] = {}
    inside = [(n, m) for n, m in model.named_modules() if n.startswith(f"{blocks}.")]
    for name, module in inside:
        layout = Layout.of(module)
        if layout is None or not layout.names() <= module._parameters.keys():
            _demand_no_experts(name, module)
            continue
        experts = Experts(module, layout)
        slices |= {f"{name}.{linear}": replace_in(piece, name) for linear, piece in _slices(experts)}
        model.set_submodule(name, experts)
    return slices


def replace_in(piece: Slice, module: str) -> Slice:
    """The slice of a parameter whose name is inside a module, by its full name."""
    return Slice(f"{module}.{piece.parameter}", piece.index, piece.rows, piece.transposed)


def _slices(experts: Experts) -> Iterator[tuple[str, Slice]]:
    layout, inner = experts.layout, experts.linear(0, DOWN).in_features
    places = {name: (layout.fused, rows) for name, rows in layout.sides(inner).items()} | {DOWN: (DOWN, slice(None))}
    for expert in range(experts.number):
        for name, (fused, rows) in places.items():
            yield f"{expert}.{name}.weight", Slice(fused, expert, rows, layout.is_transposed)
            if layout.has_bias:
                yield f"{expert}.{name}.bias", Slice(f"{fused}{BIAS}", expert, rows)


def _demand_no_experts(name: str, module: nn.Module) -> None:
    """Refuses tensors of matrices that would be left as they are without anyone noticing."""
    if type(module).__module__.startswith("torch."):
        return
    fused = [leaf for leaf, tensor in module._parameters.items() if tensor is not None and tensor.ndim > 2]
    if fused and "expert" in f"{name}.{type(module).__name__}".lower():
        raise UnsupportedArchitecture(
            f"the experts of {name} ({type(module).__name__}) are in a layout that is not known: {', '.join(fused)}",
            field="model",
            value=f"{name}.{fused[0]}",
            hint="quantize it tensor by tensor, with method rtn or nf",
        )
