"""Amounts of money, as reports and usage show them."""

from pydantic import BaseModel, ConfigDict, Field


class Money(BaseModel):
    """An amount, as a decimal number in text: no rounding on the way."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    amount: str = Field(pattern=r"^[0-9]+\.[0-9]{6}$", examples=["1.250000"])
    currency: str = Field(examples=["EUR"])
