"""Capacity of this machine. torch is asked in a process of its own: the worker never loads it."""

import ctypes
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import structlog

from bitwright.job_states import DeviceClass
from workers.machine import host_memory
from workers.supervise.child_process import child_environment

PROBE = """
import json, torch
found = torch.cuda.is_available()
first = torch.cuda.get_device_properties(0) if found else None
count = torch.cuda.device_count()
print(json.dumps({"name": first.name, "memory": first.total_memory, "count": count} if found else None))
"""
PROBE_SECONDS = 120
DRIVER = "libcuda.so.1"

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Capacity:
    """Device and sizes of a worker, in bytes; of several GPUs, those of the first visible one."""

    device: DeviceClass
    device_name: str | None
    device_memory_bytes: int | None
    host_memory_bytes: int
    disk_bytes: int
    """Free when the worker started."""
    disk_total_bytes: int
    devices: int = 1
    """GPUs, or processes on a CPU, that a job may take."""
    kernels: Literal["triton", "torch"] = "torch"
    """Code that rounds weights and computes blocks: Triton's kernels on a GPU where they work, else torch's own."""
    kernels_fault: str | None = None
    """Reason for which Triton does not work on the GPU."""

    def sizes(self) -> dict[str, int | None]:
        """Bytes by name, as estimates are held against; None where there is no such thing."""
        return {
            "host_memory_bytes": self.host_memory_bytes,
            "device_memory_bytes": self.device_memory_bytes,
            "disk_total_bytes": self.disk_total_bytes,
        }


def capacity(wanted: str, workspace_dir: Path, devices: int | Literal["all"] = 1) -> Capacity:
    """The device class to serve ("auto": cuda where torch finds one) and what the machine has.

    Raises:
        RuntimeError: cuda is wanted and torch finds none, or fewer than are wanted.
    """
    gpu = None if wanted == "cpu" or not may_have_gpu() else _probe()
    if wanted == "cuda" and gpu is None:
        raise RuntimeError("BITWRIGHT_DEVICE is cuda, but torch finds no CUDA device")
    visible = 1 if gpu is None else int(gpu["count"])
    if gpu is not None and devices != "all" and devices > visible:
        raise RuntimeError(f"BITWRIGHT_DEVICES is {devices}, but torch finds {visible} CUDA devices")
    fault = None if gpu is None else _triton_fault()
    if fault is not None:
        hint = "give it a C compiler and a writable TRITON_CACHE_DIR that may hold programs; until then jobs are slower"
        log.warning("triton_does_not_work", reason=fault, hint=hint)
    workspace_dir.mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(workspace_dir)
    return Capacity(
        device=DeviceClass.CPU if gpu is None else DeviceClass.CUDA,
        device_name=None if gpu is None else str(gpu["name"]),
        device_memory_bytes=None if gpu is None else int(gpu["memory"]),
        host_memory_bytes=host_memory(),
        disk_bytes=disk.free,
        disk_total_bytes=disk.total,
        devices=visible if devices == "all" else devices,
        kernels="torch" if gpu is None or fault is not None else "triton",
        kernels_fault=fault,
    )


def may_have_gpu() -> bool:
    """False where torch can find no GPU, which it is not asked then: to load it takes a second.

    That is where it was built for processors alone, and on Linux without a driver, unless it is built for another
    vendor's.
    """
    try:
        build = version("torch").partition("+")[2]
    except PackageNotFoundError:
        return True
    if build == "cpu":
        return False
    if sys.platform != "linux" or build.startswith(("rocm", "xpu")):
        return True
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return False
    return True


def _probe() -> dict[str, str | int] | None:
    try:
        answer = subprocess.run(
            [sys.executable, "-c", PROBE],
            env=child_environment({}),
            capture_output=True,
            check=True,
            timeout=PROBE_SECONDS,
        )
    except (subprocess.SubprocessError, OSError) as error:
        log.warning("device_probe_failed", error=type(error).__name__)
        return None
    gpu: dict[str, str | int] | None = json.loads(answer.stdout.splitlines()[-1])
    return gpu


def _triton_fault() -> str | None:
    """Reason for which Triton runs no kernel in a child of this worker; None if it does."""
    command = [sys.executable, "-P", "-m", "workers.numerics.backends.trial"]
    try:
        answer = subprocess.run(
            command, env=child_environment({}), capture_output=True, check=True, timeout=PROBE_SECONDS
        )
    except (subprocess.SubprocessError, OSError) as error:
        return f"{type(error).__name__}: the trial did not end well"
    return answer.stdout.decode(errors="replace").strip() or None
