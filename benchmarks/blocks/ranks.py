"""Time of tuning one block on several GPUs: that of `benchmarks.blocks.block_tuning`, sequences shared by ranks.

    python -m benchmarks.blocks.ranks --worlds 1 2 --shape llama-8b --group-size 128 --steps 200

Each world of ranks tunes the same blocks with the same batch size, one GPU a rank (on a CPU: one process). Prints one
JSON line per block: the slowest rank's seconds, and the loss, which is every rank's.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.multiprocessing

from app.domain.methods import Scheme, SignRoundSpec
from benchmarks.blocks.block_tuning import SHAPES, make_task, synchronize
from workers.contracts.blocks import BlockTask
from workers.engine.device.process_group import ProcessGroup, joined
from workers.engine.device.setup import reproducible
from workers.engine.tune.tuner import Tuner
from workers.machine import available_threads
from workers.methods.sign_round import SignRound
from workers.supervise.child_env import RANKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=3, help="blocks tuned one after another; the first is cold")
    given = parser.parse_args()
    available = torch.cuda.device_count() if given.device == "cuda" else os.cpu_count() or 1
    for world in given.worlds:
        if world > available:
            print(json.dumps({"world": world, "skipped": f"{available} {given.device} devices"}))
            continue
        for name, value in RANKS.items():
            os.environ.setdefault(name, value)
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(tune, args=(world, folder, given), nprocs=world)


def tune(rank: int, world: int, folder: str, given: argparse.Namespace) -> None:
    """Tune `blocks` blocks as one rank; the first one prints."""
    device = torch.device("cuda", rank) if given.device == "cuda" else torch.device("cpu")
    if given.device == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, available_threads() // world))
    with reproducible(device), joined(ProcessGroup(rank, world), str(Path(folder) / "rendezvous"), device) as processes:
        task = shared_task(processes, given, device)
        spec = SignRoundSpec(steps=given.steps, batch_size=given.batch_size)
        for number in range(given.blocks):
            line = measure(replace(task, index=number), spec, processes)
            if processes.leads:
                print(json.dumps({"world": world, "block": number} | line | vars(given)), flush=True)


def shared_task(processes: ProcessGroup, given: argparse.Namespace, device: torch.device) -> BlockTask:
    """This rank's share of the block's sequences."""
    scheme = Scheme(bits=given.bits, group_size=given.group_size, symmetric=True)
    micro_batch = processes.share_size(given.batch_size)
    task = make_task(SHAPES[given.shape], scheme, given.samples, given.length, micro_batch, device, fused=True)
    inputs, inputs_fp, targets = (processes.share(t).clone() for t in (task.inputs, task.inputs_fp, task.targets))
    tuner = Tuner(lambda event, **fields: print(json.dumps({"event": event} | fields)), processes=processes)
    return replace(task, inputs=inputs, inputs_fp=inputs_fp, targets=targets, tune=tuner.tune)


def measure(task: BlockTask, spec: SignRoundSpec, processes: ProcessGroup) -> dict[str, float | None]:
    on_gpu = task.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    processes.wait()
    synchronize(task.device)
    start = time.perf_counter()
    result = SignRound().quantize_block(task, spec)
    synchronize(task.device)
    slowest = -processes.least(-round(1e6 * (time.perf_counter() - start)))
    return {
        "seconds": slowest / 1e6,
        "loss_initial": float(result.loss_initial or 0),
        "loss": float(result.loss or 0),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


if __name__ == "__main__":
    main()
