"""Memory and disk of a job without a model, in a process of its own, on a checkpoint of holes.

BITWRIGHT_TEST_SPARSE_GB sets its size; 20, with a shard for each fifth, takes about half an hour of one core.
"""

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

from tests.api.checkpoints import with_header

GB = 1000**3
SIZE = float(os.environ.get("BITWRIGHT_TEST_SPARSE_GB", "0.6"))
SHARDS = 4
ALLOWED = 3 * GB if SIZE >= 6 else 1.2 * GB
"""Of anonymous memory: two formats hold 256 MiB of a shard each, and the largest matrix is 2 % of the checkpoint."""


def sparse(folder: Path, size: float) -> Path:
    """A checkpoint of about so many bytes, whose tensors are holes in files: nothing is on the disk but headers."""
    folder.mkdir()
    hidden = 1024 if size < 6 * GB else 8192
    wide = 3584 if size < 6 * GB else 28672
    layer = {"self_attn.q_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
    layers = max(SHARDS, round(size / (2 * sum(prod(shape) for shape in layer.values()))))
    weight_map: dict[str, str] = {}
    files = [list(range(layers))[n::SHARDS] for n in range(SHARDS)]
    for number, own in enumerate(files, start=1):
        shapes = {f"model.layers.{n}.{name}.weight": shape for n in own for name, shape in layer.items()}
        shapes |= {"model.embed_tokens.weight": (32_000, hidden)} if number == 1 else {}
        header, position = {}, 0
        for name, shape in shapes.items():
            end = position + 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
            position = end
        file = folder / f"model-0000{number}-of-0000{SHARDS}.safetensors"
        start = with_header(header, 0)
        with file.open("wb") as stream:
            stream.write(start)
            stream.truncate(len(start) + position)
        weight_map |= dict.fromkeys(shapes, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "unheard_of", "hidden_size": hidden, "num_hidden_layers": layers, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_large_checkpoint_takes_little_memory_and_no_more_disk_than_source_and_result(tmp_path: Path) -> None:
    source, workspace = sparse(tmp_path / "source", SIZE * GB), tmp_path / "workspace"
    command = [sys.executable, "-m", "tests.engine.weights_only.memory", str(source), str(workspace)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    found = json.loads(done.stdout)
    assert found["anonymous"] <= ALLOWED, found
    assert found["disk"] <= 1.01 * found["made"], "shards are written once"
    assert found["made"] > 0.25 * SIZE * GB
