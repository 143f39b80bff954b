"""Number formats by name: what each method makes of each scheme, one row a job.

    python -m benchmarks.number_formats MODEL --calibration calibration.jsonl --valid valid.jsonl \
        --schemes nvfp4a16 mxfp4a16 fp8 --arms rtn gptq awq light default --output rows.jsonl

One JSON line a job, and a row of a table: bytes of the files of the first format that holds the scheme, bits of the
whole model, KL(original || quantized) per token and perplexity of the weights alone in transformers (`kl`,
`perplexity`), the KL of the report, in which inputs are rounded as a server of the scheme does (`kl_served`), and
seconds without loading, evaluation and export. `absmax` is round to nearest without the search of scales. Sequences are
128 of 2048 tokens unless `--samples` and `--length` say otherwise. `auto-round` is the peer with its own 200 steps; it
needs the packages auto-round and datasets.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from app.domain.methods import SchemeName
from app.domain.request.job_request import JobRequest
from benchmarks.against_auto_round import EVALUATION_LENGTH, QualityMeter, peer, read_text
from workers.disk.orders import AttemptOrder
from workers.engine.reporter import Reporter
from workers.engine.run import run
from workers.formats.load_bitwright import load

ARMS: dict[str, dict[str, Any]] = {
    "absmax": {"method": "rtn", "scale_search": False},
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq"},
    "light": {"method": "signround", "preset": "light"},
    "default": {"method": "signround"},
    "best": {"method": "signround", "preset": "best"},
    "max": {"method": "signround", "preset": "max"},
}
PEER = "auto-round"
# What the peer calls a scheme whose weights alone are rounded.
PEER_SCHEMES: dict[str, dict[str, Any]] = {
    "nvfp4a16": {"scheme": "NVFP4", "act_bits": 16},
    "mxfp4a16": {"scheme": "MXFP4", "act_bits": 16},
}
HEADER = "| scheme | method | MB | bits of the model | KL | KL served | perplexity | seconds |\n" + "|---" * 8 + "|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--schemes", nargs="+", choices=[name.value for name in SchemeName], default=["nvfp4a16"])
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, PEER], default=list(ARMS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=32, help="of the validation text")
    parser.add_argument("--format", default="native")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    meter = QualityMeter(given.model, read_text(given.valid), given.sequences, device)
    print(HEADER)
    for scheme in given.schemes:
        for arm in given.arms:
            row = peer_row(given, scheme, meter) if arm == PEER else measured(given, scheme, arm, meter, device)
            print(table_row(row), flush=True)
            if given.output is not None:
                with given.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def peer_row(given: argparse.Namespace, scheme: str, meter: QualityMeter) -> dict[str, Any]:
    """auto-round's weights of a scheme by the same judge; nothing of it is written."""
    found = peer(given.model, given.calibration, 0, meter, **PEER_SCHEMES[scheme])
    return {"scheme": scheme, "arm": PEER, "bytes": None, "bits_model": None, "kl_served": None} | found


def measured(given: argparse.Namespace, scheme: str, arm: str, meter: QualityMeter, device: str) -> dict[str, Any]:
    """One job, and what its native checkpoint gives."""
    model, calibration, valid = (str(Path(path).resolve()) for path in (given.model, given.calibration, given.valid))
    body = {
        "model": model,
        "quantization": {**ARMS[arm], "scheme": scheme},
        "calibration": {
            "dataset": {"source": "local", "path": calibration},
            "num_samples": given.samples,
            "sequence_length": given.length,
        },
        "evaluation": {
            "dataset": {"source": "local", "path": valid},
            "num_samples": given.sequences,
            "sequence_length": EVALUATION_LENGTH,
        },
        "formats": [given.format],
    }
    order = AttemptOrder(
        job_id="job_benchmark",
        attempt=1,
        request=JobRequest.parse(body),
        model_path=model,
        calibration_path=calibration,
        evaluation_path=valid,
        device=device,
    )
    events: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        report = run(order, Path(folder), Reporter(events.append)).report
        output = Path(folder) / "output"
        size = sum(file.stat().st_size for file in (output / given.format).glob("*.safetensors"))
        quality = meter(load(output / "native"))
    working = sum(s for name, s in report.seconds.items() if name not in {"load", "evaluate", "export", "total"})
    peak = report.peak_memory.device_bytes
    return {
        "scheme": scheme,
        "arm": arm,
        "bytes": size,
        "bits_model": report.size.bits_per_weight_model,
        "bits": report.size.bits_per_weight,
        **quality,
        "kl_served": None if report.quality is None else report.quality.kl_divergence,
        "seconds": round(working, 2),
        "peak_gib": None if peak is None else round(peak / 2**30, 2),
        "log": sorted({event.event for event in events if event.type == "log"}),
    }


def table_row(row: dict[str, Any]) -> str:
    """A row of the table in Markdown; cells that a side has no figure of are empty."""
    size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}"
    bits = "" if row["bits_model"] is None else f"{row['bits_model']:.2f}"
    served = "" if row["kl_served"] is None else f"{row['kl_served']:.5f}"
    cells = (row["scheme"], row["arm"], size, bits, f"{row['kl']:.5f}", served, f"{row['perplexity']:.3f}")
    return f"| {' | '.join(cells)} | {row['seconds']:.1f} |"


if __name__ == "__main__":
    main()
