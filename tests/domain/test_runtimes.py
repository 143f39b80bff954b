"""The rows of runtimes: each says its release, and the releases are those that are installed and were read."""

import re
import tomllib

import pytest

from app.domain.formats import DENSE_WORDS, FORMATS, VLLM_CPU, ExportFormat
from app.domain.methods import Scheme
from app.domain.runtimes import RuntimeSupport, Support, described, runtime_limits
from tests.documentation import ROOT

ROWS = [(name, row) for name, info in FORMATS.items() for row in info.runtimes]
VLLM = [row for row in FORMATS[ExportFormat.COMPRESSED_TENSORS].runtimes if row.runtime == "vllm"]


def scheme(bits: int, group_size: int = 64, symmetric: bool = True) -> Scheme:
    return Scheme(bits=bits, group_size=group_size, symmetric=symmetric)


def pinned(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[f"{name}-{row.runtime}-{row.version}" for name, row in ROWS])
def test_every_row_says_its_release(name: ExportFormat, row: RuntimeSupport) -> None:
    assert row.version
    if row.support is Support.TESTED:
        tested = pinned("constraints.txt") | {"vllm": pinned("requirements-vllm.txt")["vllm-cpu"]}
        # llama.cpp is tried by a benchmark, whose command in docs/results.md names the package.
        assert row.version == tested.get(row.runtime, "node-llama-cpp 3.22.1"), name


def test_the_oldest_compressed_tensors_that_installs_reads_dense_words() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (found,) = (one for one in extras["worker"] if one.startswith("compressed-tensors"))
    assert found == f"compressed-tensors>={DENSE_WORDS.version.removesuffix('.0')}"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 2, 7, 8, 15, 16, 32, 48, 64, 96, 128, 256, 1024])
@pytest.mark.parametrize("bits", range(2, 9))
def test_vllm_by_its_rules(bits: int, group: int, symmetric: bool) -> None:
    """On NVIDIA every width and groups of 16 and more (Humming), on a CPU 4 bits and even groups."""
    gpu, cpu = VLLM
    assert gpu.loads(scheme(bits, group, symmetric)) is (group == -1 or group >= 16)
    assert cpu.loads(scheme(bits, group, symmetric)) is (bits == 4 and (group == -1 or group % 2 == 0))
    assert (gpu.support, cpu.support, cpu.version) == (Support.BY_RULES, Support.TESTED, VLLM_CPU)


@pytest.mark.parametrize(
    ("schemes", "release"),
    [
        ([scheme(4), scheme(8)], None),
        ([scheme(8, symmetric=False)], None),
        ([scheme(4), scheme(3)], "0.25.0"),
        ([scheme(3), scheme(4, symmetric=False)], "0.25.0"),
        ([scheme(3), scheme(2, symmetric=False)], "0.31.0"),
    ],
)
def test_the_first_vllm_that_takes_all_widths(schemes: list[Scheme], release: str | None) -> None:
    assert VLLM[0].first_release(schemes) == release


def test_releases_are_compared_as_numbers() -> None:
    found = VLLM[0].since
    rows = RuntimeSupport("x", Support.TESTED, VLLM[0].bits, since=(*found, type(found[0])("0.9.0", frozenset({2}))))
    assert rows.first_release([scheme(2)]) == "0.25.0"


def test_limits_are_told_with_release_and_device() -> None:
    def told(of: Scheme) -> list[str]:
        return runtime_limits(FORMATS[ExportFormat.COMPRESSED_TENSORS].runtimes, described(of), of)

    gpu, cpu = "by the rules of 0.33.0 on NVIDIA GPUs of compute capability 7.5 or newer", "tested with 0.32.0 on CPUs"
    assert told(scheme(4)) == []
    assert told(scheme(2, symmetric=False)) == [
        f"vllm loads 2 bits, asymmetric, group size 64 from 0.31.0 on ({gpu}), but not everywhere ({cpu})"
    ]
    assert told(scheme(8, -1)) == [f"vllm loads 8 bits, symmetric, per channel ({gpu}), but not everywhere ({cpu})"]
    assert told(scheme(3, 8)) == [f"vllm does not load 3 bits, symmetric, group size 8 ({gpu}; {cpu})"]


def test_prose_names_no_release_that_the_tables_do_not() -> None:
    """Of vLLM, in the documents that are not a log of measurements."""
    known = {VLLM_CPU, VLLM[0].version, *(added.version for added in VLLM[0].since)}
    pages = [ROOT / "README.md", *(page for page in (ROOT / "docs").rglob("*.md") if page.name != "results.md")]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    named = {release for text in texts for release in re.findall(r"vLLM (\d+\.\d+(?:\.\d+)?)", text)}
    assert named <= known
