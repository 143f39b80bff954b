"""GET /v1/methods: quantization methods, recipes and adapters."""

from fastapi import APIRouter

from app.api.auth import Reader
from app.api.http.documentation import problems
from app.domain.adapters import ADAPTERS, AdapterInfo
from app.domain.methods import METHODS, RECIPES, MethodInfo
from app.domain.request.adapter_recipes import ADAPTER_RECIPES
from bitwright.views import AdapterView, MethodList, MethodView, RecipeView

router = APIRouter(tags=["catalogue"])


@router.get("/v1/methods", summary="List methods and recipes", operation_id="list_methods", responses=problems())
def list_methods(_principal: Reader) -> MethodList:
    """Every method with its paper, what it produces and the JSON Schema of its parameters; the adapters that can be
    trained beside what they make, with theirs; and the recipes."""
    plain = {name: dict(fields) for name, fields in RECIPES.items()}
    trained = {name: recipe.expands_to() for name, recipe in ADAPTER_RECIPES.items()}
    return MethodList(
        items=[method_view(name, info) for name, info in METHODS.items()],
        adapters=[adapter_view(kind, info) for kind, info in ADAPTERS.items()],
        recipes=[RecipeView(name=name, expands_to=fields) for name, fields in {**plain, **trained}.items()],
    )


def method_view(name: str, info: MethodInfo) -> MethodView:
    """A row of the table of methods."""
    return MethodView(
        name=name,
        title=info.title,
        summary=info.summary,
        paper=info.paper,
        produces=sorted(info.produces),
        schemes=sorted(info.spec.named_schemes),
        needs_calibration=info.needs_calibration,
        presets=list(info.presets),
        parameters=info.spec.model_json_schema(),
    )


def adapter_view(kind: str, info: AdapterInfo) -> AdapterView:
    """A row of the table of adapters."""
    return AdapterView(
        kind=kind,
        title=info.title,
        summary=info.summary,
        paper=info.paper,
        merges_quantized=info.merges_quantized,
        stock_peft=info.stock_peft,
        learning_rate=info.learning_rate,
        parameters=info.spec.model_json_schema(),
    )
