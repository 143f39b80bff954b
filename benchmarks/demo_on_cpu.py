"""Time of the whole command `bitwright demo` on a CPU, beside its matrix products alone and beside another version.

    python -m benchmarks.demo_on_cpu MODEL --rounds 3
    python -m benchmarks.demo_on_cpu MODEL --rounds 3 --against ../older/.venv/bin/bitwright
    python -m benchmarks.demo_on_cpu MODEL --only products

The command is that of the demo: `light` signround, W4, 64 x 256 tokens, 50 steps of 2 sequences a block, evaluated on
16 x 512. Runs take turns: products, this version, the other one. One JSON line a run, and at the end one with medians
and ratios, of seconds by the wall and of processors: where others share the machine, only the latter say something.

products   every matrix product that the command's arithmetic asks for, of the same shapes, in the dtype that the
           engine multiplies in (`workers.numerics.product_dtype`), on random numbers: of a block those of linears and
           of causal attention's lower half, forward in passes and checks, forward and backward in steps; and the
           head's logits of three models. They are timed for one block and counted for all.
rates      GFLOP/s of the block's products in each dtype, all threads together
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from app.cli.demo import BATCH_SIZE, EVALUATION, SAMPLES, SEQUENCE_LENGTH
from app.domain.request.job_request import JobRequest
from app.idle_threads import waiting
from benchmarks.blocks.cpu_block import machine
from workers.engine.tune.sequence_order import split
from workers.engine.tune.tuner import is_checked
from workers.machine import available_threads
from workers.numerics.product_dtype import product_dtype
from workers.supervise.child_env import ALLOCATOR

PASS_TOKENS = 2048
"""Tokens of a pass that are multiplied at once."""
LOGITS_TOKENS = 170


@dataclass(frozen=True)
class Shape:
    """Of a Llama's block: (out, in) of its linears, heads, their width, and the vocabulary."""

    linears: tuple[tuple[int, int], ...]
    heads: int
    head_dim: int
    blocks: int
    width: int
    vocabulary: int

    @classmethod
    def of(cls, folder: Path) -> "Shape":
        config = AutoConfig.from_pretrained(folder)
        width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
        heads, shared = config.num_attention_heads * head, config.num_key_value_heads * head
        linears = ((heads + 2 * shared, width), (width, heads), (inner, width), (inner, width), (width, inner))
        return cls(linears, config.num_attention_heads, head, config.num_hidden_layers, width, config.vocab_size)


@dataclass(frozen=True)
class Work:
    """Some products, how often the command makes them, and their floating-point operations."""

    name: str
    call: Callable[[], object]
    times: float
    operations: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="the command `bitwright` of another version")
    parser.add_argument("--only", choices=("products", "rates"))
    given = parser.parse_args()
    if given.only is not None:
        torch.set_num_threads(available_threads())
        print(json.dumps(products(given.model) if given.only == "products" else rates(given.model)), flush=True)
        return
    own = Path(sys.executable).with_name("bitwright")
    sides = {"ours": own} | ({} if given.against is None else {"theirs": given.against.absolute()})
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ("products", *sides)}
    for _ in range(given.rounds):
        runs["products"].append(shown("products", in_its_process(given.model)))
        for name, command in sides.items():
            runs[name].append(shown(name, demo(command, given.model)))
    print(json.dumps(summary(runs) | machine() | in_its_process(given.model, "rates")))


def shown(side: str, run: dict[str, float]) -> dict[str, float]:
    print(json.dumps({"side": side} | run), flush=True)
    return run


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    medians = {
        side: {unit: round(median(run[unit] for run in of_side), 2) for unit in ("wall", "cpu")}
        for side, of_side in runs.items()
    }
    ratios = {
        f"ours / {other}": {unit: round(medians["ours"][unit] / medians[other][unit], 3) for unit in ("wall", "cpu")}
        for other in medians
        if other != "ours"
    }
    return {"median": medians, "ratio": ratios}


def demo(command: Path, model: Path) -> dict[str, float]:
    """Seconds of the command, by the wall and of the processors of all of its processes."""
    arguments = ("--method", "signround", "--bits", "4", "--preset", "light")
    with tempfile.TemporaryDirectory() as folder:
        before, started = spent(), time.perf_counter()
        done = subprocess.run(
            [str(command), "demo", "--model", str(model.resolve()), *arguments, "--data-dir", folder],
            cwd=command.parents[2],
            check=False,
            capture_output=True,
            text=True,
        )
        run = {"wall": time.perf_counter() - started, "cpu": spent() - before}
    if done.returncode != 0:
        raise SystemExit(
            f"{command} ended with exit code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    found = {"kl": number(done.stdout, "KL to the original"), "perplexity": number(done.stdout, "perplexity ")}
    return {name: round(value, 5) for name, value in (run | found).items()}


def number(output: str, start: str) -> float:
    """Last number of the last line that starts so; NaN if there is none."""
    lines = [line.split() for line in output.splitlines() if line.startswith(start)]
    try:
        return float(lines[-1][-1])
    except (IndexError, ValueError):
        return float("nan")


def spent() -> float:
    """Processor seconds of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def in_its_process(model: Path, what: str = "products") -> Any:
    command = [sys.executable, "-m", "benchmarks.demo_on_cpu", str(model), "--only", what]
    environment = {**os.environ, **ALLOCATOR, **waiting()}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def products(model: Path) -> dict[str, float]:
    """Seconds of all products of the command, from those of one block."""
    totals = {"wall": 0.0, "cpu": 0.0, "teraflop": 0.0}
    for work in works(Shape.of(model)):
        wall, cpu = timed(work.call)
        totals["wall"] += wall * work.times
        totals["cpu"] += cpu * work.times
        totals["teraflop"] += work.operations * work.times / 1e12
    return {name: round(value, 2) for name, value in totals.items()}


def works(shape: Shape) -> Iterator[Work]:
    body = {"model": "/model", "method": "signround", "bits": 4, "preset": "light"}
    steps = JobRequest.parse(body).quantization.model_dump()["steps"]
    dtype, blocks = product_dtype(torch.device("cpu"), torch.bfloat16), shape.blocks
    step_tokens, held_out = BATCH_SIZE * SEQUENCE_LENGTH, len(split(SAMPLES, 0)[1])
    checks = 1 + sum(is_checked(step, steps) for step in range(1, steps + 1))
    operations = [2.0 * out * inside for out, inside in shape.linears]
    # The inputs of the first linear need no gradient.
    yield Work(
        "steps", _steps(shape, step_tokens, dtype), steps * blocks, step_tokens * (3 * sum(operations) - operations[0])
    )
    tokens = checks * held_out * SEQUENCE_LENGTH
    tokens += 2 * SAMPLES * SEQUENCE_LENGTH + 3 * EVALUATION["num_samples"] * EVALUATION["sequence_length"]
    forward = _forward(shape, PASS_TOKENS, dtype)
    yield Work("passes", forward, tokens / PASS_TOKENS * blocks, PASS_TOKENS * sum(operations))
    length, evaluated = SEQUENCE_LENGTH, EVALUATION["sequence_length"]
    queries = shape.heads * shape.head_dim
    # Two products forward, four backward, of half a square each.
    yield Work(
        "attention, steps",
        _attention(shape, BATCH_SIZE, length, dtype, 6),
        steps * blocks,
        6.0 * step_tokens * length * queries,
    )
    yield Work(
        "attention, calibration",
        _attention(shape, 1, length, dtype, 2),
        (checks * held_out + 2 * SAMPLES) * blocks,
        2.0 * length * length * queries,
    )
    yield Work(
        "attention, evaluation",
        _attention(shape, 1, evaluated, dtype, 2),
        3 * EVALUATION["num_samples"] * blocks,
        2.0 * evaluated * evaluated * queries,
    )
    hidden, head = (torch.randn(rows, shape.width, dtype=dtype) for rows in (LOGITS_TOKENS, shape.vocabulary))
    logits = 3 * EVALUATION["num_samples"] * evaluated / LOGITS_TOKENS
    yield Work("head", lambda: hidden @ head.T, logits, 2.0 * LOGITS_TOKENS * shape.width * shape.vocabulary)


def _matrices(shape: Shape, tokens: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Weight, inputs and gradients of outputs of each linear."""
    sizes = [((out, inside), (tokens, inside), (tokens, out)) for out, inside in shape.linears]
    return [
        (torch.randn(w, dtype=dtype), torch.randn(x, dtype=dtype), torch.randn(y, dtype=dtype)) for w, x, y in sizes
    ]


def _steps(shape: Shape, tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    matrices = _matrices(shape, tokens, dtype)
    gradients = [torch.empty_like(weight) for weight, _, _ in matrices]

    def run() -> None:
        for number, ((weight, x, by_y), out) in enumerate(zip(matrices, gradients, strict=True)):
            torch.mm(x, weight.T)
            torch.mm(by_y.T, x, out=out)
            if number:
                torch.mm(by_y, weight)

    return run


def _forward(shape: Shape, tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    matrices = _matrices(shape, tokens, dtype)
    return lambda: [torch.mm(x, weight.T) for weight, x, _ in matrices]


def _attention(shape: Shape, rows: int, length: int, dtype: torch.dtype, count: int) -> Callable[[], object]:
    """`count` products of half a square: queries of all positions by half of the keys."""
    heads = rows * shape.heads
    queries, keys = (torch.randn(heads, size, shape.head_dim, dtype=dtype) for size in (length, length // 2))
    squares = torch.randn(heads, length, length // 2, dtype=dtype)

    def run() -> None:
        for number in range(count):
            torch.bmm(queries, keys.mT) if number % 2 else torch.bmm(squares, keys)

    return run


def rates(model: Path) -> dict[str, Any]:
    shape, tokens = Shape.of(model), BATCH_SIZE * SEQUENCE_LENGTH
    operations = tokens * (3 * sum(2.0 * out * inside for out, inside in shape.linears))
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        wall, cpu = timed(_steps(shape, tokens, dtype))
        found[str(dtype).removeprefix("torch.")] = {
            "wall": round(operations / wall / 1e9, 1),
            "processor second": round(operations / cpu / 1e9, 1),
        }
    return {"gflops": found}


def timed(call: Callable[[], object], seconds: float = 2.0) -> tuple[float, float]:
    """Seconds of one call by the wall and of processors, the mean of as many as take `seconds`, after one."""
    call()
    started, before, count = time.perf_counter(), time.process_time(), 0
    while count < 3 or time.perf_counter() - started < seconds:
        call()
        count += 1
    return (time.perf_counter() - started) / count, (time.process_time() - before) / count


if __name__ == "__main__":
    main()
