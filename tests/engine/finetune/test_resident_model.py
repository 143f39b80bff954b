"""The resident model against transformers' own forward and autograd: loss, gradients, packing."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.domain.methods import Scheme
from tests.engine.finetune.small_lora import SmallLoRA, attach_small
from tests.engine.model.random_models import LENGTH, VOCABULARY, random_model, save_random_model
from tests.engine.text.test_examples import random_examples
from workers.contracts.adapters import TrainableAdapter
from workers.engine.finetune.resident_model import Residence, ResidentModel, resident
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.text.packing import Batch, PackedSequences, batch_of
from workers.numerics.quantized import AffineWeight, LinearResult, LowRank

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]


def quantized(weight: Tensor) -> LinearResult:
    """4 bits in groups of 8, rounded to nearest."""
    groups = weight.detach().float().view(weight.shape[0], -1, 8)
    scale = groups.abs().amax(-1).clamp(min=1e-6) / 7
    codes = (groups / scale.unsqueeze(-1)).round().clamp(-8, 7) + 8
    scheme = Scheme(bits=4, group_size=8, symmetric=True)
    return LinearResult(AffineWeight(codes.view(weight.shape).to(torch.uint8), scale, None, scheme, weight.dtype))


def results_of(model: StreamedModel, index: int) -> dict[str, LinearResult]:
    prefix = model.layout.block(index)
    names = [f"{prefix}.{name}" for name in model.block_linears(index)]
    return {name: quantized(model.checkpoint.read(model.sources[f"{name}.weight"])) for name in names}


def seeded(dtype: torch.dtype) -> Any:
    def attach(linears: Any, seed: int) -> dict[str, TrainableAdapter]:
        found = attach_small(linears, dtype)
        generator = torch.Generator().manual_seed(seed)
        for module in found.values():
            assert isinstance(module, SmallLoRA)
            module.b.data = torch.randn(module.b.shape, dtype=dtype, generator=generator) / 10
        return found

    return attach


@contextmanager
def open_job(folder: Path, dtype: torch.dtype, *, keeps: bool = True, recomputed: int = 0) -> Iterator[ResidentModel]:
    model = StreamedModel.open(Checkpoint.open(folder), torch.device("cpu"))
    how = Residence(length=LENGTH, keeps=keeps, recomputed=recomputed)
    with resident(model, partial(results_of, model), seeded(dtype), how, seed=0) as found:
        yield found


def batches(together: bool, longest: int = LENGTH) -> list[Batch]:
    packed = PackedSequences.pack(random_examples(12, longest, seed=3), LENGTH, together=together)
    return [batch_of(packed, rows) for rows in torch.arange(len(packed)).split(3)]


def gradients(model: ResidentModel, work: list[Batch]) -> tuple[float, list[Tensor]]:
    """The loss of some batches, and its gradients by all parameters of adapters, in order."""
    parameters = [p for adapter in model.adapters.values() for p in adapter.parameters()]
    losses = [model.loss(batch) for batch in work]
    total = torch.stack(losses).sum()
    return float(total.detach()), list(torch.autograd.grad(total, parameters))


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    scale = max(float(e.abs().max()) for e in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_the_plain_model(architecture: str, tmp_path: Path) -> None:
    """The oracle: transformers' model in fp64 with dense weights W_hat + b a, one example at a time, under autograd.

    Its norms round to fp32 also in fp64, which sets the tolerance.
    """
    examples = random_examples(12, LENGTH, seed=3)
    save_random_model(tmp_path, architecture, dtype=torch.float64)
    plain = random_model(architecture, dtype=torch.float64)
    with open_job(tmp_path, torch.float64) as model:
        loss, found = gradients(model, batches(together=True))
        parameters: list[Tensor] = []
        dense = {}
        for name, adapter in model.adapters.items():
            assert isinstance(adapter, SmallLoRA)
            base = quantized(plain.get_submodule(name).weight).dequantize()
            parameters += [adapter.a, adapter.b]
            dense[f"{name}.weight"] = base + adapter.b @ adapter.a
        expected = torch.zeros((), dtype=torch.float64)
        for example in examples:
            ids = example.ids.long()
            logits = torch.func.functional_call(plain, dense, (ids[None],), {"use_cache": False}).logits[0, :-1]
            losses = nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            expected = expected + losses[example.loss_mask[1:]].sum()
        assert loss == pytest.approx(float(expected.detach()), rel=1e-7)
        assert_close(found, list(torch.autograd.grad(expected, parameters)), 1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_packing_changes_nothing_in_fp64(architecture: str, tmp_path: Path) -> None:
    save_random_model(tmp_path, architecture, dtype=torch.float64)
    with open_job(tmp_path, torch.float64) as model:
        packed, alone = batches(together=True, longest=20), batches(together=False, longest=20)
        assert sum(batch.documents is not None for batch in packed) == len(packed)
        assert all(batch.documents is None for batch in alone)
        assert sum(batch.tokens for batch in packed) == sum(batch.tokens for batch in alone)
        loss, found = gradients(model, packed)
        expected_loss, expected = gradients(model, alone)
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert_close(found, expected, 1e-11)


def test_weights_made_anew_and_blocks_computed_again_change_no_bit(tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama", dtype=torch.bfloat16)
    work = batches(together=True)
    found = []
    for keeps, recomputed in ((True, 0), (False, 0), (False, 4), (True, 2)):
        with open_job(tmp_path, torch.float32, keeps=keeps, recomputed=recomputed) as model:
            found.append(gradients(model, work))
    for loss, each in found[1:]:
        assert loss == found[0][0]
        assert all(torch.equal(one, other) for one, other in zip(each, found[0][1], strict=True))


class DroppingLoRA(SmallLoRA):
    """With dropout of half its inputs."""

    draws_noise = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5))


@pytest.mark.parametrize("draws", [True, False])
def test_blocks_that_are_computed_again_draw_what_they_drew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, draws: bool
) -> None:
    """Where an adapter says that it draws; then their passes are not captured."""
    monkeypatch.setattr(DroppingLoRA, "draws_noise", draws)
    monkeypatch.setattr("tests.engine.finetune.small_lora.SmallLoRA", DroppingLoRA)
    save_random_model(tmp_path, "llama", dtype=torch.bfloat16)
    work, found = batches(together=True)[:1], []
    for recomputed in (0, 4):
        with open_job(tmp_path, torch.float32, recomputed=recomputed) as model:
            assert model.is_capturable == (not recomputed or not draws)
            torch.manual_seed(3)
            found.append(gradients(model, work))
    (loss, expected), (again, each) = found
    assert loss == again
    assert all(torch.equal(one, other) for one, other in zip(each, expected, strict=True)) == draws


def test_half_precision_models_compute_in_bf16(tmp_path: Path) -> None:
    save_random_model(tmp_path, "qwen2", dtype=torch.float16)
    with open_job(tmp_path, torch.float32) as model:
        assert model.hidden(batches(together=True)[0]).dtype == torch.bfloat16
        loss, found = gradients(model, batches(together=True))
    assert {gradient.dtype for gradient in found} == {torch.float32}
    targets = sum(len(batch.target_positions) for batch in batches(together=True))
    assert 0.5 < loss / targets / torch.log(torch.tensor(VOCABULARY)) < 2


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama")
    with open_job(tmp_path, torch.float32) as found:
        model = found.model
    assert all(parameter.is_meta for parameter in model.model.parameters())
    assert all(isinstance(linear, nn.Linear) for linear in model.linears().values())
    assert len(model.linears()) == 4 * 7 + 1


def test_a_low_rank_correction_stays_where_no_adapter_takes_it_over(tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama")
    model = StreamedModel.open(Checkpoint.open(tmp_path), torch.device("cpu"))

    def corrected(index: int) -> dict[str, LinearResult]:
        found = {}
        for name, result in results_of(model, index).items():
            out_features, in_features = result.weight.shape
            a = torch.full((1, in_features), 0.1)
            found[name] = LinearResult(result.weight, LowRank(a, torch.full((out_features, 1), 0.1), 1.0))
        return found

    how = Residence(length=LENGTH, keeps=True, recomputed=0)

    def some(linears: Any, seed: int) -> dict[str, TrainableAdapter]:
        return attach_small({name: result for name, result in linears.items() if name.endswith("q_proj")})

    results = corrected(0)
    with resident(model, corrected, some, how, seed=0) as found:
        assert set(found.adapters) == {f"model.layers.{i}.self_attn.q_proj" for i in range(4)}
        x = torch.eye(32)
        for name, with_correction in (("q_proj", False), ("k_proj", True)):
            result = results[f"model.layers.0.self_attn.{name}"]
            expected = result.dequantize() if with_correction else result.weight.dequantize()
            torch.testing.assert_close(model.blocks[0].get_submodule(f"self_attn.{name}")(x), expected.T)
