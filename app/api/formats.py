"""GET /v1/formats: the checkpoint formats, and the runtimes that load each."""

from fastapi import APIRouter

from app.api.auth import Reader
from app.api.http.documentation import problems
from app.domain.formats import FORMATS, ExportFormat, FormatInfo
from app.domain.runtimes import RuntimeSupport
from bitwright.views import FormatView, Page, RuntimeView, WidthsView

router = APIRouter(tags=["catalogue"])


@router.get("/v1/formats", summary="List export formats", operation_id="list_formats", responses=problems())
def list_formats(_principal: Reader) -> Page[FormatView]:
    """Every export format, what it can hold, and the runtimes that load it: tested here, or by their own rules."""
    return Page(items=[format_view(name, info) for name, info in FORMATS.items()])


def format_view(name: ExportFormat, info: FormatInfo) -> FormatView:
    """A row of the table of formats."""
    return FormatView(
        name=name.value,
        title=info.title,
        summary=info.summary,
        kinds=sorted(info.kinds),
        low_rank=info.low_rank.value,
        bits=sorted(info.bits),
        symmetric=sorted(info.symmetries),
        asymmetric_bits=None if info.asymmetric_bits is None else sorted(info.asymmetric_bits),
        group_multiple=info.group_multiple,
        group_sizes=None if info.group_sizes is None else sorted(info.group_sizes),
        output_multiple=info.output_multiple,
        uniform=info.uniform,
        architectures=None if info.architectures is None else sorted(info.architectures),
        schemes=sorted(info.schemes),
        runtimes=[_runtime_view(runtime) for runtime in info.runtimes],
    )


def _runtime_view(runtime: RuntimeSupport) -> RuntimeView:
    return RuntimeView(
        runtime=runtime.runtime,
        version=runtime.version,
        devices=runtime.devices,
        support=runtime.support.value,
        bits=sorted(runtime.bits),
        asymmetric_bits=None if runtime.asymmetric_bits is None else sorted(runtime.asymmetric_bits),
        group_sizes=None if runtime.group_sizes is None else sorted(runtime.group_sizes),
        smallest_group=runtime.smallest_group,
        group_multiple=runtime.group_multiple,
        since=[
            WidthsView(version=added.version, bits=sorted(added.bits), symmetric=sorted(added.symmetric))
            for added in runtime.since
        ],
        schemes=sorted(runtime.schemes),
        note=runtime.note,
    )
