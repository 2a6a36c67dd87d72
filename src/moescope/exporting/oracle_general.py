"""Requests for experts as oracleGeneral records, the binary traces that cache simulators such as libCacheSim read.

A record of 24 bytes per request, little endian, packed: ``uint32`` time, ``uint64`` object, ``uint32`` size, ``int64``
next access. Requests are in the order of decoding: by token, layer, choice. The time is the number of the token, the
object ``layer * 65536 + expert``, the size 1, and the next access the number of the next request, from 0, for the same
object, -1 if there is none. Dropped assignments and null experts make no request. The format has no groups: a
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

ASSIGNMENTS_AT_A_TIME = 2**20  # 24 MB of records, and some arrays of 8 bytes each


def write(trace: Trace, layers: tuple[Layer, ...], path: Path, _: str) -> None:
    """Write the layers of a trace to a file, with one part in memory.

    Raises:
        NotExportable: There are more tokens than the time field can count.
    """
    if trace.num_tokens > 2**32:
        raise NotExportable(trace.path, f"{trace.num_tokens:,} tokens do not fit in a time of 32 bits", "export fewer")
    *offsets, num_objects = np.cumsum([0, *(layer.num_experts for layer in layers)])
    last = np.full(num_objects, NOT_AGAIN, np.int64)  # the last request for each object
    tokens_at_a_time = max(1, ASSIGNMENTS_AT_A_TIME // sum(layer.top_k for layer in layers))
    done = token = 0
    with path.open("w+b") as file:
        for part in trace.iter_parts([layer.layer for layer in layers]):
            for start in range(0, part.num_tokens, tokens_at_a_time):
                rows = slice(start, min(start + tokens_at_a_time, part.num_tokens))
                ids = [part.expert_ids[layer.layer][rows].astype(np.int64) for layer in layers]
                pairs = list(zip(ids, layers, strict=True))
                keep = np.concatenate([(chosen >= 0) & (chosen < layer.num_experts) for chosen, layer in pairs], axis=1)
                objects = np.concatenate([chosen + first for chosen, first in zip(ids, offsets, strict=True)], axis=1)
                names = np.concatenate([chosen + IDS_A_LAYER * layer.layer for chosen, layer in pairs], axis=1)
                times = np.broadcast_to(token + np.arange(len(keep))[:, None], keep.shape)
                records = np.zeros(int(keep.sum()), RECORD)
                records["time"], records["object"], records["size"] = times[keep], names[keep], 1
                records["next"], firsts = _next_requests(objects[keep], done, last)
                for request, next_request in firsts:
                    file.seek(request * RECORD.itemsize + RECORD.fields["next"][1])  # type: ignore[index]
                    file.write(np.array(next_request, "<i8").tobytes())
                file.seek(done * RECORD.itemsize)
                file.write(records.tobytes())
                done += len(records)
                token += len(keep)


def _next_requests(objects: np.ndarray, done: int, last: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The next request for the object of each, within these; and (earlier request, its next) for earlier objects.

    Before these there were `done` requests, the last for each object those in `last`, which is brought up to date.
    """
    following = np.full(len(objects), NOT_AGAIN, np.int64)
    order = np.argsort(objects, kind="stable")
    ordered = objects[order]
    same = ordered[1:] == ordered[:-1]
    following[order[:-1][same]] = done + order[1:][same]
    begins, ends = np.append(True, ~same)[: len(order)], np.append(~same, True)[: len(order)]
    firsts = [
        (int(last[name]), done + int(request))
        for name, request in zip(ordered[begins], order[begins], strict=True)
        if last[name] != NOT_AGAIN
    ]
    last[ordered[ends]] = done + order[ends]
    return following, firsts
