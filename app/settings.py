"""All configuration, from environment variables `BITWRIGHT_*`. Nothing reads the environment but this file.

With no variable set, everything lives in one folder of the user: SQLite, blobs, workspaces, and a broker that `serve`
starts itself.
"""

import json
import os
import socket
import sys
from collections.abc import Mapping
from decimal import Decimal
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import structlog
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app import setting_values as values
from bitwright.addresses import shown, web_address
from bitwright.endpoint import default_data_dir
from bitwright.errors import InvalidSettings
from bitwright.tenancy import Quotas

KIB, MIB, GIB, PIB = 1 << 10, 1 << 20, 1 << 30, 1 << 50
DAY = 86_400
PREFIX = "BITWRIGHT_"
NOT_SETTINGS = frozenset(
    f"{PREFIX}{name}" for name in ("URL", "KEY", "REPORT_FD", "SUPERVISOR_PID", "SILENCE_SECONDS", "JOB_ID", "ATTEMPT")
)
"""Variables of ours that are no settings: the client's, and those that a supervisor sets for its child."""
TESTS = f"{PREFIX}TEST_"
ALIKE = 0.8
"""Similarity, from 0 to 1, from which a variable's name is taken for a misspelt setting."""


@lru_cache(maxsize=1)
def get_settings() -> "Settings":
    """The process's settings, read once, when first asked for.

    Raises:
        InvalidSettings: a variable is not as it must be; the message names it.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise InvalidSettings("; ".join(problems_of(error)), hint="correct the variable, or unset it") from None


def settings_or_exit() -> "Settings":
    """The settings of a process of the service, for its first line: it ends with exit code 2 if they are not valid."""
    try:
        return get_settings()
    except InvalidSettings as error:
        sys.stderr.write(f"{error.code}: {error.detail}\n")
        raise SystemExit(2) from None


def problems_of(error: ValidationError) -> list[str]:
    """Problems of the settings, a sentence per variable."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    return [item["msg"] for item in errors if item["type"] != "default_factory_not_called"]


def unknown_variables() -> dict[str, str | None]:
    """Variables with our prefix that nobody reads, and the one that was meant where a name is almost that."""
    known = [*(f"{PREFIX}{name.upper()}" for name in Settings.model_fields), *NOT_SETTINGS]
    ours = [name for name in os.environ if name.upper().startswith(PREFIX) and not name.upper().startswith(TESTS)]
    suggestions: dict[str, str | None] = {}
    for name in ours:
        if name.upper() not in known:
            bare = [setting.removeprefix(PREFIX) for setting in known]
            alike = get_close_matches(name.upper().removeprefix(PREFIX), bare, n=1, cutoff=ALIKE)
            suggestions[name] = f"{PREFIX}{alike[0]}" if alike else None
    return suggestions


def warn_of_unknown_variables() -> None:
    """Say in the log which variables with our prefix nobody reads. One that is almost a setting is refused."""
    for name in unknown_variables():
        log.warning("unknown_setting", variable=name, hint="unset it, or find its name in docs/reference/settings.md")


def _split_paths(value: object) -> object:
    """A variable holds a JSON list, or folders divided like $PATH."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith("["):
        return [folder for folder in value.split(os.pathsep) if folder]
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError('a value that begins with [ must be a JSON list of folders, e.g. ["/models"]') from error


def _split_words(value: object) -> object:
    """A variable holds words divided by commas or spaces."""
    return value.replace(",", " ").split() if isinstance(value, str) else value


def _parse_object(value: object) -> object:
    """A variable holds a JSON object."""
    return json.loads(value) if isinstance(value, str) else value


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


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _worker_name() -> str:
    return values.as_name(socket.gethostname())


SECRETS = frozenset({"hub_token", "otlp_headers", "token_keys", "database_password", "broker_password"})
"""Settings whose values are never shown."""
Folder = Annotated[Path, AfterValidator(values.folder)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Price = Annotated[Decimal, Field(ge=0, le=1_000_000, decimal_places=6, allow_inf_nan=False)]

log = structlog.get_logger(__name__)


class Settings(BaseSettings):
    """One frozen object a process. Sizes are in bytes, times in seconds where no other unit is in the name."""

    model_config = SettingsConfigDict(
        env_prefix="BITWRIGHT_", env_ignore_empty=True, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    environment: Literal["development", "test", "production"] = Field(
        default="development", description="Named in logs; nothing else depends on it."
    )
    data_dir: Folder = Field(default_factory=default_data_dir, description="Folder of everything that is kept.")
    database_password: Annotated[SecretStr, AfterValidator(values.password)] | None = Field(
        default=None,
        description="Password of the database's user, as it is: no sign needs quoting, as it would within the URL.",
    )
    database_url: Annotated[str, AfterValidator(values.database_url)] = Field(
        default_factory=_sqlite_url, description="sqlite:/// or postgresql+psycopg:// URL."
    )
    broker_password: Annotated[SecretStr, AfterValidator(values.password)] | None = Field(
        default=None, description="Password of the broker's user, as it is, for a URL that has none."
    )
    broker_url: Annotated[str, AfterValidator(values.broker_url)] = Field(
        default="",
        description="redis:// or valkey:// URL, with TLS rediss:// or valkeys://; empty: `serve` starts a broker of "
        "its own.",
    )
    blob_url: Annotated[str, AfterValidator(values.blob_url)] = Field(
        default_factory=_blobs_url, description="file:// folder or s3:// bucket of artifact bytes."
    )
    workspace_dir: Folder = Field(default_factory=_workspaces, description="Scratch folders of running jobs.")
    upload_dir: Folder = Field(
        default_factory=_upload_parts,
        description="Parts of incomplete uploads; shared by all API processes, a folder per upload.",
    )
    model_roots: Annotated[tuple[Folder, ...], NoDecode, BeforeValidator(_split_paths)] = Field(
        default=(), description="Folders under which local models and datasets may lie, divided like $PATH."
    )

    hub_enabled: bool = Field(default=True, description="Whether workers may fetch from the Hub.")
    hub_endpoint: Annotated[str, AfterValidator(web_address)] | None = Field(
        default=None, description="A Hub mirror instead of huggingface.co."
    )
    hub_token: Annotated[SecretStr, AfterValidator(values.token)] | None = Field(
        default=None, description="Hub token for gated and private repositories."
    )
    hub_preflight: bool = Field(
        default=False,
        description="Whether the API looks at a model on the Hub when a job is submitted: file list, configuration and "
        "index, at most 10 seconds. Never with HF_HUB_OFFLINE.",
    )

    host: Annotated[str, AfterValidator(values.bind_host)] = Field(
        default="127.0.0.1", description="Address that the API binds."
    )
    port: int = Field(default=8080, ge=0, le=65_535, description="Port that the API binds.")
    dashboard: bool = Field(
        default=True, description="Whether `/` and below are pages for people; false: the API alone, and its own pages."
    )
    page_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_words), AfterValidator(values.hosts)] = (
        Field(
            default=(),
            description="Names, divided by commas, under which browsers may open pages, besides addresses, localhost "
            "and the machine's own name; * allows every one.",
        )
    )
    accelerated_path: Annotated[str, AfterValidator(values.accelerated_path)] = Field(
        default="",
        description="Path under which a proxy has the folder of blobs for itself: downloads are answered with "
        "`X-Accel-Redirect`, and the proxy sends the file. Only behind nginx as `deploy/nginx.conf` sets it up.",
    )
    max_body_bytes: int = Field(default=MIB, ge=KIB, le=GIB, description="Largest JSON body.")
    max_upload_bytes: int = Field(
        default=200 * GIB, ge=KIB, le=PIB, description="Largest upload, all its files together."
    )
    max_streams: int = Field(default=512, ge=1, le=100_000, description="Event streams that a process serves at once.")
    max_streams_of_key: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Of these, streams of one key at once; unset: a quarter.",
    )
    event_poll_seconds: Finite = Field(default=0.25, gt=0, le=30, description="How often streams look for events.")

    tenant_quotas: Annotated[Quotas, NoDecode, BeforeValidator(_parse_object)] = Field(
        default=Quotas(),
        description="Quotas of every tenant that has none of its own, as JSON: queued_jobs, running_jobs, "
        "storage_bytes, upload_bytes, uploads, streams, posts_per_minute, max_priority.",
    )
    token_keys: Annotated[
        tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_words), AfterValidator(values.token_keys)
    ] = Field(
        default=(),
        description="Keys that encrypt Hub tokens and secrets of webhooks, divided by commas: the first encrypts, all "
        "decrypt. `bitwright tenants token-key` makes one.",
    )
    webhook_allowed: Annotated[
        tuple[str, ...], NoDecode, BeforeValidator(_split_words), AfterValidator(values.webhook_places)
    ] = Field(
        default=(),
        description="Hosts and networks, divided by commas, that webhooks may go to though they are not on the public "
        "internet, and without TLS: hooks.internal, 10.1.0.0/16.",
    )
    audit_retention_days: int | None = Field(
        default=365, ge=1, le=36_500, description="Entries of the audit log older than this are deleted."
    )
    price_per_gpu_hour: Price | None = Field(
        default=None, description="Price of an hour of one GPU, for dry runs, reports and usage."
    )
    price_per_cpu_hour: Price | None = Field(
        default=None, description="The same of a worker without a GPU, or of each of its processes."
    )
    price_currency: str = Field(default="USD", pattern="^[A-Z]{3}$", description="Currency of the prices.")
    metrics_by_tenant: bool = Field(
        default=False,
        description="Whether /metrics names tenants by their ids, with what each stores: it needs no key.",
    )
    otlp_url: Annotated[str, AfterValidator(values.optional_web_address)] = Field(
        default="",
        description="Where traces of jobs go, by OTLP over HTTP with protobuf: http://collector:4318/v1/traces. It "
        "needs the extra `otel`; empty: no traces, and OpenTelemetry is not imported.",
    )
    otlp_headers: Annotated[
        dict[str, SecretStr], NoDecode, BeforeValidator(_parse_object), AfterValidator(values.headers)
    ] = Field(default={}, description="Headers of requests to `otlp_url`, such as a collector's key, as JSON.")
    worker_metrics_port: int | None = Field(
        default=None,
        ge=1,
        le=65_535,
        description="Port on which a worker serves its own metrics, at `worker_metrics_host`; unset: none.",
    )
    worker_metrics_host: Annotated[str, AfterValidator(values.bind_host)] = Field(
        default="127.0.0.1", description="Address for `worker_metrics_port`."
    )

    lease_seconds: int = Field(
        default=30, ge=3, le=3600, description="A running job that is silent for longer is taken back."
    )
    sweep_interval_seconds: Finite = Field(default=5.0, gt=0, le=3600, description="Between two rounds of `sweep`.")
    job_time_limit_seconds: int = Field(
        default=DAY, ge=1, le=30 * DAY, description="Longest attempt where a job names none."
    )
    job_retention_days: int | None = Field(
        default=None,
        ge=1,
        le=36_500,
        description="Final jobs older than this are deleted with their artifacts; unset: kept.",
    )
    workspace_retention_days: Finite = Field(
        default=7.0,
        ge=0,
        le=36_500,
        description="So long a worker keeps what a retry of a failed or cancelled job goes on from.",
    )
    keep_state_seconds: Finite | None = Field(
        default=None,
        ge=1,
        le=DAY,
        description="How often a worker puts what a running job has finished into the blob store, so that another "
        "machine goes on from there when it is lost; unset: never, as one machine needs none of it.",
    )
    hub_retention_days: Finite = Field(
        default=30.0,
        ge=1,
        le=36_500,
        description="So long a worker keeps a model that it fetched from the Hub after its last use.",
    )
    worker_poll_seconds: Finite = Field(
        default=3.0, ge=0.1, le=300, description="How often an idle worker asks for work unrung."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="What a worker computes on.")
    devices: Literal["all"] | Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, description="GPUs that a worker gives to a job, `all` that it sees or so many; on a CPU, processes."
    )
    spares: int | None = Field(
        default=None,
        ge=0,
        le=8,
        description="Processes that wait for a worker's next jobs, with all imported and the device open; unset: 1 "
        "where there are 16 GB of memory, else 0.",
    )
    kernel_dir: Folder = Field(
        default_factory=lambda: default_data_dir() / "kernels",
        description="Where a worker keeps the loops that it compiles for its processor, once for a version of the "
        "code; workers may share it.",
    )
    input_seconds: Finite = Field(
        default=120.0,
        ge=1,
        le=DAY,
        description="So long a worker's child may read a job's configuration, tokenizer and texts; and a second more "
        "for each MiB of text.",
    )
    input_memory_bytes: int = Field(
        default=4 * GIB, ge=64 * MIB, le=PIB, description="The most memory that this may take."
    )
    attempt_memory: Literal["plan", "off"] | Annotated[int, Field(ge=GIB, le=PIB)] = Field(
        default="plan",
        description="The most memory of an attempt: `plan`, by what its job is estimated to need; so many bytes; or "
        "`off`.",
    )
    attempt_network: Literal["own", "shared"] = Field(
        default="own",
        description="Whether an attempt has a network of its own, in which nothing is but its loopback, or the "
        "worker's.",
    )
    attempt_user: Annotated[str, AfterValidator(values.user)] | None = Field(
        default=None,
        description="User that a worker which runs as root lets attempts run as: a name or a number; unset: root.",
    )
    llama_cpp: Folder | None = Field(
        default=None, description="Folder with llama.cpp's shared libraries, in which a worker reads GGUF files."
    )
    vllm_python: Annotated[Path, AfterValidator(values.program)] | None = Field(
        default=None, description="Python of an environment with vLLM, in which a worker reads what a request requires."
    )
    worker_name: Annotated[str, AfterValidator(values.process_name)] = Field(
        default_factory=_worker_name, description="First part of a worker's id."
    )

    log_format: Literal["json", "console"] = Field(default="console", description="One JSON object a line, or text.")
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)] = Field(
        default="INFO", description="Least level logged."
    )

    @field_validator("*", mode="wrap")
    @classmethod
    def _name_the_variable(cls, value: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Every problem as one sentence: the variable, its value without secrets, what is wrong, the way out."""
        try:
            return handler(value)
        except ValidationError as error:
            name = str(info.field_name)
            readable = "***" if name in SECRETS else shown(value)
            problem = _problem(name, value, error)
            raise PydanticCustomError(
                "setting", "{said}", {"said": f"{PREFIX}{name.upper()} is {readable}: {problem}"}
            ) from None

    @field_validator("database_url", "broker_url", mode="after")
    @classmethod
    def _put_in_the_password(cls, url: str, info: ValidationInfo) -> str:
        password: SecretStr | None = info.data.get(f"{str(info.field_name).removesuffix('_url')}_password")
        return url if password is None else values.with_password(url, password)

    @model_validator(mode="after")
    def _no_slip_of_the_pen(self) -> Self:
        slips = {name: meant for name, meant in unknown_variables().items() if meant is not None}
        if slips:
            said = "; ".join(f"{name} is no setting: did you mean {meant}?" for name, meant in slips.items())
            raise PydanticCustomError("unknown_setting", "{said}", {"said": said})
        return self

    @property
    def hub_dir(self) -> Path:
        """Folder where workers keep models from the Hub for later jobs, one folder per model."""
        return self.data_dir / "hub"

    @property
    def looks_at_hub(self) -> bool:
        """True if the API asks the Hub about a model before its job is queued."""
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
        return self.hub_preflight and self.hub_enabled and not offline

    def price_micros(self, device: str) -> int | None:
        """Millionths of the currency for an hour of one device of this class; None if it has no price."""
        price = self.price_per_gpu_hour if device == "cuda" else self.price_per_cpu_hour
        return None if price is None else int(price * 1_000_000)

    @property
    def heartbeat_seconds(self) -> float:
        """Between two renewals of a lease: a third of it, so that two may fail."""
        return self.lease_seconds / 3


WAYS: Mapping[str, str] = MappingProxyType(
    {
        "hub_enabled": "give true or false",
        "hub_preflight": "give true or false",
        "dashboard": "give true or false",
        "devices": "give `all`, or a number from 1 to 64",
        "tenant_quotas": 'give a JSON object of whole numbers, e.g. {"queued_jobs": 100, "posts_per_minute": 60}',
        "metrics_by_tenant": "give true or false",
        "price_currency": "give three capital letters, e.g. EUR",
        "attempt_memory": "give `plan`, `off`, or bytes, 1 GiB at the least",
        "model_roots": 'give folders divided like $PATH, or a JSON list, e.g. ["/models"]',
    }
)
"""Descriptions of valid values, where the types alone say it badly."""
SERVICE_LINK = (
    "Kubernetes sets this variable for a Service named bitwright: set enableServiceLinks: false, or rename the Service"
)


def _problem(name: str, value: object, error: ValidationError) -> str:
    if name == "port" and str(value).startswith("tcp://"):
        return SERVICE_LINK
    errors = error.errors(include_url=False, include_input=False)
    own = [str(item["ctx"]["error"]) for item in errors if item["type"] == "value_error"]
    if own:
        return own[0]
    if name in WAYS:
        return WAYS[name]
    return errors[0]["msg"][0].lower() + errors[0]["msg"][1:]
