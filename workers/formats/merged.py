"""The merged format: an ordinary checkpoint with the dequantized weights.

    name.weight     the model's dtype (out, in)     `LinearResult.dequantize`, low-rank correction included

It is as large as the original and loads wherever the original does. If the adapter ships as a `peft` checkpoint of
the same job, the correction is left out, and this is the base that the adapter belongs to: peft adds
(alpha / rank) * B @ A to exactly these weights.
"""

from collections.abc import Mapping

from torch import Tensor

from app.domain.formats import ExportFormat
from app.domain.methods import Scheme
from workers.formats.cards.loading import BASE, FOLDER, LOAD_PLAIN, LOAD_VLLM, PLAIN, AdapterBase, Loading, model_lines
from workers.formats.cards.vllm import vllm_rows
from workers.formats.checkpoint import Layout, checkpoint_format
from workers.numerics.quantized import LinearResult


def compress(name: str, result: LinearResult) -> dict[str, Tensor]:
    """The stored tensor of the linear `name`, by full name."""
    return {f"{name}.weight": result.dequantize()}


def loading(about: Loading) -> list[str]:
    """The card's section "Load"."""
    known = ", " + vllm_rows(ExportFormat.MERGED)[0].known()
    lines = [LOAD_PLAIN.format(folder=FOLDER), LOAD_VLLM.format(folder=FOLDER, known=known)]
    return model_lines(about, lines, "it needs nothing else", PLAIN.format(folder=FOLDER))


def adapter_base(_schemes: Mapping[str, Scheme]) -> AdapterBase:
    """The checkpoint as the base of the job's adapter."""
    return AdapterBase("The base is the `merged` checkpoint of the same job:", PLAIN.format(folder=BASE), served=True)


FORMAT = checkpoint_format(Layout(compress, joins=True), loading, adapter_base)
