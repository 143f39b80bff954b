"""The worked example of docs/adding-a-format.md is a format after two touches of a copy of the source."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("app", "bitwright", "workers")
JOB = """
import json, sys
from pathlib import Path

from app.domain.formats import FORMATS
from app.domain.request.job_request import JobRequest
from workers.disk.orders import AttemptOrder
from workers.engine.reporter import Reporter
from workers.engine.run import run
from workers.tiny_model import Recipe, make_tiny_model

folder = Path(sys.argv[1])
recipe = Recipe(vocabulary=400, width=64, intermediate=64, blocks=1, positions=64, steps=5, batch=1, length=16)
model = str(make_tiny_model(folder / "model", recipe))
quantization = {"method": "loftq", "bits": 4, "rank": 4}
checkpoints = {}
for name, formats in {"alone": ["rows"], "adapted": ["rows", "peft"]}.items():
    request = JobRequest.parse({"model": model, **quantization, "formats": formats, "evaluation": None})
    order = AttemptOrder(job_id="job_1", attempt=1, request=request, model_path=model, device="cpu")
    checkpoints[name] = dict(run(order, folder / name, Reporter(lambda _: None)).checkpoints)
print(json.dumps({"formats": [name.value for name in FORMATS], "checkpoints": checkpoints}))
"""


def example() -> tuple[str, str]:
    """The row and the file of the page."""
    row, file = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding-a-format.md").read_text(), flags=re.S)
    return row, file


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with the example's row and file, and nothing else changed."""
    folder, (row, file) = tmp_path_factory.mktemp("source"), example()
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "workers/formats/rows.py").write_text(file)
    table = folder / "app/domain/formats.py"
    before, mark, after = table.read_text().partition("\n    def __new__(cls, name: str, *info: FormatInfo)")
    assert mark
    table.write_text(before + indent(row, "    ") + mark + after)
    return folder


def test_a_row_and_a_file_make_a_format(source: Path, tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", JOB, str(tmp_path)],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    answer = json.loads(finished.stdout.splitlines()[-1])
    assert answer["formats"][-1] == "rows"
    assert answer["checkpoints"]["alone"].keys() == {"rows", "native"}
    assert answer["checkpoints"]["adapted"].keys() == {"rows", "peft", "native"}
    card = (tmp_path / "alone/output/rows/README.md").read_text()
    assert "format `rows`" in card
    assert "AutoModelForCausalLM.from_pretrained(" in card.partition("## Load")[2].partition("## Size")[0]
    assert "This is the quantized base alone" in (tmp_path / "adapted/output/rows/README.md").read_text()
    assert (tmp_path / "alone/output/rows/model.safetensors").is_file()
