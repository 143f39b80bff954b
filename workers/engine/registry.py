"""The methods by the name that a request uses: a new one is one more line. And how a request's adapters are trained."""

from types import MappingProxyType
from typing import Any

from app.domain.errors import InternalError
from app.domain.jobs import JobRequest
from workers.contracts import AdapterTraining, BlockMethod
from workers.methods.rtn import RTN
from workers.methods.sign_round import SignRound

METHODS: MappingProxyType[str, BlockMethod[Any]] = MappingProxyType(
    {
        "rtn": RTN(),
        "signround": SignRound(),
    }
)


def adapters_of(request: JobRequest) -> AdapterTraining:
    """How the adapters that a request asks for are made and trained."""
    raise InternalError(f"{request.quantization.method}: there are no adapters yet")
