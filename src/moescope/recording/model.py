"""A model ready to be recorded: its body without the head, the experts of its layers, and what a header says of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging

from moescope.errors import ModelDamaged, ModelNotFound, ModelUnsupported
from moescope.recording.hooks import RouterWatch
from moescope.recording.routers import Experts, find_experts, refuse_odd_families, select_experts
from moescope.recording.tokenizer import Tokenizer
from moescope.trace import Layer

HASHED_WHOLE_BYTES = 10**9
"""Checkpoints up to this size are hashed whole, larger ones by evenly spaced blocks of every file."""

_BLOCKS, _BLOCK_BYTES = 64, 2**16


@dataclass(frozen=True)
class Spread:
    """A checkpoint spread over devices, memory and disk by accelerate.

    Attributes:
        device_map: ``auto``, ``balanced``, ``balanced_low_0``, ``sequential``, or a device for each module.
        offload_folder: Where a temporary folder holds what is put on disk, until the recording is over.
    """

    device_map: str | Mapping[str, int | str]
    offload_folder: Path


@dataclass(frozen=True)
class Model:
    """A model, its tokenizer and the layers to record.

    Attributes:
        body: The model without its head.
        tokenizer: Its tokenizer.
        experts: The layers to record, ascending.
        description: Provenance for the header of a trace.
        remove_offloaded: Removes what was put on disk for this model; afterwards it cannot run.
    """

    body: Any
    tokenizer: Tokenizer
    experts: tuple[Experts, ...]
    description: dict[str, Any]
    remove_offloaded: Callable[[], object] = lambda: None

    @property
    def device(self) -> torch.device:
        """Where inputs go; for weights that accelerate keeps elsewhere, where it runs the model."""
        device: torch.device = self.body.device
        if device.type == "meta":
            places = (getattr(hook, "execution_device", None) for _, hook in accelerate_hooks(self.body))
            device = torch.device(next((place for place in places if place is not None), "cpu"))
        return device

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the model was made for, if it says so."""
        limit = getattr(_text_config(self.body.config), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @property
    def looks_ahead(self) -> bool:
        """Whether a token's choices may depend on later ones, so that padding after it must be masked.

        In a causal model it need not, and attention without a mask is up to twice as fast.
        """
        return any(getattr(module, "is_causal", True) is False for module in self.body.modules())

    def masks_blocks(self, window: int) -> bool:
        """Whether torch, on a CPU, would compute attention that a mask then throws away: beyond a sliding window."""
        config = _text_config(self.body.config)
        reach = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        return (
            isinstance(reach, int)
            and reach < window
            and self.device.type == "cpu"
            and getattr(config, "_attn_implementation", None) == "sdpa"
        )

    @property
    def num_embeddings(self) -> int:
        """Token ids that the model knows."""
        return int(self.body.get_input_embeddings().weight.shape[0])


def load_model(path: Path | str, *, layers: Sequence[int] | None, dtype: str, device: str | Spread) -> Model:
    """Load a checkpoint; everything that can be refused is refused before its weights are read.

    Args:
        path: Folder of a checkpoint, or the name of one in the local Hugging Face cache. Nothing is downloaded.
        layers: Layers to record, or None for all with routed experts.
        dtype: ``auto`` (the checkpoint's), ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` …, or several.
    Raises:
        ModelNotFound: There is no checkpoint.
        ModelDamaged: Its configuration or weights cannot be read, or lack a tensor.
        TokenizerMissing: It has no tokenizer.
        ModelNotMoE: It has no routed experts.
        ModelUnsupported: It has some whose routing cannot be read exactly.
        NoSuchLayer: A layer asked for has no routed experts.
    """
    folder = find_checkpoint(path)
    with _quiet():
        config = _load_config(folder)
        refuse_odd_families(config, path)
        with torch.device("meta"):
            skeleton = transformers.AutoModel.from_config(config)
        select_experts(find_experts(skeleton, path), layers, _num_layers(config), path)
        del skeleton
        tokenizer = Tokenizer.load(folder)
        if isinstance(device, Spread):
            body, remove = _load_spread(folder, config, dtype, device)
        else:
            body, remove = _load_weights(folder, config, dtype=dtype).to(find_device(device)), lambda: None
    name = folder.resolve().name if Path(path).is_dir() else str(path)
    return replace(_describe(body, tokenizer, layers, name, checkpoint_fingerprint(folder)), remove_offloaded=remove)


def adopt_model(model: Any, tokenizer: Any, *, layers: Sequence[int] | None) -> Model:
    """Take a model and a tokenizer that the caller has loaded; both are left as they are."""
    body = model.base_model
    name = Path(str(getattr(model, "name_or_path", "") or type(model).__name__)).name
    return _describe(body, Tokenizer(tokenizer), layers, name, tensors_fingerprint(body))


def find_device(device: str) -> torch.device:
    """The device of a name, such as ``cpu`` or ``cuda:1``; ``auto`` is a GPU if there is one.

    Raises:
        ValueError: torch does not know it, or it is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"torch has no device {device!r} here: {error}") from None


def find_checkpoint(path: Path | str) -> Path:
    """Folder of a checkpoint.

    Raises:
        ModelNotFound: There is none at the path, nor of that name in the local cache.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelNotFound(path, "is a folder without config.json, so it is not a checkpoint of transformers")
        return folder
    if folder.exists():
        raise ModelNotFound(path, "is a file, expected the folder of a checkpoint (config.json, *.safetensors)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or not even a possible name
        raise ModelNotFound(
            path,
            "there is no such folder, and no model of that name in the local Hugging Face cache",
            "moescope never downloads; `hf download NAME` does, and then its NAME will do here",
        ) from None


def checkpoint_fingerprint(folder: Path) -> str:
    """sha256 over configuration and weights of a checkpoint; evenly spaced blocks of each file if it is large."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    whole = sum(file.stat().st_size for file in files) <= HASHED_WHOLE_BYTES
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in files:
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if whole:
                while block := file.read(2**20):
                    digest.update(block)
            else:
                for index in range(_BLOCKS):
                    file.seek((size - min(size, _BLOCK_BYTES)) * index // (_BLOCKS - 1))
                    digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def tensors_fingerprint(model: nn.Module) -> str:
    """sha256 over configuration, names, shapes and values of a model in memory; some values of each if it is large."""
    tensors = sorted(model.state_dict().items())
    whole = sum(tensor.nbytes for _, tensor in tensors) <= HASHED_WHOLE_BYTES
    config: Any = model.config
    digest = hashlib.sha256(config.to_json_string().encode())
    for name, tensor in tensors:
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.device.type == "meta":
            continue
        values = tensor.detach().flatten()
        values = values if whole else values[:: max(1, len(values) // 4096)]
        digest.update(values.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def probe(model: Model) -> tuple[tuple[Layer, ...], int | None]:
    """Run a few tokens through the model, to see that every layer speaks and how many experts a token gets.

    Returns:
        The layers as a trace describes them, and the layer after which a forward pass may stop: the last to speak.
    """
    ids = torch.arange(4, device=model.device).remainder(model.num_embeddings).unsqueeze(0)
    with weights_put_back(model), RouterWatch(model.experts) as watch:
        choices = watch.run(model.body, {"input_ids": ids})
    layers = tuple(
        Layer(
            layer=experts.layer,
            num_experts=experts.num_experts,
            top_k=choices[experts.layer].expert_ids.shape[1],
            module=experts.name,
            num_null_experts=experts.num_null_experts,
            num_shared_experts=experts.num_shared_experts,
        )
        for experts in model.experts
    )
    return layers, list(choices)[-1]


def accelerate_hooks(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The hooks by which accelerate moves weights and inputs, each with its module."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):  # a SequentialHook holds several
            if each is not None:
                yield module, each


@contextmanager
def weights_put_back(model: Model) -> Iterator[None]:
    """Afterwards accelerate's offloaded weights are where they were, also if the forward pass inside was cut short.

    accelerate loads a module's weights before its forward and drops them after it; a pass that ends by an exception
    never comes to the latter in the modules that it leaves.
    """
    try:
        yield
    finally:
        for module, hook in accelerate_hooks(model.body):
            if getattr(hook, "offload", False):
                tensors = module.parameters(recurse=hook.place_submodules)
                if any(tensor.device.type != "meta" for tensor in tensors):
                    hook.post_forward(module, None)


@contextmanager
def ready_to_record(model: Model) -> Iterator[None]:
    """Evaluation mode and, on a CPU, the eager experts; afterwards everything of a given model is as it was before.

    No other implementation of the experts is faster on a CPU, and some are far slower (docs/decisions/log.md).
    """
    training = [module for module in model.body.modules() if module.training]
    configs = {id(config): config for each in model.experts if (config := getattr(each.module, "config", None))}
    before = {key: getattr(config, "_experts_implementation", None) for key, config in configs.items()}
    try:
        model.body.eval()
        if model.device.type == "cpu":
            for config in configs.values():
                config._experts_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
        for module in training:
            module.training = True
        model.remove_offloaded()


def implementations(model: Model) -> dict[str, str]:
    """Which code computes attention and experts, for the header of a trace."""
    config = _text_config(model.body.config)
    experts_config = getattr(model.experts[0].module, "config", config)
    return {
        "attn_implementation": str(getattr(config, "_attn_implementation", None)),
        "experts_implementation": str(getattr(experts_config, "_experts_implementation", None)),
    }


def _describe(body: Any, tokenizer: Tokenizer, layers: Sequence[int] | None, name: str, fingerprint: str) -> Model:
    num_layers = _num_layers(body.config)
    experts = select_experts(find_experts(body, name), layers, num_layers, name)
    architectures = getattr(body.config, "architectures", None) or [type(body).__name__]
    description = {
        "name": name,
        "family": str(body.config.model_type),
        "architecture": str(architectures[0]),
        "num_layers": num_layers,
        "dtype": str(body.dtype).removeprefix("torch."),
        "fingerprint": fingerprint,
    }
    return Model(body, tokenizer, experts, description)


def _load_config(folder: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if (family := _unknown_family(folder)) is not None:
            raise ModelUnsupported(
                folder,
                f"its family {family!r} is unknown to transformers {transformers.__version__}",
                "a newer transformers may know it; models that bring their own code are not run",
            ) from error
        raise ModelDamaged(folder, f"its config.json cannot be read: {error}") from error


def _unknown_family(folder: Path) -> str | None:
    try:
        family = json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (ValueError, AttributeError):
        return None
    return str(family) if family not in transformers.CONFIG_MAPPING else None


def _load_spread(folder: Path, config: Any, dtype: str, spread: Spread) -> tuple[Any, Callable[[], object]]:
    """The model, and what removes the folder with its offloaded weights, which is gone with the model at the latest."""
    spread.offload_folder.mkdir(parents=True, exist_ok=True)
    offloaded = tempfile.mkdtemp(prefix="moescope-offload-", dir=spread.offload_folder)
    try:
        device_map = spread.device_map if isinstance(spread.device_map, str) else dict(spread.device_map)
        body = _load_weights(folder, config, dtype=dtype, device_map=device_map, offload_folder=offloaded)
    except BaseException:
        shutil.rmtree(offloaded, ignore_errors=True)
        raise
    return body, weakref.finalize(body, shutil.rmtree, offloaded, ignore_errors=True)


def _load_weights(folder: Path, config: Any, **options: Any) -> Any:
    try:
        body, loading = transformers.AutoModel.from_pretrained(
            folder, config=config, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:  # whatever a damaged file makes three libraries raise
        hint = "does the device map name every module?" if "device_map" in options else None
        raise ModelDamaged(folder, f"its weights cannot be loaded: {error}", hint) from error
    lacking = sorted({*loading["missing_keys"], *(str(key) for key in loading.get("mismatched_keys", ()))})
    if lacking:  # transformers would go on with random values
        raise ModelDamaged(folder, f"{len(lacking)} tensors are missing or misshapen, such as {lacking[0]}")
    return body.eval()


def _num_layers(config: Any) -> int | None:
    number = getattr(_text_config(config), "num_hidden_layers", None)
    return number if isinstance(number, int) else None


def _text_config(config: Any) -> Any:
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and notes with which transformers loads."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
