"""The smallest kernel: it shows that Triton can make and run one."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def increment(numbers, count: tl.constexpr):
    """Add 1 to each of `count` numbers, in place; `count` is a power of two."""
    places = numbers + tl.arange(0, count)
    tl.store(places, tl.load(places) + 1.0)
