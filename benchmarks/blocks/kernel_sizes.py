"""Times of the kernels of columns in turn by the rows and warps of a program, on real shapes.

python -m benchmarks.blocks.kernel_sizes
"""

import json
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from app.domain.methods import Scheme, SchemeName
from workers.numerics.backends import column_kernels, descent_kernels, search_kernels
from workers.numerics.backends.column_operators import Columns, IntegerGrid, LevelGrid
from workers.numerics.blocks.stored_parts import empty_weight

SHAPES = ((576, 1536), (3072, 768), (28672, 4096))


def timed(call: Callable[[], object], repeats: int = 20) -> float:
    """Microseconds of a call, of many launched one after another, and of one launched alone."""
    call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return round((time.perf_counter() - started) / repeats * 1e6, 1)


def main() -> None:
    """Print a line a kernel and size."""
    device = torch.device("cuda")
    for rows, columns in SHAPES:
        weight = torch.randn(rows, columns, device=device) * 0.02
        inputs = torch.randn(4 * columns, columns, device=device)
        hessian = inputs.T @ inputs
        factor = torch.linalg.cholesky(torch.linalg.inv(hessian)).T.contiguous()
        scheme = Scheme.named(SchemeName.Q3_K)
        batch = slice(128, 256)
        _column_sizes(rows, columns, weight, factor, batch)
        _descent_sizes(rows, columns, hessian, batch)
        for elements in (512, 1024, 2048):
            search_kernels.PROGRAM_ELEMENTS = elements
            other, weights = empty_weight(weight, scheme), torch.ones(columns, device=device)
            spent = timed(partial(search_kernels.search, other, weight, weights))
            print(json.dumps({"search": (rows, columns), "elements": elements, "us": spent}), flush=True)


def _column_sizes(rows: int, columns: int, weight: Tensor, factor: Tensor, batch: slice) -> None:
    work = Columns.of(weight, torch.arange(columns, device=weight.device), factor, 16)
    kind = Scheme.named(SchemeName.Q3_K).blocks
    assert kind is not None
    grid = LevelGrid(kind, torch.full((columns // 16, rows), 0.01, device=weight.device), None, factor.diagonal())
    integers = Columns.of(weight, torch.arange(columns, device=weight.device), factor, 64)
    scale = torch.full((columns // 64, rows), 0.01, device=weight.device)
    moving = IntegerGrid(scale, None, Scheme(bits=4, group_size=64, symmetric=True), torch.bfloat16, 64)
    for size, warps in ((4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4), (16, 1), (16, 2), (16, 4), (32, 4), (32, 8)):
        column_kernels.ROWS, column_kernels.WARPS = size, warps
        line = {"columns": (rows, columns), "rows": size, "warps": warps}
        line["levels us"] = timed(lambda: column_kernels.round_levels(work, batch, batch, grid))
        line["integers us"] = timed(lambda: column_kernels.round_integers(integers, batch, moving))
        print(json.dumps(line), flush=True)


def _descent_sizes(rows: int, columns: int, hessian: Tensor, batch: slice) -> None:
    kind = Scheme.named(SchemeName.Q3_K).blocks
    assert kind is not None
    levels, pull = torch.zeros(columns, rows, device=hessian.device), torch.randn(columns, rows, device=hessian.device)
    numbers = torch.ones(columns // 16, rows, device=hessian.device)
    blocks = torch.full((columns // 256, rows), 0.01, device=hessian.device)
    changes, panel = torch.empty(256, rows, device=hessian.device), slice(256, 512)
    levels.fill_(1.0)
    for size, warps in ((4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4), (16, 1), (16, 2), (16, 4), (32, 4)):
        descent_kernels.ROWS, descent_kernels.WARPS = size, warps
        spent = timed(partial(descent_kernels.move_levels, levels, pull, numbers, hessian, batch, kind, changes))
        print(json.dumps({"levels": (rows, columns), "rows": size, "warps": warps, "us": spent}), flush=True)
    for size, warps in ((16, 4), (16, 8), (16, 16), (32, 8)):
        descent_kernels.NUMBER_ROWS, descent_kernels.NUMBER_WARPS = size, warps
        line: dict[str, object] = {"numbers": (rows, columns), "rows": size, "warps": warps}
        small, two, given = (kind.scales, kind.minimums), (numbers, numbers), (kind, levels, pull, hessian)
        move = partial(descent_kernels.move_numbers, *given)
        line["of sub-blocks us"] = timed(partial(move, (blocks, blocks), two, panel, changes, small))
        line["of blocks us"] = timed(partial(move, two, (blocks, blocks), panel, changes, None))
        print(json.dumps(line), flush=True)
    spent = timed(partial(torch.addmm, pull, hessian[batch].T, changes[:128]))
    print(json.dumps({"product": (rows, columns), "us": spent}), flush=True)


if __name__ == "__main__":
    main()
