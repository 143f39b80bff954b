"""One block is read beside tuning, by real children: a writer's faults end the job then, and nothing else does."""

import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from app.domain.attempt_lines import AttemptLine
from app.limited.process import LimitedProcess
from bitwright.errors import RuntimeDidNotLoad
from bitwright.events import BlockEvent, ProgressEvent, Stage
from tests.engine.conftest import run_job
from tests.engine.loads_here.conftest import RUNTIMES
from tests.engine.loads_here.faults import FAULTS, Fault, Faulty
from workers.engine.loads_here import block, cut

SLOW = pytest.mark.slow
OFTEN = ("another width", "scales of k and v swapped", "no tokenizer", "codes of 64 bits")
"""Faults of each kind that are planted in every run; the rest in the slow ones."""


def plant(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    real = vars(block)["open_writer"]

    def opened(folder: Path, *given: Any, **named: Any) -> Any:
        return Faulty(real(folder, *given, **named), folder, fault)

    monkeypatch.setattr(block, "open_writer", opened)


def read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the block be read before the job goes on, as where its first passes take longer."""
    real = block.begin

    def begun(*given: Any) -> block.BlockCheck:
        check = real(*given)
        assert check.reports is not None
        wait([check.reports])
        return check

    monkeypatch.setattr(block, "begin", begun)


class Heard(list[AttemptLine]):
    """What a job tells; `last_block` once its last block is done."""

    def __init__(self) -> None:
        super().__init__()
        self.last_block = Event()

    def append(self, line: AttemptLine) -> None:
        super().append(line)
        if isinstance(line, BlockEvent) and line.index + 1 == line.total:
            self.last_block.set()


TUNED = {"method": "signround", "steps": 1}
TRAINED = {
    "adapter": {"kind": "lora", "rank": 2},
    "finetune": {"dataset": "builtin", "sequence_length": 64, "steps": 1},
}


@pytest.mark.slow
def test_a_job_that_tunes_nothing_is_computed_beside_the_reading_and_writes_no_checkpoint_after_a_fault(
    small_model: Path, tmp_path: Path, reads: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, FAULTS[OFTEN[0]])
    lines: list[AttemptLine] = []
    with pytest.raises(RuntimeDidNotLoad):
        run_job(small_model, tmp_path, lines, order=reads)
    assert any(isinstance(line, BlockEvent) for line in lines)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("name", [each if each in OFTEN else pytest.param(each, marks=SLOW) for each in FAULTS])
def test_a_fault_that_is_known_ends_the_job_before_anything_is_tuned(
    small_model: Path, tmp_path: Path, reads: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plant(monkeypatch, FAULTS[name])
    read_at_once(monkeypatch)
    lines: list[AttemptLine] = []
    with pytest.raises(RuntimeDidNotLoad) as caught:
        run_job(small_model, tmp_path, lines, order=reads, **TUNED)
    error = caught.value
    assert error.code == "runtime_did_not_load"
    assert RUNTIMES["transformers"]["version"] in error.detail
    assert (error.field, error.value) == ("formats", "compressed-tensors")
    assert len(error.detail.encode()) < 2048 + 200
    assert str(tmp_path) not in error.detail, "paths of this machine are nobody's business"
    assert not any(isinstance(line, BlockEvent) for line in lines)
    assert not (tmp_path / "output").exists()
    assert not (tmp_path / "reading" / "block").exists()


@pytest.mark.parametrize("further", [pytest.param({}, id="blocks"), pytest.param(TRAINED, id="training", marks=SLOW)])
def test_tuning_does_not_wait_for_the_reading_and_ends_with_it(
    small_model: Path,
    tmp_path: Path,
    reads: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    further: dict[str, Any],
) -> None:
    """Reading that ends with the last block alone: all blocks are tuned beside it, and nothing comes after them."""
    plant(monkeypatch, FAULTS[OFTEN[1]])
    lines, read = Heard(), vars(block)["_read_all"]

    def late(*given: Any) -> Any:
        assert lines.last_block.wait(60)
        return read(*given)

    monkeypatch.setattr(block, "_read_all", late)
    with pytest.raises(RuntimeDidNotLoad):
        run_job(small_model, tmp_path, lines, order=reads, **TUNED, **further)
    assert sum(isinstance(line, BlockEvent) for line in lines) > 1
    stages = {line.stage for line in lines if isinstance(line, ProgressEvent)}
    assert Stage.QUANTIZE in stages
    assert not stages & {Stage.FINETUNE, Stage.EVALUATE, Stage.EXPORT}


@pytest.mark.parametrize(
    "request_body",
    [
        pytest.param({}, id="4 bits"),
        pytest.param({"symmetric": False, "bits": 3}, id="3 bits, asymmetric"),
        pytest.param(
            {
                "modules": {"ignore": ["lm_head", "*.q_proj"], "overrides": {"*.down_proj": {"bits": 8}}},
                "symmetric": False,
            },
            id="mixed",
            marks=SLOW,
        ),
        pytest.param(
            {"formats": ["merged", "native"], "quantization": {"method": "rtn", "scheme": "nvfp4a16"}}, id="nvfp4a16"
        ),
        pytest.param(
            {"formats": ["merged", "native"], "modules": {"embeddings": 8, "head": 4}}, id="embeddings and head"
        ),
        pytest.param({"formats": ["native"], "method": "lq-lora", "rank": 2, "bits": 3}, id="low-rank", marks=SLOW),
    ],
)
def test_what_is_sound_loads_and_computes_what_the_engine_does(
    small_model: Path, tmp_path: Path, reads: dict[str, Any], request_body: dict[str, Any]
) -> None:
    lines: list[AttemptLine] = []
    report = run_job(small_model, tmp_path, lines, order=reads, **request_body).report
    formats = request_body.get("formats", ["compressed-tensors"])
    assert [(load.format, load.runtime, load.read, load.result) for load in report.loads] == [
        (name, "transformers", "block", "loads") for name in formats
    ]
    assert all(load.difference is not None and load.difference < 0.01 for load in report.loads)
    assert report.seconds["verify"] > 0
    told = [line for line in lines if isinstance(line, ProgressEvent) and line.stage is Stage.VERIFY]
    assert [line.done for line in told] == [0, 1]


def test_nothing_is_read_where_nobody_wants_it_or_can(small_model: Path, tmp_path: Path, reads: dict[str, Any]) -> None:
    off = run_job(small_model, tmp_path / "off", order=reads, verify="off").report
    none = run_job(small_model, tmp_path / "none").report
    assert (off.loads, none.loads) == ((), ())
    assert "verify" not in off.seconds


def test_a_model_that_is_none_with_one_block_is_not_blamed_on_its_format(
    small_model: Path, tmp_path: Path, reads: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cut.one_layer
    monkeypatch.setattr(cut, "one_layer", lambda *given: real(*given) | {"num_attention_heads": 7})
    (load,) = run_job(small_model, tmp_path, order=reads).report.loads
    assert load.result == "not_checked"
    assert "no model to transformers, quantized or not" in str(load.detail)


def test_a_model_that_cannot_be_cut_is_not_checked(
    small_model: Path, tmp_path: Path, reads: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> dict[str, Any]:
        raise cut.NotOneBlockError("its layers are one")

    monkeypatch.setattr(cut, "one_layer", refuse)
    (load,) = run_job(small_model, tmp_path, order=reads).report.loads
    assert (load.result, load.detail) == ("not_checked", "its layers are one")


ENDS = {
    "dies": "import os, sys; sys.stdin.readline(); os.kill(os.getpid(), 9)",
    "hangs": "import sys, time; sys.stdin.readline(); time.sleep(600)",
    "babbles": "import sys; sys.stdin.readline(); print('{', flush=True); sys.stdin.read()",
}


@pytest.fixture
def bad_child(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LimitedProcess]:
    command = [sys.executable, "-c", ENDS[request.param]]
    with LimitedProcess.start(command, folder=tmp_path / "bad", file_bytes=1 << 20) as child:
        yield child


@pytest.mark.parametrize("bad_child", ENDS, indirect=True)
def test_whatever_the_child_does_no_attempt_is_lost(
    small_model: Path, tmp_path: Path, bad_child: LimitedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.engine.loads_here.reading.SECONDS", 1.0)
    monkeypatch.setattr("workers.engine.loads_here.reading.HOST", bad_child_again(bad_child))
    handle = bad_child.handle
    warm = {"orders": handle.orders, "answers": handle.answers, "pid": handle.pid}
    result = run_job(small_model, tmp_path, order={"runtimes": RUNTIMES, "warm": warm})
    (load,) = result.report.loads
    assert load.result == "not_checked", "the plain model failed as well, so that nothing was learnt of the format"
    assert (tmp_path / "output" / "compressed-tensors" / "model.safetensors").is_file()


def bad_child_again(child: LimitedProcess) -> tuple[str, ...]:
    """The command of another child that ends as this one does: it is started where this one has ended."""
    process = child._process
    assert process is not None
    given = process.args
    assert isinstance(given, list)
    return tuple(given[given.index(sys.executable, 1) :])


def test_a_required_runtime_that_the_worker_lacks_ends_the_job_at_once(
    small_model: Path, tmp_path: Path, reads: dict[str, Any]
) -> None:
    with pytest.raises(RuntimeDidNotLoad, match="requires vllm") as caught:
        run_job(small_model, tmp_path, order=reads, require={"loads": ["transformers", "vllm"]})
    assert (caught.value.field, caught.value.value) == ("require.loads", "vllm")


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_writer_that_forgets_quantized_embeddings_makes_another_model(
    small_model: Path, tmp_path: Path, reads: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    stored = load_file(model / "model.safetensors")
    if tied:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        del stored["lm_head.weight"]
        save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    request: dict[str, Any] = {"formats": ["merged"], "modules": {"embeddings": 2}, "evaluation": None}
    report = run_job(model, tmp_path / "sound", order=reads, **request).report
    assert [load.result for load in report.loads] == ["loads"]

    def forget(folder: Path) -> None:
        written = load_file(folder / "model.safetensors")
        name = "model.embed_tokens.weight"
        save_file(written | {name: stored[name]}, folder / "model.safetensors", metadata={"format": "pt"})

    plant(monkeypatch, forget)
    with pytest.raises(RuntimeDidNotLoad, match="misreads one block as merged"):
        run_job(model, tmp_path / "faulty", order=reads, **request)
