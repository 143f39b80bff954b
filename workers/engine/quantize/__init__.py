"""Quantizing a model: facts that a spec asks for beforehand, then block by block."""

from workers.engine.quantize.preparation import prepare
from workers.engine.quantize.stage import run

__all__ = ["prepare", "run"]
