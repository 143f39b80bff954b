"""All configuration, from environment variables `BITWRIGHT_*`. Nothing reads the environment but this file.

With no variable set, everything lives in one folder of the user: SQLite, blobs, workspaces, and a broker that `serve`
starts itself.
"""

import json
import os
import socket
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@lru_cache(maxsize=1)
def get_settings() -> "Settings":
    """The process's settings, read once, when first asked for."""
    return Settings()


def default_data_dir() -> Path:
    """`$XDG_DATA_HOME/bitwright`, or `~/.local/share/bitwright`."""
    root = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(root).expanduser() / "bitwright"


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _split_paths(value: object) -> object:
    """A variable holds a JSON list, or folders divided like $PATH."""
    if not isinstance(value, str):
        return value
    return json.loads(value) if value.lstrip().startswith("[") else [part for part in value.split(os.pathsep) if part]


def _sqlite_url(data: dict[str, Any]) -> str:
    return f"sqlite:///{data['data_dir']}/bitwright.db"


def _blobs_url(data: dict[str, Any]) -> str:
    return f"file://{data['data_dir']}/blobs"


def _workspaces(data: dict[str, Any]) -> Path:
    folder: Path = data["data_dir"]
    return folder / "workspaces"


def _upload_parts(data: dict[str, Any]) -> Path:
    folder: Path = data["data_dir"]
    return folder / "uploads"


Folder = Annotated[Path, AfterValidator(_absolute)]


class Settings(BaseSettings):
    """One frozen object a process. Sizes are in bytes, times in seconds where no other unit is in the name."""

    model_config = SettingsConfigDict(env_prefix="BITWRIGHT_", env_ignore_empty=True, frozen=True, extra="forbid")

    environment: Literal["development", "test", "production"] = Field(
        default="development", description="Named in logs; nothing else depends on it."
    )
    data_dir: Folder = Field(default_factory=default_data_dir, description="Folder of everything that is kept.")
    database_url: str = Field(default_factory=_sqlite_url, description="sqlite:/// or postgresql+psycopg:// URL.")
    broker_url: str = Field(default="", description="redis:// URL; empty: `serve` starts a broker of its own.")
    blob_url: str = Field(default_factory=_blobs_url, description="file:// folder or s3:// bucket of artifact bytes.")
    workspace_dir: Folder = Field(default_factory=_workspaces, description="Scratch folders of running jobs.")
    upload_dir: Folder = Field(
        default_factory=_upload_parts,
        description="Parts of incomplete uploads; shared by all API processes, a folder an upload.",
    )
    model_roots: Annotated[tuple[Folder, ...], NoDecode, BeforeValidator(_split_paths)] = Field(
        default=(), description="Folders under which local models and datasets may lie, divided like $PATH."
    )

    hub_enabled: bool = Field(default=True, description="Whether workers may fetch from the Hub.")
    hub_endpoint: str | None = Field(default=None, description="A Hub mirror instead of huggingface.co.")
    hub_token: SecretStr | None = Field(default=None, description="Hub token for gated and private repositories.")

    host: str = Field(default="127.0.0.1", description="Address that the API binds.")
    port: int = Field(default=8080, ge=0, le=65_535, description="Port that the API binds.")
    max_body_bytes: int = Field(default=MIB, ge=KIB, description="Largest JSON body.")
    max_upload_bytes: int = Field(default=200 * GIB, ge=KIB, description="Largest upload, all its files together.")
    max_streams: int = Field(default=512, ge=1, description="Event streams that a process serves at once.")
    event_poll_seconds: float = Field(default=0.25, gt=0, le=30, description="How often streams look for events.")

    lease_seconds: int = Field(default=30, ge=3, description="A running job that is silent for longer is taken back.")
    sweep_interval_seconds: float = Field(default=5.0, gt=0, description="Between two rounds of `sweep`.")
    job_time_limit_seconds: int = Field(default=86_400, ge=1, description="Longest attempt where a job names none.")
    job_retention_days: int | None = Field(
        default=None, ge=1, description="Final jobs older than this are deleted with their artifacts; unset: kept."
    )
    workspace_retention_days: float = Field(
        default=7.0,
        ge=0,
        description="So long a worker keeps what a retry of a failed or cancelled job goes on from.",
    )
    hub_retention_days: float = Field(
        default=30.0,
        ge=1,
        description="So long a worker keeps a model that it fetched from the Hub after its last use.",
    )
    worker_poll_seconds: float = Field(
        default=3.0, ge=0.1, le=300, allow_inf_nan=False, description="How often an idle worker asks for work unrung."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="What a worker computes on.")
    devices: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        default=1, description="GPUs that a worker gives to a job, `all` that it sees or so many; on a CPU, processes."
    )
    worker_name: str = Field(default_factory=socket.gethostname, description="First part of a worker's id.")

    log_format: Literal["json", "console"] = Field(default="console", description="One JSON object a line, or text.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="Least level logged.")

    @property
    def hub_dir(self) -> Path:
        """Where workers keep models from the Hub, a folder each, for the next job."""
        return self.data_dir / "hub"

    @property
    def heartbeat_seconds(self) -> float:
        """Between two renewals of a lease: a third of it, so that two may fail."""
        return self.lease_seconds / 3
