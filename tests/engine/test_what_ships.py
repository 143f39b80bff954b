"""What is told is what ships: every result, loaded by its stock loader, has the perplexity that its report tells."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.domain.events import ResultLine
from tests.engine import shipping
from tests.engine.shipping import Case

TOLERANCE = 0.005

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
]


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained tiny model in every dtype."""
    found = {"bfloat16": tiny_model}
    for name in ("float16", "float32"):
        folder = found[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, name)).save_pretrained(folder)
        for file in tiny_model.glob("tokenizer*"):
            (folder / file.name).write_bytes(file.read_bytes())
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipping.write_rows(tmp_path_factory.mktemp("rows"))


def assert_told_truly(result: ResultLine, output: Path, ids: torch.Tensor) -> None:
    report = result.report
    assert report.quality is not None
    assert report.shipped[0].whole
    assert report.quality.perplexity == report.shipped[0].figures.perplexity
    for way, checkpoint, found in shipping.measured(result, output, ids):
        assert way.figures.perplexity == pytest.approx(found, rel=TOLERANCE), (way, checkpoint)
    told = {folder for way in report.shipped if way.whole for folder in (*way.checkpoints, way.adapter)}
    # Beside a checkpoint in peft's format the adapter file is the same; what it was folded into it is no part of.
    assert set(result.checkpoints) - told <= {"adapter"}
    for folder in set(result.checkpoints) - {"adapter"}:
        quality = report.quality_of(folder)
        assert quality is not None
        assert shipping.card_perplexity(output / folder) == pytest.approx(quality.perplexity, abs=1e-4)


def check(case: Case, models: dict[str, Path], rows: Path, workspace: Path) -> None:
    model = models[case.dtype]
    request = case.request(model, rows)
    result = shipping.run_case(request, model, rows, workspace)
    assert_told_truly(result, workspace / "output", shipping.windows(request, model))


@pytest.mark.parametrize("case", shipping.pairwise(), ids=str)
def test_the_report_speaks_of_what_is_loaded(case: Case, models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    """Any two of adapter, base, merge and rounding, formats, width and dtype that go together."""
    check(case, models, rows, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", shipping.product(), ids=str)
def test_every_product_is_told_truly(case: Case, models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    check(case, models, rows, tmp_path)
