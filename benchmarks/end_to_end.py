"""Settings of the end-to-end stage, tried one after another on the same quantized blocks.

    python -m benchmarks.end_to_end MODEL --calibration calibration.jsonl --choice other.jsonl --valid valid.jsonl \
        --scheme mxfp4a16 --settings steps=0 steps=100,codes=0 steps=100 steps=200,pace=0.25

Blocks are quantized once, as the preset `default` of SignRound does. A row of each setting: KL on the held-out share of
the calibration text before and after; KL on the text of `--choice`, which nothing is tuned on, to choose a setting by;
KL and perplexity on that of `--valid`, to publish of the one that was chosen; weights whose code changed, and seconds.
Models are judged by transformers, as in `benchmarks.number_formats`.

    steps   end to end; 0: blocks as they are
    codes   0: codes stay
    pace    of codes, in parts of the rate of scales
    rate    of scales at its highest
    box     the farthest that a place starts from its code
    batch   sequences a step
    beta    of m; beta2: of v
    seed    of the order of sequences and of the held-out share
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.domain.request.job_request import JobRequest
from benchmarks.against_auto_round import QualityMeter, read_text
from workers.contracts.blocks import BlockTask
from workers.disk.orders import AttemptOrder
from workers.engine import goal, quantize, scales
from workers.engine.opening import open_job
from workers.engine.reporter import Reporter
from workers.engine.scales import memory_plan, moving_codes, tuning
from workers.engine.scales import stage as scales_stage
from workers.engine.untrusted.asking import JobInput
from workers.methods import sign_round
from workers.numerics.quantized import BlockWeight

HEADER = "| setting | KL, choice | KL | perplexity | held out, before | after | codes | seconds |\n" + "|---" * 8 + "|"
PACE, BOX, RATE, BETAS, BATCH = moving_codes.PACE_CODES, moving_codes.BOX, tuning.LEARNING_RATE, tuning.BETAS, 4


class Done(Exception):
    """The end of the job: every setting was tried."""


def apply(setting: dict[str, float]) -> None:
    """Makes a setting's numbers those of the engine."""
    moving_codes.PACE_CODES = setting.get("pace", PACE)
    moving_codes.BOX = setting.get("box", BOX)
    tuning.LEARNING_RATE = setting.get("rate", RATE)
    tuning.BETAS = (setting.get("beta", BETAS[0]), setting.get("beta2", BETAS[1]))
    memory_plan.SCALE_BATCH_SIZE = int(setting.get("batch", BATCH))


def tune(job: Any, quantized: Any, setting: dict[str, float]) -> str:
    """Tunes by a setting and makes the result that of the finished blocks; the end of a row."""
    apply(setting)
    if not setting.get("steps", 100):
        return "| | | | |"
    started = time.perf_counter()
    quantized.calibration.rewind(job.model)
    task = replace(
        scales_stage._task(job, quantized.calibration, quantized.evaluation, quantized.head),
        steps=int(setting.get("steps", 100)),
        codes=bool(setting.get("codes", 1)),
    )
    found = tuning.tune_scales(replace(task, seed=task.seed + int(setting.get("seed", 0))))
    if isinstance(found, memory_plan.Skipped):
        return found.reason
    seconds = time.perf_counter() - started
    report = scales_stage._report(found, task.steps, seconds)
    job.finished_blocks.save_scales(found.scales, report, found.norms, found.codes)
    slower = "" if found.captured else " eager"
    return f"| {found.divergence_initial:.5f} | {found.divergence:.5f} | {found.changed:,} | {seconds:.1f}{slower} |"


def weights(job: Any) -> dict[str, Tensor]:
    """What the finished blocks have changed, by full parameter name."""
    found: dict[str, Tensor] = {}
    for index in range(len(job.model.blocks)):
        linears = job.finished_blocks.load(index)
        found |= {f"{name}.weight": result.dequantize() for name, result in linears.items()}
        found |= job.finished_blocks.parameters(index)
    return found


def stage_of(settings: list[str], model: str, meters: list[QualityMeter]) -> Any:
    """In place of the stage: all settings, and then the end."""

    def stage(job: Any, quantized: Any) -> None:
        print(HEADER, flush=True)
        before = job.finished_blocks._state
        for text in settings:
            end = tune(job, quantized, {key: float(value) for key, _, value in map(partition, text.split(","))})
            whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
            whole.load_state_dict(weights(job), strict=False)
            choice, valid = (meter(whole) for meter in meters)
            figures = f"{choice['kl']:.5f} | {valid['kl']:.5f} | {valid['perplexity']:.3f}"
            print(f"| {text} | {figures} {end}", flush=True)
            job.finished_blocks._state, job.finished_blocks._scales = before, {}
        raise Done

    return stage


def partition(text: str) -> tuple[str, str, str]:
    return text.partition("=")


def not_compensated(task: BlockTask) -> dict[str, BlockWeight]:
    """Nothing: linears begin with the search."""
    del task
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--choice", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--scheme", default="mxfp4a16")
    parser.add_argument("--settings", nargs="+", required=True)
    parser.add_argument("--only", help="pattern of the linears that have the scheme; others have q8_0")
    parser.add_argument("--start", choices=["gptq", "search"], default="gptq", help="of llama.cpp's types")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=32, help="of the texts to choose and to publish by")
    parser.add_argument("--steps", type=int, default=200, help="of a block")
    parser.add_argument("--learning-rate", type=float, help="of blocks")
    given = parser.parse_args()
    model, calibration = (str(Path(p).resolve()) for p in (given.model, given.calibration))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rate = {} if given.learning_rate is None else {"learning_rate": given.learning_rate}
    only = {"overrides": {given.only: {"scheme": given.scheme}}} if given.only else {}
    scheme = {"scheme": "q8_0" if only else given.scheme, "modules": only}
    if given.start == "search":
        sign_round.compensated = not_compensated
    body = {
        "model": model,
        "quantization": {"method": "signround", "steps": given.steps, "scale_steps": 1, **scheme, **rate},
        "calibration": {
            "dataset": {"source": "local", "path": calibration},
            "num_samples": given.samples,
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
        calibration_path=calibration,
        device=device,
    )
    meters = [QualityMeter(model, read_text(text), given.sequences, device) for text in (given.choice, given.valid)]
    scales.run = stage_of(given.settings, model, meters)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_job(order, Path(folder), Reporter(lambda _: None), 0, JobInput.of(order, Path(folder), 0)) as job,
    ):
        try:
            goal.make(quantize.prepare(job), quantize.run)
        except Done:
            return


if __name__ == "__main__":
    main()
