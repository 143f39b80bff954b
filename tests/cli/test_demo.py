"""What the demo asks for; the demo itself is run by hand and by `make demo`."""

from pathlib import Path

from app.cli.demo import _model_roots
from app.domain.roots import check_links
from tests.api.checkpoints import as_hub_cache, write_checkpoint


def test_a_snapshot_of_a_hub_cache_may_be_read_with_its_blobs(tmp_path: Path) -> None:
    snapshot = as_hub_cache(write_checkpoint(tmp_path / "made"), tmp_path / "cache")
    roots = _model_roots(snapshot)
    assert roots == [tmp_path / "cache" / "models--org--model"]
    check_links(snapshot, tuple(roots))
    assert _model_roots(tmp_path / "made") == [tmp_path / "made"]
    assert _model_roots(Path("org/name")) == []
