"""Filters of lists by labels: `metadata.commit=abc`, or in OpenAI's way `metadata[commit]=abc`."""

from starlette.datastructures import QueryParams

from bitwright.errors import InvalidRequest

MAX_LABELS = 16


def labels_of(query: QueryParams, before: str = "metadata.", behind: str = "") -> dict[str, str]:
    """The labels that a query filters by, whose names stand between two texts.

    Raises:
        InvalidRequest: more than a job can have.
    """
    labels = {
        name.removeprefix(before).removesuffix(behind): value
        for name, value in query.items()
        if name.startswith(before)
    }
    if len(labels) > MAX_LABELS:
        detail = f"a list takes up to {MAX_LABELS} filters by label, as many as a job can have; this has {len(labels)}"
        hint = f"leave {len(labels) - MAX_LABELS} of them out"
        raise InvalidRequest(detail, field="query.metadata", value=len(labels), hint=hint)
    return labels


def labels_parameter(names: str, example: str, style: str) -> dict[str, list[dict[str, object]]]:
    """The parameter of those labels in the OpenAPI document.

    names   pattern of their names
    style   OpenAPI's, of an object in a query
    """
    return {
        "parameters": [
            {
                "name": "metadata",
                "in": "query",
                "description": f"Only jobs with these labels, e.g. `{example}`; several must all match.",
                "required": False,
                "schema": {
                    "type": "object",
                    "propertyNames": {"pattern": names},
                    "additionalProperties": {"type": "string"},
                    "maxProperties": MAX_LABELS,
                },
                "style": style,
                "explode": True,
            }
        ]
    }
