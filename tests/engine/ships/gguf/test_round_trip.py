"""A GGUF file as source keeps the bytes of what a job does not quantize; experts of a block have one type in it."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from bitwright.errors import FormatCannotHold
from tests.engine.conftest import run_job
from tests.engine.model.families import save_small_model
from tests.engine.ships.gguf_models import save_tokenizer


def bytes_of(file: Path) -> dict[str, tuple[str, Any]]:
    return {t.name: (t.tensor_type.name, np.array(t.data)) for t in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_not_asked_for_keeps_its_bytes(bits: int, small_model: Path, tmp_path: Path) -> None:
    """Norms in fp32, q and k with their rows in llama.cpp's order, blocks of another width: only one linear is new."""
    first = run_job(small_model, tmp_path / "first", formats=["gguf"], bits=5, evaluation=None)
    source = tmp_path / "source"
    source.mkdir()
    before = tmp_path / "first" / first.checkpoints["gguf"] / "model.gguf"
    (source / "model.gguf").symlink_to(before)
    ignore = ["lm_head", "*.self_attn.*", "*.gate_proj", "*.up_proj", "model.layers.0.*", "model.layers.1.*"]
    modules = {"ignore": ignore}
    again = run_job(source, tmp_path / "again", formats=["gguf"], bits=bits, evaluation=None, modules=modules)
    old = bytes_of(before)
    new = bytes_of(tmp_path / "again" / again.checkpoints["gguf"] / "model.gguf")
    assert old.keys() == new.keys()
    changed = {name for name in old if old[name][0] != new[name][0] or not np.array_equal(old[name][1], new[name][1])}
    assert changed == {"blk.2.ffn_down.weight"}
    assert {kind for kind, _ in old.values()} == {"Q5_0", "BF16", "F32"}


def test_experts_of_several_schemes_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    save_small_model(
        tmp_path / "source", "mixtral", vocab_size=400, hidden_size=64, intermediate_size=64, sliding_window=None
    )
    save_tokenizer(tmp_path / "source")
    for modules in ({"overrides": {"*.experts.3.*": {"bits": 8}}}, {"ignore": ["lm_head", "*.experts.11.down_proj"]}):
        with pytest.raises(FormatCannotHold, match="all experts of a block in one tensor of one type") as refused:
            run_job(tmp_path / "source", tmp_path / "job", formats=["gguf"], modules=modules)
        assert refused.value.field == "formats.0"
    assert not list((tmp_path / "job" / "state").glob("*.safetensors"))
