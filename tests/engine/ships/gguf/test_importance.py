"""The importance matrix of a mixture of experts: a matrix for each expert, as llama.cpp stacks them."""

from pathlib import Path

import gguf
import pytest

from tests.engine.conftest import run_job
from tests.engine.ships.test_experts_ship import source

TEXT = {"dataset": "builtin", "num_samples": 4, "sequence_length": 32}
EXPERTS, CHOSEN, TOKENS = 12, 3, 128


@pytest.mark.filterwarnings("ignore")
def test_each_expert_has_the_tokens_that_it_got(tmp_path: Path) -> None:
    model = source(tmp_path / "model", "qwen2_moe")
    modules = {"ignore": ["lm_head", "*down_proj"]}
    run_job(
        model, tmp_path / "work", scheme="q8_0", modules=modules, evaluation=None, formats=["gguf"], calibration=TEXT
    )
    (file,) = (tmp_path / "work").rglob("model.imatrix")
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    for block in (0, 1):
        counts = stored[f"blk.{block}.ffn_up_exps.weight.counts"]
        assert counts.shape == (EXPERTS, 1)
        assert counts.sum() == CHOSEN * TOKENS
        assert stored[f"blk.{block}.attn_q.weight.counts"].tolist() == [[TOKENS]]
        sums = stored[f"blk.{block}.ffn_up_exps.weight.in_sum2"]
        assert sums.shape == (EXPERTS, 32)
        assert ((sums > 0).any(axis=1) == (counts[:, 0] > 0)).all()
