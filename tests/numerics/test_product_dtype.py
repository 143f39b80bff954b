"""Choice of the dtype of products, by what processors say of themselves."""

from pathlib import Path

import pytest
import torch

from workers.numerics import product_dtype as module
from workers.numerics.product_dtype import product_dtype

CPU = torch.device("cpu")
SAPPHIRE = "GenuineIntel", "fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile avx512_fp16"
HIDDEN_AMX = "GenuineIntel", "fpu avx2 avx512f avx512_bf16 avx512_fp16"
ZEN_4 = "AuthenticAMD", "fpu avx2 avx512f avx512_bf16"
ZEN_2 = "AuthenticAMD", "fpu avx2"


@pytest.fixture
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    vendor, flags = request.param
    lines = (f"processor\t: {n}\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n\n" for n in range(2))
    (tmp_path / "cpuinfo").write_text("".join(lines))
    monkeypatch.setattr(module, "PROCESSORS", tmp_path / "cpuinfo")


@pytest.mark.parametrize(
    ("processor", "wanted"),
    [
        pytest.param(SAPPHIRE, torch.bfloat16, id="AMX"),
        pytest.param(HIDDEN_AMX, torch.float32, id="AMX that the virtual machine hides"),
        pytest.param(ZEN_4, torch.bfloat16, id="AMD's AVX512-BF16"),
        pytest.param(ZEN_2, torch.float32, id="neither"),
    ],
    indirect=["processor"],
)
@pytest.mark.usefixtures("processor")
def test_bf16_is_multiplied_in_what_is_quicker(wanted: torch.dtype) -> None:
    assert product_dtype(CPU, torch.bfloat16) == wanted


@pytest.mark.parametrize("processor", [SAPPHIRE, HIDDEN_AMX], indirect=True)
@pytest.mark.usefixtures("processor")
def test_fp16_is_multiplied_in_fp32_and_wider_dtypes_stay() -> None:
    assert product_dtype(CPU, torch.float16) == torch.float32
    assert [product_dtype(CPU, dtype) for dtype in (torch.float32, torch.float64)] == [torch.float32, torch.float64]


def test_a_gpu_multiplies_what_it_is_given() -> None:
    assert product_dtype(torch.device("cuda"), torch.bfloat16) == torch.bfloat16


def test_a_machine_that_says_nothing_multiplies_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROCESSORS", tmp_path / "absent")
    assert product_dtype(CPU, torch.bfloat16) == torch.float32
