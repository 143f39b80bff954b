"""One problem of a request, as an error has several."""

from pydantic import BaseModel, ConfigDict, Field


class FieldProblem(BaseModel):
    """One problem of a request: field, value and the way out."""

    model_config = ConfigDict(frozen=True)

    field: str = Field(description="Path of the field in the request body, dotted.", examples=["quantization.bits"])
    code: str = Field(description="Stable code of the problem.", examples=["out_of_range"])
    detail: str = Field(description="What is wrong and how to mend it, in one sentence.")
    value: object = Field(default=None, description="What was sent, shortened to 200 characters.")
