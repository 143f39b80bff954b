"""Adapters as stock peft reads them: full strength on every linear, whatever differs between linears."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from app.domain.formats import ExportFormat
from app.domain.methods import Scheme
from bitwright.errors import FormatCannotHold
from tests.formats.examples import (
    REPORT,
    Made,
    Source,
    codebook_made,
    linears,
    logits,
    random_result,
    scheme,
    tiny_llama,
    write_quantized,
    write_with,
)
from tests.reports import REPORTS
from workers.formats import peft
from workers.formats.checkpoint import CheckpointWriter
from workers.formats.peft import targets
from workers.formats.registry import adapter_base, open_writer, open_writers
from workers.formats.stored_linear import StoredLowRank

MERGED, PEFT = ExportFormat.MERGED, ExportFormat.PEFT
BOTH = (MERGED, PEFT)
W3 = scheme(3, 16, False)
SAME = [Made(W3, rank=3)]
DIFFERENT = [Made(W3, rank=3), codebook_made(4, 32, rank=5), Made(W3, rank=3, alpha=1.0), codebook_made(2, 16)]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return tiny_llama(tmp_path_factory.mktemp("source"), torch.float32)


def write_both(source: Source, folder: Path, made: Sequence[Made | Scheme]) -> nn.Module:
    """Base and adapter; the original model with the corrected weights."""
    write_quantized(source, folder / "merged", MERGED, made, formats=BOTH)
    return write_with(open_writer(folder / "peft", PEFT, source, BOTH), source, made)


def config(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("made", [SAME, DIFFERENT], ids=["same", "different"])
def test_base_and_adapter_together_are_the_corrected_model(
    tmp_path: Path, source: Source, made: Sequence[Made]
) -> None:
    expected = write_both(source, tmp_path, made)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    model = PeftModel.from_pretrained(base, tmp_path / "peft")
    assert (logits(model) - logits(expected)).abs().max() < 1e-5
    with model.disable_adapter():
        assert (logits(model) - logits(expected)).abs().max() > 1e-2
    merged: dict[str, nn.Linear] = dict(linears(model.merge_and_unload()))
    for name, linear in linears(expected):
        assert torch.allclose(merged[name].weight, linear.weight, rtol=0, atol=1e-6), name


def test_merging_in_half_precision_gives_the_bits_of_the_merged_format(tmp_path: Path) -> None:
    """`LinearResult.dequantize` is what peft makes of the same adapter."""
    source = tiny_llama(tmp_path / "source", torch.bfloat16)
    expected = write_both(source, tmp_path, DIFFERENT)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    merged = dict(linears(PeftModel.from_pretrained(base, tmp_path / "peft").merge_and_unload()))
    for name, linear in linears(expected):
        assert torch.equal(merged[name].weight, linear.weight), name


def test_the_file_holds_the_factors_as_they_were_made(tmp_path: Path, source: Source) -> None:
    write_both(source, tmp_path, DIFFERENT)
    tensors: dict[str, Tensor] = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    expected = random_result((64, 64), DIFFERENT[0], torch.float32, seed=0).low_rank
    assert expected is not None
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    assert torch.equal(tensors[f"{prefix}.lora_A.weight"], expected.a)
    assert torch.equal(tensors[f"{prefix}.lora_B.weight"], expected.b)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    adapted = [name for index, (name, _) in enumerate(linears(AutoModelForCausalLM.from_pretrained(source.folder)))
               if index % 4 != 3]  # fmt: skip
    assert len(tensors) == 2 * len(adapted)


def test_one_rank_for_all_needs_no_patterns(tmp_path: Path, source: Source) -> None:
    write_both(source, tmp_path, SAME)
    found = config(tmp_path / "peft")
    assert (found["r"], found["lora_alpha"], found["rank_pattern"], found["alpha_pattern"]) == (3, 16.0, {}, {})
    assert found["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_the_model_is_named_as_peft_and_the_hub_look_for_it(tmp_path: Path, source: Source) -> None:
    """By its id and commit where it is on the Hub; the card says that the base is another."""
    write_both(source, tmp_path, SAME)
    read = PeftConfig.from_pretrained(str(tmp_path / "peft"))
    assert (read.base_model_name_or_path, read.revision) == ("org/tiny", "abc")
    card = ModelCard.load(tmp_path / "peft" / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("org/tiny", "adapter")
    assert "`base_model_name_or_path` in `adapter_config.json` names `org/tiny`" in card.text
    assert "loads the original weights, which is not what was measured" in " ".join(card.text.split())
    writer = open_writer(tmp_path / "local", PEFT, source, BOTH)
    writer.add_linear("model.layers.0.mlp.up_proj", random_result((96, 64), SAME[0]))
    writer.finish()
    writer.describe(REPORT.model_copy(update={"model": REPORT.model.model_copy(update={"kind": "local"})}))
    assert PeftConfig.from_pretrained(str(tmp_path / "local")).base_model_name_or_path is None
    assert "base_model" not in (tmp_path / "local" / "README.md").read_text()


@pytest.mark.parametrize(
    ("made", "swaps"),
    [(SAME, True), ([Made(W3, rank=3, alpha=6.0), Made(W3, rank=5, alpha=10.0)], True), (DIFFERENT, False)],
    ids=["same", "one strength", "different"],
)
def test_the_card_warns_of_swapping_where_peft_does_it_wrongly(
    tmp_path: Path, source: Source, made: Sequence[Made], swaps: bool
) -> None:
    """peft looks for patterns by another name than a linear's while it swaps: what it makes of the adapter says so."""
    write_both(source, tmp_path, made)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tmp_path / "peft")
    loaded = logits(model)
    hotswap_adapter(model, str(tmp_path / "peft"), "default")
    assert torch.equal(logits(model), loaded) is swaps
    assert ("hotswap_adapter" in (tmp_path / "peft" / "README.md").read_text()) is not swaps


def test_linears_that_differ_have_patterns_of_their_own(tmp_path: Path, source: Source) -> None:
    write_both(source, tmp_path, DIFFERENT)
    found = config(tmp_path / "peft")
    assert (found["r"], found["lora_alpha"]) == (3, 16.0)
    assert found["rank_pattern"][r"model\.layers\.0\.self_attn\.k_proj"] == 5
    assert found["alpha_pattern"][r"model\.layers\.0\.self_attn\.v_proj"] == 1.0
    assert "model.layers.0.self_attn.o_proj" not in found["target_modules"]
    assert "model.layers.0.self_attn.q_proj" in found["target_modules"]


def test_targets_are_full_names_only_where_last_names_would_hit_others() -> None:
    adapted = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert targets(adapted, ["lm_head", "model.layers.0.mlp.down_proj"]) == ["up_proj"]
    assert targets(adapted, ["model.layers.2.mlp.up_proj"]) == adapted


def test_the_licence_comes_along_and_weights_do_not(tmp_path: Path, source: Source) -> None:
    write_both(source, tmp_path, SAME)
    assert {file.name for file in (tmp_path / "peft").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", *REPORTS, "README.md", "LICENSE")
    }


def test_a_result_without_factors_is_refused(tmp_path: Path, source: Source) -> None:
    writer = open_writer(tmp_path / "out", PEFT, source, (PEFT,))
    writer.add_linear("model.layers.0.mlp.up_proj", random_result((96, 64), W3))
    with pytest.raises(FormatCannotHold, match="no low-rank factors"):
        writer.finish()


def test_every_format_has_a_writer_in_a_folder_of_its_name(tmp_path: Path, source: Source) -> None:
    writers = open_writers(tmp_path, tuple(ExportFormat), source)
    assert writers.keys() == set(ExportFormat)
    assert all((tmp_path / name.value).is_dir() for name in ExportFormat)
    assert isinstance(writers[MERGED], CheckpointWriter)
    assert REPORT.method == "rtn"


LOW = StoredLowRank(rank=4, alpha=8.0)


def test_the_configuration_of_an_adapter_in_full() -> None:
    """A switch that peft reads another way would scale or bias the correction without a word."""
    adapted = {"a.b": LOW, "a.c": LOW, "x.d": StoredLowRank(rank=2, alpha=8.0)}
    assert peft.config(adapted, ["lm_head"]) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": ["b", "c", "d"],
        "r": 4,
        "lora_alpha": 8.0,
        "rank_pattern": {r"x\.d": 2},
        "alpha_pattern": {r"x\.d": 8.0},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


@pytest.mark.parametrize(
    ("ranks", "allowed"),
    [([1], 1), ([2], 8), ([8, 3], 8), ([9], 16), ([64, 65], 128), ([300], 320), ([512], 512), ([513], None)],
)
def test_vllm_is_given_the_next_rank_that_it_takes(ranks: list[int], allowed: int | None) -> None:
    known, rank = peft._served_with([StoredLowRank(rank=one, alpha=1.0) for one in ranks])
    assert rank == allowed
    assert ("0.32.0 or newer" in known) is (len(set(ranks)) > 1)


def test_an_adapter_belongs_to_a_dense_base_else_a_packed_one_else_the_native_one() -> None:
    """Each says in its own words where the base is."""
    schemes = {"a": W3}
    for formats, word in (
        ((PEFT, MERGED, ExportFormat.COMPRESSED_TENSORS), "merged"),
        ((ExportFormat.COMPRESSED_TENSORS, PEFT), "compressed-tensors"),
        ((PEFT,), "native"),
        ((PEFT, ExportFormat.GGUF), "native"),
    ):
        assert f"`{word}` checkpoint" in adapter_base(formats, schemes).where
