"""A goal in place of bits: the frontier of size and distance, and the smallest result on it that holds."""

from workers.engine.goal.stage import make

__all__ = ["make"]
