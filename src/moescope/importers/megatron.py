"""Megatron's router trace: ``router_trace_rank*.jsonl``, one record per layer and pass.

A document is a pass of a rank. Megatron flattens (position, batch) to rows and does not state the number of sequences
in a batch, so each token is a sequence of its own: no pair of tokens is invented.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from moescope.errors import ImportMalformed
from moescope.importers.documents import ExpertId, Ids, TokenDocument, integers
from moescope.importers.files import decode, find, lines, stem
from moescope.importers.findings import Findings, Options


class _Record(msgspec.Struct):
    step: int
    layer: int
    num_tokens: int
    top_indices: list[list[ExpertId]]
    rank: int = 0
    topk: int | None = None
    stage: str = ""
    block: str = "decoder"
    mtp_idx: int | None = None


def read(paths: Sequence[Path], options: Options, findings: Findings) -> Generator[TokenDocument, None, None]:
    """One document per pass of a rank; a pass ends where the step changes or a layer recurs."""
    layers: frozenset[int] | None = None
    for path in find(paths, "router_trace_rank*.jsonl"):
        for document in _passes(path, options, findings):
            document_layers = frozenset(document.expert_ids)
            if layers is not None and document_layers != layers:
                raise ImportMalformed(
                    document.place,
                    f"has layers {sorted(document_layers)[:8]}…, an earlier pass had {sorted(layers)[:8]}…",
                    "a trace holds the ranks of one pipeline stage; import the others separately",
                )
            layers = document_layers
            yield document


def _passes(path: Path, options: Options, findings: Findings) -> Generator[TokenDocument, None, None]:
    waiting: dict[int, Ids] = {}
    current_pass, place, stage = (0, 0), str(path), ""
    cells = 0

    def close() -> TokenDocument:
        num_tokens = len(next(iter(waiting.values())))
        return TokenDocument(
            place, options.domain or stem(path), dict(waiting), starts=np.ones(num_tokens, bool), ranked=options.ranked
        )

    for where, text in lines(path):
        record = decode(text, _Record, where)
        if record.block != "decoder" or record.mtp_idx is not None:
            findings.count("records of multi-token prediction were left out")
            continue
        if stage and record.stage != stage:
            raise ImportMalformed(where, f"is from stage {record.stage[:40]!r}, earlier ones from {stage[:40]!r}")
        stage = record.stage
        ids = integers(record.top_indices, where, "top_indices", ndim=2)
        if len(ids) != record.num_tokens or (len(ids) and record.topk not in (None, ids.shape[1])):
            raise ImportMalformed(
                where, f"has top_indices of shape {ids.shape}, expected ({record.num_tokens}, {record.topk})"
            )
        if not 0 <= record.layer < 2**16:
            raise ImportMalformed(where, f"has layer {record.layer}, expected 0 to 65535")
        if waiting and ((record.rank, record.step) != current_pass or record.layer in waiting):
            yield close()
            waiting, cells = {}, 0
        if not waiting:
            current_pass, place = (record.rank, record.step), where
        if waiting and len(next(iter(waiting.values()))) != len(ids):
            raise ImportMalformed(where, f"has {len(ids)} tokens, other layers of its pass a different number")
        waiting[record.layer] = ids.astype(np.int32)
        cells += ids.size
        if cells > 1 << 26:  # 256 MB of int32
            raise ImportMalformed(where, "ends a pass of more than 64 million assignments")
    if waiting:
        yield close()
