"""The page: one file, no request, and whatever a token or a name says stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from moescope.reporting.formats import render
from moescope.reporting.layers import shown_layers
from moescope.reporting.page import _embedded, _fitting, _packed_ids, _packed_weights, _routing, render_page
from moescope.reporting.page.contents import Contents, contents
from moescope.reporting.results import gather
from moescope.reporting.subjects.claims import claims_table
from moescope.reporting.subjects.tokens import MOST_EMBEDDED_CHOICES, embedded_layers
from moescope.reporting.writer import report
from moescope.trace import Layer

DOMAINS = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "\u202eDM\x00 {{ 7*7 }}",
    '" onmouseover="alert(3)',
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KNOWN = """
    html head meta title style script body a header p h1 h2 h3 h4 ul bdi cite dl div dt dd small details summary nav ol
    li main section span figure figcaption b i code noscript label select input table caption thead tbody tr th td
    footer svg g path use defs text clippath rect image tspan
"""


class Page(HTMLParser):
    """Elements of a page, and what its script and style elements hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open = tag if tag in ("script", "style") else ""
        if self._open:
            self.raw.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open:
            tag, attrs, text = self.raw[-1]
            self.raw[-1] = (tag, attrs, text + data)


@pytest.fixture(scope="module")
def written(make_trace, tmp_path_factory):
    """The report of a trace whose text, domains and model's name are hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    trace = make_trace(folder / "t.moe", hostile=True, domains=DOMAINS, layers=(0, 3, 7))
    return report(trace, folder / "report"), trace


@pytest.fixture(scope="module")
def page(written):
    return Page(written[0].read_text("utf-8"))


def test_no_element_and_no_attribute_comes_from_a_token_or_a_name(page):
    assert {tag for tag, _ in page.elements} <= set(KNOWN.split())
    assert [tag for tag, _ in page.elements].count("script") == 2
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert "img" not in {tag for tag, _ in page.elements}


def test_the_page_holds_no_address_but_the_papers_and_files_beside_it(written, page):
    for tag, attributes in page.elements:
        for name in ("href", "src", "data", "action"):
            if name not in attributes:
                continue
            value = attributes[name]
            if value.startswith(("data:text/csv", "data:image/png", "#")):
                continue
            if value.startswith("http"):
                assert (tag, value) == ("a", "https://arxiv.org/abs/2401.04088")
            else:
                assert (written[0].parent / value).is_file(), value
    assert "@import" not in written[0].read_text("utf-8")
    assert "url(http" not in written[0].read_text("utf-8")


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_else(page):
    policy = next(a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag, attributes, text in page.raw:
        if attributes.get("type") == "application/json":
            continue
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_embedded_text_is_the_traces_with_controls_made_visible(page, written):
    _, trace = written
    data = json.loads(next(text for tag, a, text in page.raw if a.get("type") == "application/json"))
    document = next(d for d in data["documents"] if d["number"] == 0)
    shown = "".join(data["texts"][at] for at in document["tokens"])
    rows = trace.document(0)
    assert document["ids"] == rows.token_id[: document["shown"]].tolist()
    for harmless in ("</script>", "<img src=x onerror=alert(1)>", "]]>", "<!--"):
        assert harmless in shown
    assert "⟨U+202E⟩evil⟨U+202C⟩␛[31mred␀⟨U+2028⟩" in shown
    for layer in data["layers"]:
        packed = base64.b64decode(document["experts"][str(layer["layer"])])
        assert list(packed) == rows.expert_ids[layer["layer"]][: document["shown"]].ravel().tolist()


def test_text_and_names_appear_escaped_and_templates_in_them_are_not_run(written):
    text = written[0].read_text("utf-8")
    assert "&lt;img src=x onerror=alert(2)&gt;" in text
    assert "made-up &lt;b&gt;8x7B&lt;/b&gt;" in text
    assert "{{ 7*7 }}" in text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\x7f]", text)


def test_a_sentence_of_a_section_is_not_said_again_under_its_table(written):
    text = written[0].read_text("utf-8")
    sentences = re.findall(r"<li>(Layer \d+: .*?)</li>", text)
    assert len(sentences) > 3
    assert [text.count(sentence) for sentence in sentences] == [1] * len(sentences)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright to drive a browser")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield chromium
        chromium.close()


def opened(browser, path, events):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.on("dialog", lambda dialog: (events.append(("dialog", dialog.message)), dialog.dismiss()))
    page.on("pageerror", lambda error: events.append(("error", str(error))))
    page.on("console", lambda message: events.append(("console", message.text)))
    page.on("request", lambda request: events.append(("request", request.url)))
    page.goto(path.as_uri())
    return page


def test_in_a_browser_the_page_runs_without_dialog_error_or_request(browser, written):
    events = []
    page = opened(browser, written[0], events)
    for index in range(page.locator("#document option").count()):
        page.locator("#document").select_option(index=index)
    page.locator(".token").first.hover()
    page.wait_for_timeout(100)
    assert events == [("request", written[0].as_uri())]
    assert page.locator("#viewer img, #viewer script, #tip img").count() == 0
    assert page.evaluate("document.querySelectorAll('script').length") == 2


def test_in_a_browser_the_page_is_no_wider_than_a_phone_and_its_tables_scroll(browser, written):
    page = opened(browser, written[0], [])
    page.set_viewport_size({"width": 390, "height": 844})
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for section in ("#claims", "#bits", "#coactivation"):
        assert page.locator(section).evaluate("e => e.scrollWidth - e.clientWidth") <= 0, section
    boxes = [element.bounding_box() for element in page.locator(".claims .evidence").all()]
    assert max(box["x"] + box["width"] for box in boxes) <= 390


def test_in_a_browser_what_is_folded_unfolds_for_printing_and_folds_again(browser, written):
    page = opened(browser, written[0], [])
    folded = page.locator("main details:not([open])").count()
    assert folded > 10
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("main details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("main details:not([open])").count() == folded


def test_in_a_browser_tokens_lie_on_the_colours_of_their_experts(browser, written):
    page = opened(browser, written[0], [])
    _, trace = written
    number = int(page.locator("#document option:checked").inner_text().split(":")[0])
    experts = trace.document(number).expert_ids
    data = json.loads(page.locator("#routing").text_content())
    for column, layer in enumerate((0, 3, 7)):
        tokens = page.locator(".column").nth(column).locator(".token")
        assert tokens.count() == len(experts[layer])
        for token in (0, 5, tokens.count() - 1):
            colour = tokens.nth(token).evaluate("e => e.style.getPropertyValue('--light')")
            assert colour == data["palettes"]["8"][experts[layer][token, 0]][0]


def test_in_a_browser_experts_are_highlighted_words_found_and_tokens_described(browser, written):
    page = opened(browser, written[0], [])
    number = int(page.locator("#document option:checked").inner_text().split(":")[0])
    rows = written[1].document(number, weights=True)
    page.locator(".column").nth(1).locator(".legend button").nth(2).click()
    assert page.locator(".column").nth(1).locator(".chosen").count() == int((rows.expert_ids[3][:, 0] == 2).sum())
    assert page.locator(".column").nth(0).locator(".text.lit").count() == 0
    text = written[1].vocabulary.text(rows.token_id).lower()
    page.locator("#query").fill("THE")
    assert page.locator("#found").inner_text() == f"{text.count('the')} found"
    page.locator(".text").first.focus()
    page.keyboard.press("End")
    spoken = page.locator("#spoken").inner_text()
    first, second = rows.expert_ids[7][-1]
    assert f"layer 7: expert {first} weight {rows.gate_weights[7][-1, 0]:.2f}, expert {second} weight" in spoken
    page.locator(".head select").first.select_option("7")
    page.locator("#rank").select_option("1")
    shown = page.locator(".column").first.locator(".token").nth(3).get_attribute("data-expert")
    assert int(shown) == rows.expert_ids[7][3, 1]


def test_a_page_holds_a_bounded_number_of_tokens_and_says_so(mixtral, monkeypatch):
    results = gather(mixtral)
    monkeypatch.setattr("moescope.reporting.page.MOST_TEXT_BYTES", 30_000)
    documents = _fitting(results)
    assert 0 < len(documents) < len(results.found["tokens"])
    assert len(json.dumps(_routing(results, documents))) < 40_000
    assert f"{len(documents)} of 32 documents" in _embedded(results, documents)


def test_many_layers_are_thinned_but_the_shown_ones_stay(mixtral):
    many = replace(
        mixtral, header=replace(mixtral.header, layers=tuple(Layer(number, 512, 16) for number in range(94)))
    )
    kept = [layer.layer for layer in embedded_layers(many, (0, 46, 93))]
    assert {0, 46, 93} <= set(kept)
    assert len(kept) == MOST_EMBEDDED_CHOICES // 16
    assert shown_layers(many) == (0, 46, 93)


def test_ids_above_a_byte_take_two_and_a_dropped_one_the_largest_number():
    ids = np.array([[0, 254], [511, -1]])
    packed = base64.b64decode(_packed_ids(ids, Layer(0, 512, 2)))
    assert np.frombuffer(packed, "<u2").tolist() == [0, 254, 511, 65535]
    assert list(base64.b64decode(_packed_ids(np.array([[3, -1]]), Layer(0, 8, 2)))) == [3, 255]


def test_gate_weights_keep_two_decimals_whatever_their_scale():
    weights = np.array([[2.5, 0.01], [0.7, 0.0]])
    scale, packed = _packed_weights(weights)
    restored = np.frombuffer(base64.b64decode(packed), np.uint8) / 255 * scale
    assert np.abs(restored - weights.ravel()).max() < 0.005 * 2.5


def test_a_page_without_figures_holds_the_claims_and_the_methods_alone(mixtral):
    results = gather(mixtral)
    table = claims_table(results.found["claims"])
    page = render_page(results, Contents([], {"claims": table}, {}), {"tables/claims": render(table, "csv")}, {})
    assert re.findall(r'<section id="([a-z]+)"', page) == ["claims", "methods"]
    assert "<figure" not in page


def test_every_figure_has_its_caption_and_says_how_to_read_it_and_what_it_cannot_tell(written):
    text = written[0].read_text("utf-8")
    figures = re.findall(r"<figure(?: id=\"figure-([a-z]+)\")?>(.*?)</figure>", text, re.DOTALL)
    assert [name for name, _ in figures] == [
        *("shares", "divergence", "choices", "", "repeats"),  # the coloured text has its own place
        *("explained", "nulls", "distance", "consistency", "vocabulary", "classes"),
        *("balance", "coactivation", "transitions", "pairs"),
        *("distinct", "cache", "prefetch", "parallel"),
    ]
    for name, figure in figures:
        for heading in ("How to read it.", "What it cannot tell."):
            said = re.search(rf"<b>{heading}</b>(.*?)</p>", figure, re.DOTALL)
            assert said is not None, name
            assert len(said[1].split()) > 10, name
        assert 'href="data:text/csv' in figure or 'href="figures/' in figure
        assert not name or 'role="img" aria-label="' in figure


def test_what_the_routing_is_worth_opens_with_advice_and_its_evidence(written):
    text = written[0].read_text("utf-8")
    for section in ("caches", "prefetch", "devices"):
        body = re.search(rf'<section id="{section}".*?<figure', text, re.DOTALL)
        assert body is not None
        said = re.search(r'<p class="advice"><b>(.+?)</b> (.+?)</p>', body[0], re.DOTALL)
        assert said is not None
        assert re.search(r"\d", said[2])


def test_the_table_of_contents_leads_to_every_section_in_the_order_of_the_page(page):
    ids = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    contents, nested = [], False
    for tag, attributes in page.elements:
        nested = tag == "nav" or (nested and tag in ("ol", "li", "a"))
        if nested and tag == "a":
            contents.append(str(attributes["href"]).removeprefix("#"))
    assert contents == ids
    assert ids[0] == "claims"
    assert ids[-1] == "methods"


def test_ids_are_unique_and_every_reference_within_the_page_has_its_target(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes in page.elements:
        targets = [str(attributes.get("aria-labelledby") or ""), str(attributes.get("href") or "")]
        for target in targets[:1] if not targets[1].startswith("#") else [*targets[:1], targets[1][1:]]:
            assert not target or target in ids


def test_headings_go_down_one_level_at_a_time(page):
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert levels.count(1) == 1


def test_each_claim_shows_an_effect_and_unfolds_to_all_of_them(written):
    text = written[0].read_text("utf-8")
    effects = [claim["effects"] for claim in json.loads((written[0].parent / "report.json").read_text())["claims"]]
    section = text[text.index('<section id="claims"') :].split("</section>")[0]
    assert section.count('<details class="effects">') == sum(len(of) > 1 for of in effects)
    assert section.count('<p class="effects">') == sum(len(of) == 1 for of in effects)
    assert section.count('<th scope="row">') == sum(len(of) for of in effects if len(of) > 1)


def test_a_section_without_a_figure_and_a_chapter_without_a_section_are_left_out(mixtral):
    results = gather(mixtral)
    everything = contents(results)
    assert [chapter.name for chapter in everything.chapters] == [
        "published", "explanation", "structure", "domains", "worth",
    ]  # fmt: skip
    words = {name: found if name == "words" else None for name, found in results.found.items()}
    only = contents(replace(results, found=words))
    assert (list(only.tables), only.figures, only.chapters) == (["words"], [], {})
