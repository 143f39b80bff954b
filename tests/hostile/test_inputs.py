"""Input of strangers, read by the child that reads it for attempts: refused, and the child goes on."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from app.domain.request.job_request import Calibration, JobRequest
from app.limited.limits import Ended, Limits
from app.limited.process import LimitedProcess
from tests.hostile.inputs import Input, inputs
from workers.disk.input_orders import InputAnswer, InputOrder
from workers.disk.orders import WarmChild
from workers.engine.job_texts import read_files
from workers.engine.text.sequences import Sequences, load_tokenizer
from workers.engine.text.stored_texts import LoadedTexts, save_texts
from workers.engine.untrusted.asking import JobInput
from workers.runtimes.order import FILE_BYTES, HOST

SECONDS, MEMORY_BYTES = 10.0, 3 << 29
"""Of a case; of the child with all that it has imported, and of the process that reads."""
REFUSED = "refused"


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LimitedProcess]:
    folder = tmp_path_factory.mktemp("host")
    with LimitedProcess.start(HOST, folder=folder, file_bytes=FILE_BYTES) as made:
        read(made, Input("sound", None), folder)  # it answers once it has imported everything
        yield made


def read(child: LimitedProcess, case: Input, folder: Path) -> InputAnswer:
    """The first part of a case's input that is refused, or the last."""
    order = case.order(folder)
    place = folder / "place"
    place.mkdir(exist_ok=True)
    asked = InputOrder(
        order=order,
        place=str(place),
        memory_bytes=order.input_memory_bytes,
        seconds=order.input_seconds,
        text_seconds=order.input_seconds,
    )
    child.send(asked.model_dump_json().encode() + b"\n")
    for _ in ("model", "texts"):
        outcome = child.hear(Limits(seconds=60, memory_bytes=MEMORY_BYTES))
        assert outcome.ended is Ended.ANSWERED, outcome
        answer = InputAnswer.model_validate_json(outcome.answer)
        if answer.error is not None:
            break
    return answer


@pytest.mark.parametrize("case", inputs(), ids=lambda case: case.name)
def test_what_a_stranger_sent_is_refused_with_its_code(child: LimitedProcess, case: Input, tmp_path: Path) -> None:
    pid, begun = child.handle.pid, time.monotonic()
    answer = read(child, case, tmp_path)
    code = None if answer.error is None else answer.error.code
    expected = {case.code} if case.code != REFUSED else {"corrupt_checkpoint", "unsupported_architecture"}
    assert code in expected, answer.error
    assert time.monotonic() - begun < SECONDS
    assert child.usable
    assert child.handle.pid == pid


def test_the_child_reads_a_sound_input_afterwards(child: LimitedProcess, tmp_path: Path) -> None:
    answer = read(child, Input("sound", None), tmp_path)
    assert answer.error is None
    assert answer.texts is not None
    assert answer.texts.calibration is not None
    assert (tmp_path / "place" / "texts.safetensors").stat().st_size > 2 * 16 * 8


def test_texts_are_those_that_this_process_reads(child: LimitedProcess, tmp_path: Path) -> None:
    """Calibration, evaluation and training text: tokens, notes and counts through the child's file and line."""
    rows = [
        {"text": f"{word} statement is used to wrap execution of block methods " * 3} for word in ["the", "a", "with"]
    ]
    order = Input("sound", None, rows=[*rows, {"text": ""}, {**rows[0], "more": 1}] * 4).order(tmp_path)
    dataset = {"source": "local", "path": str(order.calibration_path)}
    part = {"dataset": dataset, "num_samples": 1, "sequence_length": 16}
    tune = {"dataset": dataset, "steps": 1, "sequence_length": 24, "validation_share": 0.3}
    body = {"model": order.model_path, "method": "qlora", "bits": 4, "finetune": tune}
    for request in (
        JobRequest.parse({**body, "evaluation": part}),
        JobRequest.parse(
            {"model": order.model_path, "method": "gptq", "bits": 4, "calibration": part, "evaluation": part}
        ),
    ):
        paths = dict.fromkeys(("calibration_path", "evaluation_path", "finetuning_path"), order.calibration_path)
        warm = WarmChild(orders=child.handle.orders, answers=child.handle.answers, pid=child.handle.pid)
        changed = order.model_copy(
            update={"request": request, "warm": warm, "limits_input": True, "world_size": 2, **paths}
        )
        expected = read_files(changed, load_tokenizer(Path(order.model_path)))
        inputs_of_ranks = [JobInput.of(changed, tmp_path / request.quantization.method, rank) for rank in (0, 1)]
        for part_of_rank in inputs_of_ranks:
            part_of_rank.ask()
            part_of_rank.try_model()
        for read_by_rank in (each.texts() for each in inputs_of_ranks):
            for name in ("calibration", "evaluation"):
                theirs, ours = getattr(read_by_rank, name), getattr(expected, name)
                assert (theirs is None) == (ours is None)
                if ours is not None:
                    assert (theirs.sha256, theirs.notes, theirs.report()) == (ours.sha256, ours.notes, ours.report())
            theirs, ours = read_by_rank.finetuning, expected.finetuning
            assert (theirs is None) == (ours is None)
            if theirs is not None and ours is not None:
                assert (theirs.sha256, theirs.examples.cut) == (ours.sha256, ours.examples.cut)
                assert theirs.examples.notes == ours.examples.notes
                assert torch.equal(theirs.training.ids, ours.training.ids)
                assert torch.equal(theirs.training.targets, ours.training.targets)
                assert (theirs.held_out is None) == (ours.held_out is None)


@pytest.mark.parametrize("change", ["dtype", "shape", "negative", "gone"])
def test_tokens_that_are_none_are_no_text(change: str, tmp_path: Path) -> None:
    asked = Calibration.model_validate({"num_samples": 2, "sequence_length": 16})
    ids = torch.arange(32).view(2, 16)
    changed = {"dtype": ids.int(), "shape": ids.view(16, 2), "negative": ids - 1, "gone": None}[change]
    line = save_texts(tmp_path / "texts", Sequences(ids, "a"), None, None)
    assert torch.equal(LoadedTexts(tmp_path / "texts", line).sequences("calibration", asked).ids, ids)  # type: ignore[union-attr]
    save_file({"b": ids} if changed is None else {"calibration": changed}, tmp_path / "texts")
    with pytest.raises((ValueError, KeyError)):
        LoadedTexts(tmp_path / "texts", line).sequences("calibration", asked)
