"""The two births of an attempt's process, as the process itself sees them: the rest is `tests/supervise/spares`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.domain.request.job_request import JobRequest
from tests.supervise.bench import alive, wait_for
from workers.child.lifeline import ATTEMPT_OOM_SCORE, SPARE_OOM_SCORE
from workers.disk.orders import AttemptOrder, SpareOrder, WarmChild
from workers.supervise.child_process import ChildProcess, child_environment
from workers.supervise.spares.spare import Spare

CHILD = "tests.child.newborn"


def spare(tmp_path: Path, device: str = "cpu") -> Spare:
    return Spare(CHILD, device, tmp_path / "spare", environment=child_environment({}), silence_seconds=60)


def said(child: ChildProcess) -> dict[str, object]:
    """The first line of a child."""
    lines: list[bytes] = []
    while not lines:
        assert not child.ended(), "it said nothing"
        lines += child.lines(0.1) or child.remaining_lines()
    told: dict[str, object] = json.loads(lines[0])
    return told


def order(tmp_path: Path, *given: int) -> SpareOrder:
    return SpareOrder(workspace="/of/job_7", log=str(tmp_path / "attempt.log"), job_id="job_7", attempt=3, given=given)


def test_a_process_that_is_started_for_a_job(tmp_path: Path) -> None:
    names = {"BITWRIGHT_JOB_ID": "job_7", "BITWRIGHT_ATTEMPT": "3"}
    with ChildProcess(
        [CHILD, "/of/job_7", "2"],
        environment=child_environment(names),
        log_path=tmp_path / "attempt.log",
        silence_seconds=60,
    ) as child:
        told = said(child)
    assert told == {"prepared": [], "workspace": "/of/job_7", "rank": 2, "given": {}, "score": ATTEMPT_OOM_SCORE}
    logged = json.loads((tmp_path / "attempt.log").read_text())
    assert (logged["event"], logged["job_id"], logged["attempt"]) == ("born", "job_7", 3)


def test_a_process_that_waits_for_its_job(tmp_path: Path) -> None:
    (tmp_path / "attempt.log").write_text("of an earlier attempt\n")
    reading, writing = os.pipe()
    with spare(tmp_path, "cuda") as waiting:
        wait_for(lambda: waiting.ready, what="a spare that waits")
        assert not waiting.took_order
        assert Path(f"/proc/{waiting.pid}/oom_score_adj").read_text().strip() == str(SPARE_OOM_SCORE)
        waiting.order(order(tmp_path, writing))
        told = said(waiting.child)
        wait_for(lambda: waiting.took_order, what="its word that it has read the order")
        wait_for(waiting.child.ended, what="its end")
        assert waiting.child.finish() == 0
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "through the given pipe"
    given = told.pop("given")
    assert isinstance(given, dict)
    assert list(given) == [str(writing)]
    assert told == {
        "prepared": ["cuda", "begun"],
        "workspace": "/of/job_7",
        "rank": 0,
        "score": ATTEMPT_OOM_SCORE,
    }
    earlier, line = (tmp_path / "attempt.log").read_text().splitlines()
    assert earlier == "of an earlier attempt"
    assert (json.loads(line)["job_id"], json.loads(line)["attempt"]) == ("job_7", 3)


def test_a_spare_that_its_supervisor_wants_no_more_ends(tmp_path: Path) -> None:
    waiting = spare(tmp_path)
    wait_for(lambda: waiting.ready, what="a spare that waits")
    waiting._supervisor.close()
    wait_for(waiting.child.ended, 5, what="its end")
    assert waiting.end() == 0


def test_a_spare_without_a_supervisor_ends_with_its_guard(tmp_path: Path) -> None:
    """While it prepares or waits: the guard and the kernel need nothing from it."""
    code = (
        "import sys, time; from pathlib import Path; from workers.supervise.child_process import child_environment\n"
        "from workers.supervise.spares.spare import Spare\n"
        f"spare = Spare({CHILD!r}, 'cpu', Path(sys.argv[1]), environment=child_environment({{}}), silence_seconds=60)\n"
        "while not spare.ready: time.sleep(0.01)\n"
        "print(spare.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "spare")], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        (guard,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        worker.kill()
    wait_for(lambda: not alive(pid) and not alive(guard), 5, what="the end of spare and guard")


@pytest.mark.parametrize("given", [{}, {7: 3, 8: 4}])
def test_an_order_names_descriptors_as_its_process_has_them(given: dict[int, int]) -> None:
    request = JobRequest.parse({"model": "/m", "method": "rtn"})
    warm = WarmChild(orders=7, answers=8, pid=99)
    before = AttemptOrder(job_id="job_7", attempt=1, request=request, model_path="/m", device="cpu", warm=warm)
    expected = WarmChild(orders=3, answers=4, pid=99) if given else warm
    assert before.renumbered(given).warm == expected
    alone = before.model_copy(update={"warm": None})
    assert alone.renumbered(given) == alone
