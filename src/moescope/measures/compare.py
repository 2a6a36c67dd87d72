"""Two traces compared: how often they send a token to the same experts, which shares changed, and for which tokens.

The unit is the token that both traces hold in the same context. Agreement is the part of its top-k experts that both
chose (router saturation of OLMoE); beside it stands what the popularity of the experts alone would give. Where the
traces do not hold the same tokens, or expert ids cannot mean the same in both, only distributions are compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from scipy import stats

from moescope.measures import schema, statistics
from moescope.measures.divergence import MEANINGS, divergence_of_samples, js_divergence
from moescope.measures.schema import DIFFERENCE, FRACTION
from moescope.measures.shares import shares
from moescope.measures.statistics import Numbers
from moescope.tallying import tally
from moescope.tallying.matching import Matching, same_corpus
from moescope.tallying.pair_tally import PairTally, common_layers, tally_pair
from moescope.trace import Trace, Vocabulary, as_trace
from moescope.trace.cover import covered

OLMOE = "OLMoE (arXiv 2409.02060), router saturation"
KINDS = ("set", "first")
_LOADS = ("loads", "first")
"""What each of `KINDS` is called among the loads of a `PairTally`."""

LEAST_SHARE = 0.5
"""Of the tokens of the trace that has fewer, the part that must be in the other to compare token by token."""

_OWN_TO_A_TRACE = {"watch", "started"}
"""Keys of a header that no two watched traces share."""

LEAST_SEEN = 10
"""Occurrences below which a token id is not judged."""


@dataclass(frozen=True)
class Comparison:
    """What two traces, A and B, have in common and where they differ.

    Attributes:
        names: The traces.
        matching: Which tokens are the same; None if a trace holds counts only.
        agreement: Dims (domain, layer, kind); the first domain is all of them together. `kind` is "set", the part of
            the top-k experts that both chose, or "first", whether the first choice is the same:

            * `agreement`, `agreement_low`, `agreement_high`: the mean over matched tokens, with its 95 % interval
              clustered by document;
            * `agreement_null`: the same if B had been dealt out to the tokens of the domain at random;
            * `agreement_uniform` (layer, kind): the same if both drew their experts uniformly, k/E and 1/E;
            * `kappa`, `kappa_low`, `kappa_high`: (agreement - null) / (1 - null), with the null taken as known.

            None if the traces are not compared token by token.
        changes: Dims (domain, layer, expert): `share_a`, `share_b` of all assignments that the tokens could make;
            `change` = B - A, `change_low`, `change_high`; `change_p`, `change_q` of no change, paired by document, the
            false discovery rate controlled over layers and experts (and over domains, apart from all of them together).
            None as above.
        weights: Dims (domain, layer), by the gate weights of A: `kept`, `kept_low`, `kept_high`, the part of a token's
            gate weight that lies on experts that B chose, too; `margin_same`, `margin_differs`, the mean of
            (w0 - w1) / (w0 + w1) of the first two weights where the first choice is the same and where it differs. None
            as above, and where A has no gate weights.
        tokens: Dims (token_id), those seen at least 10 times in at least two documents, by the upper end
            of the interval: `agreement`, `agreement_low`, `agreement_high` of sets over all layers compared, `seen`,
            and the coordinates `text` and `documents`. None as above, and where token ids are not known.
        distances: Dims (domain, layer), of the domains in both: `jsd` between the shares of A and B in bits, with
            `jsd_null`, what sampling documents alone would give if they were equal, `jsd_low`, `jsd_high` of the true
            divergence, `jsd_p` and `jsd_q`; NaN where expert ids cannot mean the same. `evenness_a`, `evenness_b`:
            entropy of the shares over that of equal ones. `documents` are those of both. None if the traces are
            compared token by token.
        remarks: What a reader must know before believing a number.
    """

    names: tuple[str, str]
    matching: Matching | None
    agreement: xr.Dataset | None
    changes: xr.Dataset | None
    weights: xr.Dataset | None
    tokens: xr.Dataset | None
    distances: xr.Dataset | None
    remarks: tuple[str, ...]


def compare(
    a: Trace | Path | str,
    b: Trace | Path | str,
    layers: Iterable[int] | None = None,
    *,
    threads: int | None = None,
) -> Comparison:
    """Compare two traces: token by token if they hold the same tokens, otherwise their distributions.

    Args:
        a: The first trace, or its folder.
        b: The second trace: of another checkpoint, dtype or quantisation, or of another model or corpus.
        layers: Layers to compare, or None for all that both have with the same experts.
        threads: Parts counted at a time; None for the number of processors.
    Returns:
        The comparison; `remarks` says what was matched, what was not, and why.
    Raises:
        NoSuchLayer: A layer was not recorded in both.
        TraceDamaged: A page fails its checksum.
        ValueError: A layer asked for has other experts or another top-k in the second trace.
    Source:
        OLMoE, section 5.1; the nulls, intervals and tests are ours. Kappa is Cohen's (1960) for "first".
    """
    a, b = as_trace(a), as_trace(b)
    layers = None if layers is None else sorted(set(layers))
    names = (a.path.name, b.path.name)
    shared_layers = common_layers(a, b, layers)
    reason, remarks = _same_experts(a, b)
    if not shared_layers:
        reason = "no layer has the same number of experts and the same top-k in both"
    counted = None
    if a.header.counts_only or b.header.counts_only:
        reason = reason or "a trace holds counts and no tokens"
    elif shared_layers and not (a.header.token_ids and b.header.token_ids) and not same_corpus(a, b):
        reason = reason or "a trace has no token ids, and the headers do not say that the corpus is the same"
    elif shared_layers:
        a, b = (covered(trace, trace.select_layers(layer.layer for layer in shared_layers)) for trace in (a, b))
        counted = tally_pair(a, b, layers, weights=a.header.weights, threads=threads)
        if counted.matching.share < LEAST_SHARE:
            reason = reason or "fewer than half of the tokens are the same"
    matching = counted.matching if counted is not None else None
    remarks += _describe_matching(matching)
    remarks += _differing_headers(a, b)
    skipped = sorted({layer.layer for trace in (a, b) for layer in trace.layers} - {a.layer for a in shared_layers})
    if skipped and layers is None:
        remarks.append(f"not compared: layers {', '.join(map(str, skipped))}, which are not alike in both traces")
    if counted is None or reason is not None:
        remarks.insert(0, f"Only distributions are compared, not tokens: {reason}.")
        return Comparison(names, matching, None, None, None, None, _distances(a, b, layers), tuple(remarks))
    return Comparison(
        names,
        matching,
        agreement(counted),
        changes(counted),
        shared_weight(counted) if a.header.weights else None,
        None if counted.by_token is None else lowest_agreement(counted, a.vocabulary),
        None,
        tuple(remarks),
    )


def agreement(counted: PairTally) -> xr.Dataset:
    """How often two traces agree: see `Comparison.agreement`."""
    data = _with_total(counted.data)
    top_k, ranked = data["top_k"].values, data["ranked"].values
    most = np.stack([top_k, np.ones_like(top_k)], axis=-1)  # what a token can agree in, by kind
    exists = np.stack([np.ones_like(ranked), ranked], axis=-1)

    def by_kind(ending: str) -> Numbers:
        return np.stack([data[f"{sums}{ending}"].values for sums in ("shared", "first")], axis=-1)

    n = data["tokens"].values[:, None, None].astype(float)
    agreed = statistics.proportion(
        by_kind(""),
        n,
        by_kind("_squared"),
        by_kind("_by_tokens"),
        data["tokens_squared"].values[:, None, None],
        data["documents"].values[:, None, None],
        most=most,
        exists=exists,
    )
    met = [(data[f"{loads}_a"].values.astype(float) * data[f"{loads}_b"].values).sum(axis=2) for loads in _LOADS]
    null = np.where(exists, statistics.ratio(np.stack(met, axis=-1), n * n * most), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        value, low, high = (
            np.where(null < 1, (end - null) / (1 - null), np.nan)
            for end in (agreed["value"], agreed["low"], agreed["high"])
        )
    dims = ("domain", "layer", "kind")
    long_name = "chosen by both, of the choices of a token"
    uniform = most / data["num_ids"].values[:, None]
    meanings = {"null": "agreement if B were dealt to the tokens at random"}
    kappa = "agreement beyond popularity, of what there was to gain"
    return xr.Dataset(
        schema.estimate("agreement", dims, long_name, FRACTION, OLMOE, meanings=meanings, **agreed, null=null)
        | {"agreement_uniform": schema.described(uniform, dims[1:], "k/E", FRACTION)}
        | schema.estimate("kappa", dims, kappa, "1", "Cohen 1960", value=value, low=low, high=high),
        {"kind": list(KINDS)} | _coordinates(data),
    )


def changes(counted: PairTally) -> xr.Dataset:
    """Which shares changed, paired by document: see `Comparison.changes`."""
    data = _with_total(counted.data)
    documents = data["documents"].values[:, None, None]
    n, nn = (data[name].values[:, None, None].astype(float) for name in ("tokens", "tokens_squared"))
    top_k = data["top_k"].values[None, :, None]
    a, b = (data[f"loads_{side}"].values for side in "ab")
    change = statistics.ratio(b - a, n * top_k)
    squares, products = data["change_squared"].values, data["change_by_tokens"].values
    error = statistics.ratio_standard_error(b - a, n, squares, products, nn, documents) / top_k
    half = statistics.student_t(documents) * error
    with np.errstate(invalid="ignore", divide="ignore"):
        p_value = 2 * stats.t.sf(np.abs(change) / error, np.maximum(documents - 1, 1))
    # Without any spread between documents there is nothing to judge by, but no change in any of them is no change.
    p_value = np.where(error > 0, p_value, np.where((squares == 0) & (documents > 1), 1.0, np.nan))
    exists = data["expert"] < data["num_ids"]
    p_value = np.where(exists.transpose("layer", "expert"), p_value, np.nan)
    parts = (p_value[:1], p_value[1:])  # all domains together apart from each of them
    dims = ("domain", "layer", "expert")
    result = xr.Dataset(
        {
            "share_a": schema.described(statistics.ratio(a, n * top_k), dims, "share in the first trace", FRACTION),
            "share_b": schema.described(statistics.ratio(b, n * top_k), dims, "share in the second trace", FRACTION),
        }
        | schema.estimate(
            "change",
            dims,
            "share in the second trace less that in the first",
            DIFFERENCE,
            meanings={"p": "p-value of no change: t test of a ratio, paired by document"},
            value=change,
            low=change - half,
            high=change + half,
            p=p_value,
            q=np.concatenate([statistics.false_discovery_rate(part) for part in parts]),
        ),
        {"expert": data["expert"]} | _coordinates(data),
    )
    return result.where(exists)


def shared_weight(counted: PairTally) -> xr.Dataset:
    """How much gate weight the shared experts carry, and how close the first choices were: see `Comparison.weights`."""
    data = _with_total(counted.data)
    y, n, yy, yn, nn = (
        data[name].values for name in ("kept", "weighed", "kept_squared", "kept_by_weighed", "weighed_squared")
    )
    kept = statistics.proportion(y, n, yy, yn, nn, data["documents"].values[:, None])
    dims = ("domain", "layer")
    return xr.Dataset(
        schema.estimate("kept", dims, "gate weight of A on experts that B chose, too", FRACTION, **kept)
        | {
            f"margin_{side}": schema.described(
                statistics.ratio(data[f"margin_{side}"], data[f"num_{side}"]),
                dims,
                f"mean margin in A where the first choice {words}",
                "1",
            )
            for side, words in (("same", "is the same"), ("differs", "differs"))
        },
        _coordinates(data),
    )


def lowest_agreement(counted: PairTally, vocabulary: Vocabulary) -> xr.Dataset:
    """Token ids, those significantly lowest in agreement first: see `Comparison.tokens`.

    They are ordered by the upper end of the interval: ordered by the agreement itself, the first would be whichever
    rare id chance was hardest on.
    """
    assert counted.by_token is not None
    known = counted.by_token
    known = known.isel(token_id=(known["seen"].values >= LEAST_SEEN) & (known["documents"].values >= 2))
    choices = float(counted.data["top_k"].values.sum())  # of a token in all layers
    sums = (
        known[name].values.astype(float)
        for name in ("shared", "seen", "shared_squared", "shared_by_seen", "seen_squared", "documents")
    )
    agreed = statistics.proportion(*sums, most=choices)
    value = agreed["value"]
    # A few documents that happen to agree exactly say nothing on the spread between documents.
    certain = (agreed["error"] > 0) | (value == 0) | (value == 1)
    low, high = (np.where(certain, end, np.nan) for end in (agreed["low"], agreed["high"]))
    order = np.lexsort([known["token_id"].values, value, high])
    text = [vocabulary.piece(token_id).decode(errors="replace") for token_id in known["token_id"].values.tolist()]
    dims, long_name = ("token_id",), "chosen by both, of the choices in all layers"
    result = xr.Dataset(
        schema.estimate("agreement", dims, long_name, FRACTION, OLMOE, value=value, low=low, high=high)
        | {"seen": schema.described(known["seen"].values, dims, "matched tokens with this id", "tokens")},
        {
            "token_id": known["token_id"],
            "text": ("token_id", np.array(text, object)),
            "documents": ("token_id", known["documents"].values, {"units": "documents"}),
        },
    )
    return result.isel(token_id=order)


def _with_total(data: xr.Dataset) -> xr.Dataset:
    """The sums with those of all domains together before them."""
    labels = schema.with_total(data["domain"].values.tolist())
    together = data.sum("domain", keepdims=True).assign_coords(domain=labels[:1])
    data = xr.concat([together, data], "domain", data_vars="minimal", coords="minimal", join="outer", compat="equals")
    coordinates = schema.total_coordinates(labels[1:], data["documents"].values[1:])
    return data.assign_coords(total=coordinates["total"])


def _coordinates(data: xr.Dataset) -> dict[str, xr.DataArray]:
    """What every result of sums by domain and layer stands beside."""
    names = ("domain", "total", "documents", "tokens", "layer", "num_experts", "num_ids", "top_k")
    return {name: data[name] for name in names}


def _same_experts(a: Trace, b: Trace) -> tuple[str | None, list[str]]:
    """Why expert ids cannot mean the same in both traces, or None; and what the headers leave open."""
    mine, theirs = a.header.model, b.header.model
    for name in ("architecture", "family", "num_layers"):
        if None not in (values := [mine.get(name), theirs.get(name)]) and values[0] != values[1]:
            return f"the models differ in {name}, so expert ids have no common meaning", []
    fingerprints = [mine.get("fingerprint"), theirs.get("fingerprint")]
    if None not in fingerprints and fingerprints[0] == fingerprints[1]:
        return None, ["Both traces are of the same weights."]
    return None, [
        "The weights differ or are not known. Expert ids have a common meaning only in checkpoints, fine-tunings and "
        "quantisations of one model; the headers cannot tell those from two models of one shape."
    ]


def _differing_headers(a: Trace, b: Trace) -> list[str]:
    """Every key of model, tokenizer and run that both headers have, with other values."""
    differences = []
    for section in ("model", "tokenizer", "run"):
        mine, theirs = getattr(a.header, section), getattr(b.header, section)
        for key in mine.keys() & theirs.keys() - _OWN_TO_A_TRACE:
            if None not in (pair := (mine[key], theirs[key])) and pair[0] != pair[1]:
                values = ", ".join(value if len(value := str(own)) <= 40 else f"{value[:12]}…" for own in pair)
                differences.append(f"{section}.{key} ({values})")
    return [f"The headers differ in {', '.join(sorted(differences))}."] if differences else []


def _describe_matching(common: Matching | None) -> list[str]:
    """What was matched and what was not, in sentences."""
    if common is None:
        return []
    how = "document, sequence, position and token id" if common.by_token_id else "place in the same corpus"
    lines = [
        f"Matched by {how}: {common.tokens:,} tokens of {common.documents:,} documents; "
        f"A has {common.tokens_a:,} of {common.documents_a:,}, B has {common.tokens_b:,} of {common.documents_b:,}."
    ]
    if common.documents_differing:
        lines.append(
            f"In {common.documents_differing:,} documents of both, token ids differ; from there on their tokens are "
            "left out."
        )
    if common.documents_relabelled:
        lines.append(f"{common.documents_relabelled:,} documents have another domain in B; that of A is used.")
    return lines


def _distances(a: Trace, b: Trace, layers: list[int] | None) -> xr.Dataset:
    """Distances of the distributions: see `Comparison.distances`."""
    own = {layer.layer: layer for layer in a.select_layers(layers)}
    chosen = [number for number in own if layers is not None or number in {layer.layer for layer in b.layers}]
    sides = [shares(tally(trace, chosen)).sel(choice="all") for trace in (a, b)] if chosen else []
    domains = [name for name in a.domains if name in b.domains]
    alike = {layer.layer for layer in common_layers(a, b)}
    comparable = _same_experts(a, b)[0] is None
    size = (len(domains), len(chosen))
    jsd, null, p_value, low, high = (np.full(size, np.nan) for _ in range(5))
    evenness = np.full((2, *size), np.nan)
    for i, domain in enumerate(domains):
        for j, layer in enumerate(chosen):
            cells = [side.sel(domain=domain, layer=layer) for side in sides]
            p = [values["share"].values[: int(values["num_ids"])] for values in cells]
            evenness[:, i, j] = [_evenness(values) for values in p]
            if not (comparable and layer in alike and all(np.isfinite(values).all() for values in p)):
                continue
            jsd[i, j] = js_divergence(*p)
            variance = np.stack([values["share_error"].values[: len(p[0])] ** 2 for values in cells])
            degrees = np.array([float(values["documents"]) - 1 for values in cells])
            if degrees.min() >= 1:
                null[i, j], p_value[i, j], low[i, j], high[i, j] = divergence_of_samples(
                    float(jsd[i, j]), (p[0] + p[1]) / 2, variance, degrees
                )
    dims = ("domain", "layer")
    documents = sum((side["documents"].sel(domain=domains).values for side in sides), np.zeros(len(domains), np.int64))
    return xr.Dataset(
        schema.estimate(
            "jsd",
            dims,
            "Jensen-Shannon divergence between the shares",
            "bits",
            "Lin 1991",
            meanings=MEANINGS,
            value=jsd,
            low=low,
            high=high,
            null=null,
            p=p_value,
            q=statistics.false_discovery_rate(p_value),
        )
        | {
            "evenness_a": schema.described(evenness[0], dims, "entropy of the shares over that of equal ones", "1"),
            "evenness_b": schema.described(evenness[1], dims, "the same in the second trace", "1"),
        },
        {"domain": domains, "documents": ("domain", documents, {"units": "documents of both traces"})}
        | schema.layer_coordinates([own[number] for number in chosen]),
    )


def _evenness(p: Numbers) -> float:
    if not np.isfinite(p).all() or len(p) < 2:
        return float("nan")
    return float(stats.entropy(p) / np.log(len(p)))
