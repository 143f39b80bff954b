"""A report with every part filled in, and the same with hostile text in every string."""

import math
from collections.abc import Callable
from typing import Any

from bitwright.frontier import FrontierPoint
from bitwright.measured.kinds import KindQuality
from bitwright.measured.noise import Noise
from bitwright.measured.tasks import TaskFigure, TaskReport
from bitwright.report import (
    AdapterReport,
    AllocatedLinear,
    AllocationReport,
    BaseJobReport,
    BaseTraining,
    BlockReport,
    ExpertsReport,
    Figures,
    FinetuningReport,
    GoalReport,
    LinearReport,
    LoadReport,
    LossPoint,
    MergeReport,
    Quality,
    Report,
    ScaleReport,
    ShippedFigures,
    SizeReport,
    StoredParts,
    TextReport,
    Validation,
    WrittenText,
)
from tests.reports import report

ROLES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj", "mlp.down_proj")
TEXT = TextReport(source="org/rows", sha256="ab" * 32, num_samples=128, sequence_length=512, tokens=65536)
FIGURES = Figures(perplexity=12.345678901, kl_divergence=0.1234567, top1_agreement=0.87654321)
NOISE = Noise(
    sequences=128, perplexity=0.2345678, perplexity_ratio=0.0123456, kl_divergence=0.0045678, top1_agreement=0.0034567
)
KIND = KindQuality(
    **{"name": "tools of rows.jsonl", "calibrates": False, "share": 0.25, "sequences": 32, "tokens": 4096},
    **{
        "perplexity_original": 9.87654,
        "perplexity": 11.2345678,
        "kl_divergence": 0.2345671,
        "top1_agreement": 0.7654321,
    },
    noise=NOISE,
)
QUALITY = Quality(
    text=TEXT,
    perplexity_original=10.0123456,
    noise=NOISE,
    draws=(0.1212121, 0.1252525),
    kinds=(KIND, KIND.model_copy(update={"name": "calibration", "calibrates": True, "share": None})),
    **FIGURES.model_dump(),
)
TASK = TaskReport(
    **{
        "name": "arc",
        "kind": "multiple_choice",
        "source": "org/arc",
        "sha256": "cd" * 32,
        "rows": 321,
        "seconds": 12.5,
    },
    figures=(
        TaskFigure(
            name="acc",
            higher_is_better=True,
            original=0.54321,
            original_stderr=0.027654,
            value=0.53456,
            stderr=0.02787,
            difference_stderr=0.01234,
            rows=321,
        ),
        TaskFigure(name="same_tokens", higher_is_better=True, original=None, value=17.125, stderr=1.0625, rows=321),
    ),
)
FINETUNING: dict[str, Any] = {
    "text": TEXT,
    "learning_rate": 2e-4,
    "batch_size": 8,
    "tokens_read": 100_000,
    "held_out_sequences": 8,
    "rows_cut": 1,
    "rows_dropped": 2,
    "trainable_parameters": 1_000_000,
    "steps": 200,
    "steps_done": 190,
    "steps_kept": 180,
    "steps_resumed": 0,
    "stopped_early": True,
    "losses": tuple(LossPoint(step=step, loss=3 * math.exp(-step / 80) + 1) for step in range(5, 190, 5)),
    "loss_before": 3.9,
    "loss_after": 1.3,
    "loss_shipped": 1.31,
    "validations": tuple(Validation(step=step, loss=3 * math.exp(-step / 90) + 1.1) for step in range(0, 190, 40)),
    "micro_batch": 2,
    "blocks_recomputed": 0,
    "weights_kept": True,
    "tokens_per_second": 3456.7,
    "seconds": 123.4,
    "peak_device_bytes": None,
}


def linear(name: str, n: int) -> LinearReport:
    """A linear whose figures depend on `n`."""
    numbers = {"bits": 2 + n % 4, "group_size": 64, "symmetric": True, "rank": 16 if n % 3 else None}
    errors = {"weight_error": 0.02 + 0.001 * n, "output_error": 0.01 + 0.003 * (n * 7 % 11)}
    return LinearReport(name=name, shape=(576, 1536), **numbers, **errors)


def block(index: int) -> BlockReport:
    """A block with experts."""
    name = f"model.layers.{index}"
    return BlockReport(
        index=index,
        name=name,
        loss_initial=0.01 * math.exp(index / 4),
        loss=0.005 * math.exp(index / 4),
        output_error=0.01 + 0.002 * index,
        seconds=1.25,
        linears=tuple(linear(f"{name}.{role}", index + n) for n, role in enumerate(ROLES)),
        experts=(
            ExpertsReport(
                name=f"{name}.mlp",
                experts=2,
                tokens_least=3,
                tokens_median=1024.5,
                floor=16,
                starved={f"{name}.mlp.experts.1": 3},
                fallback="rounded to nearest",
            ),
        ),
    )


def full(blocks: int = 8) -> Report:
    """A report in which no part is missing."""
    merge = MergeReport(
        **{"codes_and_scales_kept": True, "linears": 40, "rounded": False},
        **{"error_exact": 1e-16, "error_stored": 2e-4, "error_shipped": 3e-3},
    )
    adapter = AdapterReport(
        **{"kind": "qa-lora", "rank": 16, "inner_ranks": (16, 16), "parameters": 1_000_000, "flops_per_token": 123456},
        **{"bits_per_weight": 0.2, "merge": merge, "before_merge": FIGURES},
    )
    frontier = tuple(
        FrontierPoint(bytes=n * 10**7, bits_per_weight=2 + n, kl_predicted=1 / n, kl=0.9 / n) for n in (1, 2, 3)
    )
    whole = {"rounds": 2, "met": True, "next_smaller_misses": True, "seconds": 4.5, "bytes": {"gguf": 20_000_000}}
    return report(
        scheme="2 bits, groups of 64, symmetric",
        quality=QUALITY,
        tasks=(TASK,),
        calibration=TEXT,
        served="inputs of linears as a server rounds them",
        shipped=(
            ShippedFigures(checkpoints=("compressed-tensors", "native"), adapter=None, whole=True, figures=FIGURES),
            ShippedFigures(checkpoints=("gguf",), adapter="adapter", whole=False, figures=FIGURES),
        ),
        round_to_nearest=Figures(perplexity=14.5, kl_divergence=0.25, top1_agreement=0.82),
        embeddings=linear("model.embed_tokens", 1),
        head=linear("lm_head", 2),
        base_job=BaseJobReport(
            job_id="job_01k6z3f8c2v9q4w7x5y1t0r8ab",
            blocks_adopted=8,
            adapter_continued=True,
            training=(BaseTraining(adapter="q-bara", text=TEXT, steps=10, folded=True),),
        ),
        exported_from="job_01k6z3f8c2v9q4w7x5y1t0r8ac",
        blocks=tuple(map(block, range(blocks))),
        allocation=AllocationReport(
            **{"average": 3.5, "reached": 3.4987, "error": 0.1, "gap": 0.001, "seconds": 2.0, "solver_seconds": 0.1},
            linears=(AllocatedLinear(name="lm_head", bits=4, group_size=64, bits_per_weight=4.25),),
        ),
        goal=GoalReport(goal="kl", limit=0.5, text=TEXT, margin=1.1, frontier=frontier, chosen=1, **whole),
        scales=ScaleReport(
            **{"steps": 100, "kl_initial": 0.2, "kl": 0.1, "kept": True, "held_out": 8, "micro_batch": 2},
            **{"blocks_recomputed": 0, "captured": False, "seconds": 20.5, "norms": 17, "codes": None},
        ),
        finetuning=FinetuningReport(**FINETUNING),
        adapter=adapter,
        loads=(
            LoadReport(
                **{"format": "gguf", "runtime": "llama.cpp", "version": "b9999", "read": "files", "result": "loads"},
                **{"detail": "its own words", "difference": 0.0012345, "tokens_written": 16},
                written=WrittenText(prompt="The statement", original=" is used", result=" is not", tokens=16, same=1),
            ),
        ),
        size=SizeReport(
            bytes_files={"compressed-tensors": 90_123_456, "native": 91_000_000},
            bytes_original=269_000_000,
            bytes_quantized=90_000_000,
            bits_per_weight_model=5.351234,
            quantized_weights=106_000_000,
            bits_per_weight=2.251234,
            parts=StoredParts(codes=2.0, scales=0.25, codebooks=0.0, adapters=0.3),
        ),
        scales_rounded={"mlx": 0.0012},
        seconds={"load": 0.8, "quantize": 61.5, "evaluate": 7.0, "total": 69.3},
        plan={
            "device": "cpu",
            "threads": 2,
            "dtype": "bfloat16",
            "torch_version": "2.13.0",
            "ratio": 0.5,
            "none": None,
        },
        warnings=("gguf stores offsets rounded",),
    )


def with_strings(document: Any, change: Callable[[str], str]) -> Any:
    """A JSON document with every string changed, names of fields excepted."""
    if isinstance(document, str):
        return change(document)
    if isinstance(document, dict):
        return {name: with_strings(value, change) for name, value in document.items()}
    return [with_strings(value, change) for value in document] if isinstance(document, list) else document
