"""The reference pages say what the code does."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from synthetic import make_counts, make_part, make_trace

import moescope
from moescope import trace

DOCS = Path(__file__).parents[2] / "docs"


def table_rows(page: str, heading: str) -> list[tuple[str, ...]]:
    """Rows of the table whose first heading cell is `heading`, the code ticks taken off the first cell."""
    lines = page.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        rows.append((cells[0].strip("`"), *cells[1:]))
    return rows


@pytest.fixture
def page() -> str:
    return (DOCS / "reference" / "trace-format.md").read_text(encoding="utf-8")


def test_the_page_on_the_trace_format_names_the_columns_a_part_has(page: str, tmp_path: Path) -> None:
    layers = (trace.Layer(15, 8, 2), trace.Layer(16, 300, 1, lookahead=(1,), num_predicted=2))
    part = make_part(np.random.default_rng(0), layers, [3], weights=True, scores=True)
    part = replace(part, phase=np.array([0, 0, 1]), predictions={(16, 1): np.array([[1, 299]] * 3)})
    written = make_trace(tmp_path / "t.moe", [part], layers)
    schema = pq.read_schema(written.parts[0].path)
    documented = {name: kind for name, kind, _ in table_rows(page, "column")}
    for field in schema:
        pattern = re.sub(r"(?<=^[MS])\d+$", "{layer}", field.name)
        pattern = re.sub(r"(?<=^[LW])\d+_\d+$", "{layer}_{rank}", pattern)
        pattern = re.sub(r"(?<=^P)\d+_\d+_\d+$", "{layer}_{distance}_{rank}", pattern)
        assert str(field.type) in documented[pattern], field
    assert [name for name in documented if "{" not in name] == schema.names[:8]
    vocabulary = pq.read_schema(written.path / "vocabulary.parquet")
    second = page[page.index("## `vocabulary.parquet`") :]
    assert [(row[0], row[1]) for row in table_rows(second, "column")] == [(f.name, str(f.type)) for f in vocabulary]


def test_the_page_on_the_trace_format_names_the_columns_of_counts(page: str, tmp_path: Path) -> None:
    written = make_counts(tmp_path / "c.moe", {0: {0: {1: 5}}})
    schema = pq.read_schema(written.parts[0].path)
    documented = [(name, kind) for name, kind, _ in table_rows(page, "column of counts")]
    assert [(field.name, str(field.type)) for field in schema] == documented


def test_the_page_on_the_trace_format_names_the_keys_of_the_header(page: str) -> None:
    header = json.loads(trace.Header((trace.Layer(0, 8, 2),), clusters=True).to_json())
    assert [row[0] for row in table_rows(page, "key")] == list(header)
    assert [row[0] for row in table_rows(page, "key of a layer")] == [f.name for f in fields(trace.Layer)]
    assert f"# The trace format, version {trace.FORMAT_VERSION}" in page


def test_the_page_on_importers_names_the_formats_and_columns_there_are() -> None:
    from moescope.importers import FORMATS
    from moescope.importers.named import NAMES

    text = (DOCS / "reference" / "importers.md").read_text(encoding="utf-8")
    formats = [(name, made.source, made.files, made.gives, made.document) for name, made in FORMATS.items()]
    assert table_rows(text, "format") == formats
    assert table_rows(text, "what") == [(what, ", ".join(names)) for what, names in NAMES.items()]
    second = text[text.index("## What each file says") :]
    named = {name for row in table_rows(second, "format") for name in re.findall(r"[a-z-]+", row[0])}
    assert set(FORMATS) <= named


def test_the_page_on_errors_is_made_from_their_classes() -> None:
    spec = importlib.util.spec_from_file_location("make_errors_page", DOCS / "make_errors_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: python docs/make_errors_page.py"


def test_the_page_on_saturation_shows_the_curve_of_the_checkpoints_that_are_kept() -> None:
    page = (DOCS / "reference" / "measures" / "saturation.md").read_text(encoding="utf-8")
    paths = sorted((DOCS.parent / "training" / "checkpoint-traces").glob("pct-*.moe"))
    steps = [int(path.stem.removeprefix("pct-")) for path in paths]
    found = moescope.saturation([trace.open_trace(path) for path in paths], steps)
    value = found.isel(domain=0).sel(kind="set")
    rows = table_rows(page, "% of the training")
    assert [int(row[0]) for row in rows] == steps[:-1]
    for row, at in zip(rows, range(len(steps) - 1), strict=True):
        for cell, layer in zip(row[1:], value["layer"].values, strict=True):
            of = value.isel(step=at).sel(layer=layer)
            half = max(float(of["agreement"] - of["agreement_low"]), float(of["agreement_high"] - of["agreement"]))
            kappa = f"{float(of['kappa']):.2f}".replace("-", "−")
            assert cell == f"{100 * float(of['agreement']):.1f} ± {100 * half:.1f} ({kappa})"


def test_the_page_on_caches_names_the_policies_and_shows_what_the_time_model_leaves_unexplained() -> None:
    from moescope.simulation import POLICIES
    from moescope.simulation.offloading import table_2

    text = (DOCS / "reference" / "simulation" / "cache.md").read_text(encoding="utf-8")
    assert tuple(row[0] for row in table_rows(text, "policy")) == POLICIES
    for row, of in zip(table_rows(text, "GPU"), table_2().itertuples(), strict=True):
        assert row[0] == "" or row[0].startswith(of.gpu)
        assert row[2:5] == (f"{of.loads_a_token:g}", f"{of.link_seconds:.3f}", f"{of.link_tokens_per_second:.2f}")
        assert row[5:] == (f"{of.measured_tokens_per_second:.3f}", f"{of.residual_seconds:.3f}")


def test_no_page_links_to_a_page_that_is_not_there() -> None:
    root = DOCS.parent
    for page in [*root.glob("*.md"), *DOCS.rglob("*.md"), *root.glob("training/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http:", "https:", "mailto:")):
                assert (page.parent / target).exists(), f"{page.relative_to(root)} links to {target}"
