"""Quantization methods: schemes, specs and budgets, and the catalogue of methods and recipes."""

from app.domain.methods.budgets import BitBudget, Candidate
from app.domain.methods.catalogue import METHODS, RECIPES, MethodInfo, Preset, QuantizationSpec
from app.domain.methods.low_rank_specs import ApiQSpec, LoftQSpec, LQLoRASpec
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
from app.domain.methods.weight_specs import (
    SCALE_BATCH_SIZE,
    AWQSpec,
    GPTQSpec,
    NormalFloatSpec,
    OmniQuantSpec,
    RTNSpec,
    SignRoundSpec,
    WeightSpec,
)
from bitwright.formats import Form

__all__ = [
    "MAX_BITS",
    "METHODS",
    "MIN_BITS",
    "PER_CHANNEL",
    "PRESET_ABSMAX",
    "RECIPES",
    "SCALE_BATCH_SIZE",
    "SCALE_BITS",
    "AWQSpec",
    "AbsmaxScheme",
    "ApiQSpec",
    "BitBudget",
    "Candidate",
    "Form",
    "GPTQSpec",
    "LQLoRASpec",
    "LoftQSpec",
    "MethodInfo",
    "ModuleRules",
    "NormalFloatSpec",
    "OmniQuantSpec",
    "Preset",
    "QuantizationSpec",
    "RTNSpec",
    "Scheme",
    "SchemeOverride",
    "SignRoundSpec",
    "WeightSpec",
]
