"""States, schemes, formats and sources: the tables that the rest of the service reads."""

from dataclasses import replace
from typing import get_args

import pytest

from app.domain.attempt_lines import ATTEMPT_LINE
from app.domain.format_rules import default_formats, format_problems
from app.domain.formats import FORMATS, ExportFormat, LowRankRule
from app.domain.job_states import TRANSITIONS
from app.domain.methods import (
    METHODS,
    Form,
    ModuleRules,
    NormalFloatSpec,
    QuantizationSpec,
    RTNSpec,
    Scheme,
    SchemeOverride,
    SignRoundSpec,
)
from app.domain.request.sources import expand_source
from app.domain.runtimes import Support
from bitwright.errors import ERRORS
from bitwright.events import EVENT, LogEvent
from bitwright.job_states import FINAL_STATUSES, JobStatus


def scheme(bits: int, group_size: int = 64, symmetric: bool = True) -> Scheme:
    return Scheme(bits=bits, group_size=group_size, symmetric=symmetric)


def test_transitions_cover_every_status() -> None:
    assert set(TRANSITIONS) == set(JobStatus)
    assert set().union(*TRANSITIONS.values()) == set(JobStatus)


def test_a_final_status_is_left_only_by_a_retry() -> None:
    assert {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED} == FINAL_STATUSES
    for status in JobStatus:
        if status in FINAL_STATUSES:
            assert TRANSITIONS[status] <= {JobStatus.QUEUED}
    assert TRANSITIONS[JobStatus.SUCCEEDED] == frozenset()


def test_every_status_can_be_reached_and_ended() -> None:
    reached, waiting = set(), [JobStatus.QUEUED]
    while waiting:
        status = waiting.pop()
        if status not in reached:
            reached.add(status)
            waiting += TRANSITIONS[status]
    assert reached == set(JobStatus)
    for status in set(JobStatus) - FINAL_STATUSES:
        assert TRANSITIONS[status] & FINAL_STATUSES


def test_later_overrides_win_and_ignored_linears_have_no_scheme() -> None:
    spec = RTNSpec.model_validate(
        {
            "bits": 4,
            "modules": {
                "ignore": ["lm_head", "*.o_proj"],
                "overrides": {"*.mlp.*": {"bits": 8}, "*.down_proj": {"group_size": -1, "symmetric": False}},
            },
        }
    )
    assert spec.scheme_of("model.layers.0.self_attn.q_proj") == scheme(4)
    assert spec.scheme_of("model.layers.0.mlp.up_proj") == scheme(8)
    assert spec.scheme_of("model.layers.0.mlp.down_proj") == scheme(8, -1, False)
    assert spec.scheme_of("model.layers.0.self_attn.o_proj") is None
    assert spec.scheme_of("lm_head") is None


def test_every_method_names_its_spec_and_paper() -> None:
    for name, info in METHODS.items():
        assert info.spec.model_fields["method"].default == name
        assert info.paper is None or info.paper.count(".") == 1
        assert all(
            field.description for key, field in info.spec.model_fields.items() if key not in ("method", "modules")
        )


def test_every_method_may_be_asked_for() -> None:
    assert set(get_args(get_args(QuantizationSpec)[0])) == {info.spec for info in METHODS.values()}


def _literals(annotation: object) -> set[str]:
    """Values of a literal type, or of a union of such."""
    return {value for each in get_args(annotation) for value in ([each] if isinstance(each, str) else _literals(each))}


@pytest.mark.parametrize("name", [name for name, info in METHODS.items() if info.presets])
def test_presets_are_the_values_of_the_specs_field_and_its_defaults_are_one_of_them(name: str) -> None:
    info = METHODS[name]
    field = info.spec.model_fields["preset"]
    assert _literals(field.annotation) == set(info.presets)
    for preset in info.presets.values():
        assert info.spec.model_validate(dict(preset.spec))
    assert info.spec.model_validate(dict(info.presets[field.default].spec)) == info.spec()


def test_what_does_not_calibrate_does_not_tune() -> None:
    for info in METHODS.values():
        assert info.needs_calibration or info.spec().tuned_sequences(100) == 0
    assert SignRoundSpec(steps=10, batch_size=8).tuned_sequences(4) == 40


def test_every_method_has_a_format() -> None:
    for info in METHODS.values():
        assert info.spec().forms() <= info.produces
        assert format_problems(info.spec(), default_formats(info.spec())) == []


def test_native_holds_everything() -> None:
    native = FORMATS[ExportFormat.NATIVE]
    assert native.kinds | {Form.LOW_RANK} == set(Form)
    assert native.low_rank is LowRankRule.KEEPS
    assert (native.bits, native.symmetries) == (frozenset(range(2, 9)), frozenset({True, False}))


@pytest.mark.parametrize("export_format", ExportFormat)
def test_the_table_knows_every_format_and_a_tested_runtime(export_format: ExportFormat) -> None:
    info = FORMATS[export_format]
    assert any(runtime.support is Support.TESTED for runtime in info.runtimes)
    for runtime in info.runtimes:
        assert runtime.bits <= info.bits
        assert (runtime.asymmetric_bits or frozenset()) <= runtime.bits


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("export_format", ExportFormat)
def test_a_format_refuses_exactly_the_widths_that_it_lacks(
    bits: int, symmetric: bool, export_format: ExportFormat
) -> None:
    found = format_problems(RTNSpec(bits=bits, symmetric=symmetric), (export_format,))
    found = [problem for problem in found if not problem.field.startswith("formats.")]
    info = FORMATS[export_format]
    held = bits in info.bits and (symmetric or info.asymmetric_bits is None or bits in info.asymmetric_bits)
    refused = {"quantization.bits": not held, "quantization.symmetric": symmetric not in info.symmetries}
    assert [problem.field for problem in found] == [field for field, lacks in refused.items() if lacks]
    assert all(problem.code in ERRORS for problem in found)
    assert all('["native"]' in problem.detail for problem in found)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_format_may_hold_one_symmetry_alone(held: bool, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ExportFormat.MERGED
    monkeypatch.setattr(row, "info", replace(row.info, symmetries=frozenset({held})))
    override = SchemeOverride(symmetric=symmetric)
    for spec, field in (
        (RTNSpec(symmetric=symmetric), "symmetric"),
        (RTNSpec(symmetric=held, modules=ModuleRules(overrides={"*.a": override})), "modules.overrides.*.a.symmetric"),
    ):
        found = format_problems(spec, (row,))
        assert [problem.field for problem in found] == ([] if held is symmetric else [f"quantization.{field}"])
        assert all(f"set symmetric to {str(held).lower()}, or ask for" in problem.detail for problem in found)
    only = format_problems(NormalFloatSpec(), (row,))
    assert [problem.detail for problem in only] == (
        [] if held else ['merged cannot hold symmetric weights; ask for formats: ["bitsandbytes"] or ["native"]']
    )


class MadeSpec(RTNSpec):
    """A method that makes what the test says."""

    made: frozenset[Form]

    def forms(self) -> frozenset[Form]:
        return self.made


NF, LORA = frozenset({Form.CODEBOOK}), frozenset({Form.LOW_RANK})
AFFINE = frozenset({Form.AFFINE})
CT, MERGED, PEFT, NATIVE = (ExportFormat(n) for n in ("compressed-tensors", "merged", "peft", "native"))


@pytest.mark.parametrize(
    ("made", "formats", "refused"),
    [
        (AFFINE, (NATIVE, CT, MERGED), {}),
        (AFFINE, (CT, PEFT), {1: "peft holds low-rank factors, and rtn makes none"}),
        (AFFINE | LORA, (NATIVE, MERGED, PEFT), {}),
        (AFFINE | LORA, (CT, PEFT), {}),
        (AFFINE | LORA, (NATIVE, CT), {1: 'without the low-rank factors of rtn; add "peft"'}),
        (NF, (NATIVE, MERGED), {}),
        (NF, (PEFT, MERGED), {0: "makes none"}),
        (
            NF,
            (CT,),
            {0: "cannot hold the codebook weights of rtn; formats that can: bitsandbytes, merged, native, peft"},
        ),
        (NF | LORA, (MERGED, PEFT), {}),
        (NF | LORA, (CT, PEFT), {0: "cannot hold the codebook weights"}),
        (NF | AFFINE, (CT, MERGED), {0: "cannot hold the codebook weights"}),
    ],
)
def test_formats_refuse_the_forms_that_they_cannot_hold(
    made: frozenset[Form], formats: tuple[ExportFormat, ...], refused: dict[int, str]
) -> None:
    found = format_problems(MadeSpec(made=made), formats)
    assert [problem.field for problem in found] == [f"formats.{index}" for index in refused]
    for problem, words in zip(found, refused.values(), strict=True):
        assert problem.code == "format_cannot_hold"
        assert words in problem.detail


@pytest.mark.parametrize(
    ("made", "formats"),
    [(AFFINE, (CT,)), (AFFINE | LORA, (CT, PEFT)), (NF, (MERGED,)), (NF | LORA, (MERGED, PEFT))],
)
def test_default_formats_hold_what_is_made(made: frozenset[Form], formats: tuple[ExportFormat, ...]) -> None:
    assert default_formats(MadeSpec(made=made)) == formats
    assert format_problems(MadeSpec(made=made), formats) == []


def test_an_override_that_the_format_lacks_is_named_by_its_pattern() -> None:
    modules = {"overrides": {"*.down_proj": SchemeOverride(bits=7)}}
    spec = RTNSpec.model_validate({"symmetric": False, "group_size": 64, "modules": modules})
    found = format_problems(spec, (ExportFormat.NATIVE, ExportFormat.GGUF))
    assert [(problem.field, problem.value) for problem in found] == [
        ("quantization.modules.overrides.*.down_proj.bits", 7)
    ]


@pytest.mark.parametrize("value", [None, 4, ["a"], {"source": "hub"}])
def test_only_texts_are_shorthand_of_a_source(value: object) -> None:
    assert expand_source(value) is value


def test_events_go_through_a_line_of_json() -> None:
    event = LogEvent(event="block_quantized", fields={"block": 3})
    assert EVENT.validate_json(event.model_dump_json()) == event
    assert ATTEMPT_LINE.validate_json(event.model_dump_json()) == event
