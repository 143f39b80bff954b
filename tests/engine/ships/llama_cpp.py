"""A real llama.cpp: logits and tokens of a GGUF file, by its library, in a process of its own.

    python -m tests.engine.ships.llama_cpp FOLDER ORDER.json RESULT.npz

FOLDER is where `npm install --ignore-scripts node-llama-cpp@3.22.1` was run; the package brings llama.cpp v0.5.0 as
shared libraries, which are called through ctypes. llama.cpp ends the process where a file contradicts itself, so
that it gets one to end.
"""

import ctypes as c
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BINARIES = "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64"
RELEASE = "v0.5.0"


@dataclass(frozen=True)
class Answer:
    """numpy's fp32 logits (tokens, vocabulary), and the tokens of each text."""

    logits: Any
    tokens: list[list[int]]


def ask(folder: Path, file: Path, ids: list[int], texts: list[str]) -> Answer | str:
    """llama.cpp's answer on a file, or its error message if it does not load it."""
    order, result = file.with_suffix(".order.json"), file.with_suffix(".npz")
    order.write_text(json.dumps({"file": str(file), "ids": ids, "texts": texts}))
    command = [sys.executable, "-m", "tests.engine.ships.llama_cpp", str(folder), str(order), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr[-2000:] or f"it ended with {done.returncode}"
    found = np.load(result)
    return Answer(found["logits"], json.loads(str(found["tokens"])))


class _Parameters(c.Structure):
    """A structure that is passed by value, larger than llama.cpp's own: only its first numbers are touched."""

    _fields_ = (("bytes", c.c_uint8 * 1024),)


class _Batch(c.Structure):
    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


def _library(folder: Path) -> Any:
    binaries = folder / BINARIES
    for name in ("libggml-base.so", f"libggml.{RELEASE}.so"):
        ggml = c.CDLL(str(binaries / name), mode=c.RTLD_GLOBAL)
    llama = c.CDLL(str(binaries / f"libllama.{RELEASE}.so"), mode=c.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path.argtypes = [c.c_char_p]
    llama.llama_backend_init()
    ggml.ggml_backend_load_all_from_path(str(binaries).encode())
    for kind in ("model", "context"):
        getattr(llama, f"llama_{kind}_default_params").restype = _Parameters
    llama.llama_model_load_from_file.restype = c.c_void_p
    llama.llama_model_load_from_file.argtypes = [c.c_char_p, _Parameters]
    llama.llama_init_from_model.restype = c.c_void_p
    llama.llama_init_from_model.argtypes = [c.c_void_p, _Parameters]
    llama.llama_model_get_vocab.restype = c.c_void_p
    llama.llama_model_get_vocab.argtypes = [c.c_void_p]
    llama.llama_vocab_n_tokens.argtypes = [c.c_void_p]
    ids = c.POINTER(c.c_int32)
    llama.llama_tokenize.argtypes = [c.c_void_p, c.c_char_p, c.c_int32, ids, c.c_int32, c.c_bool, c.c_bool]
    llama.llama_batch_init.restype = _Batch
    llama.llama_decode.argtypes = [c.c_void_p, _Batch]
    llama.llama_get_logits.restype = c.POINTER(c.c_float)
    llama.llama_get_logits.argtypes = [c.c_void_p]
    return llama


def quantize(folder: Path, source: Path, target: Path, file_type: int) -> None:
    """A file by llama.cpp's own quantizer, in this process; `file_type` is the number of a mix (`llama_ftype`)."""
    llama = _library(folder)
    llama.llama_model_quantize_default_params.restype = _Parameters
    parameters = llama.llama_model_quantize_default_params()
    numbers = c.cast(c.pointer(parameters), c.POINTER(c.c_int32))
    numbers[0], numbers[1] = 1, file_type
    llama.llama_model_quantize.argtypes = [c.c_char_p, c.c_char_p, c.POINTER(_Parameters)]
    failed = llama.llama_model_quantize(str(source).encode(), str(target).encode(), c.byref(parameters))
    assert not failed, "llama.cpp does not quantize the file"


def _logits(llama: Any, model: int, ids: list[int], width: int) -> Any:
    parameters = llama.llama_context_default_params()
    sizes = c.cast(c.byref(parameters), c.POINTER(c.c_uint32))
    for place in range(3):  # the context, and how many tokens are given and computed at once
        sizes[place] = len(ids)
    context = llama.llama_init_from_model(model, parameters)
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.logits[place] = token, place, 1, 1
        batch.seq_id[place][0] = 0
    if not context or llama.llama_decode(context, batch):
        sys.exit("llama.cpp does not compute")
    return np.ctypeslib.as_array(llama.llama_get_logits(context), (len(ids), width)).copy()


def _tokens(llama: Any, vocabulary: int, text: str) -> list[int]:
    raw = text.encode()
    found = (c.c_int32 * (len(raw) + 16))()
    count = llama.llama_tokenize(vocabulary, raw, len(raw), found, len(found), True, True)
    return list(found[:count])


def main(folder: str, order: str, result: str) -> None:
    """Obey an order in this process."""
    wanted = json.loads(Path(order).read_text())
    llama = _library(Path(folder))
    model = llama.llama_model_load_from_file(wanted["file"].encode(), llama.llama_model_default_params())
    if not model:
        sys.exit("llama.cpp does not load the file")
    vocabulary = llama.llama_model_get_vocab(model)
    logits = _logits(llama, model, wanted["ids"], llama.llama_vocab_n_tokens(vocabulary))
    tokens = [_tokens(llama, vocabulary, text) for text in wanted["texts"]]
    np.savez(result, logits=logits, tokens=json.dumps(tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])
