"""Jobs with llama.cpp's block types: what their files hold, which types linears get, and what the report says of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from app.domain.attempt_lines import ResultLine
from app.domain.methods import BLOCK_SCHEMES, Form, Scheme, SchemeName
from tests.engine.conftest import run_job
from tests.engine.model.loading import loader
from tests.formats.examples import Made, random_result
from workers.formats import native
from workers.formats.gguf.read_back import read_back
from workers.formats.stored_linear import StoredLinear
from workers.tiny_model import Recipe, make_tiny_model


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Llama blocks of width 256, but for an MLP of 320, which no super-block divides; bf16, hardly trained."""
    recipe = Recipe(vocabulary=300, width=256, intermediate=320, blocks=2, positions=256, steps=4, batch=2, length=32)
    return make_tiny_model(tmp_path_factory.mktemp("models") / "wide", recipe)


def job(model: Path, workspace: Path, formats: list[str], **quantization: Any) -> ResultLine:
    return run_job(model, workspace, formats=formats, quantization={"method": "rtn", **quantization})


def types(result: ResultLine) -> dict[str, str | None]:
    """Last name of a linear -> the scheme that the report says."""
    return {linear.name.rsplit(".", 1)[-1]: linear.scheme for linear in result.report.blocks[1].linears}


@pytest.mark.parametrize(
    ("name", "otherwise", "number", "file_type"),
    [
        ("q2_k", "q4_0", 10, 10),
        ("q2_0", "q2_0", 42, 41),
        pytest.param("q4_k", "q5_0", 12, 15, marks=pytest.mark.slow),
        pytest.param("iq3_s", "iq4_nl", 21, 26, marks=pytest.mark.slow),
        pytest.param("q3_k", "q4_0", 11, 12, marks=pytest.mark.slow),
        pytest.param("q5_k", "q5_1", 13, 17, marks=pytest.mark.slow),
        pytest.param("q6_k", "q8_0", 14, 18, marks=pytest.mark.slow),
        pytest.param("iq4_xs", "iq4_nl", 23, 30, marks=pytest.mark.slow),
        pytest.param("q4_1", "q4_1", 3, 3, marks=pytest.mark.slow),
    ],
)
def test_a_file_holds_the_types_that_the_report_says_and_the_numbers_that_were_measured(
    wide_model: Path, tmp_path: Path, name: str, otherwise: str, number: int, file_type: int
) -> None:
    result = job(wide_model, tmp_path, ["gguf", "merged"], scheme=name)
    expected = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), name)
    assert types(result) == expected | {"down_proj": otherwise}
    folder = tmp_path / result.checkpoints["gguf"]
    stored = Stored(folder / "model.gguf")
    assert (stored.fields["general.file_type"], stored.fields["general.quantization_version"]) == (file_type, 2)
    fallback = Scheme.named(SchemeName(otherwise)).blocks
    assert fallback is not None
    assert stored.kinds["blk.1.attn_v.weight"] == stored.kinds["blk.0.ffn_up.weight"] == number
    assert stored.kinds["blk.1.ffn_down.weight"] == fallback.number
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / result.checkpoints["merged"], dtype=torch.float32)
    if name != "q2_0":
        whole = GgufConfig(dequantize=True)
        found = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="model.gguf", quantization_config=whole, dtype=torch.float32
        )
        assert read_back(folder, "model.gguf", merged.config, wide_model).other_model == ()
        for key, tensor in merged.state_dict().items():
            assert torch.equal(found.state_dict()[key].bfloat16().float(), tensor), key


class Stored:
    """Fields and types of a file, by the format's specification: of types that the package does not know, too."""

    def __init__(self, file: Path) -> None:
        self._data, self._at = file.read_bytes(), 8
        tensors, fields = self._whole(8), self._whole(8)
        self.fields: dict[str, Any] = {self._text(): self._value(self._whole(4)) for _ in range(fields)}
        self.kinds: dict[str, int] = {}
        for _ in range(tensors):
            name = self._text()
            for _ in range(self._whole(4)):
                self._whole(8)
            self.kinds[name] = self._whole(4)
            self._whole(8)

    def _whole(self, size: int) -> int:
        self._at += size
        return int.from_bytes(self._data[self._at - size : self._at], "little")

    def _text(self) -> str:
        size = self._whole(8)
        self._at += size
        return self._data[self._at - size : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == 8:
            return self._text()
        if kind == 9:
            inner = self._whole(4)
            return [self._value(inner) for _ in range(self._whole(8))]
        return self._whole({0: 1, 1: 1, 7: 1, 2: 2, 3: 2, 10: 8, 11: 8, 12: 8}.get(kind, 4))


def test_calibration_text_is_read_and_weighs_and_weights_alone_are_for_the_asking(
    wide_model: Path, tmp_path: Path
) -> None:
    weighted = job(wide_model, tmp_path / "a", ["native"], scheme="q2_k")
    alone = job(wide_model, tmp_path / "b", ["native"], scheme="q2_k", weights_only=True)
    assert weighted.report.calibration is not None
    assert alone.report.calibration is None
    folders = [tmp_path / "a" / weighted.checkpoints["native"], tmp_path / "b" / alone.checkpoints["native"]]
    loaded, other = (loader(folder).load_weights(folder) for folder in folders)
    original = AutoModelForCausalLM.from_pretrained(wide_model).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(loaded[name], other[name])
    # By itself, each weight is nearer to the original the less the columns differ in what they count for.
    distances = [(weights[name].float() - original[name].float()).norm() for weights in (loaded, other)]
    assert distances[1] < distances[0]


@pytest.mark.parametrize("name", sorted(BLOCK_SCHEMES))
def test_the_one_file_loader_gives_the_weight(name: SchemeName) -> None:
    made = random_result((6, 512), Made(Scheme.named(name), Form.BLOCKS), torch.bfloat16)
    stored = StoredLinear.of(made)
    parts = {key.removeprefix("x."): tensor for key, tensor in native.compress("x", made).items()}
    described = stored.model_dump(mode="json", exclude_defaults=True)
    from workers.formats import load_bitwright

    assert load_bitwright.expected_parts(described) == parts.keys()
    assert torch.equal(load_bitwright.dequantize("x", described, parts), made.dequantize())
