"""Bodies that `submit` sends: flags, files, and flags on top of files, checked by the service's own parser."""

from pathlib import Path
from typing import Any

import pytest

from app.domain.methods import AtMost, Fits
from app.domain.request.job_request import JobRequest
from bitwright.cli.jobs import parse_labels
from bitwright.cli.submit import goal_fields, parse_overrides, parse_scheme, read_request, set_quantization, width
from bitwright.errors import InvalidRequest, MalformedBody, RequestError


def test_flags_alone_make_a_shorthand_request() -> None:
    body: dict[str, Any] = {"model": "org/name"}
    set_quantization(body, {"method": "signround", "bits": 3, "group_size": None}, None, {})
    assert body == {"model": "org/name", "method": "signround", "bits": 3}


def test_flags_say_a_goal_in_place_of_bits() -> None:
    def request(*flags: Any) -> JobRequest:
        body: dict[str, Any] = {"model": "org/name", "method": "gptq"}
        set_quantization(body, goal_fields(*flags), None, {})
        return JobRequest.parse(body)

    assert request(0.05, None, None, None, None).quantization.goal() == AtMost(kl=0.05)
    assert request(None, "90MB", None, None, None).quantization.goal() == AtMost(bytes=90_000_000)
    assert request(None, "4096", None, None, None).quantization.goal() == AtMost(bytes=4096)
    fits = request(None, None, "1GiB", 2048, 4).quantization.goal()
    assert fits == Fits(memory=1 << 30, context=2048, sequences=4)
    assert request(None, None, None, None, None).quantization.goal() is None


def test_module_rules_move_a_shorthand_request_into_its_full_form() -> None:
    body: dict[str, Any] = {"model": "org/name", "method": "rtn", "bits": 4}
    set_quantization(body, {"bits": 3}, ["lm_head", "*.o_proj"], parse_overrides(["*.down_proj=8"]))
    request = JobRequest.parse(body)
    assert request.quantization.bits == 3
    assert request.quantization.modules.ignore == ("lm_head", "*.o_proj")
    assert (
        request.quantization.scheme_of("model.layers.0.mlp.down_proj")
        == dict(request.quantization.schemes())["*.down_proj"]
    )


def test_an_override_names_a_width_or_a_scheme() -> None:
    body: dict[str, Any] = {"model": "org/name", "method": "rtn", "bits": 4}
    set_quantization(body, {}, None, parse_overrides(["*.down_proj=8", "*.o_proj=fp8"]))
    overrides = JobRequest.parse({**body, "formats": ["native"]}).quantization.modules.overrides
    assert (overrides["*.down_proj"].bits, overrides["*.o_proj"].scheme) == (8, "fp8")


def test_a_scheme_that_there_is_not_is_named_with_those_that_there_are() -> None:
    body: dict[str, Any] = {"model": "org/name", "method": "rtn", "bits": 4}
    set_quantization(body, {}, None, parse_overrides(["*.down_proj=four"]))
    with pytest.raises(InvalidRequest) as caught:
        JobRequest.parse(body)
    (problem,) = caught.value.errors
    assert problem.field == "quantization.modules.overrides.*.down_proj.scheme"
    assert problem.value == "four"
    assert "nvfp4" in problem.detail


def test_the_mean_of_widths_takes_the_place_of_a_width() -> None:
    assert width(4, None) == 4
    assert width(None, None) is None
    quantization = JobRequest.parse({"model": "org/name", "method": "lq-lora", "bits": width(None, 2.75)}).quantization
    budget = quantization.budget()
    assert budget is not None
    assert budget.average == 2.75
    with pytest.raises(RequestError) as caught:
        width(4, 2.75)
    assert caught.value.field == "average_bits"


def test_embeddings_and_head_are_said_by_a_width_or_a_name() -> None:
    body: dict[str, Any] = {"model": "org/name", "method": "rtn", "bits": 2}
    set_quantization(body, {}, None, {}, {"embeddings": parse_scheme("4"), "head": parse_scheme("fp8")})
    body["formats"] = ["native"]
    modules = JobRequest.parse(body).quantization.modules
    assert modules.embeddings is not None
    assert modules.head is not None
    assert (modules.embeddings.bits, modules.head.scheme) == (4, "fp8")


def test_flags_win_over_the_full_form_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: org/name\nquantization:\n  method: signround\n  bits: 4\n  group_size: 128\n")
    body = read_request(file)
    set_quantization(body, {"bits": 2}, None, {})
    quantization = JobRequest.parse(body).quantization
    assert (quantization.bits, quantization.group_size) == (2, 128)


def test_json_is_read_as_well(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text('{"model": "org/name", "method": "rtn", "bits": 8}')
    assert JobRequest.parse(read_request(file)).quantization.bits == 8


@pytest.mark.parametrize("text", ["- a\n- list\n", "{unclosed", "!!python/object:os.system {}"])
def test_a_file_that_is_no_request_is_a_bad_request(tmp_path: Path, text: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(MalformedBody):
        read_request(file)


def test_a_missing_file_is_a_bad_request(tmp_path: Path) -> None:
    with pytest.raises(MalformedBody, match="nowhere"):
        read_request(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("override", ["down_proj", "=4", "down_proj="])
def test_an_override_that_is_not_pattern_and_bits_is_a_bad_request(override: str) -> None:
    with pytest.raises(RequestError, match="PATTERN=BITS"):
        parse_overrides([override])


def test_labels() -> None:
    assert parse_labels(["commit=abc", "url=a=b"]) == {"commit": "abc", "url": "a=b"}
    with pytest.raises(RequestError, match="name=value"):
        parse_labels(["commit"])
