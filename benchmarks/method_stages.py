"""Kernels of columns in turn against torch's operators on real shapes, and the seconds of jobs by stage.

    python -m benchmarks.method_stages check [--device cuda] [--large]
    python -m benchmarks.method_stages jobs MODEL --calibration FILE --cells q3_k gptq_w4

`check` prints a line a case: the share of codes that differ, the ratio of tr((W_hat - W) H (W_hat - W)^T), and both
times, of the second call. `jobs` runs each job twice in one process and prints the second run's seconds by stage, each
without those inside it and with the device waited for at both ends, and how often a stage began.
"""

import argparse
import json
import pkgutil
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

from app.domain.methods import Scheme, SchemeName
from benchmarks.gguf.ours import Job, finished
from workers.methods import gptq
from workers.methods.gptq import Elimination
from workers.numerics.blocks import descent, elimination, search
from workers.numerics.quantized import QuantizedWeight

SMALL = ((960, 576), (576, 576), (3072, 576), (576, 1536))
LARGE = ((6144, 4096), (28672, 4096), (4096, 14336))
CELLS: dict[str, tuple[dict[str, Any], str]] = {
    "q3_k": ({"method": "signround", "preset": "light", "scheme": "q3_k"}, "gguf"),
    "q2_k": ({"method": "signround", "preset": "light", "scheme": "q2_k"}, "gguf"),
    "iq3_s": ({"method": "signround", "preset": "light", "scheme": "iq3_s"}, "gguf"),
    "w4": ({"method": "signround", "preset": "light", "bits": 4, "group_size": 64}, "compressed-tensors"),
    "gptq_w4": ({"method": "gptq", "bits": 4, "group_size": 64}, "compressed-tensors"),
    "gptq_q3_k": ({"method": "gptq", "scheme": "q3_k"}, "gguf"),
}
WATCHED = {
    "search": ["workers.numerics.blocks.elimination.search_blocks", "workers.methods.sign_round.search_blocks"],
    "elimination of block types": ["workers.methods.gptq.eliminate"],
    "elimination of integers": ["workers.methods.gptq.quantize_weight"],
    "descent": ["workers.methods.gptq.descend"],
    "factors": ["workers.methods.gptq.inverse_factor"],
    "sums of H": ["workers.numerics.hessian.Hessian.add"],
    "passes for H": [f"workers.methods.gptq.{name}" for name in ("see_inputs", "input_groups", "_in_one_pass")],
    "method, rest": ["workers.methods.sign_round.SignRound.quantize_block", "workers.methods.gptq.GPTQ.quantize_block"],
    "start of tuning": ["workers.methods.sign_round.rounded_weights"],
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
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    arguments = parser.parse_args()
    if arguments.what == "check":
        for line in _checks(arguments.device, LARGE if arguments.large else ()):
            print(json.dumps(line), flush=True)
        return
    text = {"dataset": {"source": "local", "path": str(arguments.calibration)}}
    calibration = {**text, "num_samples": arguments.sequences, "sequence_length": arguments.length}
    for name in arguments.cells:
        for stage in _job(name, arguments.model, calibration, arguments.device):
            print(stage, flush=True)


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


def _job(name: str, model: Path, calibration: dict[str, Any], device: str) -> Iterator[str]:
    quantization, kind = CELLS[name]
    job = Job(model, quantization, device, calibration, format=kind)
    with tempfile.TemporaryDirectory() as folder:
        first = finished(job, Path(folder))
        with _watching() as stages:
            second = finished(job, Path(folder))
        plain = finished(job, Path(folder))
    yield f"== {name}: seconds {first.seconds:.2f} first, {plain.seconds:.2f} third; watched {second.seconds:.2f}"
    for stage, (spent, count) in sorted(stages.items(), key=lambda item: -item[1][0]):
        yield f"{stage:32} {spent:8.3f} s {count:7d} times"


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
