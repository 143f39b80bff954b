"""YAML front matter of a card, as the Hub reads it: source, licence and library of a result."""

from app.domain.formats import ExportFormat
from workers.formats.cards.identity import Contents, Identity
from workers.formats.cards.source_card import SourceCard

TASK = "text-generation"
"""Every model here is a causal language model; the source's own card may be more exact."""
ADAPTER_LIBRARY = "bitwright"
"""Library of the adapter file, which comes with a loader of its own."""


def front_matter(
    identity: Identity, contents: Contents, export_format: ExportFormat | None, source: SourceCard, licence_copied: bool
) -> dict[str, object]:
    """Fields in the order in which they are written.

    export_format    None: the adapter file, which is no format
    licence_copied   whether the file that the source's card names as its licence lies beside this card
    """
    library = ADAPTER_LIBRARY if export_format is None else export_format.info.library
    matter: dict[str, object] = {"library_name": library}
    matter["pipeline_tag"] = source.pipeline_tag or TASK
    if identity.model_id is not None:
        matter |= {"base_model": identity.model_id, "base_model_relation": _relation(identity, contents, export_format)}
    if source.license:
        matter["license"] = _one_or_more(source.license)
        named = {"license_name": source.license_name, "license_link": source.link(identity.model_id, licence_copied)}
        matter |= {key: value for key, value in named.items() if value is not None}
    if source.language:
        matter["language"] = _one_or_more(source.language)
    trained_on = [dataset.hub for dataset in identity.datasets if dataset.hub is not None]
    if trained_on:
        matter["datasets"] = list(dict.fromkeys(trained_on))
    return matter | {"tags": tags(identity, export_format)}


def tags(identity: Identity, export_format: ExportFormat | None) -> list[str]:
    """Tags that the Hub filters by: this service, the format, and the kinds of trained adapters."""
    kinds = [one.adapter for one in identity.base_training] + ([identity.adapter] if identity.adapter else [])
    return list(dict.fromkeys(["bitwright", "adapter" if export_format is None else export_format.value, *kinds]))


def _relation(identity: Identity, contents: Contents, export_format: ExportFormat | None) -> str:
    """Relation to the base model in the Hub's tree. There, finetuned and quantized at once counts as quantized."""
    if contents is Contents.ADAPTER:
        return "adapter"
    trained = bool(identity.finetuned if contents is Contents.WHOLE else identity.finetuned_before)
    dense = export_format is not None and export_format.info.dense
    return "finetune" if trained and dense else "quantized"


def _one_or_more(values: tuple[str, ...]) -> str | list[str]:
    return values[0] if len(values) == 1 else list(values)
