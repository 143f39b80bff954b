"""Time of tuning one block on a CPU, here and by auto-round: a checkpoint's first block, same texts, same recipe.

    python -m benchmarks.blocks.cpu_block MODEL --rounds 3
    taskset -c 0,1 python -m benchmarks.blocks.cpu_block MODEL --sides ours light --rounds 1

Both sides get the checkpoint cut to its first block, the same texts of `--length` tokens, groups of 64 symmetric at
W4, the full ranges as the start and 50 steps of 8 sequences, in a process of its own each, one after another; `light`
is ours from searched ranges, and `peer-compiled` is auto-round with torch.compile, compiling included. One JSON line a
run, and at the end one with the ratios of the quickest runs.

seconds   ours: `SignRound.quantize_block`, from block, X_q and Y to codes: start, steps, eight held-out losses.
          auto-round: its quantizer's `quantize_block`, from the same to the fake-quantized block; no held-out losses.
          Neither includes loading, tokenizing or the passes that make X_q and Y.
cpu       processor seconds of the process in the meantime, those of threads that spin while they wait included
error     ||block(X; W_hat) - Y||^2 / ||Y||^2 over all calibration sequences, by the same function for both

auto-round runs where it can be imported; `--peer-path` names a folder that it was installed to.
"""

import argparse
import json
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.domain.methods import Scheme, SignRoundSpec
from workers.contracts.blocks import BlockTask
from workers.engine.model.block_calls import run_block
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.activations import second_moments
from workers.engine.tune.tuner import Tuner
from workers.machine import available_threads
from workers.methods.sign_round import SignRound
from workers.supervise.child_env import ALLOCATOR

SIDES = ("ours", "light", "peer", "peer-compiled")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
BITS, GROUP_SIZE = 4, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["ours", "light", "peer"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--peer-path", type=Path)
    parser.add_argument("--run", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run is not None:
        print(json.dumps(run(given)), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        cut(given, Path(folder))
        runs = [in_its_process(given, side, Path(folder)) for _ in range(given.rounds) for side in given.sides]
    print(json.dumps(summary(given, [line for line in runs if line is not None])))


def cut(given: argparse.Namespace, folder: Path) -> None:
    """The checkpoint's first block with its embeddings, norm and head, and the texts as JSONL."""
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16)
    model.get_decoder().layers = model.get_decoder().layers[:1]
    model.config.num_hidden_layers = 1
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:1]
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.save_pretrained(folder)
    topics = pydoc_data.topics.topics
    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)), verbose=False)["input_ids"]
    starts = range(0, given.samples * given.length, given.length)
    # A little more than needed: tokenizing the text again may shorten it.
    texts = [tokenizer.decode(ids[start : start + given.length + 32]) for start in starts]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def in_its_process(given: argparse.Namespace, side: str, folder: Path) -> dict[str, Any] | None:
    """Last line that one side printed; None without auto-round. Ours runs in an attempt's environment."""
    environment = dict(os.environ)
    if given.peer_path is not None and side.startswith("peer"):
        environment["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", "."), str(given.peer_path)])
    if not side.startswith("peer"):
        environment |= ALLOCATOR
    numbers = [f"--{name}={getattr(given, name)}" for name in ("steps", "batch", "samples", "length")]
    command = [sys.executable, "-m", "benchmarks.blocks.cpu_block", str(folder), "--run", side, *numbers]
    done = subprocess.run(command, env=environment, capture_output=True, check=False, text=True)
    if done.returncode != 0:
        print(json.dumps({"side": side, "failed": done.stderr.splitlines()[-1:]}), flush=True)
        return None
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(line), flush=True)
    return line


def summary(given: argparse.Namespace, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The quickest run of each side, and how many times longer auto-round took."""
    quickest = {side: min(r["seconds"] for r in runs if r["side"] == side) for side in {r["side"] for r in runs}}
    ratios = {
        f"{peer} / {ours}": round(quickest[peer] / quickest[ours], 2)
        for peer in ("peer", "peer-compiled")
        for ours in ("ours", "light")
        if peer in quickest and ours in quickest
    }
    return {"quickest": quickest, "ratio": ratios, "tokens_a_step": given.batch * given.length} | machine()


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    return {
        "processor": fields.get("model name", "unknown"),
        "flags": [flag for flag in FLAGS if flag in flags],
        "threads": available_threads(),
        "torch": torch.__version__,
    }


def run(given: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(available_threads())
    side = {"side": given.run, "steps": given.steps}
    if given.run.startswith("peer"):
        return side | peer(given, compiled=given.run == "peer-compiled")
    return side | ours(given, search=given.run == "light")


def ours(given: argparse.Namespace, *, search: bool) -> dict[str, Any]:
    stage = Stage(given)
    scheme = Scheme(bits=BITS, group_size=GROUP_SIZE, symmetric=True)
    with stage.loaded():
        schemes = dict.fromkeys(stage.model.block_linears(0), scheme)
        with second_moments(stage.model.block_linears(0)) as moments:
            targets = stage.outputs(stage.block)
        task = BlockTask(
            index=0,
            block=stage.block,
            forward=stage.call,
            inputs=stage.hidden,
            inputs_fp=stage.hidden,
            targets=targets,
            schemes=schemes,
            second_moments=moments,
            scale_dtype=torch.bfloat16,
            device=torch.device("cpu"),
            seed=0,
            micro_batch=given.batch,
            tick=lambda _: None,
            tune=Tuner().tune,
        )
        spec = SignRoundSpec(steps=given.steps, batch_size=given.batch, scale_search=search)
        result, times = timed(lambda: SignRound().quantize_block(task, spec))
        for name, linear in result.linears.items():
            stage.model.block_linears(0)[name].weight = nn.Parameter(linear.weight.dequantize(), requires_grad=False)
        losses = {"loss_initial": float(result.loss_initial or 0), "loss": float(result.loss or 0)}
        return times | losses | {"error": stage.error(stage.block, targets)}


def peer(given: argparse.Namespace, *, compiled: bool) -> dict[str, Any]:
    from auto_round import AutoRound
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer

    measured: list[dict[str, float]] = []
    tune = SignRoundQuantizer.quantize_block

    def measuring(*arguments: Any, **keywords: Any) -> Any:
        result, times = timed(lambda: tune(*arguments, **keywords))
        measured.append(times)
        return result

    SignRoundQuantizer.quantize_block = measuring
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16)
    engine = AutoRound(
        model,
        AutoTokenizer.from_pretrained(given.model),
        bits=BITS,
        group_size=GROUP_SIZE,
        sym=True,
        iters=given.steps,
        nsamples=given.samples,
        seqlen=given.length,
        batch_size=given.batch,
        dataset=str(given.model / "texts.jsonl"),
        enable_torch_compile=compiled,
        device_map="cpu",
        seed=0,
    )
    model, _ = engine.quantize()
    (times,) = measured
    stage = Stage(given)
    with stage.loaded():
        targets = stage.outputs(stage.block)
    return times | {"error": stage.error(model.get_decoder().layers[0].to("cpu"), targets)}


class Stage:
    """The cut checkpoint's block, how it is called, and the texts' embeddings (sequences, length, width)."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.model = StreamedModel.open(Checkpoint.open(given.model), torch.device("cpu"))
        self.call = self.model.capture_calls(given.length)[0]
        self.block = self.model.blocks[0]
        self._batch = given.batch
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        lines = (given.model / "texts.jsonl").read_text().splitlines()
        ids = tokenizer([json.loads(line)["text"] for line in lines], truncation=True, max_length=given.length)
        with self.model.loaded(*self.model.layout.outer), torch.no_grad():
            self.hidden = self.model.embed(torch.tensor(ids["input_ids"]))

    def loaded(self) -> Any:
        return self.model.loaded(self.model.layout.block(0))

    def outputs(self, block: nn.Module) -> Tensor:
        outputs = torch.empty_like(self.hidden)
        run_block(self.call, block, self.hidden, outputs, micro_batch=self._batch, device=torch.device("cpu"))
        return outputs

    def error(self, block: nn.Module, targets: Tensor) -> float:
        difference = self.outputs(block).double() - targets.double()
        return float(difference.square().sum() / targets.double().square().sum())


def timed(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    times = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return result, {name: round(value, 3) for name, value in times.items()}


if __name__ == "__main__":
    main()
