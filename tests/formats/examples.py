"""Random weights in every scheme, a report, and a tiny random Llama to write and to load."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from app.domain.formats import ExportFormat
from app.domain.methods import Scheme
from app.domain.report import ModelReport, PeakMemory, Report, SizeReport
from workers.formats.writer import CheckpointWriter
from workers.numerics.quantized import AffineWeight

TOKENS = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(3))

REPORT = Report(
    version="0.1.0",
    method="rtn",
    seed=0,
    device="cpu",
    plan={"dtype": "bfloat16"},
    model=ModelReport(
        source="org/tiny", revision="abc", architecture="LlamaForCausalLM", dtype="bfloat16", parameters=70_000
    ),
    calibration=None,
    quality=None,
    blocks=(),
    size=SizeReport(
        bytes_original=140_000,
        bytes_quantized=40_000,
        quantized_weights=50_000,
        bits_per_weight=4.25,
        bits_per_weight_model=5.5,
    ),
    seconds={"total": 1.0},
    peak_memory=PeakMemory(host_bytes=1),
    blocks_computed=2,
    blocks_resumed=0,
)


def scheme(bits: int, group_size: int, symmetric: bool) -> Scheme:
    return Scheme(bits=bits, group_size=group_size, symmetric=symmetric)


def random_weight(
    shape: tuple[int, int], of: Scheme, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> AffineWeight:
    """Every code and zero point alike likely, scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    groups = 1 if of.group_size == -1 else columns // of.group_size
    codes = torch.randint(0, 2**of.bits, shape, dtype=torch.uint8, generator=generator)
    scale = (torch.randn(rows, groups, generator=generator) * 0.1 / 2**of.bits).to(dtype)
    zero = torch.randint(0, 2**of.bits, (rows, groups), dtype=torch.uint8, generator=generator)
    return AffineWeight(codes, scale, None if of.symmetric else zero, of, dtype)


def assert_same(first: AffineWeight, second: AffineWeight) -> None:
    """Equal in every bit and every property."""
    assert torch.equal(first.codes, second.codes)
    assert first.codes.dtype == second.codes.dtype
    assert torch.equal(first.scale, second.scale)
    assert first.scale.dtype == second.scale.dtype
    assert (first.zero_point is None) == (second.zero_point is None)
    if first.zero_point is not None and second.zero_point is not None:
        assert torch.equal(first.zero_point, second.zero_point)
    assert (first.scheme, first.dtype) == (second.scheme, second.dtype)


@dataclass(frozen=True)
class Source:
    """A checkpoint folder of one file, as the writer wants it."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def tiny_llama(folder: Path, dtype: torch.dtype = torch.bfloat16, tied: bool = True) -> Source:
    """A random Llama of two blocks with a tokenizer, a chat template and a licence."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "tokenizer.py").write_text("raise SystemExit")
    return Source(folder, config.to_dict(), load_file(folder / "model.safetensors"))


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears of the blocks by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield name, module


def write_quantized(
    source: Source, folder: Path, export_format: ExportFormat, schemes: Sequence[Scheme], shard_bytes: int = 1 << 30
) -> nn.Module:
    """Write the source with random codes, schemes in turn; the original model with their dequantized weights."""
    model = AutoModelForCausalLM.from_pretrained(source.folder).eval()
    writer = CheckpointWriter(folder, export_format, source, shard_bytes)
    for index, (name, linear) in enumerate(linears(model)):
        shape = (linear.out_features, linear.in_features)
        weight = random_weight(shape, schemes[index % len(schemes)], linear.weight.dtype, seed=index)
        writer.add_linear(name, weight)
        linear.weight.data = weight.dequantize()
    writer.finish()
    writer.describe(REPORT)
    assert isinstance(model, nn.Module)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found = model(TOKENS).logits
    assert isinstance(found, Tensor)
    return found
