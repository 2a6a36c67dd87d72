"""Figures: what is drawn is what was measured, and is written the same every time."""

from __future__ import annotations

import re

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

import moescope
from moescope.reporting import figures
from moescope.reporting.colours import expert_colours
from moescope.reporting.documents import choose_documents, read_chosen
from moescope.reporting.figures.shares import BELOW_AND_ABOVE
from moescope.reporting.inline_svg import inline_svg

INTERVALS = "95 % interval"


@pytest.fixture(scope="module")
def tally(mixtral):
    return moescope.tally(mixtral)


@pytest.fixture(scope="module")
def shares(tally):
    return moescope.shares(tally)


@pytest.fixture(scope="module")
def repeats(tally):
    return moescope.repeats(tally)


@pytest.fixture(scope="module")
def wide_shares(wide):
    return moescope.shares(moescope.tally(wide))


def bars(axes) -> dict[str, np.ndarray]:
    """The bars of a panel by label: left, bottom, right, top."""
    found = {}
    for patch in axes.patches:
        if patch.get_label() != INTERVALS:
            corners = patch.get_path().vertices.reshape(-1, 5, 2)
            found[patch.get_label()] = np.concatenate([corners[:, 0], corners[:, 2]], axis=1)
    return found


def line(axes, label):
    return next(line for line in axes.lines if line.get_label() == label)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts] + [text.get_text() for text in figure.texts]


def test_figure_7_draws_every_share_as_the_height_of_a_bar(shares):
    figure = figures.shares.draw_shares(shares, [0, 31])
    assert [axes.get_title("left") for axes in figure.axes] == ["Layer 0", "Layer 31"]
    for axes, layer in zip(figure.axes, [0, 31], strict=True):
        drawn = bars(axes)
        assert list(drawn) == shares["domain"].values.tolist()
        for domain, corners in drawn.items():
            expected = shares["share"].sel(domain=domain, layer=layer, choice="all").values
            assert np.allclose(corners[:, 3], expected)
            assert (corners[:, 1] == 0).all()
            assert np.allclose(corners[:, [0, 2]].mean(axis=1).round(), np.arange(8))
        assert set(line(axes, "uniform").get_ydata()) == {1 / 8}
        assert axes.get_ylim()[1] >= shares["share"].sel(layer=[0, 31], choice="all").values.max()


def test_figure_7_draws_every_interval(shares):
    axes = figures.shares.draw_shares(shares, [7], "first").axes[0]
    intervals = next(patch for patch in axes.patches if patch.get_label() == INTERVALS)
    ends = intervals.get_path().vertices.reshape(-1, 2, 2)
    at = shares.sel(layer=7, choice="first").transpose("domain", "expert", ...)
    assert np.allclose(ends[:, 0, 1], at["share_low"].values.ravel())
    assert np.allclose(ends[:, 1, 1], at["share_high"].values.ravel())


def test_figure_9_has_a_row_a_choice_and_a_column_a_layer(shares):
    figure = figures.shares.draw_choices(shares, [0, 7, 31])
    assert len(figure.axes) == 9
    for at, (choice, layer) in enumerate((c, n) for c in ("all", "first", "second") for n in (0, 7, 31)):
        drawn = bars(figure.axes[at])["Github"][:, 3]
        assert np.allclose(drawn, shares["share"].sel(domain="Github", layer=layer, choice=choice).values)


def test_a_top_1_model_has_one_row_in_figure_9(tiny_shares):
    assert len(figures.shares.draw_choices(tiny_shares, [5]).axes) == 1


def test_many_experts_are_a_map_of_ratios_with_dead_ones_in_black(wide_shares):
    figure = figures.shares.draw_shares(wide_shares, [0, 23])
    mesh = figure.axes[0].collections[0]
    share = wide_shares["share"].sel(layer=0, choice="all").transpose("domain", "expert").values
    order = np.argsort(-share.mean(axis=0), kind="stable")
    shown = np.asarray(mesh.get_array())
    assert shown.shape == (3, 128)
    assert np.allclose(np.where(shown < 0, 0, shown), share[:, order] * 128)
    dead = share[:, order] == 0
    assert dead[:, -3:].all()
    colours = mesh.to_rgba(shown)
    assert (colours[dead] == (0, 0, 0, 1)).all()
    assert not (colours[~dead][:, :3] == 0).all(axis=1).any()
    assert np.allclose(BELOW_AND_ABOVE(mesh.norm(1.0))[:3], 1, atol=0.01)  # uniform is white


def test_figure_10_draws_every_rate_and_both_baselines(repeats):
    figure = figures.repeats.draw_repeats(repeats)
    assert [axes.get_title("left") for axes in figure.axes] == ["First choice", "First or second choice"]
    for axes, kind in zip(figure.axes, ["first", "any"], strict=True):
        at = repeats.sel(kind=kind)
        for domain in repeats["domain"].values:
            assert np.allclose(line(axes, domain).get_ydata(), 100 * at["rate"].sel(domain=domain).values)
            assert np.allclose(line(axes, domain).get_xdata().round(), repeats["layer"].values)
        assert np.allclose(line(axes, "uniform").get_ydata(), 100 * at["rate_uniform"].values[0])
        band = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert band.min() == pytest.approx(100 * at["rate_null"].values.min())
        assert band.max() == pytest.approx(100 * at["rate_null"].values.max())
        left, right = axes.get_xlim()
        assert all(left < x < right for domain in repeats["domain"].values for x in line(axes, domain).get_xdata())
        low, high = axes.get_ylim()
        assert low <= 100 * at["rate_low"].values.min()
        assert high >= 100 * at["rate_high"].values.max()


def test_figure_10_of_a_single_layer_and_of_missing_values_is_drawn(tiny_repeats):
    figure = figures.repeats.draw_repeats(tiny_repeats.sel(layer=[0]))
    assert len(figure.axes) == 2
    figures.repeats.draw_repeats(tiny_repeats)


def test_the_divergence_map_shows_values_and_dots_what_sampling_does_not_explain(tally):
    divergence = moescope.divergence(tally)
    figure = figures.divergence.draw_divergence(divergence)
    axes = figure.axes[0]
    assert np.allclose(np.asarray(axes.collections[0].get_array()), divergence["jsd_rest"].values)
    dots = sum("•" in text.get_text() for text in axes.texts)
    assert dots == int((divergence["jsd_rest_q"] < 0.05).sum())


def test_figure_8_puts_each_token_on_the_colour_of_its_first_choice(mixtral):
    chosen = choose_documents(mixtral, per_domain=1)
    document = read_chosen(mixtral, chosen, layers=[0, 31])[2].tokens(slice(8))
    layers = mixtral.select_layers([0, 31])
    figure = figures.tokens.draw_tokens([document], layers)
    for axes, layer in zip(figure.axes[:2], layers, strict=True):
        drawn = {}
        for patch in axes.patches:
            colour = "#" + "".join(f"{round(255 * channel):02x}" for channel in patch.get_facecolor()[:3])
            for corners in patch.get_path().vertices.reshape(-1, 5, 2):
                drawn[tuple(corners[0][::-1])] = colour
        colours = expert_colours(8)
        first = [colours[expert] for expert in document.expert_ids[layer.layer][:, 0]]
        assert drawn[0, 0] == first[0]
        assert set(drawn.values()) == set(first)
        assert axes.texts[0].get_text().startswith(" class Expert")
    assert {"Layer 0", "Layer 31", "Github, document 2"} <= set(texts(figure))


def test_domains_may_be_called_anything(repeats, shares, tmp_path):
    names = ["$\\frac{x$", "_hidden", "a" * 90, "中文", "\x1b[31m", "", "100 %", "\\LaTeX{"]
    figure = figures.repeats.draw_repeats(repeats.assign_coords(domain=names))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:2] == names[:2]
    assert legend[2] == "a" * 23 + "…"
    assert legend[4] == "␛[31m"
    figures.style.save(figure, tmp_path, "named")
    assert ">$\\frac{x$</text>" in (tmp_path / "named.svg").read_text("utf-8")
    figures.shares.draw_shares(shares.assign_coords(domain=names), [0])


def test_figures_are_written_as_png_svg_and_pdf_with_the_same_bytes_every_time(repeats, tmp_path):
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        figures.style.save(figures.repeats.draw_repeats(repeats), tmp_path / run, "figure")
    for ending, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        one, two = ((tmp_path / run / f"figure.{ending}").read_bytes() for run in ("one", "two"))
        assert one.startswith(start)
        assert one == two
        assert b"CreationDate" not in one
        assert b"<dc:date>" not in one


def test_text_in_svg_and_pdf_stays_text(repeats, tmp_path):
    figures.style.save(figures.repeats.draw_repeats(repeats), tmp_path, "figure")
    assert "DM Mathematics</text>" in (tmp_path / "figure.svg").read_text()
    assert b"/Type3" not in (tmp_path / "figure.pdf").read_bytes()


def test_drawing_leaves_matplotlib_as_it_was(repeats):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    figures.repeats.draw_repeats(repeats)
    assert dict(mpl.rcParams) == before


def test_an_inline_figure_has_no_style_no_foreign_id_and_all_its_text(shares, tmp_path):
    figures.style.save(figures.shares.draw_shares(shares, [0]), tmp_path, "figure")
    svg = (tmp_path / "figure.svg").read_text()
    inline = inline_svg(svg, "fig7", 'says <b> & "c"')
    assert "style" not in inline
    assert "xmlns" not in inline
    assert 'aria-label="says &lt;b&gt; &amp; &quot;c&quot;"' in inline
    assert all(f">{domain}</text>" in inline for domain in shares["domain"].values)
    ids = set(re.findall(r' id="([^"]+)"', inline))
    references = set(re.findall(r"url\(#([^)]+)\)", inline)) | set(re.findall(r'href="#([^"]+)"', inline))
    assert references <= ids
    assert all(name.startswith("fig7-") for name in ids)
    assert len(inline) < len(svg) / 2


def test_a_missing_null_leaves_out_the_band(repeats):
    without = repeats.assign(rate_null=xr.full_like(repeats["rate_null"], np.nan))
    assert not [
        c for c in figures.repeats.draw_repeats(without).axes[0].collections if "popularity" in str(c.get_label())
    ]
