"""Made-up traces with the look of real ones: 8 experts top-2 as Mixtral, 128 experts top-8; and their results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from moescope.measures.schema import FRACTION, described, estimate
from moescope.trace import Header, Layer, Part, Trace, TraceWriter, Vocabulary, open_trace

PILE = (
    "ArXiv",
    "DM Mathematics",
    "Github",
    "Gutenberg (PG-19)",
    "PhilPapers",
    "PubMed Abstracts",
    "StackExchange",
    "Wikipedia (en)",
)
HOSTILE = (
    "</script>",
    "<img src=x onerror=alert(1)>",
    "\u202eevil\u202c",
    "\x1b[31mred",
    "\x00",
    "\u2028",
    "]]>",
    "<!--",
)
CODE = "class Expert(nn.Module):\n    def forward(self, x):\n        return self.w2(self.act(self.w1(x)))\n"
QUESTION = "Question: Solve -42*r + 27*c = -1167 and 130*r + 4*c = 372 for r.\nAnswer: 4\n"
PROSE = "A model airplane flies slower when flying into the wind and faster with wind at its back. "


def write_trace(
    path: Path,
    *,
    num_experts: int = 8,
    top_k: int = 2,
    layers: tuple[int, ...] = (0, 3, 7, 15, 23, 31),
    domains: tuple[str, ...] = PILE,
    documents_per_domain: int = 4,
    tokens: int = 120,
    hostile: bool = False,
    dead: int = 0,
) -> Trace:
    """A trace whose experts depend on the token, the domain and the token before, more so in deeper layers."""
    rng = np.random.default_rng(0)
    texts = {"DM Mathematics": QUESTION, "Github": CODE}
    pieces = [bytes([byte]) for byte in range(256)]
    known: dict[bytes, int] = {piece: at for at, piece in enumerate(pieces)}

    def token_ids(text: str) -> list[int]:
        ids = []
        for word in text.replace("(", " (").replace("    ", "\t").split(" "):
            piece = (" " + word).replace("\t", "    ").encode()
            known.setdefault(piece, len(known))
            ids.append(known[piece])
        return ids

    shape = tuple(Layer(layer, num_experts, top_k) for layer in layers)
    document_ids, domain_codes, ids = [], [], []
    for number in range(len(domains) * documents_per_domain):
        domain = number % len(domains)
        text = texts.get(domains[domain], PROSE) * 40
        length = int(rng.integers(tokens // 2, tokens + 1))
        if hostile and number % 2 == 0:  # each a token of its own
            ids += [known.setdefault(piece.encode(), len(known)) for piece in HOSTILE]
        ids += token_ids(text)[:length]
        domain_codes += [domain] * (len(ids) - len(domain_codes))
        document_ids += [number] * (len(ids) - len(document_ids))
    token_id, code, document = np.array(ids), np.array(domain_codes), np.array(document_ids)
    position = np.concatenate([np.arange(n) for n in np.bincount(document)])
    live = num_experts - dead
    expert_ids, gate_weights = {}, {}
    for depth, layer in enumerate(layers):
        scores = rng.gumbel(size=(len(ids), live))
        scores += rng.normal(size=(len(known), live))[token_id] * 0.8
        scores += rng.normal(size=(len(domains), live))[code] * (0.1 + 0.3 * (depth in (0, len(layers) - 1)))
        for row in range(1, len(ids)):
            if position[row]:
                scores[row, scores[row - 1].argmax()] += 2.0 * depth / len(layers)
        order = np.argsort(-scores, axis=1)[:, :top_k]
        chosen = np.exp(np.take_along_axis(scores, order, 1))
        expert_ids[layer] = order
        gate_weights[layer] = (chosen / chosen.sum(axis=1, keepdims=True)).astype(np.float32)
    part = Part(
        document.astype(np.uint32),
        code,
        domains,
        np.zeros(len(ids), np.uint32),
        position.astype(np.uint32),
        token_id.astype(np.uint32),
        expert_ids,
        gate_weights,
    )
    model = {"name": "made-up <b>8x7B</b>" if hostile else "made-up-8x7B"}
    header = Header(shape, weights=True, model=model, corpus={"name": "made-up.jsonl"})
    with TraceWriter(path, header, Vocabulary.from_pieces(list(known))) as writer:
        writer.write(part, {})
        writer.finish({"tokens": len(ids)})
    return open_trace(path)


@pytest.fixture(scope="session")
def make_trace() -> Callable[..., Trace]:
    return write_trace


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return write_trace(tmp_path_factory.mktemp("mixtral") / "pile.moe")


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return write_trace(
        tmp_path_factory.mktemp("wide") / "wide.moe",
        num_experts=128,
        top_k=8,
        layers=(0, 11, 23),
        domains=("Code", "Prose & more", "DM Mathematics"),
        dead=3,
    )


@pytest.fixture
def tiny_repeats() -> xr.Dataset:
    """Two domains, one of the paper's; three layers; every value chosen by hand."""
    dims = ("domain", "layer", "kind")
    rate = np.array(
        [
            [[0.140, 0.465, 0.3], [0.279, 0.623, 0.4], [0.227, 0.529, 0.3]],
            [[0.0, 0.0001, 0.2], [0.99999, 1.0, 0.5], [np.nan, np.nan, np.nan]],
        ]
    )
    return xr.Dataset(
        {
            **estimate(
                "rate",
                dims,
                "repeats",
                FRACTION,
                value=rate,
                low=np.clip(rate - 0.008, 0, 1),
                high=np.clip(rate + 0.009, 0, 1),
                error=np.full(rate.shape, 0.004),
                null=np.full(rate.shape, 0.13),
            ),
            "rate_uniform": described(np.tile([0.125, 13 / 28, 0.25], (3, 1)), ("layer", "kind"), "uniform", FRACTION),
            "pairs": ("domain", [1200, 40]),
        },
        {
            "domain": ["Gutenberg (PG-19)", "50%_off & <b>\x1b"],
            "layer": [0, 3, 7],
            "kind": ["first", "any", "first_in_next"],
            "num_experts": ("layer", [8, 8, 8]),
            "top_k": ("layer", [2, 2, 2]),
            "documents": ("domain", [12, 3]),
            "tokens": ("domain", [1212, 43]),
        },
    )


@pytest.fixture
def tiny_shares() -> xr.Dataset:
    """A layer of three experts and a null expert; expert 2 is dead in the first domain and rare in the second."""
    dims = ("domain", "layer", "choice", "expert")
    share = np.array([[0.5, 0.45, 0.0, 0.05], [0.3, 0.6996, 0.0004, 0.0]]).reshape(2, 1, 1, 4)
    share = np.repeat(share, 2, axis=2)
    return xr.Dataset(
        {
            **estimate(
                "share",
                dims,
                "share",
                FRACTION,
                value=share,
                low=np.clip(share - 0.02, 0, 1),
                high=np.clip(share + 0.03, 0, 1),
            ),
            "share_of_tokens": described(share, dims, "share of tokens", FRACTION),
            "share_null": described([1 / 3], ("layer",), "uniform", FRACTION),
        },
        {
            "domain": ["A", "B"],
            "layer": [5],
            "choice": ["all", "first"],
            "expert": [0, 1, 2, 3],
            "num_experts": ("layer", [3]),
            "num_ids": ("layer", [4]),
            "top_k": ("layer", [1]),
            "documents": ("domain", [2, 2]),
            "tokens": ("domain", [100, 100]),
        },
    )
