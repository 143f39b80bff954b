"""Preparation over all blocks before the first: Fisher information, and the allocation of a bit budget.

    state/prepared.json        {"fingerprint", "fisher": sha256, "choices": by full linear name, "report"}
    state/fisher.safetensors   <linear>.rows and <linear>.columns

Durable under the fingerprint of the request, model, text, code and plan, so that a resumed attempt spends the budget as
the first one did, and does not measure again. What was found belongs to the fingerprint of the blocks.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load, save
from torch import Tensor

from app.domain.methods import AbsmaxScheme, Candidate, Scheme, WeightSpec
from bitwright.report import AllocationReport
from workers.contracts.blocks import Fisher, ScoringMethod
from workers.disk.durable import replace_file
from workers.engine.device.process_group import SINGLE_PROCESS, ProcessGroup
from workers.engine.fingerprint import fingerprint
from workers.engine.model.overflow import blaming_the_original
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.plan import Plan
from workers.engine.quantize.activations import Activations
from workers.engine.quantize.bit_budget import Scoring, spend
from workers.engine.quantize.fisher import empirical_fisher
from workers.engine.quantize.registry import METHODS


@dataclass(frozen=True)
class Prepared:
    """By full linear name; empty where the spec asks for neither.

    schemes, absmax   what the budget chose
    """

    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    absmax: Mapping[str, AbsmaxScheme] = field(default_factory=dict)
    fisher: Mapping[str, Fisher] = field(default_factory=dict)
    report: AllocationReport | None = None

    def of_block(self, prefix: str) -> tuple[dict[str, AbsmaxScheme], dict[str, Fisher]]:
        """Second levels and Fisher information of a block's linears, by their names inside it."""
        start = prefix + "."
        absmax = {n.removeprefix(start): a for n, a in self.absmax.items() if n.startswith(start)}
        return absmax, {n.removeprefix(start): f for n, f in self.fisher.items() if n.startswith(start)}


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


@dataclass(frozen=True)
class Preparation:
    """What it works with.

    ids     the windows of this rank
    tick    told the share that is done
    processes   who prepare together: the first one writes, and all of them adopt what they find, or none does
    """

    model: StreamedModel
    spec: WeightSpec
    plan: Plan
    seed: int
    ids: Tensor
    folder: Path
    fingerprint: str
    tick: Callable[[float], None]
    processes: ProcessGroup = SINGLE_PROCESS

    def run(self) -> Prepared:
        """What an earlier attempt has left, or else everything anew, durable when this returns.

        Raises:
            InvalidRequest: even the cheapest choices take more than the budget.
            NumericalFailure: an error is not finite.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        found = self._adopt()
        everyone = self.processes.least(int(found is not None))
        if found is not None and everyone:
            return found
        measured = self._measure()
        if self.processes.leads:
            self._save(measured)
        return measured

    def _measure(self) -> Prepared:
        budget, share = self.spec.budget(), 0.5 if self.spec.needs_fisher() else 0.0
        names = {n for n in self.model.linears() if self.spec.scheme(n) is not None and n != self.model.layout.head}
        fisher: dict[str, Fisher] = {}
        if self.spec.needs_fisher():
            fisher = empirical_fisher(
                self.model, self.ids, names, self.plan.micro_batch, lambda done: self.tick(done * share), self.processes
            )
        if budget is None:
            return Prepared(fisher=fisher)
        stream = None
        if not isinstance(METHODS[self.spec.model_dump()["method"]], ScoringMethod):
            with self.model.loaded(self.model.layout.embeddings):
                stream = Activations(self.model, self.ids, self.plan, keep_inputs=False)
        scoring = Scoring(
            model=self.model,
            spec=self.spec,
            scale_dtype=getattr(torch, self.plan.scale_dtype),
            seed=self.seed,
            stream=stream,
            fisher=fisher,
            tick=lambda done: self.tick(share + (1 - share) * done),
            processes=self.processes,
        )
        with blaming_the_original(self.model.dtype, lambda: [] if stream is None else [stream.original]):
            chosen, report = spend(scoring, budget)
        return _prepared(chosen, fisher, report)

    def _save(self, found: Prepared) -> None:
        data = save({f"{n}.{part}": getattr(f, part) for n, f in found.fisher.items() for part in ("rows", "columns")})
        replace_file(self.folder / "fisher.safetensors", data)
        stored = _Stored(
            fingerprint=self.fingerprint,
            fisher=hashlib.sha256(data).hexdigest(),
            choices={n: _Choice(scheme=s, absmax=found.absmax.get(n)) for n, s in found.schemes.items()},
            report=found.report,
        )
        replace_file(self.folder / "prepared.json", stored.model_dump_json().encode())

    def _adopt(self) -> Prepared | None:
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


def digest(found: Prepared) -> str:
    """sha256 of what the blocks' codes depend on."""
    sums = {n: hashlib.sha256(f.rows.numpy().tobytes() + f.columns.numpy().tobytes()) for n, f in found.fisher.items()}
    return fingerprint(
        {
            "schemes": {name: scheme.model_dump() for name, scheme in found.schemes.items()},
            "absmax": {name: str(absmax) for name, absmax in found.absmax.items()},
            "fisher": {name: each.hexdigest() for name, each in sums.items()},
        }
    )
