"""llama.cpp's types in requests that leave them open: what a mix says of embeddings and head, and what goals choose
from for a GGUF file.

The ladder is of types that are closest at their size where rows are whole blocks (relative squared errors on normal
weights, of searches like ours): 2.6 bits 0.072, 3.4 bits 0.021, 4.25 bits 0.0057, 4.5 bits 0.0050, 5.5 bits 0.0013, 6.6
bits 0.0003. `q4_0`, `q4_1`, `q5_0`, `q5_1` and `iq4_nl` are worse than another of their size or a smaller one, and are
chosen only where rows are no multiple of 256 and a type of the ladder falls back to one. For the asking are `iq3_s`,
which is a tenth closer than `q3_k` at its size and takes fifteen times as long to search, and `q2_0`, which llama.cpp
knows since June 2026 alone.
"""

from collections.abc import Mapping

from pydantic import BaseModel, ValidationError

from app.domain.formats import ExportFormat
from app.domain.methods import BLOCK_SCHEMES, METHODS, SchemeName
from app.domain.methods.goals import spell_out
from app.domain.methods.named_schemes import BlockPreset
from app.domain.methods.schemes import HEAD_PATTERN
from app.domain.request.goal_problems import sized_formats

LADDER = (
    SchemeName.Q2_K,
    SchemeName.Q3_K,
    SchemeName.IQ4_XS,
    SchemeName.Q4_K,
    SchemeName.Q5_K,
    SchemeName.Q6_K,
    SchemeName.Q8_0,
)
OF_INTEGERS = ("group_size", "symmetric")
"""Fields that speak of integers: a request that gives one of them chooses among those."""


def fill_mix(body: dict[str, object]) -> None:
    """With a mix as the scheme, embeddings and head get their types of it where the request is silent on them."""
    quantization = body.get("quantization")
    if not isinstance(quantization, dict):
        return
    mix, modules = quantization.get("scheme"), quantization.get("modules", {})
    plain = mix.lower() if isinstance(mix, str) else None
    if plain not in BlockPreset.__members__.values() or not isinstance(modules, Mapping):
        return
    filled: dict[str, object] = {"embeddings": plain, **modules}
    ignored, stays = modules.get("ignore", ()), filled["embeddings"] is None
    if "head" not in modules and not stays and isinstance(ignored, list | tuple) and HEAD_PATTERN not in ignored:
        filled["head"] = plain
    quantization["modules"] = filled


class _FormatPart(BaseModel):
    """The fields that the kind of choices follows from."""

    formats: tuple[ExportFormat, ...]


def fill_block_choices(body: dict[str, object]) -> None:
    """Choices of a budget or goal for a GGUF file, and that embeddings and head are among what is chosen for.

    Those who give choices, or the groups and symmetry of integers, have said what they want.
    """
    quantization = body.get("quantization")
    if not isinstance(quantization, dict) or not _is_for_llama_cpp(body):
        return
    method = METHODS.get(quantization["method"])
    if method is None:
        return
    able = method.spec.named_schemes
    for field in ("bits", "at_most", "fits"):
        given = quantization.get(field)
        if not isinstance(given, Mapping):
            continue
        filled = dict(given)
        if "choices" not in given and not any(name in quantization for name in OF_INTEGERS):
            ladder = [name for name in LADDER if name in able]
            filled |= {"choices": spell_out(ladder)} if ladder else {}
        choices = filled.get("choices")
        if isinstance(choices, list | tuple) and choices and all(_is_block_type(choice) for choice in choices):
            whole = field != "bits" or given.get("over") == "model"
            if whole and "outer" not in given:
                filled["outer"] = _fill_ignored(quantization)
        quantization[field] = filled


def _fill_ignored(quantization: dict[str, object]) -> bool:
    """True: embeddings and head may be chosen for. The head is ignored no more where the request is silent on it."""
    modules = quantization.get("modules", {})
    if not isinstance(modules, Mapping):
        return False
    if "ignore" not in modules:
        quantization["modules"] = {**modules, "ignore": []}
    return True


def _is_for_llama_cpp(body: Mapping[str, object]) -> bool:
    """True if of the formats that pack GGUF is the one, beside what every job keeps."""
    try:
        formats = _FormatPart.model_validate(body).formats
    except ValidationError:
        return False
    packed = {name for name in sized_formats(formats) if not name.info.always_kept}
    return packed == {ExportFormat.GGUF}


def _is_block_type(choice: object) -> bool:
    return isinstance(choice, str) and choice.lower() in {name.value for name in BLOCK_SCHEMES}
