"""End-to-end tuning of the scales of all blocks."""

from workers.engine.scales.stage import run

__all__ = ["run"]
