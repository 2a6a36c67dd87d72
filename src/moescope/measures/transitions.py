"""Transitions: what a token's expert at one layer says about its expert at the next, and how many paths tokens take.

The unit is the token and its first choices, or all pairs of an assignment at one layer and one at the next. "The next"
is the next layer measured. Information is in bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import special, stats

from moescope.errors import NotRecorded
from moescope.measures import groups, statistics
from moescope.measures.lifts import TABLES, definitions, lifts, padded
from moescope.measures.schema import FRACTION, labelled, layer_coordinates
from moescope.measures.statistics import Numbers
from moescope.tallying import Source
from moescope.tallying.counted import counted
from moescope.tallying.counter import CountOptions
from moescope.tallying.joint import Choice, TransitionCounter, Transitions
from moescope.tallying.joint_kernels import draw_paths

THIN = 5
"""Independent tokens a cell below which no first-order correction of mutual information holds."""

NULL_DRAWS = 16  # the error of their mean is a quarter of their spread

ROUTINGS = ("trace", "markov chain", "independent layers")
STEPS_DRAWN = 2**24
"""Choices drawn, at most, for each null of the paths; at least three sets of paths are."""

PATHS = {
    "distinct": ("different paths", "paths"),
    "half": ("paths that carry half of the tokens", "paths"),
    "effective": ("one over the probability that two tokens share a path", "paths"),
    "once": ("part of the tokens whose path no other token takes", FRACTION),
}


def transitions(
    trace: Source,
    layers: Iterable[int] | None = None,
    *,
    choice: Choice = "first",
    threads: int | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """How the choice of experts goes on from layer to layer.

    Args:
        trace: The trace or its folder; or what was counted of it (`moescope.count`).
        layers: Layers of the trace to measure, or None for all; each is paired with the one before it among them.
            Counts have theirs.
        choice: "first", the first choices; "all", all pairs of an assignment here and one there.
        threads: Parts counted at a time; None for the number of processors.
        seed: Of the paths drawn for the nulls.
    Returns:
        `layer` is the later of the two, `layer_before` the earlier. By (layer, expert, next):

        * `probability`: P(next at the layer | expert at the one before);
        * `joint`: of all tokens, those with both; `joint_null`: the same if the layers were independent;
        * `lift`: joint / joint_null; `lift_low`, `lift_high`: its 95 % interval over documents, on the scale of
          logarithms, NaN where less than one token is expected to make it, or fewer than ten only one of its two steps,
          or neither;
        * `lift_p`: that it is 1, NaN where fewer than ten tokens are expected to make it, or only one of its two steps,
          or neither; `lift_q`, the same with the false discovery rate controlled over all transitions.

        By (layer): `information`, the mutual information of the two choices, bits, its bias removed by a jackknife over
        groups of documents (where tokens are few for the number of cells: less `information_null`, which is the most
        that the bias can be), with `information_low` and `information_high`; `information_null`, what the count would
        show of independent layers; `plug_in`, as counted; `miller_madow`, with the correction for independent tokens;
        `entropy`, of the choice at the later layer; `tokens`.

        By (routing), for first choices only, of a sample of `path_tokens` tokens (all, if they are at most 2^19) and of
        as many drawn from a Markov chain with these transitions, and from independent layers: `distinct`, paths (first
        choices at all the layers); `half`, the paths that carry half of the tokens; `effective`, one over the
        probability that two tokens share a path; `once`, the part of the tokens whose path no other takes. `half_low`,
        `half_high` and so on: lowest and highest of several draws.
    Raises:
        NoSuchLayer: A layer was not recorded.
        NotRecorded: The trace holds counts only, has one layer, or has no order of choices and `choice` is "first".
    Source:
        Miller 1955 and Madow (the correction); jackknife: Busing, Meijer and van der Leeden 1999; the rest is ours.
    """
    if choice not in ("first", "all"):
        raise ValueError(f"choice is 'first' or 'all', not {choice!r}")
    options = CountOptions(choice=choice)
    total = counted(trace, TransitionCounter, layers=layers, options=options, threads=threads)
    total.need_tokens()
    if choice == "first" and not all(layer.ranked for layer in total.layers):
        hint = "ask for all assignments instead: --choice all"
        raise NotRecorded(total.path, "does not say which of a token's choices is the first", hint)
    counts = total[TransitionCounter]
    if counts.choice != choice:
        raise NotRecorded(
            total.path, f"the counts hold transitions of {counts.choice} choices", "give the trace itself"
        )
    rng = np.random.default_rng(seed)
    rows = [_of_layer(moves_GEF, rng) for moves_GEF in counts.moves.values()]
    tables = {name: padded([row[name] for row in rows]) for name in ("probability", *TABLES)}
    tables["lift_q"] = statistics.false_discovery_rate(tables["lift_p"])
    by_layer = {name: np.array([float(row[name]) for row in rows]) for name in _OF_LAYER}
    variables = labelled(tables, ("layer", "expert", "next"), _OF_PAIR) | labelled(by_layer, ("layer",), _OF_LAYER)
    before, after = counts.layers[:-1], counts.layers[1:]
    coordinates: dict[str, Any] = layer_coordinates(after) | {
        "layer_before": ("layer", [layer.layer for layer in before]),
        "expert": np.arange(tables["joint"].shape[1]),
        "next": np.arange(tables["joint"].shape[2]),
        "num_before": ("layer", [layer.num_ids for layer in before]),
        "choice": counts.choice,
    }
    if len(counts.paths):
        variables |= _paths(counts, seed)
        coordinates["routing"] = list(ROUTINGS)
    return xr.Dataset(variables, coordinates)


_OF_PAIR = {"probability": ("probability of the next expert", FRACTION), **definitions("independent layers")}
_OF_LAYER: dict[str, tuple[str, ...]] = {
    "information": ("mutual information of the two choices, bias removed", "bits"),
    "information_low": ("95 % interval, low end", "bits"),
    "information_high": ("95 % interval, high end", "bits"),
    "information_null": ("mutual information counted if the layers were independent", "bits"),
    "plug_in": ("mutual information as counted", "bits"),
    "miller_madow": ("the same less the bias of independent tokens", "bits", "Miller 1955"),
    "entropy": ("entropy of the choice at the later layer", "bits"),
    "tokens": ("tokens, or pairs of assignments", "tokens"),
}


def mutual_information(joint: Numbers) -> Numbers:
    """Mutual information of the last two axes of counts or probabilities, bits.

    Example:
        >>> float(mutual_information(np.eye(4))), float(mutual_information(np.ones((4, 4))))
        (2.0, 0.0)
    """
    p = joint / joint.sum(axis=(-2, -1), keepdims=True)
    marginals = special.entr(p.sum(axis=-1)).sum(axis=-1) + special.entr(p.sum(axis=-2)).sum(axis=-1)
    nats: Numbers = marginals - special.entr(p).sum(axis=(-2, -1))
    return nats / np.log(2)


def _of_layer(moves_GEF: NDArray[np.uint32], rng: np.random.Generator) -> dict[str, Any]:
    """Everything about one pair of layers."""
    moves = moves_GEF[moves_GEF.any(axis=(1, 2))].astype(float)
    num_groups = len(moves)
    if not num_groups:
        unknown = np.full(moves_GEF.shape[1:], np.nan)
        return dict.fromkeys(("probability", *TABLES), unknown) | dict.fromkeys(_OF_LAYER, np.nan)
    tokens_G = moves.sum(axis=(1, 2))
    tokens = tokens_G.sum()
    before_GE, after_GF = moves.sum(axis=2), moves.sum(axis=1)
    before, after = (sums.sum(axis=0) / tokens for sums in (before_GE, after_GF))
    null = before[:, None] * after
    by_popularity = (before_GE - before * tokens_G[:, None])[:, :, None] * after
    by_popularity += before[:, None] * (after_GF - after * tokens_G[:, None])[:, None, :]
    tables, error = lifts(moves, tokens_G, before, after, null, by_popularity)
    joint = tables["joint"]
    with np.errstate(invalid="ignore", divide="ignore"):
        probability = np.where(before[:, None] > 0, joint / before[:, None], np.nan)
        spread = np.nansum(error**2 / null) * tokens if num_groups > 1 else np.nan
    cells = max(((before > 0).sum() - 1) * ((after > 0).sum() - 1), 1)
    # Tokens of a document are alike: they tell as much as so many independent ones.
    independent = tokens / max(spread / cells, 1) if num_groups > 1 else np.nan
    plug_in = float(mutual_information(joint))
    alone, most_alone = _of_independent_layers(before, after, independent, rng)
    jack, error_of_it, _ = groups.jackknife(
        lambda sums: mutual_information(sums.reshape(-1, *joint.shape))[:, None], moves.reshape(num_groups, -1)
    )
    value, half_of_it = float(jack[0]), groups.student(num_groups) * float(error_of_it[0])
    ends = [value - half_of_it, value + half_of_it]
    if independent < THIN * cells:  # no first-order correction holds: the two bounds of the bias
        value = plug_in - alone
        ends[0] = min(ends[0], value - half_of_it)
    if plug_in <= most_alone:
        ends[0] = min(ends[0], 0.0)
    bins = (joint > 0).sum() - (before > 0).sum() - (after > 0).sum() + 1
    return tables | {
        "probability": probability,
        "information": max(value, 0.0),
        "information_low": np.maximum(ends[0], 0),
        "information_high": np.maximum(ends[1], 0),
        "information_null": alone,
        "plug_in": plug_in,
        "miller_madow": np.maximum(plug_in - bins / (2 * tokens * np.log(2)), 0),
        "entropy": -(after * np.log2(np.where(after > 0, after, 1))).sum(),
        "tokens": tokens,
    }


def _of_independent_layers(
    before: Numbers, after: Numbers, tokens: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Mutual information counted of so many independent tokens and layers: its mean, and its 97.5 % quantile.

    Where cells are many for the tokens, the tables drawn have exactly these margins: it is a permutation of one layer's
    choices between tokens. Otherwise the margins vary, too, which makes no difference there.
    """
    if not np.isfinite(tokens):
        return np.nan, np.nan
    number = max(round(tokens), 1)
    if number < THIN * (before > 0).sum() * (after > 0).sum():
        margins = _whole(before[before > 0], number), _whole(after[after > 0], number)
        draws = stats.random_table(*margins, seed=rng).rvs(NULL_DRAWS)
    else:
        expected = before[:, None] * after
        draws = rng.multinomial(number, expected.ravel() / expected.sum(), NULL_DRAWS)
        draws = draws.reshape(-1, *expected.shape)
    bits = mutual_information(draws.astype(float))
    return float(bits.mean()), float(bits.mean() + 2.1 * bits.std(ddof=1))  # Student's t of 15 is 2.13


def _whole(shares: Numbers, number: int) -> NDArray[np.int64]:
    """Whole numbers in these proportions with that sum (largest remainders)."""
    exact = shares / shares.sum() * number
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: number - whole.sum()]] += 1
    return whole


def path_summary(paths: NDArray[np.uint64]) -> Numbers:
    """Distinct paths, those that carry half of the tokens, their effective number, the part of tokens alone on theirs.

    Example:
        >>> path_summary(np.array([7, 7, 7, 1, 2, 2], np.uint64)).round(4).tolist()
        [3.0, 1.0, 3.75, 0.1667]
    """
    counts = np.sort(np.unique(paths, return_counts=True)[1])[::-1]
    tokens = len(paths)
    half = int(np.searchsorted(np.cumsum(counts), tokens / 2)) + 1
    sharing = float((counts.astype(float) * (counts - 1)).sum())
    effective = tokens * (tokens - 1) / sharing if sharing else np.inf
    return np.array([len(counts), half, effective, (counts == 1).sum() / tokens])


def _paths(counts: Transitions, seed: int) -> dict[str, Any]:
    """The variables of paths."""
    number = len(counts.paths)
    num_draws = int(np.clip(STEPS_DRAWN // (number * len(counts.layers)), 3, 10))
    chain, independent = _cumulative(counts)
    rows = [[path_summary(counts.paths)] * 3]
    for cumulative in (chain, independent):
        drawn = []
        for draw in range(num_draws):
            paths = np.zeros(number, np.uint64)
            draw_paths(cumulative, paths, seed * 1000 + draw)
            drawn.append(path_summary(paths))
        rows.append([np.mean(drawn, axis=0), np.min(drawn, axis=0), np.max(drawn, axis=0)])
    mean, low, high = np.moveaxis(np.array(rows), 1, 0)
    by_name = {
        f"{name}{end}": values[:, place]
        for place, name in enumerate(PATHS)
        for end, values in (("", mean), ("_low", low), ("_high", high))
    }
    of_draws = {f"{name}_low": ("lowest of the draws", units) for name, (_, units) in PATHS.items()}
    of_draws |= {f"{name}_high": ("highest of the draws", units) for name, (_, units) in PATHS.items()}
    return labelled(by_name, ("routing",), PATHS | of_draws) | labelled(
        {"path_tokens": number}, (), {"path_tokens": ("tokens whose paths were looked at", "tokens")}
    )


def _cumulative(counts: Transitions) -> tuple[Numbers, Numbers]:
    """Cumulative probabilities of a Markov chain and of independent layers, shape (layer, expert before, expert)."""
    tables = [moves.sum(axis=0, dtype=np.int64).astype(float) for moves in counts.moves.values()]
    num_ids = max(layer.num_ids for layer in counts.layers)
    chain = np.ones((len(tables) + 1, num_ids, num_ids))
    independent = chain.copy()

    def cumulate(weights: Numbers) -> Numbers:
        sums = np.cumsum(weights, axis=-1)
        scaled: Numbers = np.divide(sums, sums[..., -1:], out=np.ones_like(sums), where=sums[..., -1:] > 0)
        return scaled

    first = cumulate(tables[0].sum(axis=1))
    chain[0, :, : len(first)] = independent[0, :, : len(first)] = first
    for step, table in enumerate(tables, 1):
        chain[step, : len(table), : table.shape[1]] = cumulate(table)
        independent[step, :, : table.shape[1]] = cumulate(table.sum(axis=0))
    return chain, independent
