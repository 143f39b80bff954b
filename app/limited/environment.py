"""Environment of a limited child: no secret, no network, no telemetry, and every cache in a folder of its own."""

import os
from collections.abc import Mapping
from pathlib import Path

PASSED_ON = ("PATH", "LANG", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")
COMPUTING = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "PYTHONUNBUFFERED": "1",
}
CACHES = {
    "HOME": "",
    "TMPDIR": "",
    "XDG_CACHE_HOME": "cache",
    "XDG_CONFIG_HOME": "config",
    "HF_HOME": "cache/huggingface",
    "VLLM_CACHE_ROOT": "cache/vllm",
    "VLLM_CONFIG_ROOT": "config/vllm",
    "TORCHINDUCTOR_CACHE_DIR": "cache/inductor",
    "TRITON_CACHE_DIR": "cache/triton",
    "NUMBA_CACHE_DIR": "cache/numba",
}
"""Variable -> its place in the child's folder."""


def limited_environment(folder: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """All variables of a child whose files lie in `folder`; `extra` are added."""
    passed = {name: os.environ[name] for name in (*PASSED_ON, *COMPUTING) if name in os.environ}
    return passed | QUIET | {name: str(folder / place) for name, place in CACHES.items()} | dict(extra or {})
