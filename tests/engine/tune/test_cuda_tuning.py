"""Tuning on a GPU: captured, eager and CPU steps agree, on every architecture, with and without hand-fused blocks."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.domain.methods import ApiQSpec, OmniQuantSpec, Scheme, SchemeName, SignRoundSpec, WeightSpec
from tests.engine.model.random_models import LENGTH, PECULIARITIES, save_random_model
from workers.contracts.blocks import BlockTask
from workers.contracts.results import BlockResult
from workers.engine.device import cuda_graphs
from workers.engine.model import fused_blocks
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.registry import method_of
from workers.engine.tune import tuner as tuner_module
from workers.engine.tune.tuner import Tuner
from workers.methods import apiq
from workers.methods.sign_round import SignRound
from workers.numerics.backends.rounding import float_rounding_operators
from workers.numerics.clipping import clipped_groups
from workers.numerics.floats import tuned_floats
from workers.numerics.quantized import LinearResult

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch says so of a backward's thread whose first call is a product, and goes on.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]
STEPS = 24
CAUSES = 6
"""Independent numbers behind a token's hidden state."""
SCHEME = Scheme(bits=3, group_size=16, symmetric=False)


@dataclass(frozen=True)
class Tuned:
    """Outcome of one block: the gradient of the first step, the codes and the losses."""

    gradient: Tensor
    codes: Tensor
    loss_initial: float
    loss: float
    log: list[str]


SIGN_ROUND = SignRoundSpec(steps=STEPS, batch_size=4, scale_search=False)
LEARNED: dict[str, WeightSpec] = {
    "omniquant": OmniQuantSpec(epochs=3, batch_size=4),
    "apiq": ApiQSpec(steps=STEPS, batch_size=4, rank=8),
    "apiq of a rank that is no multiple of 16": ApiQSpec(steps=STEPS, batch_size=4, rank=5),
    "apiq from signround": ApiQSpec(steps=STEPS, batch_size=4, rank=16, base="signround"),
    "apiq frozen": ApiQSpec(steps=STEPS, batch_size=4, rank=16, freeze_base=True),
}


def tune(
    folder: Path,
    device: str,
    index: int = 0,
    micro_batch: int = 4,
    scheme: Scheme = SCHEME,
    spec: WeightSpec = SIGN_ROUND,
    bases: dict[str, LinearResult] | None = None,
) -> Tuned:
    """Tunes one block of a checkpoint on random hidden states, the same everywhere.

    Their channels go together, as a model's do: for independent ones rounding to nearest leaves nothing to gain.

    bases   results of another method that `spec` starts from: where empty, those of this run are left there; None to
            start from this run's own
    """
    place = torch.device(device)
    model = StreamedModel.open(Checkpoint.open(folder), place)
    forward = model.capture_calls(LENGTH)[index]
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(CAUSES, model.config.get_text_config().hidden_size, generator=generator)
    inputs = torch.randn(32, LENGTH, CAUSES, generator=generator) @ mixing
    inputs = inputs.to(place, model.dtype)
    log: list[str] = []

    def quantize(task: BlockTask, spec: WeightSpec) -> BlockResult:
        if bases:
            return BlockResult({name: moved(base, place) for name, base in bases.items()})
        result = method_of(spec).quantize_block(task, spec)
        if bases is not None:
            bases.update(result.linears)
        return result

    with model.loaded(model.layout.block(index)), torch.no_grad():
        block = model.blocks[index]
        linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        targets = forward(block, inputs)
        task = BlockTask(
            index=index,
            block=block,
            forward=forward,
            inputs=inputs,
            inputs_fp=inputs,
            targets=targets,
            schemes=dict.fromkeys(linears, scheme),
            joined=model.joined(index),
            input_amax={name: inputs.abs().max().float().reshape(1) for name in linears},
            second_moments={},
            scale_dtype=model.dtype,
            device=place,
            seed=3,
            micro_batch=micro_batch,
            tick=lambda _: None,
            tune=lambda *_: None,  # type: ignore[arg-type]
            quantize=quantize,
        )
        first = one_step_gradient(task)
        task = replace(task, tune=Tuner(lambda event, **_: log.append(event)).tune)
        with torch.enable_grad():
            result = method_of(spec).quantize_block(task, spec)
    assert result.loss is not None
    assert result.loss_initial is not None
    codes = torch.cat([linear.weight.codes.flatten().cpu() for linear in result.linears.values()])
    return Tuned(first, codes, float(result.loss_initial), float(result.loss), log)


def moved(result: LinearResult, device: torch.device) -> LinearResult:
    affine = result.affine
    zero = None if affine.zero_point is None else affine.zero_point.to(device)
    weight = replace(affine, codes=affine.codes.to(device), scale=affine.scale.to(device), zero_point=zero)
    return replace(result, weight=weight)


def one_step_gradient(task: BlockTask) -> Tensor:
    tuner = Tuner()
    with torch.enable_grad():
        SignRound().quantize_block(
            replace(task, tune=tuner.tune), SignRoundSpec(steps=1, batch_size=4, scale_search=False)
        )
    run = Spy.last
    assert run is not None
    return torch.cat([flat.gradient.flatten().double().cpu() for flat in run.block.flats])


class Spy:
    """The tuner's last run, whose gradients are looked at."""

    last: Any = None


@pytest.fixture(autouse=True)
def spied(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = tuner_module._Run.begin.__func__  # type: ignore[attr-defined]

    def watch(cls: Any, *given: Any, **named: Any) -> Any:
        Spy.last = begin(cls, *given, **named)
        return Spy.last

    monkeypatch.setattr(tuner_module._Run, "begin", classmethod(watch))


def assert_agree(one: Tuned, other: Tuned, *, gradient: float, codes: float, loss: float) -> None:
    difference = float((one.gradient - other.gradient).norm() / other.gradient.norm())
    assert difference <= gradient
    assert float((one.codes == other.codes).double().mean()) >= codes
    assert one.loss == pytest.approx(other.loss, rel=loss)
    assert one.loss < one.loss_initial


def test_graph_eager_and_cpu_agree_in_full_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32
    save_random_model(tmp_path, "llama")
    captured, on_cpu = tune(tmp_path, "cuda"), tune(tmp_path, "cpu")
    assert captured.log == []
    assert_agree(captured, on_cpu, gradient=1e-5, codes=0.999, loss=1e-3)

    def refuse(*_: object) -> None:
        raise RuntimeError("no capture")

    monkeypatch.setattr(cuda_graphs, "capture", refuse)
    eager = tune(tmp_path, "cuda")
    assert eager.log == ["capture_failed"]
    assert_agree(captured, eager, gradient=1e-5, codes=0.999, loss=1e-3)
    monkeypatch.setattr(fused_blocks, "fuse", lambda block, _: block)
    assert_agree(tune(tmp_path, "cuda"), on_cpu, gradient=1e-5, codes=0.999, loss=1e-3)


@pytest.mark.parametrize("name", [SchemeName.NVFP4A16, SchemeName.NVFP4, SchemeName.MXFP4, SchemeName.FP8])
def test_grids_of_floats_agree_and_are_captured(
    name: SchemeName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rounded inputs too, whose numbers are the block's; Triton's kernels and the plain steps give the same."""
    save_random_model(tmp_path, "llama")
    scheme = Scheme.named(name)
    captured, on_cpu = (tune(tmp_path, device, scheme=scheme) for device in ("cuda", "cpu"))
    assert captured.log == []
    exact = scheme.row is not None and scheme.row.activations is None
    # A rounded input next to a tie goes another way for another order of a sum.
    limits = {"gradient": 1e-5, "codes": 0.999, "loss": 1e-3} if exact else {"gradient": 0.1, "codes": 0.9, "loss": 0.1}
    assert_agree(captured, on_cpu, **limits)
    with monkeypatch.context() as patched:
        patched.setattr(tuned_floats, "float_rounding_kernels", lambda *_: float_rounding_operators)
        plain = tune(tmp_path, "cuda", scheme=scheme)
    assert plain.log == []
    assert_agree(captured, plain, gradient=1e-6, codes=0.9999, loss=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LEARNED)
def test_clipped_ranges_and_low_rank_factors_agree_and_are_captured(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels of a captured step, torch's operators on the same GPU, and the CPU.

    All from the same codes where another method's are the start: after two hundred steps by signs a sixth of the codes
    of a block so small is another one where inputs differ by 4e-6, on a CPU alone, too.
    """
    save_random_model(tmp_path, "llama", dtype=dtype)
    bases: dict[str, LinearResult] = {}
    on_cpu, captured = (tune(tmp_path, device, spec=LEARNED[name], bases=bases) for device in ("cpu", "cuda"))
    assert captured.log == []
    exact = dtype == torch.float32
    limits = {"gradient": 1e-5 if exact else 0.05, "codes": 0.98 if exact else 0.9, "loss": 0.02 if exact else 0.2}
    assert_agree(captured, on_cpu, **limits)
    own, again = (tune(tmp_path, "cuda", spec=LEARNED[name]) for _ in range(2))
    assert own.log == []
    assert torch.equal(own.codes, again.codes)
    assert own.loss < own.loss_initial
    with monkeypatch.context() as patched:
        patched.setattr(clipped_groups, "clipping_kernels", lambda *_: None)
        patched.setattr(apiq, "factor_kernels", lambda *_: None)
        plain = tune(tmp_path, "cuda", spec=LEARNED[name], bases=bases)
    assert plain.log == []
    assert_agree(captured, plain, **limits)


def test_half_precision_agrees_where_no_sign_decides(tmp_path: Path) -> None:
    """The start's loss and the first gradient; later on, a few signs that rounding turns lead such small blocks apart.

    `benchmarks.blocks.agreement` compares the losses of real blocks after all steps.
    """
    save_random_model(tmp_path, "llama", dtype=torch.bfloat16)
    on_gpu, on_cpu = tune(tmp_path, "cuda"), tune(tmp_path, "cpu")
    assert on_gpu.loss_initial == pytest.approx(on_cpu.loss_initial, rel=0.01)
    assert float((on_gpu.gradient - on_cpu.gradient).norm() / on_cpu.gradient.norm()) < 0.05
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=0.2)
    assert on_gpu.loss < 0.7 * on_gpu.loss_initial


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("architecture", PECULIARITIES)
def test_every_architecture_is_captured(
    architecture: str, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr(fused_blocks, "fuse", lambda block, _: block)
    save_random_model(tmp_path, architecture)
    for index in (0, 1):
        on_gpu, on_cpu = tune(tmp_path, "cuda", index), tune(tmp_path, "cpu", index)
        assert on_gpu.log == []
        assert_agree(on_gpu, on_cpu, gradient=1e-4, codes=0.995, loss=5e-3)


def test_micro_batches_agree_with_a_whole_batch(tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama")
    whole, parts = tune(tmp_path, "cuda"), tune(tmp_path, "cuda", micro_batch=2)
    assert_agree(parts, whole, gradient=1e-5, codes=0.999, loss=1e-3)
