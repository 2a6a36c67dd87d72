"""SGLang's expert distribution recorder: ``.pt`` files of its four modes, and the CSV of version 0.4.5.

``per_token`` gives tokens; a document is a forward pass. Prompts are separated by ``extend_seq_lens``. The request of
a generated token is not in the file, so each is a sequence of its own: no pair of tokens is invented.
``per_pass``, ``stat`` and ``stat_approx`` give counts; a document is a forward pass. Physical experts (copies, in any
order) become logical ones by ``last_physical_to_logical_map``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moescope.errors import ImportMalformed, ImportTooLarge
from moescope.importers.assembly import MAX_LAYERS
from moescope.importers.documents import CountedDocument, Ids, ModelFacts, TokenDocument, integers
from moescope.importers.files import find, number, stem, table
from moescope.importers.findings import Findings, Options
from moescope.importers.torch_file import TorchFile, TorchTensor

EXTEND, DECODE, MIXED, IDLE = 1, 2, 3, 4
"""SGLang's numbers of forward modes; in others, a token's neighbours are unknown."""
MAX_EXPERTS = 1 << 16  # ids of 16 bits, as in a trace
MAX_CSV_ROWS = 1 << 22  # 64 layers of 65,536 experts


def read(
    paths: Sequence[Path], options: Options, findings: Findings
) -> Generator[TokenDocument | CountedDocument, None, None]:
    """One document per forward pass."""
    seen: set[bytes] = set()
    for path in find(paths, "expert_distribution_recorder_*.pt"):
        value = TorchFile(path).value
        domain = options.domain or stem(path)
        if isinstance(value, dict) and isinstance(value.get("logical_count"), TorchTensor):
            yield from _passes(path, value["logical_count"], domain)
        elif isinstance(value, dict) and isinstance(value.get("records"), list):
            yield from _records(path, value, domain, findings, seen)
        else:
            keys = ", ".join(map(str, value))[:80] if isinstance(value, dict) else type(value).__name__
            raise ImportMalformed(path, f"holds {keys or 'nothing'}, expected logical_count or records")


def _passes(path: Path, counts: TorchTensor, domain: str) -> Generator[CountedDocument, None, None]:
    """Modes stat and stat_approx: counts [pass, layer, expert]; older files have no passes."""
    if len(counts.shape) not in (2, 3) or counts.dtype.kind not in "iu":
        raise ImportMalformed(path, f"logical_count is {counts.dtype} of shape {counts.shape}, expected [pass, L, E]")
    num_passes = counts.shape[0] if len(counts.shape) == 3 else 1
    if 0 in counts.shape or counts.shape[-1] > MAX_EXPERTS or counts.shape[-2] > MAX_LAYERS or num_passes > 1 << 20:
        raise ImportMalformed(path, f"logical_count has shape {counts.shape}")
    for index in range(num_passes):
        one = counts.numpy(index, index + 1)[0] if len(counts.shape) == 3 else counts.numpy()
        table = one.astype(np.int64)
        yield CountedDocument(
            f"{path}, pass {index}", domain, dict(enumerate(table)), ModelFacts(num_experts=table.shape[1])
        )


def _records(
    path: Path, value: dict[str, Any], domain: str, findings: Findings, seen: set[bytes]
) -> Generator[TokenDocument | CountedDocument, None, None]:
    """Modes per_pass and per_token: one record per pass."""
    physical = value.get("last_physical_to_logical_map")
    if not isinstance(physical, TorchTensor) or len(physical.shape) != 2 or physical.dtype.kind not in "iu":
        raise ImportMalformed(path, "lacks last_physical_to_logical_map [layer, physical expert]")
    logical = physical.numpy().astype(np.int64)
    if not logical.size or logical.min() < 0 or logical.max() >= MAX_EXPERTS or len(logical) > MAX_LAYERS:
        raise ImportMalformed(path, "last_physical_to_logical_map is empty, or has impossible experts or layers")
    model = ModelFacts(num_experts=int(logical.max()) + 1)
    for index, record in enumerate(value["records"]):
        place = f"{path}, record {index}"
        if not isinstance(record, dict):
            raise ImportMalformed(place, "is not a record")
        ids, counts = record.get("topk_ids_of_layer"), record.get("global_physical_count")
        numbers = ids if ids is not None else counts
        if not isinstance(numbers, TorchTensor) or numbers.dtype.kind not in "iu":
            raise ImportMalformed(place, "has neither topk_ids_of_layer nor global_physical_count")
        table = numbers.numpy()
        key = hashlib.sha256(repr((record.get("forward_pass_id"), record.get("input_ids"))).encode())
        key.update(table.tobytes())
        if key.digest() in seen:
            findings.count("records are copies, by another rank, of an earlier pass and were left out")
            continue
        seen.add(key.digest())
        if ids is not None:
            yield from _tokens(place, record, table, logical, domain, model, findings)
        else:
            yield _counted(place, table, logical, domain, model)


def _tokens(
    place: str, record: dict[str, Any], ids: Ids, logical: Ids, domain: str, model: ModelFacts, findings: Findings
) -> Generator[TokenDocument, None, None]:
    """One pass of mode per_token."""
    if ids.ndim != 3 or ids.shape[0] != logical.shape[0]:
        raise ImportMalformed(
            place, f"topk_ids_of_layer has shape {ids.shape}, expected ({logical.shape[0]}, tokens, choices)"
        )
    token_ids = integers(record.get("input_ids"), place, "input_ids", ndim=1)
    if len(token_ids) != ids.shape[1]:
        raise ImportMalformed(place, f"has {ids.shape[1]} tokens of routing, but {len(token_ids)} input_ids")
    if not len(token_ids):
        return
    if ids.min() < -1 or ids.max() >= logical.shape[1]:
        raise ImportMalformed(
            place,
            f"has physical expert {ids.min()} to {ids.max()}, expected 0 to {logical.shape[1] - 1} or -1",
            "fused shared experts invalidate the recording: start SGLang with --disable-shared-experts-fusion",
        )
    expert_ids = {}
    for layer, block in enumerate(ids):
        mapped = logical[layer][block]
        mapped[block < 0] = -1
        expert_ids[layer] = mapped.astype(np.int32)
    starts, phase = _sequences(place, record, len(token_ids), findings)
    yield TokenDocument(place, domain, expert_ids, {}, token_ids, starts, phase, model=model)


def _sequences(
    place: str, record: dict[str, Any], num_tokens: int, findings: Findings
) -> tuple[np.ndarray, np.ndarray | None]:
    """Which tokens of a pass begin a sequence, and their phase if the mode determines it."""
    mode, lengths = record.get("forward_mode"), record.get("extend_seq_lens")
    starts = np.ones(num_tokens, bool)
    if mode in (EXTEND, MIXED) and lengths is not None:
        ends = np.cumsum(integers(lengths, place, "extend_seq_lens", ndim=1).clip(0, num_tokens + 1))
        if not len(ends) or ends[-1] != num_tokens or (np.asarray(lengths) < 0).any():
            raise ImportMalformed(
                place, f"extend_seq_lens sum to {ends[-1] if len(ends) else 0}, expected its {num_tokens} tokens"
            )
        starts[:] = False
        starts[np.unique(np.append(0, ends[:-1][ends[:-1] < num_tokens]))] = True
    positions = record.get("positions")
    if positions is not None:
        numbers = integers(positions, place, "positions", ndim=1)
        if len(numbers) != num_tokens:
            raise ImportMalformed(place, f"has {num_tokens} tokens, but {len(numbers)} positions")
        jumps = np.append(False, np.diff(numbers) != 1) & ~starts
        if jumps.any():
            findings.count("jumps of position within a sequence begin a new one", int(jumps.sum()))
            starts |= jumps
    if mode == EXTEND:
        return starts, np.zeros(num_tokens, np.uint8)
    if mode == DECODE:
        return starts, np.ones(num_tokens, np.uint8)
    if mode != MIXED:
        findings.count("passes have an unusual forward_mode (speculation?); each token there is a sequence of its own")
    return starts, None


def _counted(place: str, counts: Ids, logical: Ids, domain: str, model: ModelFacts) -> CountedDocument:
    """One pass of mode per_pass."""
    if counts.shape != logical.shape:
        raise ImportMalformed(place, f"global_physical_count has shape {counts.shape}, expected {logical.shape}")
    table = {}
    for layer, row in enumerate(counts.astype(np.int64)):
        table[layer] = np.zeros(model.num_experts or 0, np.int64)
        np.add.at(table[layer], logical[layer], row)
    return CountedDocument(place, domain, table, model)


def read_csv(paths: Sequence[Path], options: Options, findings: Findings) -> Generator[CountedDocument, None, None]:
    """``layer_id,expert_id,count`` of SGLang 0.4.5; a document is a file."""
    for path in find(paths, "expert_distribution_rank*.csv"):
        counts_of: dict[int, dict[int, int]] = {}
        place, names, rows = table(path)
        if names and names != ["layer_id", "expert_id", "count"]:
            raise ImportMalformed(place, f"is {','.join(names)[:80]}, expected layer_id,expert_id,count")
        for entries, (place, cells) in enumerate(rows):
            if entries == MAX_CSV_ROWS:
                raise ImportTooLarge(path, f"has more than {MAX_CSV_ROWS:,} rows")
            if len(cells) != 3:
                raise ImportMalformed(place, f"has {len(cells)} cells, expected 3")
            layer = number(cells[0], place, "layer_id", high=65535)
            expert = number(cells[1], place, "expert_id", high=65535)
            counts = counts_of.setdefault(layer, {})
            if expert in counts:
                raise ImportMalformed(place, f"counts expert {expert} of layer {layer} again")
            counts[expert] = number(cells[2], place, "count", high=2**53 - 1)
        if not counts_of:
            raise ImportMalformed(path, "holds no counts")
        arrays = {}
        for layer, counts in counts_of.items():
            arrays[layer] = np.zeros(max(counts) + 1, np.int64)
            arrays[layer][list(counts)] = list(counts.values())
        yield CountedDocument(str(path), options.domain or stem(path), arrays, ModelFacts(), complete=False)
