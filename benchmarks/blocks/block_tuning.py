"""Time and memory of tuning one block: random weights of a model's shape, random inputs, the engine's own loop.

    python -m benchmarks.blocks.block_tuning --shape smollm2 --steps 200
    python -m benchmarks.blocks.block_tuning --shape llama-8b --group-size 128 --steps 50 --profile
    python -m benchmarks.blocks.block_tuning --shape gemma3-270m --steps 200

Speed does not depend on the values; quality is measured elsewhere (docs/results.md). Prints one JSON line a case.
"""

import argparse
import contextlib
import json
import time
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedConfig

from app.domain.methods import Scheme, SignRoundSpec
from workers.contracts.blocks import BlockTask
from workers.engine.device.setup import reproducible
from workers.engine.model.block_calls import BlockCall
from workers.engine.model.fused_blocks import Parts, fuse
from workers.engine.model.fused_parts import LENGTH, fuse_parts, without_bands
from workers.engine.tune.tuner import Tuner
from workers.methods.sign_round import SignRound


@dataclass(frozen=True)
class Shape:
    """The shape of a model's blocks.

    window   tokens that a position sees, where the model is Gemma 3; None: it is a Llama, and all
    """

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    window: int | None = None

    def config(self, length: int, *, blocks: int = 1, vocabulary: int = 32) -> PreTrainedConfig:
        """A model of such blocks for sequences of `length` tokens. Of Gemma's, every sixth sees all; a single one does
        not."""
        sizes = {
            "vocab_size": vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": max(length, 2048),
            "attn_implementation": "sdpa",
            "dtype": torch.bfloat16,
        }
        if self.window is None:
            return LlamaConfig(**sizes)
        kinds = ["full_attention" if number % 6 == 5 else "sliding_attention" for number in range(blocks)]
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return Gemma3TextConfig(layer_types=kinds, sliding_window=self.window, **special, **sizes)


SHAPES = {
    "smollm2": Shape(576, 1536, 9, 3, 64),
    "llama-8b": Shape(4096, 14336, 32, 8, 128),
    "gemma3-270m": Shape(640, 2048, 4, 1, 256, window=512),
}


def _block_and_call(shape: Shape, length: int, device: torch.device) -> tuple[nn.Module, BlockCall]:
    with device:
        model = AutoModelForCausalLM.from_config(shape.config(length), dtype=torch.bfloat16).eval()
    block, calls = model.model.layers[0], list[BlockCall]()
    hook = block.register_forward_pre_hook(
        lambda _, arguments, keywords: calls.append(BlockCall(arguments[1:], keywords)), with_kwargs=True
    )
    with torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.int64, device=device), use_cache=False)
    hook.remove()
    return block.requires_grad_(False), calls[0]


def make_task(
    shape: Shape, scheme: Scheme, samples: int, length: int, micro_batch: int, device: torch.device, *, fused: bool
) -> BlockTask:
    torch.manual_seed(0)
    block, call = _block_and_call(shape, length, device)
    hidden = torch.randn(samples, length, shape.hidden, dtype=torch.bfloat16, device=device)
    parts = Parts.on(device, torch.bfloat16) if fused else None
    if parts is not None:
        block = fuse(block, parts)
        fuse_parts(nn.ModuleList([block]), parts, lambda *_: _block_and_call(shape, LENGTH, device)[1].keywords)
        call = BlockCall(call.arguments, without_bands(block, call.keywords, {}))
    with torch.no_grad():
        targets = torch.cat([call(block, rows) for rows in torch.split(hidden, micro_batch)])
    linears = {name: scheme for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    return BlockTask(
        index=0,
        block=block,
        forward=call,
        inputs=hidden + 0.02 * torch.randn_like(hidden),
        inputs_fp=hidden,
        targets=targets,
        schemes=linears,
        second_moments={},
        scale_dtype=torch.bfloat16,
        device=device,
        seed=0,
        micro_batch=micro_batch,
        tick=lambda _: None,
        tune=Tuner(lambda event, **fields: print(json.dumps({"event": event} | fields))).tune,
    )


def timed(task: BlockTask, spec: SignRoundSpec) -> dict[str, float]:
    synchronize(task.device)
    start = time.perf_counter()
    result = SignRound().quantize_block(task, spec)
    synchronize(task.device)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "loss_initial": float(result.loss_initial or 0), "loss": float(result.loss or 0)}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=3, help="blocks tuned one after another; the first is cold")
    parser.add_argument("--generic", action="store_true", help="without hand-fused parts")
    parser.add_argument("--fast-attention", action="store_true", help="allow kernels that are not deterministic")
    parser.add_argument("--profile", action="store_true", help="a table of kernels for the last block")
    given = parser.parse_args()

    device = torch.device(given.device)
    scheme = Scheme(bits=given.bits, group_size=given.group_size, symmetric=not given.asymmetric)
    task = make_task(
        SHAPES[given.shape], scheme, given.samples, given.length, given.micro_batch, device, fused=not given.generic
    )
    spec = SignRoundSpec(steps=given.steps, preset="light" if given.steps < 100 else "default")
    with contextlib.nullcontext() if given.fast_attention else reproducible(device):
        for number in range(given.blocks):
            measure(task, spec, given, number)


def measure(task: BlockTask, spec: SignRoundSpec, given: argparse.Namespace, number: int) -> None:
    on_gpu = task.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    if given.profile and number == given.blocks - 1:
        with torch.profiler.profile() as profile:
            result = timed(replace(task, index=number), spec)
        print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=60))
    else:
        result = timed(replace(task, index=number), spec)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    line = vars(given) | {"block": number, "peak_gib": peak, "ms_a_step": 1e3 * result["seconds"] / max(given.steps, 1)}
    print(json.dumps(line | result))


if __name__ == "__main__":
    main()
