"""Checks to make: formats of an order, the runtimes of its worker that read them, and the tokens that those get."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from app.domain.formats import ExportFormat
from app.domain.request.job_request import JobRequest
from app.domain.runtimes import ONLY_WHERE_ASKED, Runtime
from bitwright.errors import RuntimeDidNotLoad
from bitwright.report import LoadReport
from workers.disk.orders import AttemptOrder, RuntimePlace
from workers.engine.loads_here.comparison import CLOSE, CLOSE_WITH_ACTIVATIONS
from workers.engine.text.sequences import PROBE, has_tokenizer, load_tokenizer

IDS = 16
"""Tokens that are read where a model has no tokenizer."""


@dataclass(frozen=True)
class Check:
    """A format that a runtime is to load.

    close   largest distance of its logits that is rounding
    """

    format: ExportFormat
    runtime: Runtime
    where: RuntimePlace
    close: float

    @classmethod
    def of(cls, name: ExportFormat, runtime: Runtime, order: AttemptOrder) -> Self:
        """The check of a format by a runtime of an order's worker."""
        rows = [scheme.row for _, scheme in order.request.quantization.schemes()]
        rounds = any(row is not None and row.activations is not None for row in rows) and not name.info.dense
        close = CLOSE_WITH_ACTIVATIONS.get(runtime, CLOSE[runtime]) if rounds else CLOSE[runtime]
        return cls(name, runtime, order.runtimes[runtime], close)


@dataclass(frozen=True)
class Probe:
    """Tokens that are computed, int64 (1, length), and the text that they are; None: the model has no tokenizer."""

    ids: Tensor
    text: str | None

    @classmethod
    def of(cls, folder: Path, known_tokens: int) -> Self:
        """A short text in the tokens of a model's folder, or some of its tokens."""
        with suppress(Exception):  # a tokenizer that nothing reads may be anything; then it is not the result's fault
            if has_tokenizer(folder):
                ids = load_tokenizer(folder)(PROBE)["input_ids"]
                if ids and max(ids) < known_tokens:
                    return cls(torch.tensor([ids]), PROBE)
        generator = torch.Generator().manual_seed(0)
        return cls(torch.randint(known_tokens, (1, IDS), generator=generator), None)


def checks_of(order: AttemptOrder) -> list[Check]:
    """Formats of an order and the runtimes of its worker that read them.

    Raises:
        RuntimeDidNotLoad: the worker lacks a runtime that the request requires.
    """
    request, asked = order.request, asked_runtimes(order.request)
    lacking = sorted(asked - order.runtimes.keys())
    if lacking:
        detail = f"the request requires {lacking[0]}, and the worker that took the job has none"
        hint = "GET /v1/workers says what each has; give it to all workers, or drop it from require.loads"
        raise RuntimeDidNotLoad(detail, field="require.loads", value=lacking[0], hint=hint)
    return [
        Check.of(name, runtime, order)
        for name in request.formats
        for runtime in name.info.read_by
        if runtime in order.runtimes and (runtime in asked or runtime not in ONLY_WHERE_ASKED)
    ]


def untried(order: AttemptOrder) -> tuple[LoadReport, ...]:
    """Formats of an order that no runtime of its worker reads; none where nothing is known of the worker."""
    usual = {name: [each for each in name.info.read_by if each not in ONLY_WHERE_ASKED] for name in ExportFormat}
    return tuple(
        LoadReport(
            format=name.value,
            runtime=usual[name][0].value,
            read="block",
            result="not_checked",
            detail=f"the worker has no {usual[name][0].value}",
        )
        for name in order.request.formats
        if order.runtimes and usual[name] and not order.runtimes.keys() & set(name.info.read_by)
    )


def asked_runtimes(request: JobRequest) -> frozenset[Runtime]:
    """The runtimes that a request requires."""
    return frozenset(() if request.require is None else request.require.loads or ())
