"""The report as one HTML file that asks the network for nothing.

Token text and names are hostile. The template escapes everything; the coloured text travels as JSON that cannot end its
element and becomes text nodes only; a policy in the page forbids every script, style and request but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

import moescope
from moescope.measures.claims import Claim
from moescope.reporting.colours import NO_EXPERT_DARK, NO_EXPERT_LIGHT, expert_colours
from moescope.reporting.documents import RoutedDocument, example_documents
from moescope.reporting.layout import LINE_BREAK, PART_OF_CHARACTER
from moescope.reporting.numbers import MISSING, count
from moescope.reporting.page.contents import Contents
from moescope.reporting.subject import Results
from moescope.reporting.subjects.tokens import embedded_layers
from moescope.reporting.tables import Row, Table
from moescope.reporting.visible import visible
from moescope.tallying import choice_labels
from moescope.trace import Layer

MOST_TEXT_BYTES = 1_500_000
"""Bytes of coloured text that a page holds."""

MOST_DATA_BYTES = 200_000
"""A larger CSV is linked to instead of held in the page."""


_SAYS_NOTHING = re.compile(r"(model|checkpoint|snapshot|unknown|[0-9a-f]{40}|)", re.IGNORECASE)
"""Names of folders in which a model may lie, but that do not name it, and what an import says for none."""

DRAWN_BY_PAGE = "tokens"
"""The figure that the page draws itself, from the documents it holds."""


def render_page(results: Results, shown: Contents, csvs: Mapping[str, str], svgs: Mapping[str, str]) -> str:
    """The text of ``index.html``, from what a report shows.

    The CSV of each figure and table comes by its path in the report, without ending; the element of each figure by
    name, but for the one that the page draws itself.
    """
    folder = resources.files(__package__)
    css, js, template = ((folder / name).read_text("utf-8") for name in ("page.css", "page.js", "template.html.j2"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["tied"] = _tied
    documents = _fitting(results)
    shapes = sorted({layer.top_k for layer in results.trace.layers})
    return environment.from_string(template).render(
        css=Markup(css),
        css_hash=_hash(css),
        js=Markup(js),
        js_hash=_hash(js),
        version=moescope.__version__,
        model=_model_name(results),
        complete=results.trace.complete,
        facts=list(_facts(results)),
        lacks=list(_lacks(results)),
        warnings=[_tied(visible(warning)) for warning in _warnings(results)],
        provenance=list(_provenance(results)),
        claims=list(_claims(results.found["claims"], shown.tables["claims"])),
        claims_table=shown.tables["claims"],
        chapters=shown.chapters,
        svgs={name: Markup(svg) for name, svg in svgs.items()},
        drawn_by_page=DRAWN_BY_PAGE,
        sampled=_sampled(results),
        top_k=" or ".join(map(str, shapes)),
        embedded=_embedded(results, documents),
        routing=Markup(_safe_json(_routing(results, documents))),
        data_link=partial(_data_link, csvs),
    )


def _claims(claims: Sequence[Claim], table: Table) -> Iterator[dict[str, Any]]:
    """The claims, each with its rows of their table and, in words, the one that the answer hangs on."""
    for claim, section in zip(claims, table.sections, strict=True):
        words = {name: _tied(visible(getattr(claim, name))) for name in ("name", "statement", "answer", "evidence")}
        rows = [
            Row(_tied(row.label), tuple(cell._replace(value=_tied(cell.value)) for cell in row.cells))
            for row in section.rows
        ]
        lead = ""
        if rows:
            first = rows[claim.lead or 0]
            size, interval, null, predicted, q_value = (f"{cell.value}{cell.mark}" for cell in first.cells)
            known = "" if predicted == MISSING else f" ({predicted})"
            lead = f"{first.label}: {size} [{interval}] against {null}{known}, q {q_value}"
        yield {**words, "rows": rows, "lead": lead}


def _sampled(results: Results) -> str:
    """Of which documents the bits and the locality are; empty if of all."""
    explained = results.found["explain"]
    if explained is None or explained.attrs["sampled_fraction"] >= 1:
        return ""
    documents, tokens = (count(int(explained.attrs[name])) for name in ("documents", "tokens"))
    return (
        f"Bits explained, locality and vocabulary go over the same tokens several times, and so are of {documents} "
        f"documents with {tokens} tokens, drawn at random; all else is of the whole trace."
    )


def _tied(text: str) -> str:
    return text.replace(" %", "\u00a0%")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _safe_json(value: object) -> str:
    """JSON that can stand in a script element: nothing in it can end the element or a line."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data_link(csvs: Mapping[str, str], folder: str, name: str) -> str:
    """A link to the CSV of a figure or table: within the page if it is small, else to the file beside it."""
    text = csvs[f"{folder}/{name}"]
    if len(text) <= MOST_DATA_BYTES:
        return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"
    return f"{folder}/{name}.csv"


def _model_name(results: Results) -> str:
    """What to call the model: its name, or its architecture if the name is only that of a folder."""
    model = results.trace.header.model
    name = str(model.get("name") or "")
    if _SAYS_NOTHING.fullmatch(name):
        name = str(model.get("architecture") or "the model")
    return visible(name)


def _facts(results: Results) -> Iterator[tuple[str, str, str]]:
    """The numbers under the title: label, value, more."""
    trace = results.trace
    layers = trace.layers
    experts = sorted({layer.num_experts for layer in layers})
    top_k = sorted({layer.top_k for layer in layers})
    documents = count(trace.num_documents, "document")
    more = f"counted in {documents} or passes" if trace.header.counts_only else f"of {documents}"
    yield "Tokens", count(trace.num_tokens), more
    corpus = trace.header.corpus.get("name")
    yield "Domains", count(len(trace.domains)), f"in {visible(str(corpus))}" if corpus else ""
    yield "Layers with experts", count(len(layers)), f"{layers[0].layer} to {layers[-1].layer}"
    yield "Experts a layer", " or ".join(map(str, experts)), f"{' or '.join(map(str, top_k))} chosen a token"


def _warnings(results: Results) -> list[str]:
    """What an importer found odd in the trace's source."""
    warnings = (results.trace.summary or {}).get("warnings", [])
    return [str(warning) for warning in warnings] if isinstance(warnings, list) else []


def _lacks(results: Results) -> Iterator[str]:
    """What the trace cannot tell, and so what the page leaves out."""
    repeats = results.found["repeats"]
    if repeats is None:
        yield "The trace holds counts of assignments and no tokens: what follows is what counts can tell."
    elif not results.trace.header.token_ids:
        yield "The trace has no token ids: nothing can be said of words, and no text can be shown."
    if repeats is not None and "first" not in repeats["kind"].values:
        yield "The trace does not say which choice of a token is the first: all choices are taken together."


def _provenance(results: Results) -> Iterator[tuple[str, str]]:
    """Everything the trace's header says, flat."""
    header = results.trace.header
    yield "trace", visible(results.trace.path.name)
    for name in ("model", "tokenizer", "corpus", "run"):
        yield from _flat(name, getattr(header, name))
    yield "domains", ", ".join(map(visible, results.trace.domains))


def _flat(name: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name} {key}", inner)
    elif value not in (None, "", [], {}):
        yield visible(name.replace("_", " ")), visible(str(value))


# ------------------------------------------------------------------------------------------- the coloured text


def _fitting(results: Results) -> list[RoutedDocument]:
    """The documents that fit into the page, a document of every domain before the second of any; by domain again."""
    turns: Counter[str] = Counter()
    order = []
    for document in results.found["tokens"] or []:
        turns[document.domain] += 1
        order.append((turns[document.domain], document))
    layers = embedded_layers(results.trace, results.layers)
    a_token = 8 + sum(layer.top_k * (_id_bytes(layer) + bool(results.trace.header.weights)) * 4 / 3 for layer in layers)
    tokens_left = MOST_TEXT_BYTES / a_token
    kept = []
    for _, document in sorted(order, key=lambda turn: turn[0]):
        if len(document.token_ids) <= tokens_left:
            kept.append(document)
            tokens_left -= len(document.token_ids)
    return sorted(kept, key=lambda document: results.trace.domains.index(document.domain))


def _embedded(results: Results, documents: Sequence[RoutedDocument]) -> str:
    """What of the trace the page holds, in words."""
    words = (
        f"This page holds {count(len(documents))} of {count(results.trace.num_documents, 'document')} (up to their "
        "first 600 tokens), chosen for the words asked about"
    )
    layers = len(embedded_layers(results.trace, results.layers))
    if layers < len(results.trace.layers):
        words += f", in {layers} of {len(results.trace.layers)} layers"
    return f"{words}; the command “moescope text” shows any other."


def _routing(results: Results, documents: Sequence[RoutedDocument]) -> dict[str, Any]:
    """What the page's script draws from: texts once each, ids and weights as base64 of bytes."""
    places: dict[str, int] = {}
    layers = embedded_layers(results.trace, results.layers)
    shown = [
        {
            "number": document.number,
            "domain": visible(document.domain),
            "shown": len(document.token_ids),
            "total": document.num_tokens,
            "ids": document.token_ids.tolist(),
            "tokens": [places.setdefault(_displayed(text), len(places)) for text in document.texts],
            "experts": {layer.layer: _packed_ids(document.expert_ids[layer.layer], layer) for layer in layers},
        }
        for document in documents
    ]
    for document, entry in zip(documents, shown, strict=True):
        if document.gate_weights:
            entry["weights"] = {layer: _packed_weights(weights) for layer, weights in document.gate_weights.items()}
    most = max((layer.top_k for layer in results.trace.layers), default=1)
    first = example_documents(documents, results.words, 1)
    return {
        "layers": [
            {"layer": one.layer, "num_experts": one.num_experts, "top_k": one.top_k, "wide": _id_bytes(one) == 2}
            for one in layers
        ],
        "shown": [layer for layer in results.layers if layer in {e.layer for e in layers}][:3],
        "start": first[0].number if first else None,
        "choices": [f"{choice} choice" for choice in choice_labels(most)[1:]],
        "weights": bool(results.trace.header.weights),
        "palettes": {
            number: list(zip(expert_colours(number), expert_colours(number, dark=True), strict=True))
            for number in {layer.num_experts for layer in layers}
        },
        "no_expert": [NO_EXPERT_LIGHT, NO_EXPERT_DARK],
        "texts": list(places),
        "documents": shown,
    }


def _displayed(text: str) -> str:
    """A token as the page shows it: its line breaks and tabs kept behind their symbols."""
    if not text:
        return PART_OF_CHARACTER
    lines = ("⇥\t".join(map(visible, line.split("\t"))) for line in text.split("\n"))
    return f"{LINE_BREAK}\n".join(lines)


def _id_bytes(layer: Layer) -> int:
    return 1 if layer.num_ids < 255 else 2


def _packed_ids(ids: NDArray[np.integer[Any]], layer: Layer) -> str:
    """Ids as base64 of little-endian bytes; the largest number stands for a dropped assignment."""
    dtype = np.dtype("u1") if _id_bytes(layer) == 1 else np.dtype("<u2")
    signed = ids.astype(np.int64)
    none = np.iinfo(dtype).max
    return base64.b64encode(np.where(signed < 0, none, signed).astype(dtype).tobytes()).decode()


def _packed_weights(weights: NDArray[np.floating[Any]]) -> tuple[float, str]:
    """Weights in 255 steps of the largest one."""
    known = np.nan_to_num(weights.astype(float)).clip(min=0)
    largest = float(known.max(initial=0)) or 1.0
    return round(largest, 6), base64.b64encode((known / largest * 255).round().astype(np.uint8).tobytes()).decode()
