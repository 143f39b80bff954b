"""The typed Python client of Bitwright's HTTP API.

    with Bitwright() as client:  # reads BITWRIGHT_URL and BITWRIGHT_KEY
        job = client.jobs.create(model="HuggingFaceTB/SmolLM2-135M", method="signround", bits=4)
        job.wait().download("smollm2-w4")

`AsyncBitwright` is the same for an event loop; `Client` is the lower layer, one method per endpoint. Errors are the
classes of `bitwright.errors`, by the code that the service sent; a service that cannot be reached is `Unavailable`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitwright.client import Client
    from bitwright.errors import BitwrightError
    from bitwright.resources.asynchronous import AsyncBitwright, AsyncJob
    from bitwright.resources.blocking import Bitwright
    from bitwright.resources.job import Job
    from bitwright.transport import RetryPolicy

__all__ = ["AsyncBitwright", "AsyncJob", "Bitwright", "BitwrightError", "Client", "Job", "RetryPolicy"]

_PLACES = {
    "AsyncBitwright": "bitwright.resources.asynchronous",
    "AsyncJob": "bitwright.resources.asynchronous",
    "Bitwright": "bitwright.resources.blocking",
    "BitwrightError": "bitwright.errors",
    "Client": "bitwright.client",
    "Job": "bitwright.resources.job",
    "RetryPolicy": "bitwright.transport",
}


def __getattr__(name: str) -> Any:
    """The public names, imported on first access: reading `bitwright.errors` alone needs no HTTP client."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
