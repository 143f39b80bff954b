"""The original as a GGUF file in fp32, and what the quantizer of llama.cpp learns of its inputs (an imatrix).

The file has the service's own names, order of rows and tokenizer, so that both sides start from the same.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from app.domain.request.job_request import Calibration
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.text.sequences import Sequences, calibration_sequences, load_tokenizer
from workers.formats.gguf.collected import Collected
from workers.formats.gguf.metadata import Architecture
from workers.formats.gguf.placed import PlacedTensors
from workers.formats.gguf.tokenizer import add_tokenizer


@dataclass(frozen=True)
class Texts:
    """JSONL files, and how many sequences of how many tokens calibrate."""

    calibration: Path
    valid: Path
    samples: int
    length: int

    def sequences(self, model: Path, seed: int, further: int = 0) -> Sequences:
        """Those that calibrate a job of this seed; one that asks for further ones draws from more of the text."""
        asked = Calibration(num_samples=self.samples, sequence_length=self.length, further_samples=further)
        return calibration_sequences(load_tokenizer(model), asked, self.calibration, seed, None)

    def fields(self) -> dict[str, Any]:
        """The request's `calibration`."""
        dataset = {"source": "local", "path": str(self.calibration)}
        return {"dataset": dataset, "num_samples": self.samples, "sequence_length": self.length}


def write_original(model: Path, target: Path) -> None:
    """Writes a model as GGUF in fp32."""
    checkpoint = Checkpoint.open(model)
    architecture, collected = Architecture.of(checkpoint), Collected(target.with_suffix(".partial"))
    placed = PlacedTensors(architecture, collected)
    for name in checkpoint.tensors:
        if not placed.is_left_out(name):
            placed.add_plain(name, checkpoint.read(name).float())
    placed.add_made(checkpoint)
    writer = gguf.GGUFWriter(target, architecture.name)
    architecture.add_to(writer, checkpoint)
    add_tokenizer(writer, checkpoint.folder, architecture.vocabulary)
    collected.write(writer)
    checkpoint.close()


def write_importance(model: Path, ids: Tensor, device: str, target: Path) -> None:
    """Writes the mean square of each column of each linear's inputs over the sequences (.npz, by the tensor's name)."""
    names = Architecture.of(Checkpoint.open(model)).names
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device).eval()
    sums: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and module is not network.get_output_embeddings():
            total = torch.zeros(module.in_features, dtype=torch.float64, device=device)
            sums |= {place.name: total for place in names.places(f"{name}.weight", module.out_features) or ()}
            module.register_forward_pre_hook(partial(_observe, total))
    with torch.inference_mode():
        for row in ids:
            network.model(row[None].to(device))
    arrays: dict[str, Any] = {name: (total / ids.numel()).float().cpu().numpy() for name, total in sums.items()}
    np.savez(target, **arrays)


def _observe(total: Tensor, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    total += inputs[0].flatten(0, -2).double().square().sum(0)
