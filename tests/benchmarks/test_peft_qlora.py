"""Training steps against peft's: every side runs and tells the same things, and ratios are the right way round."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peft_qlora import OURS, PEERS, summary
from benchmarks.qlora_loop import Clock
from tests.tiny_model import tiny_model_folder

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
ROOT = Path(__file__).parents[2]
SIZES = ["--steps", "4", "--warm-up", "2", "--batch", "2", "--length", "32", "--rank", "2", "--recompute", "no"]


def lines(text: Path, *sides: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.peft_qlora", str(tiny_model_folder()), "--text", str(text), *SIZES]
    done = subprocess.run([*command, "--sides", *sides], cwd=ROOT, capture_output=True, check=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    rows = ["Codes lie on a grid, and scales say how far apart. " * 8, "A block is tuned against its own output. " * 8]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("sides", [OURS, pytest.param((OURS[0], *PEERS), marks=needs_bitsandbytes)], ids=str)
def test_all_sides_train_the_same_numbers_from_the_same_loss(sides: tuple[str, ...], text: Path) -> None:
    *runs, last = lines(text, *sides)
    assert [line["side"] for line in runs] == list(sides)
    first = runs[0]
    for line in runs:
        assert "failed" not in line
        assert not line["recompute"]
        assert line["seconds_a_step"] > 0
        assert line["tokens_a_second"] == pytest.approx(2 * 32 / line["seconds_a_step"], rel=0.01)
        assert line["trained"] == first["trained"]
        assert line["loss"][0] == pytest.approx(first["loss"][0], rel=0.002), "B = 0: the base alone"
        assert line["loss"][1] != line["loss"][0]
    kept = {line["side"]: line["weights_kept"] for line in runs if line["side"] in OURS}
    assert kept == {side: side == "ours" for side in sides if side in OURS}
    assert last["device"]


def line(side: str, speed: float, peak: float | None, *, recompute: bool = False) -> dict[str, Any]:
    return {"side": side, "recompute": recompute, "tokens_a_second": speed, "peak_gib": peak, "trained": 5}


def test_ratios_are_ours_to_theirs_among_runs_of_a_kind() -> None:
    runs = [line("ours", 300.0, 1.0), line("peer", 100.0, 4.0), line("peer", 50.0, 2.0, recompute=True)]
    found = summary(runs)["ratio"]
    assert found == {"ours / peer": {"speed": 3.0, "memory": 0.25, "same_parameters": True}}
    runs += [line("packed", 100.0, None, recompute=True) | {"trained": 6}]
    assert summary(runs)["ratio"]["packed / peer, recomputed"] == {
        "speed": 2.0,
        "memory": None,
        "same_parameters": False,
    }


def test_the_clock_counts_the_steps_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.qlora_loop.time.perf_counter", iter([100.0, 103.0]).__next__)
    clock = Clock(warm_up=2, steps=5, tokens=600)
    for _ in range(5):
        clock.tick()
    assert clock.figures()["seconds_a_step"] == 1.0
    assert clock.figures()["tokens_a_second"] == 600.0
