"""Agreement of captured, eager and CPU tuning of a real block: losses, and codes in fp32.

    python -m benchmarks.blocks.agreement MODEL --dtypes bfloat16 float32

The checkpoint is cut to its first block. One JSON line a dtype: the held-out loss at the start and at the end of each
path, how far the ends are from the captured one's (`off`), and the share of codes that are the captured ones. In
bf16 codes drift apart, since the sign of a small gradient depends on how sums are rounded; the losses should not.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.domain.request.job_request import JobRequest
from benchmarks.blocks.cpu_block import cut
from workers.disk.orders import AttemptOrder
from workers.engine.device import cuda_graphs
from workers.engine.reporter import Reporter
from workers.engine.run import run

PATHS = {"captured": "cuda", "eager": "cuda", "cpu": "cpu"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    for dtype in given.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"dtype": dtype} | compared(given, Path(folder), getattr(torch, dtype))), flush=True)


def compared(given: argparse.Namespace, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    model = folder / "model"
    model.mkdir()
    cut(given, model)
    if dtype != torch.bfloat16:
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype).save_pretrained(model)
    by_path = {path: tuned(given, model, folder / path, path) for path in PATHS}
    captured = by_path["captured"]
    return {
        path: {
            "start": start,
            "end": end,
            "off": round(end / captured[1] - 1, 6),
            "same_codes": round(float((codes == captured[2]).double().mean()), 6),
        }
        for path, (start, end, codes) in by_path.items()
    }


def tuned(given: argparse.Namespace, model: Path, workspace: Path, path: str) -> tuple[float, float, Tensor]:
    """The loss at the start and at the end, and all codes of the block."""
    workspace.mkdir()
    with refused() if path == "eager" else nullcontext():
        report = run(order(given, model, PATHS[path]), workspace, Reporter(lambda _: None)).report
    shard = load_file(next((workspace / "state").glob("block-00000*.safetensors")))
    (block,) = report.blocks
    assert block.loss_initial is not None
    assert block.loss is not None
    codes = torch.cat([shard[name].flatten() for name in sorted(shard) if name.endswith("codes")])
    return block.loss_initial, block.loss, codes


@contextmanager
def refused() -> Iterator[None]:
    """No step is captured."""

    def refuse(*_: object) -> None:
        raise RuntimeError("no capture")

    with patch.object(cuda_graphs, "capture", refuse):
        yield


def order(given: argparse.Namespace, model: Path, device: str) -> AttemptOrder:
    texts = str(model / "texts.jsonl")
    body = {
        "model": str(model),
        "quantization": {
            "method": "signround",
            "bits": given.bits,
            "group_size": 64,
            "symmetric": False,
            "steps": given.steps,
            "batch_size": given.batch,
        },
        "calibration": {
            "dataset": {"source": "local", "path": texts},
            "num_samples": given.samples,
            "sequence_length": given.length,
        },
        "evaluation": None,
        "formats": ["native"],
    }
    return AttemptOrder(
        job_id="job_benchmark",
        attempt=1,
        request=JobRequest.parse(body),
        model_path=str(model),
        calibration_path=texts,
        device="cuda" if device == "cuda" else "cpu",
    )


if __name__ == "__main__":
    main()
