"""Finetuning part of a request: the text an adapter learns from, and how long and how fast it learns.

The quantized base never changes; what is trained is the adapter that the request names beside this. How many sequences
go through the model at once, and whether activations are recomputed, is the engine's plan and shown in the report.
"""

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.domain.adapters import LEARNING_RATE
from app.domain.methods.schemes import without_default
from app.domain.request.sources import DatasetSource

MOST_STEPS = 1_000_000
EPOCH_TOKENS = 64_000_000
"""Of a dataset on the Hub that is read whole, at the most: what a file of texts may hold."""
BYTES_A_TOKEN = 4
"""Of a JSONL file, roughly: English prose has four to five, code and a row's own marks make up for that."""


class Finetune(BaseModel):
    """Causal language modelling on JSONL rows, with AdamW on the adapter's parameters alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: DatasetSource = Field(
        description="JSONL rows with `text`, with `prompt` and `completion`, or with `messages`."
    )
    steps: int = Field(default=200, strict=True, ge=1, le=MOST_STEPS, description="Steps of the optimizer.")
    epochs: float | None = Field(
        default=None,
        strict=True,
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="In place of steps: how often every training sequence is read; the report has the steps.",
    )
    batch_size: int = Field(
        default=8, strict=True, ge=1, le=4096, description="Sequences a step, over all micro-batches and devices."
    )
    sequence_length: int = Field(
        default=512, strict=True, ge=16, le=131_072, description="Tokens a sequence at the most."
    )
    learning_rate: float = Field(
        default=LEARNING_RATE,
        strict=True,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="After warm-up, before decay. Where the request is silent, what suits its adapter: see "
        "`adapters` in GET /v1/methods.",
        json_schema_extra=without_default,
    )
    warmup_share: float = Field(
        default=0.03, strict=True, ge=0, lt=1, allow_inf_nan=False, description="Of the steps, with a rising rate."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Of the learning rate after warm-up: as it is, or down to 0 at the end."
    )
    weight_decay: float = Field(
        default=0.0, strict=True, ge=0, le=10, allow_inf_nan=False, description="Decoupled, as AdamW does it."
    )
    clip_norm: float | None = Field(
        default=0.3,
        strict=True,
        gt=0,
        allow_inf_nan=False,
        description="Largest norm of a step's gradient over all parameters; null: not limited.",
    )
    loss_on: Literal["completion", "all"] = Field(
        default="completion",
        description="Tokens that are learned: completions and the assistant's turns, or every token. Rows of `text` "
        "are learned whole.",
    )
    packing: bool = Field(
        default=True,
        strict=True,
        description="Several rows in one sequence, none of which sees another; else one row per sequence.",
    )
    validation_share: float = Field(
        default=0.05,
        strict=True,
        ge=0,
        le=0.5,
        allow_inf_nan=False,
        description="Of the rows, chosen by their hash, that validate and are never learned.",
    )
    validation_sequences: int = Field(
        default=64, strict=True, ge=1, le=65_536, description="Validation sequences, at the most."
    )
    validation_every: int | None = Field(
        default=None, strict=True, ge=1, description="Steps between validations; null: only before and after."
    )
    patience: int | None = Field(
        default=None,
        strict=True,
        ge=1,
        le=1000,
        description="Judgements in a row without a lower loss after which training stops; the best one is kept.",
    )
    checkpoint_every: int = Field(
        default=50, strict=True, ge=1, description="Steps after which a killed job goes on from there."
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        strict=True,
        description="Recompute activations instead of keeping them; null: where they do not fit.",
    )

    @model_validator(mode="after")
    def _has_what_patience_needs(self) -> Self:
        if self.patience is not None and (self.validation_every is None or self.validation_share == 0):
            raise ValueError("patience needs validation_every and a validation_share above 0")
        return self

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if self.epochs is not None and self.steps != Finetune.model_fields["steps"].default:
            raise ValueError("say how long by steps or by epochs, not by both")
        return self

    def of_sequences(self, count: int) -> Self:
        """The same with the steps that its epochs are over so many training sequences."""
        if self.epochs is None:
            return self
        steps = min(MOST_STEPS, max(1, math.ceil(self.epochs * count / self.batch_size)))
        return self.model_copy(update={"steps": steps})

    def of_bytes(self, size: int) -> Self:
        """The same with steps in place of epochs, as they are estimated from the bytes of the dataset's file."""
        if self.epochs is None:
            return self
        tokens = size * (1 - self.validation_share) / BYTES_A_TOKEN
        counted = self.of_sequences(max(1, round(tokens / self.sequence_length)))
        return counted.model_copy(update={"epochs": None})

    @property
    def tokens_read(self) -> int:
        """Tokens of the dataset that are read at the most."""
        if self.epochs is not None:
            return EPOCH_TOKENS
        held_out = self.validation_sequences if self.validation_share else 0
        return (self.steps * self.batch_size + held_out) * self.sequence_length

    def warmup_steps(self) -> int:
        """Steps with a rising learning rate."""
        return round(self.warmup_share * self.steps)
