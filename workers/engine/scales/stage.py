"""The stage that tunes all scales together: end to end, once every block is finished.

calibration      its activations are rewound to the embeddings; those of the original model, after the last block, are
                 the teacher
finished blocks  the tuned scales, durable, take the place of the blocks' own; a retry adopts them, or repeats the stage
evaluation       its quantized activations go through all blocks again, with the weights that ship

Only weights on grids have such scales: where a method made a codebook or low-rank factors, the stage is left out and
the report's warnings say so. In a job with a floating-point grid the blocks' norms are tuned along, and the codes of
MXFP4 unless the device has no room for that, which a warning and the report say.
"""

import time
from collections.abc import Callable

from app.domain.methods import Form
from bitwright.events import Stage
from bitwright.report import ScaleReport
from workers.engine.job import Job
from workers.engine.quantize.activations import Activations
from workers.engine.quantize.block_reader import replay_quantized
from workers.engine.quantize.serving import Served
from workers.engine.quantize.stage import Quantized
from workers.engine.reporter import Reporter
from workers.engine.scales.families import TunedWeight
from workers.engine.scales.memory_plan import ScaleTask, Skipped
from workers.engine.scales.moving_codes import moves_codes
from workers.engine.scales.norms import tunes_norms
from workers.engine.scales.tuning import ScaleOutcome, tune_scales
from workers.engine.seeds import derived_seed
from workers.numerics.quantized import AffineWeight, BlockWeight, FloatWeight


def run(job: Job, quantized: Quantized) -> ScaleReport | None:
    """Tunes the scales of the finished blocks, if the spec asks for it.

    Raises:
        NumericalFailure: the quantized model's output is not finite.
    """
    if not job.spec.end_to_end_steps() or quantized.calibration is None:
        return None
    report = job.finished_blocks.scales or _tune(job, quantized, quantized.calibration)
    if report is None:
        return None
    if not report.kept:
        job.reporter.warning("scale_tuning_rejected", "tuned scales were no better on held-out text; the old ones stay")
    job.reporter.metric("scale_kl_initial", report.kl_initial)
    job.reporter.metric("scale_kl", report.kl)
    return report


def _tune(job: Job, quantized: Quantized, calibration: Activations) -> ScaleReport | None:
    steps = job.spec.end_to_end_steps()
    job.clock.enter(Stage.SCALES)
    job.reporter.progress(Stage.SCALES, 0, steps, "steps")
    started = time.perf_counter()
    outcome = _outcome(job, quantized, calibration)
    if isinstance(outcome, Skipped):
        job.reporter.warning("scale_tuning_skipped", f"scales were not tuned end to end: {outcome.reason}")
        return None
    further = 0 if quantized.further is None else job.processes.total(len(quantized.further.original))
    written = 0 if not further or job.texts.calibration is None else job.texts.calibration.written
    report = _report(outcome, steps, time.perf_counter() - started, further, written)
    if any(map(moves_codes, job.block_schemes.values())) and not outcome.fit.codes:
        job.reporter.warning("codes_not_tuned", "codes stay as they are: to tune them, too, memory is too small")
    if report.kept:
        job.finished_blocks.save_scales(outcome.scales, report, outcome.norms, outcome.codes)
    else:
        job.finished_blocks.save_scales({}, report)
    job.finished_blocks.settle()
    if report.kept and quantized.evaluation is not None:
        job.clock.enter(Stage.EVALUATE)
        replay_quantized(job.model, job.finished_blocks, quantized.evaluation)
    return report


def _outcome(job: Job, quantized: Quantized, calibration: Activations) -> ScaleOutcome | Skipped:
    if not job.spec.forms() <= {Form.AFFINE, Form.FLOAT, Form.BLOCKS}:
        return Skipped("only integers and floating-point codes without low-rank factors have scales to tune alone")
    calibration.rewind(job.model)
    return tune_scales(_task(job, calibration, quantized))


def _task(job: Job, calibration: Activations, quantized: Quantized) -> ScaleTask:
    model, finished, steps = job.model, job.finished_blocks, job.spec.end_to_end_steps()
    further = quantized.further

    def weights(index: int) -> dict[str, TunedWeight]:
        found = {name: result.weight for name, result in finished.load(index).items()}
        return {
            name: weight
            for name, weight in found.items()
            if isinstance(weight, AffineWeight | FloatWeight | BlockWeight)
        }

    held = [each.original for each in (calibration, further, quantized.evaluation) if each is not None]
    return ScaleTask(
        model=model,
        schemes=job.block_schemes,
        weights=weights,
        changed=finished.parameters,
        roundings=lambda index: calibration.served.get(index, Served()).inputs,
        norms=any(map(tunes_norms, job.block_schemes.values())),
        codes=True,
        calls=calibration.calls,
        inputs=calibration.quantized,
        targets=calibration.original,
        further=None if further is None else (further.quantized, further.original),
        quantized_head=quantized.head,
        steps=steps,
        seed=derived_seed(job.seed, "scales"),
        micro_batch=job.plan.micro_batch,
        held_bytes=sum(2 * states.nbytes for states in held if states.device == model.device),
        tick=_progress(job.reporter, steps),
        log=job.reporter.log,
        processes=job.processes,
    )


def _progress(reporter: Reporter, steps: int) -> Callable[[int], None]:
    """A tick that reports the steps done, and the time left at their rate from now on."""
    started = time.monotonic()

    def tick(done: int) -> None:
        left = (time.monotonic() - started) * (steps - done) / done
        reporter.progress(Stage.SCALES, done, steps, "steps", left)

    return tick


def _report(outcome: ScaleOutcome, steps: int, seconds: float, further: int = 0, written: int = 0) -> ScaleReport:
    return ScaleReport(
        steps=steps,
        kl_initial=outcome.divergence_initial,
        kl=outcome.divergence if outcome.is_better else outcome.divergence_initial,
        kept=outcome.is_better,
        held_out=outcome.held_out,
        further=further,
        written=written,
        micro_batch=outcome.fit.micro_batch,
        blocks_recomputed=outcome.fit.recomputed,
        captured=outcome.captured,
        seconds=seconds,
        norms=sum(map(len, outcome.norms.values())),
        codes=outcome.changed if outcome.fit.codes else None,
    )
