"""The typed Python client of Bitwright's HTTP API.

    with Client("http://127.0.0.1:8080", key="bw_...") as client:
        job = client.submit({"model": "HuggingFaceTB/SmolLM2-135M", "method": "signround", "bits": 4})
        job = client.wait(job.id)
        client.download(job.id, Path("smollm2-w4"))

Errors are the classes of `bitwright.errors`, by the code that the service sent; a service that cannot be reached is
`Unavailable`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitwright.client import Client
    from bitwright.transport import RetryPolicy

__all__ = ["Client", "RetryPolicy"]


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: who reads `bitwright.errors` needs no HTTP client."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bitwright import client, transport  # noqa: PLC0415

    return getattr(client if name == "Client" else transport, name)
