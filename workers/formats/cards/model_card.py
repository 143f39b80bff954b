"""README.md of a checkpoint: contents, the lines that load it, training, and distance to the original.

A card speaks of the files beside it. If they are only a part of the measured result (a quantized base, an adapter), it
says so, and its lines combine both.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import yaml

from app.domain.format_rules import holds_base_alone
from app.domain.formats import ExportFormat
from app.domain.methods import METHODS, Form, Scheme
from app.domain.request.base_job import REPORT
from app.report_page.page import FILE as REPORT_PAGE
from app.report_page.page import report_page
from bitwright.report import LinearReport, Report, ScaleReport, SizeReport
from workers.formats.cards.front_matter import front_matter
from workers.formats.cards.goal import goal
from workers.formats.cards.identity import Contents, Identity, adapter_title, contents_of, title
from workers.formats.cards.loading import AdapterBase, Lines, Loading
from workers.formats.cards.sections import code, quality, source_name, training, tried
from workers.formats.cards.source_card import SourceCard, read_source_card
from workers.formats.format import Opening
from workers.formats.shards import write_json
from workers.formats.source_files import licence_file, names_code
from workers.formats.stored_linear import StoredLinear


def describe(
    folder: Path,
    report: Report,
    linears: Mapping[str, StoredLinear],
    opening: Opening,
    loading: Lines,
    outputs: Mapping[str, int] = MappingProxyType({}),
) -> list[Path]:
    """Adds report.json, report.html and README.md to a checkpoint that is complete otherwise; all files of the folder.

    outputs   out_features of the linears, as far as known
    """
    card = read_source_card(opening.source.folder)
    text = model_card(
        report,
        opening.name,
        linears,
        licence_file(folder),
        opening.formats,
        loading=loading,
        base=opening.base,
        source=card,
        licence_copied=card.license_link is not None and (folder / card.license_link).is_file(),
        stored_bytes=stored_bytes(folder, opening.name.info.weight_files),
        left_code=names_code(opening.source),
        outputs=outputs,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    contents = _contents(Identity.of(report), opening.name, linears, opening.formats)
    load = loading(_loading(report, opening.name, linears, opening.formats, opening.base, outputs))
    write_report(folder, report, title(Identity.of(report), contents), load)
    return sorted(file for file in folder.rglob("*") if file.is_file())


def write_report(folder: Path, report: Report, name: str, load: Sequence[str]) -> None:
    """Adds the report as JSON for programs, and as a page for people.

    name   the result in one line
    load   the card's paragraphs on loading
    """
    write_json(folder / REPORT, report.model_dump(mode="json"))
    (folder / REPORT_PAGE).write_text(report_page(report, title=name, load=load), encoding="utf-8")


def stored_bytes(folder: Path, patterns: Collection[str]) -> int:
    """Size of the files in a folder that match one of the patterns."""
    return sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern))


def model_card(
    report: Report,
    export_format: ExportFormat,
    linears: Mapping[str, StoredLinear],
    licence: str | None,
    formats: Collection[ExportFormat] = (),
    *,
    loading: Lines,
    base: Callable[[Mapping[str, Scheme]], AdapterBase] | None = None,
    source: SourceCard | None = None,
    licence_copied: bool = False,
    stored_bytes: int | None = None,
    left_code: bool = False,
    outputs: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """The card as Markdown with the Hub's front matter.

    linears          every quantized linear by module name
    licence          name of the licence file beside the card, if the source had one
    formats          all of the job's
    loading, base    the format's section "Load", and the base of the job's adapter, as in `Loading`
    source           fields of the source's own card
    licence_copied   whether the file that `source` names as its licence lies beside the card
    stored_bytes     bytes of the weight files beside the card
    left_code        whether the source's configuration names code, which was not copied
    outputs          out_features of the linears, as in `Loading`
    """
    identity, source = Identity.of(report), source or SourceCard()
    contents = _contents(identity, export_format, linears, formats)
    sections = [
        header(front_matter(identity, contents, export_format, source, licence_copied)),
        f"# {title(identity, contents)}{_bits(report, contents, export_format, linears, stored_bytes)}",
        _summary(report, contents, export_format, linears),
        "## Load",
        *loading(_loading(report, export_format, linears, formats, base, outputs)),
        *tried(report, export_format),
        *training(report),
        *quality(report, contents, export_format),
        *goal(report),
        "## Size",
        _size(report, contents, stored_bytes),
        "## Provenance",
        provenance(report, licence, source, left_code=left_code),
    ]
    return "\n\n".join(sections) + "\n"


def header(matter: Mapping[str, object]) -> str:
    """The front matter as it stands at the top."""
    return f"---\n{yaml.safe_dump(dict(matter), sort_keys=False, allow_unicode=True)}---"


def _contents(
    identity: Identity,
    export_format: ExportFormat,
    linears: Mapping[str, StoredLinear],
    formats: Collection[ExportFormat],
) -> Contents:
    if export_format.info.is_adapter:
        return Contents.ADAPTER
    return contents_of(identity, linears, holds_base_alone(export_format, formats))


def _loading(
    report: Report,
    export_format: ExportFormat,
    linears: Mapping[str, StoredLinear],
    formats: Collection[ExportFormat],
    base: Callable[[Mapping[str, Scheme]], AdapterBase] | None,
    outputs: Mapping[str, int],
) -> Loading:
    """Facts from which the format's section "Load" is made."""
    identity = Identity.of(report)
    contents = _contents(identity, export_format, linears, formats)
    in_adapter_file = contents is Contents.BASE and not holds_base_alone(export_format, formats)
    apart = adapter_title(identity.adapter) if in_adapter_file else None
    return Loading(linears, formats, apart, identity.model_id, base, _embeddings(report, linears), outputs)


def _embeddings(report: Report, linears: Mapping[str, StoredLinear]) -> str | None:
    """Name of the quantized embeddings among the linears of this folder."""
    return report.embeddings.name if report.embeddings is not None and report.embeddings.name in linears else None


def _bits(
    report: Report,
    contents: Contents,
    export_format: ExportFormat,
    linears: Mapping[str, StoredLinear],
    stored: int | None,
) -> str:
    """Size of the weights in this folder, and their width over the whole model, for the title."""
    if contents is Contents.ADAPTER:
        return ""
    if export_format.info.dense:
        dtypes = {linear.dtype for linear in linears.values()} or {report.model.dtype}
        return f", merged into {' and '.join(sorted(dtypes))}"
    if stored is None:
        return f", {report.size.bits_per_weight_model:.2f} bits per weight of the whole model"
    bits = stored * 8 / max(1, report.model.parameters)
    return f", {stored / 1e6:.4g} MB, {bits:.2f} bits per weight of the whole model"


def _summary(
    report: Report, contents: Contents, export_format: ExportFormat, linears: Mapping[str, StoredLinear]
) -> str:
    info = METHODS[report.method]
    paper = f" ([arXiv {info.paper}](https://arxiv.org/abs/{info.paper}))" if info.paper else ""
    first = f"Quantized by Bitwright {report.version} with {info.title}{paper}, format `{export_format.value}`."
    lines = [first + _finetuned(report, contents), ""]
    lines += ["| linears | bits | group size | zero point | low-rank factors |", "|---|---|---|---|---|"]
    for linear, count in Counter(linears.values()).most_common():
        group = "per channel" if linear.group_size == -1 else str(linear.group_size)
        low_rank = linear.low_rank
        factors = "none" if low_rank is None else f"rank {low_rank.rank}, alpha {low_rank.alpha:g}"
        lines.append(f"| {count} | {_width(linear)} | {group} | {_zero_point(linear)} | {factors} |")
    return "\n".join([*lines, *_outer(report)])


def _outer(report: Report) -> list[str]:
    """A paragraph on embeddings and head, where they are among the linears."""
    said = []
    if report.embeddings is not None:
        said.append(f"the embeddings ({_in_words(report.embeddings)})")
    if report.head is not None:
        said.append(f"the output head ({_in_words(report.head)})")
    return ["", f"Among them {'is' if len(said) == 1 else 'are'} {' and '.join(said)}."] if said else []


def _in_words(linear: LinearReport) -> str:
    return linear.scheme or f"{linear.bits} bits"


def _finetuned(report: Report, contents: Contents) -> str:
    """Sentence on the adapter that was trained after the quantization, and where it is."""
    if report.finetuning is None or report.adapter is None:
        return ""
    trained = f"{adapter_title(report.adapter.kind)} on {source_name(report.finetuning.text.source)}"
    if contents is Contents.WHOLE:
        return f" Then finetuned: {trained}, which is in these weights."
    if contents is Contents.BASE:
        return f" Then finetuned: {trained}, which is not in this folder."
    return f" Then finetuned: {trained}, which is this adapter."


def _width(linear: StoredLinear) -> str:
    return str(linear.bits) if linear.scheme_name is None else f"{linear.bits} ({linear.scheme_name})"


def _zero_point(linear: StoredLinear) -> str:
    if linear.form is Form.FLOAT:
        return "none: codes are floating-point numbers"
    if linear.form is Form.CODEBOOK:
        return "none: codes index a codebook"
    if linear.form is Form.BLOCKS:
        return "fixed" if linear.symmetric else "an offset of each group"
    return "an offset of each group" if linear.offset else "fixed" if linear.symmetric else "of each group"


def _size(report: Report, contents: Contents, stored: int | None) -> str:
    size, count = report.size, max(1, report.model.parameters)
    here = ""
    if stored is not None:
        whole = "" if contents is Contents.ADAPTER else _whole_bits(stored, count)
        here = f"The weight files in this folder take {stored / 1e6:.1f} MB{whole}. "
    together = size.parts is None or size.parts.adapters > 0
    whose = (
        "" if contents is Contents.WHOLE else "Base and low-rank factors together: " if together else "The base alone: "
    )
    return (
        f"{here}{whose}{size.bytes_original / 1e6:.1f} MB of tensors before, {size.bytes_quantized / 1e6:.1f} MB "
        f"after, counted as the native format stores them: {size.bits_per_weight_model:.3f} bits for each weight of "
        f"the model, and {size.bits_per_weight:.3f} for each quantized one{_parts(size)}."
    )


def _whole_bits(stored: int, count: int) -> str:
    """Bits of a weight of the whole model in files of so many bytes, as the middle of a sentence."""
    return f": {stored * 8 / count:.2f} bits for each weight of the model, embeddings and head included"


def _parts(size: SizeReport) -> str:
    """Bits per weight by component, as far as the report has them."""
    if size.parts is None:
        return ", scales included"
    named = {name: bits for name, bits in size.parts.model_dump().items() if bits}
    return " (" + ", ".join(f"{name} {bits:.3f}" for name, bits in named.items()) + ")"


def provenance(report: Report, licence: str | None, source: SourceCard, *, left_code: bool = False) -> str:
    """Sources of the result, as a list."""
    revision = f" at revision {code(report.model.revision)}" if report.model.revision else ""
    lines = [
        f"- Source: {source_name(report.model.source)}{revision}, {report.model.architecture}, {report.model.dtype}"
    ]
    if left_code:
        lines.append("- The source's configuration names code of its own, which Bitwright neither runs nor copies")
    if report.scheme is not None:
        lines.append(f"- Scheme: {report.scheme}")
    if report.calibration is not None:
        text = report.calibration
        size = f"{text.num_samples} sequences of {text.sequence_length} tokens"
        lines.append(f"- Calibration: {size} of {source_name(text.source)} (sha256 `{text.sha256[:16]}`)")
    if report.exported_from is not None:
        lines.append(f"- Exported from the result of job `{report.exported_from}`, whose codes and figures these are")
    if report.base_job is not None:
        lines.append(f"- Quantized by job `{report.base_job.job_id}`, whose codes these are; this job finetuned")
    if report.scales is not None and report.scales.kept:
        lines.append(f"- {_tuned_end_to_end(report.scales)}")
    lines.append(f"- Seed {report.seed}; everything measured is in `{REPORT}`, and in `{REPORT_PAGE}` to look at")
    named = f" ({', '.join(source.license_name or name for name in source.license)})" if source.license else ""
    lines.append(f"- Licence: the source's{named}{f', see `{licence}`' if licence else ''}")
    lines += [f"- Warning: {' '.join(warning.split())}" for warning in report.warnings]
    return "\n".join(lines)


def _tuned_end_to_end(scales: ScaleReport) -> str:
    """The parts of the model that were tuned together, and those that were not."""
    norms = f"{scales.norms} norms"
    if scales.codes is not None:
        along = f", {norms} and codes" if scales.norms else " and codes"
        written = f", on {scales.written:,} sequences that the model wrote besides" if scales.written else ""
        return f"Scales{along} tuned end to end in {scales.steps} steps, {scales.codes:,} codes changed{written}"
    along = f" and {norms}" if scales.norms else ""
    return f"Scales{along} tuned end to end in {scales.steps} steps, codes fixed"
