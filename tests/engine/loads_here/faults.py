"""Faults of a writer, planted in the files that it has finished; the writers themselves are the project's own."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = "model.layers.0"
Fault = Callable[[Path], None]


def wrong_scheme(**changes: Any) -> Fault:
    """Another scheme in config.json than that of the tensors."""

    def plant(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        config["quantization_config"]["config_groups"]["group_0"]["weights"] |= changes
        file.write_text(json.dumps(config))

    return plant


def swapped(first: str, second: str) -> Fault:
    def plant(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        one, other = tensors[f"{BLOCK}.{first}"], tensors[f"{BLOCK}.{second}"]
        _save(folder, {**tensors, f"{BLOCK}.{first}": other.clone(), f"{BLOCK}.{second}": one.clone()})

    return plant


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Fault:
    def plant(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        _save(folder, {**tensors, f"{BLOCK}.{name}": change(tensors[f"{BLOCK}.{name}"]).contiguous()})

    return plant


def lost(name: str) -> Fault:
    def plant(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[f"{BLOCK}.{name}"]
        _save(folder, tensors)

    return plant


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def other_tokenizer(folder: Path) -> None:
    """The tokens have changed places."""
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    words = described["model"]["vocab"]
    described["model"]["vocab"] = dict(zip(words, reversed(words.values()), strict=True))
    file.write_text(json.dumps(described))


FAULTS: Mapping[str, Fault] = {
    "another width": wrong_scheme(num_bits=8),
    "another group": wrong_scheme(group_size=16),
    "zero points that are not there": wrong_scheme(symmetric=False),
    "scales of k and v swapped": swapped("self_attn.k_proj.weight_scale", "self_attn.v_proj.weight_scale"),
    "scales of rows swapped": changed("mlp.down_proj.weight_scale", lambda scale: scale.flip(0)),
    "no tokenizer": no_tokenizer,
    "another tokenizer": other_tokenizer,
    "codes of 64 bits": changed("self_attn.q_proj.weight_packed", lambda codes: codes.long()),
    "codes in fp16": changed("self_attn.q_proj.weight_packed", lambda codes: codes.half()),
    "scales in int8": changed("self_attn.q_proj.weight_scale", lambda scale: scale.to(torch.int8)),
    "a tensor lost": lost("mlp.up_proj.weight_scale"),
}


class Faulty:
    """A writer whose files are changed once it has finished."""

    def __init__(self, writer: Any, folder: Path, fault: Fault) -> None:
        self._writer, self._folder, self._fault = writer, folder, fault

    def finish(self, **given: Any) -> None:
        self._writer.finish(**given)
        self._fault(self._folder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


def _save(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    file = folder / "model.safetensors"
    file.unlink()  # it may be mapped
    save_file(dict(tensors), file, metadata={"format": "pt"})
