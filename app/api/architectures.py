"""GET /v1/architectures: the model types that can be quantized, and those that are known and are not."""

from fastapi import APIRouter

from app.api.auth import Reader
from app.api.http.documentation import problems
from app.domain.formats import FORMATS
from app.domain.inputs.architectures import ARCHITECTURES, REFUSED, Architecture
from bitwright.views import ArchitectureList, ArchitectureView

router = APIRouter(tags=["catalogue"])


@router.get(
    "/v1/architectures",
    summary="List model types",
    operation_id="list_architectures",
    responses=problems(),
)
def list_architectures(_principal: Reader) -> ArchitectureList:
    """Every `model_type` that can be quantized: block by block has been proved to be the whole model.

    Types that transformers knows and that are not accepted have their reason.
    """
    return ArchitectureList(items=[architecture_view(row) for row in ARCHITECTURES.values()], refused=dict(REFUSED))


def architecture_view(row: Architecture) -> ArchitectureView:
    """A row of the list of types."""
    refusals = dict(row.refusals)
    for name, info in FORMATS.items():
        other = info.refusal_of(row.model_type)
        if other is not None:
            refusals[name.value] = f"{name.value} {other}"
    return ArchitectureView(
        model_type=row.model_type, title=row.title, model_class=row.model_class, format_refusals=refusals
    )
