"""The catalogue of quantization methods with their presets, and of recipes.

A spec is a method's parameters and nothing else. `METHODS` lists every method with its paper; `RECIPES` are
shorthand names that stand for parts of a request. The specs, and what they are made of, are found here too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated

from pydantic import Field, ValidationError

from app.domain.methods.any_method import WeightSpec
from app.domain.methods.block_presets import MIXES
from app.domain.methods.clipping_specs import OmniQuantSpec
from app.domain.methods.codebook_specs import NormalFloatSpec
from app.domain.methods.low_rank_specs import ApiQSpec, LoftQSpec, LQLoRASpec
from app.domain.methods.named_schemes import BLOCK_SCHEMES, COARSE, COARSE_BITS
from app.domain.methods.schemes import MAX_BITS, MIN_BITS
from app.domain.methods.weight_specs import AWQSpec, GPTQSpec, RTNSpec, SignRoundSpec
from bitwright.formats import Form

QuantizationSpec = Annotated[
    RTNSpec | NormalFloatSpec | GPTQSpec | AWQSpec | OmniQuantSpec | SignRoundSpec | LoftQSpec | ApiQSpec | LQLoRASpec,
    Field(discriminator="method"),
]


@dataclass(frozen=True)
class Preset:
    """Values that a preset fills in where the request is silent: fields of the method's spec, and the calibration's
    size.

    coarse   fields that have another value where a scheme of the request is coarse: integers up to 3 bits, MXFP4, one
             of llama.cpp's up to 4 bits, or a mix of these
    fp4      the same where one is MXFP4, whose codes go slower
    further, written   `further_samples` and `written_samples` of the calibration where a scheme is coarse
    """

    spec: Mapping[str, int]
    num_samples: int
    sequence_length: int
    coarse: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    further: int = 0
    written: int = 0
    fp4: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def fields(self, schemes: Iterable[object]) -> dict[str, int]:
        """The spec's for the bits and schemes that a request names, whatever stands there."""
        named = tuple(schemes)
        coarse, fp4 = self.coarse if is_coarse(named) else {}, self.fp4 if has_fp4(named) else {}
        return {**self.spec, **coarse, **fp4}

    def text(self, schemes: Iterable[object]) -> dict[str, int]:
        """The calibration's size, for the same."""
        more = self.more_text() if is_coarse(schemes) else {}
        return {"num_samples": self.num_samples, "sequence_length": self.sequence_length, **more}

    def more_text(self) -> dict[str, int]:
        """Fields of the calibration where a scheme is coarse."""
        fields = {"further_samples": self.further, "written_samples": self.written}
        return {name: count for name, count in fields.items() if count}


COARSE_MIXES = frozenset(name for name, mix in MIXES.items() if mix.base in COARSE)
"""llama.cpp's mixes most of whose linears are in such a type."""


def is_coarse(schemes: Iterable[object]) -> bool:
    """True if one of the bits and schemes that a request names, whatever stands there, has codes that move."""
    return any(
        named.lower() in COARSE | COARSE_MIXES
        if isinstance(named, str)
        else isinstance(named, int) and 2 <= named <= COARSE_BITS
        for named in schemes
    )


def has_fp4(schemes: Iterable[object]) -> bool:
    """True if one of them is a coarse one of floating point."""
    return any(isinstance(named, str) and named.lower() in COARSE - BLOCK_SCHEMES for named in schemes)


SIGNROUND_PRESETS: MappingProxyType[str, Preset] = MappingProxyType(
    {
        "light": Preset({"steps": 50, "scale_steps": 0}, num_samples=128, sequence_length=2048),
        "default": Preset({"steps": 200, "scale_steps": 0}, num_samples=128, sequence_length=2048),
        "best": Preset({"steps": 200, "scale_steps": 100}, 128, 2048, MappingProxyType({"scale_steps": 400}), 512),
        "max": Preset(
            {"steps": 200, "scale_steps": 400},
            128,
            2048,
            MappingProxyType({"scale_steps": 1200}),
            1408,
            1024,
            MappingProxyType({"scale_steps": 1600}),
        ),
    }
)

OMNIQUANT_PRESETS: MappingProxyType[str, Preset] = MappingProxyType(
    {
        "light": Preset({"epochs": 5, "aug_loss": False}, num_samples=128, sequence_length=512),
        "default": Preset({"epochs": 20, "aug_loss": False}, num_samples=128, sequence_length=2048),
        "best": Preset({"epochs": 40, "aug_loss": True}, num_samples=128, sequence_length=2048),
    }
)

APIQ_PRESETS: MappingProxyType[str, Preset] = MappingProxyType(
    {
        "light": Preset({"steps": 128}, num_samples=128, sequence_length=512),
        "default": Preset({"steps": 512}, num_samples=128, sequence_length=2048),
        "best": Preset({"steps": 2560}, num_samples=128, sequence_length=2048),
    }
)
"""`best` is the paper's: 20 passes, one sequence per step."""


@dataclass(frozen=True)
class MethodInfo:
    """A method: the source of /v1/methods, and of what requests, estimates and tables follow from."""

    spec: type[WeightSpec]
    title: str
    summary: str
    paper: str | None
    """arXiv number, None where there is no paper."""
    produces: frozenset[Form]
    """All that its spec's `forms` may say."""
    presets: Mapping[str, Preset] = field(default_factory=lambda: MappingProxyType({}))
    """By the values of the spec's field `preset`; none if it has no such field."""

    @property
    def needs_calibration(self) -> bool:
        """True if the method reads calibration text with its default parameters."""
        return self.spec.model_validate({}).reads_text()

    @property
    def widths(self) -> frozenset[int]:
        """Values of `bits` that its spec takes."""
        return frozenset(bits for bits in range(MIN_BITS, MAX_BITS + 1) if self._takes(bits))

    def _takes(self, bits: int) -> bool:
        try:
            self.spec.model_validate({"bits": bits})
        except ValidationError:
            return False
        return True


METHODS: MappingProxyType[str, MethodInfo] = MappingProxyType(
    {
        "rtn": MethodInfo(
            spec=RTNSpec,
            title="Round to nearest",
            summary="The baseline: each weight goes to the nearest code of its group's range.",
            paper=None,
            produces=frozenset({Form.AFFINE, Form.FLOAT, Form.BLOCKS}),
        ),
        "nf": MethodInfo(
            spec=NormalFloatSpec,
            title="NormalFloat",
            summary="Each weight goes to the nearest quantile of a normal distribution: QLoRA's base, 2 to 4 bits.",
            paper="2305.14314",
            produces=frozenset({Form.CODEBOOK}),
        ),
        "gptq": MethodInfo(
            spec=GPTQSpec,
            title="GPTQ",
            summary="Rounds a linear's columns in turn; those not rounded yet make up for each one's error.",
            paper="2210.17323",
            produces=frozenset({Form.AFFINE, Form.FLOAT, Form.BLOCKS}),
        ),
        "awq": MethodInfo(
            spec=AWQSpec,
            title="AWQ",
            summary="Scales up the columns of large inputs before rounding, folds the inverse into norms and linears "
            "before them, and clips ranges.",
            paper="2306.00978",
            produces=frozenset({Form.AFFINE, Form.FLOAT, Form.BLOCKS}),
        ),
        "omniquant": MethodInfo(
            spec=OmniQuantSpec,
            title="OmniQuant",
            summary="Tunes how far each group's range is clipped against the original block's output.",
            paper="2308.13137",
            produces=frozenset({Form.AFFINE}),
            presets=OMNIQUANT_PRESETS,
        ),
        "signround": MethodInfo(
            spec=SignRoundSpec,
            title="SignRound",
            summary="Tunes rounding and clipping ranges of a block's linears against the original block's output.",
            paper="2309.05516",
            produces=frozenset({Form.AFFINE, Form.FLOAT, Form.BLOCKS}),
            presets=SIGNROUND_PRESETS,
        ),
        "loftq": MethodInfo(
            spec=LoftQSpec,
            title="LoftQ",
            summary="Rounds to NormalFloat or an affine grid and corrects what is lost by low-rank factors, in turn.",
            paper="2310.08659",
            produces=frozenset({Form.AFFINE, Form.CODEBOOK, Form.LOW_RANK}),
        ),
        "apiq": MethodInfo(
            spec=ApiQSpec,
            title="ApiQ",
            summary="Trains clipping and low-rank factors together against the output of a block, or of a linear.",
            paper="2402.05147",
            produces=frozenset({Form.AFFINE, Form.LOW_RANK}),
            presets=APIQ_PRESETS,
        ),
        "lq-lora": MethodInfo(
            spec=LQLoRASpec,
            title="LQ-LoRA",
            summary="NormalFloat codes plus low-rank factors by alternating decomposition, each linear with its share "
            "of a budget of bits, weighted by Fisher information.",
            paper="2311.12023",
            produces=frozenset({Form.CODEBOOK, Form.LOW_RANK}),
        ),
    }
)

RECIPES: MappingProxyType[str, dict[str, object]] = MappingProxyType(
    {
        "auto-round": {"method": "signround"},
        "auto-round-light": {"method": "signround", "preset": "light"},
        "auto-round-best": {"method": "signround", "preset": "best"},
        "lq-lora-unweighted": {"method": "lq-lora", "fisher": False},
        "apiq-bw": {"method": "apiq", "granularity": "block"},
        "apiq-lw": {"method": "apiq", "granularity": "layer"},
    }
)
"""Shorthand `method` names that are not methods, with the shorthand fields that they stand for."""
