"""Products of an 8B-shaped block's step in bf16 and in FP8: milliseconds, casts beside them, and signs that agree.

    python -m benchmarks.blocks.eight_bit_products

One JSON line per joined linear of the block (queries, keys and values; output; gate and up; down) for 8 x 2048 tokens:
its three products (forward, dL/dx, dL/dW) in bf16 and in FP8 with one scale a matrix, with quick sums and with exact
ones, the casts as they lie and transposed, whether the casts are right, and how far dL/dW of FP8 agrees in sign.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from workers.numerics.eight_bits import casts
from workers.numerics.eight_bits.cast_kernels import cast

LINEARS = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8 * 2048)
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    for name, (inputs, outputs) in LINEARS.items():
        print(json.dumps({"linear": name} | measured(given.tokens, inputs, outputs, given.repeats)), flush=True)


def measured(tokens: int, inputs: int, outputs: int, repeats: int) -> dict[str, object]:
    torch.manual_seed(0)
    x = torch.randn(tokens, inputs, dtype=torch.bfloat16, device="cuda")
    w = torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda") * 0.02
    g = torch.randn(tokens, outputs, dtype=torch.bfloat16, device="cuda") * 1e-8
    x8, w8, g8 = (cast(t, lying=True, turned=True) for t in (x, w, g))
    runs: dict[str, Callable[[], object]] = {
        "bf16_forward": lambda: x @ w.T,
        "bf16_dx": lambda: g @ w,
        "bf16_dw": lambda: g.T @ x,
        "cast_x_turned": lambda: cast(x, lying=False, turned=True),
        "cast_g_both": lambda: cast(g, lying=True, turned=True),
        "cast_g_turned": lambda: cast(g, lying=False, turned=True),
        "cast_w_turned": lambda: cast(w, lying=False, turned=True),
    }
    for kind, quick in (("quick", True), ("exact", False)):
        runs |= {
            f"fp8_forward_{kind}": partial(product, x8.lying, w8.lying, x8.scale, w8.scale, quick),
            f"fp8_dx_{kind}": partial(product, g8.lying, w8.turned, g8.scale, w8.scale, quick),
            f"fp8_dw_{kind}": partial(product, g8.turned, x8.turned, g8.scale, x8.scale, quick),
        }
    times = {name: round(milliseconds(run, repeats), 4) for name, run in runs.items()}
    dw = (g.T @ x).float()
    agreement = {}
    for kind, quick in (("quick", True), ("exact", False)):
        found = product(g8.turned, x8.turned, g8.scale, x8.scale, quick).float()
        same = (found.sign() == dw.sign()).float()
        agreement[kind] = {
            "same": float(same.mean()),
            "weighted": float((same * dw.abs()).sum() / dw.abs().sum()),
            "nan": int(found.isnan().sum()),
        }
    right = {name: cast_is_right(t) for name, t in (("x", x), ("w", w), ("g", g))}
    return {"ms": times, "agreement": agreement, "right": right}


def product(a: Tensor | None, b: Tensor | None, scale_a: Tensor, scale_b: Tensor, quick: bool) -> Tensor:
    """a (m, k) b (n, k)^T."""
    assert a is not None
    assert b is not None
    made: Tensor = torch._scaled_mm(a, b.T, scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=quick)
    return made


def cast_is_right(x: Tensor) -> dict[str, float]:
    """Share of elements that are those of torch's operators; a product or a quotient in another order may turn few."""
    made, plain = cast(x, lying=True, turned=True), casts.cast(x, lying=True, turned=True)
    pairs = {"lying": (made.lying, plain.lying), "turned": (made.turned, plain.turned)}
    same = {}
    for name, (ours, theirs) in pairs.items():
        assert ours is not None
        assert theirs is not None
        same[name] = float((ours.view(torch.uint8) == theirs.view(torch.uint8)).float().mean())
    return same | {"scale": float(made.scale / plain.scale)}


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    main()
