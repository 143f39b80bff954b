"""Source files in a result: every file that a tokenizer or processor reads, no code, and no local path."""

import ast
import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import (
    AUDIO_TOKENIZER_NAME,
    FEATURE_EXTRACTOR_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)

from bitwright.formats import ExportFormat
from tests.formats.examples import Source, scheme, tiny_llama, write_quantized
from workers.child.fetch import ALLOWED, IGNORED
from workers.formats.source_files import CODE, COPIED, without_code
from workers.tiny_model import Recipe, make_tiny_model

CT, NATIVE, MERGED = ExportFormat.COMPRESSED_TENSORS, ExportFormat.NATIVE, ExportFormat.MERGED
PROCESSORS = (IMAGE_PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME, VIDEO_PROCESSOR_NAME, PROCESSOR_NAME, AUDIO_TOKENIZER_NAME)
OTHERS = ("tekken.json", "qwen.tiktoken", "tiktoken.model", "SYSTEM_PROMPT.txt", "NOTICE", "USE_POLICY.md", "LICENCE")
"""Of mistral-common, of tokenizers with code of their own, and what licences ask for."""
CODE_OF = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}


def vocabularies() -> set[str]:
    """The names of the files that transformers' tokenizers read, as its own source has them."""
    found: set[str] = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/tokenization_*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VOCAB_FILES_NAMES":
                found |= set(_strings(node.value))
    return found


def _strings(node: ast.expr) -> Iterator[str]:
    values = node.values if isinstance(node, ast.Dict) else []
    yield from (value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str))


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def test_every_file_that_a_tokenizer_or_processor_reads_is_fetched_and_copied() -> None:
    found = vocabularies()
    assert {"tokenizer.json", "vocab.json", "merges.txt", "source.spm", "emoji.json"} <= found
    for name in sorted({*found, *PROCESSORS, GENERATION_CONFIG_NAME, *OTHERS}):
        assert matches(name, COPIED), name
        assert matches(name, ALLOWED), name
        assert not matches(name, IGNORED), name


def test_the_files_come_along_byte_for_byte_and_code_under_their_names_does_not(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    for name in {*PROCESSORS, *OTHERS}:
        (source.folder / name).write_text(f'{{"file":  "{name}"}}')
    for suffix in CODE:
        (source.folder / f"tokenizer{suffix}").write_text("raise SystemExit")
    write_quantized(source, tmp_path / "out", CT, [scheme(4, 32, True)])
    for name in {*PROCESSORS, *OTHERS}:
        assert (tmp_path / "out" / name).read_bytes() == (source.folder / name).read_bytes(), name
    assert not [file for file in (tmp_path / "out").iterdir() if file.suffix in CODE]


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A model with a tokenizer, whose configurations name code of the repository, which lies beside them."""
    folder = tmp_path_factory.mktemp("coded")
    source = tiny_llama(folder / "model")
    words = make_tiny_model(folder / "words", Recipe(vocabulary=400, width=32, intermediate=32, blocks=1, steps=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source.folder / name).write_bytes((words / name).read_bytes())
    told: dict[str, dict[str, Any]] = {
        "config.json": {"auto_map": CODE_OF, "custom_pipelines": {"text-generation": {"impl": "x.Pipeline"}}},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}},
        "generation_config.json": {"auto_map": CODE_OF},
        "processor_config.json": {"image_processor": {"auto_map": {"AutoImageProcessor": "x.X"}}, "size": 3},
        "video_preprocessor_config.json": {"auto_map": {"AutoVideoProcessor": "x.X"}},
    }
    for name, more in told.items():
        file = source.folder / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(content | more))
    for name in ("configuration_x", "modeling_x", "tokenization_x", "x"):
        (source.folder / f"{name}.py").write_text("raise SystemExit\n")
    return Source(source.folder, json.loads((source.folder / "config.json").read_text()), source.tensors)


@pytest.mark.parametrize("export_format", [CT, NATIVE, MERGED])
@pytest.mark.parametrize("options", [{"trust_remote_code": trusted} for trusted in (True, False)], ids=str)
def test_no_configuration_of_a_result_names_code(
    tmp_path: Path, coded: Source, export_format: ExportFormat, options: dict[str, bool]
) -> None:
    write_quantized(coded, tmp_path, export_format, [scheme(4, 32, True)])
    for file in tmp_path.glob("*.json"):
        assert not any(word in file.read_text() for word in ("auto_map", "custom_pipelines")), file.name
    config = AutoConfig.from_pretrained(tmp_path, **options)
    assert (type(config).__name__, config.hidden_size) == ("LlamaConfig", 64)
    tokens = AutoTokenizer.from_pretrained(tmp_path, **options)
    assert tokens("hello")["input_ids"] == AutoTokenizer.from_pretrained(coded.folder)("hello")["input_ids"]
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 2
    assert json.loads((tmp_path / "processor_config.json").read_text()) == {"image_processor": {}, "size": 3}
    if export_format is not NATIVE:
        AutoModelForCausalLM.from_pretrained(tmp_path, **options)


def test_a_configuration_that_is_no_json_or_too_deep_is_copied_as_it_is(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    deep = "[" * 100_000
    (source.folder / "processor_config.json").write_text(deep)
    (source.folder / "preprocessor_config.json").write_text("no JSON: auto_map")
    write_quantized(source, tmp_path / "out", CT, [scheme(4, 32, True)])
    assert (tmp_path / "out" / "processor_config.json").read_text() == deep
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == "no JSON: auto_map"


def test_only_the_names_of_code_are_taken_out() -> None:
    kept = {"a": [{"b": 1}, "auto_map"], "text_config": {"rope": None}}
    given = {"a": [{"b": 1, "auto_map": {}}, "auto_map"], "text_config": {"rope": None, "auto_map": {}}, "auto_map": []}
    assert without_code(given) == kept
