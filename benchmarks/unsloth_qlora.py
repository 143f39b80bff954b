"""A training step of QLoRA by unsloth: a side of `benchmarks.peft_qlora`, which starts this in a process of its own.

    python -m benchmarks.peft_qlora MODEL --text train.jsonl --shape llama-8b --blocks 16 --recompute yes \\
        --sides ours unsloth --unsloth-path FOLDER

unsloth replaces parts of torch, transformers and peft, so it is imported before any of them, and never beside ours. It
loads the model in NF4 with double quantization and puts LoRAs beside the same linears as the other sides. Activations
are computed again in unsloth's own way, `use_gradient_checkpointing="unsloth"`, which from 512 tokens on may keep
inputs of blocks in the host's memory. Loop, optimizer and sequences are the other sides'. FOLDER is what
`pip install --target` made, and comes before everything else that the process imports. The line has the `versions`
that were used.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # What it compiles is written there, and it reports its use to nobody.
        os.environ |= {"UNSLOTH_COMPILE_LOCATION": folder, "UNSLOTH_DISABLE_STATISTICS": "1"}
        print(json.dumps(line()), flush=True)


def line() -> dict[str, Any]:
    import unsloth  # noqa: F401  # isort: skip
    from functools import partial

    from benchmarks.qlora_loop import add_numbers, line_of, trained, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with `model` and `sequences.safetensors`")
    parser.add_argument("--run", choices=["unsloth"], default="unsloth")
    add_numbers(parser)
    return line_of(parser.parse_args(), partial(trained, prepared)) | {"versions": versions()}


def prepared(given: argparse.Namespace, _device: "torch.device", *, recomputes: bool) -> "nn.Module":
    """The model with LoRAs, ready to be trained, on the device that unsloth takes: the GPU."""
    import torch
    from unsloth import FastLanguageModel

    from benchmarks.qlora_loop import ALPHA, SEED

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(given.model / "model"),
        max_seq_length=given.length,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_gradient_checkpointing="unsloth" if recomputes else False,
    )
    if not any(getattr(parameter, "quant_state", None) is not None for parameter in model.parameters()):
        # It goes on in 16 bits where it cannot use bitsandbytes, and only prints that.
        sys.exit("unsloth loaded no linear in 4 bits: bitsandbytes must be installed and find the GPU")
    adapted: nn.Module = FastLanguageModel.get_peft_model(
        model,
        r=given.rank,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(LINEARS),
        use_gradient_checkpointing="unsloth" if recomputes else False,
        random_state=SEED,
        max_seq_length=given.length,
    )
    FastLanguageModel.for_training(adapted, use_gradient_checkpointing=recomputes)
    return adapted


if __name__ == "__main__":
    main()
