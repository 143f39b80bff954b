"""Sums over activations: exact, each tensor once, and never an fp32 copy of the activations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from app.domain.methods import Scheme
from tests.engine.model.random_models import LENGTH, VOCABULARY, save_random_model
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.plan import Plan
from workers.engine.quantize import activations
from workers.engine.quantize.activations import Activations, column_squares, second_moments
from workers.engine.quantize.block_report import error_sums
from workers.methods.rtn import quantize_weight

SMALL = {"cpu": 300}
PLAN = Plan(
    device="cpu",
    world_size=1,
    threads=1,
    dtype="float32",
    scale_dtype=torch.float32,
    micro_batch=2,
    pass_batch=2,
    torch_version=torch.__version__,
    activations="host",
    activation_bytes=0,
    activation_budget=None,
)


class Gated(nn.Module):
    """Two linears on one input, one on their product; the input changes in place in between if asked."""

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        gate = self.gate(x)
        if self.in_place:
            x += 1
        down: Tensor = self.down(gate * self.up(x))
        return down


def squares(x: Tensor) -> Tensor:
    return x.double().square().flatten(0, -2).sum(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_column_squares_are_those_of_fp64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "CHUNK_ELEMENTS", SMALL)
    for shape in ((5, 31, 24), (7, 24), (1, 1, 400)):
        x = (torch.randn(shape) * 30).to(dtype)
        kept = x.clone()
        torch.testing.assert_close(column_squares(x), squares(x), rtol=1e-6, atol=0)
        assert torch.equal(x, kept)
        # What stands in for it on a GPU, where it makes no copies.
        norms = torch.linalg.vector_norm(x.flatten(0, -2), dim=0, dtype=torch.float32).double()
        torch.testing.assert_close(norms.square(), squares(x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("in_place", [False, True])
def test_each_linear_has_the_moments_of_what_it_was_called_with(
    in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed: list[int] = []

    def noted(x: Tensor) -> Tensor:
        summed.append(x.shape[-1])
        return column_squares(x)

    monkeypatch.setattr(activations, "column_squares", noted)
    torch.manual_seed(0)
    module = Gated(in_place=in_place)
    parts = [torch.randn(3, 5, 24), torch.randn(2, 5, 24)]
    names = ("gate", "up", "down")
    with torch.no_grad(), second_moments({name: getattr(module, name) for name in names}) as moments:
        for part in parts:
            module(part)
        assert {tensor.dtype for tensor in moments.values()} == {torch.float64}
    x = torch.cat(parts)
    later = x + 1 if in_place else x
    inner = module.gate(x) * module.up(later)
    assert {tensor.dtype for tensor in moments.values()} == {torch.float32}
    for name, seen in zip(names, (x, later, inner), strict=True):
        torch.testing.assert_close(moments[name].double(), squares(seen), rtol=1e-5, atol=0)
    assert len({tensor.data_ptr() for tensor in moments.values()}) == 3
    assert summed == ([24, 24, 40] if in_place else [24, 40]) * 2
    summed.clear()
    module(x)
    assert summed == [], "nobody watches after the context"


def open_stream(
    folder: Path, *, keep_inputs: bool, dtype: torch.dtype = torch.float32
) -> tuple[StreamedModel, Activations]:
    save_random_model(folder, "llama", dtype=dtype)
    model = StreamedModel.open(Checkpoint.open(folder), torch.device("cpu"))
    ids = torch.randint(VOCABULARY, (5, LENGTH), generator=torch.Generator().manual_seed(1))
    with model.loaded(*model.layout.outer):
        return model, Activations(model, ids, PLAN, keep_inputs=keep_inputs)


def test_inputs_are_kept_where_they_are_needed_and_outputs_are_the_same(tmp_path: Path) -> None:
    model, kept = open_stream(tmp_path, keep_inputs=True)
    _, plain = open_stream(tmp_path, keep_inputs=False)
    assert plain.inputs_fp is None
    for index, block in enumerate(model.blocks):
        with model.loaded(model.layout.block(index)):
            before = kept.original.clone()
            for stream in (kept, plain):
                stream.advance_original(index, block)
            assert kept.inputs_fp is not None
            assert torch.equal(kept.inputs_fp, before)
            assert torch.equal(kept.original, plain.original)
            assert not torch.equal(kept.original, before)
    kept.rewind(model)
    assert kept.inputs_fp is None, "its memory is let go"
    _, fresh = open_stream(tmp_path, keep_inputs=False)
    assert torch.equal(kept.quantized, fresh.quantized)


def test_the_squared_error_is_that_of_fp64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, stream = open_stream(tmp_path, keep_inputs=False)
    stream.quantized.add_(torch.randn_like(stream.quantized))
    kept = stream.original.clone()
    for chunk in (1, 3000, 1 << 20):
        monkeypatch.setattr(activations, "CHUNK_ELEMENTS", {"cpu": chunk})
        expected = [(stream.original.double() - stream.quantized.double()).square().sum(), kept.double().square().sum()]
        torch.testing.assert_close(stream.squared_error(), torch.stack(expected), rtol=1e-6, atol=0)
    assert torch.equal(stream.original, kept)


def test_error_sums_are_those_of_fp64() -> None:
    torch.manual_seed(0)
    weight, moments = torch.randn(48, 64).to(torch.bfloat16), torch.rand(64)
    w_hat = quantize_weight(weight, Scheme(bits=3, group_size=32, symmetric=True), torch.bfloat16).dequantize()
    w, change = weight.double(), w_hat.double() - weight.double()
    plain = [change.square().sum(), w.square().sum()]
    weighted = [(change.square() * moments).sum(), (w.square() * moments).sum()]
    torch.testing.assert_close(error_sums(w_hat, weight, None), torch.stack(plain), rtol=1e-6, atol=0)
    torch.testing.assert_close(error_sums(w_hat, weight, moments), torch.stack(plain + weighted), rtol=1e-6, atol=0)


class LargestCopy(TorchDispatchMode):
    """Notes the most elements of any fp32 or fp64 tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, torch.float64):
                self.elements = max(self.elements, tensor.numel())
        return found


def test_no_activations_are_copied_to_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = 512
    monkeypatch.setattr(activations, "CHUNK_ELEMENTS", {"cpu": chunk})
    _, stream = open_stream(tmp_path, keep_inputs=False, dtype=torch.bfloat16)
    module, x = Gated().to(torch.bfloat16), torch.randn(8, 32, 24).to(torch.bfloat16)
    with torch.no_grad(), LargestCopy() as seen:
        with second_moments({"gate": module.gate, "down": module.down}):
            module(x)
        assert 0 < seen.elements <= chunk < x.numel()
        stream.squared_error()
    assert seen.elements <= max(chunk, stream.original[0].numel()) < stream.original.numel()
