"""QLoRA's base as a whole job."""

from pathlib import Path

import pytest

from app.domain.methods import Form
from tests.engine.conftest import run_job


@pytest.mark.parametrize(("double", "scales"), [(True, 8 / 32 + 32 / (32 * 256)), (False, 16 / 32)])
def test_a_job_reports_the_form_the_size_and_the_loss(
    double: bool, scales: float, small_model: Path, tmp_path: Path
) -> None:
    report = run_job(small_model, tmp_path, method="nf", double_quantization=double, formats=("merged",)).report
    linear = report.blocks[0].linears[0]
    assert (linear.form, linear.bits, linear.group_size) == (Form.CODEBOOK, 4, 32)
    assert 0.05 < linear.weight_error < 0.12
    assert report.size.parts is not None
    assert report.size.parts.codes == 4
    assert report.size.parts.scales == pytest.approx(scales, abs=0.02)
    assert report.quality is not None
    assert 0 < report.quality.kl_divergence < 0.2
