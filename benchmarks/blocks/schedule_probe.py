"""Seconds and held-out loss of an 8B-shaped block's tuning by steps, sequences a step and products of gradients.

    python -m benchmarks.blocks.schedule_probe --cases 200/8 200/8/0.5 200/8/0.5/quick

Inputs are correlated as a model's are (eigenvalues that fall as 1/k), and ranges are searched with their second
moments, as a job's are; `--white` has independent inputs and full ranges instead, as `benchmarks.blocks.block_tuning`
has. A case is STEPS/BATCH[/PART OF HALF BATCHES[/GRADIENTS]]. One JSON line a run; the first of a kind is cold.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from app.domain.methods import Scheme, SignRoundSpec
from benchmarks.blocks.block_tuning import SHAPES, make_task, timed
from workers.contracts.blocks import BlockTask
from workers.engine.device.setup import reproducible
from workers.methods import sign_round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--cases", nargs="+", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--white", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    scheme = Scheme(bits=given.bits, group_size=given.group_size, symmetric=True)
    task = make_task(SHAPES[given.shape], scheme, given.samples, given.length, 8, device, fused=True)
    if not given.white:
        task = with_correlated_inputs(task)
        task = replace(task, second_moments=moments(task))
    with reproducible(device):
        for case in given.cases:
            for seed in range(given.repeats):
                print(json.dumps({"case": case, "seed": seed} | measured(replace(task, seed=seed), case)), flush=True)


def measured(task: BlockTask, case: str) -> dict[str, float]:
    steps, batch, *rest = case.split("/")
    halves, gradients = float(rest[0]) if rest else 0.0, rest[1] if len(rest) > 1 else "exact"
    spec = SignRoundSpec(steps=int(steps), batch_size=int(batch), quick_steps=True)
    with scheduled(halves, gradients):
        if task.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        result = timed(task, spec)
    if task.device.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


@contextmanager
def scheduled(halves: float, gradients: str) -> Iterator[None]:
    """SignRound with a part of its steps, from the first on, on half batches, and gradients of such products."""
    with (
        patch.object(sign_round, "QUICK_GRADIENTS", gradients),
        patch.object(SignRoundSpec, "half_batches", lambda spec: round(halves * spec.steps)),
    ):
        yield


def with_correlated_inputs(task: BlockTask) -> BlockTask:
    """Linears have nothing to learn from independent inputs, whose second moments are the identity, but from these."""
    generator = torch.Generator(task.device).manual_seed(1)
    width = task.inputs.shape[-1]
    spectrum = torch.arange(1, width + 1, device=task.device).float().rsqrt()
    turns = [torch.linalg.qr(torch.randn(width, width, device=task.device, generator=generator))[0] for _ in range(2)]
    mix = (turns[0] * (spectrum / spectrum.square().mean().sqrt())) @ turns[1]
    hidden = torch.stack([(rows.float() @ mix).to(rows.dtype) for rows in task.inputs_fp])
    with torch.no_grad():
        targets = torch.cat([task.forward(task.block, rows) for rows in torch.split(hidden, 8)])
    return replace(task, inputs_fp=hidden, inputs=hidden + 0.02 * torch.randn_like(hidden), targets=targets)


def moments(task: BlockTask) -> dict[str, Tensor]:
    """Mean squares of each linear's inputs."""
    sums: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        sums[name] = x.detach().flatten(0, -2).float().square().mean(0)

    hooks = [
        task.block.get_submodule(name).register_forward_pre_hook(lambda _, inputs, n=name: see(n, inputs[0]))
        for name in task.schemes
    ]
    with torch.no_grad():
        task.forward(task.block, task.inputs[:8])
    for hook in hooks:
        hook.remove()
    return sums


if __name__ == "__main__":
    main()
