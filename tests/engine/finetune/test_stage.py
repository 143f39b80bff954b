"""Whole jobs that finetune: what is reported, that it is true, and that it comes out the same after an interruption."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from app.domain.attempt_lines import AttemptLine
from app.domain.request.finetuning import Finetune
from app.domain.request.job_request import Evaluation, JobRequest
from app.domain.request.sources import BuiltinText
from bitwright.errors import InvalidDataset
from bitwright.events import BlockEvent, CheckpointEvent, LogEvent, MetricEvent, ProgressEvent, Stage
from bitwright.report import Report
from tests.engine.conftest import TEXTS
from tests.engine.finetune.test_trainer import Interrupted, interrupt_at
from workers.adapters.adapter import Adapter
from workers.adapters.attaching import Attach
from workers.adapters.grouped import GroupedAdapter
from workers.disk.orders import AttemptOrder
from workers.engine.finetune import stage as stage_module
from workers.engine.finetune.resident_model import ResidentModel
from workers.engine.finished_blocks import FinishedBlocks
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.reporter import Reporter
from workers.engine.run import run
from workers.engine.text.packing import Batch
from workers.engine.text.sequences import evaluation_sequences, load_tokenizer
from workers.numerics.quantized import LinearResult

WORDS = ["grid", "scale", "code", "block", "linear", "group", "rank", "token"]


@dataclass
class Job:
    """A job that finetunes, its lines and the adapters that it made last."""

    workspace: Path
    lines: list[AttemptLine] = field(default_factory=list)
    adapters: dict[str, nn.Module] = field(default_factory=dict)
    device: str = "cpu"

    def run(
        self,
        model: Path,
        rows: Path | None,
        quantization: Mapping[str, Any] | None = None,
        adapter: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Report:
        body = {
            "model": {"source": "local", "path": str(model)},
            "quantization": {"method": "rtn", "bits": 3, "group_size": 32, **(quantization or {})},
            **TEXTS,
            "adapter": {"kind": "lora", "rank": 4, **(adapter or {})},
            "formats": ["native"],
            "finetune": {
                "dataset": {"source": "builtin"} if rows is None else {"source": "local", "path": str(rows)},
                **{"steps": 20, "batch_size": 4, "sequence_length": 64, "learning_rate": 0.01, "checkpoint_every": 5},
                **fields,
            },
        }
        order = AttemptOrder(
            job_id="job_1",
            attempt=1,
            request=JobRequest.model_validate(body),
            model_path=str(model),
            finetuning_path=None if rows is None else str(rows),
            device=self.device,
        )

        class Recorded(Attach):
            def __call__(recorded, linears: Mapping[str, LinearResult], seed: int) -> dict[str, Adapter]:  # noqa: N805
                adapters = super().__call__(linears, seed)
                self.adapters |= adapters
                return adapters

        self.workspace.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage_module, "Attach", Recorded)
            return run(order, self.workspace, Reporter(self.lines.append)).report

    def told(self, kind: type) -> list[Any]:
        return [line for line in self.lines if isinstance(line, kind)]

    def trained(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": t for name, a in self.adapters.items() for key, t in a.state_dict().items()}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and completions that follow a rule."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = [{"prompt": f"after {a} and {b} ", "completion": f"{b} {a}"} for a in WORDS for b in WORDS]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return file


@pytest.fixture(scope="module")
def whole(small_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Report]:
    """A job that nobody disturbed."""
    job = Job(tmp_path_factory.mktemp("whole"))
    return job, job.run(small_model, rows)


def test_a_job_is_reported_as_it_is(whole: tuple[Job, Report]) -> None:
    job, report = whole
    found = report.finetuning
    assert found is not None
    assert (found.steps, found.steps_done, found.steps_kept, found.steps_resumed) == (20, 20, 20, 0)
    assert not found.stopped_early
    assert found.trainable_parameters == sum(t.numel() for t in job.trained().values())
    assert len(found.losses) == 20
    assert found.loss_before is not None
    assert found.loss_after is not None
    assert found.loss_after < 0.9 * found.loss_before
    assert found.losses[-1].loss < found.losses[0].loss
    assert [validation.step for validation in found.validations] == [0, 20]
    assert found.text.num_samples > 0
    assert found.held_out_sequences > 0
    assert found.tokens_per_second > 0
    assert list(dict.fromkeys(line.stage for line in job.told(ProgressEvent))) == [
        Stage.LOAD,
        Stage.QUANTIZE,
        Stage.FINETUNE,
        Stage.EVALUATE,
        Stage.EXPORT,
    ]
    assert "finetune" in report.seconds
    assert sum(s for stage, s in report.seconds.items() if stage != "total") == pytest.approx(report.seconds["total"])
    assert [line.step for line in job.told(CheckpointEvent)] == [5, 10, 15, 20]
    assert [line.milestone for line in job.told(CheckpointEvent)] == [3, 4, 5, 7]
    names = {line.name for line in job.told(MetricEvent)}
    assert names >= {"loss", "validation_loss", "finetuning_loss", "finetuning_loss_before", "perplexity"}


def test_the_evaluation_is_of_the_model_with_its_adapters(whole: tuple[Job, Report], small_model: Path) -> None:
    """Against transformers' model with W_hat + b a in place of each weight."""
    from transformers import AutoModelForCausalLM

    job, report = whole
    assert report.quality is not None
    part = JobRequest.model_validate({"model": {"source": "local", "path": "/x"}, **QUANTIZED, **TEXTS}).evaluation
    assert part is not None
    ids = evaluation_sequences(load_tokenizer(small_model), part, None, 0).ids
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.bfloat16)
    for name, base in finished_weights(small_model, job.workspace).items():
        adapter = job.adapters[name]
        assert isinstance(adapter, GroupedAdapter)
        update = adapter.delta_weight().float().detach()
        model.get_submodule(name).weight.data = (base.float() + update).to(torch.bfloat16)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].float()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert report.quality.perplexity == pytest.approx(math.exp(loss), rel=0.01)


QUANTIZED: dict[str, Any] = {"quantization": {"method": "rtn", "bits": 3, "group_size": 32}}


def finished_weights(model: Path, workspace: Path) -> dict[str, Tensor]:
    """W_hat of the finished blocks, by linear."""
    fingerprint = json.loads((workspace / "state/state.json").read_text())["fingerprint"]
    state = FinishedBlocks(workspace / "state")
    state.adopt(fingerprint)
    blocks = len(StreamedModel.open(Checkpoint.open(model), torch.device("cpu")).blocks)
    return {name: result.dequantize() for index in range(blocks) for name, result in state.load(index).items()}


def test_an_interrupted_job_ends_with_the_same_adapters(
    whole: tuple[Job, Report], small_model: Path, rows: Path, tmp_path: Path
) -> None:
    job = Job(tmp_path / "cut")
    for steps in (7, 6):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, steps)
            with pytest.raises(Interrupted):
                job.run(small_model, rows)
    report = job.run(small_model, rows)
    assert report.finetuning is not None
    assert report.finetuning.steps_resumed == 10
    assert report.blocks_resumed == 3
    expected = whole[0].trained()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in job.trained().items())
    assert report.quality == whole[1].quality
    other = job.run(small_model, rows, learning_rate=0.02)
    assert other.finetuning is not None
    assert other.finetuning.steps_resumed == 0
    assert other.blocks_resumed == 3, "the base is the same"


def test_where_blocks_are_computed_again_no_dequantized_weight_is_kept(
    whole: tuple[Job, Report], small_model: Path, rows: Path, tmp_path: Path
) -> None:
    """Both save memory, and change no bit of what is trained."""
    before, job = whole[1].finetuning, Job(tmp_path)
    found = job.run(small_model, rows, gradient_checkpointing=True).finetuning
    assert before is not None
    assert found is not None
    assert (before.blocks_recomputed, before.weights_kept) == (0, True)
    assert (found.blocks_recomputed, found.weights_kept) == (3, False)
    expected = whole[0].trained()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in job.trained().items())


def too_many_at_once(patch: pytest.MonkeyPatch, most: int) -> None:
    """Memory for `most` sequences with gradients."""
    loss = ResidentModel.loss

    def limited(self: ResidentModel, batch: Batch) -> Tensor:
        if torch.is_grad_enabled() and len(batch.ids) > most:
            raise torch.OutOfMemoryError("too many at once")
        return loss(self, batch)

    patch.setattr(ResidentModel, "loss", limited)


@pytest.mark.slow
def test_a_stage_that_runs_out_of_memory_goes_on_with_less_at_once_and_keeps_the_blocks(
    whole: tuple[Job, Report], small_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_many_at_once(monkeypatch, 1)
    job = Job(tmp_path / "less")
    report = job.run(small_model, rows)
    assert report.finetuning is not None
    assert whole[1].finetuning is not None
    assert (whole[1].finetuning.micro_batch, report.finetuning.micro_batch) == (4, 1)
    assert len(job.told(BlockEvent)) == 3, "each block once"
    assert [line.fields["micro_batch"] for line in job.told(LogEvent) if line.event == "training_lowered"] == [4, 2]
    assert report.finetuning.loss_before == pytest.approx(whole[1].finetuning.loss_before, rel=1e-6)
    assert report.finetuning.loss_after == pytest.approx(whole[1].finetuning.loss_after, rel=0.02)
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        too_many_at_once(patch, 1)
        again = Job(tmp_path / "again")
        interrupt_at(patch, 9)  # two that fail, and seven
        with pytest.raises(Interrupted):
            again.run(small_model, rows)
    resumed = again.run(small_model, rows)
    assert resumed.finetuning is not None
    assert (resumed.finetuning.micro_batch, resumed.finetuning.steps_resumed) == (1, 5)
    expected = job.trained()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.trained().items())


def test_memory_for_not_even_one_sequence_is_an_error(
    small_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_many_at_once(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        Job(tmp_path / "none").run(small_model, rows, steps=2)


def test_other_codes_begin_training_anew(small_model: Path, rows: Path, tmp_path: Path) -> None:
    job = Job(tmp_path / "job")
    job.run(small_model, rows, steps=2)
    report = job.run(small_model, rows, {"bits": 4}, steps=2)
    assert report.finetuning is not None
    assert (report.finetuning.steps_resumed, report.blocks_resumed) == (0, 0)


SHORTHAND: dict[str, Any] = {"bits": 4, "group_size": 32, "rank": 4, "calibration": TEXTS["calibration"]}


def run_shorthand(model: Path, rows: Path, workspace: Path, **fields: Any) -> Report:
    finetune = {"dataset": str(rows), "steps": 12, "batch_size": 4, "sequence_length": 64, "learning_rate": 0.02}
    body = {"model": str(model), **SHORTHAND, **fields, "finetune": finetune, "evaluation": TEXTS["evaluation"]}
    order = AttemptOrder(
        job_id="job_1",
        attempt=1,
        request=JobRequest.parse(body),
        model_path=str(model),
        finetuning_path=str(rows),
        device="cpu",
    )
    workspace.mkdir()
    return run(order, workspace, Reporter(lambda _: None)).report


def native(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "output/native/weights.safetensors")


def test_a_merged_adapter_leaves_codes_and_scales_as_they_were(small_model: Path, rows: Path, tmp_path: Path) -> None:
    """QA-LoRA, from shorthand: the native checkpoint holds the base's codes and other offsets."""
    report = run_shorthand(small_model, rows, tmp_path / "job", method="qa-lora", merge="quantized")
    assert report.adapter is not None
    assert report.adapter.merge is not None
    assert report.adapter.merge.codes_and_scales_kept
    assert report.finetuning is not None
    assert report.adapter.parameters == report.finetuning.trainable_parameters
    assert report.finetuning.loss_after is not None
    assert report.finetuning.loss_before is not None
    assert report.finetuning.loss_after < report.finetuning.loss_before
    assert (tmp_path / "job/output/adapter/load_adapter.py").is_file()
    shipped, state = native(tmp_path / "job"), tmp_path / "job/state"
    for index in range(3):
        base = load_file(state / f"block-{index:05d}.safetensors")
        kept = [key for key in base if key.endswith((".codes", ".scale"))]
        assert len(kept) == 14
        assert all(torch.equal(shipped[key], base[key]) for key in kept)
    assert any(key.endswith(".offset") for key in shipped)


@pytest.mark.parametrize("method", ["qlora", "q-bara", "qa-hira", "bayesian-lora"])
def test_every_recipe_trains_from_shorthand(method: str, small_model: Path, rows: Path, tmp_path: Path) -> None:
    report = run_shorthand(small_model, rows, tmp_path / "job", method=method)
    assert report.adapter is not None
    assert report.finetuning is not None
    assert report.finetuning.losses[-1].loss < report.finetuning.losses[0].loss
    assert (tmp_path / "job/output/adapter/adapter.safetensors").is_file()
    assert (tmp_path / "job/output/native/report.json").is_file()
    assert (report.adapter.bit_operations is not None) == (method == "bayesian-lora")
    if report.adapter.bit_operations is not None:
        assert report.adapter.bit_operations.adapter_saving > 0.3, "gates close in however few steps"


@pytest.mark.slow
def test_builtin_text_and_a_quantized_head(small_model: Path, tmp_path: Path) -> None:
    report = Job(tmp_path / "job").run(small_model, None, {"modules": {"ignore": []}}, steps=2, validation_share=0.0)
    assert report.finetuning is not None
    assert report.finetuning.text.source == "builtin"
    assert (report.finetuning.loss_before, report.finetuning.held_out_sequences) == (None, 0)


@pytest.mark.parametrize(
    ("row", "fields", "words"),
    [
        ({"prompt": "a", "completion": ""}, {}, "line 1: completion is empty"),
        ({"text": "a b"}, {"sequence_length": 257}, "finetune.sequence_length is 257; the model has 256 positions"),
    ],
)
def test_a_dataset_that_cannot_be_used_ends_the_job_before_it_quantizes(
    row: dict[str, Any], fields: dict[str, Any], words: str, small_model: Path, tmp_path: Path
) -> None:
    file, job = tmp_path / "rows.jsonl", Job(tmp_path / "job")
    file.write_text(json.dumps(row))
    with pytest.raises(InvalidDataset, match=words):
        job.run(small_model, file, **fields)
    assert Stage.QUANTIZE not in {line.stage for line in job.told(ProgressEvent)}


def test_evaluation_text_is_never_learned(small_model: Path, rows: Path, tmp_path: Path) -> None:
    """If both read one file, each reads its half; a row that stands in both files is left out of evaluation."""
    from workers.engine.text.finetuning_texts import read_finetuning_texts

    tokenizer = load_tokenizer(small_model)
    part = Finetune(dataset=BuiltinText(), sequence_length=64, validation_share=0.0)
    alone, shared = (read_finetuning_texts(tokenizer, part, rows, other) for other in (None, rows))
    assert len(alone.examples.training) == len(WORDS) ** 2
    assert 0.3 < len(shared.examples.training) / len(alone.examples.training) < 0.7
    evaluation = Evaluation(num_samples=1, sequence_length=16)
    with pytest.raises(InvalidDataset, match=r"evaluation\.dataset has 0 tokens"):
        evaluation_sequences(tokenizer, evaluation, Path(shutil.copy(rows, tmp_path)), 0, None, rows)
