"""Scripts of bug reports that name modules by their old places run."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
from app.domain.errors import BitwrightError
from app.domain.events import AttemptOrder
from app.domain.jobs import JobRequest, JobStatus
from app.domain.finetuning import Finetune
from workers.engine.calibration import load_tokenizer
from workers.engine.examples import Example, read_examples
from workers.engine.pipeline import run
from bitwright.errors import BitwrightError as present

print(BitwrightError is present, JobStatus.QUEUED.value, callable(run))
"""


@pytest.mark.slow
def test_a_script_with_old_names_runs(tmp_path: Path) -> None:
    script = tmp_path / "report.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "tests.old_names", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.stdout == "True queued True\n", done.stderr
