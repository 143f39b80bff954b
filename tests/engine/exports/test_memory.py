"""Memory of an export, in a process of its own, on a native checkpoint of holes: codes and scales that are all zero.

BITWRIGHT_TEST_SPARSE_GB sets its size; 4, in shards of 1 GB, takes some minutes of one core.
"""

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

from tests.api.checkpoints import with_header
from tests.formats.examples import REPORT

GB = 1000**3
SIZE = float(os.environ.get("BITWRIGHT_TEST_SPARSE_GB", "0.4"))
SHARDS = 4
GROUP = 128


def sparse_native(folder: Path, size: float) -> Path:
    """A native checkpoint of about so many bytes, 4 bits; nothing is on the disk but headers and shapes."""
    folder.mkdir(parents=True)
    hidden, wide = (1024, 3584) if size < 2 * GB else (4096, 14_336)
    layer = {"self_attn.q_proj": (hidden, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
    layers = max(SHARDS, round(2 * size / sum(prod(shape) for shape in layer.values())))
    linears: dict[str, object] = {}
    weight_map: dict[str, str] = {}
    for number in range(1, SHARDS + 1):
        small, large = dict[str, tuple[str, list[int], bytes]](), dict[str, tuple[str, list[int], int]]()
        for index in range(layers)[number - 1 :: SHARDS]:
            for last, (rows, columns) in layer.items():
                name = f"model.layers.{index}.{last}"
                linears[name] = {
                    "form": "affine",
                    "bits": 4,
                    "group_size": GROUP,
                    "symmetric": True,
                    "dtype": "bfloat16",
                }
                small[f"{name}.shape"] = ("I64", [2], b"".join(n.to_bytes(8, "little") for n in (rows, columns)))
                large[f"{name}.codes"] = ("U8", [rows, columns // 2], rows * columns // 2)
                large[f"{name}.scale"] = ("BF16", [rows, columns // GROUP], 2 * rows * columns // GROUP)
        if number == 1:
            large["model.embed_tokens.weight"] = ("BF16", [32_000, hidden], 64_000 * hidden)
        file = folder / f"weights-0000{number}-of-0000{SHARDS}.safetensors"
        header, position = dict[str, object](), 0
        sizes = {name: (dtype, shape, len(content)) for name, (dtype, shape, content) in small.items()} | large
        for name, (dtype, shape, size_of) in sizes.items():
            end = position + size_of
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            position = end
        start = with_header(header, 0)
        with file.open("wb") as stream:
            stream.write(start + b"".join(content for _, _, content in small.values()))
            stream.truncate(len(start) + position)
        weight_map |= dict.fromkeys(header, file.name)
    described = {"format": "bitwright", "version": 2, "linears": linears}
    config = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "dtype": "bfloat16"}
    for file_name, content in (
        ("bitwright.json", described),
        ("config.json", config),
        ("report.json", REPORT.model_dump(mode="json")),
        ("weights.safetensors.index.json", {"weight_map": weight_map}),
    ):
        (folder / file_name).write_text(json.dumps(content))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("formats", [["compressed-tensors"], ["compressed-tensors", "gptq", "mlx"]], ids=len)
def test_a_large_checkpoint_takes_little_memory(tmp_path: Path, formats: list[str]) -> None:
    native, workspace = sparse_native(tmp_path / "base" / "native", SIZE * GB), tmp_path / "workspace"
    command = [sys.executable, "-P", "-m", "tests.engine.exports.memory", str(native), str(workspace), *formats]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    sys.stdout.write(f"\n{formats}: {found}\n")
    assert found["anonymous"] <= GB, found
    assert found["made"] > 0.9 * SIZE * GB * len(formats)
