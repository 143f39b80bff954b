"""The adapter file: what was trained, as small as it was trained, with a one-file loader beside it.

    adapter.safetensors    tensors and, in its metadata, what they mean (see `workers.formats.load_adapter`) and the id
                           of the model that was quantized, if it is on the Hub
    load_adapter.py        puts it beside a model's linears, or into their weights
    report.json            of the job

Every job that trains an adapter keeps one. Stock peft has no type for pooled adapters nor for integer factors; where it
has, the `peft` checkpoint is the same adapter. The base is the `native` checkpoint of the same job, or another of its
checkpoints that holds the base alone; the original model is the wrong one.
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
from workers.formats.cards.card_sections import code, quality, training
from workers.formats.cards.front_matter import front_matter
from workers.formats.cards.identity import Identity, Part, title
from workers.formats.cards.loading_lines import adapter_lines
from workers.formats.cards.model_card import header, provenance
from workers.formats.cards.source_card import SourceCard, read_source_card
from workers.formats.load_adapter import FILE, FORMAT, PARTS, VERSION
from workers.formats.shards import write_json
from workers.formats.source_files import LICENCES, copy_files, licence_file

LOADER = Path(__file__).with_name("load_adapter.py")


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
        tensors |= {f"{name}.{part}": tensor.cpu().contiguous() for part, tensor in parts.items()}
    linears = {name: dict(facts) for name, (facts, _) in adapters.items()}
    # One entry: safetensors writes several in an order of its own, and the same adapter shall be the same bytes.
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
    write_json(folder / "report.json", report.model_dump(mode="json"))
    (folder / "README.md").write_text(_card(folder, report, identity, source), encoding="utf-8")
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _name_base(file: Path, model_id: str) -> None:
    """Adds the id of the model that was quantized to what the file's header tells."""
    with safe_open(file, framework="pt") as stored:
        told = json.loads(stored.metadata()[FORMAT])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
    save_file(tensors, file, {FORMAT: json.dumps(told | {"base_model_name_or_path": model_id})})


def _card(folder: Path, report: Report, identity: Identity, source: Path | None) -> str:
    card = SourceCard() if source is None else read_source_card(source)
    copied = card.license_link is not None and (folder / card.license_link).is_file()
    about = f"Trained by Bitwright {report.version} beside quantized weights ({identity.method_title})"
    named = f" of {code(identity.model)}, which is not the base itself" if identity.model_id is not None else ""
    earlier = None if report.base_job is None else report.base_job.job_id
    sections = [
        header(front_matter(identity, Part.ADAPTER, None, card, copied)),
        f"# {title(identity, Part.ADAPTER)}",
        f"{about}{named}.",
        "## Load",
        *adapter_lines(identity.folded, earlier),
        *training(report),
        *quality(report, Part.ADAPTER, None),
        "## Provenance",
        provenance(report, licence_file(folder), card),
    ]
    return "\n\n".join(sections) + "\n"
