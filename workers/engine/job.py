"""One job as all of its stages see it: order, model, texts, schemes and plan, read and decided before its first block.

A stage is a function `run(job, its own inputs) -> its result` of a module or package beside this one; `run.py` lists
the stages in the order of time.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from app.domain.methods import AbsmaxScheme, Scheme, WeightSpec
from app.domain.request.job_request import JobRequest
from bitwright.report import AllocationReport, GoalReport
from workers.contracts.blocks import Fisher
from workers.disk.orders import AttemptOrder
from workers.engine.base_job import BaseJobResult
from workers.engine.clock import StageClock
from workers.engine.device.process_group import ProcessGroup
from workers.engine.fingerprint import code_version, fingerprint, library_versions
from workers.engine.finished_blocks import FinishedBlocks
from workers.engine.job_texts import Texts
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.plan import Plan
from workers.engine.reporter import Reporter

CODES_DEPEND_ON = {"base_job", "quantization", "calibration", "seed"}
"""Fields of a request that decide the codes."""


@dataclass(frozen=True)
class Prepared:
    """Facts about the whole model that a spec asks for before the first block, by full linear name; else empty.

    schemes, absmax   chosen by the budget or for the goal
    goal              the way there, once it is reached
    """

    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    absmax: Mapping[str, AbsmaxScheme] = field(default_factory=dict)
    fisher: Mapping[str, Fisher] = field(default_factory=dict)
    report: AllocationReport | None = None
    goal: GoalReport | None = None

    def of_block(self, prefix: str) -> tuple[dict[str, AbsmaxScheme], dict[str, Fisher]]:
        """Second levels and Fisher information of a block's linears, by their names inside it."""
        start = prefix + "."
        absmax = {name.removeprefix(start): each for name, each in self.absmax.items() if name.startswith(start)}
        fisher = {name.removeprefix(start): each for name, each in self.fisher.items() if name.startswith(start)}
        return absmax, fisher

    def digest(self) -> str:
        """sha256 of everything that the blocks' codes depend on."""
        fisher = {
            n: hashlib.sha256(f.rows.numpy().tobytes() + f.columns.numpy().tobytes()) for n, f in self.fisher.items()
        }
        return fingerprint(
            {
                "schemes": {name: scheme.model_dump() for name, scheme in self.schemes.items()},
                "absmax": {name: str(absmax) for name, absmax in self.absmax.items()},
                "fisher": {name: each.hexdigest() for name, each in fisher.items()},
            }
        )


@dataclass(frozen=True)
class Job:
    """The context of every stage.

    processes        the processes of the job, each with its share of the sequences
    schemes          of every linear that is quantized, by full name
    finished_blocks  durable results of the blocks, empty until the quantize stage adopts or makes them
    base_job         the result that this job starts from
    prepared         facts about the whole model that the method asks for; empty until `quantize.prepare`
    reference        whether round to nearest is measured besides
    rounds_before    how often all blocks were made before, on the way to a goal
    """

    order: AttemptOrder
    workspace: Path
    reporter: Reporter
    clock: StageClock
    processes: ProcessGroup
    model: StreamedModel
    schemes: Mapping[str, Scheme]
    plan: Plan
    texts: Texts
    finished_blocks: FinishedBlocks
    base_job: BaseJobResult | None = None
    prepared: Prepared = Prepared()
    reference: bool = False
    rounds_before: int = 0

    @property
    def request(self) -> JobRequest:
        return self.order.request

    @property
    def spec(self) -> WeightSpec:
        return self.order.request.quantization

    @property
    def seed(self) -> int:
        return self.order.request.seed

    @property
    def trains(self) -> bool:
        """True if adapters are trained beside the quantized weights."""
        return self.request.finetune is not None and self.request.adapter is not None

    @property
    def state_folder(self) -> Path:
        """The folder of everything that a retried attempt adopts."""
        return self.workspace / "state"

    @property
    def block_schemes(self) -> dict[str, Scheme]:
        """Schemes of the blocks' linears, without those of embeddings and head."""
        outer = {self.model.layout.head, self.model.layout.embeddings}
        return {name: scheme for name, scheme in self.schemes.items() if name not in outer}

    def fingerprint(self) -> str:
        """sha256 of everything that decides the codes, as far as it is known: `prepared` is part of it."""
        sequences = self.texts.calibration
        return fingerprint(
            {
                "request": self.request.model_dump(mode="json", include=CODES_DEPEND_ON),
                "model": self.model.checkpoint.digest(self.order.model_pin),
                "calibration": None if sequences is None else sequences.sha256,
                "further": None if sequences is None else sequences.further_sha256,
                "code": code_version(),
                "libraries": library_versions(),
                "plan": self.plan.decides_codes(),
                "prepared": self.prepared.digest(),
            }
        )
