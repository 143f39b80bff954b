"""A method for tests alone: round, then the best low-rank approximation of what rounding lost (one step of LoftQ).

It makes every form that the service knows and that no method of its own makes yet, so that what lies between a method
and a checkpoint can be tried with real results.
"""

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import Field

from app.domain.methods import METHODS as NAMED
from app.domain.methods import Form, MethodInfo, RTNSpec, SignRoundSpec, WeightSpec
from app.domain.request.job_request import JobRequest
from workers.contracts.blocks import BlockTask
from workers.contracts.results import BlockResult
from workers.engine.quantize.registry import METHODS
from workers.methods.rtn import quantize_weight
from workers.numerics.normal_float import DoubleQuantization, quantize
from workers.numerics.quantized import LinearResult, LowRank


class ResidualSVDSpec(WeightSpec):
    method: Literal["residual-svd"] = "residual-svd"
    base: Literal["codebook", "affine"] = "codebook"
    rank: int = 4
    alpha: float = 16.0
    superblock: int = 0
    scale_steps: int = 0

    def forms(self) -> frozenset[Form]:
        return frozenset({Form(self.base)} | ({Form.LOW_RANK} if self.rank else set()))

    def factors_rank(self) -> int:
        return self.rank

    def end_to_end_steps(self) -> int:
        return self.scale_steps


class AnyMethodRequest(JobRequest):
    """A request that may name this method too."""

    quantization: Annotated[  # type: ignore[assignment]  # wider than the field that it stands in for
        RTNSpec | SignRoundSpec | ResidualSVDSpec, Field(discriminator="method")
    ]


class AnyMethodFormats(AnyMethodRequest):
    model: Any = None


@dataclass
class ResidualSVD:
    """`stop_at`: a block at which it raises `Interrupted`; `seen`: weights of the blocks that it was given."""

    stop_at: int | None = None
    seen: list[int] = field(default_factory=list)

    def quantize_block(self, task: BlockTask, spec: ResidualSVDSpec) -> BlockResult:
        if task.index == self.stop_at:
            raise Interrupted
        self.seen.append(task.index)
        return BlockResult({name: self._quantize(task, name, spec) for name in task.schemes})

    @torch.no_grad()
    def _quantize(self, task: BlockTask, name: str, spec: ResidualSVDSpec) -> LinearResult:
        weight, scheme = task.linear(name).weight, task.schemes[name]
        if spec.base == "codebook":
            absmax = DoubleQuantization(8, torch.float32, spec.superblock) if spec.superblock else task.scale_dtype
            result = LinearResult(quantize(weight, scheme, absmax, weight.dtype))
        else:
            result = LinearResult(quantize_weight(weight, scheme, task.scale_dtype))
        if not spec.rank:
            return result
        rest = weight.float() - result.weight.dequantize().float()
        u, s, v = torch.linalg.svd(rest, full_matrices=False)
        root = s[: spec.rank].sqrt()
        low_rank = LowRank.of_product(
            u[:, : spec.rank] * root, root[:, None] * v[: spec.rank], spec.alpha, weight.dtype
        )
        return LinearResult(result.weight, low_rank)


class Interrupted(Exception):
    pass


INFO = MethodInfo(
    spec=ResidualSVDSpec,
    title="Residual SVD",
    summary="For tests.",
    paper=None,
    produces=frozenset(Form),
)


def register(monkeypatch: pytest.MonkeyPatch) -> ResidualSVD:
    """Makes the method known wherever methods are known by name; the method, to be told where to stop."""
    method = ResidualSVD()
    named = MappingProxyType({**NAMED, "residual-svd": INFO})
    for module in (
        "app.domain.methods",
        "app.domain.format_rules",
        "app.domain.request.shorthand",
        "workers.formats.cards.model_card",
    ):
        monkeypatch.setattr(f"{module}.METHODS", named)
    code = MappingProxyType({**METHODS, "residual-svd": method})
    monkeypatch.setattr("workers.engine.quantize.registry.METHODS", code)
    monkeypatch.setattr("app.domain.request.job_request._FormatPart", AnyMethodFormats)
    monkeypatch.setattr("tests.engine.conftest.JobRequest", AnyMethodRequest)
    return method
