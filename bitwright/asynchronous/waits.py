"""Waiting in an event loop; `bitwright.blocking.waits` has the same names for blocking programs."""

import asyncio

PROGRESS_BY_DEFAULT: bool | None = False
"""A program that waits for several jobs at once has one terminal for all of them."""

sleep = asyncio.sleep
in_thread = asyncio.to_thread
"""Work on files, away from the event loop: `await in_thread(function, *arguments)`."""
