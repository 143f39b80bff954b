"""What a result is, in words: for titles, front matter and metadata of every format, before and after the report.

    identity = Identity.of(report)              or made of a request, before a GGUF file is written
    title(identity, Part.BASE)                  SmolLM2-135M, SignRound: the base alone, without Q-BaRA on rows.jsonl

The parts of a job that finetunes are the whole (an adapter that lies in the weights, or none), the quantized base
alone, and the adapter alone.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from app.domain import methods
from app.domain.adapters import ADAPTERS
from app.domain.request.sources import HUB_ID, UPLOAD_ID
from bitwright.report import BaseTraining, FinetuningReport, Report
from workers.formats.stored_linear import StoredLinear

CACHED = re.compile(r"[\\/](?:models|datasets)--(?:[\w.-]+?--)?([\w.-]+)[\\/]snapshots[\\/][0-9a-f]+[\\/]?$")
Kind = Literal["hub", "local", "upload", "builtin"] | None


class Part(StrEnum):
    """What of a job's result lies in one folder."""

    WHOLE = "whole"
    BASE = "base"
    ADAPTER = "adapter"


@dataclass(frozen=True)
class Dataset:
    """A text that was learned.

    hub   its repository's id, if it is on the Hub
    """

    source: str
    sha256: str
    hub: str | None

    @property
    def name(self) -> str:
        """Short, for titles: a path's last part."""
        return self.hub or last_part(self.source)


@dataclass(frozen=True)
class Identity:
    """A job's result.

    model        the source in shorthand; `model_id` if that is a repository of the Hub, `revision` its commit
    method       that made the codes
    adapter      kind of what was trained beside them; None: nothing was
    folded       whether that lies in the quantized weights
    earlier      what earlier jobs trained of it
    """

    version: str
    model: str
    model_id: str | None
    revision: str | None
    method: str
    adapter: str | None = None
    folded: bool = False
    finetuning: FinetuningReport | None = None
    earlier: tuple[BaseTraining, ...] = ()

    @classmethod
    def of(cls, report: Report) -> "Identity":
        """Of a finished job."""
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
            earlier=() if report.base_job is None else report.base_job.training,
        )

    @property
    def name(self) -> str:
        """Of the model, without its owner or folder."""
        return last_part(self.model)

    @property
    def method_title(self) -> str:
        return methods.METHODS[self.method].title

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """What was learned, by earlier jobs first, each once."""
        found = [_dataset(one.text.source, one.text.sha256, one.dataset_kind) for one in self.earlier]
        if self.finetuning is not None:
            text = self.finetuning.text
            found.append(_dataset(text.source, text.sha256, self.finetuning.dataset_kind))
        return tuple(dict.fromkeys(found))

    @property
    def finetuned(self) -> str:
        """What was trained on what, in order: "QA-LoRA on rows.jsonl"; empty where nothing was."""
        return _in_words([*_of_earlier(self.earlier), *self._own()])

    @property
    def finetuned_before(self) -> str:
        """The part of `finetuned` that lies in the weights which this job's adapter was trained beside."""
        return _in_words(_of_earlier(one for one in self.earlier if one.folded))

    @property
    def finetuned_beside(self) -> str:
        """The rest of `finetuned`: what this job's adapter learned."""
        return _in_words([*_of_earlier(one for one in self.earlier if not one.folded), *self._own()])

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


def title(identity: Identity, part: Part) -> str:
    """One line that names model, method, adapter and dataset, and which part of them it is."""
    name = f"{identity.name}, {identity.method_title}"
    if part is Part.WHOLE:
        return f"{name}, finetuned: {identity.finetuned}" if identity.finetuned else name
    name += f", finetuned: {identity.finetuned_before}" if identity.finetuned_before else ""
    beside = identity.finetuned_beside
    if part is Part.ADAPTER:
        return f"{name}: {beside}, the adapter alone" if beside else f"{name}: the low-rank factors alone"
    return f"{name}: the base alone, without {beside or 'its low-rank factors'}"


def part_of(identity: Identity, linears: Mapping[str, StoredLinear], base_alone: bool) -> Part:
    """What a folder with these linears holds, which is no adapter's.

    base_alone   whether another folder of the job holds the low-rank factors, by the job's formats
    """
    in_weights = identity.folded or any(linear.low_rank is not None for linear in linears.values())
    apart = identity.adapter is not None and not in_weights
    return Part.BASE if base_alone or apart else Part.WHOLE


def hub_id(source: str, kind: Kind) -> str | None:
    """The repository's id, None where the source is none; by its looks where an older report does not say."""
    if kind is not None:
        return source if kind == "hub" else None
    looks = re.match(HUB_ID, source) and not re.match(UPLOAD_ID, source) and source not in ("builtin", "generated")
    return source if looks else None


def last_part(source: str) -> str:
    """Of an id or a path, in one line; of a snapshot in a Hub's cache the repository's name, not the commit."""
    cached = CACHED.search(source)
    if cached is not None:
        return cached[1]
    return " ".join(re.split(r"[/\\]", source.rstrip("/\\"))[-1].split()) or source


def _dataset(source: str, sha256: str, kind: Kind) -> Dataset:
    return Dataset(source, sha256, hub_id(source, kind))


def _of_earlier(training: Iterable[BaseTraining]) -> list[str]:
    return [
        f"{adapter_title(one.adapter)} on {_dataset(one.text.source, one.text.sha256, one.dataset_kind).name}"
        for one in training
    ]


def _in_words(trained: list[str]) -> str:
    return ", then ".join(dict.fromkeys(trained))
