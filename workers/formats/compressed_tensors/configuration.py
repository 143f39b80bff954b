"""The `quantization_config` of a checkpoint in the format of compressed-tensors, and how transformers takes it.

Keys are those that compressed-tensors 0.17 knows, which vLLM 0.33 still reads with: it refuses all others. A group says
the storage of its linears' weights and the rounding of their inputs at inference; where groups differ in their
`format`, the whole is `mixed-precision`. Read in compressed-tensors 0.17 and 0.20 (`quantization/quant_args.py`,
`quantization/quant_scheme.py`).
"""

from collections.abc import Collection, Iterable, Mapping

from app.domain.fused_shapes import is_expert
from app.domain.inputs.architectures import HEAD
from app.domain.methods import PER_CHANNEL, SCHEMES, Scheme, SchemeName
from app.domain.methods.named_schemes import WHOLE, Activations, Element, NamedScheme, ScaleType
from workers.formats.compressed_tensors.tensors import format_of_scheme

MIXED = "mixed-precision"
SCALE_DTYPES = {ScaleType.E4M3: "torch.float8_e4m3fn", ScaleType.E8M0: "torch.uint8"}
READ_OF_EXPERTS = frozenset(
    {SchemeName.FP8, SchemeName.FP8_TENSOR, SchemeName.FP8A16, SchemeName.MXFP4, SchemeName.MXFP4A16}
)
"""Schemes by name in which transformers 5.23 reads experts."""
KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def config(schemes: Mapping[str, Scheme], ignored: Collection[str]) -> dict[str, object]:
    """The `quantization_config` of config.json.

    schemes   every quantized linear by module name
    ignored   module names of all other linears, the head included

    One scheme for all: its group targets the class `Linear`, less `ignored`, and a quantized head by its name, since
    vLLM's head is of another class. Several: one group per scheme, with the concrete names of its linears, because a
    class as target of two groups lets the first one win everywhere. Experts' group comes first: transformers reads all
    experts by that.
    """
    # compressed-tensors 0.20 expects packed zero points unpacked when transformers 5.23 loads weights packed, and
    # refuses the checkpoint; unpacking while loading works. transformers has deprecated `run_compressed`, which is all
    # that its older releases know; `dequantize` takes its place.
    unpacked = {"run_compressed": False, "dequantize": True} if unpacks_on_load(schemes.values()) else {}
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in sorted(schemes.items(), key=lambda item: not is_expert(item[0])):
        groups.setdefault(scheme, []).append(name)
    mixed, everywhere = len(groups) > 1, ["Linear", *(name for name in schemes if name == HEAD)]
    formats = list(dict.fromkeys(format_of_scheme(scheme) for scheme in groups))
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else MIXED,
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


def with_kv_cache(fields: Mapping[str, object]) -> dict[str, object]:
    """The `quantization_config` of a checkpoint with scales of an FP8 key-value cache, of the one in these fields."""
    found = fields["quantization_config"]
    return {"quantization_config": {**(found if isinstance(found, dict) else {}), "kv_cache_scheme": dict(KV_CACHE)}}


def unpacks_on_load(schemes: Iterable[Scheme]) -> bool:
    """True if config.json asks transformers to unpack the weights while loading: one scheme, which fails packed.

    Weights alone with small scales fail packed in a model of another dtype than bf16, which is what decoders give.
    """
    distinct = set(schemes)
    return len(distinct) == 1 and not any(_loads_packed(s) and not _weights_of_bf16(s) for s in distinct)


def needs_loader(schemes: Mapping[str, Scheme]) -> bool:
    """True if transformers 5.23 cannot load the checkpoint by itself: several schemes, one of which fails packed.

    Unpacked while loading, every linear gets the first group's scheme. compressed-tensors decompresses each tensor
    correctly; the one-file loader does the same for the whole model. So it is where experts are misread.
    """
    distinct = set(schemes.values())
    packed = len(distinct) > 1 and not all(_loads_packed(scheme) for scheme in distinct)
    return packed or misreads_experts(schemes)


def misreads_experts(schemes: Mapping[str, Scheme]) -> bool:
    """True if transformers 5.23 gives experts other weights than were written, with or without an error.

    It makes one tensor of them while loading, all by one group: of class names or plain names the first. Of NVFP4 it
    leaves the global scale out; zero points, int8, blocks and MXFP8 it does not know
    (`integrations/compressed_tensors.py`).
    """
    experts = _of_experts(schemes)
    return len(experts) > 1 or not all(_experts_load(scheme) for scheme in experts)


def _of_experts(schemes: Mapping[str, Scheme]) -> set[Scheme]:
    return {scheme for name, scheme in schemes.items() if is_expert(name)}


def _experts_load(scheme: Scheme) -> bool:
    return scheme.symmetric if scheme.name is None else scheme.name in READ_OF_EXPERTS


def _loads_packed(scheme: Scheme) -> bool:
    """False if transformers 5.23 with compressed-tensors 0.20 fails on packed weights of the scheme.

    On zero points, while loading; with inputs rounded in groups, in the first forward pass of a linear whose inputs are
    no whole groups, which a scheme of blocks may have.
    """
    whole = scheme.row is None or scheme.row.whole_groups
    return scheme.symmetric and whole


def decodes_to_bf16(scheme: Scheme) -> bool:
    """True if compressed-tensors 0.20 decodes the scheme to bf16, whatever the model's dtype."""
    return scheme.row is not None and scheme.row.scale is not ScaleType.FLOAT


def _weights_of_bf16(scheme: Scheme) -> bool:
    return decodes_to_bf16(scheme) and not rounds_inputs([scheme])


def rounds_inputs(schemes: Iterable[Scheme]) -> bool:
    """True if one of the schemes has activations of its own, which transformers rounds as a server does."""
    return any(scheme.row is not None and scheme.row.activations is not None for scheme in schemes)


def _group(scheme: Scheme, targets: list[str]) -> dict[str, object]:
    name = scheme.name
    return {
        "targets": targets,
        "weights": _integers(scheme) if name is None else _weights(SCHEMES[name]),
        "input_activations": None if name is None else _activations(name),
        "output_activations": None,
        "format": format_of_scheme(scheme),
    }


def _integers(scheme: Scheme) -> dict[str, object]:
    per_channel = scheme.group_size == PER_CHANNEL
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else scheme.group_size,
        "dynamic": False,
    }


def _weights(row: NamedScheme) -> dict[str, object]:
    args = _args(row.element, row.bits, dynamic=False)
    if row.rows > 1:
        return args | {"strategy": "block", "block_structure": [row.rows, row.group_size]}
    if row.group_size == WHOLE:
        return args | {"strategy": "tensor" if row.rows == WHOLE else "channel"}
    return args | _grouped(row.group_size, row.scale)


def _activations(name: SchemeName) -> dict[str, object] | None:
    inputs: Activations | None = SCHEMES[name].activations
    if inputs is None:
        return None
    if inputs.columns == WHOLE:
        strategy = "tensor" if inputs.every_token else "token"
        return _args(inputs.element, inputs.bits, dynamic=not inputs.calibrated) | {"strategy": strategy}
    # `local`: the groups' scales are of the moment, the tensor's was calibrated.
    dynamic = "local" if inputs.calibrated else True
    return _args(inputs.element, inputs.bits, dynamic=dynamic) | _grouped(inputs.columns, inputs.scale)


def _grouped(size: int, scale: ScaleType) -> dict[str, object]:
    strategy = "tensor_group" if scale is ScaleType.E4M3 else "group"
    dtype = {"scale_dtype": SCALE_DTYPES[scale]} if scale in SCALE_DTYPES else {}
    return {"strategy": strategy, "group_size": size, **dtype}


def _args(element: Element, bits: int, *, dynamic: bool | str) -> dict[str, object]:
    kind = "int" if element is Element.INTEGER else "float"
    return {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": dynamic}
