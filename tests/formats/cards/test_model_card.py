"""The card promises what holds: its lines are run, and vLLM is named only within vLLM's rules."""

import importlib.util
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM

from app.domain.formats import ExportFormat
from app.domain.fused_shapes import EXPERT
from app.domain.methods import Scheme
from bitwright.report import LoadReport, Quality, Report, TextReport
from tests.engine.model.families import MIXTURES, small_config
from tests.formats.examples import (
    REPORT,
    Made,
    codebook_made,
    held_by,
    linears,
    logits,
    random_result,
    scheme,
    tiny_llama,
    write_quantized,
    write_with,
)
from workers.formats.cards import model_card as model_card_module
from workers.formats.cards.vllm import vllm_refusals, vllm_rows
from workers.formats.packed.loading import NEEDED
from workers.formats.registry import adapter_base, format_of, open_writer
from workers.formats.stored_linear import StoredLinear

CT, NATIVE, MERGED, PEFT = (ExportFormat(name) for name in ("compressed-tensors", "native", "merged", "peft"))
MODELS = [name for name in ExportFormat if not name.info.is_adapter and "*.safetensors" in name.info.weight_files]
"""Formats whose cards' lines make a model of `tiny_llama`, which has no tokenizer that a GGUF file could hold."""
NEWEST_VLLM = vllm_rows(CT)[0]
W4, W8, W3Z, W4Z = scheme(4, 32, True), scheme(8, -1, True), scheme(3, 16, False), scheme(4, 32, False)
FORMS = [Made(W3Z, rank=2), codebook_made(4, 32), codebook_made(2, 16, rank=3)]
TEXT = TextReport(source="builtin", sha256="ab" * 32, num_samples=4, sequence_length=64, tokens=256)


def model_card(
    report: Report,
    export_format: ExportFormat,
    linears: Mapping[str, StoredLinear],
    licence: str | None,
    formats: Collection[ExportFormat] = (),
) -> str:
    """The card with the format's own section "Load"."""
    loading, base = format_of(export_format).loading, partial(adapter_base, formats)
    return model_card_module.model_card(report, export_format, linears, licence, formats, loading=loading, base=base)


def card(export_format: ExportFormat, report: Report = REPORT, **schemes: Scheme) -> str:
    linears = {n: StoredLinear.of(random_result((32, 32), of)) for n, of in schemes.items()}
    return model_card(report, export_format, linears, "LICENSE")


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run_file(file: Path) -> Any:
    """The file as a module, run as it is imported."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("export_format", "schemes"),
    [
        *((CT, schemes) for schemes in ([W4], [W4Z], [W4, W8], [W4, W3Z])),
        *((NATIVE, schemes) for schemes in ([W3Z, W8], FORMS)),
        (MERGED, FORMS),
        *((name, held_by(name)) for name in MODELS),
    ],
    ids=str,
)
def test_every_line_of_the_card_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export_format: ExportFormat, schemes: Sequence[Made | Scheme]
) -> None:
    out = tmp_path / "out"
    expected = write_quantized(tiny_llama(tmp_path / "source"), out, export_format, schemes)
    monkeypatch.syspath_prepend(str(out))
    blocks = code_blocks((out / "README.md").read_text())
    assert blocks
    if export_format.info.dense or any(row.runtime == "peft" for row in export_format.info.runtimes):
        assert any("get_peft_model" in block for block in blocks)
    for number, block in enumerate(blocks):
        # The tiny model's tokenizer.json is no tokenizer; its line is the same for every checkpoint.
        lines = [line for line in block.splitlines() if not line.startswith("tokenizer")]
        file = tmp_path / f"block{number}.py"
        file.write_text("\n".join(lines).replace("path/to/this/folder", str(out)))
        model = run_file(file).model
        model(torch.tensor([[1, 2, 3]]))
        found = {name: m for name, m in model.named_modules() if name.endswith("_proj")}
        for name, linear in linears(expected):
            match = next(m for full, m in found.items() if full.endswith(name))
            assert torch.equal(getattr(match, "base_layer", match).weight, linear.weight), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("base", "made"),
    [
        *((name, FORMS) for name in (MERGED, NATIVE)),
        *((CT, made) for made in ([Made(W4, rank=2)], [Made(W4, rank=2), Made(W8, rank=2)])),
        *((name, held_by(name, rank=2)) for name in MODELS if format_of(name).adapter_base is not None),
    ],
    ids=str,
)
def test_the_cards_of_base_and_adapter_lead_to_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: ExportFormat, made: Sequence[Made]
) -> None:
    source, formats = tiny_llama(tmp_path / "source"), tuple({base: None, PEFT: None})
    write_quantized(source, tmp_path / "base", base, made, formats=formats)
    expected = write_with(open_writer(tmp_path / "adapter", PEFT, source, formats), source, made)
    monkeypatch.syspath_prepend(str(tmp_path / "base"))
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("base", "adapter")}
    assert ("This is the quantized base alone" in cards["base"]) == (not base.info.holds_factors)
    blocks = [block for name in cards for block in code_blocks(cards[name]) if "PeftModel" in block]
    assert len(blocks) == (1 if base.info.holds_factors else 2)
    for number, block in enumerate(blocks):
        of_adapter = number == len(blocks) - 1
        text = block.replace("path/to/this/folder", str(tmp_path / ("adapter" if of_adapter else "base")))
        text = text.replace("path/to/the/base", str(tmp_path / "base"))
        file = tmp_path / f"block{number}.py"
        file.write_text(text.replace("path/to/the/adapter", str(tmp_path / "adapter")))
        assert (logits(run_file(file).model) - logits(expected)).abs().max() < 0.1


def test_forms_are_told_apart() -> None:
    made = {"a": Made(W4, rank=2), "b": codebook_made(2, 16), "c": Made(W4Z, offset=True)}
    linears = {name: StoredLinear.of(random_result((32, 32), one)) for name, one in made.items()}
    text = model_card(REPORT, NATIVE, linears, None)
    assert "| 1 | 4 | 32 | fixed | rank 2, alpha 16 |" in text
    assert "| 1 | 2 | 16 | none: codes index a codebook | none |" in text
    assert "| 1 | 4 | 32 | an offset of each group | none |" in text


def test_front_matter_names_a_hub_model_and_nothing_else() -> None:
    matter = yaml.safe_load(card(CT, a=W4).split("---")[1])
    assert matter["base_model"] == "org/tiny"
    assert matter["tags"] == ["bitwright", "compressed-tensors"]
    for source, kind in (("/models/tiny", None), ("upl_01abc", None), ("models/tiny", "local"), ("org/x", "upload")):
        changed = REPORT.model.model_copy(update={"source": source, "kind": kind})
        local = REPORT.model_copy(update={"model": changed})
        assert "base_model" not in yaml.safe_load(card(CT, local, a=W4).split("---")[1])


def test_quality_and_calibration_are_told_where_measured() -> None:
    quality = Quality(text=TEXT, perplexity_original=10, perplexity=10.5, kl_divergence=0.0123, top1_agreement=0.9)
    text = card(CT, REPORT.model_copy(update={"quality": quality, "calibration": TEXT}), a=W4)
    assert "| perplexity | 10.0000 | 10.5000 |" in text
    assert "| same most likely token | 100 % | 90.00 % |" in text
    assert "4 sequences of 64 tokens of `builtin`" in text
    assert "## Quality" not in card(CT, a=W4)


def test_the_card_says_in_which_runtimes_it_was_read_back() -> None:
    told: dict[str, Any] = {"format": "merged", "read": "files", "result": "loads"}
    loads = (
        LoadReport(**told, runtime="transformers", version="5.23.0", difference=0.00512),
        LoadReport(**told | {"read": "block", "result": "not_checked"}, runtime="vllm"),
        LoadReport(**told | {"read": "block", "result": "differs"}, runtime="vllm", version="0.32.0", difference=0.5),
        LoadReport(**told | {"format": "gguf"}, runtime="llama.cpp"),
    )
    text = card(ExportFormat.MERGED, REPORT.model_copy(update={"loads": loads}))
    assert "| transformers 5.23.0 | this checkpoint | loads | 0.0051 |" in text
    assert "| vllm 0.32.0 | one block of it | misreads | 0.5 |" in text
    assert "not_checked" not in text
    assert "| llama.cpp" not in text
    assert "Read back" not in card(ExportFormat.MERGED)


def test_the_line_that_misreads_mixed_widths_is_warned_of_and_not_given() -> None:
    for other in (W8, W3Z):
        text = card(CT, a=W4, b=other)
        assert "do not load it with `CompressedTensorsConfig(dequantize=True)`" in text
        assert not any("CompressedTensorsConfig" in block for block in code_blocks(text))
    for uniform in (W4, W4Z):
        text = card(CT, a=uniform, b=uniform)
        assert "do not load" not in text
        assert "CompressedTensorsConfig(dequantize=True)" in code_blocks(text)[1]


def test_the_paper_is_cited() -> None:
    assert "https://arxiv.org/abs/2309.05516" in card(CT, REPORT.model_copy(update={"method": "signround"}), a=W4)


@pytest.mark.parametrize("group", [-1, 16, 32, 48, 128, 256])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_card_names_vllm_with_its_release_and_devices(bits: int, symmetric: bool, group: int) -> None:
    text = card(CT, a=scheme(bits, group, symmetric))
    line = next(line for line in text.splitlines() if line.startswith("vLLM"))
    assert "vllm serve" in text
    assert "by the rules of 0.33.0 on NVIDIA GPUs of compute capability 7.5 or newer" in line
    assert ("tested with 0.32.0 on CPUs" in line) is (bits == 4)
    assert ("not tried" in line) is (bits != 4)
    needed = "vLLM," if bits in (4, 8) else f"vLLM {'0.25.0' if symmetric else '0.31.0'} or newer,"
    assert line.startswith(needed)


def test_the_card_says_why_vllm_does_not_load_a_checkpoint() -> None:
    text = card(CT, a=scheme(3, 8, True))
    assert "vLLM does not load it, by the rules of 0.33.0 on NVIDIA GPUs" in text
    assert "it has no kernel for 3 bits, symmetric, group size 8" in text
    assert "vllm serve" not in text


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_card_names_the_package_that_reads_dense_words(bits: int) -> None:
    newer = '"compressed-tensors>=0.18"' in card(CT, a=scheme(bits, 32, True), b=W4)
    assert newer is (bits in (3, 5, 6, 7))
    adapted = {"a": StoredLinear.of(random_result((32, 32), Made(scheme(bits, 32, True), rank=4)))}
    assert ("'compressed-tensors>=0.18'" in model_card(REPORT, PEFT, adapted, None, (CT, PEFT))) is newer


def test_the_adapter_s_card_serves_it_where_vllm_loads_the_base() -> None:
    def text(formats: tuple[ExportFormat, ...], **made: Made) -> str:
        linears = {name: StoredLinear.of(random_result((32, 32), one)) for name, one in made.items()}
        return model_card(REPORT, PEFT, linears, None, formats)

    for base in (CT, MERGED):
        alike = text((base, PEFT), a=Made(W4, rank=4), b=Made(W4, rank=4))
        assert "--enable-lora --max-lora-rank 8 --lora-modules adapter=path/to/this/folder" in alike
        assert "tested with 0.32.0" in alike
        assert "strengths differ" not in alike
    assert "0.32.0 or newer, for ranks or strengths differ" in text((CT, PEFT), a=Made(W4, rank=4), b=Made(W4, rank=9))
    for formats in ((PEFT,), (CT, PEFT)):
        assert "vllm serve" not in text(formats, a=Made(scheme(4, 7, True), rank=4))
    assert "vllm serve" in text((MERGED, PEFT), a=Made(scheme(4, 7, True), rank=4))
    assert "vllm serve" not in text((MERGED, PEFT), a=Made(W4, rank=513))


def test_vllm_needs_one_scheme_for_what_it_runs_as_one() -> None:
    attention = dict.fromkeys([f"model.layers.0.self_attn.{part}_proj" for part in "qkv"], W4)
    assert vllm_refusals(attention, NEWEST_VLLM) == []
    assert vllm_refusals(attention | {"model.layers.0.mlp.down_proj": W8}, NEWEST_VLLM) == []
    refusals = vllm_refusals(attention | {"model.layers.0.self_attn.v_proj": W8}, NEWEST_VLLM)
    assert refusals == ["it runs q_proj, k_proj, v_proj of model.layers.0.self_attn as one, and their schemes differ"]
    for alone in ("gate_proj", "up_proj"):
        assert "gate_proj, up_proj" in vllm_refusals({f"model.layers.0.mlp.{alone}": W4}, NEWEST_VLLM)[0]


@pytest.mark.parametrize("name", NEEDED)
def test_packed_experts_are_not_said_to_run_in_transformers(name: ExportFormat) -> None:
    made = codebook_made(4, 32) if name is ExportFormat.BITSANDBYTES else Made(W4)
    linear = StoredLinear.of(random_result((32, 32), made))
    runs, not_run = "transformers runs it packed by `from_pretrained`", "`from_pretrained` does not run it packed"
    for module, said, unsaid in (
        ("model.layers.0.mlp.up_proj", runs, not_run),
        ("model.layers.0.mlp.shared_experts.up_proj", runs, not_run),
        ("model.layers.0.mlp.experts.0.up_proj", not_run, runs),
    ):
        text = model_card(REPORT, name, {"model.layers.0.self_attn.q_proj": linear, module: linear}, None)
        assert said in text
        assert unsaid not in text
        assert "from load_packed import load" in text


@pytest.mark.parametrize("family", MIXTURES)
def test_transformers_has_no_expert_that_is_a_linear(family: str) -> None:
    """What the card says of every type; a release that has them as linears again shows here."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small_config(family))
    modules = dict(model.named_modules())
    assert any(".experts" in name for name in modules)
    assert not [name for name, module in modules.items() if EXPERT.search(name) and isinstance(module, nn.Linear)]
