"""All families by transformers' `model_type`, and the language models inside of wrappers."""

from collections.abc import Mapping
from types import MappingProxyType

from workers.formats.gguf.architectures.dense import DENSE
from workers.formats.gguf.architectures.family import Family
from workers.formats.gguf.architectures.mixtures import MIXTURES
from workers.formats.gguf.architectures.older import OLDER
from workers.formats.gguf.architectures.recurrent import RECURRENT
from workers.formats.gguf.architectures.state_spaces import STATE_SPACES

FAMILIES: Mapping[str, Family] = MappingProxyType({**DENSE, **MIXTURES, **RECURRENT, **STATE_SPACES, **OLDER})
"""`model_type` of the language model -> its family."""
