"""Presets: what they fill in, and where codes move more of it."""

import pytest

from app.domain.methods import METHODS
from app.domain.request.job_request import JobRequest


@pytest.mark.parametrize(
    ("method", "preset"), [(method, preset) for method, info in METHODS.items() for preset in info.presets]
)
def test_a_preset_fills_what_the_request_leaves_open(method: str, preset: str) -> None:
    meant, body = METHODS[method].presets[preset], {"model": "org/name", "method": method, "preset": preset}
    request = JobRequest.parse({**body, "calibration": {"num_samples": 7}})
    assert meant.spec.items() <= request.quantization.model_dump().items()
    assert (request.calibration.num_samples, request.calibration.sequence_length) == (7, meant.sequence_length)
    for field, value in meant.spec.items():
        other = not value if isinstance(value, bool) else value + 1
        assert JobRequest.parse({**body, field: other}).quantization.model_dump()[field] == other


@pytest.mark.parametrize(("bits", "steps", "further"), [(2, 400, 512), (3, 400, 512), (4, 100, 0), (8, 100, 0)])
def test_a_preset_gives_few_bits_more_text(bits: int, steps: int, further: int) -> None:
    body = {"model": "org/name", "method": "signround", "preset": "best"}
    overrides = {"modules": {"overrides": {"down_proj": {"bits": bits}}}}
    mixed = {"model": "org/name", "quantization": {"method": "signround", "preset": "best", "bits": 4, **overrides}}
    for asked in (body | {"bits": bits}, mixed):
        request = JobRequest.parse(asked)
        assert request.quantization.end_to_end_steps() == steps
        assert request.calibration.further_samples == further
        assert request.calibration.tokens_read == (128 + further) * 2048
    given = JobRequest.parse({**body, "bits": bits, "calibration": {"further_samples": 3}})
    assert given.calibration.further_samples == 3
    most = JobRequest.parse({**body, "preset": "max", "bits": bits})
    assert most.calibration.written_samples == (1024 if bits <= 3 else 0)
    given = JobRequest.parse({**body, "preset": "max", "bits": bits, "calibration": {"written_samples": 0}})
    assert given.calibration.written_samples == 0


@pytest.mark.parametrize(("average", "steps"), [(2.5, 400), (3.75, 400), (4.25, 100)])
def test_a_preset_gives_a_low_average_more_text(average: float, steps: int) -> None:
    body = {
        "model": "org/name",
        "quantization": {"method": "signround", "preset": "best", "bits": {"average": average}},
    }
    request = JobRequest.parse(body)
    assert request.quantization.end_to_end_steps() == steps
    assert request.calibration.further_samples == (512 if steps == 400 else 0)


@pytest.mark.parametrize(
    ("scheme", "steps"),
    [
        *[("mxfp4a16", 400), ("mxfp4", 400), ("nvfp4", 100), ("fp8", 100), ("int8", 100)],
        *[("q2_k", 400), ("iq4_xs", 400), ("q6_k", 100)],
        *[("Q2_K_M", 400), ("q4_k_m", 400), ("q5_k_m", 100)],
    ],
)
def test_a_preset_takes_more_steps_where_codes_move(scheme: str, steps: int) -> None:
    body = {"model": "org/name", "method": "signround", "preset": "best", "scheme": scheme}
    assert JobRequest.parse(body).quantization.model_dump()["scale_steps"] == steps
    assert JobRequest.parse({**body, "scale_steps": 7}).quantization.model_dump()["scale_steps"] == 7
    most = {"mxfp4": 1600, "mxfp4a16": 1600}.get(scheme, 1200 if steps == 400 else 400)
    assert JobRequest.parse({**body, "preset": "max"}).quantization.model_dump()["scale_steps"] == most
    assert JobRequest.parse({**body, "preset": "light"}).quantization.model_dump()["scale_steps"] == 0
