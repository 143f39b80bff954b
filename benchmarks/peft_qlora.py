"""A training step of QLoRA, here and by peft with bitsandbytes: same model, sequences and hyperparameters, one GPU.

    python -m benchmarks.peft_qlora MODEL --text train.jsonl --steps 30 --batch 8 --length 512 --rank 16
    python -m benchmarks.peft_qlora MODEL --text train.jsonl --shape llama-8b --blocks 16

A LoRA beside every linear of the blocks, alpha 16, no dropout; NF4 in blocks of 64 with double quantization below;
AdamW (fused), learning rate 2e-4, norm of the gradient at most 0.3. The rows' `text` is cut into sequences of full
length, so that there is no padding, and both sides read the same ones in the same order. With `--shape` the model is a
random Llama of that shape, tokenized by MODEL, whose weights are a large part of the memory.

ours         the engine's stage as a job runs it: its plan decides whether dequantized weights are kept, which they are
             not where activations are computed again
packed       the same, but weights stay packed and are made anew for each use, as where they would not fit
peer         peft and transformers as QLoRA's authors prepare the model: norms in fp32, the rest that is not quantized
             in bf16, autocast to bf16
peer-16bit   the same with norms in bf16, which takes less memory
unsloth      the same loop around unsloth's model (`benchmarks/unsloth_qlora.py`); only where it is asked for

Each runs without and with recomputation of activations (gradient checkpointing of every block), in a process of its
own, one after another. One JSON line each, and at the end one with ratios of ours to theirs. Of the steps after
`--warm-up`:

seconds_a_step   from one wait for the device to another, with no wait between them
peak_gib         most memory of the device that tensors take while training, warm-up included: what captured steps work
                 in is only counted while they are captured
loss             of the very first step, before anything is learned, and of the last

bitsandbytes is used where it can be imported; `--peer-path` names a folder that it was installed to. `--sides` and
`--recompute` take a part of the eight runs, so that it fits into a limit. Without a GPU there are no peaks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.domain.methods.schemes import Scheme
from app.domain.request.job_request import JobRequest
from benchmarks.blocks.random_model import write_model
from benchmarks.qlora_loop import (
    ALPHA,
    CLIP_NORM,
    NUMBERS,
    RATE,
    SEED,
    Clock,
    add_numbers,
    line_of,
    losses,
    sequences,
    trained,
    versions,
)
from bitwright.events import Stage
from workers.disk.orders import AttemptOrder
from workers.engine import finetune, memory
from workers.engine.clock import StageClock
from workers.engine.device.process_group import SINGLE_PROCESS
from workers.engine.device.setup import reproducible
from workers.engine.finetune.flat_adamw import FlatParameters
from workers.engine.finished_blocks import FinishedBlocks
from workers.engine.job import Job
from workers.engine.job_texts import Texts
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.plan import make_plan, scale_dtype_of
from workers.engine.reporter import Reporter
from workers.engine.text.examples import Examples
from workers.engine.text.finetuning_texts import FinetuningTexts
from workers.methods.normal_float import QLORA
from workers.numerics.normal_float import quantize
from workers.numerics.quantized import LinearResult
from workers.supervise.child_env import ALLOCATOR, OFFLINE

OURS, PEERS, UNSLOTH = ("ours", "packed"), ("peer", "peer-16bit"), "unsloth"
SIDES = (*OURS, *PEERS, UNSLOTH)
NF4 = Scheme(bits=4, group_size=64, symmetric=True)


def main() -> None:
    given = arguments().parse_args()
    if not 0 < given.warm_up < given.steps:
        sys.exit(f"--warm-up is {given.warm_up}: at least 1 and fewer than --steps, {given.steps}, are needed")
    if given.run is not None:
        print(json.dumps(run(given)), flush=True)
        return
    if given.text is None:
        sys.exit("--text is missing: a JSONL file whose rows have `text`")
    with tempfile.TemporaryDirectory() as folder:
        prepare(given, Path(folder))
        wanted = product(given.recompute, given.sides)
        runs = [in_its_process(given, side, recompute, Path(folder)) for recompute, side in wanted]
    print(json.dumps(summary([line for line in runs if line is not None])))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    parser.add_argument("--text", type=Path, help="JSONL with `text`")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[*OURS, *PEERS])
    add_numbers(parser)
    parser.add_argument("--shape", choices=["llama-8b"])
    parser.add_argument("--blocks", type=int, default=16, help="of --shape")
    parser.add_argument("--peer-path", type=Path)
    parser.add_argument("--unsloth-path", type=Path, help="folder that unsloth was installed to")
    parser.add_argument("--run", choices=SIDES, help=argparse.SUPPRESS)
    return parser


def prepare(given: argparse.Namespace, folder: Path) -> None:
    """The sequences, int32 (sequences, length), and for a shape its random model; in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    with given.text.open() as lines:
        texts = [json.loads(line)["text"] for line in lines]
    ids = [token for text in texts for token in (*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id)]
    count = len(ids) // given.length
    if count == 0:
        sys.exit(f"--text has {len(ids)} tokens; a sequence has {given.length}")
    rows = torch.tensor(ids[: count * given.length], dtype=torch.int32).view(count, given.length)
    save_file({"ids": rows}, folder / "sequences.safetensors")
    if given.shape is None:
        (folder / "model").symlink_to(given.model.resolve())
        return
    shape = {"shape": given.shape, "tokenizer": given.model, "blocks": given.blocks, "length": given.length}
    write_model(argparse.Namespace(**shape), folder / "model")


def in_its_process(given: argparse.Namespace, side: str, recompute: str, folder: Path) -> dict[str, Any] | None:
    """Last line that one side printed; None where it failed. Ours runs in an attempt's environment."""
    environment = os.environ | OFFLINE
    paths = [os.environ.get("PYTHONPATH", ".")]
    if given.peer_path is not None and side in PEERS:
        paths.append(str(given.peer_path))
    if given.unsloth_path is not None and side == UNSLOTH:
        paths.insert(0, str(given.unsloth_path))  # before ours: it may want an older transformers
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    if side in OURS:
        environment |= ALLOCATOR
    numbers = [f"--{name.replace('_', '-')}={getattr(given, name)}" for name in NUMBERS]
    module = "benchmarks.unsloth_qlora" if side == UNSLOTH else "benchmarks.peft_qlora"
    command = [sys.executable, "-m", module, str(folder), "--run", side, "--recompute", recompute]
    done = subprocess.run([*command, *numbers], env=environment, capture_output=True, check=False, text=True)
    if done.returncode != 0:
        failed = {"side": side, "recompute": recompute, "failed": done.stderr.splitlines()[-8:]}
        print(json.dumps(failed), flush=True)
        return None
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(line), flush=True)
    return line


def run(given: argparse.Namespace) -> dict[str, Any]:
    """The line of ours, or of peft's side."""
    return line_of(given, ours if given.run in OURS else partial(trained, peer_model))


def ours(given: argparse.Namespace, clock: Clock, *, recomputes: bool) -> dict[str, Any]:
    """The stage of a job that finetunes, on blocks that are quantized and durable as a job leaves them."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if given.run == "packed":
        memory.KEPT_SHARE.update(dict.fromkeys(memory.KEPT_SHARE, 0.0))
    body = {
        "model": str(given.model / "model"),
        "method": "qlora",
        "rank": given.rank,
        "alpha": ALPHA,
        "seed": SEED,
        "finetune": {
            "dataset": "builtin",  # only named in the report
            "steps": given.steps,
            "batch_size": given.batch,
            "sequence_length": given.length,
            "learning_rate": RATE,
            "clip_norm": CLIP_NORM,
            "warmup_share": 0.0,
            "validation_share": 0.0,
            "checkpoint_every": given.steps,
            "gradient_checkpointing": recomputes,
        },
    }
    order = AttemptOrder(
        job_id="job_benchmark",
        attempt=1,
        request=JobRequest.parse(body),
        model_path=str(given.model / "model"),
        device=device.type,
    )
    with reproducible(device), tempfile.TemporaryDirectory() as folder:
        model = StreamedModel.open(Checkpoint.open(given.model / "model"), device)
        state = quantized(model, Path(folder) / "state")
        job = Job(
            order=order,
            workspace=Path(folder),
            reporter=Reporter(lambda _: None),
            clock=StageClock(Stage.LOAD),
            processes=SINGLE_PROCESS,
            model=model,
            schemes=dict.fromkeys((name for name in model.linears() if name != model.layout.head), NF4),
            plan=make_plan(order, model, scale_dtype_of(order.request.formats, model.dtype), []),
            texts=Texts(None, None, FinetuningTexts(Examples(), sequences(given), None, "benchmark")),
            finished_blocks=state,
        )
        tick_after_steps(clock)
        finetuned = finetune.run(job, None)
        assert finetuned is not None
        report = finetuned.report
    return {
        "loss": losses([point.loss for point in report.losses]),
        "trained": report.trainable_parameters,
        "micro_batch": report.micro_batch,
        "weights_kept": report.weights_kept,
    }


def quantized(model: StreamedModel, folder: Path) -> FinishedBlocks:
    """The blocks' linears in NF4."""
    state = FinishedBlocks(folder)
    state.adopt("benchmark")
    for index in range(len(model.blocks)):
        block = model.layout.block(index)
        with model.loaded(block), torch.no_grad():
            results = {
                f"{block}.{name}": LinearResult(quantize(linear.weight, NF4, QLORA, linear.weight.dtype))
                for name, linear in model.block_linears(index).items()
            }
        state.save(index, results, None)
    return state


def tick_after_steps(clock: Clock) -> None:
    """The clock ticks after each step of the engine's optimizer, the last thing that a step gives to the device."""
    take = FlatParameters.step

    def step(self: FlatParameters, rate: float, share: float) -> Tensor:
        norm = take(self, rate, share)
        clock.tick()
        return norm

    FlatParameters.step = step  # type: ignore[method-assign]


def peer_model(given: argparse.Namespace, device: torch.device, *, recomputes: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        given.model / "model",
        dtype=torch.bfloat16,
        device_map={"": 0 if device.type == "cuda" else "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=recomputes, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    # That made everything fp32 that is not quantized; QLoRA's own script leaves only norms so.
    for outer in (model.get_input_embeddings(), model.get_output_embeddings()):
        outer.to(torch.bfloat16)
    if given.run == "peer-16bit":
        for name, module in model.named_modules():
            if name.endswith("norm"):
                module.to(torch.bfloat16)
    lora = LoraConfig(
        r=given.rank, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted: nn.Module = get_peft_model(model, lora)
    return adapted.train()


def summary(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Our speed in multiples of theirs, and our share of their memory; both sides train as many numbers."""
    by = {(line["recompute"], line["side"]): line for line in runs}
    every = product((False, True), OURS, (*PEERS, UNSLOTH))
    pairs = [(r, one, other) for r, one, other in every if {(r, one), (r, other)} <= set(by)]
    ratios = {
        f"{one} / {other}{', recomputed' if recomputed else ''}": {
            "speed": ratio(by[recomputed, one], by[recomputed, other], "tokens_a_second"),
            "memory": ratio(by[recomputed, one], by[recomputed, other], "peak_gib"),
            "same_parameters": by[recomputed, one]["trained"] == by[recomputed, other]["trained"],
        }
        for recomputed, one, other in pairs
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"ratio": ratios, "device": device, "versions": versions()}


def ratio(one: dict[str, Any], other: dict[str, Any], figure: str) -> float | None:
    return None if one[figure] is None else round(one[figure] / other[figure], 3)


if __name__ == "__main__":
    main()
