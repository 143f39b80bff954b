"""Checkpoints of an export, held against those of the job that would have written them at once."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.reports import REPORTS


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def files(folder: Path) -> dict[str, bytes]:
    """All but the tensors, whose order in a file may be another, and what says how the files came to be.

    An importance matrix is of text that an export does not read.
    """
    told = ("README.md", *REPORTS, "model.imatrix")
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.name not in told and ".safetensors" not in file.name
    }


def assert_same(made: Path, own: Path) -> None:
    """The same files, and tensors of the same bits."""
    assert files(made) == files(own), made.name
    ours, theirs = tensors(made), tensors(own)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype is theirs[key].dtype
        assert torch.equal(tensor.flatten().view(torch.uint8), theirs[key].flatten().view(torch.uint8)), key
