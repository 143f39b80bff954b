"""A loop over rows in as many threads as torch computes in: compiled loops leave the interpreter alone."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch

PART = 1 << 17
"""Elements from which on a part of a loop is worth a thread: to wake one takes some 40 microseconds."""


def over_rows(rows: int, columns: int, loop: Callable[[int, int], object]) -> None:
    """Call `loop` with first row and end of consecutive parts of a matrix's rows, side by side."""
    count = min(torch.get_num_threads(), max(1, rows * columns // PART), rows)
    if count <= 1:
        loop(0, rows)
        return
    ends = [rows * (number + 1) // count for number in range(count)]
    others = [_pool(os.getpid()).submit(loop, first, end) for first, end in pairwise(ends)]
    loop(0, ends[0])
    for other in others:
        other.result()


@cache
def _pool(_process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="loop")
