"""Settings of the end-to-end stage, tried one after another on the same quantized blocks.

    python -m benchmarks.end_to_end MODEL --calibration calibration.jsonl --choice other.jsonl --scheme mxfp4a16 \
        --settings steps=0 steps=100,codes=0 steps=100 steps=200,pace=0.25

Blocks are quantized once, as the preset `default` of SignRound does. A row of each setting: KL on the held-out share of
the calibration text before and after, KL and perplexity on the text of `--choice`, which nothing is tuned on, weights
whose code changed, and seconds. To choose numbers by: figures to publish come from a third text.

    steps   end to end; 0: blocks as they are
    codes   0: codes stay
    pace    of codes, in parts of the rate of scales
    rate    of scales at its highest
    box     the farthest that a place starts from its code
    batch   sequences a step
    sign    1: by the signs of m in place of Adam
    beta    of m
    seed    of the order of sequences and of the held-out share
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from app.domain.request.job_request import JobRequest
from benchmarks.against_auto_round import EVALUATION_LENGTH
from workers.disk.orders import AttemptOrder
from workers.engine import evaluate, goal, quantize
from workers.engine.opening import open_job
from workers.engine.quantize.block_reader import replay_quantized
from workers.engine.reporter import Reporter
from workers.engine.scales import memory_plan, moving_codes, tuning
from workers.engine.scales import stage as scales_stage
from workers.engine.scales.moving_codes import MovingCodes, parts

HEADER = "| settings | KL held out before | after | KL | perplexity | codes | seconds | fit |\n" + "|---" * 8 + "|"


class Done(Exception):
    """The end of the job: every setting was tried."""


def by_signs(self: MovingCodes, rate: Any, unbiased: Any, betas: Any) -> None:
    """A step by the signs of m."""
    del unbiased, betas
    for rows in parts(self.place):
        gradient = self.gradient[rows].float().nan_to_num_(0.0, 0.0, 0.0)
        mean = self.mean[rows].float().lerp_(gradient, 1 - BETA)
        self.mean[rows] = mean
        top = self._axis.top + 0.49
        self.place[rows].sub_(mean.sign().mul_(rate * moving_codes.PACE_CODES)).clamp_(-top, top)


BETA = 0.9
BY_ADAM = MovingCodes.move


def apply(setting: dict[str, float]) -> None:
    """Makes a setting's numbers those of the engine."""
    global BETA
    moving_codes.PACE_CODES = setting.get("pace", 0.5)
    moving_codes.BOX = setting.get("box", 0.49)
    tuning.LEARNING_RATE = setting.get("rate", 2e-3)
    tuning.BETAS = (setting.get("beta", 0.9), setting.get("beta2", 0.95))
    BETA = setting.get("beta", 0.9)
    MovingCodes.move = by_signs if setting.get("sign") else BY_ADAM  # type: ignore[method-assign]
    memory_plan.SCALE_BATCH_SIZE = int(setting.get("batch", 4))


def try_all(settings: list[str]) -> Any:
    """In place of the stage: all settings, and then the end."""

    def stage(job: Any, quantized: Any) -> None:
        print(HEADER, flush=True)
        for text in settings:
            setting = {key: float(value) for key, _, value in (part.partition("=") for part in text.split(","))}
            apply(setting)
            started, told = time.perf_counter(), ["", "", "", ""]
            if setting.get("steps", 100):
                quantized.calibration.rewind(job.model)
                task = scales_stage._task(job, quantized.calibration, quantized.evaluation, quantized.head)
                task = replace(
                    task,
                    steps=int(setting.get("steps", 100)),
                    seed=task.seed + int(setting.get("seed", 0)),
                    codes=bool(setting.get("codes", 1)),
                )
                found = tuning.tune_scales(task)
                if isinstance(found, memory_plan.Skipped):
                    print(f"| {text} | {found.reason} |", flush=True)
                    continue
                seconds = time.perf_counter() - started
                before, after = f"{found.divergence_initial:.5f}", f"{found.divergence:.5f}"
                told = [before, after, str(found.changed), f"{seconds:.1f} | {found.fit} {found.captured}"]
                report = scales_stage._report(found, task.steps, seconds)
                job.finished_blocks.save_scales(found.scales, report, found.norms, found.codes)
            replay_quantized(job.model, job.finished_blocks, quantized.evaluation)
            quality = evaluate.measure(
                job.model,
                quantized.evaluation.original,
                quantized.evaluation.quantized,
                job.texts.evaluation,
                quantized_head=quantized.head,
                tick=lambda _: None,
            )
            figures = f"{quality.kl_divergence:.5f} | {quality.perplexity:.3f}"
            print(f"| {text} | {told[0]} | {told[1]} | {figures} | {told[2]} | {told[3]} |", flush=True)
            job.finished_blocks._state = job.finished_blocks._state.model_copy(update={"scales": None})
            job.finished_blocks._scales = {}
        raise Done

    return stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--choice", required=True)
    parser.add_argument("--scheme", default="mxfp4a16")
    parser.add_argument("--settings", nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=32, help="of the text to choose by")
    parser.add_argument("--evaluation-length", type=int, default=EVALUATION_LENGTH)
    parser.add_argument("--steps", type=int, default=200, help="of a block")
    parser.add_argument("--learning-rate", type=float, help="of blocks")
    given = parser.parse_args()
    model, calibration, choice = (str(Path(p).resolve()) for p in (given.model, given.calibration, given.choice))
    rate = {} if given.learning_rate is None else {"learning_rate": given.learning_rate}
    body = {
        "model": model,
        "quantization": {"method": "signround", "scheme": given.scheme, "steps": given.steps, "scale_steps": 1, **rate},
        "calibration": {
            "dataset": {"source": "local", "path": calibration},
            "num_samples": given.samples,
            "sequence_length": given.length,
        },
        "evaluation": {
            "dataset": {"source": "local", "path": choice},
            "num_samples": given.sequences,
            "sequence_length": given.evaluation_length,
        },
        "formats": ["native"],
    }
    order = AttemptOrder(
        job_id="job_benchmark",
        attempt=1,
        request=JobRequest.parse(body),
        model_path=model,
        calibration_path=calibration,
        evaluation_path=choice,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    scales_stage.run = try_all(given.settings)
    goal.stage.scales.run = scales_stage.run
    with tempfile.TemporaryDirectory() as folder, open_job(order, Path(folder), Reporter(lambda _: None), 0) as job:
        try:
            goal.make(quantize.prepare(job), quantize.run)
        except Done:
            return


if __name__ == "__main__":
    main()
