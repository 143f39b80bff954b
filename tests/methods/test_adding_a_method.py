"""The worked example of docs/adding-a-method.md is a method after it is put into a copy of the source."""

import json
import re
from pathlib import Path
from textwrap import indent

import pytest

from tests.deployment.source_copy import copy_source, python
from tests.documentation import ROOT

SUITES = (
    "tests/conformance/test_methods.py",
    "tests/methods/test_registry.py",
    "tests/domain/test_domain.py",
    "tests/domain/request/test_request.py",
)
JOB = """
import json, sys
from pathlib import Path

from app.domain.request.job_request import JobRequest
from bitwright.errors import InvalidRequest
from workers.disk.orders import AttemptOrder
from workers.engine.reporter import Reporter
from workers.engine.run import run
from workers.tiny_model import Recipe, make_tiny_model

folder = Path(sys.argv[1])
recipe = Recipe(vocabulary=400, width=64, intermediate=64, blocks=1, positions=64, steps=5, batch=1, length=16)
model = str(make_tiny_model(folder / "model", recipe))
body = {"model": model, "method": "shrink", "ratio": 0.9, "group_size": 32, "evaluation": None}
request = JobRequest.parse(body)
order = AttemptOrder(job_id="job_1", attempt=1, request=request, model_path=model, device="cpu")
report = run(order, folder / "job", Reporter(lambda _: None)).report
quantization = {"method": "shrink", "symmetric": False, "modules": {"overrides": {"*": {"symmetric": False}}}}
try:
    JobRequest.parse({"model": model, "quantization": quantization})
except InvalidRequest as refused:
    fields = [problem.field for problem in refused.errors]
print(json.dumps({"method": report.method, "refused": fields}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the example's spec, row and file, and nothing else changed."""
    folder = tmp_path_factory.mktemp("source")
    copy_source(folder)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding-a-method.md").read_text(), flags=re.S)
    spec, row = blocks[:2]
    (file,) = [block for block in blocks if "METHOD = " in block]
    (folder / "workers/methods/shrink.py").write_text(file)
    specs = folder / "app/domain/methods/weight_specs.py"
    imported = specs.read_text().replace("    WeightsOnly,\n", "    WeightsOnly,\n    WeightSpec,\n", 1)
    specs.write_text(f"{imported}\n\n{spec}")
    catalogue = folder / "app/domain/methods/catalogue.py"
    text = catalogue.read_text()
    for mark, added in {
        '        "nf": MethodInfo(': indent(row.removeprefix("{\n").removesuffix("}\n"), " " * 4),
        "AWQSpec, ": "ShrinkSpec, ",
        "RTNSpec | ": "ShrinkSpec | ",
    }.items():
        assert mark in text
        text = text.replace(mark, added + mark, 1)
    catalogue.write_text(text)
    return folder


@pytest.mark.slow
def test_a_spec_a_row_and_a_file_make_a_method(source: Path, tmp_path: Path) -> None:
    answer = json.loads(python(source, "-c", JOB, str(tmp_path)).splitlines()[-1])
    assert answer["method"] == "shrink"
    assert answer["refused"] == ["quantization.symmetric", "quantization.modules.overrides.*.symmetric"]
    assert "Shrink" in (tmp_path / "job/output/compressed-tensors/README.md").read_text()


@pytest.mark.slow
def test_the_shared_suites_take_it_as_it_is(source: Path) -> None:
    python(source, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SUITES, "-k", "shrink or full_form or every_method")
