"""Block types end to end: what is written is what is stored, gradients are autograd's, and a job ships it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants
from safetensors.torch import load_file
from torch import Tensor

from app.domain.methods import BLOCK_SCHEMES, Scheme, SchemeName
from tests.engine.conftest import finish, run_job
from workers.engine.scales.block_family import BlockFamily, Layout
from workers.engine.scales.memory_plan import ScaleTask, Skipped
from workers.engine.scales.tuning import ScaleOutcome, tune_scales
from workers.formats.load_bitwright import load_weights
from workers.numerics.blocks.search import search_blocks
from workers.numerics.quantized import BlockWeight
from workers.tiny_model import Recipe, make_tiny_model

every_type = pytest.mark.parametrize("name", sorted(BLOCK_SCHEMES))
ROWS, COLUMNS = 3, 512


def family_of(
    name: SchemeName, dtype: torch.dtype = torch.float32, *, moving: bool = False
) -> tuple[BlockFamily, Tensor, BlockWeight, Tensor]:
    """A family of two linears, the second's weight, what it was quantized to, and the start of p's derivative."""
    generator = torch.Generator().manual_seed(4)
    originals = [torch.randn(ROWS, COLUMNS, generator=generator).to(dtype) for _ in range(2)]
    made = [search_blocks(each, Scheme.named(name)) for each in originals]
    width = made[0].kind.columns
    count = ROWS * COLUMNS // width
    value = torch.zeros(2 * count, width, dtype=dtype)
    family = BlockFamily(2 * count, width, made[0].scheme, value, moving=moving)
    starts = [
        family.put(slice(at * count, (at + 1) * count), weight, original)
        for at, (weight, original) in enumerate(zip(made, originals, strict=True))
    ]
    return family, originals[1], made[1], torch.cat(starts)


def second(family: BlockFamily) -> slice:
    return slice(len(family.value) // 2, len(family.value))


def stored_as(family: BlockFamily, made: BlockWeight, change: Tensor) -> BlockWeight:
    """The second linear as it would be stored."""
    found: dict[str, Any] = {
        key: tensor.view(ROWS, -1) for key, tensor in family.stored(second(family), change).items()
    }
    if family.codes is not None:
        found["codes"] = family.codes.codes(second(family)).view(ROWS, COLUMNS)
    return replace(made, **found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moving", [False, True])
@every_type
def test_what_is_written_is_what_is_stored_to_the_bit(name: SchemeName, moving: bool, dtype: torch.dtype) -> None:
    family, _, made, start = family_of(name, dtype, moving=moving)
    change = torch.zeros(len(start))
    family.write(change)
    assert torch.equal(family.value[second(family)].view(ROWS, COLUMNS), made.dequantize())
    same = stored_as(family, made, change[len(change) // 2 :])
    for part in ("codes", "scale", "scale_codes", "minimum", "minimum_codes"):
        one, other = getattr(same, part), getattr(made, part)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    change = torch.empty(len(start)).uniform_(-0.15, 0.15, generator=torch.Generator().manual_seed(5))
    if family.codes is not None:
        family.codes.place.add_(torch.empty_like(family.codes.place).uniform_(-0.6, 0.6))
    family.write(change)
    changed = stored_as(family, made, change[len(change) // 2 :])
    assert not torch.equal(changed.scale, made.scale)
    assert torch.equal(family.value[second(family)].view(ROWS, COLUMNS), changed.dequantize())


def straight_through(free: Tensor, rounded: Tensor) -> Tensor:
    return free + (rounded - free).detach()


def by_formula(made: BlockWeight, p: Tensor) -> Tensor:
    """The weight of p (rows * blocks, numbers of a block) in fp64, from the definition of a block."""
    kind, layout = made.kind, Layout.of(made.kind)
    blocks, parts = len(p), kind.weights // kind.columns

    def level(scale: Tensor, codes: Tensor | None, integers: Any, of_codes: slice, own: slice) -> Tensor:
        free = scale.double().view(-1, 1) * (1 + p[:, own])
        d = straight_through(free, free.half().double())
        if codes is None:
            return d.expand(blocks, parts)
        number = codes.double().view(blocks, parts) * integers.step + integers.first
        moved = number * (1 + p[:, of_codes])
        k = ((moved - integers.first) / integers.step).round().clamp(0, integers.largest)
        return d * straight_through(moved, k * integers.step + integers.first)

    factor = level(made.scale, made.scale_codes, kind.scales, layout.factors, layout.scale)
    levels = torch.tensor(kind.levels, dtype=torch.float64)[made.codes.long()].view(blocks, parts, kind.columns)
    weight = levels * factor.unsqueeze(-1)
    if made.minimum is not None:
        offset = level(made.minimum, made.minimum_codes, kind.minimums, layout.offsets, layout.minimum)
        weight = weight + (-offset if kind.minimums else offset).unsqueeze(-1)
    return weight.view(made.shape)


@every_type
def test_the_gradient_is_that_of_rounding_straight_through(name: SchemeName) -> None:
    family, _, made, start = family_of(name, torch.float64)
    generator = torch.Generator().manual_seed(6)
    change = torch.empty(len(start), dtype=torch.float64).uniform_(-0.02, 0.02, generator=generator)
    family.write(change)
    own = slice(len(start) // 2, len(start))
    p = change[own].view(-1, Layout.of(made.kind).size).clone().requires_grad_()
    weight = by_formula(made, p)
    torch.testing.assert_close(family.value[second(family)].view(ROWS, COLUMNS), weight.detach(), rtol=1e-6, atol=1e-7)
    by_output, x = (torch.randn(7, n, dtype=torch.float64, generator=generator) for n in (ROWS, COLUMNS))
    (expected,) = torch.autograd.grad(((x @ weight.T) * by_output).sum(), p)
    gradient = torch.zeros(len(start) // 2, dtype=torch.float64)
    receive = family.receiver(second(family), gradient)
    receive(by_output, x)
    torch.testing.assert_close(gradient * start[own], expected.flatten(), rtol=1e-9, atol=1e-9)
    receive(by_output, x)
    torch.testing.assert_close(gradient * start[own], 2 * expected.flatten(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["q3_k", "q2_k", "iq3_s"])
def test_codes_move_against_their_gradients_whatever_the_sign_of_the_factor(name: str) -> None:
    family, _, made, _ = family_of(SchemeName(name), moving=True)
    codes, zero = family.codes, torch.zeros(len(family_of(SchemeName(name))[3]))
    assert codes is not None
    family.write(zero)
    before = family.value.clone()
    direction = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(7))
    gradient = torch.zeros(len(zero) // 2)
    # One token for each row: D is the direction itself.
    for row in range(ROWS):
        unit = torch.zeros(1, ROWS)
        unit[0, row] = 1
        family.receiver(second(family), gradient)(unit, direction[row : row + 1])
    one = torch.ones(())
    codes.move(one * 1.2, (one * 0.1, one * 0.05), (0.9, 0.95))
    family.write(zero)
    moved = (family.value - before)[second(family)].view(ROWS, COLUMNS)
    assert torch.equal(before[: second(family).start], family.value[: second(family).start])
    assert moved.count_nonzero() > 0.2 * moved.numel()
    assert float((moved * direction).sum()) < 0
    if name != "iq3_s":
        assert not bool((moved * direction > 1e-6).any())
    assert stored_as(family, made, zero[len(zero) // 2 :]).codes.dtype == torch.uint8


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained Llama blocks whose rows are all whole super-blocks."""
    recipe = Recipe(vocabulary=300, width=256, intermediate=512, blocks=2, positions=256, steps=25, batch=4, length=48)
    return make_tiny_model(tmp_path_factory.mktemp("models") / "wide", recipe)


SMALL: dict[str, Any] = {
    "method": "signround",
    "scheme": "q2_k",
    "steps": 4,
    "batch_size": 4,
    "scale_steps": 20,
    "modules": {"overrides": {"*.down_proj": {"scheme": "iq3_s"}, "*.v_proj": {"scheme": "q3_k"}}},
    "calibration": {"num_samples": 24, "sequence_length": 48},
    "formats": ["gguf", "native"],
}


def decoded(file: Path) -> dict[str, np.ndarray]:
    """Tensors of a file, by the package gguf's decoders."""
    return {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(file).tensors}


@pytest.mark.slow
def test_a_job_ships_what_its_stage_measured_and_another_attempt_goes_on_with_it(
    wide_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In so few steps codes would hardly get anywhere.
    monkeypatch.setattr("workers.engine.scales.moving_codes.PACE_CODES", 0.8)
    outcomes: list[ScaleOutcome] = []

    def watched(task: ScaleTask) -> ScaleOutcome | Skipped:
        found = tune_scales(task)
        assert isinstance(found, ScaleOutcome)
        outcomes.append(found)
        return found

    monkeypatch.setattr("workers.engine.scales.stage.tune_scales", watched)
    whole = finish(wide_model, tmp_path / "whole", **SMALL)
    scales = whole.report.scales
    assert scales is not None
    assert scales.kept
    assert scales.kl < scales.kl_initial
    assert scales.norms == 4
    assert scales.codes
    output = whole.workspace / "output"
    weights, file = load_weights(output / "native"), decoded(output / "gguf" / "model.gguf")
    for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v"), ("mlp.up_proj", "ffn_up")):
        for index in range(2):
            expected = weights[f"model.layers.{index}.{ours}.weight"]
            found = torch.from_numpy(file[f"blk.{index}.{theirs}.weight"].astype(np.float32))
            assert torch.equal(found.to(expected.dtype), expected)
    name, own = "model.layers.1.mlp.up_proj", outcomes[0]
    parts = {part: own.scales[f"{name}.{part}"] for part in ("scale", "scale_codes", "minimum", "minimum_codes")}
    measured = BlockWeight(own.codes[name], parts["scale"], Scheme.named(SchemeName.Q2_K), torch.bfloat16)
    measured = replace(
        measured,
        scale_codes=parts["scale_codes"],
        minimum=parts["minimum"],
        minimum_codes=parts["minimum_codes"],
    )
    assert torch.equal(measured.dequantize(), weights[f"{name}.weight"])
    plain = finish(wide_model, tmp_path / "plain", **(SMALL | {"scale_steps": 0}))
    before, after = (load_file(each.workspace / "output/native/weights.safetensors") for each in (plain, whole))
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed >= {"codes", "scale", "weight"}

    def interrupt(*_: object, **__: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr("workers.engine.evaluate.measure", interrupt)
        with pytest.raises(InterruptedError):
            run_job(wide_model, tmp_path / "again", **SMALL)
    monkeypatch.setattr("workers.engine.scales.stage.tune_scales", interrupt)
    report = run_job(wide_model, tmp_path / "again", **SMALL).report
    assert report.quality == whole.report.quality
    again = load_file(tmp_path / "again/output/native/weights.safetensors")
    assert all(torch.equal(after[name], again[name]) for name in after)
