"""Methods by name, each from its own file: `METHOD` of a module in `workers/methods`, whatever its name.

The name in a request is that of the spec's row in the catalogue.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any

import workers.methods
from app.domain.methods import METHODS as CATALOGUE
from app.domain.methods import WeightSpec
from bitwright.errors import InternalError
from workers.contracts.blocks import BlockMethod, Method


def _code_of_catalogue() -> dict[str, BlockMethod[Any]]:
    """The code of every method of the catalogue.

    Raises:
        InternalError: a module defines no METHOD, or catalogue and modules differ.
    """
    code: dict[type[WeightSpec], BlockMethod[Any]] = {}
    for file in iter_modules(workers.methods.__path__, f"{workers.methods.__name__}."):
        method = vars(import_module(file.name)).get("METHOD")
        if not isinstance(method, Method):
            raise InternalError(f"{file.name} defines no METHOD")
        code[method.spec] = method.code
    specs = {info.spec for info in CATALOGUE.values()}
    if code.keys() != specs:
        names = ", ".join(sorted(spec.__name__ for spec in code.keys() ^ specs))
        raise InternalError(f"only one of catalogue and workers/methods has {names}")
    return {name: code[info.spec] for name, info in CATALOGUE.items()}


METHODS: MappingProxyType[str, BlockMethod[Any]] = MappingProxyType(_code_of_catalogue())


def method_of(spec: WeightSpec) -> BlockMethod[Any]:
    """The code of the spec's method."""
    return METHODS[spec.method]
