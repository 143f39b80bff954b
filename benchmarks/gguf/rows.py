"""The rows of the tables: what each side makes of a model, and beside which of llama.cpp's files it stands.

Numbers of types (`ggml_type`) and mixes (`llama_ftype`) are those of llama.cpp v0.5.0.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

TYPES = MappingProxyType({"q2_k": 10, "q3_k": 11, "q4_k": 12, "iq3_s": 21, "q8_0": 8, "q6_k": 14})
MIXES = MappingProxyType(
    {
        "q2_k": (10, "q2_k_m"),
        "q3_k_s": (11, "q3_k_s"),
        "q3_k_m": (12, "q3_k_m"),
        "q4_k_m": (15, "q4_k_m"),
    }
)
"""llama.cpp's number of a mix, and the name that it has in a request."""
ALL_Q8_0 = 7
OURS: MappingProxyType[str, Mapping[str, Any]] = MappingProxyType(
    {
        "rtn, searched": {"method": "rtn"},
        "gptq": {"method": "gptq"},
        "signround light": {"method": "signround", "preset": "light"},
        "signround default": {"method": "signround"},
        "signround best": {"method": "signround", "preset": "best"},
    }
)
PEER, IMATRIX = "llama.cpp", "llama.cpp, imatrix"


@dataclass(frozen=True)
class Peer:
    """A file of llama.cpp's quantizer: a mix, and types of tensors by their names in place of its rules."""

    file_type: int
    types: Mapping[str, int] = field(default_factory=dict)
    importance: bool = True


@dataclass(frozen=True)
class Ours:
    """A job's `quantization`.

    at_most   whether its file is to be no larger than the baseline's
    """

    quantization: Mapping[str, Any]
    at_most: bool = False


@dataclass(frozen=True)
class Row:
    """One file.

    subject   what it is to be compared within: a type, or a mix
    """

    table: str
    subject: str
    name: str
    make: Peer | Ours

    @property
    def baseline(self) -> bool:
        """True for the file that others of the subject are compared with."""
        return self.name == IMATRIX


def outer(scheme: str) -> dict[str, Any]:
    """Fields of `modules` that give embeddings and head a scheme, or a mix's."""
    return {"embeddings": {"scheme": scheme}, "head": {"scheme": scheme}}


def ffn_down(types: list[str], arms: list[str]) -> Iterator[Row]:
    """Every matrix in Q8_0 but the 30 of ffn_down, which have one type."""
    for kind in types:
        table = "ffn_down in one type, all else Q8_0"
        for name, importance in ((PEER, False), (IMATRIX, True)):
            if importance or kind != "iq3_s":  # which llama.cpp makes only with an imatrix
                yield Row(table, kind, name, Peer(ALL_Q8_0, {"ffn_down": TYPES[kind]}, importance))
        modules = {"overrides": {"*.mlp.down_proj": {"scheme": kind}}, **outer("q8_0")}
        for arm in arms:
            yield Row(table, kind, arm, Ours({**OURS[arm], "scheme": "q8_0", "modules": modules}))


def one_type(types: list[str], arms: list[str]) -> Iterator[Row]:
    """Every linear in one type, embeddings in Q8_0."""
    for kind in types:
        table = "every linear in one type, embeddings Q8_0"
        types_of = {r"blk\.": TYPES[kind]}
        yield Row(table, kind, IMATRIX, Peer(ALL_Q8_0, types_of))
        for arm in arms:
            yield Row(table, kind, arm, Ours({**OURS[arm], "scheme": kind, "modules": outer("q8_0")}))


def mixes(names: list[str], arms: list[str], budget_arms: list[str]) -> Iterator[Row]:
    """llama.cpp's mixes by name, the same types with our rounding, and what we choose for files no larger."""
    table = "whole model"
    for name in names:
        file_type, ours = MIXES[name]
        yield Row(table, name, IMATRIX, Peer(file_type))
        for arm in arms:
            quantization = {**OURS[arm], "scheme": ours, "modules": outer(ours)}
            yield Row(table, name, f"the same types, {arm}", Ours(quantization))
        for arm in budget_arms:
            yield Row(table, name, f"a budget, {arm}", Ours(OURS[arm], at_most=True))
