"""The adapter file: the trained parameters at their own size, with a one-file loader beside it.

    adapter.safetensors    tensors and, in its metadata, their meaning (see `workers.formats.load_adapter`) and the id
                           of the model that was quantized, if it is on the Hub
    load_adapter.py        puts it beside a model's linears, or into their weights
    report.json            the job's report, and report.html the same for people

Every job that trains an adapter keeps one. Stock peft has no type for pooled adapters or integer factors; for the kinds
that it has, the `peft` checkpoint is the same adapter. The base is the `native` checkpoint of the same job, or another
of its checkpoints that holds the base alone; the original model is the wrong one.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitwright.report import Report
from workers.formats.cards.front_matter import front_matter
from workers.formats.cards.identity import Contents, Identity, title
from workers.formats.cards.loading import BASE, FOLDER, WITH_ADAPTER_FILE
from workers.formats.cards.model_card import header, provenance, write_report
from workers.formats.cards.sections import code, quality, training
from workers.formats.cards.source_card import SourceCard, read_source_card
from workers.formats.load_adapter import FILE, FORMAT, PARTS, VERSION
from workers.formats.native import NATIVE_BASE
from workers.formats.source_files import LICENCES, copy_files, licence_file

LOADER = Path(__file__).with_name("load_adapter.py")

ABOUT_ADAPTER_FILE = """\
It belongs to the quantized base that it was trained beside: the job's `native` checkpoint without its factors. On the
original model it is wrong. Beside the linears of the base it computes what was measured:"""

ABOUT_MERGING = """\
`merge` of the same file adds it to the linears' weights instead, rounded once to their dtype."""

ABOUT_FOLDED = """\
**The job's checkpoints have this adapter in their weights already: attached to them it would act twice.** It belongs to
the quantized base that it was trained beside, which is the `native` checkpoint of {where}:"""


def write_adapter(
    folder: Path, kind: str, adapters: Mapping[str, tuple[Mapping[str, object], Mapping[str, Tensor]]]
) -> None:
    """One adapter folder, emptied first; `adapters` by module name, as `workers.adapters.attaching.stored` gives them.

    Raises:
        ValueError: an adapter has other tensors than its form says.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for name, (facts, parts) in adapters.items():
        if parts and parts.keys() != PARTS[str(facts["form"])]:
            raise ValueError(f"{name}: tensors {sorted(parts)} are not those of the form {facts['form']}")
        tensors |= {f"{name}.{suffix}": tensor.cpu().contiguous() for suffix, tensor in parts.items()}
    linears = {name: dict(facts) for name, (facts, _) in adapters.items()}
    # One entry: safetensors writes several in arbitrary order, but the same adapter must give the same bytes.
    save_file(tensors, folder / FILE, {FORMAT: json.dumps({"version": VERSION, "kind": kind, "linears": linears})})
    shutil.copyfile(LOADER, folder / LOADER.name)


def describe_adapter(folder: Path, kind: str, report: Report, source: Path | None = None) -> list[Path]:
    """Name the base, and add the report, a card and the source's licence; all files of the folder.

    source   folder of the original model
    """
    identity = replace(Identity.of(report), adapter=kind)
    if identity.model_id is not None:
        _name_base(folder / FILE, identity.model_id)
    if source is not None:
        copy_files(source, folder, LICENCES)
    base_job = None if report.base_job is None else report.base_job.job_id
    write_report(folder, report, title(identity, Contents.ADAPTER), adapter_lines(identity.folded, base_job))
    (folder / "README.md").write_text(_card(folder, report, identity, source), encoding="utf-8")
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _name_base(file: Path, model_id: str) -> None:
    """Adds the id of the model that was quantized to the description in the file's header."""
    with safe_open(file, framework="pt") as stored:
        description = json.loads(stored.metadata()[FORMAT])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
    save_file(tensors, file, {FORMAT: json.dumps(description | {"base_model_name_or_path": model_id})})


def _card(folder: Path, report: Report, identity: Identity, source: Path | None) -> str:
    card = SourceCard() if source is None else read_source_card(source)
    copied = card.license_link is not None and (folder / card.license_link).is_file()
    about = f"Trained by Bitwright {report.version} beside quantized weights ({identity.method_title})"
    named = f" of {code(identity.model)}, which is not the base itself" if identity.model_id is not None else ""
    base_job = None if report.base_job is None else report.base_job.job_id
    sections = [
        header(front_matter(identity, Contents.ADAPTER, None, card, copied)),
        f"# {title(identity, Contents.ADAPTER)}",
        f"{about}{named}.",
        "## Load",
        *adapter_lines(identity.folded, base_job),
        *training(report),
        *quality(report, Contents.ADAPTER, None),
        "## Provenance",
        provenance(report, licence_file(folder), card),
    ]
    return "\n\n".join(sections) + "\n"


def adapter_lines(folded: bool, base_job: str | None) -> list[str]:
    """Paragraphs that say how to load the adapter file.

    folded        whether the job's checkpoints hold the adapter in their weights
    base_job      id of the job whose result it was trained beside, if not this job's own quantization
    """
    lines = WITH_ADAPTER_FILE.format(adapter=FOLDER, load=NATIVE_BASE.format(folder=BASE))
    if not folded:
        return [f"{ABOUT_ADAPTER_FILE}\n\n{lines}", ABOUT_MERGING]
    where = f"the job `{base_job}`" if base_job else "a job of the same request without `merge`"
    return [f"{ABOUT_FOLDED.format(where=where)}\n\n{lines}"]
