"""Configurations, tokenizers, chat templates and texts of strangers, made here, with limits that make each harmless.

Each is read as an attempt reads it, by the child that does that for it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from app.domain.request.job_request import JobRequest
from tests.api.checkpoints import write_checkpoint
from workers.disk.orders import AttemptOrder

CORRUPT, DATASET, LIMIT = "corrupt_checkpoint", "invalid_dataset", "over_limit"
MIB = 1 << 20
WORDS = [
    "the",
    "a",
    "with",
    "statement",
    "is",
    "used",
    "to",
    "wrap",
    "execution",
    "of",
    "block",
    "methods",
    "text",
    "some",
    "more",
    "zqprobe",
]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
TALK = {"messages": [{"role": "user", "content": "some text"}, {"role": "assistant", "content": "more text"}]}
ROWS = [{"text": "the statement is used to wrap the execution of a block " * 8}]


@dataclass(frozen=True)
class Input:
    """A job's input that is read within limits.

    code          of its refusal; None: it is read
    config        of the model, beside a sound one's
    tokenizer     tokenizer.json: changes of a sound one's parts, or all of its text
    template      chat template
    rows          of the text: objects, or lines as they are
    seconds, memory   that it may take
    """

    name: str
    code: str | None
    config: Mapping[str, object] = field(default_factory=dict)
    tokenizer: Mapping[str, object] | str = field(default_factory=dict)
    template: object = TEMPLATE
    rows: list[object] = field(default_factory=lambda: list(ROWS))
    seconds: float = 30.0
    memory: int = 512 * MIB

    def order(self, folder: Path) -> AttemptOrder:
        """The order of a job that reads it; its files are put into `folder`."""
        model = write_checkpoint(folder / "model", self.config)
        (model / "tokenizer.json").write_text(self._tokenizer(), encoding="utf-8")
        settings = {"eos_token": "</s>", "chat_template": self.template, "tokenizer_class": "PreTrainedTokenizerFast"}
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
        text = folder / "rows.jsonl"
        lines = (row if isinstance(row, str) else json.dumps(row) for row in self.rows)
        text.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape") + b"\n")
        part = {"dataset": str(text), "num_samples": 2, "sequence_length": 16}
        body = {"model": str(model), "method": "gptq", "bits": 4, "calibration": part, "evaluation": None}
        return AttemptOrder(
            job_id="job_1",
            attempt=1,
            request=JobRequest.parse(body),
            model_path=str(model),
            calibration_path=str(text),
            device="cpu",
            input_seconds=self.seconds,
            input_memory_bytes=self.memory,
        )

    def _tokenizer(self) -> str:
        return (
            self.tokenizer if isinstance(self.tokenizer, str) else json.dumps({**sound_tokenizer(), **self.tokenizer})
        )


def sound_tokenizer() -> dict[str, Any]:
    """A tokenizer of a few words."""
    vocabulary = {word: number for number, word in enumerate(["</s>", "[UNK]", "<", ">", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    described: dict[str, Any] = json.loads(made.to_str())
    described["added_tokens"] = [
        {
            **{"id": 0, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False},
            **{"normalized": False, "special": True},
        }
    ]
    return described


def inputs() -> list[Input]:
    """All of them."""
    return [*templates(), *tokenizers(), *rows(), *configurations()]


def templates() -> Iterator[Input]:
    """Chat templates: programs that are rendered in a sandbox, which ends neither loops nor what they write."""
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    sources = {
        "does not parse": "{% for m in messages %}",
        "calls what is not there": "{{ nothing() }}",
        "reads what is not there": "{{ nothing.more.less }}",
        "raises": "{{ raise_exception('no') }}",
        "divides by nothing": "{{ 1 // 0 }}",
        "reaches for classes": "{{ ''.__class__.__mro__ }}",
        "reaches for globals": "{{ messages.__init__.__globals__ }}",
        "reaches for code": "{{ raise_exception.__code__ }}",
        "changes the messages": "{{ messages.append(1) }}",
        "includes a file": "{% include '/etc/hostname' %}",
        "imports a file": "{% import '/etc/hostname' as x %}",
        "extends a file": "{% extends '/etc/hostname' %}",
        "counts beyond the sandbox": "{% for a in range(1000000000) %}{% endfor %}",
        "calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "writes nothing": "{% if false %}{{ messages }}{% endif %}",
        "writes roles alone": "{% for m in messages %}{{ m['role'] }}{% endfor %}",
        "leaves the answer out": "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
        "formats with a stranger's format": "{{ '%1000000s' % messages.__dict__ }}",
    }
    for name, source in sources.items():
        yield Input(f"template: {name}", DATASET, template=source, rows=[TALK])
    yield Input("template: is not there", DATASET, template=None, rows=[TALK])
    yield Input("template: does not end", LIMIT, template=loop + TEMPLATE, rows=[TALK], seconds=1.5)
    for name, size in (("multiplies a text", "'a' * 900000000"), ("multiplies a list", "[messages] * 900000000")):
        source = "{% set x = " + size + " %}" + TEMPLATE
        yield Input(f"template: {name}", LIMIT, template=source, rows=[TALK], memory=192 * MIB)


def tokenizers() -> Iterator[Input]:
    """tokenizer.json."""
    for name, body in {
        "no JSON": "{",
        "empty": "",
        "a list": "[]",
        "a text": '"a"',
        "an empty object": "{}",
        "deep": '{"model": ' + "[" * 3000 + "]" * 3000 + "}",
    }.items():
        yield Input(f"tokenizer: {name}", CORRUPT, tokenizer=body)
    model = sound_tokenizer()["model"]
    changes: dict[str, Mapping[str, object]] = {
        "no model": {"model": None},
        "a model of no kind": {"model": {"type": "Nothing"}},
        "a model of another shape": {"model": 7},
        "ids that are text": {"model": {**model, "vocab": {"a": "b"}}},
        "ids that are halves": {"model": {**model, "vocab": {"a": 0.5}}},
        "negative ids": {"model": {**model, "vocab": {"a": -1}}},
        "ids beyond words": {"model": {**model, "vocab": {"a": 1 << 40}}},
        "a vocabulary that is a list": {"model": {**model, "vocab": [1, 2]}},
        "merges of what is not there": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}},
        "merges that are none": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [3]}},
        "a normalizer of no kind": {"normalizer": {"type": "Nothing"}},
        "a pattern that is none": {
            "normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
        },
        "a pre-tokenizer of no kind": {"pre_tokenizer": {"type": "Nothing"}},
        "a decoder of no kind": {"decoder": {"type": "Nothing"}},
        "added tokens that are none": {"added_tokens": [1]},
        "another version": {"version": "9.0"},
    }
    for name, change in changes.items():
        yield Input(f"tokenizer: {name}", CORRUPT, tokenizer=change)
    drops = {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    yield Input("tokenizer: drops every text", DATASET, tokenizer={"normalizer": drops})
    grows = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 30}
    many = {"normalizer": {"type": "Sequence", "normalizers": [grows] * 6}}
    yield Input("tokenizer: multiplies every text", LIMIT, tokenizer=many, memory=192 * MIB, seconds=5)


def rows() -> Iterator[Input]:
    """Rows of a text."""
    message = {"role": "user", "content": "text"}
    for name, row in {
        "no JSON": "{",
        "a list": "[]",
        "a number": "7",
        "no text": {},
        "a text that is a number": {"text": 7},
        "a text that is nothing": {"text": None},
        "a text that is empty": {"text": ""},
        "a prompt alone": {"prompt": "a"},
        "two kinds": {"text": 3, "messages": 3},
        "messages that are none": {"messages": 7},
        "no messages": {"messages": []},
        "a message that is a text": {"messages": ["a"]},
        "a message without a role": {"messages": [{"content": "a"}]},
        "a role of no kind": {"messages": [{**message, "role": 7}]},
        "a content of no kind": {"messages": [{**message, "content": 7}]},
        "an image": {
            "messages": [{**message, "content": [{"type": "image_url", "image_url": "file:///etc/hostname"}]}]
        },
        "tools that are none": {"messages": [message], "tools": 7},
        "bytes that are no UTF-8": '{"text": "\udcff"}',
        "deep": '{"text": "a", "more": ' + "[" * 100 + "]" * 100 + "}",
        "very deep": '{"text": "a", "more": ' + "[" * 9000 + "]" * 9000 + "}",
        "a number of many digits": '{"text": "a", "more": ' + "9" * 5000 + "}",
        "a name twice, and a text": "text",
        "too little": {"text": "text"},
    }.items():
        yield Input(f"rows: {name}", DATASET, rows=[row])


def configurations() -> Iterator[Input]:
    """config.json, beyond what numbers alone tell."""
    kinds: dict[str, Mapping[str, object]] = {
        "a norm of text": {"rms_norm_eps": "small"},
        "an activation of no kind": {"hidden_act": "nothing"},
        "a rotary embedding of no kind": {"rope_scaling": {"rope_type": "nothing", "factor": 2.0}},
        "layers of no kind": {"model_type": "qwen3", "layer_types": ["nothing", "nothing"]},
    }
    for name, change in kinds.items():
        yield Input(f"config: {name}", "refused", config=change)
    heads = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 64, "rotary_dim": 16}
    positions = {"model_type": "gptj", "n_positions": 1 << 27, **heads}
    yield Input("config: buffers of gigabytes", CORRUPT, config=positions)
    dropped: dict[str, Mapping[str, object]] = {
        "an implementation": {"attn_implementation": "nobody/kernel", "_attn_implementation": "flash_attention_2"},
        "an implementation within": {"_attn_implementation_internal": "nothing", "experts_implementation": "nothing"},
        "code of its own": {"auto_map": {"AutoConfig": "nobody--configuration.Config"}},
        "a method's name": {"to_dict": 1, "get_text_config": 1, "base_model_tp_plan": 1},
        "labels": {"num_labels": 60_000},
    }
    for name, change in dropped.items():
        yield Input(f"config: {name} is left out", None, config=change)
