"""Clock, sequences and loop that the sides of `benchmarks.peft_qlora` share, around a model that somebody prepared.

It imports nothing of the engine that wants a certain release of transformers, as a side may need another one.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from workers.engine.seeds import derived_seed
from workers.engine.text.packing import Order, PackedSequences
from workers.machine import available_threads

ALPHA, RATE, CLIP_NORM, SEED = 16, 2e-4, 0.3, 0
NUMBERS = {"steps": 30, "warm_up": 5, "batch": 8, "length": 512, "rank": 16}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "unsloth")


def add_numbers(parser: argparse.ArgumentParser) -> None:
    """The arguments that every side is given."""
    parser.add_argument("--recompute", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    for name, value in NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)


def line_of(given: argparse.Namespace, train: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What one side prints: the clock's figures of `train(given, clock, recomputes=...)`, and what that returns."""
    torch.set_num_threads(available_threads())
    clock = Clock(given.warm_up, given.steps, tokens=given.batch * given.length)
    recomputes = given.recompute == ["yes"]
    figures = train(given, clock, recomputes=recomputes)
    return {"side": given.run, "recompute": recomputes} | clock.figures() | figures


@dataclass
class Clock:
    """Time of the steps after the warm-up, and the most memory until the end: `tick` is called after each step."""

    warm_up: int
    steps: int
    tokens: int
    done: int = 0
    began: float = 0.0
    seconds: float = 0.0
    peak: int | None = None

    def tick(self) -> None:
        self.done += 1
        if self.done == self.warm_up:
            self._wait()
            self.began = time.perf_counter()
        if self.done == self.steps:
            self._wait()
            self.seconds = time.perf_counter() - self.began

    def figures(self) -> dict[str, Any]:
        a_step = self.seconds / (self.steps - self.warm_up)
        return {
            "seconds_a_step": round(a_step, 5),
            "tokens_a_second": round(self.tokens / a_step, 1),
            "peak_gib": None if self.peak is None else round(self.peak / 2**30, 3),
        }

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()


def trained(
    prepared: Callable[..., nn.Module], given: argparse.Namespace, clock: Clock, *, recomputes: bool
) -> dict[str, Any]:
    """A loop of its own around a model that `prepared` made, as a trainer has it: nothing waits for the device."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(SEED)
    model = prepared(given, device, recomputes=recomputes)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    read = sequences(given)
    order = Order(read, given.batch, given.batch, derived_seed(SEED, "finetune"))
    curve: list[Tensor] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # as the engine's stage does
    for index in range(given.steps):
        ids = read.ids[order.rows(index)].long()
        ids = ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        curve.append(loss.detach())
        clock.tick()
    return {"loss": losses(torch.stack(curve).tolist()), "trained": sum(p.numel() for p in parameters)}


def sequences(given: argparse.Namespace) -> PackedSequences:
    """One example in each; every token but the first is learned, as a causal language model's loss has it."""
    ids = load_file(given.model / "sequences.safetensors")["ids"]
    targets = torch.ones_like(ids, dtype=torch.bool)
    targets[:, -1] = False
    return PackedSequences(ids, torch.zeros_like(ids), targets)


def losses(curve: list[float]) -> list[float]:
    """Of the first and the last step (of more than 50 steps here: means of those around them)."""
    return [round(curve[0], 4), round(curve[-1], 4)]


def versions() -> dict[str, str]:
    """Of the packages that this process would import."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "another path"
    return found
