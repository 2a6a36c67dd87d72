"""The loads of the experts of a trace, as JSON: what to keep in memory, or to place first.

    {"format": "moescope-hot-experts", "version": 1, "tokens": 1200, "layers": [{"layer": 0, "num_experts": 8,
     "top_k": 2, "load": [310, ...], "order": [5, 0, ...]}], "order": [[0, 5], [7, 2], ...], ...}

``load`` is in assignments, by expert. ``order`` lists the experts of a layer, or (layer, expert) of all of them by
their share of the layer's load, the most loaded first; ties by the smaller number.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moescope.trace import Layer, Trace

FORMAT = "moescope-hot-experts"


def write(trace: Trace, layers: tuple[Layer, ...], path: Path, _: str) -> None:
    """Write the loads of the layers of a trace, and the orders, to a file."""
    loads = trace.expert_loads(layers)
    shares = {number: (load / max(1, load.sum())).tolist() for number, load in loads.items()}
    ranking = sorted((-value, number, expert) for number in shares for expert, value in enumerate(shares[number]))
    document = {
        "format": FORMAT,
        "version": 1,
        "tokens": trace.num_tokens,
        "complete": trace.complete,
        "layers": [
            {
                "layer": layer.layer,
                "num_experts": layer.num_experts,
                "top_k": layer.top_k,
                "load": loads[layer.layer].tolist(),
                "order": np.argsort(-loads[layer.layer], kind="stable").tolist(),
            }
            for layer in layers
        ],
        "order": [[number, expert] for _, number, expert in ranking],
        "model": trace.header.model,
        "corpus": trace.header.corpus,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
