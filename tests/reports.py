"""The least that a report holds, for tests that need some report; its quality, where it has one, is known."""

from bitwright.report import ModelReport, PeakMemory, Quality, Report, SizeReport, TextReport

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
