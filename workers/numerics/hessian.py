"""Second-order sums over the tokens of linears' inputs, collected while a block runs, as weights of rounding errors.

    H = 2 sum_t x_t x_t^T      a row of weights that is off by d makes a squared error of d H d^T / 2 in its output

Sums are fp32 (fp64 for fp64 inputs) on the inputs' device and grow by one product per micro-batch, so that no
activations are kept. A linear whose error is needed only within groups of columns takes only H's diagonal blocks.
Linears that get the same tensor (q, k and v; gate and up) have one H.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

DAMPING_STEPS = (1, 10, 100)
"""Multiples of the requested damping, tried until the factorization succeeds."""


class Hessian:
    """H or its diagonal blocks, `sum` (blocks, width, width), of inputs with blocks * width columns."""

    def __init__(self, columns: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Zero sums; `dtype` is that of the inputs, or wider."""
        working = torch.promote_types(dtype, torch.float32)
        self.sum = torch.zeros(columns // width, width, width, dtype=working, device=device)

    def add(self, x: Tensor) -> None:
        """Adds some tokens, (tokens, columns)."""
        # Products of two numbers of 16 bits are exact in fp32, in which a GPU's units for them sum.
        halves = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and self.sum.dtype == torch.float32
        parts = (x if halves else x.to(self.sum.dtype)).view(len(x), *self.sum.shape[:2]).transpose(0, 1)
        if halves:
            self.sum.add_(torch.bmm(parts.transpose(1, 2), parts, out_dtype=torch.float32), alpha=2)
        else:
            torch.baddbmm(self.sum, parts.transpose(1, 2), parts, alpha=2, out=self.sum)

    def matrix(self) -> Tensor:
        """`sum`, exactly symmetric for every order of the added products."""
        return (self.sum + self.sum.transpose(1, 2)) / 2


@contextmanager
def watched(linears: Mapping[str, nn.Linear], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Passes each linear's inputs to `see`, with its name, while the context lasts: (..., in), unchanged."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, arguments: see(name, arguments[0].detach())

    handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Seen(Exception):
    """Ends a forward pass as soon as the wanted inputs were seen."""


def see_inputs(linear: nn.Linear, passes: Iterable[Callable[[], object]], see: Callable[[Tensor], None]) -> None:
    """Passes the inputs of `linear` in each of some forward passes to `see`, (tokens, in). The passes end there."""

    def show(_: str, x: Tensor) -> None:
        see(x.flatten(0, -2))
        raise _Seen

    with watched({"": linear}, show):
        for forward in passes:
            with suppress(_Seen):
                forward()


def input_groups(linears: Mapping[str, nn.Linear], forward: Callable[[], object]) -> list[tuple[str, ...]]:
    """Names in the order in which a forward pass calls the linears, grouped by the tensor that they get."""
    calls: list[tuple[Tensor, list[str]]] = []

    def note(name: str, x: Tensor) -> None:
        if calls and calls[-1][0].data_ptr() == x.data_ptr():
            calls[-1][1].append(name)
        else:
            calls.append((x, [name]))

    with watched(linears, note):
        forward()
    return [tuple(names) for _, names in calls]


def damped_hessian(hessian: Tensor, damping: float, retries: int = 0) -> Tensor:
    """H + lambda I of `inverse_factor` when the damping was raised so many times."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum().clamp(min=1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    damped = hessian.clone()
    damped.diagonal().add_(torch.where(dead, mean, 0) + DAMPING_STEPS[retries] * damping * mean)
    return damped


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor | None, int]:
    """The upper triangular U with U^T U = (H + lambda I)^-1, lambda = `damping` * mean(diag H), and retries.

    Columns that are 0 for all tokens get the mean as their diagonal, which keeps them independent. If H + lambda I
    is not positive definite, lambda is raised; None when `DAMPING_STEPS` are used up. The device is waited for.

    With J the exchange of first and last, J (H + lambda I) J = L L^T gives U = (J L J)^-1: one factorization and one
    triangular inverse, instead of the inverse of H and a factorization of that.
    """
    return inverse_factors([hessian], damping)[0]


def inverse_factors(hessians: Sequence[Tensor], damping: float) -> list[tuple[Tensor | None, int]]:
    """`inverse_factor` of each; the device is waited for once, and once more for each time that a damping is raised."""
    found: list[tuple[Tensor | None, int]] = [(None, len(DAMPING_STEPS))] * len(hessians)
    left = list(range(len(hessians)))
    for retries in range(len(DAMPING_STEPS)):
        tried = [_tried_factor(hessians[number], damping, retries) for number in left]
        sound = torch.stack([fine for _, fine in tried]).tolist() if tried else []
        for number, (upper, _), fine in zip(left, tried, sound, strict=True):
            if fine:
                found[number] = upper, retries
        left = [number for number, fine in zip(left, sound, strict=True) if not fine]
    return found


def _tried_factor(hessian: Tensor, damping: float, retries: int) -> tuple[Tensor, Tensor]:
    """U, and a truth value on the device: whether it is one."""
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    lower, failed = torch.linalg.cholesky_ex(damped_hessian(hessian, damping, retries).flip(0, 1))
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    # A diagonal that overflowed gives a factor of zeros, which errors would be divided by.
    return upper, (failed == 0) & (upper.isfinite().all() & (upper.diagonal() > 0).all())
