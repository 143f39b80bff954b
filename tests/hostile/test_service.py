"""Every file of the corpus through the API, which refuses it with its code and goes on."""

import os
import resource
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.inspection import inspector
from tests.api.checkpoints import write_checkpoint
from tests.api.conftest import Api, make_settings, run_api
from tests.hostile.corpus import cases
from tests.hostile.inputs import inputs

SECONDS, OWN_BYTES = 10.0, 256 << 20
"""The most that a case may take, and that the API's process may grow by; its children have limits of their own."""


@pytest.fixture
def api(tmp_path: Path, sqlite_url: str) -> Iterator[Api]:
    yield from run_api(make_settings(tmp_path, sqlite_url))


@pytest.mark.parametrize("method", ["signround", pytest.param("rtn", marks=pytest.mark.slow)])
def test_every_case_is_refused_with_its_code_and_the_service_goes_on(api: Api, method: str) -> None:
    """By a method that runs the model, and by one that reads its weights alone, of any type of model."""
    assert inspector.LIMITS.memory_bytes <= 1 << 30
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    root, wrong, slow = api.folder / "models", dict[str, str](), dict[str, float]()
    corpus = cases()
    kinds = Counter(case.name.partition(":")[0].partition(" by ")[0] for case in corpus)
    print(f"{len(corpus)} hostile checkpoints: {dict(kinds)}; {len(inputs())} hostile inputs of attempts")  # noqa: T201 (how many there are)
    assert len(corpus) >= 200
    for number, case in enumerate(corpus):
        folder = root / f"case-{number}"
        folder.mkdir()
        case.make(folder)
        begun = time.monotonic()
        response = api.client.post("/v1/jobs?dry_run=true", json={"model": str(folder), "method": method, "bits": 4})
        seconds = time.monotonic() - begun
        if seconds > SECONDS:
            slow[case.name] = seconds
        code = response.json().get("code")
        if (response.status_code, code) != (422, case.code):
            wrong[case.name] = f"{response.status_code} {code}, not {case.code}: {response.text[:200]}"
    assert not wrong
    assert not slow
    sound = write_checkpoint(root / "sound")
    answer = api.client.post("/v1/jobs?dry_run=true", json={"model": str(sound), "method": "signround", "bits": 4})
    assert answer.status_code == 200, answer.text
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < OWN_BYTES


@pytest.mark.parametrize("name", ["header: a shape of halves", "config: deep objects", "gguf: sides that wrap around"])
def test_the_worker_refuses_the_same(name: str, tmp_path: Path) -> None:
    from bitwright.errors import InputError
    from workers.engine.model.checkpoint import Checkpoint

    case = next(case for case in cases() if case.name == name)
    case.make(tmp_path)
    with pytest.raises(InputError) as refused:
        Checkpoint.open(tmp_path)
    assert refused.value.code == case.code
    assert os.listdir(tmp_path)
