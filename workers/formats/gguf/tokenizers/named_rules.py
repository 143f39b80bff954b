"""Rules that the metadata of a GGUF file name for its tokenizer, put into the one that transformers makes of the file.

A file names the rules by which a text is split before merges (`tokenizer.ggml.pre`). transformers knows the names of
some and splits by GPT-2's rules wherever it knows none, without a word; digits and other scripts are other tokens then.
Names and rules are those of llama.cpp (`src/llama-vocab.cpp`), written as tokenizer.json has them.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from bitwright.errors import UnsupportedCheckpoint
from workers.formats.gguf.tokenizers.byte_level import (
    BLOOM,
    DEEPSEEK,
    DEEPSEEK_CODER,
    DEEPSEEK_LLM,
    DIGIT,
    FALCON,
    GPT_4O,
    LLAMA_3,
    QWEN_2,
    QWEN_3_5,
    SEED,
    TEKKEN,
)
from workers.formats.gguf.tokenizers.source import steps_of

MODEL, PRE, SPACE_PREFIX = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.add_space_prefix"
UNNAMED = frozenset({None, "default"})
"""Names in files that are older than names of rules: transformers' own reading stays."""
Steps = Sequence[Mapping[str, Any]]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
FILLED: Mapping[str, Mapping[str, Any]] = {"ByteLevel": BYTES, "Split": {"invert": False}}
GPT_2: Steps = ({**BYTES, "use_regex": True},)


def _isolating(*patterns: str) -> Steps:
    """Steps that take matches of the expressions apart, one after another, and then the bytes of each piece."""
    steps = [
        DIGITS
        if pattern == DIGIT
        else {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return (*steps, BYTES)


LIKE: Mapping[str, tuple[Steps, bool]] = MappingProxyType(
    {
        "gpt-2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion granite-docling exaone4": (GPT_2, False),
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": ((DIGITS, *GPT_2), False),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": (_isolating(LLAMA_3), True),
        "dbrx smaug-bpe glm4 chatglm-bpe": (_isolating(LLAMA_3), False),
        "qwen2 deepseek-r1-qwen kormo stablelm2 megrez hunyuan solar-open grok-2": (_isolating(QWEN_2), False),
        "qwen35": (_isolating(QWEN_3_5), False),
        "gpt-4o llama4 kanana2 talkie minimax-m2": (_isolating(GPT_4O), False),
        "tekken": (_isolating(TEKKEN), True),
        "seed-coder": (_isolating(SEED), False),
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4": (_isolating(*DEEPSEEK), False),
        "deepseek-coder": (_isolating(*DEEPSEEK_CODER), False),
        "deepseek-llm": (_isolating(*DEEPSEEK_LLM), False),
        "bloom poro-chat gpt3-finnish": (_isolating(BLOOM), False),
        "falcon": (tuple({**FILLED.get(str(step["type"]), {}), **step} for step in FALCON), False),
    }
)
"""Names that share rules -> their steps, and whether words that are tokens are taken as they are (`ignore_merges`)."""
RULES: Mapping[str, tuple[Steps, bool]] = MappingProxyType(
    {name: rules for names, rules in LIKE.items() for name in names.split()}
)


def check_rules(metadata: Mapping[str, object], file: str) -> None:
    """Refuses a byte-level tokenizer whose rules have a name that is not known here.

    Raises:
        UnsupportedCheckpoint: its text would be split by other rules than the model's.
    """
    name = metadata.get(PRE)
    if metadata.get(MODEL) == "gpt2" and name not in UNNAMED and name not in RULES:
        detail = f"{file} splits text by rules named {name!r} (tokenizer.ggml.pre), which are not known here"
        hint = "put tokenizer.json and tokenizer_config.json of the model that it was made from beside the file"
        raise UnsupportedCheckpoint(detail, field="model", value=str(name), hint=hint)


def with_rules(described: Mapping[str, Any], metadata: Mapping[str, object]) -> dict[str, Any]:
    """A tokenizer.json, decoded, with the rules that a file's metadata name."""
    made = dict(described)
    rules = RULES.get(str(metadata.get(PRE))) if metadata.get(MODEL) == "gpt2" else None
    if rules is not None:
        steps, whole_words = rules
        made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [dict(step) for step in steps]}
        made["model"] = {**described["model"], "ignore_merges": whole_words}
    elif metadata.get(MODEL) == "llama" and metadata.get(SPACE_PREFIX) is False:
        made["pre_tokenizer"] = _without_space(described.get("pre_tokenizer"))
    return made


def _without_space(pre_tokenizer: Any) -> Any:
    """Steps that put no space before a text."""
    steps = [
        {**step, "prepend_scheme": "never"} if step.get("type") == "Metaspace" else step
        for step in steps_of(pre_tokenizer, "pretokenizers")
    ]
    return {"type": "Sequence", "pretokenizers": steps} if steps else None
