"""A finetuned model in every way that it ships: each checkpoint computes what base and adapter compute together."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from app.domain.adapters import (
    ADAPTERS,
    AdapterSpec,
)
from app.domain.formats import ExportFormat
from tests.adapters.examples import SPECS
from tests.formats.examples import REPORT, Source, codebook_made, linears, logits, random_result, scheme, tiny_llama
from workers.adapters.attaching import Attach, Merge, finished, stored
from workers.adapters.bayesian import BayesianLoRA
from workers.formats.adapter_file import write_adapter
from workers.formats.registry import open_writers
from workers.numerics.quantized import LinearResult

NATIVE, MERGED, PEFT = ExportFormat.NATIVE, ExportFormat.MERGED, ExportFormat.PEFT
FOLDING = [spec for spec in SPECS if ADAPTERS[spec.kind].merges_quantized]
STOCK = [spec for spec in SPECS if ADAPTERS[spec.kind].stock_peft]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return tiny_llama(tmp_path_factory.mktemp("source"), torch.float32)


class Job:
    """A quantized tiny Llama with adapters as after training."""

    def __init__(self, source: Source, spec: AdapterSpec, codebook: bool) -> None:
        self.source, self.spec = source, spec
        made = codebook_made(4, 16) if codebook else scheme(4, 16, False)
        self.model = AutoModelForCausalLM.from_pretrained(source.folder).eval()
        self.results: dict[str, LinearResult] = {}
        for index, (name, linear) in enumerate(linears(self.model)):
            shape = (linear.out_features, linear.in_features)
            self.results[name] = random_result(shape, made, torch.float32, seed=index)
            linear.weight.data = self.results[name].dequantize()
        self.adapters = Attach(spec)(self.results, seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for index, adapter in enumerate(self.adapters.values()):
                for name, parameter in adapter.eval().named_parameters():
                    if name in ("b", "m"):
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
                if isinstance(adapter, BayesianLoRA):
                    adapter.gate_rank[index % 4 :] = -6  # ranks 0 to 3
                    adapter.gate_b[index % 3] = -6

    def logits(self) -> Tensor:
        """Base and adapters side by side."""
        handles = [
            self.model.get_submodule(name).register_forward_hook(_beside(adapter))
            for name, adapter in self.adapters.items()
        ]
        found = logits(self.model)
        for handle in handles:
            handle.remove()
        return found

    def export(self, folder: Path, formats: tuple[ExportFormat, ...], merge: Merge) -> None:
        writers = open_writers(folder, formats, self.source)
        for name, result in self.results.items():
            done = finished(name, result, self.adapters[name], merge)
            for writer in writers.values():
                writer.add_linear(name, done.result)
        for writer in writers.values():
            writer.finish()
            writer.describe(REPORT)


def _beside(adapter: nn.Module) -> Any:
    return lambda _module, inputs, output: output + adapter(inputs[0])


def loader(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_close(found: Tensor, job: Job) -> None:
    expected, plain = job.logits(), logits(job.model)
    assert (expected - plain).abs().max() > 1e-2, "the adapter changes nothing that could be seen"
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_merged_in_floating_point_it_is_an_ordinary_checkpoint(
    spec: AdapterSpec, source: Source, tmp_path: Path
) -> None:
    job = Job(source, spec, codebook=True)
    job.export(tmp_path, (MERGED,), "16bit")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), job)


@pytest.mark.parametrize("spec", FOLDING, ids=lambda spec: spec.kind)
def test_folded_it_stays_quantized_and_loads(spec: AdapterSpec, source: Source, tmp_path: Path) -> None:
    job = Job(source, spec, codebook=False)
    job.export(tmp_path, (NATIVE, MERGED), "quantized")
    assert_close(logits(loader(tmp_path / "native" / "load_bitwright.py").load(tmp_path / "native")), job)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), job)
    size = sum(file.stat().st_size for file in (tmp_path / "native").glob("*.safetensors"))
    assert size < 0.5 * (tmp_path / "merged" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("spec", STOCK, ids=lambda spec: spec.kind)
def test_stock_peft_loads_a_lora_of_any_ranks(spec: AdapterSpec, source: Source, tmp_path: Path) -> None:
    job = Job(source, spec, codebook=True)
    job.export(tmp_path, (MERGED, PEFT), None)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(base), logits(job.model))
    assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "peft")), job)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_the_adapter_file_belongs_to_the_native_base(spec: AdapterSpec, source: Source, tmp_path: Path) -> None:
    job = Job(source, spec, codebook=True)
    job.export(tmp_path, (NATIVE,), None)
    held: Mapping[str, Any] = {name: stored(adapter) for name, adapter in job.adapters.items()}
    write_adapter(tmp_path / "adapter", spec.kind, held)
    base = loader(tmp_path / "native" / "load_bitwright.py").load(tmp_path / "native", merge=False)
    assert torch.equal(logits(base), logits(job.model))
    detach = loader(tmp_path / "adapter" / "load_adapter.py").attach(base, tmp_path / "adapter")
    assert_close(logits(base), job)
    detach()
    assert torch.equal(logits(base), logits(job.model))
