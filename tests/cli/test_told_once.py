"""Nothing that the command line prints of an error stands there twice, and nothing of a request file is passed over."""

from pathlib import Path

import pytest

from app.domain.request.job_request import JobRequest
from bitwright.cli.jobs import parse_labels
from bitwright.cli.render import error_lines, loads_text
from bitwright.cli.submit import parse_overrides, read_request
from bitwright.errors import FieldProblem, InvalidRequest, MalformedBody, RequestError, SourceForbidden
from bitwright.report import LoadReport


def refusal(body: dict[str, object]) -> InvalidRequest:
    """The error of a request."""
    with pytest.raises(InvalidRequest) as caught:
        JobRequest.parse(body)
    return caught.value


def test_one_problem_is_one_line() -> None:
    lines = error_lines(refusal({"model": "org/model", "method": "rtn", "bits": 9}))
    assert len(lines) == 1
    assert lines[0].count("2 to 8") == 1
    assert lines[0].endswith("(got 9)")


def test_of_several_problems_each_is_a_line() -> None:
    lines = error_lines(refusal({"model": "org/model", "method": "rtn", "bits": 9, "seed": -1}))
    assert lines[0] == "2 things are wrong"
    assert len(lines) == 3
    assert len({line.partition(":")[0] for line in lines[1:]}) == 2


def test_a_hint_that_a_problem_has_is_not_repeated() -> None:
    problem = FieldProblem(field="model.path", code="source_forbidden", detail="/x is outside; name a root")
    error = SourceForbidden("model.path: /x is outside; name a root", hint="name a root", errors=(problem,))
    assert error_lines(error) == ["model.path: /x is outside; name a root"]
    assert error_lines(SourceForbidden("/x is outside", hint="name a root")) == ["/x is outside", "name a root"]


@pytest.mark.parametrize("text", ["model: a\nbits: 4\nbits: 3\n", '{"model": "a", "require": {"x": 1, "x": 2}}'])
def test_a_name_that_stands_twice_in_a_file_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "request.yaml"
    file.write_text(text)
    with pytest.raises(MalformedBody, match="stands twice"):
        read_request(file)


def test_yaml_s_own_merging_is_none_of_that(tmp_path: Path) -> None:
    file = tmp_path / "request.yaml"
    file.write_text("model: a\nmetadata: &m {a: b}\ncalibration: {<<: *m, num_samples: 2}\n")
    assert read_request(file)["calibration"] == {"a": "b", "num_samples": 2}


def test_a_flag_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(RequestError, match="twice"):
        parse_overrides(["*.down_proj=8", "*.down_proj=4"])
    with pytest.raises(RequestError, match="twice"):
        parse_labels(["a=1", "a=2"])


def test_a_runtimes_last_word_on_a_format_is_told_once() -> None:
    told = {"format": "merged", "runtime": "vllm", "version": "0.32.0"}
    block = LoadReport.model_validate(told | {"read": "block", "result": "loads"})
    files = LoadReport.model_validate(told | {"read": "files", "result": "differs"})
    other = LoadReport.model_validate(
        {"format": "gguf", "runtime": "llama.cpp", "read": "block", "result": "not_checked"}
    )
    assert loads_text([files, block, other]) == {
        "merged in vllm 0.32.0": "misreads the files",
        "gguf in llama.cpp": "not tried with one block",
    }
