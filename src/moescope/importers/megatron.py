"""Megatron's router trace: ``router_trace_rank*.jsonl``, a record a layer and pass.

A document is a pass of a rank. Megatron flattens (position, batch) to rows and does not say how many sequences a batch
has, so each token is a sequence of its own: no pair of tokens is made up.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from moescope.errors import ImportMalformed
from moescope.importers.documents import Ids, TokenDocument, integers
from moescope.importers.files import decode, find, lines, stem
from moescope.importers.findings import Findings, Options

Id = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class _Record(msgspec.Struct):
    step: int
    layer: int
    num_tokens: int
    top_indices: list[list[Id]]
    rank: int = 0
    topk: int | None = None
    stage: str = ""
    block: str = "decoder"
    mtp_idx: int | None = None


def read(paths: Sequence[Path], options: Options, findings: Findings) -> Generator[TokenDocument, None, None]:
    """One document a pass of a rank; a pass ends where its step, or a layer a second time, begins anew.

    Raises:
        ForeignTraceError: A record is something else, or ranks hold different layers.
    """
    layers: frozenset[int] | None = None
    for path in find(paths, "router_trace_rank*.jsonl"):
        for document in _passes(path, options, findings):
            mine = frozenset(document.expert_ids)
            if layers is not None and mine != layers:
                raise ImportMalformed(
                    document.place,
                    f"has layers {sorted(mine)[:8]}…, an earlier pass had {sorted(layers)[:8]}…",
                    "ranks of one pipeline stage make a trace; import the others on their own",
                )
            layers = mine
            yield document


def _passes(path: Path, options: Options, findings: Findings) -> Generator[TokenDocument, None, None]:
    waiting: dict[int, Ids] = {}
    begun, place, stage = (0, 0), str(path), ""
    cells = 0

    def close() -> TokenDocument:
        num_tokens = len(next(iter(waiting.values())))
        return TokenDocument(
            place, options.domain or stem(path), dict(waiting), starts=np.ones(num_tokens, bool), ranked=options.ranked
        )

    for at, text in lines(path):
        record = decode(text, _Record, at)
        if record.block != "decoder" or record.mtp_idx is not None:
            findings.count("records of multi-token prediction were left out")
            continue
        if stage and record.stage != stage:
            raise ImportMalformed(at, f"is of stage {record.stage[:40]!r}, earlier records of {stage[:40]!r}")
        stage = record.stage
        ids = integers(record.top_indices, at, "top_indices", ndim=2)
        if len(ids) != record.num_tokens or (len(ids) and record.topk not in (None, ids.shape[1])):
            raise ImportMalformed(
                at, f"has top_indices of shape {ids.shape}, expected ({record.num_tokens}, {record.topk})"
            )
        if not 0 <= record.layer < 2**16:
            raise ImportMalformed(at, f"has layer {record.layer}, expected 0 to 65535")
        if waiting and ((record.rank, record.step) != begun or record.layer in waiting):
            yield close()
            waiting, cells = {}, 0
        if not waiting:
            begun, place = (record.rank, record.step), at
        if waiting and len(next(iter(waiting.values()))) != len(ids):
            raise ImportMalformed(at, f"has {len(ids)} tokens, other layers of its pass another number")
        waiting[record.layer] = ids.astype(np.int32)
        cells += ids.size
        if cells > 1 << 26:
            raise ImportMalformed(at, "ends a pass of more than 64 million assignments")
    if waiting:
        yield close()
