"""The variables of child processes, and the times and sizes of supervision, written out: none is imported here."""

import sys
from types import ModuleType

import pytest
from pydantic import SecretStr

from app.store.attempts import Claim
from bitwright.job_states import DeviceClass
from tests.supervise.bench import Bench
from workers import sweep
from workers.child import attempt, lifeline
from workers.disk.orders import BUILTIN_TEXT
from workers.disk.workspace import Workspace
from workers.supervise import celery_app, child_process, heartbeat, runner
from workers.supervise.attempt import attempt_runner, events, lease, sources, world_size
from workers.supervise.child_env import attempt_environment, fetch_environment

SECRETS = {
    **{"BITWRIGHT_DATABASE_URL": "s", "BITWRIGHT_HUB_TOKEN": "s", "HF_TOKEN": "s", "AWS_SECRET_ACCESS_KEY": "s"},
    **{"PGPASSWORD": "s", "HF_ENDPOINT": "s", "REDIS_URL": "s", "PATHS": "s", "MY_TORCH": "s", "LANGUAGE": "s"},
}
PASSED = {
    **{"PATH": "p", "HOME": "h", "LANG": "l", "TZ": "t", "TMPDIR": "d", "LD_LIBRARY_PATH": "y", "VIRTUAL_ENV": "v"},
    **{"PYTHONPATH": "y", "SSL_CERT_FILE": "f", "LC_ALL": "C", "CUDA_VISIBLE_DEVICES": "1", "NVIDIA_X": "1"},
    **{"NCCL_DEBUG": "1", "GLOO_X": "1", "OMP_NUM_THREADS": "1", "MKL_X": "1", "TORCH_X": "1", "PYTORCH_X": "1"},
    **{"TORCHINDUCTOR_X": "1", "TRITON_CACHE_DIR": "1", "PYTHONHASHSEED": "0"},
}
NETWORK = {
    **{"HTTP_PROXY": "a", "HTTPS_PROXY": "b", "NO_PROXY": "c", "ALL_PROXY": "d", "http_proxy": "e", "no_proxy": "f"},
    **{"REQUESTS_CA_BUNDLE": "g", "SSL_CERT_DIR": "h", "CURL_CA_BUNDLE": "i"},
}
QUIET = {
    **{"DISABLE_SAFETENSORS_CONVERSION": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    **{"DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"},
}
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
COMPUTING = {
    **{"TOKENIZERS_PARALLELISM": "true", "GOMP_SPINCOUNT": "10000", "MALLOC_MMAP_THRESHOLD_": "33554432"},
    **{"MALLOC_TRIM_THRESHOLD_": "1073741824", "MALLOC_TOP_PAD_": "67108864", "NCCL_NVLS_ENABLE": "0"},
    **{"GLOO_SOCKET_IFNAME": LOOPBACK, "NCCL_SOCKET_IFNAME": LOOPBACK},
    **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
}


@pytest.fixture
def claimed(sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Claim:
    """A claim, in a process with just these variables."""
    sqlite_bench.submit("")
    claim = sqlite_bench.claim()
    monkeypatch.setattr("os.environ", {**SECRETS, **PASSED, **NETWORK})
    return claim


def names(claim: Claim, workspace: Workspace) -> dict[str, str]:
    return {
        **{"BITWRIGHT_JOB_ID": claim.job_id, "BITWRIGHT_ATTEMPT": "1"},
        **{"HF_HOME": str(workspace.folder / "cache")},
    }


def test_the_variables_of_an_attempt(sqlite_bench: Bench, workspace: Workspace, claimed: Claim) -> None:
    ahead = workspace.folder / "cache" / "kernels"
    own = {"NUMBA_CACHE_DIR": str(ahead), BUILTIN_TEXT: str(ahead / "builtin_text.json")}
    expected = {**PASSED, **QUIET, **COMPUTING, **names(claimed, workspace), **own}
    settings = sqlite_bench.context.settings.model_copy(update={"attempt_network": "shared"})
    told = attempt_environment(settings, DeviceClass.CPU, workspace, claimed)
    assert told == {**expected, "BITWRIGHT_ATTEMPT_NETWORK": "shared"}


@pytest.mark.parametrize(
    ("device", "ranks", "root", "network"),
    [("cpu", 1, True, "own"), ("cuda", 1, True, "own"), ("cuda", 1, False, "filtered"), ("cpu", 2, True, "joined")],
)
def test_the_network_and_the_user_of_an_attempt(
    sqlite_bench: Bench,
    workspace: Workspace,
    claimed: Claim,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    ranks: int,
    root: bool,
    network: str,
) -> None:
    monkeypatch.setattr("os.getuid", lambda: 0 if root else 1000)
    settings = sqlite_bench.context.settings.model_copy(update={"attempt_user": "10002"})
    told = attempt_environment(settings, DeviceClass(device), workspace, claimed, ranks)
    assert told["BITWRIGHT_ATTEMPT_NETWORK"] == network
    assert told.get("BITWRIGHT_ATTEMPT_USER") == ("10002" if root else None)
    assert (told.get("HOME") == str(workspace.folder)) == root
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    told = attempt_environment(settings, DeviceClass(device), workspace, claimed, ranks)
    assert told["BITWRIGHT_ATTEMPT_NETWORK"] == ("shared" if ranks > 1 else network)


def test_the_variables_of_a_fetch(sqlite_bench: Bench, workspace: Workspace, claimed: Claim) -> None:
    settings = sqlite_bench.context.settings
    plain = {**PASSED, **QUIET, **NETWORK, **names(claimed, workspace), "TOKENIZERS_PARALLELISM": "false"}
    expected = {**plain, "USE_TORCH": "0"}
    given = settings.model_copy(update={"hub_token": None, "hub_endpoint": None})
    assert fetch_environment(given, workspace, claimed) == expected
    given = settings.model_copy(update={"hub_token": SecretStr("hf_x"), "hub_endpoint": "http://hub"})
    told = fetch_environment(given, workspace, claimed)
    assert told == {**expected, "HF_TOKEN": "hf_x", "HF_ENDPOINT": "http://hub"}


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"GOMP_SPINCOUNT": "5"}, "5")],
)
def test_how_threads_wait_is_the_operators_to_say(
    sqlite_bench: Bench,
    workspace: Workspace,
    claimed: Claim,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    spins: str | None,
) -> None:
    monkeypatch.setattr("os.environ", given)
    told = attempt_environment(sqlite_bench.context.settings, DeviceClass.CPU, workspace, claimed)
    assert told.get("GOMP_SPINCOUNT") == spins
    assert told.get("OMP_WAIT_POLICY") == given.get("OMP_WAIT_POLICY")


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (attempt_runner, {"POLL_SECONDS": 0.2, "CONCLUDE_SECONDS": 120.0}),
        (
            child_process,
            {"PULSE_SECONDS": 1.0, "GRACE_SECONDS": 1.0, "ORPHAN_SECONDS": 1.0, "MAX_LINE_BYTES": 33_554_432},
        ),
        (events, {"FLUSH_SECONDS": 1.0, "MAX_WAITING": 10_000, "MAX_COMPLAINTS": 20}),
        (lease, {"RENEW_SECONDS": 1.5}),
        (
            heartbeat,
            {
                **{"HEARTBEAT_SECONDS": 10.0, "PRUNE_SECONDS": 3600.0, "DAY": 86_400.0, "SKEW_SECONDS": 2.0},
                **{"SKEW_CHANGE_SECONDS": 1.0},
            },
        ),
        (runner, {"JITTER": 0.25, "LONGEST_WAIT_SECONDS": 60.0}),
        (celery_app, {"SHORTEST_PAUSE_SECONDS": 1.0, "LONGEST_PAUSE_SECONDS": 30.0}),
        (sources, {"CHARACTERS_PER_TOKEN": 12}),
        (world_size, {"LEAST_WINDOWS": 2}),
        (attempt, {"LOCK_MARGIN_SECONDS": 10.0}),
        (lifeline, {"EXIT_FAILED": 1, "EXIT_ABANDONED": 76, "PR_SET_PDEATHSIG": 1}),
        (sweep, {"LEASE_ROUNDS": 3, "RETENTION_SECONDS": 600.0, "UNSEEN_SECONDS": 86_400.0, "DAY": 86_400.0}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, ModuleType) else "",
)
def test_times_and_sizes_of_supervision(module: ModuleType, expected: dict[str, float]) -> None:
    assert {name: getattr(module, name) for name in expected} == expected
