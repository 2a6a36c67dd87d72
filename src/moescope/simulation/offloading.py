"""Time: what the hits of a cache are worth in tokens a second, under a model of the link that loads the misses.

The unit is the second a token. A token takes `compute` seconds of work and, for each expert it has to load, latency +
bytes / bandwidth; of the shorter of the two a part `overlap` runs beside the other. Nothing is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from moescope.measures.schema import described, estimate

_MODEL = "1 / (compute + transfer - overlap * min(compute, transfer))"

MIXTRAL_LAYERS, MIXTRAL_EXPERTS, MIXTRAL_TOP_K = 32, 8, 2
MIXTRAL_EXPERT_PARAMETERS = 3 * 4096 * 14336
TWO_BIT_EXPERT_BYTES = MIXTRAL_EXPERT_PARAMETERS * 3 / 8
"""Bytes of a Mixtral expert at 2 bits with a scale and a zero point of 8 bits for every 16 weights, the quantization of
the code of Eliseev and Mazur: 3 bits a weight; the scales of the scales add 0.5 %."""

TABLE_2 = {
    "A100": (31.5e9, 4, (3.061, 2.918, 2.265, 1.392)),
    "RTX 3080 Mobile": (31.5e9, 4, (2.655, 2.227, 1.758, 1.059)),
    "RTX 3060": (31.5e9, 2, (2.278, 2.051, 1.547, 0.919)),
    "T4": (15.75e9, 4, (2.092, 1.567, 1.168, 0.661)),
}
"""By GPU: the most its own interface can carry (16 lanes of PCIe 4.0, of the T4 3.0; bytes a second), experts a layer
that the cache holds, and tokens a second of Eliseev and Mazur's Table 2 at 2 bits: the full algorithm, without
preloading, without LRU and preloading, naive offloading."""


def offloading(
    cache: xr.Dataset,
    *,
    bytes_per_expert: float,
    bandwidth: float,
    latency: float = 0.0,
    compute: float = 0.0,
    overlap: float = 0.0,
) -> xr.Dataset:
    """Tokens a second that the hits of a cache give.

    Args:
        cache: Of `moescope.cache`.
        bytes_per_expert: Bytes of one expert as it is loaded: its parameters times the bytes of each, and the scales.
        bandwidth: Of the link, bytes a second.
        latency: Of one load, seconds.
        compute: Work a token, with everything in place, seconds. At 0 the result is what the link alone allows.
        overlap: Part of the shorter of compute and transfer that runs beside the other, 0 to 1.
    Returns:
        * `tokens_per_second` (policy, domain, size) with `_low`, `_high`, `_null`, from the hit ratio, its interval,
          and that of tokens in random order, and `_uniform` (domain, size), at c/E; infinite where nothing takes time;
        * `transfer` (policy, domain, size): seconds a token; `link_bound`: whether transfer exceeds compute;
        * `cache_bytes` (size): memory that the caches take.
    Raises:
        ValueError: A quantity is not positive, or the overlap not a part.
    """
    if not (bytes_per_expert > 0 and bandwidth > 0 and np.isfinite([bytes_per_expert, bandwidth]).all()):
        raise ValueError(f"bytes and bandwidth must be positive, not {bytes_per_expert} and {bandwidth}")
    if not (latency >= 0 and compute >= 0 and np.isfinite([latency, compute]).all()):
        raise ValueError(f"latency and compute must be seconds from 0, not {latency} and {compute}")
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap must be from 0 to 1, not {overlap}")
    load = bytes_per_expert / bandwidth + latency
    dims = ("policy", "domain", "size")
    requests_D = cache["requests"].values.sum(axis=1) / cache["tokens"].values

    def transfer(ratio: str) -> np.ndarray:
        hits = np.asarray(cache[ratio].transpose(*dims, missing_dims="ignore").values, float)
        return (1 - hits) * requests_D[:, None] * load

    def speed(seconds: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.asarray(1 / (compute + seconds - overlap * np.minimum(compute, seconds)))

    def speeds(ending: str) -> np.ndarray:
        return speed(transfer(f"model_hit_ratio{ending}"))

    seconds = transfer("model_hit_ratio")
    slots = np.minimum(cache["num_experts"].values[:, None], cache["size"].values).sum(axis=0)
    return xr.Dataset(
        estimate(
            "tokens_per_second",
            dims,
            "tokens a second",
            "tokens/s",
            _MODEL,
            meanings={"null": "tokens in random order"},
            value=speed(seconds),
            low=speeds("_low"),
            high=speeds("_high"),
            null=speeds("_null"),
        )
        | {
            "tokens_per_second_uniform": described(
                speeds("_uniform"), dims[1:], "tokens a second at c/E", "tokens/s", _MODEL
            ),
            "transfer": described(seconds, dims, "time to load the misses of a token", "s"),
            "link_bound": described(seconds > compute, dims, "whether transfer takes longer than compute", "1"),
            "cache_bytes": described(slots * float(bytes_per_expert), ("size",), "memory of the caches", "bytes"),
        },
        coords={name: values for name, values in cache.coords.items() if set(values.dims) <= set(dims)},
        attrs={
            "bytes_per_expert": bytes_per_expert,
            "bandwidth": bandwidth,
            "latency": latency,
            "compute": compute,
            "overlap": overlap,
        },
    )


def table_2(hit_ratio: Mapping[int, float] | None = None) -> pd.DataFrame:
    """The time model against Eliseev and Mazur's Table 2, with what it leaves unexplained.

    Only bytes and the interface's own rate go in: their hosts' real bandwidths and their compute a token are not
    published. So the predicted time is the least there can be, and the residual, the measured seconds a token less
    that, is their compute, dequantization, synchronisation and whatever the link lacked of its rate.

    Args:
        hit_ratio: For a cache of 2 and one of 4 experts a layer, the hit ratio of LRU on Mixtral-8x7B; None for that of
            uniform independent routing, c/E, which real routing exceeds.
    Returns:
        A row a GPU and setting: experts loaded a token, seconds they take, tokens a second at most and measured,
        residual in seconds. What preloading hides is not known, so the full algorithm has no row.
    Source:
        Eliseev and Mazur 2023, arXiv 2312.17238, Table 2 (2-bit experts).
    """
    rows = []
    for gpu, (bandwidth, size, (_, lru, demand, naive)) in TABLE_2.items():
        ratio = size / MIXTRAL_EXPERTS if hit_ratio is None else hit_ratio[size]
        chosen = MIXTRAL_LAYERS * MIXTRAL_TOP_K
        settings = {
            "LRU": (chosen * (1 - ratio), lru),
            "chosen experts on demand": (chosen, demand),
            "naive: every expert": (MIXTRAL_LAYERS * MIXTRAL_EXPERTS, naive),
        }
        for setting, (loads, measured) in settings.items():
            seconds = loads * TWO_BIT_EXPERT_BYTES / bandwidth
            rows.append((gpu, setting, loads, seconds, 1 / seconds, measured, 1 / measured - seconds))
    names = ["gpu", "setting", "loads_a_token", "link_seconds", "link_tokens_per_second", "measured_tokens_per_second"]
    return pd.DataFrame(rows, columns=[*names, "residual_seconds"])
