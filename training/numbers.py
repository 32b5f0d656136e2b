"""Numbers as people read them."""

import math


def number(value: float | None, digits: int = 4) -> str:
    """Four decimals, or a dash for what is not defined."""
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 4) -> str:
    """The same of a difference: with its sign, a real minus, and none for what rounds to zero."""
    if value is None:
        return "–"
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if text.strip("+-0.") else text[1:]


def digits_of(low: float | None, high: float | None) -> int:
    """Decimals that an interval deserves: four, and more where it is narrower than they can tell."""
    if low is None or high is None or not low < high:
        return 4
    return min(max(4, 1 - math.floor(math.log10(high - low))), 7)


def p_value(p: float | None) -> str:
    """Three decimals without the zero before them, or a bound for what is smaller."""
    if p is None:
        return "–"
    return "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 0.9995 else "1"
