"""Routed experts that SGLang, vLLM and Dynamo return with an answer: raw, base64, ``.npy``, or the JSON of a server.

A document is an answer, one sequence: its prompt, then what was generated. The last generated token was never an
input of the model, so there is one row less than tokens. A request may leave out the rows of the first tokens, and an
answer says so in one of several ways, or not at all. No program marks dense layers: they are zeros (vLLM up to 0.21
instead omits dense layers, and marks tokens of cached prefixes with -1).
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportIncomplete, ImportMalformed
from moescope.importers.documents import Ids, ModelFacts, TokenDocument, TokenId, integers
from moescope.importers.files import MAX_RESPONSE_BYTES, find, npy, objects, stem, whole
from moescope.importers.findings import Findings, Options

_BASE64 = re.compile(rb"[A-Za-z0-9+/\s]+={0,2}\s*")

Id = Annotated[int, msgspec.Meta(ge=-1, le=65535)]
Start = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Label = str | int

_TOKEN_IDS = "ask the server for them (vLLM: return_token_ids)"


class _Encoded(msgspec.Struct):
    """Dynamo's: base64, or base85 in its first versions, with what is left out at the beginning."""

    data: str
    shape: list[int] = []
    dtype: str = "int32"
    start: Start = 0


Routes = str | list[list[list[Id]]] | _Encoded | None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Extension(msgspec.Struct):
    routed_experts: Routes = None
    routed_experts_start_len: Start | None = None


class _MetaInfo(_Usage):
    routed_experts: Routes = None
    routed_experts_start_len: Start | None = None


class _AnswerChoice(msgspec.Struct):
    routed_experts: Routes = None
    sgl_ext: _Extension | None = None
    meta_info: _MetaInfo | None = None
    token_ids: list[TokenId] | None = None
    prompt_token_ids: list[TokenId] | None = None


class _Response(msgspec.Struct):
    """The fields read from an answer of either server; all others are skipped."""

    choices: list[_AnswerChoice] = []
    meta_info: _MetaInfo | None = None
    sglext: _Extension | None = None
    nvext: _Extension | None = None
    usage: _Usage | None = None
    model: str | None = None
    prompt_routed_experts: Routes = None
    routed_experts: Routes = None
    routed_experts_start_len: Start | None = None
    routed_experts_prompt_start: Start | None = None
    domain: Label | None = None
    cluster: Label | None = None
    prompt_token_ids: list[TokenId] | None = None
    input_ids: list[TokenId] | None = None
    output_ids: list[TokenId] | None = None


def read(paths: Sequence[Path], options: Options, findings: Findings) -> Generator[TokenDocument, None, None]:
    """One document per answer."""
    for path in find(paths):
        domain = options.domain or stem(path)
        with path.open("rb") as file:
            head = file.read(1 << 12)
        if head.lstrip()[:1] in (b"{", b"[") or head[:2] == b"\x1f\x8b" or head[:4] == b"\x28\xb5\x2f\xfd":
            for place, response in objects(path, _Response, MAX_RESPONSE_BYTES):
                yield from _answers(place, response, domain, options, findings)
        else:
            data = whole(path, MAX_RESPONSE_BYTES)
            if _BASE64.fullmatch(head) or (len(head) == 1 << 12 and _BASE64.match(head)):
                data = _decoded(data.decode("ascii", "replace"), str(path))
            yield _document(str(path), domain, _array(data, str(path), options), options)


def _answers(
    place: str, response: _Response, domain: str, options: Options, findings: Findings
) -> Generator[TokenDocument, None, None]:
    """The documents of one response, one per choice."""
    documents = 0
    name = response.model or ""
    if response.domain is not None and options.domain is None:
        domain = str(response.domain)
    usage = response.usage or _Usage()
    choices = response.choices or [_AnswerChoice()]
    for index, choice in enumerate(choices):
        where = f"{place}, choice {index}" if len(choices) > 1 else place
        meta = choice.meta_info or response.meta_info or _MetaInfo()
        extension = choice.sgl_ext or (None if index else response.sglext or response.nvext) or _Extension()
        routes = choice.routed_experts or meta.routed_experts or extension.routed_experts or response.routed_experts
        stated = (
            routes.start if isinstance(routes, _Encoded) and routes.start else None,
            extension.routed_experts_start_len,
            meta.routed_experts_start_len,
            response.routed_experts_start_len,
            response.routed_experts_prompt_start,
        )
        skipped = next((start for start in stated if start is not None), None)
        prompt = choice.prompt_token_ids or response.prompt_token_ids or response.input_ids
        output = choice.token_ids if choice.token_ids is not None else response.output_ids
        num_prompt = len(prompt) if prompt is not None else meta.prompt_tokens or usage.prompt_tokens
        ids = None if routes is None else _routes(routes, where, options)
        if response.prompt_routed_experts is not None:
            first = _routes(response.prompt_routed_experts, where, options)
            if ids is not None and ids.size and ids.shape[1:] != first.shape[1:]:
                raise ImportMalformed(where, f"has routes {first.shape} for its prompt, {ids.shape} for the rest")
            if num_prompt is not None and len(first) != num_prompt:
                raise ImportMalformed(where, f"has {len(first)} rows for a prompt of {num_prompt} tokens")
            num_prompt = len(first)
            ids = first if ids is None or not ids.size else np.concatenate([first, ids])
        if ids is None:
            continue
        documents += 1
        tokens = None if prompt is None or output is None else np.array([*prompt, *output], np.int64)
        completion = len(output) if output is not None else meta.completion_tokens or usage.completion_tokens
        total = None if num_prompt is None or completion is None else num_prompt + completion
        document = _document(where, domain, ids, options, tokens, num_prompt, total, name, findings, skipped)
        if options.bos is not None:
            if tokens is None or not len(tokens):
                raise ImportIncomplete(where, "has no token ids, so --bos cannot find the first one", _TOKEN_IDS)
            if tokens[0] == options.bos:
                document = _without_first(document)
        yield document if response.cluster is None else replace(document, cluster=str(response.cluster))
    if not documents:
        raise ImportMalformed(place, "has no routed_experts", "was the server started to return routed experts?")


def _without_first(document: TokenDocument) -> TokenDocument:
    """An answer without its first token, which the tokenizer added; those after it are counted from 0."""
    if document.skipped:
        return replace(document, skipped=document.skipped - 1)
    return document.rows(slice(1, None))


def _routes(routes: Any, place: str, options: Options) -> Ids:
    """Routes of a response: base64 of a ``.npy`` or of raw int32, nested lists, or data with a shape."""
    if isinstance(routes, str):
        return _array(_decoded(routes, place), place, options)
    if isinstance(routes, _Encoded):
        if routes.dtype not in ("uint8", "int16", "uint16", "int32", "int64"):
            raise ImportMalformed(place, f"has routes of type {routes.dtype[:20]!r}")
        dtype, shape = np.dtype(routes.dtype), routes.shape
        if len(shape) != 3 or any(not 0 <= n < 2**31 for n in shape):
            raise ImportMalformed(place, f"has routes of shape {shape}, expected (token, layer, choice)")
        size = math.prod(shape) * dtype.itemsize
        if len(routes.data) == size // 4 * 5 + (size % 4 + 1 if size % 4 else 0):  # shorter than base64 by a twentieth
            with suppress(ValueError):
                return np.frombuffer(base64.b85decode(routes.data), dtype).reshape(shape)
        if len(data := _decoded(routes.data, place)) != size:
            raise ImportMalformed(place, f"has {len(data)} bytes of routes of shape {shape} of {dtype}")
        return np.frombuffer(data, dtype).reshape(shape)
    return integers(routes, place, "routed_experts", ndim=3)


def _decoded(text: str, place: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImportMalformed(place, f"is not base64: {error}") from None


def _array(data: bytes, place: str, options: Options) -> Ids:
    """Bytes as an array (row, layer, choice): a ``.npy``, or int32 with a shape that the user gives."""
    if data.startswith(b"\x93NUMPY"):
        array: NDArray[Any] = npy(data, place)
        if array.dtype.kind not in "iu":
            raise ImportMalformed(place, f"holds {array.dtype}, expected whole numbers")
    else:
        top_k = options.need("top_k", place)
        given = options.layers if not options.num_layers else None
        num_layers = len(given) if given else options.need("num_layers", place)
        if len(data) % (4 * top_k * num_layers):
            raise ImportMalformed(
                place,
                f"has {len(data)} bytes, not a multiple of 4 bytes x {num_layers} layers x {top_k} choices",
                "are --num-layers and --top-k those of the model?",
            )
        array = np.frombuffer(data, "<i4").reshape(-1, num_layers, top_k)
    if (
        array.ndim == 2
        and options.top_k
        and options.num_layers
        and array.shape[1] == options.top_k * options.num_layers
    ):
        array = array.reshape(-1, options.num_layers, options.top_k)
    if array.ndim != 3:
        raise ImportMalformed(place, f"has {array.ndim} dimensions, expected 3: (token, layer, choice)")
    return array


def _document(
    place: str,
    domain: str,
    ids: Ids,
    options: Options,
    token_ids: Ids | None = None,
    num_prompt: int | None = None,
    num_tokens: int | None = None,
    model: str = "",
    findings: Findings | None = None,
    skipped: int | None = None,
) -> TokenDocument:
    """One answer; rows are counted back from the last token that was an input, or on from those that it skips."""
    rows, num_layers, top_k = ids.shape
    if options.layers is not None and options.num_layers is None and num_layers != len(options.layers):
        raise ImportMalformed(place, f"has {num_layers} layers, --layers names {len(options.layers)}")
    if num_layers > 1024 or top_k > 1024:  # far beyond any model: its dimensions are in another order
        raise ImportMalformed(place, f"has shape {ids.shape}, expected (token, layer, choice)")
    indices: Sequence[int] = range(num_layers)
    if options.layers is not None:
        if num_layers == len(options.layers):
            indices = options.layers
        elif num_layers != options.num_layers:
            raise ImportMalformed(
                place,
                f"has {num_layers} layers, expected {options.num_layers} or the {len(options.layers)} of --layers",
            )
    elif options.num_layers not in (None, num_layers):
        raise ImportMalformed(
            place, f"has {num_layers} layers, expected {options.num_layers}", "give the routed layers with --layers"
        )
    phase, known_ids = None, None
    first = skipped or 0
    if num_tokens is not None:
        if rows + first > num_tokens:
            beyond = f" from token {first} on" if first else ""
            raise ImportMalformed(place, f"has {rows} rows{beyond} for {num_tokens} tokens, expected {num_tokens - 1}")
        if skipped is None:
            first = max(0, num_tokens - 1 - rows)
        if findings is not None and rows != num_tokens - 1:
            findings.count(
                "answers have a row for their last token as well"
                if rows == num_tokens
                else "answers lack rows of their first tokens"
            )
        if token_ids is not None and len(token_ids) == num_tokens:
            known_ids = token_ids[first : first + rows]
        if num_prompt is not None:
            phase = (np.arange(first, first + rows) >= num_prompt).astype(np.uint8)
    wanted = indices if options.layers is None else options.layers
    expert_ids = {layer: ids[:, index] for index, layer in enumerate(indices) if layer in wanted}
    facts = ModelFacts(model, num_layers=options.num_layers)
    dense = options.layers is None
    return TokenDocument(
        place, domain, expert_ids, token_ids=known_ids, phase=phase, zero_is_dense=dense, model=facts, skipped=first
    )
