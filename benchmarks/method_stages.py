"""Kernels of columns in turn against torch's operators on real shapes, and the seconds of jobs by stage.

    python -m benchmarks.method_stages check [--device cuda] [--large]
    python -m benchmarks.method_stages jobs MODEL --calibration FILE --cells gptq_w4 awq omniquant [--profile 2]

`check` prints a line a case: the share of codes that differ, the ratio of tr((W_hat - W) H (W_hat - W)^T), and both
times, of the second call. `jobs` runs each job three times in one process. Of the first two it prints the seconds from
an opened model with its tokens made to the last block that is durable, without loading, evaluation and saving: the
second one is the figure of a method. Of the third it prints the seconds by stage, each without those inside it and with
the device waited for at both ends, and how often a stage began. `--profile` prints a fourth one's table of kernels, of
one block's method. `--runs 1` leaves the second one out. A run that is ended by SIGTERM, as by `timeout`, prints the
stages so far.
"""

import argparse
import json
import pkgutil
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from app.domain.methods import Scheme, SchemeName, WeightSpec
from benchmarks.gguf.ours import Job, order_of
from workers.contracts.blocks import BlockTask
from workers.contracts.results import BlockResult
from workers.disk.orders import AttemptOrder
from workers.engine import quantize
from workers.engine.quantize import block_pass
from workers.engine.reporter import Reporter
from workers.engine.run import run
from workers.methods import gptq
from workers.methods.gptq import Elimination
from workers.numerics.blocks import descent, elimination, search
from workers.numerics.quantized import QuantizedWeight

SMALL = ((960, 576), (576, 576), (3072, 576), (576, 1536))
LARGE = ((6144, 4096), (28672, 4096), (4096, 14336))
W4 = {"bits": 4, "group_size": 64}
CELLS: dict[str, tuple[dict[str, Any], str]] = {
    "q3_k": ({"method": "signround", "preset": "light", "scheme": "q3_k"}, "gguf"),
    "q2_k": ({"method": "signround", "preset": "light", "scheme": "q2_k"}, "gguf"),
    "iq3_s": ({"method": "signround", "preset": "light", "scheme": "iq3_s"}, "gguf"),
    "w4": ({"method": "signround", "preset": "light", **W4}, "compressed-tensors"),
    "gptq_w4": ({"method": "gptq", **W4}, "compressed-tensors"),
    "gptq_q3_k": ({"method": "gptq", "scheme": "q3_k"}, "gguf"),
    "awq": ({"method": "awq", **W4}, "native"),
    "omniquant": ({"method": "omniquant", **W4}, "native"),
    "apiq_block": ({"method": "apiq", "granularity": "block", **W4, "symmetric": False}, "native"),
    "apiq_layer": ({"method": "apiq", "granularity": "layer", **W4, "symmetric": False}, "native"),
    "loftq": ({"method": "loftq", "base": "affine", **W4}, "native"),
    "loftq_nf": ({"method": "loftq", **W4}, "native"),
    "lq_lora": ({"method": "lq-lora", "bits": {"average": 2.75}, "fisher": False}, "native"),
    "lq_lora_fisher": ({"method": "lq-lora", "bits": {"average": 2.75}, "fisher": True}, "native"),
}
METHODS = (
    "sign_round.SignRound",
    "gptq.GPTQ",
    "awq.AWQ",
    "omniquant.OmniQuant",
    "apiq.ApiQ",
    "loftq.LoftQ",
    "lq_lora.LQLoRA",
)
WATCHED = {
    "search": ["workers.numerics.blocks.elimination.search_blocks", "workers.methods.sign_round.search_blocks"],
    "elimination of block types": ["workers.numerics.blocks.compensation.eliminate"],
    "elimination of integers": ["workers.methods.gptq.quantize_weights"],
    "elimination and descent, replayed": ["workers.methods.gptq.compensate"],
    "descent": ["workers.numerics.blocks.compensation.descend"],
    "factors": ["workers.methods.gptq.inverse_factors"],
    "sums of H": ["workers.numerics.hessian.Hessian.add"],
    "passes for H": [f"workers.methods.gptq.{name}" for name in ("see_inputs", "input_groups", "_in_one_pass")],
    "method, rest": [f"workers.methods.{method}.quantize_block" for method in METHODS],
    "AWQ: statistics": ["workers.methods.awq.observe"],
    "AWQ: search of scales": ["workers.methods.awq.search_scale"],
    "AWQ: rounding, search of clips": ["workers.methods.awq.quantize_weight"],
    "LoftQ: factors": ["workers.methods.loftq.FollowedFactors.of"],
    "LQ-LoRA: factors": [f"workers.methods.lq_lora.{name}" for name in ("weighted_factors", "FollowedFactors.of")],
    "LQ-LoRA: rest of decompositions": ["workers.methods.lq_lora.decompose"],
    "LQ-LoRA: scores, rest": ["workers.methods.lq_lora.LQLoRA.candidate_errors"],
    "NormalFloat": ["workers.numerics.normal_float.quantize"],
    "Fisher information": ["workers.engine.quantize.preparation.empirical_fisher"],
    "allocation, rest": ["workers.engine.quantize.preparation.spend"],
    "layers in order, rest": ["workers.methods.apiq.quantize_in_order"],
    "layers in order: passes": [f"workers.contracts.layer_tasks.{name}" for name in ("_inputs_of", "_outputs")],
    "start of tuning": [
        "workers.methods.sign_round.rounded_weights",
        "workers.methods.apiq.corrected_weights",
        "workers.methods.omniquant.ClippedWeights",
    ],
    "capture of steps": ["workers.engine.tune.tuner._Run.prepare"],
    "steps": ["workers.engine.tune.tuner.Tuner.tune"],
    "results of tuning": ["workers.engine.tune.tuner._Run.outcome"],
    "pass: original": ["workers.engine.quantize.activations.Activations.advance_original"],
    "pass: quantized": ["workers.engine.quantize.activations.Activations.advance_quantized"],
    "weights in place": ["workers.engine.quantize.block_pass.BlockPass._put"],
    "wait for the writer": ["workers.engine.device.write_behind.WriteBehind.wait"],
    "block loop, rest": ["workers.engine.quantize.block_pass.BlockPass.run"],
    "preparation": ["workers.engine.quantize.prepare"],
    "export": ["workers.engine.run.export.run"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "jobs"])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--calibration", type=Path, help="texts, as a job is given them")
    parser.add_argument("--cells", nargs="+", default=["q3_k", "gptq_w4"], choices=sorted(CELLS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--large", action="store_true", help="shapes of an 8B block, too, by kernels alone")
    parser.add_argument("--profile", type=int, metavar="BLOCK", help="index of a block whose kernels are listed")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=2, help="jobs before the one whose stages are watched")
    arguments = parser.parse_args()
    if arguments.what == "check":
        for line in _checks(arguments.device, LARGE if arguments.large else ()):
            print(json.dumps(line), flush=True)
        return
    text = {"dataset": {"source": "local", "path": str(arguments.calibration)}}
    calibration = {**text, "num_samples": arguments.sequences, "sequence_length": arguments.length}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended before the last run"))
    for name in arguments.cells:
        order = order_of(Job(arguments.model, CELLS[name][0], arguments.device, calibration, format=CELLS[name][1]))
        for line in _job(name, order, arguments.runs, arguments.profile):
            print(line, flush=True)


def _checks(device: str, large: tuple[tuple[int, int], ...]) -> Iterator[dict[str, Any]]:
    for rows, columns in SMALL:
        weight, hessian = _problem(rows, columns, device)
        yield from (
            {"case": name, "shape": (rows, columns)} | _compared(call, weight, hessian)
            for name, call in _cases(weight, hessian)
        )
    for rows, columns in large:
        weight, hessian = _problem(rows, columns, device)
        for name, call in _cases(weight, hessian):
            call()
            yield {"case": name, "shape": (rows, columns), "seconds": round(_timed(call)[1], 4)}


def _problem(rows: int, columns: int, device: str) -> tuple[Tensor, Tensor]:
    """A weight in bf16 and H of inputs of a few hundred causes and noise, fp32."""
    generator = torch.Generator(device=device).manual_seed(rows + columns)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    inputs = random(4 * columns, columns // 8) @ random(columns // 8, columns) / (columns // 8) ** 0.5
    inputs += 0.5 * random(4 * columns, columns)
    return (random(rows, columns) * 0.02).bfloat16(), 2 * inputs.T @ inputs


def _cases(weight: Tensor, hessian: Tensor) -> Iterator[tuple[str, Callable[[], QuantizedWeight]]]:
    columns, moments = weight.shape[1], hessian.diagonal()
    for act_order in (False, True):
        made = Elimination.of(hessian, 0.01, act_order=act_order)
        assert made is not None
        for scheme in (Scheme(bits=4, group_size=64, symmetric=True), Scheme(bits=3, group_size=64, symmetric=False)):
            name = f"{scheme.bits} bits, {'static' if act_order else 'moving'} groups"
            yield name, partial(gptq.quantize_weight, weight, made, scheme, torch.bfloat16)
        if act_order:
            yield "nvfp4a16", partial(_floats, weight, made, moments)
    straight = Elimination.of(hessian, 0.01, act_order=False)
    assert straight is not None
    for kind in ("q4_0", "q4_1") if columns % 256 else ("q2_k", "q3_k", "iq4_xs", "iq3_s"):
        scheme = Scheme.named(SchemeName(kind))
        yield f"{kind}, search", partial(search.search_blocks, weight, scheme, moments)
        yield f"{kind}, elimination", partial(elimination.eliminate, weight, scheme, straight.factor, moments)
        start = search.search_blocks(weight, scheme, moments)
        yield f"{kind}, two sweeps", partial(descent.descend, weight, start, hessian, 2)


def _floats(weight: Tensor, made: Elimination, moments: Tensor) -> QuantizedWeight:
    scheme = Scheme.named(SchemeName.NVFP4A16)
    return gptq.quantize_floats([weight], made, scheme, torch.float32, moments, [None])[0]


def _compared(call: Callable[[], QuantizedWeight], weight: Tensor, hessian: Tensor) -> dict[str, Any]:
    """Kernels against operators on the same device, and their times, the first call of each apart."""
    call()
    ours, seconds = _timed(call)
    with patch("workers.numerics.backend.triton_serves", lambda *_: False):
        call()
        plain, slow = _timed(call)
    return {
        "codes that differ": float((ours.codes != plain.codes).float().mean()),
        "error over plain": _error(weight, ours, hessian) / _error(weight, plain, hessian),
        "ms": round(seconds * 1e3, 2),
        "plain ms": round(slow * 1e3, 2),
    }


def _error(weight: Tensor, made: QuantizedWeight, hessian: Tensor) -> float:
    off = (made.dequantize().float() - weight.float()).double()
    return float(((off @ hessian.double()) * off).sum())


def _timed(call: Callable[[], QuantizedWeight]) -> tuple[QuantizedWeight, float]:
    _wait()
    started = time.perf_counter()
    made = call()
    _wait()
    return made, time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _job(name: str, order: AttemptOrder, runs: int, profiled: int | None) -> Iterator[str]:
    for number in range(runs):
        yield f"== {name}: run {number + 1} {_seconds(order):.2f} s"
    with _watching() as stages:
        try:
            yield f"== {name}: watched {_seconds(order):.2f} s"
        finally:
            for stage, (spent, count) in sorted(stages.items(), key=lambda item: -item[1][0]):
                print(f"{stage:32} {spent:8.3f} s {count:7d} times", flush=True)
    if profiled is not None:
        with _profiling(profiled) as lines:
            _seconds(order)
        yield from lines


def _seconds(order: AttemptOrder) -> float:
    """One run's seconds between an opened model with its tokens made and the last block that is durable."""
    times: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            _wait()
            times.append(time.perf_counter())
            try:
                return function(*given, **named)
            finally:
                _wait()
                times.append(time.perf_counter())

        return call

    with (
        patch.object(quantize, "prepare", timed(quantize.prepare)),
        patch.object(quantize, "run", timed(quantize.run)),
        tempfile.TemporaryDirectory() as workspace,
    ):
        run(order, Path(workspace), Reporter(lambda _: None))
    return times[-1] - times[0]


@contextmanager
def _profiling(index: int) -> Iterator[list[str]]:
    """Lines of the table of kernels, filled while the context lasts, of a block's method by its index."""
    lines: list[str] = []
    call = block_pass._quantize_block

    def profiled(task: BlockTask, spec: WeightSpec) -> BlockResult:
        if task.index != index:
            return call(task, spec)
        _wait()
        started = time.perf_counter()
        with torch.profiler.profile() as profile:
            result = call(task, spec)
            _wait()
        spent = time.perf_counter() - started
        key = "self_cuda_time_total" if task.device.type == "cuda" else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=70)
        lines.extend([f"block {index}: {spent:.3f} s under the profiler", *table.splitlines()])
        return result

    with patch.object(block_pass, "_quantize_block", profiled):
        yield lines


@contextmanager
def _watching() -> Iterator[dict[str, tuple[float, int]]]:
    """Seconds and calls by stage, filled while the context lasts; of the main thread."""
    stages: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    inside: list[float] = []

    def watched(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return function(*given, **named)
            _wait()
            inside.append(0.0)
            started = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                _wait()
                whole, within = time.perf_counter() - started, inside.pop()
                spent, count = stages[stage]
                stages[stage] = spent + whole - within, count + 1
                if inside:
                    inside[-1] += whole

        return call

    with ExitStack() as stack:
        for stage, targets in WATCHED.items():
            for target in targets:
                owner, _, leaf = target.rpartition(".")
                function = pkgutil.resolve_name(owner)
                stack.enter_context(patch.object(function, leaf, watched(stage, getattr(function, leaf))))
        yield stages


if __name__ == "__main__":
    main()
