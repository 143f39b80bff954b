"""Small files of strangers, made here: each is refused with its code. None is of use against anything but these guards.

A case is a checkpoint's folder. What it changes of a sound one is in its name.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.api.checkpoints import CONFIG, with_header, write_checkpoint, write_index
from tests.domain.inputs.quantized.gguf_bytes import File, Tensor, array, number, text

CORRUPT, UNSUPPORTED = "corrupt_checkpoint", "unsupported_checkpoint"
ARCHITECTURE, UNSAFE = "unsupported_architecture", "unsafe_checkpoint"
FORBIDDEN = "source_forbidden"


@dataclass(frozen=True)
class Case:
    """A folder and the code of its refusal; `make` writes it into an empty folder."""

    name: str
    code: str
    make: Callable[[Path], None]


def cases() -> list[Case]:
    """All that a look at a checkpoint refuses."""
    parts = (headers(), indexes(), configs(), side_files(), other_files(), links(), quantized(), ggufs())
    found = [case for part in parts for case in part]
    assert len({case.name for case in found}) == len(found)
    return found


ENTRY: dict[str, Any] = {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}


def headers() -> Iterator[Case]:
    """Safetensors headers."""
    changed: dict[str, Mapping[str, object]] = {
        "unknown dtype": {"dtype": "Q9"},
        "a dtype of another type": {"dtype": 3},
        "no dtype": {"dtype": None},
        "a dtype that is a list": {"dtype": ["BF16"]},
        "another shape": {"shape": [3]},
        "no shape": {"shape": None},
        "a shape of text": {"shape": ["2"]},
        "a shape of halves": {"shape": [2.0]},
        "a shape of truths": {"shape": [True]},
        "a negative shape": {"shape": [-2]},
        "two negative sides": {"shape": [-1, -2]},
        "a shape beyond words": {"shape": [1 << 62, 1 << 62]},
        "too many sides": {"shape": [1] * 17 + [2]},
        "a side of many digits": {"shape": [10**300]},
        "one offset": {"data_offsets": [4]},
        "three offsets": {"data_offsets": [0, 2, 4]},
        "offsets that turn back": {"data_offsets": [4, 0]},
        "negative offsets": {"data_offsets": [-4, 0]},
        "an end beyond the file": {"shape": [200], "data_offsets": [0, 400]},
        "an end beyond words": {"shape": [1 << 62], "data_offsets": [0, 1 << 63]},
        "a hole before": {"data_offsets": [4, 8]},
        "offsets of text": {"data_offsets": ["0", "4"]},
        "offsets of halves": {"data_offsets": [0.0, 4.0]},
        "a key more": {"more": 1},
    }
    for name, change in changed.items():
        yield _weights(f"header: {name}", with_header({"a": {**ENTRY, **change}}, 4))
    pair = {"a": ENTRY, "b": {**ENTRY, "data_offsets": [2, 6]}}
    bodies: dict[str, bytes] = {
        "tensors overlap": with_header(pair, 6),
        "the same bytes twice": with_header({"a": ENTRY, "b": ENTRY}, 4),
        "a hole between": with_header({"a": ENTRY, "b": {**ENTRY, "data_offsets": [6, 10]}}, 10),
        "bytes behind": with_header({"a": ENTRY}, 5),
        "bytes that are missing": with_header({"a": ENTRY}, 3),
        "an entry that is a list": with_header({"a": [1]}, 0),
        "an entry that is nothing": with_header({"a": None}, 0),
        "a list": with_header([ENTRY], 4),
        "a text": with_header("a", 0),
        "a number": with_header(7, 0),
        "nothing": b"",
        "seven bytes": bytes(7),
        "a length of nothing": struct.pack("<Q", 0) + bytes(8),
        "a length of one": struct.pack("<Q", 1) + b"{}",
        "a length beyond the file": with_header({}, 0, claimed=1000),
        "a length beyond words": with_header({}, 0, claimed=(1 << 64) - 1),
        "a length beyond the limit": with_header({}, 0, claimed=100_000_001),
        "half a header": with_header({"a": ENTRY}, 4)[:30],
        "no JSON": struct.pack("<Q", 4) + b"abcd",
        "bytes that are no UTF-8": struct.pack("<Q", 4) + b"\xff\xfe{}",
        "zeros": bytes(64),
        "a name twice": struct.pack("<Q", 11) + b'{"a":1,"a":',
        "deep lists": _deep_header("[", "]"),
        "deep objects": _deep_header('{"a":', "}"),
        "a number of many digits": struct.pack("<Q", 5006) + b'{"a":' + b"9" * 5000 + b"}",
        "an archive": b"PK\x03\x04" + bytes(60),
        "a pickle": b"\x80\x02}q\x00." + bytes(60),
        "a GGUF file": b"GGUF" + bytes(60),
    }
    for name, body in bodies.items():
        yield _weights(f"header: {name}", body)
    yield _folder("header: more tensors than the configuration counts", CORRUPT, _many_tensors)
    yield _folder("header: longer than the configuration can fill", CORRUPT, _long_header)


def _deep_header(opens: str, closes: str) -> bytes:
    body = '{"a":' + opens * 3000 + "1" + closes * 3000 + "}"
    return struct.pack("<Q", len(body)) + body.encode()


def _many_tensors(folder: Path) -> None:
    """Tensors without numbers; one more than 128 layers of 128."""
    empty = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    body = "{" + ",".join(f'"{number:x}":{empty}' for number in range(128 * 128 + 1)) + "}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(body)) + body.encode())


def _long_header(folder: Path) -> None:
    """Eight million bytes that a file system need not store."""
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 8_000_000) + b"{")
    with file.open("r+b") as stream:
        stream.truncate(8_000_100)


def indexes() -> Iterator[Case]:
    """Indexes of shards."""
    maps: dict[str, object] = {
        "no map": None,
        "a map of nothing": {},
        "a list": ["model-00001-of-00002.safetensors"],
        "a file above": {"a": "../model.safetensors"},
        "a path": {"a": "folder/model.safetensors"},
        "a whole path": {"a": "/etc/hostname.safetensors"},
        "a path of Windows": {"a": "C:\\model.safetensors"},
        "a device of Windows": {"a": "model.safetensors:stream"},
        "a file with a zero": {"a": "model\0.safetensors"},
        "a file of another kind": {"a": "model.bin"},
        "a file that is not there": {"a": "model-00009-of-00009.safetensors"},
        "a number": {"a": 7},
        "nothing": {"a": None},
        "a list for a name": {"a": ["model-00001-of-00002.safetensors"]},
        "a long name": {"a": "m" * 300 + ".safetensors"},
        "two dots": {"a": ".."},
        "a tensor that is in no file": {"nowhere": "model-00001-of-00002.safetensors"},
    }
    for name, weight_map in maps.items():
        yield Case(f"index: {name}", CORRUPT, lambda folder, given=weight_map: _index(folder, given))  # type: ignore[misc]
    texts = {"no JSON": b"{", "a list": b"[]", "deep": b'{"weight_map":' + b"[" * 200 + b"]" * 200 + b"}", "empty": b""}
    for name, body in texts.items():
        yield Case(f"index: {name} in the file", CORRUPT, lambda folder, given=body: _index_bytes(folder, given))  # type: ignore[misc]
    yield Case("index: larger than its names fill", CORRUPT, lambda folder: _index_bytes(folder, b" " * 7_000_000))


def _index(folder: Path, weight_map: object) -> None:
    write_checkpoint(folder, shards=True)
    given: Any = weight_map
    write_index(folder, given)


def _index_bytes(folder: Path, body: bytes) -> None:
    write_checkpoint(folder, shards=True)
    (folder / "model.safetensors.index.json").write_bytes(body)


def configs() -> Iterator[Case]:
    """Configurations."""
    numbers: dict[str, tuple[object, ...]] = {
        "num_hidden_layers": (0, -1, 1025, 1 << 40, 2.0, "2", True, None, [2]),
        "hidden_size": (0, -64, 1 << 21, 10**30, 64.5, "64"),
        "intermediate_size": (-1, 1 << 21, "192"),
        "num_attention_heads": (0, -4, 1 << 21, False),
        "num_key_value_heads": (0, 1 << 21, "2"),
        "head_dim": (0, 1 << 21, -16),
        "vocab_size": (0, (1 << 24) + 1, -128, "128"),
        "max_position_embeddings": (1 << 29, -(1 << 29)),
        "sliding_window": (1 << 29, 1 << 60),
        "num_experts": ((1 << 16) + 1, -8, "8"),
        "num_local_experts": (1 << 30,),
        "n_routed_experts": (1 << 30,),
        "moe_intermediate_size": (1 << 30,),
        "num_labels": (1 << 17, -1),
        "ssm_state_size": (1 << 30,),
        "mamba_d_conv": (1 << 30,),
        "kv_lora_rank": (1 << 30,),
        "bos_token_id": (1 << 40,),
        "eos_token_id": ([1, 1 << 40],),
        "pretraining_tp": (1 << 60,),
        "image_size": (1 << 30,),
    }
    for name, values in numbers.items():
        for value in values:
            yield _config(f"config: {name} = {str(value)[:40]} ({type(value).__name__})", {name: value})
    yield _config("config: a number in a part", {"text_config": {"hidden_size": 1 << 40}})
    yield _config("config: a number in a part of a part", {"a": {"b": {"num_hidden_layers": 1 << 40}}})
    yield _config("config: a number in a list", {"layers": [{"head_dim": 1 << 40}]})
    yield _config("config: layers times experts", {"num_hidden_layers": 1000, "num_experts": 60_000})
    types: dict[str, object] = {"another": "xlnet", "none": None, "a number": 3, "a list": ["llama"], "empty": ""}
    for name, value in types.items():
        yield _config(f"config: a model_type that is {name}", {"model_type": value}, ARCHITECTURE)
    bodies = {
        "no JSON": b"{model_type: llama}",
        "half of it": b'{"model_type": "llama"',
        "empty": b"",
        "a list": b'["llama"]',
        "a text": b'"llama"',
        "bytes that are no UTF-8": b'{"model_type": "\xff"}',
        "deep lists": b'{"model_type": "llama", "a": ' + b"[" * 100 + b"]" * 100 + b"}",
        "very deep lists": b'{"model_type": "llama", "a": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        "deep objects": b'{"model_type": "llama", "a": ' + b'{"a":' * 990 + b"1" + b"}" * 991,
        "a number of many digits": b'{"vocab_size": ' + b"1" * 5000 + b"}",
        "larger than one is": b'{"model_type": "llama", "a": "' + b"a" * (4 << 20) + b'"}',
    }
    for name, body in bodies.items():
        yield _folder(f"config: {name}", CORRUPT, lambda folder, given=body: _write(folder, "config.json", given))  # type: ignore[misc]
    yield _folder("config: missing", CORRUPT, lambda folder: (folder / "config.json").unlink())


def side_files() -> Iterator[Case]:
    """Files beside the weights that are larger than any of their kind; a file system stores nothing of them."""
    sizes = {
        "chat_template.jinja": 1,
        "chat_template.json": 1,
        "tokenizer_config.json": 16,
        "generation_config.json": 1,
        "special_tokens_map.json": 4,
        "added_tokens.json": 16,
        "tokenizer.json": 128,
        "tokenizer.model": 128,
        "vocab.json": 64,
        "merges.txt": 64,
        "tekken.json": 128,
        "preprocessor_config.json": 4,
    }
    for name, mib in sizes.items():
        yield _folder(
            f"side file: {name} of {mib} MiB and more",
            CORRUPT,
            lambda folder, given=(name, mib): _sparse(folder / given[0], (given[1] << 20) + 1),  # type: ignore[misc]
        )


def other_files() -> Iterator[Case]:
    """Archives, pickles, and checkpoints of other programs, in place of weights."""
    kinds = {
        "pytorch_model.bin": UNSAFE,
        "model.pt": UNSAFE,
        "weights.pkl": UNSAFE,
        "model.onnx": UNSUPPORTED,
        "model.tflite": UNSUPPORTED,
        "tf_model.h5": UNSUPPORTED,
        "flax_model.msgpack": UNSUPPORTED,
        "model.nemo": UNSUPPORTED,
        "model.engine": UNSUPPORTED,
        "model.mlpackage": UNSUPPORTED,
        "adapter_config.json": UNSUPPORTED,
        "model_index.json": UNSUPPORTED,
        "consolidated.00.pth": UNSAFE,
        "consolidated.safetensors": UNSUPPORTED,
        "model.tar": UNSUPPORTED,
        "model.zip": UNSUPPORTED,
        "model.tar.gz": UNSUPPORTED,
    }
    for name, code in kinds.items():
        yield Case(f"file: {name} alone", code, lambda folder, given=name: _instead(folder, given))  # type: ignore[misc]


def links() -> Iterator[Case]:
    """Links that lead out of the folders that may be read."""
    targets = {"a file": "/etc/hostname", "a folder": "/etc", "a file above": "../../../../../../etc/hostname"}
    for name, target in targets.items():
        for link in ("model.safetensors", "config.json", "tokenizer.json"):
            yield _folder(
                f"link: {link} to {name}",
                FORBIDDEN,
                lambda folder, given=(link, target): _link(folder / given[0], given[1]),  # type: ignore[misc]
            )


def quantized() -> Iterator[Case]:
    """Settings of quantized sources, and tensors that do not fit them; each weight `a` has the parts of its kind."""
    settings: dict[str, dict[str, Any]] = {
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        "fp8": {"quant_method": "fp8", "weight_block_size": [32, 32]},
        "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    }
    parts: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
        "gptq": {
            **{"qweight": ("I32", (8, 64)), "qzeros": ("I32", (2, 8)), "scales": ("F16", (2, 64))},
            **{"g_idx": ("I32", (64,))},
        },
        "awq": {"qweight": ("I32", (64, 8)), "qzeros": ("I32", (2, 8)), "scales": ("F16", (2, 64))},
        "fp8": {"weight": ("F8_E4M3", (64, 64)), "weight_scale_inv": ("F32", (2, 2))},
        "bitsandbytes": {
            **{"weight": ("U8", (2048, 1)), "weight.absmax": ("F32", (64,)), "weight.quant_map": ("F32", (16,))},
            **{"weight.quant_state.bitsandbytes__nf4": ("U8", (40,))},
        },
    }
    of_gptq = {"bits": (5, 0, -4, "4", True, None), "group_size": (0, -2, 1 << 40, "32")}
    of_awq = {"bits": (3, 8, "4"), "group_size": (64, 0, "32"), "version": ("gemv_fast", 3)}
    unread = {("gptq", "bits", 5), ("awq", "bits", 3), ("awq", "bits", 8)}
    of_fp8 = {"weight_block_size": ([0, 32], 32, "32", [32], [64, 64], [1 << 40, 32])}
    wrong: dict[str, dict[str, tuple[Any, ...]]] = {"gptq": of_gptq, "awq": of_awq, "fp8": of_fp8}
    for kind, fields in wrong.items():
        for name, values in fields.items():
            for value in values:
                given = settings[kind] | {name: value}
                known = name != "version" and not (isinstance(value, int) and (kind, name, value) in unread)
                code = CORRUPT if known else UNSUPPORTED
                yield _quantized(f"{kind}: {name} = {value!r}", given, parts[kind], code)
    for kind, tensors in parts.items():
        for part in tensors:
            for change, shape in (("of one dimension more", (*tensors[part][1], 1)), ("shorter", (1,))):
                if part == "weight_scale_inv" and shape == (1,):
                    continue  # the scale of a whole weight
                changed = tensors | {part: (tensors[part][0], shape)}
                yield _quantized(f"{kind}: {part} {change}", settings[kind], changed)
    for method in ("eetq", "aqlm", "hqq", "quanto", "vptq", "nonsense", 3, None):
        yield _quantized(f"quantized by {method}", {"quant_method": method}, parts["gptq"], ARCHITECTURE)


def ggufs() -> Iterator[Case]:
    """GGUF files."""
    sound, key = File(), b"general.name"
    files: dict[str, File] = {
        "another magic": sound.but(magic=b"GGML"),
        "version 0": sound.but(version=0),
        "version 1": sound.but(version=1),
        "a version of the other end": sound.but(version=3 << 24),
        "more tensors than there are": sound.but(tensor_count=5),
        "tensors beyond words": sound.but(tensor_count=(1 << 64) - 1),
        "more pairs than there are": sound.but(pair_count=9),
        "pairs beyond words": sound.but(pair_count=(1 << 64) - 1),
        "no architecture": sound.but(pairs=()),
        "data that are missing": sound.but(data=0),
        "a tensor twice": sound.but(tensors=(Tensor(b"a"), Tensor(b"a", offset=512))),
        "a type that is none": sound.but(tensors=(Tensor(b"a", kind=999),)),
        "no sides": sound.but(tensors=(Tensor(b"a", sides=()),)),
        "five sides": sound.but(tensors=(Tensor(b"a", sides=(1, 1, 1, 1, 1)),)),
        "sides beyond words": sound.but(tensors=(Tensor(b"a", sides=(1 << 63, 2)),)),
        "sides that wrap around": sound.but(tensors=(Tensor(b"a", sides=(1 << 32, 1 << 32)),)),
        "an offset beyond the file": sound.but(tensors=(Tensor(b"a", offset=1 << 40),)),
        "an offset that wraps around": sound.but(tensors=(Tensor(b"a", offset=(1 << 64) - 32),)),
        "an offset between": sound.but(tensors=(Tensor(b"a", offset=7),)),
        "more dimensions than sides": sound.but(tensors=(Tensor(b"a", dimensions=4),)),
        "an array beyond words": sound.but(pairs=(array(key, 4, (1 << 64) - 1, b""),)),
        "an array of nothing known": sound.but(pairs=(array(key, 77, 1, bytes(8)),)),
        "a text beyond the file": sound.but(pairs=(text(key, 1 << 50),)),
        "an alignment of nothing": sound.but(pairs=(number(b"general.alignment", 4, 0),)),
        "an alignment of three": sound.but(pairs=(number(b"general.alignment", 4, 3),)),
    }
    versions = {"version 0", "version 1", "a version of the other end"}
    unread = versions | {"no architecture", "a type that is none"}
    for name, file in files.items():
        code = UNSUPPORTED if name in unread else CORRUPT
        yield Case(f"gguf: {name}", code, lambda folder, given=file: _gguf(folder, given.bytes()))  # type: ignore[misc]
    whole = sound.bytes()
    for size in (0, 3, 4, 8, 20, 24, 40, 60, 90, len(whole) // 8):
        yield Case(f"gguf: {size} bytes", CORRUPT, lambda folder, given=whole[:size]: _gguf(folder, given))  # type: ignore[misc]


def _weights(name: str, body: bytes) -> Case:
    return _folder(name, CORRUPT, lambda folder: _write(folder, "model.safetensors", body))


def _config(name: str, change: Mapping[str, object], code: str = CORRUPT) -> Case:
    return Case(name, code, lambda folder: _config_file(folder, change))


def _config_file(folder: Path, change: Mapping[str, object]) -> None:
    write_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))


def _folder(name: str, code: str, spoil: Callable[[Path], object]) -> Case:
    """A sound checkpoint that is spoilt then."""

    def make(folder: Path) -> None:
        write_checkpoint(folder)
        spoil(folder)

    return Case(name, code, make)


def _write(folder: Path, name: str, body: bytes) -> None:
    (folder / name).write_bytes(body)


def _sparse(file: Path, size: int) -> None:
    with file.open("wb") as stream:
        stream.truncate(size)


def _instead(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / name).write_bytes(b"PK\x03\x04" + bytes(60))


def _link(place: Path, target: str) -> None:
    place.unlink(missing_ok=True)
    place.symlink_to(target)


def _gguf(folder: Path, body: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.gguf").write_bytes(body)


def _quantized(
    name: str, settings: Mapping[str, object], parts: Mapping[str, tuple[str, tuple[int, ...]]], code: str = CORRUPT
) -> Case:
    def make(folder: Path) -> None:
        _config_file(folder, {"quantization_config": settings})
        sizes = {"I32": 4, "F16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}
        header, position = {}, 0
        for part, (dtype, shape) in parts.items():
            size = sizes[dtype]
            for side in shape:
                size *= side
            place = [position, position + size]
            header[f"a.{part}"] = {"dtype": dtype, "shape": list(shape), "data_offsets": place}
            position += size
        (folder / "model.safetensors").write_bytes(with_header(header, position))

    return Case(f"quantized: {name}", code, make)
