"""A goal in a request: what it may say, what it excludes, and what it chooses from."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.methods import AtMost, Fits, RTNSpec, Scheme, SchemeName
from app.domain.methods.sizes import in_words, parse_size
from app.domain.request.job_request import JobRequest
from bitwright.errors import InvalidRequest

BASE: dict[str, Any] = {"model": "org/name", "method": "rtn"}


def problems(body: dict[str, Any]) -> dict[str, tuple[str, str]]:
    with pytest.raises(InvalidRequest) as refused:
        JobRequest.parse({**BASE, **body})
    return {problem.field: (problem.code, problem.detail) for problem in refused.value.errors}


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (17, 17),
        ("17B", 17),
        ("90MB", 90_000_000),
        ("90 MB", 90_000_000),
        ("1.5kB", 1500),
        ("24GiB", 24 * 1024**3),
        ("0.5KiB", 512),
        ("2TB", 2 * 10**12),
        ("0.0015kB", 1),
    ],
)
def test_a_size_counts_as_its_unit_is_written(written: int | str, size: int) -> None:
    assert parse_size(written) == size
    assert JobRequest.parse({**BASE, "at_most": {"bytes": written}}).quantization.goal() == AtMost(bytes=size)


@pytest.mark.parametrize("written", [0, -1, True, 1.5, "", "MB", "1e3MB", "9 mb", "9Mb", "-1MB", "1,5GB", "9" * 16, []])
def test_what_is_no_size_is_refused_with_an_example(written: object) -> None:
    code, detail = problems({"at_most": {"bytes": written}})["at_most.bytes"]
    assert code == "invalid_value"
    assert "90MB" in detail


@given(st.integers(1, 1 << 50))
def test_a_size_in_words_is_close(size: int) -> None:
    number, unit = in_words(size).split()
    factor = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit]
    assert float(number) * factor == pytest.approx(size, rel=6e-4)


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"at_most": {"kl": 0.05}, "bits": 4}, {"bits", "at_most"}),
        ({"at_most": {"kl": 0.05}, "scheme": "fp8"}, {"scheme", "at_most"}),
        ({"at_most": {"kl": 0.05}, "fits": {"memory": "1GB", "context": 1}}, {"fits", "at_most"}),
        ({"fits": {"memory": "1GB", "context": 1}, "bits": {"average": 3}}, {"fits", "bits"}),
    ],
)
def test_bits_a_scheme_and_a_goal_exclude_each_other(body: dict[str, Any], fields: set[str]) -> None:
    found = problems(body)
    assert found.keys() == fields
    for _, detail in found.values():
        assert all(field in detail for field in fields)


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"at_most": {}}, "at_most", "kl or bytes"),
        ({"at_most": {"kl": 0.1, "bytes": 9}}, "at_most", "kl or bytes"),
        ({"at_most": {"kl": 0}}, "at_most.kl", "above 0"),
        ({"at_most": {"kl": 0.1, "rounds": 9}}, "at_most.rounds", "1 to 8"),
        ({"fits": {"memory": "1GB"}}, "fits.context", "needed"),
        ({"at_most": {"kl": 0.1}, "method": "nf"}, "at_most", "nf has no at_most"),
        ({"at_most": {"bytes": 9}, "formats": ["merged"]}, "at_most", "no format of the request packs"),
        ({"at_most": {"kl": 0.1}, "calibration": {"num_samples": 3}}, "at_most", "held out"),
        ({"at_most": {"kl": 0.1}, "finetune": {"dataset": "builtin"}}, "at_most", "base_job"),
        ({"at_most": {"kl": 0.1, "choices": [4, "mxfp9"]}}, "at_most.choices.1", "mxfp4"),
        ({"at_most": {"kl": 0.1, "choices": [4, 4]}}, "at_most.choices", "each width once"),
        ({"fits": {"memory": 9, "context": 1, "choices": ["nvfp4"]}, "formats": ["gguf"]}, "fits", "cannot hold"),
    ],
)
def test_what_a_goal_may_not_say(body: dict[str, Any], field: str, words: str) -> None:
    found = problems(body)
    assert list(found) == [field]
    assert words in found[field][1]


def test_a_goal_comes_back_as_it_is_and_without_bits() -> None:
    request = JobRequest.parse({**BASE, "fits": {"memory": "24GiB", "context": 8192}, "formats": ["native"]})
    assert request.quantization.goal() == Fits(memory=24 << 30, context=8192, sequences=1)
    dumped = request.model_dump(mode="json")
    assert "bits" not in dumped["quantization"]
    assert dumped["quantization"]["symmetric"] is True
    assert JobRequest.parse(dumped) == request


def test_default_choices_are_what_every_format_holds() -> None:
    def choices(**body: Any) -> tuple[object, ...]:
        return JobRequest.parse({**BASE, **body}).quantization.choices()

    kl, budget = {"kl": 0.1}, {"average": 4}
    assert choices(at_most=kl) == (2, 3, 4, 5, 6, 8)
    assert choices(at_most=kl, formats=["gguf"], symmetric=False) == (2, 3, 4, 5)
    assert choices(bits=budget) == (2, 3, 4, 8)
    assert choices(bits=budget, formats=["gguf"], symmetric=False) == (2, 3, 4)


def test_choices_by_name_stand_in_the_order_of_their_bits_and_overrides_win() -> None:
    rules = {"overrides": {"*.a": {"scheme": "fp8"}, "*.b": {"group_size": 32}, "*.c": {"bits": 5}}}
    goal = {"kl": 0.1, "choices": ["fp8a16", 8, "nvfp4a16", 4, 3]}
    spec = RTNSpec.model_validate({"at_most": goal, "modules": rules})
    assert spec.choices() == (3, 4, SchemeName.NVFP4A16, 8, SchemeName.FP8A16)

    def found(name: str, width: int) -> list[Scheme]:
        return [candidate.scheme for candidate in spec.candidates(name, width)]

    def integer(bits: int, group: int = 64) -> Scheme:
        return Scheme(bits=bits, group_size=group, symmetric=True)

    named = [Scheme.named(SchemeName.NVFP4A16), Scheme.named(SchemeName.FP8A16)]
    assert found("x", 128) == [integer(3), integer(4), named[0], integer(8), named[1]]
    assert found("x", 48) == [named[0], named[1]], "groups of 64 do not divide 48 inputs"
    assert found("x.a", 128) == [Scheme.named(SchemeName.FP8)]
    assert found("x.b", 128) == [integer(3, 32), integer(4, 32), integer(8, 32)]
    assert found("x.c", 128) == [integer(5)]
