"""The least that a report holds, for tests that need some report; its quality, where it has one, is known."""

from bitwright.report import (
    FinetuningReport,
    LossPoint,
    ModelReport,
    PeakMemory,
    Quality,
    Report,
    SizeReport,
    TextReport,
)

QUALITY = Quality(
    text=TextReport(source="builtin", sha256="0" * 64, num_samples=1, sequence_length=16, tokens=16),
    perplexity_original=10.0,
    perplexity=12.0,
    kl_divergence=0.1,
    top1_agreement=0.9,
)
REPORTS = ("report.html", "report.json")
"""Files of every checkpoint that hold the job's report."""
BARE = Report(
    version="0",
    method="rtn",
    seed=0,
    device="cpu",
    plan={},
    model=ModelReport(source="org/model", revision=None, architecture="llama", dtype="bfloat16", parameters=8),
    calibration=None,
    quality=None,
    blocks=(),
    size=SizeReport(
        bytes_original=16, bytes_quantized=4, quantized_weights=8, bits_per_weight=4.0, bits_per_weight_model=4.0
    ),
    seconds={"total": 1.0},
    peak_memory=PeakMemory(host_bytes=1),
    blocks_computed=0,
    blocks_resumed=0,
)


def report(**changed: object) -> Report:
    """The bare report with these fields changed."""
    return BARE.model_copy(update=changed)


def finetuning_report() -> FinetuningReport:
    """The least that a report says of training."""
    return FinetuningReport(
        text=TextReport(source="upl_x", sha256="0" * 64, num_samples=36, sequence_length=512, tokens=900),
        tokens_read=1800,
        held_out_sequences=4,
        rows_cut=0,
        rows_dropped=0,
        trainable_parameters=8,
        steps=18,
        steps_done=18,
        steps_kept=15,
        steps_resumed=5,
        stopped_early=False,
        losses=(LossPoint(step=10, loss=1.5), LossPoint(step=15, loss=1.25), LossPoint(step=18, loss=1.0)),
        loss_before=2.0,
        loss_after=1.75,
        validations=(),
        micro_batch=4,
        blocks_recomputed=0,
        weights_kept=True,
        tokens_per_second=100.0,
        seconds=18.0,
        peak_device_bytes=None,
    )
