"""Traces that cannot tell everything: counts, no token ids, choices in no order. What they can tell is served."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner
from synthetic import make_counts, make_part, make_trace

from moescope.cli import main
from moescope.errors import NotRecorded
from moescope.measures import divergence, repeats, shares, words
from moescope.reporting import report
from moescope.tallying import tally
from moescope.trace import Layer, Trace

LAYERS = (Layer(0, 8, 2), Layer(3, 8, 2), Layer(5, 8, 2))
OF_TOKENS = {"distinct", "topics", "repeats", "bits", "locality", "balance", "coactivation", "transitions"}
OF_TOKENS |= {"worth", "caches", "prefetch", "devices"}


def tokens(path: Path, *, ranked: bool = True, token_ids: bool = True) -> Trace:
    rng = np.random.default_rng(2)
    layers = tuple(replace(layer, ranked=ranked) for layer in LAYERS)
    parts = [make_part(rng, layers, [40] * 6, first_document=6 * n) for n in range(2)]
    return make_trace(path, parts, layers, token_ids=token_ids)


def counts_of(path: Path, trace: Trace, warnings: tuple[str, ...] = ()) -> Trace:
    """The trace of counts with the loads of each document, by a slow loop; domains as `make_counts` gives them."""
    loads: dict[int, dict[int, dict[int, int]]] = {}
    for part in trace.iter_parts():
        for row, document in enumerate(part.document.tolist()):
            for layer, ids in part.expert_ids.items():
                for expert in ids[row].tolist():
                    by_expert = loads.setdefault(document, {}).setdefault(layer, {})
                    by_expert[expert] = by_expert.get(expert, 0) + 1
    return make_counts(path, loads, trace.layers, warnings=warnings)


WARNING = "layer 3 is <all> zeros"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Trace, Path]]:
    """A trace that lacks something, and its report, written when first asked for; that of counts has a warning."""

    @cache
    def write(kind: str) -> tuple[Trace, Path]:
        folder = tmp_path_factory.mktemp("partial")
        trace = tokens(folder / "t.moe", ranked=kind != "unranked", token_ids=kind != "no token ids")
        if kind == "counts":
            trace = counts_of(folder / "c.moe", trace, (WARNING,))
        return trace, report(trace, folder / "report")

    return write


def test_counts_give_the_shares_and_intervals_of_the_tokens_they_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    part = make_part(rng, LAYERS, [40, 3, 17, 60, 8], domains=("ArXiv", "Github"))
    whole = make_trace(tmp_path / "t.moe", [part], LAYERS)
    counted = tally(counts_of(tmp_path / "c.moe", whole))
    expected = shares(tally(whole)).sel(choice=["all"])
    found = shares(counted)
    assert found["choice"].values.tolist() == ["all"]
    for name in ("share", "share_error", "share_low", "share_high", "share_of_tokens"):
        xr.testing.assert_allclose(found[name], expected[name], rtol=1e-12)
    xr.testing.assert_allclose(divergence(counted), divergence(tally(whole)), rtol=1e-9)
    assert counted.data["tokens"].values.tolist() == [65, 63]


def test_tallies_of_counts_add_up_and_do_not_mix_with_those_of_tokens(tmp_path: Path) -> None:
    loads = {g: {0: {g % 3: 5 + g, 7: 1}, 4: {g % 5: 2}} for g in range(6)}
    halves = [
        tally(make_counts(tmp_path / f"{at}.moe", {g: loads[g] for g in loads if (g < 3) == at})) for at in (0, 1)
    ]
    whole = tally(make_counts(tmp_path / "w.moe", loads))
    xr.testing.assert_allclose((halves[1] + halves[0]).data, whole.data)
    with pytest.raises(ValueError, match="Tally of different counts_only"):
        _ = whole + tally(tokens(tmp_path / "t.moe"))
    same_layers = tally(make_counts(tmp_path / "s.moe", {0: {0: {1: 2}}}, LAYERS))
    with pytest.raises(ValueError, match="Tally of different counts_only"):
        _ = same_layers + tally(tokens(tmp_path / "t2.moe"))


def test_huge_counts_do_not_overflow(tmp_path: Path) -> None:
    trace = make_counts(tmp_path / "c.moe", {g: {0: {0: 2**52, 1: 2**52}} for g in range(4)})
    found = shares(tally(trace)).sel(choice="all", layer=0)
    np.testing.assert_allclose(found["share"].sel(expert=0), 0.5)
    np.testing.assert_allclose(found["share_error"].sel(expert=0), 0)


def test_without_an_order_of_choices_only_what_needs_none_is_told(tmp_path: Path) -> None:
    ranked, unranked = tally(tokens(tmp_path / "r.moe")), tally(tokens(tmp_path / "u.moe", ranked=False))
    assert shares(unranked)["choice"].values.tolist() == ["all"]
    xr.testing.assert_identical(repeats(unranked), repeats(ranked).sel(kind=["any"]))
    with pytest.raises(NotRecorded, match="which of a token's choices is the first"):
        words(tokens(tmp_path / "w.moe", ranked=False), ["self"])


def test_words_need_token_ids_and_repeats_need_tokens(tmp_path: Path) -> None:
    with pytest.raises(NotRecorded, match="no token ids"):
        words(tokens(tmp_path / "t.moe", token_ids=False), ["self"])
    with pytest.raises(NotRecorded, match="counts"):
        repeats(tally(make_counts(tmp_path / "c.moe", {0: {0: {1: 2}}})))


@pytest.mark.parametrize(
    ("kind", "sections", "lack"),
    [
        ("counts", {"topics", "balance"}, "holds counts"),
        ("unranked", OF_TOKENS, "does not say which choice"),
        ("no token ids", OF_TOKENS, "no token ids"),
    ],
)
def test_a_report_leaves_out_what_the_trace_cannot_tell_and_says_so(
    kind: str, sections: set[str], lack: str, written: Callable[[str], tuple[Trace, Path]]
) -> None:
    _, path = written(kind)
    page = path.read_text("utf-8")
    chapters = {"claims", "published", "structure", "methods"} | (set() if kind == "counts" else {"explanation"})
    if kind != "counts":  # which are of two domains
        chapters |= {"domains", "pairs"}
    assert set(re.findall(r'<section id="([a-z]+)"', page)) == sections | chapters
    assert lack in page
    claims = json.loads((path.parent / "report.json").read_text("utf-8"))["claims"]
    answers = {claim["name"]: claim["answer"] for claim in claims}
    assert (answers["Consecutive tokens repeat"] == "not enough data") == (kind == "counts")
    beyond_words = answers["They repeat beyond their words"]
    assert (beyond_words == "not enough data") == (kind != "unranked")
    tables = {file.stem for file in (path.parent / "tables").glob("*.csv")}
    expected = {"claims", "shares", "divergence", "balance"}
    if kind != "counts":
        expected |= {"repeats", "explain", "locality", "lags", "consistency", "coactivation", "batches", "domain_pairs"}
        expected |= {"information_between_layers", "transitions", "distinct"}
        expected |= {"cache", "cache_layers", "cache_domains", "prefetch", "prefetch_by_layer"}
        expected |= {"parallel", "drops", "reach", "foreign", "drop_places"}
    if kind == "no token ids":
        expected |= {"runs", "paths"}
    assert tables == expected
    assert "nan" not in re.sub(r"base64,\S+", "", page).lower().split()


@pytest.mark.parametrize("top_k", [1, 3])
def test_one_layer_has_no_next_and_one_choice_no_pairs(top_k: int, tmp_path: Path) -> None:
    layers = (Layer(4, 8, top_k),)
    part = make_part(np.random.default_rng(4), layers, [40] * 9, weights=True)
    page = report(make_trace(tmp_path / "t.moe", [part], layers), tmp_path / "report").read_text("utf-8")
    sections = set(re.findall(r'<section id="([a-z]+)"', page))
    assert "transitions" not in sections
    assert ("coactivation" in sections) == (top_k > 1)
    assert {"bits", "locality", "balance", "pairs"} <= sections


def test_layers_of_different_shapes_with_drops_and_short_documents_of_one_domain_get_their_report(
    tmp_path: Path,
) -> None:
    layers = (Layer(0, 8, 1), Layer(1, 12, 4), Layer(2, 6, 2, num_null_experts=2), Layer(7, 8, 2))
    rng = np.random.default_rng(5)
    part = make_part(rng, layers, [1, 2, 15, 9, 3, 16, 4, 11], domains=("ArXiv",), dropped=0.2)
    trace = make_trace(tmp_path / "t.moe", [part], layers)
    page = report(trace, tmp_path / "report", layers=[0, 2]).read_text("utf-8")
    for name in ("shares", "coactivation", "transitions"):
        assert f'figure id="figure-{name}"' in page
    # one domain diverges from nothing, and gets no empty figure
    assert "divergence" not in {file.stem for file in (tmp_path / "report").rglob("*.*")}
    assert 'figure id="figure-divergence"' not in page


def test_commands_serve_counts_or_refuse_in_one_line(tmp_path: Path) -> None:
    make_counts(tmp_path / "c.moe", {g: {0: {g: 6}} for g in range(4)})
    run = CliRunner()
    info = run.invoke(main, ["info", str(tmp_path / "c.moe")])
    assert "counts of assignments" in info.output
    assert run.invoke(main, ["shares", str(tmp_path / "c.moe")]).exit_code == 0
    for command in ("repeats", "words", "text"):
        refused = run.invoke(main, [command, str(tmp_path / "c.moe")])
        assert (refused.exit_code, refused.output.count("error[not-recorded]")) == (1, 1), command


@pytest.mark.parametrize("lack", ["token_ids", "ranked"])
def test_text_is_not_coloured_where_the_trace_has_none_or_no_first_choice(lack: str, tmp_path: Path) -> None:
    tokens(tmp_path / "t.moe", **{lack: False})
    refused = CliRunner().invoke(main, ["text", str(tmp_path / "t.moe")])
    assert (refused.exit_code, refused.output.count("error[not-recorded]")) == (1, 1)


def test_warnings_of_an_importer_are_repeated_by_info_and_report(
    written: Callable[[str], tuple[Trace, Path]],
) -> None:
    trace, path = written("counts")
    assert "<b>Warning.</b> layer 3 is &lt;all&gt; zeros" in path.read_text("utf-8")
    info = CliRunner().invoke(main, ["info", str(trace.path)])
    assert re.search(rf"^warning\s+{WARNING}$", info.output, re.MULTILINE)
