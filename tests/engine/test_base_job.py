"""Jobs that start from a base job's result: the same bits as if one job had done both, and what is refused."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.domain.attempt_lines import AttemptLine
from app.domain.request.base_job import BaseJob, Folded, is_read
from app.domain.request.job_request import JobRequest
from bitwright.errors import CorruptCheckpoint, InternalError
from bitwright.events import BlockEvent
from bitwright.report import FinetuningReport, Report
from tests.engine.conftest import TEXTS
from tests.engine.finetune.test_stage import WORDS
from tests.engine.finetune.test_trainer import Interrupted, interrupt_at
from workers.disk.orders import AttemptOrder
from workers.engine.reporter import Reporter
from workers.engine.run import run

GROUPS: dict[str, Any] = {"group_size": 32}
LIGHT: dict[str, Any] = {"steps": 4, "batch_size": 4}


@dataclass(frozen=True)
class Done:
    """A job that has run."""

    request: JobRequest
    workspace: Path
    report: Report

    def base_job(self, folded: Folded | None = None) -> BaseJob:
        return BaseJob("job_1", self.request.model_dump(mode="json"), folded=folded)

    @property
    def output(self) -> Path:
        return self.workspace / "output"

    @property
    def native(self) -> dict[str, Tensor]:
        return load_file(self.output / "native/weights.safetensors")

    @property
    def finetuning(self) -> FinetuningReport:
        assert self.report.finetuning is not None
        return self.report.finetuning


def do(
    model: Path,
    workspace: Path,
    body: dict[str, Any],
    before: Done | None = None,
    *,
    folded: Folded | None = None,
    lines: list[AttemptLine] | None = None,
) -> Done:
    """Runs a job of small texts, from what the job before it has made."""
    given = {"evaluation": TEXTS["evaluation"], **body}
    if before is None:
        given = {"model": str(model), "calibration": TEXTS["calibration"], **given}
        request = JobRequest.parse(given)
    else:
        request = JobRequest.parse({"base_job": "job_1", **given}, before.base_job(folded))
    part = request.finetune
    order = AttemptOrder(
        job_id="job_2",
        attempt=1,
        request=request,
        model_path=str(model),
        finetuning_path=None if part is None else part.dataset.model_dump().get("path"),
        base_job_path=None if before is None else str(brought(before, workspace.with_name(workspace.name + "-base"))),
        device="cpu",
    )
    workspace.mkdir(exist_ok=True)
    return Done(request, workspace, run(order, workspace, Reporter((lines if lines is not None else []).append)).report)


def brought(job: Done, folder: Path) -> Path:
    """A folder with the files that a worker brings of a job, and no others."""
    shutil.rmtree(folder, ignore_errors=True)
    for file in (file for file in job.output.rglob("*") if file.is_file()):
        path = file.relative_to(job.output)
        if is_read(job.request.model_dump(mode="json"), path.parts[0], "/".join(path.parts[1:])):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / path)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`finetune` of a request, with rows that follow a rule."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = [{"prompt": f"after {a} and {b} ", "completion": f"{b} {a}"} for a in WORDS for b in WORDS]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return {"dataset": str(file), **LIGHT, "sequence_length": 64, "learning_rate": 0.01}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


BASES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "bits": 3},
    "rtn-head": {"quantization": {"method": "rtn", "bits": 3, **GROUPS, "symmetric": False, "modules": {"ignore": []}}},
    "awq": {"method": "awq", "bits": 3},
    "signround": {"method": "signround", "bits": 3, "steps": 3, "scale_steps": 2},
    "loftq": {"method": "loftq", "bits": 3, "rank": 4},
    "apiq": {"method": "apiq", "bits": 3, "rank": 4, "steps": 3},
    "lq-lora": {
        **{"method": "lq-lora", "bits": {"average": 3.5}, "rank": 4, "iterations": 2},
        **{"group_sizes": [16, 32], "absmax_bits": [4, 8], "absmax_dtypes": ["float32"], "superblocks": [64]},
    },
}


@pytest.mark.parametrize("name", BASES)
def test_two_jobs_make_the_same_bits_as_one(name: str, small_model: Path, text: dict[str, Any], tmp_path: Path) -> None:
    """Scales tuned end to end, norms with scales in them, budgets, a quantized head, factors: nothing is lost."""
    base = BASES[name] | (GROUPS if "group_size" not in str(BASES[name]) and name != "lq-lora" else {})
    rank = {} if "rank" in base else {"adapter": {"kind": "lora", "rank": 4}}
    whole = do(small_model, tmp_path / "whole", {**base, **rank, "finetune": text})
    first = do(small_model, tmp_path / "first", base)
    lines: list[AttemptLine] = []
    second = do(small_model, tmp_path / "second", {**rank, "finetune": text}, first, lines=lines)

    held = {key: t for key, t in first.native.items() if not key.endswith((".lora_a", ".lora_b"))}
    found = second.native
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in held.items())
    assert same(found, whole.native)
    assert same(*(load_file(job.output / "adapter/adapter.safetensors") for job in (second, whole)))
    assert second.finetuning.validations == whole.finetuning.validations
    assert second.report.quality == whole.report.quality

    told = second.report
    assert told.base_job is not None
    assert (told.base_job.job_id, told.base_job.blocks_adopted, told.base_job.adapter_continued) == (
        "job_1",
        3,
        "rank" in base,
    )
    assert (told.blocks_computed, told.blocks_resumed, told.calibration, told.scales) == (0, 0, None, None)
    assert [block.linears for block in told.blocks] == [block.linears for block in first.report.blocks]
    assert len([line for line in lines if isinstance(line, BlockEvent)]) == 3
    assert "job_1" in (second.output / "native/README.md").read_text()


CONTINUED: list[tuple[str, dict[str, Any], str | None]] = [
    ("qlora", {}, None),
    ("qa-lora", {}, None),
    ("qa-lora", {"pooling": "sum"}, "16bit"),
    ("q-bara", {}, None),
    ("qa-hira", {}, None),
    ("loftq", {}, None),
]


@pytest.mark.parametrize(("method", "adapter", "merge"), CONTINUED)
def test_an_adapter_goes_on_where_it_stood(
    method: str, adapter: dict[str, Any], merge: str | None, small_model: Path, text: dict[str, Any], tmp_path: Path
) -> None:
    given = {"adapter": {"kind": method, "rank": 4, **adapter}} if adapter else {"rank": 4}
    body = {"method": method, "bits": 4, **GROUPS, **given, "finetune": text, "merge": merge}
    first = do(small_model, tmp_path / "first", body)
    assert first.finetuning.loss_after != first.finetuning.loss_before
    second = do(small_model, tmp_path / "second", {"finetune": text}, first)
    assert second.finetuning.loss_before == first.finetuning.loss_after
    assert second.report.adapter is not None
    assert first.report.adapter is not None
    assert second.report.adapter.parameters == first.report.adapter.parameters
    assert second.report.base_job is not None
    assert second.report.base_job.adapter_continued
    third = do(small_model, tmp_path / "third", {"finetune": text}, second)
    assert third.finetuning.loss_before == second.finetuning.loss_after
    assert third.report.base_job is not None
    told = third.report.base_job.training
    assert [one.text.sha256 for one in told] == [first.finetuning.text.sha256, second.finetuning.text.sha256]
    assert not any(one.folded for one in told)
    for job in (second, third):
        codes = {key: tensor for key, tensor in job.native.items() if key.endswith(".codes")}
        assert codes
        assert all(torch.equal(tensor, first.native[key]) for key, tensor in codes.items())


def test_a_merged_adapter_is_the_base_of_another(small_model: Path, text: dict[str, Any], tmp_path: Path) -> None:
    """Codes and scales stay through both; offsets move; any kind may be trained on them."""
    body = {"method": "qa-lora", "bits": 4, **GROUPS, "rank": 4, "finetune": text, "merge": "quantized"}
    first = do(small_model, tmp_path / "first", body)
    adapter = {"adapter": {"kind": "qa-hira", "rank": 4}, "merge": "quantized"}
    second = do(small_model, tmp_path / "second", {**adapter, "finetune": text}, first, folded="offsets")
    assert second.finetuning.loss_before == pytest.approx(first.finetuning.loss_after, rel=0.02)
    assert second.report.base_job is not None
    assert not second.report.base_job.adapter_continued
    (before_this,) = second.report.base_job.training
    assert (before_this.adapter, before_this.folded) == ("qa-lora", True)
    assert before_this.steps == first.finetuning.steps_kept
    card = (second.output / "native/README.md").read_text()
    assert "finetuned: QA-LoRA on " in card
    assert ", then QA-HiRA on " in card
    assert "it lies folded in the quantized weights" in card
    assert second.report.adapter is not None
    assert second.report.adapter.merge is not None
    assert second.report.adapter.merge.codes_and_scales_kept
    before, after = first.native, second.native
    assert before.keys() == after.keys()
    moved = {key.rpartition(".")[2] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"offset"}


def test_a_killed_attempt_goes_on_and_ends_with_the_same_bits(
    small_model: Path, text: dict[str, Any], tmp_path: Path
) -> None:
    first = do(small_model, tmp_path / "first", {"method": "rtn", "bits": 3, **GROUPS})
    body = {"adapter": {"kind": "lora", "rank": 4}, "finetune": {**text, "steps": 12, "checkpoint_every": 4}}
    whole = do(small_model, tmp_path / "whole", body, first)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(Interrupted):
            do(small_model, tmp_path / "cut", body, first)
    again = do(small_model, tmp_path / "cut", body, first)
    assert (again.report.blocks_resumed, again.finetuning.steps_resumed) == (3, 4)
    assert again.report.base_job == whole.report.base_job
    assert same(again.native, whole.native)
    assert [block.linears for block in again.report.blocks] == [block.linears for block in first.report.blocks]


@pytest.fixture(scope="module")
def quantized(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A job to start from."""
    return do(small_model, tmp_path_factory.mktemp("quantized"), {"method": "rtn", "bits": 4, **GROUPS})


def copied(job: Done, folder: Path) -> Done:
    shutil.copytree(job.workspace, folder)
    return Done(job.request, folder, job.report)


def truncate(native: Path) -> None:
    file = native / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def drop_a_tensor(native: Path) -> None:
    tensors = load_file(native / "weights.safetensors")
    save_file(
        {k: t for k, t in tensors.items() if not k.endswith("0.mlp.up_proj.scale")}, native / "weights.safetensors"
    )


def forget_a_linear(native: Path) -> None:
    described = json.loads((native / "bitwright.json").read_text())
    del described["linears"]["model.layers.1.mlp.up_proj"]
    (native / "bitwright.json").write_text(json.dumps(described))


def name_one_more_linear(native: Path) -> None:
    described = json.loads((native / "bitwright.json").read_text())
    described["linears"]["model.layers.7.mlp.up_proj"] = described["linears"]["model.layers.1.mlp.up_proj"]
    (native / "bitwright.json").write_text(json.dumps(described))


def another_format(native: Path) -> None:
    described = json.loads((native / "bitwright.json").read_text())
    (native / "bitwright.json").write_text(json.dumps(described | {"format": "other"}))


def give_a_tensor_twice(native: Path) -> None:
    shutil.copyfile(native / "weights.safetensors", native / "weights-2.safetensors")


def swap_two_linears(native: Path) -> None:
    """Both are whole, and have each other's shape."""
    up, down = "model.layers.0.mlp.up_proj.", "model.layers.0.mlp.down_proj."
    tensors = load_file(native / "weights.safetensors")
    names = {key: key.replace(up, down) if key.startswith(up) else key.replace(down, up) for key in tensors}
    save_file({names[key]: tensor for key, tensor in tensors.items()}, native / "weights.safetensors")
    described = json.loads((native / "bitwright.json").read_text())
    linears = described["linears"]
    linears[up[:-1]], linears[down[:-1]] = linears[down[:-1]], linears[up[:-1]]
    (native / "bitwright.json").write_text(json.dumps(described))


def another_version(native: Path) -> None:
    described = json.loads((native / "bitwright.json").read_text())
    (native / "bitwright.json").write_text(json.dumps(described | {"version": 99}))


def change_the_embeddings(native: Path) -> None:
    tensors = load_file(native / "weights.safetensors")
    tensors["model.embed_tokens.weight"][0, 0] += 1
    save_file(tensors, native / "weights.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "weights.safetensors"),
        (drop_a_tensor, "mlp.up_proj.scale' is missing"),
        (forget_a_linear, "model.layers.1.mlp.up_proj is quantized"),
        (name_one_more_linear, "whether model.layers.7.mlp.up_proj is quantized"),
        (swap_two_linears, "not that of the model"),
        (give_a_tensor_twice, "is in weights-2.safetensors and in weights.safetensors"),
        (another_version, "not of version"),
        (another_format, "not of version"),
        (change_the_embeddings, "the model has changed since"),
        (lambda native: (native / "bitwright.json").unlink(), "cannot be read"),
    ],
)
def test_what_does_not_fit_is_said_of_the_base_job(
    damage: Any, words: str, quantized: Done, small_model: Path, text: dict[str, Any], tmp_path: Path
) -> None:
    broken = copied(quantized, tmp_path / "broken")
    damage(broken.output / "native")
    with pytest.raises(CorruptCheckpoint, match=words) as refused:
        do(small_model, tmp_path / "job", {"finetune": text}, broken)
    assert refused.value.field == "base_job"
    assert refused.value.hint is not None
    assert "base_job" in refused.value.hint


def test_formats_with_other_scales_than_the_base_jobs_have_them_exactly_or_told(
    quantized: Done, small_model: Path, text: dict[str, Any], tmp_path: Path
) -> None:
    """bf16 scales of usual size are fp16 numbers, too."""
    done = do(small_model, tmp_path / "job", {"finetune": text, "formats": ["gptq", "peft"]}, quantized)
    assert done.report.scales_rounded == {}
    stored, native = (load_file(file) for file in (done.output / "gptq" / "model.safetensors", weights_of(quantized)))
    scales = {key.removesuffix(".scales"): scale for key, scale in stored.items() if key.endswith(".scales")}
    assert scales
    for name, scale in scales.items():
        made = native[f"{name}.scale"]
        assert (scale.dtype, made.dtype) == (torch.float16, torch.bfloat16)
        assert torch.equal(scale.T.float(), made.float())


def weights_of(done: Done) -> Path:
    return done.output / "native" / "weights.safetensors"


def test_an_unreadable_report_costs_only_the_errors_of_its_linears(
    quantized: Done, small_model: Path, text: dict[str, Any], tmp_path: Path
) -> None:
    """They are measured again."""
    other = copied(quantized, tmp_path / "other")
    (other.output / "native/report.json").write_text('{"blocks": [{"index": "of another version"}]}')
    report = do(small_model, tmp_path / "job", {"finetune": text}, other).report
    found, expected = ([n for b in r.blocks for n in b.linears] for r in (report, quantized.report))
    assert [n.name for n in found] == [n.name for n in expected]
    assert [n.weight_error for n in found] == pytest.approx([n.weight_error for n in expected])


def test_an_order_without_the_folder_quantizes_nothing(quantized: Done, small_model: Path, tmp_path: Path) -> None:
    request = JobRequest.parse({"base_job": "job_1", "finetune": {"dataset": "builtin"}}, quantized.base_job())
    order = AttemptOrder(job_id="job_2", attempt=1, request=request, model_path=str(small_model), device="cpu")
    with pytest.raises(InternalError, match="no folder"):
        run(order, tmp_path, Reporter(lambda _: None))
