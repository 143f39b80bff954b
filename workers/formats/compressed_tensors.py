"""The `pack-quantized` format of compressed-tensors, which transformers and vLLM load.

For a linear `name` of shape (out, in), with b bits and groups of g inputs:

    name.weight_packed      int32 (out, ceil(in * b / 32))       unsigned codes, dense along the inputs
    name.weight_scale       model dtype (out, in / g)            of either sign
    name.weight_zero_point  int32 (ceil(out * b / 32), in / g)   dense along the outputs; asymmetric only
    name.weight_shape       int64 (2)                            (out, in)

compressed-tensors defines signed int8 codes and stores them plus 2^(b-1), which equals our unsigned codes; the same
holds for its zero points. It multiplies in the scale's dtype. Since codes and zero points are exact in bf16 and fp16,
that is one rounding of the exact product, as in `AffineWeight.dequantize`, if and only if the scale has the weight's
dtype.
"""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from app.domain.formats import DENSE_WORDS, ExportFormat
from app.domain.inputs.architectures import HEAD
from app.domain.methods import PER_CHANNEL, Scheme
from bitwright.errors import CorruptCheckpoint, FormatCannotHold
from workers.formats.cards.loading import BASE, FOLDER, LOAD_VLLM, AdapterBase, Loading, model_lines
from workers.formats.cards.vllm import vllm_knowledge
from workers.formats.checkpoint import Layout, checkpoint_format
from workers.formats.native import LOAD_BITWRIGHT
from workers.formats.quantized_embeddings import with_embeddings
from workers.formats.stored_linear import StoredLinear
from workers.numerics.packing import pack_words, unpack_words
from workers.numerics.quantized import AffineWeight, LinearResult

PACKING = "pack-quantized"

LOAD_PACKED = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer    # and: pip install "{package}"

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""

ABOUT_MIXED = """\
`from_pretrained` of transformers 5.23 does not load mixed widths with zero points; the loader makes an ordinary
floating-point model from the same tensors."""

ABOUT_UNPACKING = """\
Linears of this checkpoint differ in width or group, so do not load it with `CompressedTensorsConfig(dequantize=True)`
or its older name `run_compressed=False`: transformers 5.23 then reads every linear by the first group's scheme, with
wrong weights and without an error where the shapes happen to fit."""

UNPACKED = """\
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

model = AutoModelForCausalLM.from_pretrained(
    "{folder}", quantization_config=CompressedTensorsConfig(dequantize=True)
)"""

UNPACKED_MIXED = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}")
model.hf_quantizer.compressor.decompress_model(model)"""

UNPACKED_BY_LOADER = """\
from load_bitwright import load

model = load("{folder}")"""


def compress(name: str, result: LinearResult) -> dict[str, Tensor]:
    """The stored tensors of the linear `name`, by full name.

    Raises:
        FormatCannotHold: another form than an affine weight alone, or a scale that it would have to round.
    """
    weight = _held(name, result)
    bits = weight.scheme.bits
    tensors = {
        f"{name}.weight_packed": pack_words(weight.codes, bits),
        f"{name}.weight_scale": weight.scale.contiguous(),
        f"{name}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        tensors[f"{name}.weight_zero_point"] = pack_words(weight.zero_point.T.contiguous(), bits).T.contiguous()
    return tensors


def decompress(name: str, tensors: Mapping[str, Tensor], stored: StoredLinear) -> LinearResult:
    """The exact inverse of `compress`.

    Raises:
        CorruptCheckpoint: a tensor is missing, or their shapes do not fit together.
    """
    scheme = stored.scheme
    try:
        out_features, in_features = (int(n) for n in tensors[f"{name}.weight_shape"])
        scale = tensors[f"{name}.weight_scale"]
        packed = tensors[f"{name}.weight_packed"]
        zero = None if scheme.symmetric else tensors[f"{name}.weight_zero_point"]
    except KeyError as missing:
        raise CorruptCheckpoint(f"tensor {missing} is missing", field=name) from missing
    fits = packed.shape == (out_features, _words(in_features, scheme.bits)) and scale.shape[0] == out_features
    if not fits or (zero is not None and zero.shape != (_words(out_features, scheme.bits), scale.shape[1])):
        raise CorruptCheckpoint(f"tensors of {name} do not fit its shape ({out_features}, {in_features})", field=name)
    codes = unpack_words(packed, scheme.bits, in_features)
    if zero is not None:
        zero = unpack_words(zero.T.contiguous(), scheme.bits, out_features).T.contiguous()
    return LinearResult(AffineWeight(codes, scale, zero, scheme, stored.torch_dtype))


def config(schemes: Mapping[str, Scheme], ignored: Collection[str]) -> dict[str, object]:
    """The `quantization_config` of config.json.

    schemes   every quantized linear by module name
    ignored   module names of all other linears, the head included

    One scheme for all: its group targets the class `Linear`, less `ignored`, and a quantized head by its name, since
    vLLM's head is of another class. Several: one group per scheme, with the concrete names of its linears, because a
    class as target of two groups lets the first one win everywhere.
    """
    # compressed-tensors 0.20 expects packed zero points unpacked when transformers 5.23 loads weights packed, and
    # refuses the checkpoint; unpacking while loading works. transformers has deprecated `run_compressed`, which is all
    # that its older releases know; `dequantize` takes its place.
    unpacked = {"run_compressed": False, "dequantize": True} if unpacks_on_load(schemes.values()) else {}
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    mixed, everywhere = len(groups) > 1, ["Linear", *(name for name in schemes if name == HEAD)]
    return {
        "quant_method": "compressed-tensors",
        "format": PACKING,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted(ignored),
        "config_groups": {
            f"group_{index}": _group(scheme, names if mixed else everywhere)
            for index, (scheme, names) in enumerate(groups.items())
        },
        **unpacked,
    }


def unpacks_on_load(schemes: Iterable[Scheme]) -> bool:
    """True if config.json asks transformers to unpack the weights while loading: one scheme, asymmetric."""
    distinct = set(schemes)
    return len(distinct) == 1 and not any(scheme.symmetric for scheme in distinct)


def needs_loader(schemes: Iterable[Scheme]) -> bool:
    """True if transformers 5.23 cannot load the checkpoint by itself: several schemes, one of them asymmetric.

    Loaded packed, it fails on the zero points; unpacked while loading, every linear gets the first group's scheme.
    compressed-tensors decompresses each tensor correctly; the one-file loader does the same for the whole model.
    """
    distinct = set(schemes)
    return len(distinct) > 1 and not all(scheme.symmetric for scheme in distinct)


def loading(about: Loading) -> list[str]:
    """The card's section "Load"."""
    schemes = about.schemes
    known, refusal = vllm_knowledge(ExportFormat.COMPRESSED_TENSORS, schemes, about.embeddings)
    vllm = f"vLLM does not load it, {refusal}." if refusal else LOAD_VLLM.format(folder=FOLDER, known=known)
    lines = [_load_packed(schemes), vllm]
    return model_lines(about, lines, "load the weights unpacked", _unpacked(schemes).format(folder=FOLDER))


def adapter_base(schemes: Mapping[str, Scheme]) -> AdapterBase:
    """The checkpoint, unpacked, as the base of the job's adapter."""
    package = "" if needs_loader(schemes.values()) else f" (and `pip install '{package_needed(schemes.values())}'`)"
    where = f"The base is the `compressed-tensors` checkpoint of the same job, unpacked{package}:"
    _, refusal = vllm_knowledge(ExportFormat.COMPRESSED_TENSORS, schemes)
    return AdapterBase(where, _unpacked(schemes).format(folder=BASE), served=refusal is None)


def package_needed(schemes: Iterable[Scheme]) -> str:
    """The requirement of the package compressed-tensors, as pip reads it, that these linears need."""
    newer = any(DENSE_WORDS.holds(scheme) for scheme in schemes)
    return f"compressed-tensors>={DENSE_WORDS.version.removesuffix('.0')}" if newer else "compressed-tensors"


def package_warnings(schemes: Iterable[Scheme]) -> dict[str, str]:
    """Code and message for widths whose codes straddle words: loading them needs a newer package."""
    widths = sorted({scheme.bits for scheme in schemes if DENSE_WORDS.holds(scheme)})
    if not widths:
        return {}
    message = (
        f"compressed-tensors: for {', '.join(map(str, widths))} bits transformers needs the package compressed-tensors "
        f"{DENSE_WORDS.version} or newer; earlier releases pack them with gaps, and refuse the checkpoint"
    )
    return {"needs_newer_package": message}


def _load_packed(schemes: Mapping[str, Scheme]) -> str:
    if needs_loader(schemes.values()):
        return f"{LOAD_BITWRIGHT}\n\n{ABOUT_MIXED}\n\n{ABOUT_UNPACKING}".format(folder=FOLDER)
    about = f"\n\n{ABOUT_UNPACKING}" if len(set(schemes.values())) > 1 else ""
    return LOAD_PACKED.format(folder=FOLDER, package=package_needed(schemes.values())) + about


def _unpacked(schemes: Mapping[str, Scheme]) -> str:
    """The lines that turn packed linears into plain ones.

    transformers 5.23 unpacks every linear by the first group's scheme when it unpacks while loading; unpacked
    afterwards by compressed-tensors, each has its own.
    """
    if needs_loader(schemes.values()):
        return UNPACKED_BY_LOADER
    return UNPACKED_MIXED if len(set(schemes.values())) > 1 else UNPACKED


def _group(scheme: Scheme, targets: list[str]) -> dict[str, object]:
    per_channel = scheme.group_size == PER_CHANNEL
    return {
        "targets": targets,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if per_channel else "group",
            "group_size": None if per_channel else scheme.group_size,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": PACKING,
    }


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _held(name: str, result: LinearResult) -> AffineWeight:
    """The weight, if it is one that the format holds."""
    weight = result.weight
    if not isinstance(weight, AffineWeight) or weight.offset is not None or result.low_rank is not None:
        raise FormatCannotHold(
            "compressed-tensors holds affine weights with whole zero points, without low-rank factors",
            field=name,
            hint='ask for formats: ["merged"], or add "peft" for the low-rank factors',
        )
    if weight.scale.dtype != weight.dtype:
        raise FormatCannotHold(
            f"compressed-tensors stores scales as {weight.dtype}; these are {weight.scale.dtype}, and rounding them "
            "would change the weights",
            field=name,
            value=str(weight.scale.dtype),
            hint="quantize again with this format among the job's formats",
        )
    return weight


FORMAT = checkpoint_format(
    Layout(
        compress,
        config=lambda targets, ignored: {"quantization_config": config(targets, ignored)},
        embeddings=with_embeddings,
        needs_loader=needs_loader,
        warnings=package_warnings,
    ),
    loading,
    adapter_base,
    decompress,
)
