"""Waits of threads that compute together, in variables that OpenMP reads when torch is loaded."""

import os

WAITING = {
    # Threads that wait for each other look again for about a tenth of a millisecond, then sleep: longer than most
    # operators between two products take, where to sleep and be woken costs more than to wait (a tenth of the looks
    # makes tuning a block on two cores 1.18 times as long). By default those of GNU OpenMP spin for milliseconds: on a
    # busy machine they take half of the processor time that the others need, on an idle one they gain nothing.
    "GOMP_SPINCOUNT": "10000",
}
WAITING_IS_GIVEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Variables by which whoever starts a program decides this."""


def waiting() -> dict[str, str]:
    """Variables for how threads wait, unless this process's environment sets them."""
    return {} if any(name in os.environ for name in WAITING_IS_GIVEN) else WAITING
