"""The original as a GGUF file in fp32, and what the quantizer of llama.cpp learns of its inputs (an imatrix).

The file is one of a job that rounds a single linear, with that linear's numbers put back and every tensor widened: the
service's own names, order of rows and tokenizer, so that both sides start from the same file.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from app.domain.request.job_request import Calibration
from benchmarks.gguf.ours import Job, finished
from workers.engine.text.sequences import Sequences, calibration_sequences, load_tokenizer


@dataclass(frozen=True)
class Texts:
    """JSONL files, and how many sequences of how many tokens calibrate."""

    calibration: Path
    valid: Path
    samples: int
    length: int

    def sequences(self, model: Path, seed: int) -> Sequences:
        """Those that a job of this seed is calibrated on."""
        asked = Calibration(num_samples=self.samples, sequence_length=self.length)
        return calibration_sequences(load_tokenizer(model), asked, self.calibration, seed, None)

    def fields(self) -> dict[str, Any]:
        """The request's `calibration`."""
        dataset = {"source": "local", "path": str(self.calibration)}
        return {"dataset": dataset, "num_samples": self.samples, "sequence_length": self.length}


def write_original(model: Path, target: Path) -> None:
    """Writes a model as GGUF in fp32."""
    names = _tensor_names(model)
    one = max((name for name in names if name.endswith("down_proj.weight")), key=lambda name: (len(name), name))
    linear = one.removesuffix(".weight")
    others = [f"*.{last}" for last in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")]
    layers = {name.split(".down_proj")[0] for name in names if name.endswith("down_proj.weight") and name != one}
    ignored = [*others, *(f"{layer}.down_proj" for layer in sorted(layers)), "lm_head"]
    quantization = {"method": "rtn", "bits": 8, "group_size": 32, "modules": {"ignore": ignored}}
    with tempfile.TemporaryDirectory() as folder:
        job = Job(model, quantization, device="cpu")
        file = finished(job, Path(folder)).file
        reader = gguf.GGUFReader(file)
        writer = gguf.GGUFWriter(target, _text(reader, "general.architecture"))
        _copy_fields(reader, writer)
        known = gguf.get_tensor_name_map(_architecture(reader), _layers(reader))
        back = known.get_name(linear)
        for tensor in reader.tensors:
            numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if tensor.name == f"{back}.weight":
                numbers = _read(model, one).float().numpy()
            writer.add_tensor(tensor.name, np.ascontiguousarray(numbers, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def write_importance(model: Path, original: Path, ids: Tensor, device: str, target: Path) -> None:
    """Writes the mean square of each column of each linear's inputs over the sequences (.npz, by the tensor's name)."""
    reader = gguf.GGUFReader(original)
    known = gguf.get_tensor_name_map(_architecture(reader), _layers(reader))
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device).eval()
    sums: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and module is not network.get_output_embeddings():
            sums[name] = torch.zeros(module.in_features, dtype=torch.float64, device=device)
            module.register_forward_pre_hook(partial(_observe, sums[name]))
    with torch.inference_mode():
        for row in ids:
            network.model(row[None].to(device))
    found = {f"{known.get_name(name)}.weight": total / ids.numel() for name, total in sums.items()}
    arrays: dict[str, Any] = {name: mean.float().cpu().numpy() for name, mean in found.items()}
    np.savez(target, **arrays)


def _observe(total: Tensor, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    total += inputs[0].flatten(0, -2).double().square().sum(0)


def _tensor_names(model: Path) -> Mapping[str, Path]:
    names = dict[str, Path]()
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names |= dict.fromkeys(tensors.keys(), file)
    return names


def _read(model: Path, name: str) -> Tensor:
    with safe_open(_tensor_names(model)[name], "pt") as tensors:
        found = tensors.get_tensor(name)
    assert isinstance(found, Tensor)
    return found


def _text(reader: gguf.GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    assert field is not None, key
    return str(field.contents())


def _architecture(reader: gguf.GGUFReader) -> gguf.MODEL_ARCH:
    name = _text(reader, "general.architecture")
    return next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _layers(reader: gguf.GGUFReader) -> int:
    return int(_text(reader, f"{_text(reader, 'general.architecture')}.block_count"))


def _copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    """All but those that the writer has already, and those that it computes."""
    left = {"general.architecture", "general.file_type", "general.quantization_version"}
    for key, field in reader.fields.items():
        if key in left or key.startswith("GGUF."):
            continue
        inner = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], inner)
