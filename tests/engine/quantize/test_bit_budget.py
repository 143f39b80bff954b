"""A budget of bits and Fisher information through the real engine: from a request to the report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.domain.formats import ExportFormat
from app.domain.methods import WeightSpec
from bitwright.errors import InvalidRequest
from bitwright.report import Report
from tests.engine.conftest import run_job
from tests.tiny_experts import tiny_experts_folder
from tests.tiny_model import tiny_model_folder
from workers.contracts.blocks import Fisher
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize import scores
from workers.engine.quantize.bit_budget import tied
from workers.engine.quantize.candidates import joined_choices
from workers.engine.quantize.fisher import empirical_fisher
from workers.methods.lq_lora import LQLoRA

BUDGET: dict[str, Any] = {"bits": {"average": 3.0, "choices": [2, 3, 4]}, "formats": ["native"]}
GRID: dict[str, Any] = {
    **{"method": "lq-lora", "rank": 4, "iterations": 4, "group_sizes": [32, 64], "absmax_bits": [3, 8]},
    **{"superblocks": [16], "absmax_dtypes": ["bfloat16"], "formats": ["native", "peft"]},
}


def widths(report: Report) -> dict[str, int]:
    return {linear.name: linear.bits for block in report.blocks for linear in block.linears}


def test_a_budget_is_met_counted_and_reported(small_model: Path, tmp_path: Path) -> None:
    report = run_job(small_model, tmp_path, **BUDGET).report
    found, parts = report.allocation, report.size.parts
    assert found is not None
    assert parts is not None
    assert report.calibration is not None, "round to nearest looks at text for the budget alone"
    assert found.average == 3.0
    assert 2.9 < found.reached <= 3.0
    assert found.reached == pytest.approx(report.size.bits_per_weight)
    assert parts.scales == pytest.approx(16 / 32)
    chosen = widths(report)
    assert chosen == {linear.name: linear.bits for linear in found.linears}
    assert len(set(chosen.values())) > 1
    for block in range(3):
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({chosen[f"model.layers.{block}.{name}"] for name in group}) == 1


def test_an_interrupted_job_spends_the_budget_once_and_the_same_way(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = GRID | {"bits": {"average": 3.0, "choices": [2, 3, 4]}, "absmax_bits": [3], "iterations": 2}
    whole = run_job(small_model, tmp_path / "whole", **spec)
    quantize = LQLoRA.quantize_block
    seen: list[int] = []

    def until_the_last(self: LQLoRA, task: Any, spec: Any) -> Any:
        if task.index == 2 and not seen:
            seen.append(task.index)
            raise InterruptedError
        return quantize(self, task, spec)

    monkeypatch.setattr(LQLoRA, "quantize_block", until_the_last)
    with pytest.raises(InterruptedError):
        run_job(small_model, tmp_path / "cut", **spec)
    monkeypatch.setattr("workers.engine.quantize.preparation.spend", None)
    monkeypatch.setattr("workers.engine.quantize.preparation.empirical_fisher", None)
    resumed = run_job(small_model, tmp_path / "cut", **spec)
    assert resumed.report.blocks_resumed == 2
    for name, folder in whole.checkpoints.items():
        for file in (tmp_path / "whole" / folder).glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "cut" / folder / file.name).read_bytes(), (name, file.name)
    check_lq_report(whole.report)
    stored = tmp_path / "cut" / "state" / "prepared.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"fingerprint": "another"}))
    with pytest.raises(TypeError, match="not callable"):
        run_job(small_model, tmp_path / "cut", **spec)


def check_lq_report(report: Report) -> None:
    found, parts = report.allocation, report.size.parts
    assert found is not None
    assert parts is not None
    assert 2.95 < found.reached <= 3.0
    once = (32 / report.size.quantized_weights) * len(found.linears)
    assert parts.codes + parts.scales == pytest.approx(found.reached + once, rel=1e-9)
    assert parts.adapters > 0
    configurations = {(linear.bits, linear.group_size, linear.absmax) for linear in found.linears}
    assert len(configurations) > 1


def test_under_a_budget_errors_are_below_those_of_one_configuration_with_as_many_bits(
    small_model: Path, tmp_path: Path
) -> None:
    """Unweighted, the sum over linears of squared errors of the weights, as reported, at the bits of the nf3 preset."""
    uniform = GRID | {"bits": 3, "group_size": 64, "fisher": False, "evaluation": None}
    one = run_job(small_model, tmp_path / "one", **uniform).report
    assert one.allocation is None
    assert one.size.parts is not None
    once = 32 * 21 / one.size.quantized_weights
    average = one.size.parts.codes + one.size.parts.scales - once
    chosen = run_job(
        small_model, tmp_path / "many", **(uniform | {"bits": {"average": average, "choices": [2, 3, 4]}})
    ).report
    assert chosen.allocation is not None
    assert chosen.allocation.reached <= average
    model = AutoModelForCausalLM.from_pretrained(small_model)
    norms = {name: float(model.get_submodule(name).weight.detach().double().square().sum()) for name in widths(one)}
    sums = [
        sum(norms[linear.name] * linear.weight_error**2 for block in report.blocks for linear in block.linears)
        for report in (chosen, one)
    ]
    assert sums[0] < sums[1]


@pytest.mark.filterwarnings("ignore:.*loss_type.*")
@pytest.mark.parametrize("at_once", [1, 2])
def test_fisher_information_is_that_of_autograd_through_the_whole_model(
    at_once: int, small_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "single"
    reference = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    reference.save_pretrained(folder)
    ids = torch.randint(0, 400, (3, 17), generator=torch.Generator().manual_seed(0))
    model = StreamedModel.open(Checkpoint.open(folder), torch.device("cpu"))
    names = [*model.linears(), "model.embed_tokens"]
    told: list[float] = []
    found = empirical_fisher(model, ids, names, at_once, told.append)
    sums = {name: torch.zeros(reference.get_submodule(name).weight.shape) for name in names}
    for row in ids:
        logits = reference(row[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
        for name, whole in sums.items():
            whole.add_(reference.get_submodule(name).weight.grad.square())
        reference.zero_grad()
    assert set(found) == set(names)
    for name, whole in sums.items():
        assert torch.allclose(found[name].rows, whole.sum(1), rtol=2e-3, atol=1e-5 * float(whole.sum(1).max())), name
        assert torch.allclose(found[name].columns, whole.sum(0), rtol=2e-3, atol=1e-5 * float(whole.sum(0).max()))
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:.*loss_type.*")
def test_a_matrix_that_is_embeddings_and_head_has_the_squares_of_both_uses(small_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    reference = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    reference.config.tie_word_embeddings = True
    reference.tie_weights()
    reference.save_pretrained(folder)
    reference.lm_head.weight = torch.nn.Parameter(reference.model.embed_tokens.weight.detach().clone())
    model = StreamedModel.open(Checkpoint.open(folder), torch.device("cpu"))
    assert model.tied
    ids = torch.randint(0, 400, (2, 13), generator=torch.Generator().manual_seed(1))
    found = empirical_fisher(model, ids, ["model.embed_tokens"], 2, lambda _: None)["model.embed_tokens"]
    whole = torch.zeros(reference.lm_head.weight.shape)
    for row in ids:
        logits = reference(row[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
        whole += reference.lm_head.weight.grad.square() + reference.model.embed_tokens.weight.grad.square()
        reference.zero_grad()
    assert torch.allclose(found.rows, whole.sum(1), rtol=2e-3, atol=1e-5 * float(whole.sum(1).max()))
    assert torch.allclose(found.columns, whole.sum(0), rtol=2e-3, atol=1e-5 * float(whole.sum(0).max()))


def test_a_sample_of_rows_stands_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 256, generator=made) * torch.rand(1024, 1, generator=made)
    rows, columns = torch.rand(1024, generator=made) ** 6, torch.rand(256, generator=made)
    fisher = Fisher(rows / rows.sum(), columns / columns.sum())
    rounded = (weight * 4).round() / 4
    assert scores.sampled_rows(fisher.rows, 256) is None
    monkeypatch.setattr(scores, "SCORED_WEIGHTS", 1 << 15)
    sample = scores.sampled_rows(fisher.rows, 256)
    assert sample is not None
    assert len(sample) == 128
    evenly = Fisher((fisher.rows.sum() / 128).expand(128), fisher.columns)
    whole = scores.rounding_error(weight, rounded, fisher)
    assert scores.rounding_error(weight[sample], rounded[sample], evenly) == pytest.approx(whole, rel=0.05)
    formula = 0.5 * float(((rounded - weight) ** 2 * fisher.rows[:, None] * fisher.columns).sum())
    assert whole == pytest.approx(formula, rel=1e-4)


@pytest.mark.parametrize(("formats", "joined"), [(["gguf", "merged"], False), (["gguf", "mlx"], True)])
def test_linears_of_one_input_have_types_of_their_own_in_a_gguf_file(
    small_model: Path, formats: list[str], joined: bool
) -> None:
    model = StreamedModel.open(Checkpoint.open(small_model), torch.device("cpu"))
    names = list(model.linears())
    groups = joined_choices(model, [ExportFormat(name) for name in formats], names)
    assert any("q_proj" in name for group in groups for name in group) == joined
    experts = [
        f"model.layers.0.mlp.experts.{number}.{leaf}" for number in range(3) for leaf in ("up_proj", "down_proj")
    ]
    if not joined:
        together = joined_choices(model, [ExportFormat.GGUF], [*names, *experts])
        assert sorted(map(sorted, together)) == sorted([sorted(experts[::2]), sorted(experts[1::2])])


@pytest.mark.slow
def test_a_budget_comes_closer_than_one_width_of_as_many_bits(tmp_path: Path) -> None:
    trained = tiny_model_folder()
    texts: dict[str, Any] = {
        "calibration": {"num_samples": 32, "sequence_length": 64},
        "evaluation": {"num_samples": 24, "sequence_length": 64},
    }
    one = run_job(trained, tmp_path / "one", bits=3, formats=["native"], **texts).report
    budget = {"average": one.size.bits_per_weight, "choices": [2, 3, 4, 5]}
    chosen = run_job(trained, tmp_path / "many", bits=budget, formats=["native"], **texts).report
    assert chosen.size.bits_per_weight <= one.size.bits_per_weight
    assert chosen.quality is not None
    assert one.quality is not None
    assert chosen.quality.kl_divergence < 0.8 * one.quality.kl_divergence


def test_codes_of_a_codebook_are_chosen_by_what_their_rounding_adds(small_model: Path, tmp_path: Path) -> None:
    budget = {"average": 3.0, "choices": [2, 3, 4]}
    report = run_job(small_model, tmp_path, method="loftq", rank=4, bits=budget, formats=["native"]).report
    assert report.allocation is not None
    assert 2.8 < report.allocation.reached <= 3.0
    assert len(set(widths(report).values())) > 1


def test_linears_of_one_input_are_one_item_unless_an_override_sets_one_apart() -> None:
    rules = {"overrides": {"*.1.self_attn.k_proj": {"bits": 8}}, "ignore": ["*.mlp.up_proj"]}
    spec = WeightSpec.model_validate({"bits": {"average": 3.0, "choices": [2, 4]}, "modules": rules})
    leaves = [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
    names = [f"layers.{block}.{leaf}" for block in range(2) for leaf in leaves]
    candidates = {name: found for name in names if (found := spec.candidates(name, 64))}
    shared = (leaves[:3], leaves[4:6])
    groups = [[f"layers.{block}.{leaf}" for leaf in group] for block in range(2) for group in shared]
    joined = tied(candidates, groups)
    items = [tuple(name.rpartition(".")[2][0] + name.split(".")[1] for name in item) for item in joined]
    assert items == [("q0", "k0", "v0"), ("o0",), ("g0",), ("d0",), ("q1", "v1"), ("k1",), ("o1",), ("g1",), ("d1",)]


def test_a_budget_out_of_reach_is_refused_with_what_is_needed(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"cheapest choices take 2\.5 bits a weight, more than 2\.4") as refused:
        run_job(small_model, tmp_path, **(BUDGET | {"bits": {"average": 2.4, "choices": [2, 3]}}))
    assert refused.value.field == "quantization.bits.average"


@pytest.mark.slow
def test_fisher_information_of_experts_is_that_of_their_sequences_one_at_a_time() -> None:
    """Their tokens lie together, whatever sequence they are of; those of the attention's linears do not."""
    model = StreamedModel.open(Checkpoint.open(tiny_experts_folder()), torch.device("cpu"))
    ids = torch.randint(0, 400, (4, 24), generator=torch.Generator().manual_seed(0))
    names = [name for name in model.linears() if name != model.layout.head]
    alone, together = (empirical_fisher(model, ids, names, at_once, lambda _: None) for at_once in (1, 3))
    assert any(".experts." in name for name in names)
    for name in names:
        for one, other in ((alone[name].rows, together[name].rows), (alone[name].columns, together[name].columns)):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-3 * float(one.max()))
