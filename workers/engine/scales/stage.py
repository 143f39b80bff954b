"""The stage that tunes all scales together: what it takes over from the block pass, and what it leaves behind.

calibration   rewound to the embeddings; its original stream, after the last block, is the teacher
state         the tuned scales, durable, in place of the blocks' own; a retry takes them over, or repeats the stage
evaluation    its quantized stream goes through all blocks again, with the weights that ship

Only affine weights have such scales: where a method made a codebook or low-rank factors, the stage is left out and the
report's warnings say so.
"""

import time
from collections.abc import Callable
from functools import partial

from torch import Tensor

from app.domain.methods import Form
from bitwright.events import Stage
from bitwright.report import ScaleReport
from workers.engine.quantize.activations import Activations
from workers.engine.quantize.block_pass import BlockPass
from workers.engine.reporter import Reporter
from workers.engine.scales.memory_plan import ScaleTask, Skipped
from workers.engine.scales.tuning import ScaleOutcome, tune_scales
from workers.engine.seeds import derived_seed
from workers.numerics.quantized import AffineWeight


def run_scale_stage(blocks: BlockPass, head: Tensor | None) -> ScaleReport | None:
    """Tunes the scales that a finished block pass left, if its spec says so.

    head    dequantized weight of the head, where that is quantized too

    Raises:
        NumericalFailure: the quantized model's output is not finite.
    """
    steps, calibration = blocks.spec.end_to_end_steps(), blocks.calibration
    if not steps or calibration is None:
        return None
    report = blocks.state.scales or _tune(blocks, calibration, steps, head)
    if report is None:
        return None
    if not report.kept:
        blocks.reporter.warning(
            "scale_tuning_rejected", "tuned scales were no better on held-out text; the old ones stay"
        )
    blocks.reporter.metric("scale_kl_initial", report.kl_initial)
    blocks.reporter.metric("scale_kl", report.kl)
    return report


def _tune(blocks: BlockPass, calibration: Activations, steps: int, head: Tensor | None) -> ScaleReport | None:
    blocks.clock.enter(Stage.SCALES)
    blocks.reporter.progress(Stage.SCALES, 0, steps, "steps")
    started = time.perf_counter()
    outcome = _outcome(blocks, calibration, steps, head)
    if isinstance(outcome, Skipped):
        blocks.reporter.warning("scale_tuning_skipped", f"scales were not tuned end to end: {outcome.reason}")
        return None
    report = _report(outcome, steps, time.perf_counter() - started)
    blocks.state.save_scales(outcome.scales if report.kept else {}, report)
    if report.kept and blocks.evaluation is not None:
        blocks.clock.enter(Stage.EVALUATE)
        with blocks.model.loaded(blocks.model.layout.embeddings):
            blocks.evaluation.rewind(blocks.model)
        blocks.replay_quantized(blocks.evaluation)
    return report


def _outcome(blocks: BlockPass, calibration: Activations, steps: int, head: Tensor | None) -> ScaleOutcome | Skipped:
    if blocks.spec.forms() != {Form.AFFINE}:
        return Skipped("only affine weights without low-rank factors have scales that can be tuned alone")
    blocks.tuner.release()
    with blocks.model.loaded(blocks.model.layout.embeddings):
        calibration.rewind(blocks.model)
    return tune_scales(_task(blocks, calibration, steps, head))


def affine_weights(blocks: BlockPass, index: int) -> dict[str, AffineWeight]:
    """The weights of a finished block by full linear name."""
    return {name: result.affine for name, result in blocks.state.load(index).items()}


def _task(blocks: BlockPass, calibration: Activations, steps: int, head: Tensor | None) -> ScaleTask:
    model = blocks.model
    streams = [s for s in (calibration, blocks.evaluation) if s is not None]
    return ScaleTask(
        model=model,
        schemes={name: scheme for name, scheme in blocks.schemes.items() if name != model.layout.head},
        weights=partial(affine_weights, blocks),
        changed=blocks.state.parameters,
        calls=calibration.calls,
        inputs=calibration.quantized,
        targets=calibration.original,
        quantized_head=head,
        steps=steps,
        seed=derived_seed(blocks.seed, "scales"),
        micro_batch=blocks.plan.micro_batch,
        held_bytes=sum(2 * s.original.nbytes for s in streams if s.original.device == model.device),
        tick=_progress(blocks.reporter, steps),
        log=blocks.reporter.log,
        processes=blocks.processes,
    )


def _progress(reporter: Reporter, steps: int) -> Callable[[int], None]:
    """Tells the steps done, and the time left at their rate from now on."""
    started = time.monotonic()

    def tell(done: int) -> None:
        left = (time.monotonic() - started) * (steps - done) / done
        reporter.progress(Stage.SCALES, done, steps, "steps", left)

    return tell


def _report(outcome: ScaleOutcome, steps: int, seconds: float) -> ScaleReport:
    return ScaleReport(
        steps=steps,
        kl_initial=outcome.divergence_initial,
        kl=outcome.divergence if outcome.is_better else outcome.divergence_initial,
        kept=outcome.is_better,
        held_out=outcome.held_out,
        micro_batch=outcome.fit.micro_batch,
        blocks_recomputed=outcome.fit.recomputed,
        captured=outcome.captured,
        seconds=seconds,
    )
