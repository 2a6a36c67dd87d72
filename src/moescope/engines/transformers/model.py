"""A model ready to be recorded: its body without the head, the experts of its layers, and what a header says of it."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging

from moescope.engines.options import EngineOptions
from moescope.engines.transformers.batches import Batching
from moescope.engines.transformers.faults import (
    check_choices,
    check_layers,
    checkpoint_errors,
    refuse_stand_ins,
    refuse_wrapped,
)
from moescope.engines.transformers.hooks import RouterWatch
from moescope.engines.transformers.lookahead import Lookahead, check_distances, find_lookahead
from moescope.engines.transformers.provenance import (
    checkpoint_fingerprint,
    describe_body,
    describe_layer,
    tensors_fingerprint,
)
from moescope.engines.transformers.routers import (
    Experts,
    find_experts,
    find_left_out,
    given_experts,
    num_layers,
    select_experts,
    text_config,
    text_tower,
)
from moescope.engines.transformers.tokenizer import Tokenizer
from moescope.errors import ModelDamaged, ModelNotFound, ModelUnsupported
from moescope.trace import Layer


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
        device: torch.device = next(self.body.parameters()).device
        if device.type == "meta":
            places = (getattr(hook, "execution_device", None) for _, hook in accelerate_hooks(self.body))
            device = torch.device(next((place for place in places if place is not None), "cpu"))
        return device

    @property
    def text_config(self) -> Any:
        """Its configuration, of what reads text; None if it has none."""
        return text_config(getattr(self.body, "config", None))

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the model was made for, if it says so."""
        limit = getattr(self.text_config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @property
    def looks_ahead(self) -> bool:
        """Whether a token's choices may depend on later ones, so that padding after it must be masked.

        In a causal model it need not, and attention without a mask is up to twice as fast.
        """
        return any(getattr(module, "is_causal", True) is False for module in self.body.modules())

    def masks_blocks(self, window: int) -> bool:
        """Whether torch, on a CPU, would compute attention that a mask then throws away: beyond a sliding window."""
        config = self.text_config
        reach = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        return (
            isinstance(reach, int)
            and reach < window
            and self.device.type == "cpu"
            and getattr(config, "_attn_implementation", None) == "sdpa"
        )

    @property
    def batching(self) -> Batching:
        """Which windows may go through the model together without a change of a choice: the strictest of its layers."""
        kinds = {experts.batching for experts in self.experts}
        return "alone" if "alone" in kinds else "equal" if "equal" in kinds else "padded"

    @property
    def num_embeddings(self) -> int | None:
        """Token ids that the model knows, if it says so."""
        if not hasattr(self.body, "get_input_embeddings"):
            return None
        return int(self.body.get_input_embeddings().weight.shape[0])


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of which only the weights have not been read.

    Attributes:
        folder: Where it lies.
        name: What a trace calls it.
        config: The configuration of the part that reads text.
        tokenizer: Its tokenizer.
        kind: The class of transformers that builds that part.
        renamed: Names of weights in the files that the class calls otherwise, as patterns.
        elsewhere: Routed blocks in the parts that are not built.
    """

    folder: Path
    name: str
    config: Any
    tokenizer: Tokenizer
    kind: Any = transformers.AutoModel
    renamed: dict[str, str] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()


def load_model(path: Path | str, options: EngineOptions) -> Model:
    """Load a checkpoint; everything that can be refused is refused before its weights are read.

    Args:
        path: Folder of a checkpoint, or the name of one in the local Hugging Face cache. Nothing is downloaded.
        options: How it is loaded; a device map needs an offload folder.
    Raises:
        ModelNotFound: There is no checkpoint.
        ModelDamaged: Its configuration or weights cannot be read, or lack a tensor.
        TokenizerMissing: It has no tokenizer.
        ModelNotMoE: It has no routed experts.
        ModelUnsupported: It has some whose routing cannot be read exactly.
        NoSuchLayer: A layer asked for has no routed experts, or no two are as far apart as is to be looked ahead.
    """
    checkpoint = open_checkpoint(path, options)
    with quiet():
        if options.device_map is not None:
            whole, remove = _load_spread(checkpoint, options)
        else:
            whole, remove = _load_weights(checkpoint, options).to(find_device(options.device)), None
    body = text_tower(whole)
    experts = find_experts(body, checkpoint.name, block=options.block)
    left_out = (*find_left_out(whole, experts), *checkpoint.elsewhere)
    fingerprint = checkpoint_fingerprint(checkpoint.folder)
    model = describe(body, checkpoint.tokenizer, experts, options.layers, checkpoint.name, fingerprint, left_out)
    return model if remove is None else replace(model, remove_offloaded=remove)


def open_checkpoint(path: Path | str, options: EngineOptions) -> Checkpoint:
    """Find a checkpoint, and refuse what can be refused before its weights are read; as `load_model`."""
    folder = find_checkpoint(path)
    with quiet():
        config = _load_config(folder, options.trust_remote_code)
        kind, config, renamed, elsewhere = _how_to_build(config)
        check_layers(config, path)
        with checkpoint_errors(folder, "its model cannot be built"), torch.device("meta"):
            skeleton = text_tower(_build(kind, config, path, options.trust_remote_code))
            experts = find_experts(skeleton, path, block=options.block)
        experts = select_experts(experts, options.layers, num_layers(config), path)
        check_choices(config, max(block.num_experts + block.num_null_experts for block in experts), path)
        check_distances(options.lookahead, len(experts), path)
        tokenizer = Tokenizer.load(folder, trust_remote_code=options.trust_remote_code)
    name = folder.resolve().name if Path(path).is_dir() else str(path)
    return Checkpoint(folder, name, config, tokenizer, kind, renamed, elsewhere)


def adopt_model(model: Any, tokenizer: Any, options: EngineOptions) -> Model:
    """Take a model and a tokenizer that the caller has loaded; both are left as they are.

    Args:
        model: A model of transformers; with routers in the options, any module that is called with ``input_ids``.
        tokenizer: A tokenizer of transformers.
        options: What is read of it.
    Raises:
        ValueError: A router is not in the model.
        MoescopeError: As `load_model`.
    """
    name = Path(str(getattr(model, "name_or_path", "") or type(model).__name__)).name
    if options.routers is not None:
        body, experts = model, given_experts(model, options.routers)
        left_out: tuple[str, ...] = ()
    else:
        body = text_tower(model.base_model)
        experts = find_experts(body, name, block=options.block)
        left_out = find_left_out(model.base_model, experts)
    return describe(body, Tokenizer(tokenizer), experts, options.layers, name, tensors_fingerprint(body), left_out)


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
        refuse_stand_ins(folder)
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


def probe(model: Model) -> tuple[tuple[Layer, ...], int | None]:
    """Run a few tokens through the model, to see that every layer is read and how many experts a token gets.

    Returns:
        The layers as a trace describes them, and the layer after which a forward pass may stop: the last to choose.
    """
    folder = Path(getattr(model.body, "name_or_path", None) or model.description["name"])
    boundary = checkpoint_errors(folder, "its first forward pass fails")
    with boundary, weights_put_back(model), RouterWatch(model.experts) as watch:
        choices = watch.run(model.body, _a_few_tokens(model))
    layers = tuple(describe_layer(experts, choices[experts.layer].expert_ids.shape[1]) for experts in model.experts)
    return layers, list(choices)[-1]


def probe_lookahead(model: Model, distances: Sequence[int]) -> Lookahead | None:
    """Run a few tokens through the model, to see that its routers can be asked earlier; None for no distances.

    Raises:
        NoSuchLayer: No two layers are so far apart.
        ModelUnsupported: A router cannot be asked.
    """
    name = model.description["name"]
    distances = check_distances(distances, len(model.experts), name)
    if not distances:
        return None
    with weights_put_back(model):
        return find_lookahead(model.body, model.experts, distances, _a_few_tokens(model), name)


def _a_few_tokens(model: Model) -> dict[str, torch.Tensor]:
    ids = torch.arange(4, device=model.device).remainder(model.num_embeddings or 2)
    return {"input_ids": ids.unsqueeze(0)}


def accelerate_hooks(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The hooks by which accelerate moves weights and inputs, each with its module."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for single in getattr(hook, "hooks", (hook,)):  # a SequentialHook holds several
            if single is not None:
                yield module, single


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
    configs = {id(config): config for block in model.experts if (config := getattr(block.module, "config", None))}
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


def describe(
    body: Any,
    tokenizer: Tokenizer,
    experts: Sequence[Experts],
    layers: Sequence[int] | None,
    name: str,
    fingerprint: str,
    left_out: Sequence[str] = (),
) -> Model:
    """A model ready to be recorded, from its body, which need not be loaded yet."""
    selected = select_experts(experts, layers, num_layers(getattr(body, "config", None)), name)
    for message in dict.fromkeys(block.warning for block in selected if block.warning):
        warnings.warn(f"{name}: {message}", stacklevel=2)
    description = describe_body(body, selected, name, fingerprint, left_out)
    return Model(body, tokenizer, selected, description)


def _load_config(folder: Path, trust_remote_code: bool) -> Any:
    if trust_remote_code and (code := sorted(path.name for path in folder.glob("*.py"))):
        warnings.warn(f"{folder}: code of the checkpoint runs: {', '.join(code)}", stacklevel=2)
    try:
        return transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        if (family := _unknown_family(folder)) is not None:
            raise ModelUnsupported(
                folder,
                f"its family {family!r} is unknown to transformers {transformers.__version__}"
                + (f", and its own code fails: {error}" if trust_remote_code else ""),
                "a newer transformers may know it; code that a checkpoint brings is run only with --trust-remote-code",
            ) from error
        with checkpoint_errors(folder, "its config.json cannot be read"):
            raise


def _how_to_build(config: Any) -> tuple[Any, Any, dict[str, str], tuple[str, ...]]:
    """How the part that reads text is built: class, configuration, renamed weights; and routed blocks elsewhere."""
    if config.model_type == "qwen3_omni_moe":  # transformers has no headless model of the whole
        renamed = {r"^thinker\.model\.": "language_model.", r"^thinker\.": ""}
        return transformers.AutoModel, config.thinker_config, renamed, ("talker.model.layers.*.mlp.experts",)
    own = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in own and "AutoModel" not in own and type(config) not in transformers.MODEL_MAPPING:
        return transformers.AutoModelForCausalLM, config, {}, ()
    return transformers.AutoModel, config, {}, ()


def _build(kind: Any, config: Any, path: Path | str, trust_remote_code: bool) -> Any:
    """The model without weights, and without its head if it has one."""
    try:
        return kind.from_config(config, trust_remote_code=trust_remote_code).base_model
    except Exception as error:
        if not trust_remote_code and getattr(config, "auto_map", None) is None:
            raise
        raise ModelUnsupported(
            path,
            f"its model cannot be built: {error}",
            None if trust_remote_code else "code that a checkpoint brings is run only with --trust-remote-code",
        ) from error


def _unknown_family(folder: Path) -> str | None:
    try:
        family = json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (ValueError, AttributeError):
        return None
    return str(family) if family not in transformers.CONFIG_MAPPING else None


def _load_spread(checkpoint: Checkpoint, options: EngineOptions) -> tuple[Any, Callable[[], object]]:
    """The model, and what removes the folder with its offloaded weights, which is gone with the model at the latest."""
    assert options.offload_folder is not None
    options.offload_folder.mkdir(parents=True, exist_ok=True)
    offloaded = tempfile.mkdtemp(prefix="moescope-offload-", dir=options.offload_folder)
    try:
        given = options.device_map
        device_map = dict(given) if isinstance(given, Mapping) else given
        body = _load_weights(checkpoint, options, device_map=device_map, offload_folder=offloaded)
    except BaseException:
        shutil.rmtree(offloaded, ignore_errors=True)
        raise
    return body, weakref.finalize(body, shutil.rmtree, offloaded, ignore_errors=True)


def _load_weights(checkpoint: Checkpoint, options: EngineOptions, **placement: Any) -> Any:
    folder = checkpoint.folder
    try:
        body, loading = checkpoint.kind.from_pretrained(
            folder,
            config=checkpoint.config,
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=options.trust_remote_code,
            key_mapping=checkpoint.renamed or None,
            dtype=options.dtype,
            **placement,
        )
    except Exception as error:  # whatever a damaged file makes three libraries raise
        hint = "does the device map name every module?" if placement else None
        raise ModelDamaged(folder, f"its weights cannot be loaded: {error}", hint) from error
    refuse_wrapped(folder, sorted(map(str, loading["unexpected_keys"])) if loading["missing_keys"] else [])
    lacking = sorted({*loading["missing_keys"], *(str(key) for key in loading.get("mismatched_keys", ()))})
    if lacking:  # transformers would go on with random values
        raise ModelDamaged(folder, f"{len(lacking)} tensors are missing or misshapen, such as {lacking[0]}")
    return body.base_model.eval()


@contextmanager
def quiet() -> Iterator[None]:
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
