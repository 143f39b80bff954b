"""Training adapters beside the quantized weights."""

from workers.engine.finetune.stage import run

__all__ = ["run"]
