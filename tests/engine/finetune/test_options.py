"""Every option of `finetune`, `calibration` and `evaluation` does something, and checkpoints belong to all of them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.domain.request.finetuning import Finetune
from app.domain.request.job_request import Calibration, Evaluation, JobRequest
from bitwright.events import CheckpointEvent
from tests.engine.finetune.test_noise import losses_are
from tests.engine.finetune.test_stage import WORDS
from tests.engine.finetune.test_trainer import run as train
from tests.engine.model.random_models import save_random_model
from workers.disk.orders import AttemptOrder
from workers.engine.finetune.memory_plan import TrainingPlan, plan_training
from workers.engine.finetune.stage import _Finetuning
from workers.engine.job import Job
from workers.engine.job_texts import Texts, read_files, read_texts
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.reporter import Reporter
from workers.engine.text.generated import Generation
from workers.engine.text.sequences import load_tokenizer

Seen = list[Any]


@dataclass(frozen=True)
class Switch:
    """Another value of an option, where its effect is looked for, and the options beside it."""

    other: Any
    where: str
    beside: Mapping[str, Any] = field(default_factory=dict)


SWITCHES: dict[str, dict[str, Switch]] = {
    "finetune": {
        "dataset": Switch("other", "text"),
        "sequence_length": Switch(24, "text"),
        "loss_on": Switch("all", "text"),
        "packing": Switch(False, "text"),
        "validation_share": Switch(0.4, "text"),
        "steps": Switch(3, "training"),
        "epochs": Switch(2.0, "steps"),
        "batch_size": Switch(3, "training"),
        "learning_rate": Switch(0.02, "training"),
        "warmup_share": Switch(0.9, "training"),
        "schedule": Switch("cosine", "training"),
        "weight_decay": Switch(0.5, "training"),
        "clip_norm": Switch(1e-9, "training"),
        "validation_sequences": Switch(1, "training"),
        "validation_every": Switch(1, "training"),
        "patience": Switch(1, "training", {"validation_every": 1}),
        "checkpoint_every": Switch(1, "training"),
        "gradient_checkpointing": Switch(True, "plan"),
    },
    "calibration": {
        "dataset": Switch("other", "text"),
        "num_samples": Switch(3, "text"),
        "sequence_length": Switch(24, "text"),
        "further_samples": Switch(2, "text"),
        "written_samples": Switch(2, "text"),
        "mixture": Switch([{"dataset": "builtin", "share": 1.0}], "text"),
    },
    "evaluation": {
        "dataset": Switch("other", "text"),
        "num_samples": Switch(3, "text"),
        "sequence_length": Switch(24, "text"),
        "seeds": Switch(2, "text"),
        "tasks": Switch([{"name": "pairs", "kind": "exact_match", "dataset": "one"}], "text"),
    },
}
PARTS: dict[str, Any] = {"finetune": Finetune, "calibration": Calibration, "evaluation": Evaluation}
OPTIONS = [(part, option) for part, kind in PARTS.items() for option in kind.model_fields]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    save_random_model(found, "llama", dtype=torch.bfloat16)
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of rows for each part: no row is in two of them."""
    folder = tmp_path_factory.mktemp("rows")
    for name in (f"{part}-{which}" for part in PARTS for which in ("one", "other")):
        pairs = [{"prompt": f"{name} after {a} and {b} ", "completion": f"{b} {a}"} for a in WORDS for b in WORDS]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def texts_of(small_model: Path, rows: Path, part: str, options: Mapping[str, Any]) -> Texts:
    """All texts of a job whose `part` has these options."""
    small: dict[str, dict[str, Any]] = {
        "finetune": {"sequence_length": 64},
        "calibration": {"num_samples": 2, "sequence_length": 16},
        "evaluation": {"num_samples": 2, "sequence_length": 16},
    }
    small[part] |= options
    paths = {name: str(rows / f"{name}-{given.pop('dataset', 'one')}.jsonl") for name, given in small.items()}
    body = {name: {"dataset": paths[name], **given} for name, given in small.items()}
    if "mixture" in options:
        del body["calibration"]["dataset"]
    pairs = rows / "pairs.jsonl"
    pairs.write_text('{"prompt": "one and one", "answer": "two"}\n')
    for task in body["evaluation"].get("tasks", []):
        task["dataset"] = str(pairs)
    method = {"method": "signround", "preset": "max"} if "written_samples" in options else {"method": "gptq"}
    order = AttemptOrder(
        job_id="job_1",
        attempt=1,
        request=JobRequest.parse({"model": str(small_model), **method, "bits": 4, "group_size": 32, **body}),
        model_path=str(small_model),
        calibration_path=paths["calibration"],
        evaluation_path=paths["evaluation"],
        finetuning_path=paths["finetune"],
        other_texts={"evaluation.tasks.0.dataset": str(pairs)} if "tasks" in body["evaluation"] else {},
        device="cpu",
    )
    model = StreamedModel.open(Checkpoint.open(small_model), torch.device("cpu"))
    files = partial(read_files, order, load_tokenizer(small_model))
    with TemporaryDirectory() as kept:
        by = Generation(
            checkpoint=Checkpoint.open(small_model),
            tokenizer=load_tokenizer(small_model),
            device=torch.device("cpu"),
            kept=Path(kept) / "generated.safetensors",
            leads=True,
            tick=lambda *_: None,
        )
        return read_texts(order, model, Reporter(lambda _: None), files, by)


def texts_seen(texts: Texts, part: str) -> Seen:
    if part != "finetune":
        sequences = getattr(texts, part)
        further = None if sequences.further is None else sequences.further.tolist()
        return [tuple(sequences.ids.shape), sequences.ids.tolist(), further, len(texts.tasks)]
    assert texts.finetuning is not None
    kept = [text for text in (texts.finetuning.training, texts.finetuning.held_out) if text is not None]
    return [[(each.ids.tolist(), each.loss_mask.tolist()) for each in texts.finetuning.examples.training]] + [
        (len(text), text.length) for text in kept
    ]


@pytest.mark.parametrize(("part", "option"), OPTIONS)
def test_every_option_does_something(
    part: str, option: str, small_model: Path, folder: Path, rows: Path, tmp_path: Path
) -> None:
    assert option in SWITCHES[part], f"say here what else {part}.{option} may be, and where its effect is seen"
    switch = SWITCHES[part][option]

    def text(**options: Any) -> Seen:
        return texts_seen(texts_of(small_model, rows, part, options), part)

    def training(**options: Any) -> Seen:
        short = {"steps": 2, "learning_rate": 0.01, "warmup_share": 0.0, "weight_decay": 0.0}
        workspace = tmp_path / str(len(list(tmp_path.iterdir())))
        workspace.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            if option == "patience":
                losses_are(patch, [1, 2, 3])
            found = train(folder, workspace, **(short | options))
        values = [tensor.tolist() for tensors in found.adapters.values() for tensor in tensors.values()]
        told = [line.step for line in found.told(CheckpointEvent)]
        return [values, [each.loss for each in found.outcome.progress.validations], told]

    def plan(**options: Any) -> Seen:
        model = StreamedModel.open(Checkpoint.open(small_model), torch.device("cpu"))
        config = Finetune.model_validate({"dataset": {"source": "builtin"}, "sequence_length": 64} | options)
        return [plan_training(model, set(model.linears()), config, 64)]

    def steps(**options: Any) -> Seen:
        config = Finetune.model_validate({"dataset": {"source": "builtin"}, **options})
        return [config.of_sequences(40).steps, config.of_sequences(80).steps]

    looks = {"text": text, "training": training, "plan": plan, "steps": steps}
    look: Callable[..., Seen] = looks[switch.where]
    assert look(**switch.beside) != look(**switch.beside, **{option: switch.other})


# ---- What a checkpoint belongs to ------------------------------------------------------------------------------------


def fingerprint(**changes: Any) -> str:
    """That of training, with one part changed."""
    given: dict[str, Any] = {
        "codes": "one",
        "adapter": {"kind": "lora", "rank": 4},
        "finetune": {"steps": 3},
        "text": "one",
        "plan": TrainingPlan(4, 0, keeps=True),
    } | changes
    body = {"model": "/m", "bits": 4, "adapter": given["adapter"], "finetune": {"dataset": "builtin"}}
    request = JobRequest.parse(body | {"method": "rtn"})
    stage = _Finetuning(
        job=SimpleNamespace(finished_blocks=SimpleNamespace(fingerprint=given["codes"]), request=request),  # type: ignore[arg-type]
        config=Finetune.model_validate({"dataset": {"source": "builtin"}, **given["finetune"]}),
        adapter=request.adapter,  # type: ignore[arg-type]
        texts=SimpleNamespace(sha256=given["text"]),  # type: ignore[arg-type]
        attach=None,  # type: ignore[arg-type]
        head=None,
    )
    return stage.fingerprint(given["plan"])


PLAN = TrainingPlan(4, 0, keeps=True)


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("codes", "two"),
        ("adapter", {"kind": "lora", "rank": 5}),
        ("adapter", {"kind": "lora", "rank": 4, "dropout": 0.1}),
        ("finetune", {"steps": 4}),
        ("finetune", {"steps": 3, "schedule": "linear"}),
        ("text", "two"),
        ("plan", replace(PLAN, micro_batch=2)),
        ("plan", replace(PLAN, recomputed=1)),
        ("plan", replace(PLAN, keeps=False)),
    ],
)
def test_a_checkpoint_of_training_belongs_to_all_that_decides_it(part: str, other: Any) -> None:
    assert fingerprint(**{part: other}) != fingerprint()
    assert fingerprint() == fingerprint(plan=replace(PLAN, captures=True)), "how passes run changes nothing"


class Known(SimpleNamespace):
    """What `Job.fingerprint` reads, with one part changed."""


def _named(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"sha256": given["calibration"], "further_sha256": given["further"]}


def job_fingerprint(**changes: Any) -> str:
    given: dict[str, Any] = {
        **{"request": {}, "model": "one", "revision": "one", "calibration": "one", "further": None},
        **{"plan": {"threads": 2}, "prepared": "one", "code": "one", "libraries": {"torch": "1"}},
    } | changes
    request = JobRequest.parse({"model": "/m", "method": "gptq", "bits": 4, **given["request"]})
    job: Any = Known(
        texts=Known(calibration=None if given["calibration"] is None else Known(**_named(given))),
        request=request,
        model=Known(checkpoint=Known(digest=lambda revision: [given["model"], revision])),
        order=Known(model_pin=given["revision"]),
        plan=Known(decides_codes=lambda: given["plan"]),
        prepared=Known(digest=lambda: given["prepared"]),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.engine.job.code_version", lambda: given["code"])
        patch.setattr("workers.engine.job.library_versions", lambda: given["libraries"])
        return Job.fingerprint(job)


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("request", {"bits": 3}),
        ("request", {"seed": 1}),
        ("request", {"calibration": {"num_samples": 7}}),
        ("model", "two"),
        ("revision", "two"),
        ("calibration", "two"),
        ("calibration", None),
        ("further", "two"),
        ("plan", {"threads": 3}),
        ("prepared", "two"),
        ("code", "two"),
        ("libraries", {"torch": "2"}),
    ],
)
def test_finished_blocks_belong_to_all_that_decides_them(part: str, other: Any) -> None:
    assert job_fingerprint(**{part: other}) != job_fingerprint()


@pytest.mark.parametrize(
    "request_part",
    [{"priority": 5}, {"metadata": {"a": "b"}}, {"formats": ["native", "merged"]}, {"evaluation": {"num_samples": 3}}],
)
def test_finished_blocks_survive_a_change_of_what_does_not_decide_them(request_part: dict[str, Any]) -> None:
    assert job_fingerprint(request=request_part) == job_fingerprint()


def test_the_libraries_that_make_codes_are_these() -> None:
    from workers.engine.fingerprint import library_versions

    assert set(library_versions()) == {"torch", "transformers", "tokenizers", "numpy", "triton"}
    assert library_versions()["torch"] == torch.__version__
