"""Keys of a stranger's configuration that reach transformers: those that it knows, and none that chooses code."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from workers.formats.library_config import known_part, library_config
from workers.formats.source_files import without_code

TYPES = ("llama", "qwen3", "gemma3_text", "gpt2", "opt", "deepseek_v3", "gemma3", "qwen2_vl", "mpt", "granitemoehybrid")
CHOSEN = {
    **{"attn_implementation": "nobody/kernel", "_attn_implementation": "flash_attention_2"},
    **{"_attn_implementation_internal": "nobody/kernel", "experts_implementation": "nobody/kernel"},
    **{"use_kernels": True, "kernel_config": {"a": "b"}, "use_mamba_kernels": True, "use_flash_attn": True},
    **{"auto_map": {"AutoModel": "a.B"}, "custom_pipelines": {}, "num_labels": 60_000, "name_or_path": "nobody/model"},
    **{"to_dict": 1, "save_pretrained": 1, "base_model_tp_plan": {"*": "a"}, "_auto_class": "a", "nobody_knows": 1},
}


@pytest.mark.parametrize("model_type", TYPES)
def test_what_a_type_says_of_itself_is_known(model_type: str) -> None:
    """A configuration of each type, written by transformers and read again, is the same."""
    written = CONFIG_MAPPING[model_type]().to_dict()
    read = CONFIG_MAPPING[model_type].from_dict(known_part(written)).to_dict()
    told = {"_name_or_path", "transformers_version"}
    assert {n: v for n, v in read.items() if n not in told} == {n: v for n, v in written.items() if n not in told}


@pytest.mark.parametrize("model_type", TYPES)
def test_nothing_else_reaches_the_library(model_type: str) -> None:
    written: dict[str, Any] = {**CONFIG_MAPPING[model_type]().to_dict(), **CHOSEN}
    for name, value in written.items():
        if isinstance(value, dict) and "model_type" in value:
            written[name] = {**value, **CHOSEN}
    kept = known_part(written)
    for part in (kept, *(value for value in kept.values() if isinstance(value, dict) and "model_type" in value)):
        assert not CHOSEN.keys() & part.keys()


def test_older_names_and_those_of_a_wrappers_parts_are_known(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    scaling = {"rope_type": "linear", "factor": 3.0}
    config = library_config(tmp_path, {"model_type": "llama", "rope_theta": 7.0, "rope_scaling": scaling, **sizes})
    assert config.rope_parameters["rope_theta"] == 7.0
    assert config.rope_parameters["factor"] == 3.0
    assert library_config(tmp_path, {"model_type": "llama", "torch_dtype": "float16"}).dtype is not None
    # Qwen2-VL's first files have the numbers of the text beside those of the images.
    wrapper = library_config(tmp_path, {"model_type": "qwen2_vl", "vision_config": {"depth": 2}, **sizes})
    assert wrapper.get_text_config().hidden_size == 8
    assert wrapper.vision_config.depth == 2
    assert library_config(tmp_path, {"model_type": "opt", "_remove_final_layer_norm": True})._remove_final_layer_norm


def test_the_attention_is_ours_whatever_the_file_says(tmp_path: Path) -> None:
    config = library_config(tmp_path, {"model_type": "llama", "attn_implementation": "nobody/kernel"})
    assert config._attn_implementation is None


def test_a_result_says_nothing_of_what_computes() -> None:
    config = {"model_type": "llama", "text_config": {"_attn_implementation": "a", "x": 1}, "attn_implementation": "b"}
    assert without_code(json.loads(json.dumps(config))) == {"model_type": "llama", "text_config": {"x": 1}}
