"""Reading a finished GGUF file back with transformers: the same model and tokenizer, or the differences.

`from_pretrained(gguf_file=...)` reads a few numbers of a file and silently takes the rest from its own defaults: a
Llama with biases or with Llama 3's rotary scaling becomes another model. So configuration and tokenizer of the file
are read back as a caller would read them, and compared with the source.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from math import isclose
from pathlib import Path
from struct import Struct
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, modeling_gguf_pytorch_utils
from transformers.integrations.gguf import reader

from workers.formats.gguf.tokenizers.source import SourceTokenizer

TRIED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Types of models whose files are read back, since tests load them with their weights."""
FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "rms_norm_eps",
    "tie_word_embeddings",
)
"""Fields of a configuration that decide the numbers that a model computes, besides its rotary embedding."""
PROBE = (
    "The 3 quick brown foxes, aged 12 and 345, don't jump over 6789 lazy dogs: naïve cafe\u0301, Größe, 東京で2026年。 "
    "They'LL see it's 50% off\n\n\tdef f(x):  return x**2  # über\r\n   trailing   "
)
"""Text on which tokenizers of different rules differ: digits, apostrophes, spaces, accents (one apart), scripts."""


_ARRAY, _LENGTH = Struct("<IQ"), Struct("<Q")
"""The beginning of a list, the type of its items and how many they are; and that of a text, its bytes."""
LONG = 1024
"""Items of the longest list that a configuration reads; one with more is a vocabulary's, and its length is a number."""


@dataclass(frozen=True)
class Reading:
    """Differences of the model and tokenizer that transformers reads from a file.

    other_model      differences of the model from the source's, in words; empty: it is the same
    other_tokens     whether the tokenizer gives other tokens for a text
    untried          whether the model is of a type whose files nobody here has read with transformers
    """

    other_model: tuple[str, ...] = ()
    other_tokens: bool = False
    untried: bool = False


def read_back(folder: Path, file: str, config: PreTrainedConfig, source: Path) -> Reading:
    """Reads a file in a folder, and compares it with the configuration and the tokenizer of the source's folder."""
    if config.model_type not in TRIED:
        return Reading(untried=True)
    with _quiet(), _read_once():
        try:
            loaded = AutoConfig.from_pretrained(folder, gguf_file=file, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers passes on whatever its readers raise
            return Reading(other_model=(f"it does not read the file: {error}",))
        return Reading(tuple(_differences(loaded, config)), _tokenizes_otherwise(folder, file, source))


def _differences(loaded: PreTrainedConfig, wanted: PreTrainedConfig) -> Iterator[str]:
    for name in FIELDS:
        theirs, ours = _value(loaded, name), _value(wanted, name)
        if not _same(theirs, ours):
            yield f"{name} is {ours}, and it takes {theirs}"
    theirs, ours = _rotary(loaded), _rotary(wanted)
    if theirs["rope_type"] != ours["rope_type"]:
        yield f"the rotary embedding is of the type {ours['rope_type']}, and it takes {theirs['rope_type']}"
    elif not _same(theirs.get("rope_theta"), ours.get("rope_theta")):
        yield f"rope_theta is {ours.get('rope_theta')}, and it takes {theirs.get('rope_theta')}"


def _value(config: PreTrainedConfig, name: str) -> Any:
    value = getattr(config, name, None)
    if name == "head_dim":
        return value or config.hidden_size // config.num_attention_heads
    if name == "hidden_act":
        return "silu" if value == "swish" else value
    return value or False


def _rotary(config: PreTrainedConfig) -> dict[str, Any]:
    return {"rope_type": "default", **(config.rope_parameters or {})}


def _same(one: Any, other: Any) -> bool:
    """True if both are equal in fp32 precision."""
    numbers = isinstance(one, float | int) and isinstance(other, float | int)
    return isclose(one, other, rel_tol=1e-6) if numbers else one == other


def _tokenizes_otherwise(folder: Path, file: str, source: Path) -> bool:
    ours = SourceTokenizer.read(source).loaded
    try:
        theirs = AutoTokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True, trust_remote_code=False)
    except Exception:  # transformers passes on whatever its readers raise
        return True
    special = "".join(token for token in ours.all_special_tokens if isinstance(token, str))
    for text in (PROBE, special + PROBE + special):
        if theirs(text, verbose=False)["input_ids"] != ours(text, verbose=False)["input_ids"]:
            return True
    return bool(theirs.eos_token_id != ours.eos_token_id)


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """gguf-py's reader over plain memory, which goes through lists at once and shows no items of long ones.

    A slice of a `numpy.memmap` takes several times as long as one of an array, and each token of a vocabulary takes ten
    in the package's own loop. Only for files of little-endian numbers, as all are that are written here.
    """

    @property
    def data(self) -> NDArray[np.uint8]:
        return self._bytes

    @data.setter
    def data(self, mapped: NDArray[np.uint8]) -> None:
        self._bytes = np.asarray(mapped)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        number, count = _ARRAY.unpack_from(self._bytes.data, orig_offs)
        kind, at = GGUFValueType(number), orig_offs + _ARRAY.size
        parts, end = self._texts(at, count) if kind == GGUFValueType.STRING else self._numbers(at, count, kind)
        step = len(parts) // count if parts else 1
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        items = list(range(1 + step, 2 + len(parts), step))
        return end - orig_offs, head + parts, items, [GGUFValueType.ARRAY, kind] if count else [GGUFValueType.ARRAY]

    def _texts(self, at: int, count: int) -> tuple[list[NDArray[Any]], int]:
        """Length and bytes of each text of a list, none of a long one, and where the list ends."""
        parts, memory = list[NDArray[Any]](), self._bytes.data
        for _ in range(count):
            text = at + _LENGTH.size
            end = text + _LENGTH.unpack_from(memory, at)[0]
            if count <= LONG:
                parts += (self._bytes[at:text].view(np.uint64), self._bytes[text:end])
            at = end
        return parts, at

    def _numbers(self, at: int, count: int, kind: GGUFValueType) -> tuple[list[NDArray[Any]], int]:
        """Each number of a list, none of a long one, and where the list ends."""
        numbers = self._get(at, self.gguf_scalar_to_np[kind], count)
        return [numbers[index : index + 1] for index in range(count if count <= LONG else 0)], at + numbers.nbytes


@contextmanager
def _read_once() -> Iterator[None]:
    """Context in which transformers reads a file's configuration once, for itself and for the tokenizer.

    Its own reader of tokens goes over plain memory, too.
    """
    stock, load, mapped = gguf.GGUFReader, modeling_gguf_pytorch_utils.load_gguf_checkpoint, reader._mapped

    @cache
    def loaded(file: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = load(file)["config"]
        return found

    def config_of(file: str, **_: object) -> dict[str, Any]:
        return {"config": deepcopy(dict(loaded(file)))}

    gguf.GGUFReader, modeling_gguf_pytorch_utils.load_gguf_checkpoint = _Reader, config_of
    reader._mapped = lambda file: mapped(file).data
    try:
        yield
    finally:
        gguf.GGUFReader, modeling_gguf_pytorch_utils.load_gguf_checkpoint = stock, load
        reader._mapped = mapped


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without transformers' own log lines, since the file is only inspected."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
