"""Schemes by name through the whole engine: closer by tuning, and measured as a server computes them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from app.domain.request.job_request import Calibration, Evaluation
from bitwright.report import Report
from tests.engine.conftest import run_job
from workers.engine.quantize import block_pass
from workers.engine.text.sequences import calibration_sequences, evaluation_sequences, load_tokenizer
from workers.formats.load_bitwright import load

SIZE: dict[str, Any] = {
    "calibration": {"num_samples": 32, "sequence_length": 64},
    "evaluation": {"num_samples": 16, "sequence_length": 64},
    "formats": ["native"],
}
E4M3 = torch.float8_e4m3fn


def job(model: Path, workspace: Path, **quantization: Any) -> Report:
    return run_job(model, workspace, quantization=quantization, **SIZE).report


def stored(workspace: Path) -> dict[str, Tensor]:
    return load_file(workspace / "output/native/weights.safetensors")


def divergence(report: Report) -> float:
    assert report.quality is not None
    return report.quality.kl_divergence


@pytest.mark.parametrize("scheme", ["nvfp4a16", pytest.param("mxfp4a16", marks=pytest.mark.slow)])
def test_methods_are_closer_than_rounding_and_a_search_closer_than_none(
    scheme: str, tiny_model: Path, tmp_path: Path
) -> None:
    plain = divergence(job(tiny_model, tmp_path / "plain", method="rtn", scheme=scheme, scale_search=False))
    rounded = divergence(job(tiny_model, tmp_path / "rtn", method="rtn", scheme=scheme))
    tuned = job(tiny_model, tmp_path / "tuned", method="signround", scheme=scheme, steps=30)
    assert rounded <= plain * (1.001 if scheme == "mxfp4a16" else 0.8)
    assert divergence(tuned) < 0.75 * rounded
    assert divergence(job(tiny_model, tmp_path / "gptq", method="gptq", scheme=scheme)) < 0.8 * rounded
    assert tuned.round_to_nearest is not None
    assert tuned.round_to_nearest.kl_divergence == pytest.approx(rounded, rel=1e-4), "the reference is rtn's own"


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """NVFP4 with calibrated inputs and an FP8 cache, round to nearest."""
    workspace = tmp_path_factory.mktemp("served")
    return workspace, job(tiny_model, workspace, method="rtn", scheme="nvfp4", kv_cache="fp8")


@contextmanager
def quantized_inputs(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """A transformers model that rounds inputs by compressed-tensors."""
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=E4M3, dynamic="local"
    )

    def rounded(name: str) -> Any:
        divisor = 448 * 6 / tensors[f"{name}.input_amax"]

        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            groups = given[0].float().unflatten(-1, (-1, 16))
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=divisor)
            return (fake_quantize(given[0].float(), scale, zero, args, global_scale=divisor).to(given[0].dtype),)

        return hook

    names = [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]
    handles = [model.get_submodule(name).register_forward_pre_hook(rounded(name)) for name in names]
    yield
    for handle in handles:
        handle.remove()


class FloatCache(DynamicCache):  # type: ignore[misc]
    """In the place of a cache: keys and values as e4m3 with the stored scales gives them back; nothing is kept."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        states = []
        for state, kind in ((key, "k_scale"), (value, "v_scale")):
            scale = self.tensors[f"model.layers.{layer_idx}.self_attn.{kind}"]
            states.append(((state.float() / scale).clamp(-448, 448).to(E4M3).float() * scale).to(state.dtype))
        return states[0], states[1]


def perplexity(model: Any, ids: Tensor, **given: Any) -> float:
    with torch.no_grad():
        nats = [model(row[None], labels=row[None], use_cache=bool(given), **given).loss for row in ids]
    return math.exp(torch.stack(nats).double().mean())


def test_the_report_tells_what_a_server_computes(served: tuple[Path, Report], tiny_model: Path) -> None:
    """Perplexity of the loaded weights with inputs and cache rounded by others' code; without them it is another."""
    workspace, report = served
    tensors, model = stored(workspace), load(workspace / "output/native")
    ids = evaluation_sequences(
        load_tokenizer(tiny_model, "evaluation"), Evaluation(**SIZE["evaluation"]), None, 0, None, None
    ).ids
    assert report.quality is not None
    with quantized_inputs(model, tensors):
        found = perplexity(model, ids, past_key_values=FloatCache(tensors))
    assert report.quality.perplexity == pytest.approx(found, rel=2e-3)
    assert report.quality.perplexity != pytest.approx(perplexity(model, ids), rel=2e-3)
    assert report.served is not None
    assert "nvfp4" in report.served
    assert "FP8 cache" in report.served


def test_stored_numbers_are_maxima_of_the_original_model(served: tuple[Path, Report], tiny_model: Path) -> None:
    """Largest inputs of q, k and v together, keys after rotary embeddings and values, by transformers' own forward."""
    workspace, _ = served
    tensors = stored(workspace)
    ids = calibration_sequences(
        load_tokenizer(tiny_model, "calibration"), Calibration(**SIZE["calibration"]), None, 0, None
    ).ids
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    largest: dict[str, float] = {}

    def note(name: str) -> Any:
        return lambda _, given: largest.update({name: max(largest.get(name, 0), float(given[0].abs().max()))})

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note(name))
    with torch.no_grad():
        caches = [model(row[None], use_cache=True).past_key_values for row in ids]
    for layer in range(2):
        for part, kind in (("keys", "k_scale"), ("values", "v_scale")):
            amax = max(float(getattr(cache.layers[layer], part).abs().max()) for cache in caches)
            scale = float(tensors[f"model.layers.{layer}.self_attn.{kind}"])
            assert scale == pytest.approx(amax / 448, rel=0.02)
        prefix = f"model.layers.{layer}.self_attn"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            expected = pytest.approx(largest[f"{prefix}.{name}"], rel=0.02)
            assert float(tensors[f"{prefix}.{name}.input_amax"]) == expected
        scales = {float(tensors[f"{prefix}.{name}.global_scale"]) for name in ("q_proj", "k_proj", "v_proj")}
        assert len(scales) == 1
        assert float(tensors[f"{prefix}.o_proj.global_scale"]) not in scales


def test_a_resumed_job_serves_as_an_undisturbed_one(
    served: tuple[Path, Report], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled, stop = block_pass.BlockPass._result, KeyboardInterrupt

    def interrupted(self: Any, index: int, *given: Any) -> Any:
        if index == 1:
            raise stop
        return settled(self, index, *given)

    monkeypatch.setattr(block_pass.BlockPass, "_result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job(tiny_model, tmp_path, method="rtn", scheme="nvfp4", kv_cache="fp8")
    monkeypatch.undo()
    report = job(tiny_model, tmp_path, method="rtn", scheme="nvfp4", kv_cache="fp8")
    assert report.blocks_resumed == 1
    assert report.quality == served[1].quality
    before, after = stored(served[0]), stored(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.float(), after[name].float()) for name, tensor in before.items())


def test_weights_alone_have_the_same_scales_as_with_the_model(tiny_model: Path, tmp_path: Path) -> None:
    job(tiny_model, tmp_path / "model", method="rtn", scheme="nvfp4a16")
    size = {**SIZE, "evaluation": None}
    run_job(
        tiny_model,
        tmp_path / "alone",
        quantization={"method": "rtn", "scheme": "nvfp4a16", "weights_only": True},
        **size,
    )
    first, second = stored(tmp_path / "model"), stored(tmp_path / "alone")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor.float(), second[name].float()) for name, tensor in first.items())
