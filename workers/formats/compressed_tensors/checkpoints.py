"""Definition of the format of compressed-tensors: its tensors, configuration and card in one place."""

from collections.abc import Mapping

from app.domain.formats import ExportFormat
from app.domain.fused_shapes import shape_warning
from app.domain.methods import Scheme
from workers.formats.cards.vllm import vllm_rows
from workers.formats.checkpoint import Layout, checkpoint_format
from workers.formats.compressed_tensors.configuration import config, misreads_experts, needs_loader, with_kv_cache
from workers.formats.compressed_tensors.embeddings import with_embeddings
from workers.formats.compressed_tensors.loading import adapter_base, loading, package_warnings
from workers.formats.compressed_tensors.refusals import in_common
from workers.formats.compressed_tensors.tensors import compress, decompress

MISREAD = (
    "compressed-tensors: transformers 5.23 reads experts of this scheme wrongly, and not always with an error; load "
    "the checkpoint with the loader in it, or in vLLM"
)


def warnings(schemes: Mapping[str, Scheme], outputs: Mapping[str, int]) -> dict[str, str]:
    """Code and message of requirements for loading, and of linears that a runtime refuses."""
    name = ExportFormat.COMPRESSED_TENSORS
    shapes = shape_warning(name.value, schemes, outputs, vllm_rows(name))
    found = package_warnings(schemes.values())
    if shapes:
        found["runtime_refuses_linears"] = " ".join(shapes)
    if misreads_experts(schemes):
        found["transformers_misreads_experts"] = MISREAD
    return found


FORMAT = checkpoint_format(
    Layout(
        compress,
        config=lambda targets, ignored: {"quantization_config": config(targets, ignored)},
        embeddings=with_embeddings,
        needs_loader=needs_loader,
        warnings=warnings,
        in_common=in_common,
        kv_cache=lambda attention, scales: scales.tensors(attention),
        kv_config=with_kv_cache,
    ),
    loading,
    adapter_base,
    decompress,
)
