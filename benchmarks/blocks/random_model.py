"""Whole jobs on a random model with a few blocks of a large model's shape: seconds per block and peak memory.

    python -m benchmarks.blocks.random_model TOKENIZER --text calibration.jsonl --presets default light

Speed does not depend on the values; quality is measured elsewhere (docs/results.md). TOKENIZER is a checkpoint folder
whose tokenizer reads the text. One JSON line per preset: a block's seconds are from its turn to the next one's,
with reading, passes of both activations and packing; W4 symmetric in groups of 128, 128 sequences of 2048 tokens.
"""

import argparse
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.domain.request.job_request import JobRequest
from benchmarks.blocks.block_tuning import SHAPES
from workers.disk.orders import AttemptOrder
from workers.engine.reporter import Reporter
from workers.engine.run import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("--text", required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--presets", nargs="+", default=["default", "light"])
    parser.add_argument("--keep", type=Path, help="only write the model, there")
    given = parser.parse_args()
    if given.keep is not None:
        write_model(given, given.keep)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(given, Path(folder) / "model")
        for number, preset in enumerate(given.presets):
            print(json.dumps(measured(given, Path(folder), preset, number)), flush=True)


def write_model(given: argparse.Namespace, folder: Path) -> None:
    torch.manual_seed(0)
    shape, tokenizer = SHAPES[given.shape], AutoTokenizer.from_pretrained(given.tokenizer)
    config = shape.config(given.length, blocks=given.blocks, vocabulary=len(tokenizer))
    config.tie_word_embeddings = True
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.cuda.empty_cache()


def measured(given: argparse.Namespace, folder: Path, preset: str, number: int) -> dict[str, Any]:
    model, text = str(folder / "model"), str(Path(given.text).resolve())
    body = {
        "model": model,
        "quantization": {"method": "signround", "preset": preset, "bits": 4, "group_size": 128},
        "calibration": {
            "dataset": {"source": "local", "path": text},
            "num_samples": 128,
            "sequence_length": given.length,
        },
        "evaluation": None,
        "formats": ["native"],
    }
    order = AttemptOrder(
        job_id="job_benchmark",
        attempt=1,
        request=JobRequest.parse(body),
        model_path=model,
        calibration_path=text,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # A block is reported when it is durable; those times do not overlap, as the seconds in a block's report may.
    times: list[float] = []
    reporter = Reporter(lambda line: times.append(time.perf_counter()) if line.type == "block" else None)
    report = run(order, folder / f"job-{number}", reporter).report
    peak = report.peak_memory.device_bytes
    return {
        "preset": preset,
        "shape": given.shape,
        "seconds_per_block": [round(after - before, 3) for before, after in pairwise(times)],
        "stages": {name: round(value, 2) for name, value in report.seconds.items()},
        "peak_gib": None if peak is None else round(peak / 2**30, 2),
    }


if __name__ == "__main__":
    main()
