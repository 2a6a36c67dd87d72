"""Repeats (Table 5, Figure 10): how often consecutive tokens are sent to the same expert.

The unit is the pair of consecutive tokens of one sequence. Three kinds: `first`, both have the same first choice;
`any`, their sets of top-k experts share at least one; `first_in_next`, the first choice of the earlier token is in the
set of the later one.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import comb

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moescope.errors import NotRecorded
from moescope.measures import statistics
from moescope.measures.schema import FRACTION, described, estimate, layer_coordinates
from moescope.tallying import REPEAT_KINDS, Source, Tally
from moescope.tallying.counted import counted
from moescope.tallying.tally import TallyCounter
from moescope.trace import COUNTS_HINT


def repeats(trace: Source, layers: Iterable[int] | None = None, *, threads: int | None = None) -> xr.Dataset:
    """Rate of repeated assignments, with the uniform baseline and the marginal null.

    Args:
        trace: The trace or its folder; or what was counted of it (`moescope.count`, `moescope.tally`).
        layers: Layers of the trace to measure, or None for all; counts have theirs.
        threads: Parts counted at a time; None for the number of processors.
    Returns:
        * `rate` (domain, layer, kind): repeats over pairs; `rate_error`, `rate_low`, `rate_high`: clustered by
          document, 95 %;
        * `rate_null` (domain, layer, kind): the rate of two different tokens drawn at random from the domain, so what
          the popularity of experts explains without any order (N1); exact from the table of pairs, else from a sample
          of tokens;
        * `rate_uniform` (layer, kind): the rate if each token drew its experts uniformly: the paper's dashed line;
        * `pairs`, `documents` (domain).

        Where the trace does not say which choice is the first, `kind` is only "any".
    Raises:
        NotRecorded: The trace holds counts only.
    Source:
        Mixtral of Experts, section 5, Table 5 and Figure 10 (`first`, `any`); HOBBIT (arXiv 2411.01433)
        (`first_in_next`). The intervals and the marginal null are ours.
    """
    tally = counted(trace, TallyCounter, layers=layers, threads=threads)[TallyCounter]
    if tally.counts_only:
        raise NotRecorded("the trace", "holds counts, which do not tell what token follows what", COUNTS_HINT)
    data = tally.data
    kinds = data["kind"].values.tolist()
    rate = statistics.proportion(
        data["repeats"].values,
        data["pairs"].values[:, None, None],
        data["repeats_squared"].values,
        data["repeats_by_pairs"].values,
        data["pairs_squared"].values[:, None, None],
        data["documents"].values[:, None, None],
    )
    by_shape = [
        dict(zip(REPEAT_KINDS, uniform_repeats(layer.num_ids, layer.top_k), strict=True))
        for layer in tally.header.layers
    ]
    uniform = [[rates[kind] for kind in kinds] for rates in by_shape]
    return xr.Dataset(
        estimate(
            "rate",
            ("domain", "layer", "kind"),
            "repeated consecutive assignments",
            FRACTION,
            "Mixtral of Experts (arXiv 2401.04088), Table 5",
            meanings={"null": "rate of two tokens of the domain drawn at random"},
            **rate,
            null=_marginal(tally),
        )
        | {
            "rate_uniform": described(uniform, ("layer", "kind"), "rate of uniform independent routing", FRACTION),
            "pairs": described(data["pairs"].values, ("domain",), "pairs of consecutive tokens", "pairs"),
        },
        {name: data[name] for name in ("domain", "kind", "documents", "tokens")}
        | layer_coordinates(tally.header.layers),
    )


def uniform_repeats(num_experts: int, top_k: int) -> list[float]:
    """Rates of the three kinds if every token draws its experts uniformly: 1/E, 1 - C(E-k,k)/C(E,k), k/E.

    Example:
        >>> [round(100 * rate, 2) for rate in uniform_repeats(8, 2)]
        [12.5, 46.43, 25.0]
    """
    disjoint = comb(num_experts - top_k, top_k) / comb(num_experts, top_k)
    return [1 / num_experts, 1 - disjoint, top_k / num_experts]


def _marginal(tally: Tally) -> NDArray[np.float64]:
    """The rates of two different tokens drawn at random from each domain, shape (domain, layer, kind)."""
    data = tally.data
    tokens = data["tokens"].values.astype(float)
    ordered_pairs = tokens * (tokens - 1)
    members = data["loads"].sel(choice="all").values.astype(float)
    result: dict[str, NDArray[np.float64]] = {
        kind: np.full(data["made"].shape[:2], np.nan) for kind in data["kind"].values.tolist()
    }
    if tally.ranked:
        first = data["loads"].sel(choice="first").values.astype(float)
        made_first = data["made"].sel(choice="first").values.astype(float)
        same_first = (first * (first - 1)).sum(axis=2)
        # A token's own first choice is in its own set: those pairs of a token with itself are taken out.
        first_in_set = (first * members).sum(axis=2) - made_first
        result["first"] = statistics.ratio(same_first, ordered_pairs[:, None])
        result["first_in_next"] = statistics.ratio(first_in_set, ordered_pairs[:, None])
    for place, (layer, top_k) in enumerate(zip(tally.layers, data["top_k"].values.tolist(), strict=True)):
        if top_k == 1:
            sharing = (members[:, place] * (members[:, place] - 1)).sum(axis=1)
            result["any"][:, place] = statistics.ratio(sharing, ordered_pairs)
        elif tally.sample is not None and layer in tally.sample.rows:
            for domain in range(len(tokens)):
                result["any"][domain, place] = sets_meet(tally.sample.kept(domain, layer), tally.data.sizes["expert"])
        else:
            sharing = _pairs_meet(data["pair"].isel(layer=place).values, members[:, place])
            result["any"][:, place] = statistics.ratio(sharing, ordered_pairs)
    return np.stack(list(result.values()), axis=-1)


def _pairs_meet(pair: NDArray[np.int64], members: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ordered pairs of different tokens whose sets of two share an expert, shape (domain,).

    With a token of the set {a, b}, m_a + m_b - c_ab tokens share an expert, itself among them; with one of the set {a}
    (its other choice dropped), m_a.
    """
    single = np.einsum("dee->de", pair).astype(float)
    both = (pair + pair.swapaxes(1, 2)).astype(float)  # each token counted at (a, b) and at (b, a)
    np.einsum("dee->de", both)[:] = 0
    meeting = members[:, :, None] + members[:, None, :] - both - 1
    return (both * meeting).sum(axis=(1, 2)) / 2 + (single * (members - 1)).sum(axis=1)


def sets_meet(expert_ids: NDArray[np.int32], num_ids: int) -> float:
    """Probability that two different tokens of a sample share an expert, over all pairs of the sample.

    Args:
        expert_ids: Chosen experts, shape (token, choice); -1 = dropped.
        num_ids: One more than the largest id.
    """
    num_tokens = len(expert_ids)
    if num_tokens < 2:
        return float("nan")
    chosen = np.zeros((num_tokens, num_ids), np.float32)
    rows, choices = np.nonzero(expert_ids >= 0)
    chosen[rows, expert_ids[rows, choices]] = 1
    meeting = sum(int(np.count_nonzero(chosen[row : row + 1024] @ chosen.T)) for row in range(0, num_tokens, 1024))
    itself = int(np.count_nonzero(chosen.any(axis=1)))
    return (meeting - itself) / (num_tokens * (num_tokens - 1))
