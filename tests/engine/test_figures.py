"""Sizes and counts of a report against the files: whatever stood in for the model's modules meanwhile."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from app.domain.request.finetuning import Finetune
from app.domain.request.sources import BuiltinText
from bitwright.report import Report
from tests.engine.conftest import run_job
from tests.engine.model.random_models import save_random_model
from tests.engine.ships import shipping
from tests.engine.ships.shipping import Case
from workers.engine.finetune.memory_plan import plan_training
from workers.engine.finetune.resident_model import Residence, resident
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel
from workers.numerics.quantized import AffineWeight, LinearResult


def assert_counted(report: Report, model: Path, output: Path) -> None:
    """Parameters as transformers counts them; bytes as they lie in the native files, less each linear's shape."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert report.model.parameters == loaded.num_parameters()
    assert report.size.bytes_original == sum(p.nbytes for p in loaded.parameters())
    stored = load_file(output / "native/weights.safetensors")
    taken = sum(tensor.nbytes for name, tensor in stored.items() if not name.endswith(".shape"))
    assert report.size.bytes_quantized == taken
    assert report.size.bits_per_weight_model == pytest.approx(8 * taken / report.model.parameters)


@pytest.mark.parametrize(
    "case",
    [
        Case("lora", "codebook", "apart", ("merged",), 4),
        Case("qa-lora", "asymmetric", "offsets", ("native",), 2, head=True),
        Case("q-bara", "symmetric", "sums", ("merged",), 4),
        Case("lora", "factors", "apart", ("peft",), 2),
    ],
    ids=str,
)
def test_a_job_that_finetunes_is_counted_whole(case: Case, tiny_model: Path, tmp_path: Path) -> None:
    rows = shipping.write_rows(tmp_path)
    request = case.request(tiny_model, rows)
    report = shipping.run_case(request, tiny_model, rows, tmp_path / "job").report
    output = tmp_path / "job/output"
    assert_counted(report, tiny_model, output)
    assert 8 * report.size.bytes_original / report.model.parameters == 16
    trained = load_file(output / "adapter/adapter.safetensors")
    assert report.adapter is not None
    assert report.finetuning is not None
    count = sum(tensor.numel() for tensor in trained.values())
    assert report.adapter.parameters == report.finetuning.trainable_parameters == count
    blocks = sum(linear.shape[0] * linear.shape[1] for block in report.blocks for linear in block.linears)
    assert report.adapter.bits_per_weight == pytest.approx(32 * count / blocks)
    head = AutoModelForCausalLM.from_pretrained(tiny_model).get_output_embeddings().weight.numel()
    assert report.size.quantized_weights == blocks + (head if case.head else 0)


def test_scales_tuned_end_to_end_leave_the_count_as_it_is(small_model: Path, tmp_path: Path) -> None:
    tuned: dict[str, Any] = {"method": "signround", "steps": 2, "batch_size": 2, "scale_steps": 2}
    result = run_job(small_model, tmp_path, formats=["native"], **tuned)
    assert result.report.scales is not None
    assert_counted(result.report, small_model, tmp_path / "output")


def test_a_stored_copy_of_a_tied_head_is_no_parameter(small_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    tied = save_random_model(folder, "llama", dtype=torch.bfloat16, vocab_size=400)
    for file in small_model.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    report = run_job(folder, tmp_path / "job").report
    assert report.model.parameters == tied.num_parameters()
    assert 8 * report.size.bytes_original / report.model.parameters == 16


def test_modules_are_the_model_s_own_again_when_training_ends(small_model: Path) -> None:
    """Such that what is planned then, after memory ran out, counts every weight."""
    model = StreamedModel.open(Checkpoint.open(small_model), torch.device("cpu"))
    names = set(model.linears()) - {model.layout.head}
    shapes = {name: parameter.shape for name, parameter in model.model.named_parameters()}
    part = Finetune(dataset=BuiltinText())
    before = plan_training(model, names, part, 64)

    def load(index: int) -> dict[str, LinearResult]:
        inside = [name for name in names if name.startswith(model.layout.block(index) + ".")]
        return {name: _rounded(model.checkpoint.read(model.sources[f"{name}.weight"])) for name in inside}

    with resident(model, load, lambda _linears, _seed: {}, Residence(64, keeps=True, recomputed=0), seed=0):
        assert all(parameter.device.type == "cpu" for parameter in model.model.parameters())
    assert {name: parameter.shape for name, parameter in model.model.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in model.model.parameters())
    assert plan_training(model, names, part, 64) == before


def _rounded(weight: torch.Tensor) -> LinearResult:
    from app.domain.methods import Scheme

    scale = weight.float().abs().amax(1, keepdim=True) / 7
    codes = ((weight.float() / scale).round() + 8).to(torch.uint8)
    scheme = Scheme(bits=4, group_size=-1, symmetric=True)
    return LinearResult(AffineWeight(codes, scale, None, scheme, weight.dtype))
