"""A GGUF file in llama.cpp, by its shared libraries through ctypes: those of a build, or those that node-llama-cpp has.

Structures that are passed by value are larger here than llama.cpp's own, and only the first numbers of one are touched
(sizes of a context), so that releases whose structures have more fields load as well. llama.cpp ends its process where
a file contradicts itself.
"""

import ctypes as c
from pathlib import Path
from typing import Any

import numpy as np

from workers.machine import available_threads
from workers.runtimes.libraries import LIBRARY, library_version
from workers.runtimes.order import ReadAnswer, ReadOrder

ROOM = 16
"""Tokens of a text beyond its bytes, at the most: those that a tokenizer puts around it."""


class _Parameters(c.Structure):
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


def read(order: ReadOrder) -> ReadAnswer:
    """The answer to an order."""
    (file,) = Path(order.folder).glob("*.gguf")
    folder = Path(order.place or "")
    version = library_version(folder) or ""
    llama = library(folder)
    model = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
    if not model:
        return ReadAnswer(version=version, problem="llama.cpp does not load the file")
    vocabulary = llama.llama_model_get_vocab(model)
    if order.text is not None:
        made = _tokens(llama, vocabulary, order.text)
        if made != list(order.ids):
            problem = f"the file's tokenizer makes {made[:8]} of a text that is {list(order.ids[:8])}"
            return ReadAnswer(version=version, problem=problem)
    width = llama.llama_vocab_n_tokens(vocabulary)
    context = Context(llama, model, len(order.ids) + order.tokens, width, available_threads())
    logits = context.logits(order.ids)
    logits.tofile(order.logits)
    written: list[int] = []
    last = logits[-1]
    for _ in range(order.tokens):
        written.append(int(last.argmax()))
        last = context.logits((written[-1],))[-1]
    return ReadAnswer(version=version, vocabulary=width, written=tuple(written))


class Context:
    """A sequence that grows, of `length` tokens at the most; logits are `width` numbers a token."""

    def __init__(self, llama: Any, model: int, length: int, width: int, threads: int) -> None:
        parameters = llama.llama_context_default_params()
        sizes = c.cast(c.byref(parameters), c.POINTER(c.c_uint32))
        for place in range(3):  # the context, and how many tokens are given and computed at once
            sizes[place] = length
        self._llama, self._width, self._done = llama, width, 0
        self._context = llama.llama_init_from_model(model, parameters)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context for the model")
        # It would take four; and threads that wait spin.
        llama.llama_set_n_threads(self._context, threads, threads)

    def close(self) -> None:
        """Gives its memory back."""
        self._llama.llama_free(self._context)

    def logits(self, ids: tuple[int, ...]) -> Any:
        """numpy's fp32 (tokens, vocabulary) after each of the next tokens."""
        llama, batch = self._llama, self._llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, self._done + place
            batch.n_seq_id[place], batch.logits[place] = 1, 1
            batch.seq_id[place][0] = 0
        code = llama.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama.cpp does not compute: llama_decode gives {code}")
        self._done += len(ids)
        found = np.ctypeslib.as_array(llama.llama_get_logits(self._context), (len(ids), self._width)).copy()
        llama.llama_batch_free(batch)
        return found


def library(folder: Path) -> Any:
    """libllama of a folder with its functions declared: of several builds, the first that this machine can load.

    Raises:
        OSError: it can load none.
    """
    reasons = list[str]()
    for llama_file in sorted(folder.rglob(LIBRARY)):
        try:
            return _declared(llama_file)
        except OSError as error:
            reasons.append(f"{llama_file.parent.name}: {error}")
    raise OSError("no build of llama.cpp can be loaded: " + "; ".join(reasons))


def _declared(llama_file: Path) -> Any:
    binaries = llama_file.parent
    base = c.CDLL(str(next(iter(sorted(binaries.glob("libggml-base*.so*"))))), mode=c.RTLD_GLOBAL)
    found = sorted([*binaries.glob("libggml.so*"), *binaries.glob("libggml.v*.so")])
    ggml = c.CDLL(str(found[0]), mode=c.RTLD_GLOBAL) if found else base
    llama = c.CDLL(str(llama_file), mode=c.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path.argtypes = [c.c_char_p]
    llama.llama_backend_init()
    ggml.ggml_backend_load_all_from_path(str(binaries).encode())
    for kind in ("model", "context"):
        getattr(llama, f"llama_{kind}_default_params").restype = _Parameters
    llama.llama_model_load_from_file.restype = c.c_void_p
    llama.llama_model_load_from_file.argtypes = [c.c_char_p, _Parameters]
    llama.llama_init_from_model.restype = c.c_void_p
    llama.llama_init_from_model.argtypes = [c.c_void_p, _Parameters]
    llama.llama_free.argtypes = [c.c_void_p]
    llama.llama_model_get_vocab.restype = c.c_void_p
    llama.llama_model_get_vocab.argtypes = [c.c_void_p]
    llama.llama_vocab_n_tokens.argtypes = [c.c_void_p]
    ids = c.POINTER(c.c_int32)
    llama.llama_tokenize.argtypes = [c.c_void_p, c.c_char_p, c.c_int32, ids, c.c_int32, c.c_bool, c.c_bool]
    llama.llama_batch_init.restype = _Batch
    llama.llama_batch_free.argtypes = [_Batch]
    llama.llama_set_n_threads.argtypes = [c.c_void_p, c.c_int32, c.c_int32]
    llama.llama_decode.argtypes = [c.c_void_p, _Batch]
    llama.llama_get_logits.restype = c.POINTER(c.c_float)
    llama.llama_get_logits.argtypes = [c.c_void_p]
    return llama


def _tokens(llama: Any, vocabulary: int, text: str) -> list[int]:
    raw = text.encode()
    found = (c.c_int32 * (len(raw) + ROOM))()
    count = llama.llama_tokenize(vocabulary, raw, len(raw), found, len(found), True, True)
    return list(found[:count])
