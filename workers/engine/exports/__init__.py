"""Other formats of a finished job's result: its native checkpoint is read linear by linear, and nothing is computed."""

from workers.engine.exports.stage import run

__all__ = ["run"]
