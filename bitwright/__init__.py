"""The typed Python client of Bitwright's HTTP API.

    with Bitwright() as client:  # reads BITWRIGHT_URL and BITWRIGHT_KEY
        job = client.jobs.create(model="HuggingFaceTB/SmolLM2-135M", method="signround", bits=4)
        job.wait().download("smollm2-w4")

`AsyncBitwright` is the same for an event loop, from the same source. `Client` and `AsyncClient` are the lower layer,
one method per endpoint. Errors are the classes of `bitwright.errors`, by the code that the service sent; a service that
cannot be reached is `Unavailable`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitwright.asynchronous.client import AsyncClient
    from bitwright.asynchronous.job import AsyncJob
    from bitwright.asynchronous.service import AsyncBitwright
    from bitwright.blocking.client import Client
    from bitwright.blocking.job import Job
    from bitwright.blocking.service import Bitwright
    from bitwright.errors import BitwrightError
    from bitwright.retries import RetryPolicy

__all__ = ["AsyncBitwright", "AsyncClient", "AsyncJob", "Bitwright", "BitwrightError", "Client", "Job", "RetryPolicy"]

_PLACES = {
    "AsyncBitwright": "bitwright.asynchronous.service",
    "AsyncClient": "bitwright.asynchronous.client",
    "AsyncJob": "bitwright.asynchronous.job",
    "Bitwright": "bitwright.blocking.service",
    "BitwrightError": "bitwright.errors",
    "Client": "bitwright.blocking.client",
    "Job": "bitwright.blocking.job",
    "RetryPolicy": "bitwright.retries",
}


def __getattr__(name: str) -> Any:
    """The public names, imported on first access: reading `bitwright.errors` alone needs no HTTP client."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
