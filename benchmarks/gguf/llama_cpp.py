"""llama.cpp's quantizer and its logits, by its shared libraries, in a process of its own.

    python -m benchmarks.gguf.llama_cpp quantize|judge ORDER.json

Structures are those of llama.cpp v0.5.0 (`include/llama.h`, in node-llama-cpp 3.22.1). It ends its process where a file
contradicts itself, and writes much to standard error.
"""

import ctypes as c
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workers.runtimes.in_llama_cpp import Context, library

UNCHANGED = 43
"""GGML_TYPE_COUNT of v0.5.0, which means no type."""
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Quantize:
    """A file by llama.cpp's quantizer.

    file_type     number of a mix (`llama_ftype`)
    types         regular expression of tensors' names -> number of their type (`ggml_type`), before the mix's rules
    importance    .npz of each tensor's mean squares of inputs, by its name; None: without an imatrix
    """

    libraries: str
    source: str
    target: str
    file_type: int
    types: Mapping[str, int]
    importance: str | None
    threads: int


@dataclass(frozen=True)
class Judge:
    """Sequences of tokens in one file, beside the original's logits.

    ids        .npy int32 (sequences, length)
    original   .npy fp32 (sequences, length, vocabulary) of the original's logits
    writes     whether `original` is to be written, by this file, and not read
    """

    libraries: str
    file: str
    ids: str
    original: str
    writes: bool
    threads: int


def obeyed(order: Quantize | Judge) -> dict[str, Any]:
    """What a child answers.

    Raises:
        RuntimeError: it fails; with the end of what it wrote.
    """
    command = [sys.executable, "-m", "benchmarks.gguf.llama_cpp", type(order).__name__, json.dumps(asdict(order))]
    # Its log names tokens, which are bytes and no text.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise RuntimeError(f"llama.cpp: {done.stderr[-2000:] or done.returncode}")
    answer = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(answer, dict)
    return answer


class _Importance(c.Structure):
    _fields_ = (("name", c.c_char_p), ("data", c.POINTER(c.c_float)), ("size", c.c_size_t))


class _TensorType(c.Structure):
    _fields_ = (("pattern", c.c_char_p), ("type", c.c_int))


class _Parameters(c.Structure):
    """`llama_model_quantize_params`."""

    _fields_ = (
        ("threads", c.c_int32),
        ("file_type", c.c_int),
        ("head_type", c.c_int),
        ("embeddings_type", c.c_int),
        *((name, c.c_bool) for name in ("requantize", "head", "only_copy", "pure", "keep_split", "dry_run")),
        ("importance", c.POINTER(_Importance)),
        ("keys", c.c_void_p),
        ("types", c.POINTER(_TensorType)),
        ("layers", c.c_void_p),
        ("buffer", c.c_size_t),
    )


def quantize(order: Quantize) -> dict[str, Any]:
    """The bytes of the file that was written."""
    llama = library(Path(order.libraries))
    llama.llama_model_quantize_default_params.restype = _Parameters
    llama.llama_model_quantize.argtypes = [c.c_char_p, c.c_char_p, c.POINTER(_Parameters)]
    parameters = llama.llama_model_quantize_default_params()
    assert (parameters.head_type, parameters.embeddings_type) == (UNCHANGED, UNCHANGED), "another release's structure"
    parameters.threads, parameters.file_type = order.threads, order.file_type
    types = [_TensorType(pattern.encode(), number) for pattern, number in order.types.items()]
    if types:
        parameters.types = (_TensorType * (len(types) + 1))(*types, _TensorType())
    arrays = dict(np.load(order.importance)) if order.importance is not None else {}
    if arrays:
        floats = c.POINTER(c.c_float)
        rows = [_Importance(name.encode(), each.ctypes.data_as(floats), each.size) for name, each in arrays.items()]
        parameters.importance = (_Importance * (len(rows) + 1))(*rows, _Importance())
    if llama.llama_model_quantize(order.source.encode(), order.target.encode(), c.byref(parameters)):
        sys.exit("llama.cpp does not quantize the file")
    return {"bytes": Path(order.target).stat().st_size}


def judge(order: Judge) -> dict[str, Any]:
    """Each sequence's sums over its tokens but the last: of KL(original || file), of negative log-likelihoods and of
    tokens whose likeliest next one is the same."""
    import torch

    torch.set_num_threads(order.threads)
    llama = library(Path(order.libraries))
    model = llama.llama_model_load_from_file(order.file.encode(), llama.llama_model_default_params())
    if not model:
        sys.exit("llama.cpp does not load the file")
    width = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    ids = np.load(order.ids)
    shape, mode = (*ids.shape, width), "w+" if order.writes else "r"
    original = np.lib.format.open_memmap(order.original, mode, np.float32, shape if order.writes else None)
    sums: dict[str, list[float]] = {"kl": [], "nll": [], "same": []}
    for row, place in zip(ids.tolist(), range(len(ids)), strict=True):
        context = Context(llama, model, len(row), width, order.threads)
        logits = context.logits(tuple(row))
        context.close()
        if order.writes:
            original[place] = logits
        found = torch.from_numpy(logits[:-1]).log_softmax(-1)
        other = torch.from_numpy(np.array(original[place, :-1])).log_softmax(-1)
        target = torch.tensor(row[1:])[:, None]
        sums["kl"].append(float((other.exp() * (other - found)).sum(-1).double().sum()))
        sums["nll"].append(-float(found.gather(1, target).double().sum()))
        sums["same"].append(float((found.argmax(-1) == other.argmax(-1)).sum()))
    return {**sums, "tokens": len(ids) * (ids.shape[1] - 1)}


def main(kind: str, order: str) -> None:
    """Obey an order in this process."""
    fields = json.loads(order)
    answer = quantize(Quantize(**fields)) if kind == Quantize.__name__ else judge(Judge(**fields))
    sys.stdout.write(f"\n{json.dumps(answer)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
