"""Requests for experts as oracleGeneral records, the binary traces that cache simulators such as libCacheSim read.

One record of 24 bytes a request, little endian, packed: ``uint32`` time, ``uint64`` object, ``uint32`` size, ``int64``
next access. Requests are in the order of decoding: by token, layer, choice. The time is the number of the token, the
object ``layer * 65536 + expert``, the size 1, and the next access the number of the request, from 0, that asks for the
object again, -1 if none does. Dropped assignments and null experts ask for nothing. The format knows no groups: a
simulator may evict an expert for another of the same token.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moescope.errors import NotExportable
from moescope.trace import Layer, Trace

RECORD = np.dtype([("time", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])
IDS_A_LAYER = 2**16
NOT_AGAIN = -1

ASSIGNMENTS_AT_A_TIME = 2**20


def write(trace: Trace, layers: tuple[Layer, ...], path: Path, _: str) -> None:
    """Write the layers of a trace to a file; memory is that of a part.

    Raises:
        NotExportable: There are more tokens than the time can number.
    """
    if trace.num_tokens > 2**32:
        raise NotExportable(trace.path, f"{trace.num_tokens:,} tokens do not fit a time of 32 bits", "export fewer")
    offsets = np.cumsum([0, *(layer.num_experts for layer in layers)])
    last = np.full(offsets[-1], NOT_AGAIN, np.int64)  # of each object, the request that asked for it last
    tokens_at_a_time = max(1, ASSIGNMENTS_AT_A_TIME // sum(layer.top_k for layer in layers))
    done = token = 0
    with path.open("w+b") as file:
        for part in trace.iter_parts([layer.layer for layer in layers]):
            for start in range(0, part.num_tokens, tokens_at_a_time):
                rows = slice(start, min(start + tokens_at_a_time, part.num_tokens))
                ids = [part.expert_ids[layer.layer][rows].astype(np.int64) for layer in layers]
                real = [(of >= 0) & (of < layer.num_experts) for of, layer in zip(ids, layers, strict=True)]
                keep = np.concatenate(real, axis=1)
                objects = np.concatenate([of + first for of, first in zip(ids, offsets[:-1], strict=True)], axis=1)
                names = np.concatenate(
                    [of + IDS_A_LAYER * layer.layer for of, layer in zip(ids, layers, strict=True)], axis=1
                )
                times = np.broadcast_to(token + np.arange(len(keep))[:, None], keep.shape)
                records = np.zeros(int(keep.sum()), RECORD)
                records["time"], records["object"], records["size"] = times[keep], names[keep], 1
                records["next"], firsts = _next_requests(objects[keep], done, last)
                for request, again in firsts:
                    file.seek(request * RECORD.itemsize + RECORD.fields["next"][1])  # type: ignore[index]
                    file.write(np.array(again, "<i8").tobytes())
                file.seek(done * RECORD.itemsize)
                file.write(records.tobytes())
                done += len(records)
                token += len(keep)


def _next_requests(objects: np.ndarray, done: int, last: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The next request of each, within these; and (earlier request, its next) of those that went on from before.

    Args:
        objects: Object of each request.
        done: Requests before these.
        last: Last request of each object before these; changed.
    """
    following = np.full(len(objects), NOT_AGAIN, np.int64)
    order = np.argsort(objects, kind="stable")
    ordered = objects[order]
    same = ordered[1:] == ordered[:-1]
    following[order[:-1][same]] = done + order[1:][same]
    begins, ends = np.append(True, ~same)[: len(order)], np.append(~same, True)[: len(order)]
    firsts = [
        (int(last[n]), done + int(at))
        for n, at in zip(ordered[begins], order[begins], strict=True)
        if last[n] != NOT_AGAIN
    ]
    last[ordered[ends]] = done + order[ends]
    return following, firsts
