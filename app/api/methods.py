"""What can be done to a model."""

from fastapi import APIRouter

from app.api.auth import Reader
from app.api.documentation import problems
from app.domain.methods import METHODS, RECIPES, MethodInfo
from app.domain.views import MethodList, MethodView, RecipeView

router = APIRouter(tags=["catalogue"])


@router.get("/v1/methods", summary="List methods and recipes", operation_id="list_methods", responses=problems())
def list_methods(_principal: Reader) -> MethodList:
    """Every method with its paper, what it produces and the JSON Schema of its parameters; and the recipes."""
    return MethodList(
        items=[method_view(name, info) for name, info in METHODS.items()],
        recipes=[RecipeView(name=name, expands_to=dict(fields)) for name, fields in RECIPES.items()],
    )


def method_view(name: str, info: MethodInfo) -> MethodView:
    """A row of the table of methods."""
    return MethodView(
        name=name,
        title=info.title,
        summary=info.summary,
        paper=info.paper,
        produces=sorted(info.produces),
        needs_calibration=info.needs_calibration,
        presets=list(info.presets),
        parameters=info.spec.model_json_schema(),
    )
