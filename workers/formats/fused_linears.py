"""Numbers that linears must share because runtimes run them as one: q, k and v, or gate and up."""

from collections.abc import Mapping

from app.domain.weight_targets import JOINED
from bitwright.errors import FormatCannotHold


class NumbersInCommon:
    """Holds the numbers of the linears so far against those of their companions."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, tuple[str, ...]], tuple[str, Mapping[str, float]]] = {}

    def check(self, name: str, numbers: Mapping[str, float]) -> None:
        """Note the numbers of a linear, by what they are.

        Raises:
            FormatCannotHold: a companion has another one.
        """
        parent, _, last = name.rpartition(".")
        for fused in JOINED:
            if last not in fused or not numbers:
                continue
            first, theirs = self._first.setdefault((parent, fused), (name, numbers))
            for what, number in numbers.items():
                if what in theirs and theirs[what] != number:
                    raise FormatCannotHold(
                        f"the {what} of {name} is {number:.9g}, and {theirs[what]:.9g} of {first}; runtimes run "
                        f"{', '.join(fused)} as one, with one number for all, and would scale the others wrongly",
                        field=name,
                        value=f"{number:.9g}",
                        hint="make the job again: linears that run as one are quantized with one number",
                    )
