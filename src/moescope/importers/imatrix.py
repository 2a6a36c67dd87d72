"""llama.cpp importance matrices (GGUF): how many tokens each expert of a layer received; a document is a file.

The matrix counts for each of the gate, up and down projections; all three receive the tokens of one router.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np

from moescope.errors import ImportMalformed, ImportNotFound
from moescope.importers import gguf
from moescope.importers.documents import CountedDocument, ModelFacts
from moescope.importers.files import find, stem
from moescope.importers.findings import Findings, Options

_COUNTS = re.compile(r"blk\.(\d{1,5})\.ffn_(gate|up|down|gate_up)_exps\.weight\.counts")


def read(paths: Sequence[Path], options: Options, findings: Findings) -> Generator[CountedDocument, None, None]:
    """One document per file."""
    for path in find(paths):
        file = gguf.read(path)
        if (kind := file.metadata.get("general.type")) != "imatrix":
            raise ImportMalformed(path, f"is a GGUF file of type {str(kind)[:40]!r}, expected 'imatrix'")
        counts: dict[int, np.ndarray] = {}
        for name in sorted(file.tensors):
            if match := _COUNTS.fullmatch(name):
                layer = int(match[1])
                tensor = file.f32(name)
                if tensor.ndim not in (1, 2) or tensor.size != max(tensor.shape, default=0):
                    raise ImportMalformed(f"{path}, {name}", f"has shape {tensor.shape}, expected one count per expert")
                values = tensor.reshape(-1)
                if not np.isfinite(values).all() or (values < 0).any() or (values != np.floor(values)).any():
                    raise ImportMalformed(f"{path}, {name}", "holds numbers that are not counts")
                if (values >= 2**53).any():
                    raise ImportMalformed(f"{path}, {name}", f"counts {values.max()} tokens")
                whole = values.astype(np.int64)
                if layer in counts and not np.array_equal(counts[layer], whole):
                    findings.warn_of_layer(layer, f"{path}: the projections differ in their counts; the first was used")
                counts.setdefault(layer, whole)
                if (values >= 2**24).any():  # float32 has 24 bits of mantissa
                    findings.warn(f"{path}: counts of 16,777,216 and more are rounded to float32")
        if not counts:
            raise ImportNotFound(path, "holds no counts of experts", "does the model have routed experts?")
        yield CountedDocument(str(path), options.domain or stem(path), counts, _model(file, counts, options, findings))


def _model(file: gguf.Gguf, counts: dict[int, np.ndarray], options: Options, findings: Findings) -> ModelFacts:
    """Top-k, if the assignments are a multiple of the number of tokens."""
    chunks, size = (file.metadata.get(f"imatrix.chunk_{name}") for name in ("count", "size"))
    if options.top_k is None and isinstance(chunks, int) and isinstance(size, int) and chunks * size > 0:
        totals = {int(count.sum()) for count in counts.values()} - {0}
        tokens = chunks * size
        if len(totals) == 1 and (total := totals.pop()) % tokens == 0 and total // tokens <= 2**16:
            findings.warn(
                f"top-k was taken to be {total // tokens}: {total:,} assignments of the {tokens:,} tokens of "
                f"{chunks} chunks; --top-k sets it"
            )
            return ModelFacts(top_k=total // tokens)
    return ModelFacts()
