"""Environment of child processes: the variables they are given, and those that are kept from them."""

import os
import sys
from pathlib import Path

from app.hub.environment import network_variables
from app.idle_threads import waiting
from app.settings import Settings
from app.store.attempts import Claim
from bitwright.job_states import DeviceClass
from workers.child.confinement import FILTERED, JOINED, NETWORK, OWN, SHARED, USER
from workers.child.lifeline import ATTEMPT, JOB_ID
from workers.disk.orders import BUILTIN_TEXT
from workers.disk.workspace import Workspace
from workers.supervise.child_process import child_environment

ALWAYS = {
    # Else transformers sends model id and token to a public service when a repository holds only pickles.
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

TOKENIZING = {
    # An attempt never forks, which is what tokenizers warn of.
    "TOKENIZERS_PARALLELISM": "true",
}

ALLOCATOR = {
    # Activations of a step are freed and asked for again all the time: keep their pages instead of giving them back,
    # which costs more than the arithmetic on them. 32 MiB is the most that glibc takes.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
RANKS = {
    # Ranks of a job are on one machine, and nothing else has business with them.
    "GLOO_SOCKET_IFNAME": LOOPBACK,
    "NCCL_SOCKET_IFNAME": LOOPBACK,
    # Multicast objects belong to the whole host, and attempts end by SIGKILL.
    "NCCL_NVLS_ENABLE": "0",
}
"""Defaults: a variable that an operator has set goes first."""

ROWS_ONLY = {"USE_TORCH": "0"}
"""`datasets` loads torch where it is installed: seconds, and for tensors that a fetch never makes."""

KERNELS = "NUMBA_CACHE_DIR"
TEXTS = "builtin_text.json"
"""File beside the kernels: the builtin text, which takes seconds to find in the standard library."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def attempt_environment(
    settings: Settings, device: DeviceClass, workspace: Workspace, claim: Claim, ranks: int = 1
) -> dict[str, str]:
    """Of the attempt: offline, and with caches that go with the workspace."""
    return _computing(settings, device, workspace.folder, ranks) | _names(claim)


def spare_environment(settings: Settings, device: DeviceClass, folder: Path) -> dict[str, str]:
    """Of a process that will be an attempt: the same without a job's names, and with caches in a folder of its own."""
    return _computing(settings, device, folder, ranks=1)


def kernel_environment(folder: Path) -> dict[str, str]:
    """Of the child that compiles loops for those to come, into `folder`."""
    return _calm(folder, _made_ahead(folder))


def kernels_in(folder: Path) -> Path:
    """The place of compiled loops in the folder of a process's own."""
    return folder / "cache" / "kernels"


def _computing(settings: Settings, device: DeviceClass, folder: Path, ranks: int) -> dict[str, str]:
    caches = _made_ahead(kernels_in(folder))
    limits = {NETWORK: _network(settings, device, ranks)}
    user = attempt_user(settings)
    if user is not None:
        limits[USER] = str(user)
        caches |= {"HOME": str(folder), "TRITON_CACHE_DIR": str(compiled_folder(settings, user))}
    return _calm(folder, caches | limits)


def _calm(folder: Path, more: dict[str, str]) -> dict[str, str]:
    """Of any child that computes: offline, and with caches in a folder of its own."""
    caches = {"HF_HOME": str(folder / "cache")}
    return RANKS | child_environment(ALWAYS | TOKENIZING | ALLOCATOR | waiting() | OFFLINE | caches | more)


def attempt_user(settings: Settings) -> int | None:
    """The user that attempts run as; None: the worker's own, which is so wherever that is not root."""
    return None if settings.attempt_user is None or os.getuid() != 0 else int(settings.attempt_user)


def compiled_folder(settings: Settings, user: int) -> Path:
    """The folder in which attempts of a user keep what Triton compiles, for later ones."""
    return settings.workspace_dir / f"compiled-{user}"


def _network(settings: Settings, device: DeviceClass, ranks: int) -> str:
    if settings.attempt_network == "shared":
        return SHARED
    if ranks > 1:
        # An operator who names another interface means one that a network of their own would not have.
        named = {os.environ.get(name, LOOPBACK) for name in RANKS if name.endswith("IFNAME")}
        return JOINED if named == {LOOPBACK} else SHARED
    # A user of its own is what a namespace costs whoever is not root, and a GPU's driver may want to know that user.
    return FILTERED if device is DeviceClass.CUDA and os.getuid() != 0 else OWN


def _made_ahead(folder: Path) -> dict[str, str]:
    return {KERNELS: str(folder), BUILTIN_TEXT: str(folder / TEXTS)}


def fetch_environment(
    settings: Settings, workspace: Workspace, claim: Claim, token: str | None = None
) -> dict[str, str]:
    """Of the fetch: the only child with the network's settings and a Hub token: the job's or its tenant's `token`, else
    the service's.
    """
    network = network_variables()
    if settings.hub_endpoint:
        network["HF_ENDPOINT"] = settings.hub_endpoint
    if token is None and settings.hub_token:
        token = settings.hub_token.get_secret_value()
    if token is not None:
        network["HF_TOKEN"] = token
    return child_environment(
        ALWAYS | ROWS_ONLY | _names(claim) | network | {"HF_HOME": str(workspace.folder / "cache")}
    )


def _names(claim: Claim) -> dict[str, str]:
    """For the child's log lines."""
    return {JOB_ID: claim.job_id, ATTEMPT: str(claim.attempt)}
