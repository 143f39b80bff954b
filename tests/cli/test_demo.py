"""What the demo asks for; the demo itself is run by hand and by `make demo`."""

from pathlib import Path

import pytest

from app.cli.demo import METHOD, _model_roots, _quick_tuning
from app.domain.methods import METHODS
from app.domain.roots import check_links
from tests.api.checkpoints import as_hub_cache, write_checkpoint


def test_a_snapshot_of_a_hub_cache_may_be_read_with_its_blobs(tmp_path: Path) -> None:
    snapshot = as_hub_cache(write_checkpoint(tmp_path / "made"), tmp_path / "cache")
    roots = _model_roots(snapshot)
    assert roots == [tmp_path / "cache" / "models--org--model"]
    check_links(snapshot, tuple(roots))
    assert _model_roots(tmp_path / "made") == [tmp_path / "made"]
    assert _model_roots(Path("org/name")) == []


@pytest.mark.parametrize("method", [*METHODS, "auto-round", "nonesuch"])
def test_a_method_by_its_plain_name_is_tuned_quickly(method: str) -> None:
    quick = _quick_tuning(method, None, None)
    takes = METHODS[method].spec.model_fields if method in METHODS else {}
    assert quick["preset"] == ("light" if "preset" in takes else None)
    assert quick["batch_size"] in ({1, 2} if "batch_size" in takes else {None})
    assert _quick_tuning(method, "best", 8) == {"preset": "best", "batch_size": 8}


def test_the_default_method_is_one_of_the_table() -> None:
    assert METHOD in METHODS
