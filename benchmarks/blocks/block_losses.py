"""Comparison of every block with round to nearest: SignRound's held-out loss beside RTN's, on the same inputs.

    python -m benchmarks.blocks.block_losses MODEL --calibration calibration.jsonl --scheme W3g64a --output losses.jsonl

One JSON line per block: the output error on the same held-out sequences of the rounded block (`rtn`), of the searched
start (`start`) and of the tuned block (`tuned`), all on the inputs that the tuned blocks before it produce. The last
line counts the blocks whose tuned loss is below RTN's.
"""

import argparse
import json
import tempfile
from pathlib import Path
from types import MappingProxyType

import torch

from app.domain.methods import SignRoundSpec
from app.domain.request.job_request import JobRequest
from benchmarks.against_auto_round import parse_scheme
from workers.contracts.blocks import BlockTask
from workers.contracts.results import BlockResult
from workers.disk.orders import AttemptOrder
from workers.engine.quantize import block_pass
from workers.engine.quantize.registry import METHODS
from workers.engine.reporter import Reporter
from workers.engine.run import run
from workers.methods.sign_round import SignRound


class Compared:
    """SignRound that also measures, on each block, the loss of round to nearest."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def quantize_block(self, task: BlockTask, spec: SignRoundSpec) -> BlockResult:
        rounded = SignRound().quantize_block(task, spec.model_copy(update={"steps": 0}))
        result = SignRound().quantize_block(task, spec)
        assert rounded.loss is not None
        assert result.loss_initial is not None
        assert result.loss is not None
        losses = {"rtn": rounded.loss, "start": result.loss_initial, "tuned": result.loss}
        self.rows.append({"block": task.index} | {name: float(loss) for name, loss in losses.items()})
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--scheme", default="W3g64a")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    compared = Compared()
    block_pass.METHODS = MappingProxyType({**METHODS, "signround": compared})
    with tempfile.TemporaryDirectory() as folder:
        run(order(given), Path(folder), Reporter(lambda _: None))
    below = sum(row["tuned"] < row["rtn"] for row in compared.rows)
    with given.output.open("w") as output:
        for line in [*compared.rows, {"scheme": given.scheme, "blocks": len(compared.rows), "below_rtn": below}]:
            print(json.dumps(line), flush=True)
            output.write(json.dumps(line) + "\n")


def order(given: argparse.Namespace) -> AttemptOrder:
    model, text = (str(Path(path).resolve()) for path in (given.model, given.calibration))
    body = {
        "model": model,
        "quantization": {"method": "signround", "preset": given.preset} | parse_scheme(given.scheme).model_dump(),
        "calibration": {
            "dataset": {"source": "local", "path": text},
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
        model_path=model,
        calibration_path=text,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


if __name__ == "__main__":
    main()
