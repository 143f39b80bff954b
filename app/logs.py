"""One structlog configuration for every process, standard-library loggers included.

Events have constant names and carry fields. What is bound with `structlog.contextvars` (request_id, job_id, attempt)
is on every line, so one job can be followed from its POST to its last block.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Protocol

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

SECRET_NAMES = (
    *("authorization", "password", "secret", "token", "token_keys", "api_key", "hub_token"),
    *("database_url", "broker_url"),
)
REDACTED = "[redacted]"


def configure_logging(settings: "LogSettings") -> None:
    """Send all logs to standard error, as JSON lines or as text. Safe to call again."""
    shared: Sequence[Processor] = (
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        redact_secrets,
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=_rendering(settings.log_format))
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    # The API writes its own access line, with the request's id and the time that it took.
    logging.getLogger("uvicorn.access").disabled = True
    for name in ("httpx", "httpcore", "alembic"):
        logging.getLogger(name).setLevel("WARNING")


def redact_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Blank the value of every field whose name says that it is a secret, or a URL that may hold a password."""
    for name in event:
        if name.lower() in SECRET_NAMES:
            event[name] = REDACTED
    return event


def _rendering(log_format: str) -> list[Processor]:
    drop = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if log_format == "json":
        return [drop, structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    # The plain formatter: the default one prints local variables, and those may hold secrets.
    plain = structlog.dev.plain_traceback
    return [drop, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]


class LogSettings(Protocol):
    """The part of the settings that logging needs."""

    @property
    def log_format(self) -> str: ...

    @property
    def log_level(self) -> str: ...
