"""Saturation over training: how early a router settles on the experts it will choose in the end.

The unit is the token; a checkpoint is compared with the last one on the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import xarray as xr

from moescope.errors import TracesUnlike
from moescope.measures.compare import LEAST_SHARE, agreement
from moescope.measures.schema import by_domain, with_total
from moescope.tallying.matching import same_corpus
from moescope.tallying.pair_tally import common_layers, tally_pair
from moescope.trace import Trace, as_trace


def saturation(
    traces: Sequence[Trace | Path | str],
    steps: Sequence[float] | None = None,
    layers: Iterable[int] | None = None,
    *,
    threads: int | None = None,
) -> xr.Dataset:
    """Agreement of each checkpoint with the last.

    Args:
        traces: One trace a checkpoint over the same tokens, in the order of training; at least two.
        steps: Training steps, tokens or per cent of each trace, ascending; None for 1, 2, 3 …
        layers: Layers to compare, or None for all.
        threads: Parts counted at a time; None for the number of processors.
    Returns:
        The variables of `Comparison.agreement` with a dim (step) before them, the last checkpoint left out; coordinates
        `checkpoint`, the name of the trace of each step, and, per step and domain, `tokens` and `documents` compared.
        Attributes: `reference`, the last trace, and `reference_step`.
    Raises:
        TracesUnlike: A trace does not hold the tokens or the layers of the last.
        NoSuchLayer: A layer was not recorded.
        NotRecorded: A trace holds counts only.
        ValueError: There are fewer than two traces, or `steps` do not ascend or are as many as the traces.
    Source:
        OLMoE (arXiv 2409.02060), router saturation; the nulls and intervals are ours.
    """
    if len(traces) < 2:
        raise ValueError(f"saturation needs at least two checkpoints, not {len(traces)}")
    places = list(range(1, len(traces) + 1)) if steps is None else list(steps)
    if len(places) != len(traces) or any(a >= b for a, b in pairwise(places)):
        raise ValueError(f"steps must ascend, one a trace ({len(traces)}), not {places}")
    layers = None if layers is None else sorted(set(layers))
    *earlier, last = [as_trace(trace) for trace in traces]
    compared = []
    for trace in earlier:
        _need_alike(trace, last, layers)
        counted = tally_pair(trace, last, layers, threads=threads)
        if counted.matching.share < LEAST_SHARE:
            matched = counted.matching
            raise TracesUnlike(
                trace.path,
                f"holds {matched.tokens_a:,} tokens, of which {matched.tokens:,} are tokens of {last.path.name}, "
                "expected at least half",
                "record every checkpoint on the same corpus with the same sampling and window",
            )
        compared.append(agreement(counted).reset_coords(["tokens", "documents"]))
    named = [by_domain(data)["domain"].values.tolist() for data in compared]
    labels = with_total(list(dict.fromkeys(name for names in named for name in names)))
    by_step = [
        data.drop_vars(["agreement_uniform", "total"]).assign_coords(domain=[labels[0], *names]).reindex(domain=labels)
        for data, names in zip(compared, named, strict=True)
    ]
    result = xr.concat(by_step, "step", coords="minimal", compat="equals", join="exact")
    return (
        result.assign(agreement_uniform=compared[-1]["agreement_uniform"])
        .assign_coords(
            step=np.array(places[:-1]),
            checkpoint=("step", np.array([trace.path.name for trace in earlier], object)),
            total=("domain", np.array(labels) == labels[0]),
            tokens=result["tokens"],
            documents=result["documents"],
        )
        .assign_attrs(reference=last.path.name, reference_step=places[-1])
    )


def _need_alike(trace: Trace, last: Trace, layers: list[int] | None) -> None:
    """Refuse a trace that cannot be a checkpoint of the same model over the same corpus.

    Raises:
        TracesUnlike: Its layers are not those of the last, or nothing tells that the tokens are.
    """
    hint = "saturation compares checkpoints of one model; `moescope compare` takes any two traces"
    mine, theirs = ([layer.layer for layer in of_trace.select_layers(layers)] for of_trace in (trace, last))
    if mine != theirs or len(common_layers(trace, last)) < len(last.layers):
        raise TracesUnlike(trace.path, f"its layers are not those of {last.path.name}", hint)
    for one in (trace, last):
        one.need_tokens()
    if not (trace.header.token_ids and last.header.token_ids) and not same_corpus(trace, last):
        raise TracesUnlike(
            trace.path, f"nothing tells whether its tokens are those of {last.path.name}: there are no token ids", hint
        )
