"""Results as tidy data frames, a row a value with its interval and null: the CSV and JSON of each table and figure.

Column names carry the unit. Values keep six significant digits (`csv`, `json`), enough for any error bar.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from moescope.reporting.documents import RoutedDocument
from moescope.reporting.visible import visible

DIGITS = 6


def shares_frame(shares: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, layer, choice, expert) that the layer has."""
    frame = _percent(
        shares,
        {
            "share": "share_percent",
            "low": "low_percent",
            "high": "high_percent",
            "uniform": "uniform_percent",
            "share_of_tokens": "share_of_tokens_percent",
        },
        ["domain", "layer", "choice", "expert"],
    )
    exists = frame["expert"] < frame["layer"].map(_by_layer(shares, "num_ids"))
    rank = {choice: at for at, choice in enumerate(shares["choice"].values.tolist())}
    exists &= frame["choice"].map(rank) <= frame["layer"].map(_by_layer(shares, "top_k"))
    return _with_sizes(frame[exists], shares)


def repeats_frame(repeats: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, layer, kind)."""
    frame = _percent(
        repeats,
        {
            "rate": "rate_percent",
            "low": "low_percent",
            "high": "high_percent",
            "uniform": "uniform_percent",
            "marginal": "popularity_alone_percent",
        },
        ["domain", "layer", "kind"],
    )
    return _with_sizes(frame, repeats)


def words_frame(words: xr.Dataset) -> pd.DataFrame:
    """A row a (word, layer)."""
    sizes = ["occurrences", "tokens", "documents", "multi_token"]
    shares = [name for name in words.data_vars if name not in {*sizes, "top_expert"}]
    frame = _percent(words, {str(name): f"{name}_percent" for name in shares}, ["word", "layer"])
    plain = words[[*sizes, "top_expert"]].to_dataframe().reset_index()
    plain["top_expert"] = plain["top_expert"].astype("Int64")
    merged = plain[["word", "layer", *sizes, "top_expert"]].merge(frame, on=["word", "layer"], how="left")
    return merged.rename(columns={"multi_token": "occurrences_of_several_tokens"})


def divergence_frame(divergence: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, layer) against the other domains, then a row a pair of domains and layer."""
    names = {
        "jsd_rest": "jsd_bits",
        "jsd_rest_low": "low_bits",
        "jsd_rest_high": "high_bits",
        "jsd_rest_null": "sampling_alone_bits",
        "p_value": "p_value",
        "q_value": "q_value",
    }
    rest = divergence[list(names)].to_dataframe().reset_index().rename(columns=names)
    rest.insert(1, "other", "(the others)")
    of_pairs = {
        "jsd": "jsd_bits",
        "jsd_low": "low_bits",
        "jsd_high": "high_bits",
        "jsd_null": "sampling_alone_bits",
        "pair_p_value": "p_value",
        "pair_q_value": "q_value",
    }
    pairs = divergence[list(of_pairs)].to_dataframe().reset_index().rename(columns=of_pairs)
    order = {domain: at for at, domain in enumerate(divergence["domain"].values.tolist())}
    pairs = pairs[pairs["domain"].map(order) < pairs["other"].map(order)]
    columns = ["domain", "other", "layer", *names.values()]
    return pd.concat([rest[columns], pairs.reindex(columns=columns)], ignore_index=True)


def balance_frame(balance: xr.Dataset) -> pd.DataFrame:
    """A row a (domain, layer, batch), the batch in sequences and empty for the whole trace; then a row a statistic of
    the gate weights.
    """
    shapes = ["imbalance", "cv", "gini", "entropy"]
    names = [f"{name}{end}" for name in shapes for end in ("", "_low", "_high", "_null")]
    names += ["max_vio", "busiest", "idle", "nearly_idle", "nearly_idle_low", "nearly_idle_high"]
    drop = ["num_experts", "top_k", "documents"]
    parts = [balance[names].drop_vars(drop, errors="ignore").to_dataframe().reset_index()]
    parts[0].insert(0, "what", "loads")
    everything = balance["domain"].values[0]
    if "batch_imbalance" in balance:
        renamed = {"batch_imbalance": "imbalance", "batch_imbalance_low": "imbalance_low"}
        renamed |= {"batch_imbalance_high": "imbalance_high", "batch_null": "imbalance_null"}
        rows = balance[list(renamed)].drop_vars(drop, errors="ignore").to_dataframe().reset_index()
        for at, quantile in enumerate(balance["quantile"].values.tolist()):
            for source, name in (("batch_quantile", "quantile"), ("batch_null_quantile", "null_quantile")):
                rows[f"{name}_{100 * quantile:g}"] = balance[source].isel(quantile=at).values.ravel()
        rows.insert(0, "what", "loads within a batch")
        rows.insert(1, "domain", everything)
        rows["batches"] = rows["batch"].map(balance["batches"].to_series())
        rows["tokens_a_batch"] = rows["batch"].map(balance["batch_tokens"].to_series())
        parts.append(rows.rename(columns={**renamed, "batch": "sequences_a_batch"}))
    if "weight" in balance:
        names = ["weight", "weight_low", "weight_high"]
        rows = balance[names].drop_vars(drop, errors="ignore").to_dataframe().reset_index()
        rows.insert(0, "what", "gate weights")
        for at, quantile in enumerate(balance["quantile"].values.tolist()):
            by_token = balance["weight_quantile"].isel(quantile=at, drop=True).to_series()
            keys = pd.MultiIndex.from_frame(rows[["layer", "statistic"]])
            rows[f"quantile_{100 * quantile:g}"] = by_token.reindex(keys).values
            rows.loc[rows["domain"] != everything, f"quantile_{100 * quantile:g}"] = np.nan
        parts.append(rows)
    return pd.concat(parts, ignore_index=True)


def coactivation_frame(coactivation: xr.Dataset) -> pd.DataFrame:
    """A row a (layer, pair of experts); `other_given_expert` is N_ij / N_i."""
    names = ["joint", "expected", "lift", "low", "high", "p_value", "q_value"]
    upper = np.triu(np.ones((coactivation.sizes["expert"],) * 2, bool), 1)
    parts = []
    for layer in coactivation["layer"].values.tolist():
        at = coactivation.sel(layer=layer)
        expert, other = np.nonzero(upper & np.isfinite(at["joint"].values))
        columns = {"layer": layer, "expert": expert, "other": other}
        columns |= {name: at[name].values[expert, other] for name in names[:2]}
        columns["other_given_expert"] = at["conditional"].values[expert, other]
        columns["expert_given_other"] = at["conditional"].values[other, expert]
        columns |= {name: at[name].values[expert, other] for name in names[2:]}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def transitions_frame(transitions: xr.Dataset, layers: Iterable[int] | None = None) -> pd.DataFrame:
    """A row a pair of layers with its information, then a row a transition, then a row a kind of paths.

    Args:
        transitions: Of `moescope.transitions`.
        layers: Later layers whose transitions have rows, or None for all.
    """
    by_layer = [str(name) for name, values in transitions.data_vars.items() if values.dims == ("layer",)]
    information = pd.DataFrame({name: transitions[name].values for name in ["layer_before", "layer", *by_layer]})
    information.insert(0, "what", "information")
    parts = [information]
    names = ["probability", "joint", "expected", "lift", "low", "high", "p_value", "q_value"]
    for layer in transitions["layer"].values.tolist() if layers is None else layers:
        at = transitions.sel(layer=layer)
        expert, following = np.nonzero(np.isfinite(at["joint"].values))
        columns = {"what": "transition", "layer_before": int(at["layer_before"]), "layer": layer}
        columns |= {"expert": expert, "next": following}
        parts.append(pd.DataFrame(columns | {name: at[name].values[expert, following] for name in names}))
    if "half" in transitions:
        by_routing = [str(name) for name, values in transitions.data_vars.items() if values.dims == ("routing",)]
        paths = pd.DataFrame(
            {"routing": transitions["routing"].values} | {n: transitions[n].values for n in by_routing}
        )
        paths.insert(0, "what", "paths")
        parts.append(paths)
    frame = pd.concat(parts, ignore_index=True)
    whole = ["layer_before", "layer", "expert", "next"]
    return frame.astype(dict.fromkeys(whole, "Int64"))


def tokens_frame(documents: Sequence[RoutedDocument], layers: Sequence[int]) -> pd.DataFrame:
    """A row a token, with the first-choice expert in each layer; -1 = dropped."""
    parts = [
        pd.DataFrame(
            {
                "document": document.number,
                "domain": document.domain,
                "token": np.arange(len(document.token_ids)),
                "token_id": document.token_ids,
                "text": [visible(text) for text in document.texts],
                **{f"layer_{layer}_expert_id": document.expert_ids[layer][:, 0] for layer in layers},
            }
        )
        for document in documents
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def csv(frame: pd.DataFrame) -> str:
    """The frame as CSV, RFC 4180, numbers to six digits, empty where a value is missing."""
    text: str = frame.to_csv(index=False, float_format=f"%.{DIGITS}g", lineterminator="\n")
    return text


def json(frame: pd.DataFrame) -> str:
    """The frame as a JSON list of objects, ``null`` where a value is missing."""
    rows = [
        {name: _plain(value) for name, value in row.items()} for row in frame.astype(object).to_dict(orient="records")
    ]
    return json_module.dumps(rows, indent=1, allow_nan=False) + "\n"


def _percent(data: xr.Dataset, names: dict[str, str], dims: list[str]) -> pd.DataFrame:
    """The variables as columns of per cent under their new names, a row a combination of the dims."""
    full = xr.broadcast(*(data[name] for name in names))
    columns = {
        new: 100 * np.asarray(values.transpose(*dims).values, float).ravel()
        for new, values in zip(names.values(), full, strict=True)
    }
    index = pd.MultiIndex.from_product([data[dim].values.tolist() for dim in dims], names=dims)
    return pd.DataFrame(columns, index=index).reset_index()


def _with_sizes(frame: pd.DataFrame, data: xr.Dataset) -> pd.DataFrame:
    sizes = {
        name: frame["domain"].map(dict(zip(data["domain"].values.tolist(), data[name].values.tolist(), strict=True)))
        for name in _first_present(data, ("documents", "tokens", "pairs"))
    }
    return frame.assign(**sizes).reset_index(drop=True)


def _first_present(data: xr.Dataset, names: Iterable[str]) -> list[str]:
    return [name for name in names if name in data.variables]


def _by_layer(data: xr.Dataset, name: str) -> dict[int, int]:
    source = name if name in data.variables else "num_experts"
    return dict(zip(data["layer"].values.tolist(), data[source].values.tolist(), strict=True))


def _plain(value: object) -> object:
    if value is None or value is pd.NA or (isinstance(value, float) and not np.isfinite(value)):
        return None
    if isinstance(value, float | np.floating):
        return float(f"{value:.{DIGITS}g}")
    return value.item() if isinstance(value, np.generic) else value
