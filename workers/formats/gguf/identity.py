"""Metadata of a GGUF file under `general.`: its name, sources and quantization.

The keys are those of gguf's specification, filled as llama.cpp's converter fills them: free names stay as they are,
and repositories are addresses on the Hub.
"""

from pathlib import PurePosixPath

from gguf import GGUFType, GGUFWriter, size_label

from app.domain.formats import ExportFormat
from app.domain.methods.block_presets import MIXES
from workers.formats.cards.front_matter import TASK, tags
from workers.formats.cards.identity import Contents, Dataset, Identity, contents_of, last_segment, title
from workers.formats.cards.source_card import SourceCard, read_source_card
from workers.formats.source_files import SourceCheckpoint

HUB = "https://huggingface.co"
OWN = "bitwright."
"""The beginning of this program's keys: `version`, `method`, `scheme` as asked for, and `calibration`'s text."""
MIX_NUMBERS = {preset.value: mix.number for preset, mix in MIXES.items()}


def add_identity(writer: GGUFWriter, source: SourceCheckpoint, identity: Identity | None, base_alone: bool) -> None:
    """Adds the keys; without an identity the name of the folder and the fields of the source's card.

    base_alone   whether another folder of the job holds the low-rank factors
    """
    card = read_source_card(source.folder)
    writer.add_type(GGUFType.MODEL)
    weights = sum(_count(source, name) for name in source.tensors)
    writer.add_size_label(size_label(weights, 0, 0, 0))
    if identity is None:
        writer.add_name(source.folder.name)
        _add_licence(writer, card, None)
        return
    contents = contents_of(identity, {}, base_alone)
    writer.add_name(title(identity, contents))
    writer.add_description(_description(identity, contents))
    writer.add_quantized_by(f"Bitwright {identity.version}")
    if identity.finetuned and contents is Contents.WHOLE:
        writer.add_finetune(identity.finetuned)
    _add_licence(writer, card, identity.model_id)
    _add_base_model(writer, identity)
    _add_datasets(writer, identity.datasets)
    writer.add_tags([*tags(identity, ExportFormat.GGUF), card.pipeline_tag or TASK])
    if card.language:
        writer.add_languages(list(card.language))


def add_recipe(writer: GGUFWriter, identity: Identity | None, file_type: int) -> None:
    """Adds how the weights were made: llama.cpp's number of the mix, and under `bitwright.` the rest.

    file_type   of the type that most weights have, where no mix says another (`llama_ftype`)
    """
    mix = None if identity is None else MIX_NUMBERS.get(identity.scheme or "")
    writer.add_file_type(file_type if mix is None else mix)
    if identity is None:
        return
    writer.add_string(OWN + "version", identity.version)
    writer.add_string(OWN + "method", identity.method)
    if identity.scheme is not None:
        writer.add_string(OWN + "scheme", identity.scheme)
    text = identity.calibration
    if text is not None:
        # The name of a folder, not its path: that belongs to one machine.
        writer.add_string(OWN + "calibration.dataset", last_segment(text.source))
        writer.add_string(OWN + "calibration.sha256", text.sha256)
        writer.add_uint32(OWN + "calibration.tokens", text.tokens)


def _count(source: SourceCheckpoint, name: str) -> int:
    count = 1
    for length in source.tensors[name].shape:
        count *= length
    return count


def _description(identity: Identity, contents: Contents) -> str:
    """One paragraph; with hashes and steps after training."""
    # The name of a folder, not its path: that belongs to one machine, and files of equal contents would differ.
    text = f"Quantized by Bitwright with {identity.method_title} from {identity.model_id or identity.name}."
    for dataset in identity.datasets:
        text += f" The dataset {dataset.name} has the sha256 {dataset.sha256}."
    run = identity.finetuning
    if run is not None and run.loss_before is not None and run.loss_after is not None:
        loss = run.loss_after if run.loss_shipped is None else run.loss_shipped
        text += f" {run.steps_kept} steps took the held-out loss from {run.loss_before:.4f} to {loss:.4f}."
    if contents is Contents.BASE:
        text += (
            f" This file is the quantized base alone, without {identity.finetuned_beside or 'its low-rank factors'}."
        )
    return text


def _add_licence(writer: GGUFWriter, card: SourceCard, model_id: str | None) -> None:
    if card.license:
        writer.add_license(",".join(card.license))
    if card.license_name is not None:
        writer.add_license_name(card.license_name)
    link = card.link(model_id, copied=False)
    if link is not None:
        writer.add_license_link(link)


def _add_base_model(writer: GGUFWriter, identity: Identity) -> None:
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, identity.name)
    if identity.model_id is not None:
        writer.add_base_model_repo_url(0, f"{HUB}/{identity.model_id}")
        owner = identity.model_id.rpartition("/")[0]
        if owner:
            writer.add_base_model_organization(0, owner)


def _add_datasets(writer: GGUFWriter, datasets: tuple[Dataset, ...]) -> None:
    if datasets:
        writer.add_dataset_count(len(datasets))
    for number, dataset in enumerate(datasets):
        writer.add_dataset_name(number, PurePosixPath(dataset.name).name)
        writer.add_dataset_description(number, f"sha256 {dataset.sha256}")
        if dataset.hub is not None:
            writer.add_dataset_repo_url(number, f"{HUB}/datasets/{dataset.hub}")
            owner = dataset.hub.rpartition("/")[0]
            if owner:
                writer.add_dataset_organization(number, owner)
