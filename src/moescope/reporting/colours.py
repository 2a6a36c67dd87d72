"""Colours of experts and domains; sRGB hex strings, safe for the three common kinds of colour blindness.

Experts are backgrounds of text: light ones carry black text, dark ones white. Domains are bars and lines on white or
on near-black. The fixed palettes were found by maximising, under simulated protanopia, deuteranopia and tritanopia
(Machado et al. 2009), the smallest distance between any two colours in OKLab; larger sets are spread evenly over the
hues of OKLCH and three lightness levels, and then the number beside the colour does the telling apart.
"""

from __future__ import annotations

from functools import cache
from math import ceil, cos, radians, sin

INK, MUTED, RULE, PAPER = "#1b1e23", "#656b75", "#d9dce1", "#ffffff"
"""Text, secondary text, hairlines and background of figures; the page maps them to its own in dark mode."""

_EXPERTS_LIGHT = ("#8fd6fc", "#fcb621", "#29ba88", "#faf285", "#8f98ea", "#e5884d", "#df9dc2", "#d2cdab")
_EXPERTS_DARK = ("#013c89", "#91612d", "#287c6b", "#624e10", "#5c37c5", "#6c1400", "#7e2d64", "#3f3e3b")
_DOMAINS = (
    "#2c5c94", "#dd8611", "#20826a", "#c95123", "#3ebff6", "#e292c5", "#8058cb", "#734d2d", "#9e9786", "#c1bb66",
)  # fmt: skip

NO_EXPERT_LIGHT, NO_EXPERT_DARK = "#f1f1f1", "#26282c"
"""Background of a token whose assignment was dropped or went to a null expert."""


@cache
def expert_colours(num_experts: int, *, dark: bool = False) -> tuple[str, ...]:
    """A background for each expert of a layer, by id.

    Example:
        >>> expert_colours(8)[0], len(set(expert_colours(128)))
        ('#8fd6fc', 128)
    """
    if num_experts <= len(_EXPERTS_LIGHT):
        return (_EXPERTS_DARK if dark else _EXPERTS_LIGHT)[:num_experts]
    levels = ((0.36, 0.09), (0.44, 0.11), (0.52, 0.09)) if dark else ((0.74, 0.12), (0.84, 0.10), (0.93, 0.06))
    num_hues = ceil(num_experts / len(levels))
    return tuple(
        oklch(*levels[expert % len(levels)], 360 * (expert // len(levels) + expert % len(levels) / 3) / num_hues)
        for expert in range(num_experts)
    )


@cache
def domain_colours(num_domains: int) -> tuple[str, ...]:
    """A colour for each domain; from the eleventh on they recur, told apart by hatches, markers and line styles."""
    return tuple(_DOMAINS[domain % len(_DOMAINS)] for domain in range(num_domains))


def oklch(lightness: float, chroma: float, hue: float) -> str:
    """The sRGB colour of an OKLCH one (lightness 0..1, hue in degrees), its chroma lowered until it is one.

    Source:
        B. Ottosson, A perceptual color space for image processing, 2020.
    Example:
        >>> oklch(1, 0, 0), oklch(0.628, 0.2577, 29.23)
        ('#ffffff', '#ff0000')
    """
    while True:
        a, b = chroma * cos(radians(hue)), chroma * sin(radians(hue))
        long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
        medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
        short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
        linear = (
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        )
        if chroma <= 0 or all(-0.0005 <= channel <= 1.0005 for channel in linear):
            return "#" + "".join(f"{round(255 * _gamma(channel)):02x}" for channel in linear)
        chroma -= 0.005


def _gamma(linear: float) -> float:
    linear = min(max(linear, 0.0), 1.0)
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
