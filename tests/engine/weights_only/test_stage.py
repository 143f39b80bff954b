"""Jobs without a model: what they make against other ways to the same numbers, and what they leave byte for byte."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from app.domain.attempt_lines import AttemptLine
from bitwright.errors import BitwrightError
from bitwright.events import BlockEvent, LogEvent, ProgressEvent, Stage, WarningEvent
from tests.engine.conftest import Finished, finish, run_job
from tests.engine.weights_only.checkpoints import SHAPES, read, write
from tests.reports import REPORTS
from workers.engine.weights_only import stage
from workers.engine.weights_only.tensors import TensorPass
from workers.formats.load_bitwright import load_weights

LAYER = "model.language_model.layers.0"
TARGETS = {
    f"{LAYER}.self_attn.q_proj",
    "model.language_model.layers.2.self_attn.q_proj",
    "model.language_model.layers.10.self_attn.q_proj",
    f"{LAYER}.mlp.shared_expert.gate_proj",
    *(f"{LAYER}.mlp.experts.{e}.{p}" for e in range(4) for p in ("gate_proj", "up_proj", "down_proj")),
}
FORMATS = ["compressed-tensors", "merged"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def done(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A job of that type, four bits in groups of 16."""
    return finish(source, tmp_path_factory.mktemp("done"), group_size=16, formats=FORMATS)


def output(finished: Finished, name: str) -> Path:
    return finished.workspace / "output" / name


def nearest(weight: Tensor, group: int, bits: int = 4) -> Tensor:
    """Round to nearest by the formula, symmetric with full range, in fp64 from the scale as it is stored."""
    groups = weight.double().view(weight.shape[0], -1, group)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = (torch.where(-low > high, -low, -high) / 2 ** (bits - 1)).to(weight.dtype).double()
    codes = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    rounded: Tensor = (codes * scale).view(weight.shape)
    return rounded.to(weight.dtype)


def test_linears_are_rounded_and_everything_else_is_as_it_was(source: Path, done: Finished) -> None:
    before, after = read(source), read(output(done, "merged"))
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"{LAYER}.self_attn.q_proj.weight",
        "model.language_model.layers.2.self_attn.q_proj.weight",
        "model.language_model.layers.10.self_attn.q_proj.weight",
        f"{LAYER}.mlp.shared_expert.gate_proj.weight",
        f"{LAYER}.mlp.experts.gate_up_proj",
        f"{LAYER}.mlp.experts.down_proj",
    }
    for name in changed:
        rows = before[name].flatten(0, -2)
        assert torch.equal(after[name].flatten(0, -2), nearest(rows, 16)), name
    assert all(after[name].dtype == before[name].dtype for name in before)


def test_every_format_stands_for_the_same_numbers(done: Finished) -> None:
    merged, native = read(output(done, "merged")), load_weights(output(done, "native"))
    assert native.keys() == merged.keys()
    assert all(torch.equal(native[name], merged[name]) for name in merged)
    packed = read(output(done, "compressed-tensors"))
    names = {name.removesuffix(".weight_packed") for name in packed if name.endswith(".weight_packed")}
    assert names == TARGETS, "experts one by one, under the names that vLLM maps"
    assert not any("gate_up_proj" in name for name in packed)
    kept = {name for name in SHAPES if not name.endswith(("gate_up_proj", "down_proj"))}
    kept -= {f"{name}.weight" for name in TARGETS}
    assert {name for name in packed if ".weight_" not in name} == kept
    config = json.loads((output(done, "compressed-tensors") / "config.json").read_text())
    ignored = set(config["quantization_config"]["ignore"])
    assert {f"{LAYER}.mlp.gate", f"{LAYER}.mlp.shared_expert_gate", "lm_head", "mtp.layers.0.mlp.gate_proj"} < ignored
    assert "model.visual.blocks.0.attn.qkv" in ignored
    assert not ignored & TARGETS


def test_packed_weights_are_read_by_compressed_tensors_itself(done: Finished) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    folder, merged = output(done, "compressed-tensors"), read(output(done, "merged"))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    compressor, tensors = BaseCompressor.load_from_registry("pack-quantized"), read(folder)
    stacked = merged[f"{LAYER}.mlp.experts.gate_up_proj"]
    for name, expected in (
        (f"{LAYER}.self_attn.q_proj", merged[f"{LAYER}.self_attn.q_proj.weight"]),
        (f"{LAYER}.mlp.experts.3.up_proj", stacked[3, 48:]),
        (f"{LAYER}.mlp.experts.1.gate_proj", stacked[1, :48]),
    ):
        parts = {key.removeprefix(name + "."): tensor for key, tensor in tensors.items() if key.startswith(name + ".")}
        weight = compressor.decompress(parts, scheme)["weight"]
        assert torch.equal(weight, expected), name


def test_it_is_told_and_reported(done: Finished) -> None:
    report = done.report
    assert (report.quality, report.calibration, report.model.architecture) == (
        *(None, None),
        "UnheardOfForConditionalGeneration",
    )
    assert {linear.name for block in report.blocks for linear in block.linears} == TARGETS
    assert [block.name for block in report.blocks][-1] == "model.language_model.layers.10", "layer 10 after layer 2"
    assert report.size.quantized_weights == 3 * 128 * 64 + 96 * 64 + 4 * (96 * 64 + 64 * 48)
    assert report.size.bits_per_weight == 4 + 16 / 16
    codes = {line.code for line in done.lines if isinstance(line, WarningEvent)}
    assert "not_evaluated" in codes
    assert [line.index for line in done.lines if isinstance(line, BlockEvent)] == [0]
    assert {line.stage for line in done.lines if isinstance(line, ProgressEvent)} >= {Stage.QUANTIZE, Stage.EXPORT}
    reasons = {line.fields["reason"] for line in done.lines if isinstance(line, LogEvent) and "reason" in line.fields}
    assert {
        "routers and gates, which choose experts",
        "embeddings",
        "the head",
        "blocks that predict further tokens",
    } <= reasons
    for name in (*FORMATS, "native"):
        card = (output(done, name) / "README.md").read_text()
        assert "nothing was evaluated" in card
        assert json.loads((output(done, name) / "report.json").read_text()) == report.model_dump(mode="json")


@pytest.mark.parametrize("method", [{"method": "rtn", "symmetric": False, "bits": 3}, {"method": "nf"}])
def test_an_accepted_model_gets_the_codes_that_it_gets_with_its_class(
    small_model: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    formats = ["native"]
    run_job(small_model, tmp_path / "model", evaluation=None, formats=formats, **method)
    run_job(small_model, tmp_path / "tensors", evaluation=None, formats=formats, weights_only=True, **method)
    one, other = (read(tmp_path / kind / "output" / "native") for kind in ("model", "tensors"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_overrides_and_ignores_reach_experts(source: Path, tmp_path: Path) -> None:
    experts = f"{LAYER}.mlp.experts"
    rules = {
        "ignore": ["lm_head", f"{experts}.2.up_proj", "*.layers.2.*"],
        "overrides": {f"{experts}.*.down_proj": {"bits": 8}},
    }
    finished = finish(source, tmp_path, group_size=16, formats=["merged"], modules=rules)
    before, after = read(source), read(output(finished, "merged"))
    assert torch.equal(after[f"{experts}.gate_up_proj"][2, 48:], before[f"{experts}.gate_up_proj"][2, 48:])
    assert not torch.equal(after[f"{experts}.gate_up_proj"][2, :48], before[f"{experts}.gate_up_proj"][2, :48])
    assert torch.equal(after[f"{experts}.down_proj"][1], nearest(before[f"{experts}.down_proj"][1], 16, bits=8))
    name = "model.language_model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(after[name], before[name])
    native = load_weights(output(finished, "native"))
    assert all(torch.equal(native[name], after[name]) for name in after)
    assert native.keys() == after.keys()


def test_experts_that_are_stored_input_by_output_and_in_turn(tmp_path: Path) -> None:
    """gpt-oss's layout: (experts, in, out) with gate and up in turn."""
    config = {"text_config": None, "model_type": "openai_privacy_filter", "hidden_size": 64, "num_hidden_layers": 1}
    shapes: dict[str, tuple[int, ...]] = {
        "model.layers.0.mlp.experts.gate_up_proj": (2, 64, 96),
        "model.layers.0.mlp.experts.down_proj": (2, 48, 64),
    }
    shapes |= {"model.layers.0.mlp.experts.gate_up_proj_bias": (2, 96)}
    source = write(tmp_path / "source", shapes, config)
    formats = ["compressed-tensors", "merged"]
    finished = finish(source, tmp_path / "job", group_size=16, formats=formats, weights_only=True)
    before, after = read(source), read(output(finished, "merged"))
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.0.mlp.experts.{name}"
        for e in range(2):
            assert torch.equal(after[key][e].T, nearest(before[key][e].T.contiguous(), 16)), "groups run along inputs"
    native = load_weights(output(finished, "native"))
    assert all(torch.equal(native[name], after[name]) for name in after)
    packed = read(output(finished, "compressed-tensors"))
    shape = packed["model.layers.0.mlp.experts.1.up_proj.weight_shape"].tolist()
    assert shape == [48, 64]
    scale = packed["model.layers.0.mlp.experts.1.up_proj.weight_scale"]
    up = before["model.layers.0.mlp.experts.gate_up_proj"][1].T[1::2]
    largest = up.view(48, 4, 16).abs().amax(-1) / 8
    assert torch.equal(scale.abs(), largest.float().to(torch.bfloat16))


def killed_after(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt ends when it has so many parts, in the middle of the next."""
    write_one: Callable[..., Any] = TensorPass.write
    seen: list[str] = []

    def write(self: Any, name: str, writers: Any) -> Any:
        seen.append(name)
        if len(seen) == 2 * parts + 2:
            raise KeyboardInterrupt
        return write_one(self, name, writers)

    monkeypatch.setattr(TensorPass, "write", write)


def hashes(folder: Path) -> dict[str, bytes]:
    """Files of checkpoints by path; reports and cards hold times."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in (*REPORTS, "README.md")
    }


def test_a_killed_attempt_costs_at_most_a_part(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "PART_BYTES", 1)  # a tensor each
    arguments: dict[str, Any] = {"group_size": 16, "formats": FORMATS}
    whole = finish(source, tmp_path / "whole", **arguments)
    with monkeypatch.context() as patch:
        killed_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            run_job(source, tmp_path / "killed", **arguments)
    shutil.rmtree(tmp_path / "killed" / "output")
    lines: list[AttemptLine] = []
    read_again: list[str] = []
    write_one = TensorPass.write

    def watch(self: Any, name: str, writers: Any) -> Any:
        read_again.append(name)
        return write_one(self, name, writers)

    monkeypatch.setattr(TensorPass, "write", watch)
    result = run_job(source, tmp_path / "killed", lines, {"told": 1}, **arguments)
    told = [line for line in lines if isinstance(line, BlockEvent)]
    expected = [line for line in whole.lines if isinstance(line, BlockEvent)][1:]
    assert [(b.index, b.total, b.name) for b in told] == [(b.index, b.total, b.name) for b in expected], (
        "untold ones, too"
    )
    assert len(read_again) == len(SHAPES) - 7
    assert any(line.event == "parts_resumed" for line in lines if isinstance(line, LogEvent))
    assert result.report.size == whole.report.size
    assert hashes(tmp_path / "killed" / "output") == hashes(tmp_path / "whole" / "output")


def test_a_part_that_is_not_as_it_was_is_made_again(source: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"group_size": 16, "formats": FORMATS}
    finish(source, tmp_path, **arguments)
    expected = hashes(tmp_path / "output")
    shutil.rmtree(tmp_path / "output")
    shard = next((tmp_path / "state" / "weights-only" / "merged").iterdir())
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    again = finish(source, tmp_path, **arguments)
    assert not any(line.event == "parts_resumed" for line in again.lines if isinstance(line, LogEvent))
    assert hashes(tmp_path / "output") == expected


def test_nothing_is_written_twice(done: Finished) -> None:
    """Shards of the checkpoint are those of the state, by another name."""
    for name in (*FORMATS, "native"):
        (shard,) = (done.workspace / "state" / "weights-only" / name).glob("*.partial")
        (final,) = output(done, name).glob("*.safetensors")
        assert os.path.samefile(shard, final)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"formats": ["gguf"], "weights_only": True, "group_size": 32}, "format_cannot_hold"),
    ({"weights_only": True, "bits": {"average": 3.5}}, "invalid_request"),
    ({"weights_only": True, "require": {"max_perplexity_ratio": 2}}, "invalid_request"),
    ({"group_size": 40}, "group_size_does_not_divide"),
    ({"modules": {"overrides": {"*.none": {"bits": 8}}}}, "unknown_module"),
    ({"modules": {"overrides": {"*.down_proj": {"group_size": 32}}}}, "group_size_does_not_divide"),
    ({"method": "gptq"}, "unsupported_architecture"),
]


@pytest.mark.parametrize(("fields", "code"), REFUSED)
def test_what_cannot_be_is_refused(source: Path, tmp_path: Path, fields: dict[str, Any], code: str) -> None:
    with pytest.raises(BitwrightError) as refused:
        run_job(source, tmp_path, **{"group_size": 16, **fields})
    assert refused.value.code == code
    assert not (tmp_path / "output").exists()


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "unheard_of"}')
    weight = torch.ones(64, 64)
    weight[3, 3] = torch.nan
    save_file({"a.weight": torch.ones(64, 64), "b.weight": weight}, folder / "model.safetensors")
    with pytest.raises(BitwrightError, match=r"weight of b holds") as refused:
        run_job(folder, tmp_path / "job")
    assert refused.value.code == "numerical_failure"


def global_scales(folder: Path) -> dict[str, float]:
    """By linear, of a checkpoint in compressed-tensors."""
    ending = ".weight_global_scale"
    return {name.removesuffix(ending): float(t) for name, t in read(folder).items() if name.endswith(ending)}


def test_linears_that_run_as_one_share_a_global_scale(source: Path, tmp_path: Path) -> None:
    """True if they lie in one tensor, as experts' gate and up; else each lies in its own."""
    made = finish(source, tmp_path / "job", scheme="nvfp4a16", formats=FORMATS)
    found, before = global_scales(output(made, "compressed-tensors")), read(source)
    experts = before[f"{LAYER}.mlp.experts.gate_up_proj"].float().abs().amax((1, 2))
    for expert, amax in enumerate(experts):
        both = {found[f"{LAYER}.mlp.experts.{expert}.{name}"] for name in ("gate_proj", "up_proj")}
        assert len(both) == 1
        assert both.pop() == pytest.approx(448 * 6 / float(amax))
    alone = before[f"{LAYER}.self_attn.q_proj.weight"].float().abs().max()
    assert found[f"{LAYER}.self_attn.q_proj"] == pytest.approx(448 * 6 / float(alone))
    packed, merged = load_weights(output(made, "native")), read(output(made, "merged"))
    assert all(torch.equal(packed[name], merged[name]) for name in merged)


@pytest.mark.parametrize(
    ("asked", "field"),
    [({"scheme": "nvfp4"}, "quantization.scheme"), ({"kv_cache": "fp8"}, "quantization.kv_cache")],
)
def test_what_the_model_would_have_to_compute_is_refused(
    source: Path, tmp_path: Path, asked: dict[str, Any], field: str
) -> None:
    with pytest.raises(BitwrightError) as caught:
        run_job(source, tmp_path, weights_only=True, **asked)
    assert caught.value.field is not None
    assert caught.value.field.startswith(field)
