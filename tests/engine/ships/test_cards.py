"""Cards of whole jobs: they say what the report says, their lines load what was measured, the Hub reads them."""

import json
import math
import re
import runpy
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig
from safetensors import safe_open

from app.domain.adapters import ADAPTERS
from app.domain.formats import ExportFormat
from app.domain.methods import METHODS, Form
from app.domain.request.job_request import Evaluation, JobRequest
from bitwright.report import Report
from tests.engine.conftest import TEXTS
from tests.formats.examples import held_by
from workers.disk.orders import AttemptOrder
from workers.engine.reporter import Reporter
from workers.engine.run import run
from workers.engine.text.sequences import evaluation_sequences, load_tokenizer
from workers.formats.registry import base_format

MODEL, ROWS, COMMIT = "org/tiny", "org/rows", "0123456789abcdef0123456789abcdef01234567"
SOURCE_CARD = """\
---
license: other
license_name: tiny-licence
license_link: LICENSE
language: [no, en]
pipeline_tag: text-generation
tags: [their-own]
---
# Somebody's words
"""
AFFINE = {"method": "rtn", "bits": 4, "group_size": 32}
CHOSEN: dict[str, dict[str, Any]] = {
    "plain": {"formats": ["compressed-tensors", "merged"]},
    "factors": {"quantization": {"method": "loftq", "bits": 4, "group_size": 32}, "formats": ["merged", "peft"]},
    "lora": {"adapter": {"kind": "lora", "rank": 4}, "formats": ["compressed-tensors", "peft"]},
    "lora-gguf": {"adapter": {"kind": "lora", "rank": 4}, "formats": ["gguf", "peft"]},
    "lora-added": {"adapter": {"kind": "lora", "rank": 4}, "merge": "16bit", "formats": ["merged"]},
    "bayesian": {"adapter": {"kind": "bayesian-lora", "rank": 4}, "formats": ["merged", "peft"]},
    "qa-lora": {"adapter": {"kind": "qa-lora", "rank": 4}, "formats": ["merged", "gguf"]},
    "qa-lora-folded": {"adapter": {"kind": "qa-lora", "rank": 4}, "merge": "quantized", "formats": ["merged", "gguf"]},
    "qa-hira": {"adapter": {"kind": "qa-hira", "rank": 4}, "formats": ["compressed-tensors"]},
    "q-bara": {"adapter": {"kind": "q-bara", "rank": 4}, "formats": ["native"]},
    "qa-blora": {"adapter": {"kind": "qa-blora", "rank": 4}, "formats": ["compressed-tensors", "merged"]},
}


def of_other_formats() -> dict[str, dict[str, Any]]:
    """A job with a LoRA for each format that no chosen job has, in a scheme that its row allows."""
    asked = {name for job in CHOSEN.values() for name in job["formats"]}
    jobs: dict[str, dict[str, Any]] = {}
    for name in ExportFormat:
        if name not in asked and not name.info.is_adapter:
            scheme = held_by(name)[-1].scheme
            method = "rtn" if Form.AFFINE in name.info.kinds else "nf"
            quantization = {"method": method, **scheme.model_dump(exclude={"name"})}
            job: dict[str, Any] = {"quantization": quantization, "adapter": {"kind": "lora", "rank": 4}}
            jobs[f"lora-{name}"] = job | {"formats": [name.value, "peft"]}
    return jobs


JOBS = CHOSEN | of_other_formats()
DEFAULT = {"lora", "lora-gguf", "qa-lora-folded", "qa-hira"} | (JOBS.keys() - CHOSEN.keys())
"""The rest goes with the slow tests: every adapter, every merge, every format that it can have."""
BASES = {"lora", "lora-gguf", "bayesian", "factors", "qa-lora", "qa-hira", "q-bara", "qa-blora"} | (
    JOBS.keys() - CHOSEN.keys()
)
"""Jobs whose checkpoints, but for a native one with factors in it, are the quantized base alone."""


@dataclass(frozen=True)
class Job:
    """A job that has run: its folders by name, and its evaluation text."""

    name: str
    folders: dict[str, Path]
    report: Report
    ids: torch.Tensor

    @property
    def spec(self) -> dict[str, Any]:
        return JOBS[self.name]

    def card(self, folder: str) -> Any:
        return ModelCard.load(self.folders[folder] / "README.md")

    def is_base(self, folder: str) -> bool:
        """True if the folder holds the base alone: a native one keeps the factors that stock peft knows, too."""
        keeps = folder == "native" and "peft" in self.folders
        return self.name in BASES and folder not in ("peft", "adapter") and not keeps


@pytest.fixture(scope="session")
def published(single_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in fp32 as the Hub might have it: with a card and a licence, on which figures hold to the last digit."""
    folder = tmp_path_factory.mktemp("published") / "tiny"
    folder.mkdir()
    for file in single_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "README.md").write_text(SOURCE_CARD)
    (folder / "LICENSE").write_text("of one's own")
    pairs = [{"prompt": f"after {a} and {b} ", "completion": f"{b} {a}"} for a in "abcdefgh" for b in "ijklmnop"]
    (folder.parent / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def names() -> Iterator[Any]:
    yield from (pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in JOBS)


@pytest.fixture(scope="module", params=names())
def job(request: pytest.FixtureRequest, published: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    name = request.param
    body = {"model": MODEL, "quantization": AFFINE, **TEXTS, **JOBS[name]}
    if "adapter" in body:
        training = {"steps": 8, "batch_size": 4, "sequence_length": 64, "learning_rate": 0.02, "validation_share": 0.2}
        body["finetune"] = {"dataset": ROWS, **training}
    workspace = tmp_path_factory.mktemp(name)
    order = AttemptOrder(
        job_id="job_1",
        attempt=1,
        request=JobRequest.parse(body),
        model_path=str(published),
        model_revision=COMMIT,
        finetuning_path=str(published.with_name("rows.jsonl")),
        device="cpu",
    )
    done = run(order, workspace, Reporter(lambda _: None))
    part = Evaluation.model_validate(TEXTS["evaluation"])
    ids = evaluation_sequences(load_tokenizer(published), part, None, 0, None).ids
    return Job(name, {key: workspace / path for key, path in done.checkpoints.items()}, done.report, ids)


def test_front_matter_is_what_the_hub_reads(job: Job) -> None:
    for name in job.folders:
        data = job.card(name).data
        assert (data.base_model, data.pipeline_tag) == (MODEL, "text-generation"), name
        assert (data.license, data.license_name, data.license_link) == ("other", "tiny-licence", "LICENSE")
        assert (job.folders[name] / "LICENSE").read_text() == "of one's own"
        assert data.language == ["no", "en"]
        assert data.datasets == ([ROWS] if "adapter" in job.spec else None)
        alone = name in ("peft", "adapter")
        whole = job.report.finetuning is not None and name == "merged" and not job.is_base(name)
        relation = "adapter" if alone else "finetune" if whole else "quantized"
        assert data.to_dict()["base_model_relation"] == relation, name
        assert data.library_name == ("bitwright" if name == "adapter" else ExportFormat(name).info.library)
        assert data.tags is not None
        assert "their-own" not in data.tags
        assert data.tags[:2] == ["bitwright", name]


def test_the_card_names_method_adapter_dataset_and_training(job: Job) -> None:
    told, adapter = job.report.finetuning, job.report.adapter
    for name in job.folders:
        text = job.card(name).text
        (title,) = re.findall(r"^# (.*)$", text, flags=re.MULTILINE)
        assert METHODS[job.report.method].title in title
        assert "tiny" in title
        if told is None or adapter is None:
            assert "## Training" not in text
            continue
        kind = ADAPTERS[adapter.kind].title
        assert kind in title
        assert ROWS in title
        section = text.partition("## Training")[2].partition("\n## ")[0]
        assert kind in section
        assert f"`{ROWS}` (sha256 `{told.text.sha256[:16]}`)" in section
        assert f"| steps | 8, 4 sequences each, {told.tokens_read} tokens read |" in section
        assert "| learning rate | 0.02 |" in section
        ships = "" if told.loss_shipped is None else f", {told.loss_shipped:.4f} with the weights that ship"
        assert f"| {told.loss_before:.4f} before, {told.loss_after:.4f} after{ships} |" in section
        assert ("is folded into the offset of each group" in section) == (adapter.merge is not None)


def test_a_part_says_that_it_is_one(job: Job) -> None:
    for name in job.folders:
        text = job.card(name).text
        (title,) = re.findall(r"^# (.*)$", text, flags=re.MULTILINE)
        base = job.is_base(name)
        assert ("This is the quantized base alone" in text) == base, name
        assert ("the base alone, without" in title) == base, name
        together = base or name in ("peft", "adapter")
        assert ("**Of base and adapter together**" in text) == together, name
        assert ("Of this folder's files" in text) != together, name
        assert ("have this adapter in their weights already" in text) == (
            name == "adapter" and job.spec.get("merge") == "quantized"
        )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_first_lines_of_a_card_load_what_its_figures_are_of(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Run as they stand, but for the folders: the perplexity of the loaded model is the card's."""
    for folder in job.folders.values():
        monkeypatch.syspath_prepend(str(folder))
    for name in job.folders:
        if name == "adapter" and job.spec.get("merge") == "quantized":
            continue  # its base is another job's
        text = job.card(name).text
        told = float(re.findall(r"^\| perplexity \| [\d.]+ \| ([\d.]+) \|", text, flags=re.MULTILINE)[0])
        blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        found = perplexity(loaded(job, name, blocks[0], tmp_path), job.ids)
        assert found == pytest.approx(told, rel=0.005), name
        if job.is_base(name) and job.report.finetuning is not None:
            itself = perplexity(loaded(job, name, blocks[1], tmp_path), job.ids)
            assert itself != pytest.approx(told, rel=0.005), f"{name}: the adapter changes nothing that could be seen"


def loaded(job: Job, name: str, lines: str, folder: Path) -> Any:
    """The `model` that the lines of a card make."""
    base = base_format([ExportFormat(format_) for format_ in job.spec["formats"]]) if name == "peft" else "native"
    if name == "peft":
        assert f"the `{base}` checkpoint of the same job" in job.card(name).text
    places = {
        "this/folder": job.folders[name],
        "the/adapter": job.folders.get("adapter" if "attach(" in lines else "peft"),
        "the/base": job.folders[base],
    }
    for place, found in places.items():
        lines = lines.replace(f"path/to/{place}", str(found))
    file = folder / "lines.py"
    file.write_text(lines)
    paths = list(sys.path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        model = runpy.run_path(str(file))["model"]
    sys.path[:] = paths
    return model


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    logits = model(ids).logits[:, :-1].float()
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_adapters_name_the_model_by_its_id(job: Job) -> None:
    if "peft" in job.folders:
        read = PeftConfig.from_pretrained(str(job.folders["peft"]))
        assert (read.base_model_name_or_path, read.revision) == (MODEL, COMMIT)
    if "adapter" in job.folders:
        with safe_open(job.folders["adapter"] / "adapter.safetensors", framework="pt") as file:
            (told,) = [json.loads(entry) for entry in file.metadata().values()]
        assert told["base_model_name_or_path"] == MODEL


def test_a_gguf_file_says_what_it_is(job: Job) -> None:
    if "gguf" not in job.folders:
        return
    fields = gguf.GGUFReader(job.folders["gguf"] / "model.gguf").fields
    told = {key.removeprefix("general."): field.contents() for key, field in fields.items()}
    kind = ADAPTERS[job.spec["adapter"]["kind"]].title
    base = job.is_base("gguf")
    assert told["type"] == "model"
    assert told["name"].startswith("tiny, Round to nearest")
    assert f"{kind} on {ROWS}" in told["name"]
    assert ("the base alone" in told["name"]) == base
    assert ("quantized base alone" in told["description"]) == base
    assert told.get("finetune") == (None if base else f"{kind} on {ROWS}")
    assert told["quantized_by"].startswith("Bitwright ")
    assert (told["license"], told["license.name"]) == ("other", "tiny-licence")
    assert told["license.link"] == f"https://huggingface.co/{MODEL}/blob/main/LICENSE"
    assert (told["base_model.count"], told["base_model.0.name"]) == (1, "tiny")
    assert told["base_model.0.organization"] == "org"
    assert told["base_model.0.repo_url"] == f"https://huggingface.co/{MODEL}"
    assert (told["dataset.count"], told["dataset.0.name"]) == (1, "rows")
    assert told["dataset.0.repo_url"] == f"https://huggingface.co/datasets/{ROWS}"
    assert told["languages"] == ["no", "en"]
    assert {"bitwright", "gguf", "text-generation", job.spec["adapter"]["kind"]} == set(told["tags"])


def test_every_safetensors_file_has_one_entry_of_metadata_at_the_most(job: Job) -> None:
    """safetensors writes several in an order of its own, and the same job shall give the same bytes."""
    files = [file for folder in job.folders.values() for file in folder.glob("*.safetensors")]
    files += (job.folders["native"].parents[1] / "state").glob("*.safetensors")
    assert len(files) > 3
    for file in files:
        with safe_open(file, framework="pt") as open_job:
            assert len(open_job.metadata() or {}) <= 1, file.name


def test_every_job_of_the_table_is_what_it_says() -> None:
    assert JOBS.keys() >= DEFAULT | BASES
    asked = {name for job in JOBS.values() for name in job["formats"]}
    assert asked == {name.value for name in ExportFormat}
    assert {job["adapter"]["kind"] for job in JOBS.values() if "adapter" in job} == ADAPTERS.keys()
