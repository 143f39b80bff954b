"""Types chosen for a size against llama.cpp's mixes of that size, with the same searches: bytes and divergence of each.

    python -m benchmarks.gguf.gguf_mixes MODEL [DEVICE] [SAMPLES]

Of every mix the file is written, then the closest one that is no larger, from the ladder of types and with `q2_0` among
them. Calibration and evaluation are the builtin texts. Prints a line for each.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from app.domain.request.job_request import JobRequest
from bitwright.report import Report
from workers.disk.orders import AttemptOrder
from workers.engine.reporter import Reporter
from workers.engine.run import run

MIXES = ("q2_k_m", "q3_k_m", "q4_k_m")
LADDER = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")


def made(model: str, device: Any, samples: int, quantization: dict[str, Any]) -> Report:
    """The report of a job that writes a GGUF file, made by rounding to nearest."""
    text = {"sequence_length": 512}
    body = {
        **{"model": model, "quantization": {"method": "rtn", **quantization}, "formats": ["gguf"], "verify": "off"},
        **{"calibration": {"num_samples": samples, **text}, "evaluation": {"num_samples": 16, **text}},
    }
    with tempfile.TemporaryDirectory() as folder:
        order = AttemptOrder(job_id="job_1", attempt=1, request=JobRequest.parse(body), model_path=model, device=device)
        return run(order, Path(folder), Reporter(lambda _: None)).report


def main(model: str, device: str = "cuda", samples: str = "64") -> None:
    """Print the table."""
    print("what, bytes, KL, seconds")
    for mix in MIXES:
        asked: dict[str, dict[str, Any]] = {mix: {"scheme": mix}}
        size = 0
        for choices in ((), LADDER, ("q2_0", *LADDER)):
            if choices:
                goal = {"bytes": size, "choices": list(choices)}
                asked = {f"chosen from {len(choices)} types": {"at_most": goal}}
            ((name, quantization),) = asked.items()
            started = time.perf_counter()
            report = made(model, device, int(samples), quantization)
            size = size or report.size.bytes_files["gguf"]
            kl = None if report.quality is None else report.quality.kl_divergence
            print(name, report.size.bytes_files["gguf"], kl, round(time.perf_counter() - started), sep=", ", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
