"""A configuration as transformers gets it: the keys that its class or its model's code knows, and none that chooses
code.

A configuration is a stranger's, and a class keeps whatever it is given as an attribute: a key may stand for a method,
for a table of the library, or name the implementation of attention, which may be a program to fetch. Which
implementation computes is decided here.
"""

import dataclasses
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from workers.formats.source_files import IMPLEMENTATIONS

FILE = "config.json"
CHOOSES = re.compile(r".*implementation.*|attn_impl|use_.*(kernel|flash|cuda|triton|mambapy|xformers|sdpa).*")
"""Names of keys that choose an implementation or a kernel."""
NEVER = frozenset(
    {"auto_map", "custom_pipelines", "quantization_config", "num_labels", "name_or_path", "transformers_weights"}
) | frozenset(IMPLEMENTATIONS)
LEGACY = frozenset({"rope_scaling", "rope_theta", "partial_rotary_factor", "rope_parameters", "torch_dtype", "dtype"})
"""Keys of older files that the library turns into others."""
OF_LAYERS = "per_layer_config"
"""Number of a layer -> keys that it has otherwise."""
MENTIONED = re.compile(r"""["'](\w+)["']|\bconfig\.(\w+)""")


def library_config(folder: Path, config: Mapping[str, Any]) -> PreTrainedConfig:
    """A decoded configuration as transformers reads it; whatever its validators raise goes through.

    folder   named as its place
    """
    with tempfile.TemporaryDirectory(prefix="bitwright-config-") as place:
        (Path(place) / FILE).write_text(json.dumps(known_part(config)))
        read = AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    read.name_or_path = str(folder)
    return read


def library_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, whose class may follow from its configuration; whatever transformers raises goes
    through. Code in the folder is never run.
    """
    file = folder / FILE
    given = {"config": library_config(folder, json.loads(file.read_bytes()))} if file.is_file() else {}
    made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, **given
    )
    return made


def known_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a decoded configuration that transformers knows for its type, and those of its parts."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return {name: value for name, value in config.items() if not is_chosen_here(name)}
    return _part_of(CONFIG_MAPPING[model_type], config)


def is_chosen_here(name: str) -> bool:
    """True of a key that never reaches a library."""
    return name in NEVER or CHOOSES.fullmatch(name) is not None


def _part_of(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    known, parts = known_keys(kind), kind.sub_configs
    kept = {}
    for name, value in config.items():
        if name not in known:
            continue
        if isinstance(value, Mapping) and name in parts:
            kept[name] = _sub_config(parts[name], value)
        elif isinstance(value, Mapping) and name == OF_LAYERS:
            kept[name] = {layer: _part_of(kind, each) for layer, each in value.items() if isinstance(each, Mapping)}
        else:
            kept[name] = value
    return kept


def _sub_config(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, PreTrainedConfig):
        return _part_of(kind, config)
    return known_part(config)  # of a class that the part itself names


def know(model_type: str) -> None:
    """Find the keys of a type now, for processes that wait: it takes some milliseconds, once."""
    known_keys(CONFIG_MAPPING[model_type])


@cache
def known_keys(kind: Any) -> frozenset[str]:
    """Names that a configuration class has as fields, or that its code and its model's mention.

    A name that the class has otherwise, such as a method or a table of the library's, is none of them.
    """
    fields = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map) | set(kind.sub_configs)
    fields |= LEGACY | {"model_type", OF_LAYERS}
    mentioned = {name for module in _modules(kind) for pair in MENTIONED.findall(module) for name in pair if name}
    # What stands in a wrapper's file beside its parts is meant for them.
    for part in kind.sub_configs.values():
        if isinstance(part, type) and issubclass(part, PreTrainedConfig) and part is not kind:
            mentioned |= known_keys(part)
    others = {name for name in mentioned if not hasattr(kind, name) and not name.startswith("_")}
    return frozenset(name for name in fields | others if not is_chosen_here(name))


def _modules(kind: type[PreTrainedConfig]) -> list[str]:
    """The sources of a class and of the model that reads it."""
    names = {each.__module__ for each in kind.__mro__ if each.__module__.startswith("transformers.models.")}
    sources = []
    for name in sorted(names):
        file = Path(inspect.getfile(sys.modules[name]))
        model = file.with_name(file.name.replace("configuration_", "modeling_"))
        sources += [each.read_text(encoding="utf-8") for each in {file, model} if each.is_file()]
    return sources
