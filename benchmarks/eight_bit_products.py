"""Products of an 8B-shaped block's step in bf16 and in FP8: milliseconds, casts beside them, and signs that agree.

    python -m benchmarks.eight_bit_products

One JSON line per joined linear of the block (queries, keys and values; output; gate and up; down) for 8 x 2048 tokens:
its three products (forward, dL/dx, dL/dW) in bf16 and in FP8 with one scale a matrix, with quick sums and with exact
ones, the casts as they lie and transposed, whether the casts are right, and how far dL/dW of FP8 agrees in sign.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from workers.numerics.eight_bits.cast_kernels import LARGEST, cast

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
    x8, x8t, sx = cast(x, rows=True, columns=True)
    w8, w8t, sw = cast(w, rows=True, columns=True)
    g8, g8t, sg = cast(g, rows=True, columns=True)
    assert x8 is not None and x8t is not None and w8 is not None and w8t is not None and g8 is not None
    assert g8t is not None
    runs: dict[str, Callable[[], object]] = {
        "bf16_forward": lambda: x @ w.T,
        "bf16_dx": lambda: g @ w,
        "bf16_dw": lambda: g.T @ x,
        "cast_x_turned": lambda: cast(x, rows=False, columns=True),
        "cast_g_both": lambda: cast(g, rows=True, columns=True),
        "cast_w_turned": lambda: cast(w, rows=False, columns=True),
        "maximum_torch_g": lambda: g.abs().amax(),
    }
    for kind, quick in (("quick", True), ("exact", False)):
        runs |= {
            f"fp8_forward_{kind}": lambda q=quick: product(x8, w8, sx, sw, q),  # type: ignore[misc]
            f"fp8_dx_{kind}": lambda q=quick: product(g8, w8t, sg, sw, q),  # type: ignore[misc]
            f"fp8_dw_{kind}": lambda q=quick: product(g8t, x8t, sg, sx, q),  # type: ignore[misc]
        }
    times = {name: round(milliseconds(run, repeats), 4) for name, run in runs.items()}
    dw = (g.T @ x).float()
    agreement = {}
    for kind, quick in (("quick", True), ("exact", False)):
        found = product(g8t, x8t, sg, sx, quick).float()
        same = (found.sign() == dw.sign()).float()
        agreement[kind] = {
            "same": float(same.mean()),
            "weighted": float((same * dw.abs()).sum() / dw.abs().sum()),
            "nan": int(found.isnan().sum()),
        }
    right = {name: cast_is_right(t) for name, t in (("x", x), ("w", w), ("g", g))}
    return {"ms": times, "agreement": agreement, "right": right}


def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, quick: bool) -> Tensor:
    """a (m, k) b (n, k)^T."""
    made: Tensor = torch._scaled_mm(a, b.T, scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=quick)
    return made


def cast_is_right(x: Tensor) -> list[bool]:
    lying, turned, scale = cast(x, rows=True, columns=True)
    assert lying is not None and turned is not None
    maximum = x.abs().amax().float()
    plain = (x.float() * (LARGEST / maximum)).to(torch.float8_e4m3fn).view(torch.uint8)
    same = (lying.view(torch.uint8) == plain).float().mean(), (turned.view(torch.uint8).T == plain).float().mean()
    return [bool(share > 0.9999) for share in same] + [bool(scale == maximum / LARGEST)]


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
