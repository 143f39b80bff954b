"""Preparation over all blocks before the first: Fisher information, and the allocation of a bit budget.

    state/prepared.json        {"fingerprint", "fisher": sha256, "choices": by full linear name, "report"}
    state/fisher.safetensors   <linear>.rows and <linear>.columns

Durable under the fingerprint of the request, model, text, code and plan, so that a resumed attempt spends the budget as
the first one did, and does not measure again. The result belongs to the fingerprint of the blocks.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load, save
from torch import Tensor

from app.domain.methods import AbsmaxScheme, Candidate, Scheme
from bitwright.events import Stage
from bitwright.report import AllocationReport
from workers.contracts.blocks import Fisher, ScoringMethod
from workers.disk.durable import replace_file
from workers.engine.job import Job, Prepared
from workers.engine.quantize.bit_budget import Scoring, spend
from workers.engine.quantize.fisher import empirical_fisher
from workers.engine.quantize.registry import method_of
from workers.engine.quantize.scores import predicted_errors


class _Choice(BaseModel):
    model_config = ConfigDict(frozen=True)

    scheme: Scheme
    absmax: AbsmaxScheme | None


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True)

    fingerprint: str
    fisher: str
    choices: dict[str, _Choice]
    report: AllocationReport | None


def prepare(job: Job) -> Job:
    """The job with everything that its spec asks for of the whole model: `prepared`, and the schemes of a budget.

    It is adopted from an earlier attempt, or else measured and durable when this returns.

    Raises:
        InvalidRequest: even the cheapest choices take more than the budget.
        NumericalFailure: an error is not finite.
    """
    if job.texts.calibration is None or not job.spec.needs_preparation() or job.spec.goal() is not None:
        return job
    files = _PreparedFiles(job.state_folder, job.fingerprint())
    prepared = files.adopt()
    everyone = job.processes.least(int(prepared is not None))
    if prepared is None or not everyone:
        prepared = _measured(job, job.texts.calibration.ids)
        if job.processes.leads:
            files.save(prepared)
    return replace(job, prepared=prepared, schemes={**job.schemes, **prepared.schemes})


def _measured(job: Job, ids: Tensor) -> Prepared:
    """Fisher information, where the spec asks for it, and choices.

    ids   int64 (sequences, length), the calibration text of all processes
    """
    model, spec, total = job.model, job.spec, len(job.model.blocks)
    budget, share = spec.budget(), 0.5 if spec.needs_fisher() else 0.0

    def tick(done: float) -> None:
        job.reporter.progress(Stage.CALIBRATE, done * total, total, "blocks")

    fisher: dict[str, Fisher] = {}
    if spec.needs_fisher():
        names = {name for name in model.linears() if spec.scheme_of(name) is not None and name != model.layout.head}
        own = job.processes.share(ids)
        fisher = empirical_fisher(
            model, own, names, job.plan.micro_batch, lambda done: tick(done * share), job.processes
        )
    if budget is None:
        return Prepared(fisher=fisher)
    method = method_of(spec)
    if isinstance(method, ScoringMethod):
        scoring = Scoring(
            model=model,
            spec=spec,
            method=method,
            scale_dtype=job.plan.scale_dtype,
            seed=job.seed,
            fisher=fisher,
            tick=lambda done: tick(share + (1 - share) * done),
        )
        chosen, report = spend(job, budget, scoring.errors)
    else:
        chosen, report = spend(job, budget, partial(predicted_errors, job, ids))
    return _prepared(chosen, fisher, report)


@dataclass(frozen=True)
class _PreparedFiles:
    """prepared.json and fisher.safetensors of a state folder, under a fingerprint."""

    folder: Path
    fingerprint: str

    def save(self, prepared: Prepared) -> None:
        rows = {f"{name}.rows": fisher.rows for name, fisher in prepared.fisher.items()}
        data = save(rows | {f"{name}.columns": fisher.columns for name, fisher in prepared.fisher.items()})
        replace_file(self.folder / "fisher.safetensors", data)
        stored = _Stored(
            fingerprint=self.fingerprint,
            fisher=hashlib.sha256(data).hexdigest(),
            choices={
                name: _Choice(scheme=scheme, absmax=prepared.absmax.get(name))
                for name, scheme in prepared.schemes.items()
            },
            report=prepared.report,
        )
        replace_file(self.folder / "prepared.json", stored.model_dump_json().encode())

    def adopt(self) -> Prepared | None:
        try:
            stored = _Stored.model_validate_json((self.folder / "prepared.json").read_bytes())
            data = (self.folder / "fisher.safetensors").read_bytes()
        except (OSError, ValidationError):
            return None
        if stored.fingerprint != self.fingerprint or hashlib.sha256(data).hexdigest() != stored.fisher:
            return None
        tensors = load(data)
        names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
        fisher = {name: Fisher(tensors[f"{name}.rows"], tensors[f"{name}.columns"]) for name in names}
        chosen = {name: Candidate(choice.scheme, choice.absmax) for name, choice in stored.choices.items()}
        return _prepared(chosen, fisher, stored.report)


def _prepared(
    chosen: Mapping[str, Candidate], fisher: Mapping[str, Fisher], report: AllocationReport | None
) -> Prepared:
    schemes = {name: choice.scheme for name, choice in chosen.items()}
    absmax = {name: choice.absmax for name, choice in chosen.items() if choice.absmax is not None}
    return Prepared(schemes, absmax, fisher, report)
