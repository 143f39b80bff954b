"""Description of a result in words, for titles, front matter and metadata of every format; before or after the report.

    identity = Identity.of(report)              or from a request, before a GGUF file is written
    title(identity, Contents.BASE)              SmolLM2-135M, SignRound: the base alone, without Q-BaRA on rows.jsonl

A folder of a job that finetunes contains the complete result (the adapter in the weights, or none), the quantized base
alone, or the adapter alone.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from app.domain import methods
from app.domain.adapters import ADAPTERS
from app.domain.request.sources import HUB_ID, UPLOAD_ID
from bitwright.report import BaseTraining, FinetuningReport, Report, TextReport
from workers.formats.stored_linear import StoredLinear

CACHED = re.compile(r"[\\/](?:models|datasets)--(?:[\w.-]+?--)?([\w.-]+)[\\/]snapshots[\\/][0-9a-f]+[\\/]?$")
Kind = Literal["hub", "local", "upload", "builtin"] | None


class Contents(StrEnum):
    """Contents of one folder of a job's result: the complete result, the base alone or the adapter alone."""

    WHOLE = "whole"
    BASE = "base"
    ADAPTER = "adapter"


@dataclass(frozen=True)
class Dataset:
    """A training dataset.

    hub   the id of its repository, if it is on the Hub
    """

    source: str
    sha256: str
    hub: str | None

    @property
    def name(self) -> str:
        """Short name for titles: the last segment of a path."""
        return self.hub or last_segment(self.source)


@dataclass(frozen=True)
class Identity:
    """A job's result.

    model           the source in shorthand; `model_id` if that is a repository of the Hub, `revision` its commit
    method          the method that produced the codes
    adapter         kind of the adapter that was trained beside them; None: no training
    folded          whether the adapter lies in the quantized weights
    base_training   training of the base jobs
    scheme          as it was asked for, in words: a name, a mix, numbers, or what was chosen for; None: not known
    calibration     the text that the method read
    """

    version: str
    model: str
    model_id: str | None
    revision: str | None
    method: str
    adapter: str | None = None
    folded: bool = False
    finetuning: FinetuningReport | None = None
    base_training: tuple[BaseTraining, ...] = ()
    scheme: str | None = None
    calibration: TextReport | None = None

    @classmethod
    def of(cls, report: Report) -> "Identity":
        """The identity of a finished job."""
        adapter = report.adapter
        return cls(
            version=report.version,
            model=report.model.source,
            model_id=hub_id(report.model.source, report.model.kind),
            revision=report.model.revision,
            method=report.method,
            adapter=None if adapter is None else adapter.kind,
            folded=adapter is not None and adapter.merge is not None,
            finetuning=report.finetuning,
            base_training=() if report.base_job is None else report.base_job.training,
            scheme=report.scheme,
            calibration=report.calibration,
        )

    @property
    def name(self) -> str:
        """Name of the model, without its owner or folder."""
        return last_segment(self.model)

    @property
    def method_title(self) -> str:
        return methods.METHODS[self.method].title

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """Training datasets, those of base jobs first, each once."""
        used = [_dataset(one.text.source, one.text.sha256, one.dataset_kind) for one in self.base_training]
        if self.finetuning is not None:
            text = self.finetuning.text
            used.append(_dataset(text.source, text.sha256, self.finetuning.dataset_kind))
        return tuple(dict.fromkeys(used))

    @property
    def finetuned(self) -> str:
        """Adapters and their datasets, in order: "QA-LoRA on rows.jsonl"; empty without training."""
        return _in_words([*_of_base_jobs(self.base_training), *self._own()])

    @property
    def finetuned_before(self) -> str:
        """The share of `finetuned` that lies in the weights beside which this job's adapter was trained."""
        return _in_words(_of_base_jobs(one for one in self.base_training if one.folded))

    @property
    def finetuned_beside(self) -> str:
        """The rest of `finetuned`: the training of this job's adapter."""
        return _in_words([*_of_base_jobs(one for one in self.base_training if not one.folded), *self._own()])

    def _own(self) -> list[str]:
        if self.finetuning is None:
            return []
        text, kind = self.finetuning.text, self.finetuning.dataset_kind
        return [f"{adapter_title(self.adapter)} on {_dataset(text.source, text.sha256, kind).name}"]


def adapter_title(kind: str | None) -> str:
    """The name of a kind of adapter; the kind itself where this version does not know it."""
    if kind is None:
        return "an adapter"
    return ADAPTERS[kind].title if kind in ADAPTERS else kind


def title(identity: Identity, contents: Contents) -> str:
    """One line that names model, method, adapter and dataset, and which of them the folder contains."""
    name = f"{identity.name}, {identity.method_title}"
    if contents is Contents.WHOLE:
        return f"{name}, finetuned: {identity.finetuned}" if identity.finetuned else name
    name += f", finetuned: {identity.finetuned_before}" if identity.finetuned_before else ""
    beside = identity.finetuned_beside
    if contents is Contents.ADAPTER:
        return f"{name}: {beside}, the adapter alone" if beside else f"{name}: the low-rank factors alone"
    return f"{name}: the base alone, without {beside or 'its low-rank factors'}"


def contents_of(identity: Identity, linears: Mapping[str, StoredLinear], base_alone: bool) -> Contents:
    """The contents of a checkpoint folder with these linears (not of an adapter's folder).

    base_alone   whether another folder of the job holds the low-rank factors, by the job's formats
    """
    in_weights = identity.folded or any(linear.low_rank is not None for linear in linears.values())
    apart = identity.adapter is not None and not in_weights
    return Contents.BASE if base_alone or apart else Contents.WHOLE


def hub_id(source: str, kind: Kind) -> str | None:
    """The repository's id, None if it is not on the Hub; guessed from its form if an older report has no kind."""
    if kind is not None:
        return source if kind == "hub" else None
    looks = re.match(HUB_ID, source) and not re.match(UPLOAD_ID, source) and source not in ("builtin", "generated")
    return source if looks else None


def last_segment(source: str) -> str:
    """The last segment of an id or path, in one line; of a snapshot in a Hub cache the repository, not the commit."""
    cached = CACHED.search(source)
    if cached is not None:
        return cached[1]
    return " ".join(re.split(r"[/\\]", source.rstrip("/\\"))[-1].split()) or source


def _dataset(source: str, sha256: str, kind: Kind) -> Dataset:
    return Dataset(source, sha256, hub_id(source, kind))


def _of_base_jobs(training: Iterable[BaseTraining]) -> list[str]:
    return [
        f"{adapter_title(one.adapter)} on {_dataset(one.text.source, one.text.sha256, one.dataset_kind).name}"
        for one in training
    ]


def _in_words(trained: list[str]) -> str:
    return ", then ".join(dict.fromkeys(trained))
