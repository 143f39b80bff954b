"""What an attempt reads of strangers, read by the child that does it for attempts: refused, and the child goes on."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.limited.limits import Ended, Limits
from app.limited.process import LimitedProcess
from tests.hostile.inputs import Input, inputs
from workers.engine.untrusted.lines import InputAnswer, InputOrder
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
    answer = InputAnswer()
    for part in ("model", "texts"):
        place = folder / "place"
        place.mkdir(exist_ok=True)
        asked = InputOrder.model_validate(
            {
                **{"part": part, "order": order, "place": str(place)},
                **{"memory_bytes": order.input_memory_bytes, "seconds": order.input_seconds},
            }
        )
        outcome = child.ask(asked.model_dump_json().encode(), Limits(seconds=60, memory_bytes=MEMORY_BYTES))
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
