"""The worked examples of docs/adding-a-format.md are formats after two touches each of a copy of the source."""

import json
import re
from pathlib import Path
from textwrap import indent

import pytest

from tests.deployment.source_copy import copy_source, python
from tests.documentation import ROOT

SUITES = (
    "tests/conformance/test_formats.py",
    "tests/formats/cards/test_model_card.py",
    "tests/formats/test_same_bytes.py",
    "tests/domain/test_runtimes.py",
    "tests/domain/test_domain.py",
)
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
jobs = {
    "alone": {"method": "loftq", "bits": 4, "rank": 4, "formats": ["rows"]},
    "adapted": {"method": "loftq", "bits": 4, "rank": 4, "formats": ["rows", "peft"]},
    "codes": {"method": "rtn", "bits": 4, "group_size": 32, "formats": ["int8"]},
}
checkpoints = {}
for name, body in jobs.items():
    request = JobRequest.parse({"model": model, **body, "evaluation": None})
    order = AttemptOrder(job_id="job_1", attempt=1, request=request, model_path=model, device="cpu")
    checkpoints[name] = dict(run(order, folder / name, Reporter(lambda _: None)).checkpoints)
print(json.dumps({"formats": [name.value for name in FORMATS], "checkpoints": checkpoints}))
"""


EXAMPLES = ("rows", "int8")


def examples() -> dict[str, tuple[str, str]]:
    """The row and the file of each example of the page."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding-a-format.md").read_text(), flags=re.S)
    return dict(zip(EXAMPLES, zip(blocks[::2], blocks[1::2], strict=True), strict=True))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the examples' rows and files, and nothing else changed."""
    folder = tmp_path_factory.mktemp("source")
    copy_source(folder)
    rows = ""
    for name, (row, file) in examples().items():
        (folder / f"workers/formats/{name}.py").write_text(file)
        rows += row
    table = folder / "app/domain/formats.py"
    before, mark, after = table.read_text().partition("\n    def __new__(cls, name: str, *info: FormatInfo)")
    assert mark
    table.write_text(before + indent(rows, "    ") + mark + after)
    return folder


@pytest.mark.slow
def test_a_row_and_a_file_make_a_format(source: Path, tmp_path: Path) -> None:
    answer = json.loads(python(source, "-c", JOB, str(tmp_path)).splitlines()[-1])
    assert answer["formats"][-2:] == list(EXAMPLES)
    assert answer["checkpoints"]["codes"].keys() == {"int8", "native"}
    assert answer["checkpoints"]["alone"].keys() == {"rows", "native"}
    assert answer["checkpoints"]["adapted"].keys() == {"rows", "peft", "native"}
    card = (tmp_path / "alone/output/rows/README.md").read_text()
    assert "format `rows`" in card
    assert "AutoModelForCausalLM.from_pretrained(" in card.partition("## Load")[2].partition("## Size")[0]
    assert "This is the quantized base alone" in (tmp_path / "adapted/output/rows/README.md").read_text()
    assert (tmp_path / "alone/output/rows/model.safetensors").is_file()


@pytest.mark.slow
def test_the_shared_suites_take_both_as_they_are(source: Path) -> None:
    python(source, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "rows or int8", *SUITES)
