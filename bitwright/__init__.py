"""The typed Python client of Bitwright's HTTP API.

    with Client("http://127.0.0.1:8080", key="bw_...") as client:
        job = client.submit({"model": "HuggingFaceTB/SmolLM2-135M", "method": "signround", "bits": 4})
        job = client.wait(job.id)
        client.download(job.id, Path("smollm2-w4"))

Errors are the classes of `bitwright.errors`, by the code that the service sent; a service that cannot be reached is
`Unavailable`.
"""

from bitwright.client import Client
from bitwright.transport import RetryPolicy

__all__ = ["Client", "RetryPolicy"]
