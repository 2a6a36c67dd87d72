"""An SVG of matplotlib as part of a page: much shorter, in the page's colours, without what its policy forbids.

Every ``style`` becomes attributes, ids are made the figure's own, coordinates keep two decimals, and the ink, secondary
ink and hairlines get classes in place of colours, so that the page can show them light on dark.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from moescope.reporting.colours import INK, MUTED, RULE

FULL_WIDTH_POINTS = 486
"""Width of a figure that fills the page, as of a sheet of paper; narrower ones keep the size of their letters."""

_CLASSES = {INK: "ink", MUTED: "muted", RULE: "rule"}
_DROPPED = {"metadata", "style"}
_KEPT_FONT = {"font-size", "font-weight"}
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_DECIMAL = re.compile(r"-?\d+\.\d+")
_RECTANGLE = re.compile(r"M(\S+) (\S+)L(\S+) (\S+)L(\S+) (\S+)L(\S+) (\S+)(?:L\1 \2z?|z)")


def inline_svg(svg: str, name: str, description: str) -> str:
    """The ``<svg>`` element to put into an HTML page.

    Args:
        svg: What matplotlib wrote.
        name: Prefix of its ids, unlike that of any other figure of the page.
        description: What a screen reader says instead.
    """
    root = ElementTree.fromstring(svg.encode())
    box = root.get("viewBox", "")
    _simplify(root)
    used = {reference for element in root.iter() for reference in _references(element)}
    for element in root.iter():
        _own_ids(element, name, used)
        _short_numbers(element)
    _unwrap(root)
    width = min(100.0, 100 * float(box.split()[2]) / FULL_WIDTH_POINTS)
    root.attrib = {
        "viewBox": box,
        "width": f"{width:.4g}%",
        "role": "img",
        "aria-label": description,
        "class": "figure",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _simplify(element: Element, clipped: bool = True) -> None:
    """Remove namespaces, metadata, the background, white space and what is invisible; turn styles into attributes."""
    element.tag = _local(element.tag)
    element.attrib = {_local(key): value for key, value in element.attrib.items()}
    _attributes_from_style(element)
    if not clipped:  # the cells of a map end at its edge anyway
        element.attrib.pop("clip-path", None)
    if "Mesh" in element.get("id", ""):
        clipped = False
        element.set("shape-rendering", "crispEdges")
    for child in list(element):
        if _local(child.tag) in _DROPPED or child.get("id") == "patch_1":
            element.remove(child)
            continue
        _simplify(child, clipped)
        child.tail = None
        unseen = child.get("fill") == "none" and "stroke" not in child.attrib and not child.get("class")
        if child.tag == "path" and (unseen or "d" not in child.attrib):  # a line of missing values has no d
            element.remove(child)
    if element.tag != "text":
        element.text = None


def _attributes_from_style(element: Element) -> None:
    classes = []
    for declaration in element.attrib.pop("style", "").split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key in ("fill", "stroke") and value in _CLASSES:
            classes.append(f"{key}-{_CLASSES[value]}")
        elif key and (not key.startswith("font") or key in _KEPT_FONT):
            element.set(key, value)
    if classes:
        element.set("class", " ".join(classes))


def _references(element: Element) -> list[str]:
    references = [reference for value in element.attrib.values() for reference in _REFERENCE.findall(value)]
    href = element.get("href", "")
    return [*references, href[1:]] if href.startswith("#") else references


def _own_ids(element: Element, name: str, used: set[str]) -> None:
    own = element.attrib.pop("id", None)
    if own in used:
        element.set("id", f"{name}-{own}")
    for key, value in element.attrib.items():
        element.set(key, _REFERENCE.sub(rf"url(#{name}-\1)", value))
    if element.get("href", "").startswith("#"):
        element.set("href", f"#{name}-{element.attrib['href'][1:]}")


def _short_numbers(element: Element) -> None:
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    for key in ("d", "transform", "x", "y", "width", "height"):
        if key in element.attrib:
            value = " ".join(_DECIMAL.sub(lambda match: _two_decimals(match[0]), element.attrib[key]).split())
            element.set(key, _short_path(value) if key == "d" else value)
    if element.get("href", "").startswith("data:"):
        element.set("href", "".join(element.attrib["href"].split()))


def _short_path(path: str) -> str:
    """The path without superfluous space; an upright rectangle by its corner and its sides."""
    path = re.sub(r" ?([A-Za-z]) ?", r"\1", path)
    match = _RECTANGLE.fullmatch(path)
    if match is None:
        return path
    x0, y0, x1, y1, x2, y2, x3, y3 = map(float, match.groups())
    if (y0, x1, y2, x3) == (y1, x2, y3, x0):
        return f"M{match[1]} {match[2]}h{_two_decimals(x1 - x0)}v{_two_decimals(y2 - y1)}h{_two_decimals(x0 - x1)}z"
    return path


def _two_decimals(number: float | str) -> str:
    return f"{float(number):.2f}".rstrip("0").rstrip(".")


def _unwrap(element: Element) -> None:
    """Put the children of groups that say nothing in the place of the groups."""
    children: list[Element] = []
    for child in element:
        _unwrap(child)
        if child.tag in ("g", "defs") and not len(child):
            continue
        children += list(child) if child.tag == "g" and not child.attrib else [child]
    element[:] = _merged(children)


def _merged(children: list[Element]) -> list[Element]:
    """The elements, neighbouring paths of one look made one path."""
    merged: list[Element] = []
    for child in children:
        last = merged[-1] if merged else None
        if (
            last is not None
            and child.tag == last.tag == "path"
            and "id" not in child.attrib
            and _look(child) == _look(last)
        ):
            last.set("d", last.attrib["d"] + child.attrib["d"])
        else:
            merged.append(child)
    return merged


def _look(path: Element) -> dict[str, str]:
    return {key: value for key, value in path.attrib.items() if key != "d"}


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]
