"""Registry of formats, each from its own file; opens a job's writers, and checks a model before anything is computed.

writers = open_writers(folder, formats, source)
writer.add_linear("model.layers.0.mlp.up_proj", result)      # of each writer, any number of times
writer.add_tensor("model.layers.0.input_layernorm.weight", tensor)
writer.finish()
writer.describe(report)
"""

from collections.abc import Collection, Mapping
from functools import cache, partial
from importlib import import_module
from pathlib import Path

from app.domain.format_rules import model_problems, stored_formats
from app.domain.formats import EmbeddingRule, ExportFormat
from app.domain.methods import Scheme
from bitwright.errors import FormatCannotHold, InternalError
from workers.formats.cards.identity import Identity
from workers.formats.cards.loading import AdapterBase
from workers.formats.checkpoint import CheckpointWriter
from workers.formats.format import Format, Opening, PartWriter, Writer
from workers.formats.shards import HELD_BYTES, SHARD_BYTES
from workers.formats.source_files import SourceCheckpoint
from workers.numerics.quantized import AffineWeight


@cache
def format_of(name: ExportFormat) -> Format:
    """The format of that name: `FORMAT` of the module or package of that name, with `-` as `_`.

    Raises:
        InternalError: the module defines none.
    """
    module = f"workers.formats.{name.value.replace('-', '_')}"
    definition = vars(import_module(module)).get("FORMAT")
    if not isinstance(definition, Format):
        raise InternalError(f"{module} defines no FORMAT")
    return definition


def open_writers(
    folder: Path,
    formats: Collection[ExportFormat],
    source: SourceCheckpoint,
    identity: Identity | None = None,
    *,
    embeddings: str | None = None,
    untied: SourceCheckpoint | None = None,
) -> Mapping[ExportFormat, Writer]:
    """A writer for each format of a job, in a folder of its name under `folder`.

    identity     the job's result, for files that name it before there is a report
    embeddings   as in `Opening`
    untied       the source with its head besides, for formats that store a tied one by itself; None: as it is
    """
    return {
        name: open_writer(
            folder / name.value,
            name,
            source_for(name, source, untied),
            formats,
            identity=identity,
            embeddings=embeddings,
        )
        for name in formats
    }


def source_for(name: ExportFormat, source: SourceCheckpoint, untied: SourceCheckpoint | None) -> SourceCheckpoint:
    """The source as a format sees it, of which one with its head besides may be known."""
    return source if untied is None or name.info.embeddings is not EmbeddingRule.UNIFORM else untied


def open_writer(
    folder: Path,
    name: ExportFormat,
    source: SourceCheckpoint,
    formats: Collection[ExportFormat] = (),
    *,
    identity: Identity | None = None,
    shard_bytes: int = SHARD_BYTES,
    held_bytes: int = HELD_BYTES,
    embeddings: str | None = None,
) -> Writer:
    """The writer of one checkpoint; `formats` are all of its job's."""
    base = partial(adapter_base, formats)
    opening = Opening(name, source, formats, base, identity, shard_bytes, held_bytes, embeddings=embeddings)
    return format_of(name).open(folder, opening)


def open_part_writers(
    folder: Path,
    formats: Collection[ExportFormat],
    source: SourceCheckpoint,
    identity: Identity,
    parts: Path,
    held_bytes: int = HELD_BYTES,
    *,
    embeddings: str | None = None,
    untied: SourceCheckpoint | None = None,
) -> Mapping[ExportFormat, PartWriter]:
    """The same for a checkpoint that is made part by part; its shards lie in a folder of the format's name in `parts`.

    embeddings, untied   as in `open_writers`

    Raises:
        FormatCannotHold: a format needs the whole model at once.
    """
    base = partial(adapter_base, formats)
    writers: dict[ExportFormat, PartWriter] = {}
    for name in formats:
        opening = Opening(
            name,
            source_for(name, source, untied),
            formats,
            base,
            identity,
            held_bytes=held_bytes,
            parts=parts / name.value,
            embeddings=embeddings,
        )
        writer = format_of(name).open(folder / name.value, opening)
        if not isinstance(writer, CheckpointWriter):
            hint = "ask for native, merged or another packed format"
            raise FormatCannotHold(f"{name.value} is written from a model", field="formats", value=name, hint=hint)
        writers[name] = writer
    return writers


def base_format(formats: Collection[ExportFormat]) -> ExportFormat:
    """The format whose checkpoint is the base of a job's adapter: a dense one, else a packed one, else one always kept.

    Raises:
        InternalError: no checkpoint of the job can be one.
    """
    for name in sorted(stored_formats(formats), key=lambda name: (name.info.always_kept, not name.info.dense)):
        if format_of(name).adapter_base is not None:
            return name
    raise InternalError("no format of the job can be an adapter's base")


def adapter_base(formats: Collection[ExportFormat], schemes: Mapping[str, Scheme]) -> AdapterBase:
    """The checkpoint beside which a job's adapter is loaded; `schemes` of all quantized linears, by module name."""
    name = base_format(formats)
    base = format_of(name).adapter_base
    if base is None:
        raise InternalError(f"{name.value} is no adapter's base")
    return base(schemes)


def held(name: ExportFormat, module: str, weight: AffineWeight) -> AffineWeight:
    """The weight of a linear with the numbers that the format stores of it."""
    stored = format_of(name).held
    return weight if stored is None else stored(module, weight)


def check_model(
    formats: tuple[ExportFormat, ...], source: SourceCheckpoint, model_type: str, shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Check that the formats can hold a model, before anything is computed.

    shapes   (out, in) of every linear that is to be quantized, by full name

    Raises:
        FormatCannotHold: one of them cannot.
    """
    inputs, outputs = ({name: shape[side] for name, shape in shapes.items()} for side in (1, 0))
    for problem in model_problems(formats, model_type, inputs, source.config, outputs):
        hint = "leave the format out, or change what its detail names; GET /v1/formats lists what each one holds"
        raise FormatCannotHold(problem.detail, field=problem.field, value=problem.value, hint=hint)
    for name in formats:
        check = format_of(name).check_source
        if check is not None:
            check(source)
