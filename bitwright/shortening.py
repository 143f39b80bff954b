"""Values as errors show them: short, and always fit for JSON."""

from math import isfinite


def shorten(value: object, limit: int = 200) -> object:
    """Numbers and short strings as they are; anything else as text of at most `limit` characters.

    The result can be written as JSON in UTF-8, whatever the value was.
    """
    if value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    if isinstance(value, float) and isfinite(value):
        return value
    text = (value if isinstance(value, str) else _describe(value)).encode(errors="backslashreplace").decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _describe(value: object) -> str:
    try:
        return repr(value)
    except (RecursionError, ValueError):  # nested too deeply; more digits than Python prints
        return f"{type(value).__name__}, too large to show"
