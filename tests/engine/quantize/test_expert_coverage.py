"""Tokens per expert, and experts that get few: counted, named, and no worse for it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.domain.attempt_lines import AttemptLine
from app.domain.methods import Scheme
from bitwright.events import BlockEvent, WarningEvent
from bitwright.report import Report
from tests.engine.architectures.proofs import difference
from tests.engine.conftest import run_job
from tests.engine.model.families import save_small_model
from tests.methods.toy_experts import NUMBER, PLACES, STARVED, WIDTH, routed_task
from tests.tiny_experts import BLOCKS, EXPERTS, tiny_experts_folder
from tests.tiny_experts import STARVED as STARVED_MODULE
from workers.contracts.experts import experts_of
from workers.contracts.tuning import TuningSettings
from workers.engine.device.process_group import SINGLE_PROCESS
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.activations import column_squares
from workers.engine.quantize.expert_coverage import borrowed_moments, complete, counted, coverage
from workers.methods.sign_round import rounded_weights

THREE_BITS: dict[str, Any] = {
    "bits": 3,
    "group_size": 32,
    "formats": ["merged"],
    "calibration": {"num_samples": 64, "sequence_length": 64},
    "evaluation": {"num_samples": 16, "sequence_length": 64},
}
SCHEME = Scheme(bits=3, group_size=16, symmetric=True)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def starving_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny mixture with a bias that keeps every token from one expert."""
    folder = tmp_path_factory.mktemp("experts") / "starving"
    shutil.copytree(tiny_experts_folder(), folder)
    tensors = load_file(folder / "model.safetensors")
    block, _, expert = STARVED_MODULE.partition(".mlp.experts.")
    tensors[f"{block}.mlp.gate.e_score_correction_bias"][int(expert)] = -1000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def job(model: Path, workspace: Path, **request: Any) -> tuple[Report, list[AttemptLine]]:
    lines: list[AttemptLine] = []
    return run_job(model, workspace, lines, **{**THREE_BITS, **request}).report, lines


def divergence(report: Report) -> float:
    assert report.quality is not None
    return report.quality.kl_divergence


@pytest.mark.slow
def test_learned_rounding_beats_the_nearest_and_every_expert_is_counted(tmp_path: Path) -> None:
    model = tiny_experts_folder()
    nearest, _ = job(model, tmp_path / "rtn", method="rtn")
    learned, lines = job(model, tmp_path / "signround", method="signround", steps=60)
    assert divergence(learned) <= 2 / 3 * divergence(nearest)
    parts = [part for block in learned.blocks for part in block.experts]
    assert [part.name for part in parts] == [f"model.layers.{index}.mlp.experts" for index in range(BLOCKS)]
    for part in parts:
        assert part.experts == EXPERTS
        assert part.floor == 256
        assert part.tokens_least >= part.floor
        assert part.tokens_least <= part.tokens_median
        assert not part.starved
        assert part.fallback is None
    events = [line for line in lines if isinstance(line, BlockEvent)]
    assert [event.expert_tokens_least for event in events] == [part.tokens_least for part in parts]
    assert [event.experts_starved for event in events] == [0] * BLOCKS


@pytest.mark.parametrize("method", ["signround", "gptq", "awq"])
def test_a_starved_expert_is_named_and_nothing_is_worse_than_the_nearest(
    method: str, starving_model: Path, tmp_path: Path
) -> None:
    nearest, _ = job(starving_model, tmp_path / "rtn", method="rtn")
    steps = {"steps": 60} if method == "signround" else {}
    report, lines = job(starving_model, tmp_path / "job", method=method, **steps)
    assert divergence(report) <= divergence(nearest)
    starved = [part.starved for block in report.blocks for part in block.experts]
    assert starved == [{}, {STARVED_MODULE: 0}]
    (warning,) = [line for line in lines if isinstance(line, WarningEvent) and line.code == "experts_starved"]
    assert STARVED_MODULE in warning.message
    assert warning.message in report.warnings
    errors = {linear.name: linear for block in report.blocks for linear in block.linears}
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = errors[f"{STARVED_MODULE}.{name}"]
        assert linear.weight_error < 0.5
        assert linear.output_error is None or linear.output_error < 0.5
    merged = load_file(tmp_path / "job" / "output" / "merged" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in merged.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "request_",
    [
        {"method": "nf", "bits": 4},
        {"method": "omniquant", "preset": "light"},
        {"method": "loftq", "rank": 4},
        {"method": "lq-lora", "rank": 4, "bits": {"average": 3.5, "choices": [3, 4]}},
        {"method": "signround", "steps": 10, "scale_steps": 6},
    ],
    ids=lambda request: request["method"],
)
def test_other_methods_take_experts_that_no_token_reaches(
    request_: dict[str, Any], starving_model: Path, tmp_path: Path
) -> None:
    few = {"num_samples": 8, "sequence_length": 64}
    report, _ = job(starving_model, tmp_path, **{"calibration": few, **request_})
    assert 0 < divergence(report) < 0.2
    assert sum(STARVED_MODULE in linear.name for block in report.blocks for linear in block.linears) == 3


def test_tokens_are_those_that_the_router_chose() -> None:
    task = routed_task(samples=4)
    part = experts_of(task.block)["experts"]
    chosen: list[Tensor] = []
    part.register_forward_pre_hook(lambda _, given: chosen.append(given[1]))
    with counted(task.block, task.device) as tokens:
        for forward in task.passes(task.inputs):
            forward()
    expected = torch.bincount(torch.cat(chosen).flatten(), minlength=NUMBER)
    assert torch.equal(tokens["experts"], expected)
    assert int(expected.sum()) == PLACES * task.inputs[..., 0].numel()
    assert part.seen is None


@pytest.mark.parametrize(("tokens", "group", "floor"), [(12_000, 16, 250), (120_000, 16, 256), (120_000, 48, 256)])
def test_the_floor_is_256_tokens_or_a_quarter_of_an_even_share(tokens: int, group: int, floor: int) -> None:
    task = routed_task(samples=1)
    schemes = {name: Scheme(bits=4, group_size=group, symmetric=True) for name in task.schemes}
    counts = torch.full((NUMBER,), tokens // NUMBER)
    counts[3] = 0
    found = coverage({"experts": counts}, schemes, task.block)
    assert abs(found.floors["experts"] - floor) <= 25
    assert found.starved == {"experts": frozenset({3})}
    assert found.linears(task.block, list(schemes)) == {f"experts.3.{n}" for n in ("gate_proj", "up_proj", "down_proj")}


def test_a_starved_experts_moments_are_those_of_every_token() -> None:
    task = routed_task(samples=4, starves=True)
    with counted(task.block, task.device) as tokens:
        for forward in task.passes(task.inputs):
            forward()
    found = coverage(tokens, task.schemes, task.block)
    assert found.starved["experts"] >= {STARVED}
    names = sorted(found.linears(task.block, list(task.schemes)))
    moments = borrowed_moments(
        task.block, task.forward, task.inputs, found, names, device=task.device, processes=SINGLE_PROCESS
    )
    gate = moments[f"experts.{STARVED}.gate_proj"]
    torch.testing.assert_close(gate, column_squares(task.inputs.view(-1, WIDTH)).float())
    part = experts_of(task.block)["experts"]
    x = task.inputs.view(-1, WIDTH)
    sides = torch.cat([part.linear(STARVED, name)(x) for name in part.sides], -1)
    expected = column_squares(part.activated(sides).detach()).float()
    torch.testing.assert_close(moments[f"experts.{STARVED}.down_proj"], expected)
    assert not part.complete


def test_weights_of_a_starved_expert_stay_at_their_start() -> None:
    task = routed_task(scheme=SCHEME, samples=32)
    starved = frozenset(name for name in task.schemes if name.startswith("experts.2."))
    settings = TuningSettings(12, 8, 1 / 12)
    moments = {name: torch.ones(task.linear(name).in_features) for name in task.schemes}
    task = replace(task, starved=starved, second_moments=moments)
    start = task.tune(task, rounded_weights(task, search=True), replace(settings, steps=0)).linears
    weights = rounded_weights(task, search=True, settings=settings)
    task.tune(task, weights, settings)
    (group,) = weights
    offsets = dict(zip(group.shapes, torch.split(group.state.offset.flatten(), [48 * 32] * len(start)), strict=True))
    assert all(bool((offsets[name] == 0).all()) is (name in starved) for name in start)


def test_outputs_do_not_change_while_experts_see_every_token() -> None:
    task = routed_task(samples=2)
    expected = task.block(task.inputs)
    with complete(task.block, {"experts": frozenset({0, 5})}):
        assert torch.allclose(task.block(task.inputs), expected, atol=1e-6)


def bias_lost(model: StreamedModel) -> None:
    for name in model.names.buffers:
        model.model.get_buffer(name).zero_()


def bias_in_half_precision(model: StreamedModel) -> None:
    for name in model.names.buffers:
        buffer = model.model.get_buffer(name)
        buffer.copy_(buffer.bfloat16())


@pytest.mark.parametrize("plant", [None, bias_lost, bias_in_half_precision])
def test_a_routers_bias_that_is_lost_or_rounded_shows(
    plant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases near 8 differ by less than bf16 tells apart there."""
    model = save_small_model(tmp_path, "deepseek_v3", vocab_size=400)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("e_score_correction_bias")]
    tensors[name] = 8 + 0.02 * torch.arange(len(tensors[name])).float().roll(5)
    save_file(tensors, file, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    fill = StreamedModel._fill_persistent_buffers

    def filled(self: StreamedModel) -> None:
        fill(self)
        plant(self)

    if plant is not None:
        monkeypatch.setattr(StreamedModel, "_fill_persistent_buffers", filled)
    assert (difference(tmp_path, model) < 1e-4) is (plant is None)
