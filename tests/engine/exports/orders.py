"""Orders of exports, as a supervisor writes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.domain.attempt_lines import ResultLine
from app.domain.request.exports import ExportRequest, export_request
from app.domain.request.job_request import JobRequest
from workers.disk.orders import AttemptOrder
from workers.engine.reporter import Reporter
from workers.engine.run import run


def export_order(
    native: Path, formats: Sequence[str], verify: str = "off", order: Any = None, **base: Any
) -> AttemptOrder:
    """The order to make these formats of a native checkpoint, which lies in a folder of that name.

    order   further fields of the order
    base    fields of the request of the job that made it
    """
    assert native.name == "native"
    body = {"model": "org/model", **({} if "quantization" in base else {"method": "rtn"}), **base}
    asked = ExportRequest.model_validate({"formats": formats, "verify": verify})
    request = JobRequest.parse({**body, "formats": ["native"]})
    exported = export_request(request, "job_1", asked)
    fields = {"job_id": "job_2", "attempt": 1, "request": exported, "device": "cpu", **(order or {})}
    return AttemptOrder(model_path="", base_job_path=str(native.parent), **fields)


def export(native: Path, workspace: Path, formats: Sequence[str], **base: Any) -> ResultLine:
    """The export, done in this process."""
    workspace.mkdir(parents=True, exist_ok=True)
    return run(export_order(native, formats, **base), workspace, Reporter(lambda _: None))
