"""Numbers of every model type that gguf is written for, from config.json as it is stored: no weights are needed."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from app.domain.gguf.rules import gguf_refusals
from app.domain.inputs.architectures import ARCHITECTURES as ACCEPTED
from bitwright.errors import FormatCannotHold
from tests.documentation import ROOT
from tests.engine.architectures.configurations import configuration
from tests.formats.gguf.architectures.test_names import TYPES
from workers.formats.gguf.architectures.numbers import common_keys
from workers.formats.gguf.metadata import Architecture


@dataclass(frozen=True)
class Described:
    """A source without tensors."""

    config: dict[str, Any]
    folder: Path = Path("/nowhere")
    tensors: dict[str, Any] = field(default_factory=dict)

    def read(self, name: str) -> Any:
        raise KeyError(name)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_configuration_is_read_as_it_is_stored_or_refused_in_words(model_type: str, tmp_path: Path) -> None:
    """Infinite numbers, and those that transformers leaves out, stand in files otherwise than in memory."""
    made = configuration(model_type)
    made.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    if gguf_refusals(model_type, made.to_dict()):
        with pytest.raises(FormatCannotHold, match=r"llama\.cpp"):
            Architecture.of(Described(stored))
        return
    architecture = Architecture.of(Described(stored))
    keys = dict(common_keys(architecture.family, architecture.numbers))
    assert keys["block_count"] == made.get_text_config(decoder=True).num_hidden_layers
    assert keys["embedding_length"] == made.get_text_config(decoder=True).hidden_size


def test_the_documentation_names_the_types_that_gguf_is_not_written_for() -> None:
    (line,) = (ROOT / "docs/reference/formats.md").read_text().split("all accepted model types but these")[1:]
    told = line.partition(". A refusal")[0].partition("else: ")[2].replace("`", "").split(", ")
    assert told == sorted(ACCEPTED.keys() - set(TYPES))
