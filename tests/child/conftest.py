"""The child's side uses the worker of the supervision's tests: orders reach a child through it."""

from tests.supervise.conftest import sqlite_bench

__all__ = ["sqlite_bench"]
