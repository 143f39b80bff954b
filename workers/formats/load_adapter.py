"""Put a Bitwright adapter beside a model's linears, or into their weights. Needs torch and safetensors only.

    from load_bitwright import load             # the base: the native checkpoint of the same job, or its merged one
    from load_adapter import attach, merge
    model = load("path/to/native")
    attach(model, "path/to/adapter")            # adds the updates in each forward pass; returns their removal
    merge(model, "path/to/adapter")             # or: adds them to the weights once, in the weights' dtype

adapter.safetensors has JSON in its metadata, under `bitwright-adapter`: `version`, `kind`, and `linears`, which
describes the tensors of each linear W (out, in):

    y = W x + scale * U(core(P(x)))     P: mean over `pool_in` neighbours;  U: each output `repeat_out` times
    form pair       core = B A          name.a (rank, in/pool_in), name.b (out/repeat_out, rank), fp32
    form single     core = M            name.m (out/repeat_out, in/pool_in), fp32
    form integer    core = B A          A = a_step * a_codes, B = b_step * b_codes: int8 or int16, fp32 ()

A linear without tensors has no update.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

FORMAT, VERSION = "bitwright-adapter", "1"
FILE = "adapter.safetensors"
PARTS = {
    "pair": {"a", "b"},
    "single": {"m"},
    "integer": {"a_codes", "a_step", "b_codes", "b_step"},
}


def read(folder: str | Path) -> dict[str, tuple[dict[str, Any], list[Tensor]]]:
    """Each linear's description and matrices, [B, A] or [M] in fp32, by the name of its module.

    Raises:
        ValueError: the file is of another format or version, or a linear lacks a tensor.
    """
    adapters = {}
    with safe_open(Path(folder) / FILE, framework="pt") as stored:
        description = json.loads((stored.metadata() or {}).get(FORMAT, "{}"))
        if description.get("version") != VERSION:
            raise ValueError(f"{FILE}: this loader reads version {VERSION} of {FORMAT}")
        names = set(stored.keys())
        for name, linear in description["linears"].items():
            expected = PARTS[linear["form"]]
            parts = {
                suffix: stored.get_tensor(f"{name}.{suffix}") for suffix in expected if f"{name}.{suffix}" in names
            }
            if not parts:
                continue
            if parts.keys() != expected:
                raise ValueError(f"{name}: has the tensors {sorted(parts)}; it should have {sorted(expected)}")
            adapters[name] = linear, _matrices(linear["form"], parts)
    return adapters


def update(linear: dict[str, Any], matrices: list[Tensor]) -> Tensor:
    """The update that is added to the weight, fp32 (out, in)."""
    core = matrices[0] @ matrices[1] if len(matrices) == 2 else matrices[0]
    tiles = core * (linear["scale"] / linear["pool_in"])
    dense: Tensor = tiles.repeat_interleave(linear["repeat_out"], 0).repeat_interleave(linear["pool_in"], 1)
    return dense


def attach(model: nn.Module, folder: str | Path) -> Callable[[], None]:
    """Adds each update to the output of its linear from now on; calling the returned function removes them."""
    handles = []
    for name, (linear, matrices) in read(folder).items():
        module = model.get_submodule(name)
        device = next(module.parameters()).device
        handles.append(module.register_forward_hook(_hook(linear, [matrix.to(device) for matrix in matrices])))

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return detach


@torch.no_grad()
def merge(model: nn.Module, folder: str | Path) -> None:
    """Adds each update to the weight of its linear: the sum is rounded once to the weight's dtype."""
    for name, (linear, matrices) in read(folder).items():
        weight = model.get_submodule(name).get_parameter("weight")
        weight.copy_((weight.float() + update(linear, matrices).to(weight.device)).to(weight.dtype))


def _matrices(form: str, parts: dict[str, Tensor]) -> list[Tensor]:
    if form == "single":
        return [parts["m"]]
    if form == "pair":
        return [parts["b"], parts["a"]]
    return [parts[f"{factor}_codes"].float() * parts[f"{factor}_step"] for factor in "ba"]


def _hook(linear: dict[str, Any], matrices: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    pool, repeat, scale = linear["pool_in"], linear["repeat_out"], linear["scale"]

    def add(_module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        hidden = inputs[0]
        hidden = hidden.reshape(*hidden.shape[:-1], -1, pool).mean(-1) * scale
        for matrix in reversed(matrices):
            hidden = nn.functional.linear(hidden, matrix.to(hidden.dtype))
        total: Tensor = output + hidden.repeat_interleave(repeat, -1)
        return total

    return add
