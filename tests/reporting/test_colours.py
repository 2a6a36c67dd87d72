"""Colours that stay apart for every reader."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from moescope.reporting.colours import INK, NO_EXPERT_DARK, NO_EXPERT_LIGHT, domain_colours, expert_colours
from moescope.reporting.figures.style import domain_marks

VISION = {  # Machado et al. 2009, severity 1
    "all": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_LMS = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
TO_OKLAB = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]


def linear(colour):
    channels = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    return np.array(TO_OKLAB) @ np.cbrt(np.array(TO_LMS) @ np.clip(rgb, 0, None))


def contrast(one, other):
    a, b = sorted(float(np.dot([0.2126, 0.7152, 0.0722], linear(colour))) for colour in (one, other))
    return (b + 0.05) / (a + 0.05)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("colours", [expert_colours(8), expert_colours(8, dark=True), domain_colours(10)])
def test_eight_experts_and_ten_domains_are_told_apart_by_every_eye(colours, vision):
    seen = [oklab(np.array(VISION[vision]) @ linear(colour)) for colour in colours]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 0.065


@pytest.mark.parametrize("num_experts", [2, 8, 16, 60, 128, 256])
def test_text_on_the_colour_of_any_expert_can_be_read(num_experts):
    light, dark = expert_colours(num_experts), expert_colours(num_experts, dark=True)
    assert len(set(light)) == len(set(dark)) == num_experts
    assert all(contrast(INK, colour) >= 6 for colour in (*light, NO_EXPERT_LIGHT))
    assert all(contrast("#ffffff", colour) >= 4.5 for colour in (*dark, NO_EXPERT_DARK))


def test_bars_and_lines_of_domains_show_on_white_and_on_black():
    assert all(contrast(colour, "#ffffff") > 1.9 for colour in domain_colours(10))
    assert all(contrast(colour, "#15171b") > 1.9 for colour in domain_colours(10))


def test_thirty_domains_have_thirty_marks():
    marks = domain_marks([f"domain {number}" for number in range(30)])
    assert len({(mark.colour, mark.hatch) for mark in marks}) == 30
    assert len({(mark.colour, mark.marker) for mark in marks}) == 30
