"""Which engine records a model, opened; the library of no other is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from moescope.engines.options import DEVICE, DTYPES, EngineOptions
from moescope.engines.protocol import Engine
from moescope.errors import ModelNotStreamable


def open_engine(
    model: str | Path | tuple[Any, Any], options: EngineOptions, *, out: Path, force: bool = False
) -> Engine:
    """Open a model to be recorded; everything that can be refused is refused before its weights are read.

    Args:
        model: Folder of a checkpoint (or its name in the local Hugging Face cache), or a loaded (model, tokenizer).
        options: How it is opened and what is read of it.
        out: The trace to be: work beside it is continued.
        force: Whether a trace that was begun does not matter, since it will be replaced.
    Raises:
        MoescopeError: The model is at fault, or the libraries that run it are not installed.
        ValueError: Options exclude each other, or are not for such a model.
    """
    from moescope.engines.transformers.engine import TransformersEngine
    from moescope.engines.transformers.model import adopt_model, find_device, load_model

    if not isinstance(model, str | Path):
        if options.stream:
            raise ValueError("a loaded model is in memory already; pass the path of its checkpoint to stream it")
        if (options.dtype, options.device, options.device_map) != (DTYPES[0], DEVICE, None):
            raise ValueError("the dtype and the devices of a loaded model are what they are")
        return TransformersEngine(adopt_model(*model, options), options)
    if options.routers is not None:
        raise ValueError("routers describe a model that you loaded: pass (model, tokenizer)")
    if options.device_map is None:
        from moescope.engines.streamed.engine import must_stream, open_streamed
        from moescope.engines.streamed.layerwise import NO_STREAM

        find_device(options.device)
        if must_stream(model, out, options, force=force):
            if options.lookahead:
                problem = "looking ahead needs the routers of later layers, which are not loaded yet"
                raise ModelNotStreamable(model, problem, NO_STREAM)
            if options.trust_remote_code:
                raise ValueError("a model that brings its own code cannot be streamed: --no-stream loads it whole")
            return open_streamed(model, options)
    elif options.device != DEVICE:
        raise ValueError(f"a device ({options.device}) and a device map exclude each other")
    elif options.stream:
        raise ValueError("a model is streamed through one device, or spread by a device map, not both")
    options = replace(options, offload_folder=options.offload_folder or out.parent)
    return TransformersEngine(load_model(model, options), options)
