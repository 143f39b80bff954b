"""The same in llama.cpp and in vLLM, where `make test-llama-cpp` and `make test-vllm` have installed them."""

import os
from pathlib import Path
from typing import Any

import pytest

from bitwright.errors import RuntimeDidNotLoad
from tests.engine.conftest import run_job
from tests.engine.loads_here.faults import FAULTS, Fault, Faulty
from tests.tiny_model import tiny_model_folder
from workers.engine.loads_here import block

LLAMA_CPP = os.environ.get("BITWRIGHT_TEST_LLAMA_CPP", "")
VLLM = os.environ.get("BITWRIGHT_TEST_VLLM", "")
IN_VLLM: dict[str, Any] = {"group_size": 64, "require": {"loads": ["vllm"]}}


def cut_short(folder: Path) -> None:
    with (folder / "model.gguf").open("r+b") as file:
        file.truncate(file.seek(0, 2) // 2)


def other_numbers(folder: Path) -> None:
    """The last quarter of the file is the last tensors' bytes: a bit of each is another."""
    data = bytearray((folder / "model.gguf").read_bytes())
    start = 3 * len(data) // 4
    data[start:] = bytes(byte ^ 1 for byte in data[start:])
    (folder / "model.gguf").write_bytes(data)


def plant(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    real = vars(block)["open_writer"]
    monkeypatch.setattr(
        block, "open_writer", lambda folder, *given, **named: Faulty(real(folder, *given, **named), folder, fault)
    )


def with_runtime(reads: dict[str, Any], name: str, place: str) -> dict[str, Any]:
    return reads | {"runtimes": reads["runtimes"] | {name: {"version": "?", "place": place}}}


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA_CPP, reason="make test-llama-cpp installs llama.cpp")
class TestLlamaCpp:
    def test_it_loads_a_block_and_the_file(self, small_model: Path, tmp_path: Path, reads: dict[str, Any]) -> None:
        order = with_runtime(reads, "llama.cpp", LLAMA_CPP)
        body: dict[str, Any] = {"formats": ["gguf"], "verify": "files", "require": {"loads": ["llama.cpp"]}}
        report = run_job(small_model, tmp_path, order=order, **body).report
        assert [(load.runtime, load.read, load.result) for load in report.loads] == [
            ("llama.cpp", "block", "loads"),
            ("llama.cpp", "files", "loads"),
        ]
        assert report.loads[0].version == "0.5.0"
        assert report.loads[1].tokens_written == 16
        assert all(load.difference is not None and load.difference < 0.03 for load in report.loads)

    @pytest.mark.parametrize("scheme", ["q4_k_m", "iq4_nl"])
    def test_it_loads_its_own_types_embeddings_and_head_too(
        self, scheme: str, small_model: Path, tmp_path: Path, reads: dict[str, Any]
    ) -> None:
        order = with_runtime(reads, "llama.cpp", LLAMA_CPP)
        modules = {} if scheme == "q4_k_m" else {"modules": {"embeddings": "q5_0", "head": "q6_k"}}
        body: dict[str, Any] = {"formats": ["gguf"], "verify": "files", "require": {"loads": ["llama.cpp"]}}
        quantization = {"method": "rtn", "scheme": scheme, **modules}
        report = run_job(small_model, tmp_path, order=order, quantization=quantization, **body).report
        found = [(load.read, load.result) for load in report.loads if load.runtime == "llama.cpp"]
        assert found == [("block", "loads"), ("files", "loads")]
        assert all(load.difference is not None and load.difference < 0.05 for load in report.loads)

    @pytest.mark.parametrize("fault", [cut_short, other_numbers])
    def test_faults_end_the_job_before_tuning(
        self, small_model: Path, tmp_path: Path, reads: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fault: Fault
    ) -> None:
        plant(monkeypatch, fault)
        with pytest.raises(RuntimeDidNotLoad, match=r"llama\.cpp 0\.5\.0"):
            run_job(small_model, tmp_path, order=with_runtime(reads, "llama.cpp", LLAMA_CPP), formats=["gguf"])


@pytest.mark.vllm
@pytest.mark.timeout(900)
class TestVLLM:
    def test_it_loads_a_block_where_it_is_required(self, tmp_path: Path, reads: dict[str, Any]) -> None:
        report = run_job(tiny_model_folder(), tmp_path, order=with_runtime(reads, "vllm", VLLM), **IN_VLLM).report
        assert [(load.runtime, load.read, load.result) for load in report.loads] == [
            ("transformers", "block", "loads"),
            ("vllm", "block", "loads"),
        ]
        assert report.loads[1].version == "0.32.0"

    @pytest.mark.parametrize("fault", ["scales of k and v swapped", "no tokenizer"])
    def test_faults_end_the_job_before_tuning(
        self, tmp_path: Path, reads: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fault: str
    ) -> None:
        plant(monkeypatch, FAULTS[fault])
        order = with_runtime({**reads, "runtimes": {}}, "vllm", VLLM)
        with pytest.raises(RuntimeDidNotLoad, match=r"vllm 0\.32\.0"):
            run_job(tiny_model_folder(), tmp_path, order=order, **IN_VLLM)

    def test_its_own_refusal_is_told_in_its_own_words(self, tmp_path: Path, reads: dict[str, Any]) -> None:
        order = with_runtime(reads, "vllm", VLLM)
        with pytest.raises(RuntimeDidNotLoad, match="Failed to find a kernel that can implement the WNA16"):
            run_job(tiny_model_folder(), tmp_path, order=order, **IN_VLLM, bits=3)
