"""The runtimes that a worker finds, without importing one, and the child that it keeps for them."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from app.limited.limits import Ended, Limits
from app.limited.process import Handle, LimitedProcess
from app.settings import Settings
from tests.supervise.bench import Bench, alive, wait_for
from workers.supervise import runtimes
from workers.supervise.heartbeat import Heartbeat
from workers.supervise.runtimes import WarmReader, found_runtimes

ECHO = (sys.executable, "-c", "import sys\nfor line in sys.stdin: print(line.strip(), flush=True)")


def program(path: Path, says: str) -> Path:
    path.write_text(f"#!/bin/sh\n{says}\n")
    path.chmod(0o700)
    return path


def test_packages_are_found_by_their_metadata(tmp_path: Path) -> None:
    found = found_runtimes(Settings(data_dir=tmp_path))
    assert {name: place.version for name, place in found.items()} == {
        "transformers": version("transformers"),
        "peft": version("peft"),
    }


@pytest.mark.parametrize(
    ("file", "release"),
    [("libllama.v0.5.0.so", "0.5.0"), ("libllama.so.0.0.6123", "0.0.6123"), ("libllama.so", "unknown")],
)
def test_what_settings_name_is_found_where_it_is(tmp_path: Path, file: str, release: str) -> None:
    (tmp_path / "llama" / "bin").mkdir(parents=True)
    (tmp_path / "llama" / "bin" / file).touch()
    python = program(tmp_path / "python", "echo 0.32.0")
    found = found_runtimes(Settings(data_dir=tmp_path, llama_cpp=tmp_path / "llama", vllm_python=python))
    assert (found["llama.cpp"].version, found["llama.cpp"].place) == (release, str(tmp_path / "llama"))
    assert (found["vllm"].version, found["vllm"].place) == ("0.32.0", str(python))


@pytest.mark.parametrize("says", ["exit 1", "true"])
def test_what_is_named_and_not_there_is_no_runtime(tmp_path: Path, says: str) -> None:
    python = program(tmp_path / "python", says)
    found = found_runtimes(Settings(data_dir=tmp_path, llama_cpp=tmp_path, vllm_python=python))
    missing = found_runtimes(Settings(data_dir=tmp_path, vllm_python=tmp_path / "no-python"))
    assert not {"llama.cpp", "vllm"} & (found.keys() | missing.keys())


def test_a_worker_imports_none_of_them() -> None:
    code = (
        "import sys; from pathlib import Path; from app.settings import Settings\n"
        "from workers.supervise.runtimes import found_runtimes; found_runtimes(Settings())\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_heartbeat_names_them(sqlite_bench: Bench) -> None:
    described = Heartbeat(sqlite_bench.context)._description(0.0)
    assert described["runtimes"] == {}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WarmReader:
    monkeypatch.setattr(runtimes, "HOST", ECHO)
    return WarmReader(tmp_path)


def test_one_child_serves_one_attempt_after_another(reader: WarmReader) -> None:
    pids = []
    for number in range(2):
        with reader.lent() as child:
            borrowed = LimitedProcess(Handle(child.orders, child.answers, child.pid))
            outcome = borrowed.ask(json.dumps(number).encode(), Limits(20, 1 << 30))
            assert (outcome.ended, outcome.answer) == (Ended.ANSWERED, b"%d" % number)
            pids.append(child.pid)
    assert len(set(pids)) == 1
    reader.close()
    wait_for(lambda: not alive(pids[0]), 10)


def test_after_an_attempt_that_ended_badly_the_next_one_gets_another(reader: WarmReader) -> None:
    with pytest.raises(RuntimeError, match="lost"), reader.lent() as first:
        raise RuntimeError("lost")
    wait_for(lambda: not alive(first.pid), 10)
    with reader.lent() as second:
        assert second.pid != first.pid
        os.killpg(second.pid, 9)
        wait_for(lambda: not alive(second.pid), 10)
    with reader.lent() as third:
        assert third.pid != second.pid
    reader.close()
    reader.close()
