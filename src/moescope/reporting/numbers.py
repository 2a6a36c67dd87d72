"""How numbers print: few digits, and never a zero that is not one.

A dead expert and a rare one are different findings, so ``0`` and ``100`` per cent are printed only if they are exact.
"""

from __future__ import annotations

from math import inf, isnan

MISSING = "–"


def percent(share: float, digits: int = 1) -> str:
    """A share as a number of per cent, without the sign.

    Example:
        >>> percent(0.125), percent(0.0), percent(0.0001), percent(0.99999), percent(1.0), percent(float("nan"))
        ('12.5', '0', '<0.1', '>99.9', '100', '–')
        >>> percent(-0.05)  # of the way to somewhere
        '−5.0'
    """
    return f"−{percent(-share, digits)}" if share < 0 else _rounded(100 * share, digits, whole=100.0)


def bits(value: float, digits: int = 4) -> str:
    """An amount of information.

    Example:
        >>> bits(0.01234), bits(0.00001), bits(0.0)
        ('0.0123', '<0.0001', '0')
    """
    return _rounded(value, digits)


def spread(value: float, low: float, high: float, digits: int = 1) -> str:
    """Half the width of an interval around a share, in per cent: the larger half, so that it never promises too much.

    At exactly 0 or 100 % there is one side only, and the sign says which. An interval without width says nothing.

    Example:
        >>> spread(0.279, 0.271, 0.2865), spread(0.2, 0.1999, 0.2001), spread(0.2, float("nan"), 0.2)
        ('±0.8', '±<0.1', '')
        >>> spread(1.0, 0.884, 1.0), spread(0.0, 0.0, 0.05)
        ('−11.6', '+5.0')
    """
    if isnan(value) or isnan(low) or isnan(high):
        return ""
    if low == high:
        return ""
    sign = {0.0: "+", 1.0: "−"}.get(value, "±")
    return sign + _rounded(100 * max(value - low, high - value), digits)


def number(value: float, digits: int = 2) -> str:
    """A plain number, such as a ratio.

    Example:
        >>> number(1.2345), number(0.0), number(0.001), number(float("nan")), number(float("inf"))
        ('1.23', '0', '<0.01', '–', '∞')
    """
    return _rounded(value, digits)


def count(number: int, noun: str = "") -> str:
    """A whole number, thousands apart, or so many things in words.

    Example:
        >>> count(1234567), count(1, "part"), count(2150, "token")
        ('1,234,567', '1 part', '2,150 tokens')
    """
    return f"{number:,} {noun}{'s' * (number != 1)}" if noun else f"{number:,}"


def plain(value: float, digits: int = 2) -> str:
    """A number of so many digits, whatever it is.

    Example:
        >>> plain(-0.123), plain(0.0004, 3), plain(float("nan"))
        ('−0.12', '0.000', '–')
    """
    return MISSING if isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 2) -> str:
    """The same with a sign in any case, for a difference.

    Example:
        >>> signed(0.5, 1), signed(-0.5, 1)
        ('+0.5', '−0.5')
    """
    return MISSING if isnan(value) else f"{value:+.{digits}f}".replace("-", "−")


def points(difference: float, digits: int = 1) -> str:
    """A difference of shares, in points, with its sign unless it rounds to zero.

    Example:
        >>> points(0.123), points(-0.0501), points(0.0004)
        ('+12.3', '−5.0', '0.0')
    """
    text = f"{100 * abs(difference):.{digits}f}"
    return text if float(text) == 0 else f"{'+' if difference > 0 else '−'}{text}"


def plus_minus(value: float, low: float, high: float, digits: int = 2) -> str:
    """The larger half of an interval around a plain number; empty where it is not known, or has no width.

    Example:
        >>> plus_minus(1.5, 1.25, 1.6), plus_minus(1.0, 1.0, 1.0), plus_minus(1.0, float("nan"), float("nan"))
        ('±0.25', '', '')
    """
    half = max(value - low, high - value)
    return "" if isnan(half) or half in (0, inf) else f"±{number(half, digits)}"


def _rounded(value: float, digits: int, whole: float | None = None) -> str:
    if isnan(value):
        return MISSING
    if value == inf:
        return "∞"
    if value == 0 or value == whole:
        return f"{value:.0f}"
    smallest = 10.0**-digits
    if 0 < value < smallest / 2:
        return f"<{smallest:.{digits}f}"
    if whole is not None and whole - smallest / 2 < value < whole:
        return f">{whole - smallest:.{digits}f}"
    return f"{value:.{digits}f}"
