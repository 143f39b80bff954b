"""Quantization methods: schemes, specs and budgets, and the catalogue of methods and recipes."""

from app.domain.methods.any_method import SCALE_BATCH_SIZE, WeightSpec
from app.domain.methods.budgets import BitBudget, Candidate
from app.domain.methods.catalogue import METHODS, RECIPES, MethodInfo, Preset, QuantizationSpec
from app.domain.methods.clipping_specs import OmniQuantSpec
from app.domain.methods.codebook_specs import NormalFloatSpec
from app.domain.methods.goals import AtMost, Choice, Fits, Goal
from app.domain.methods.low_rank_specs import ApiQSpec, LoftQSpec, LQLoRASpec
from app.domain.methods.named_schemes import (
    ALL_SCHEMES,
    BLOCK_SCHEMES,
    PRESET_SCHEMES,
    SCHEMES,
    NamedScheme,
    SchemeName,
)
from app.domain.methods.schemes import (
    MAX_BITS,
    MIN_BITS,
    PER_CHANNEL,
    PRESET_ABSMAX,
    SCALE_BITS,
    AbsmaxScheme,
    ModuleRules,
    Scheme,
    SchemeOverride,
)
from app.domain.methods.weight_specs import AWQSpec, GPTQSpec, RTNSpec, SignRoundSpec
from bitwright.formats import Form

__all__ = [
    "ALL_SCHEMES",
    "BLOCK_SCHEMES",
    "MAX_BITS",
    "METHODS",
    "MIN_BITS",
    "PER_CHANNEL",
    "PRESET_ABSMAX",
    "PRESET_SCHEMES",
    "RECIPES",
    "SCALE_BATCH_SIZE",
    "SCALE_BITS",
    "SCHEMES",
    "AWQSpec",
    "AbsmaxScheme",
    "ApiQSpec",
    "AtMost",
    "BitBudget",
    "Candidate",
    "Choice",
    "Fits",
    "Form",
    "GPTQSpec",
    "Goal",
    "LQLoRASpec",
    "LoftQSpec",
    "MethodInfo",
    "ModuleRules",
    "NamedScheme",
    "NormalFloatSpec",
    "OmniQuantSpec",
    "Preset",
    "QuantizationSpec",
    "RTNSpec",
    "Scheme",
    "SchemeName",
    "SchemeOverride",
    "SignRoundSpec",
    "WeightSpec",
]
