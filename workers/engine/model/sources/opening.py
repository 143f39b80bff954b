"""A folder whose weights are quantized, opened as a checkpoint of ordinary floating-point tensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from app.domain.inputs.quantized.registry import QuantizedSource
from workers.engine.model.sources.gguf import GgufSource, GgufTensor, read_gguf
from workers.engine.model.sources.presented import PresentedFolder
from workers.engine.model.sources.recipe import DTYPES, Dequantized, Recipe, presented_config, presented_dtype
from workers.formats.gguf.tokenizers.named_rules import check_rules, with_rules
from workers.formats.source_files import copy_files

OWN_TOKENIZER = "tokenizer*.json"
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*")


@dataclass(frozen=True)
class Presented:
    """A quantized source as it is presented.

    what      the source in words, for a warning and the report
    config    config.json without a word of quantization
    folder    a folder with that file, the tokenizer and the rest, but no weights
    weights   name -> dtype, by safetensors' name, shape and recipe of each weight that is made
    computed  tensors of a GGUF file that no weight is made of, by its names
    """

    what: str
    config: dict[str, Any]
    folder: PresentedFolder
    weights: Mapping[str, tuple[str, tuple[int, ...], Recipe]]
    computed: Mapping[str, GgufTensor] = field(default_factory=dict)


def present_safetensors(
    folder: Path,
    config: Mapping[str, Any],
    source: QuantizedSource,
    places: Mapping[str, Path],
    scratch: Path | None,
) -> Presented:
    """A folder of safetensors with quantized weights; `places` says in which file each stored tensor is."""
    name, plain = presented_dtype(config), presented_config(config)
    dtype: torch.dtype = getattr(torch, name)
    weights: dict[str, tuple[str, tuple[int, ...], Recipe]] = {}
    for weight in source.weights.values():
        parts = {part: places[part] for part in weight.parts.values()}
        weights[weight.name] = DTYPES[name], weight.shape, Dequantized(weight, parts, dtype)
    return Presented(source.what, plain, PresentedFolder(folder, plain, scratch, _nothing), weights)


def present_gguf(file: Path, scratch: Path | None, made: Path | None = None) -> Presented:
    """A GGUF file.

    made   a scratch folder of the same file, whose tokenizer is taken rather than made again

    Raises:
        CorruptCheckpoint, UnsupportedCheckpoint: as `read_gguf`, or its tokenizer splits text by unknown rules.
    """
    source = read_gguf(file)
    fill = _nothing
    if source.tokens and not any(file.parent.glob(OWN_TOKENIZER)):  # the folder's own goes before one that is made anew
        check_rules(source.rules, file.name)
        fill = partial(_save_tokenizer, file, source)
    if made is not None and (made / file.parent.name).is_dir():
        fill = partial(_take_tokenizer, made / file.parent.name)
    folder = PresentedFolder(file.parent, source.config, scratch, fill)
    weights: dict[str, tuple[str, tuple[int, ...], Recipe]] = {
        name: (_name(tensor), tensor.shape, tensor) for name, tensor in source.tensors.items()
    }
    return Presented(source.what, dict(source.config), folder, weights, source.computed)


def _name(tensor: GgufTensor) -> str:
    return DTYPES[str(tensor.dtype).removeprefix("torch.")]


def _nothing(folder: Path) -> None:
    """Leaves the folder as it is."""


def _take_tokenizer(made: Path, folder: Path) -> None:
    """The tokenizer of a folder that was made of the same file."""
    copy_files(made, folder, TOKENIZER)


def _save_tokenizer(file: Path, source: GgufSource, folder: Path) -> None:
    """The tokenizer that transformers makes of a file, with the file's own rules; none where it cannot read it.

    A token that its class adds on its own has no row in the embeddings (GPT-2's end of text), and goes.
    """
    if any(folder.glob(OWN_TOKENIZER)):
        return
    try:
        made = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
    except Exception:  # transformers raises whatever its parsers raise; what needs a tokenizer says that there is none
        return
    made.save_pretrained(folder)
    saved, vocabulary = folder / "tokenizer.json", source.config["vocab_size"]
    described = with_rules(json.loads(saved.read_bytes()), source.rules)
    described["added_tokens"] = [
        token for token in described["added_tokens"] if not isinstance(vocabulary, int) or token["id"] < vocabulary
    ]
    saved.write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
