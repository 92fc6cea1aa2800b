"""From the names in a run to a model on its engine."""

import dataclasses
import inspect
import json
import logging
import os.path
import pickle
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from addax_ds.adapters.choose import adapt
from addax_ds.config import AddaxConfig, RunConfig
from addax_ds.core.scratch import aligned
from addax_ds.data.embedded import EMBEDDED_MODELS, prepare_model
from addax_ds.engines.cpu_op import build_cpu_op
from addax_ds.engines.fsdp import shard
from addax_ds.errors import UserError
from addax_ds.optimizer import Addax
from addax_ds.training.world import World

if TYPE_CHECKING:
    from addax_ds.engines.deepspeed_plugin import DeepSpeedAddax

Optimizer: TypeAlias = "Addax | DeepSpeedAddax"
"""What a run steps and evaluates with."""

# Types that AutoModelForCausalLM loads though they attend both ways.
ENCODERS = ("bert", "roberta", "electra", "camembert", "xlm-roberta", "xlm-roberta-xl", "megatron-bert", "roformer")


def locate_model(model: str) -> str:
    """The folder or hub id behind `model`; embedded models are fetched on first use."""
    if model in EMBEDDED_MODELS:
        return str(prepare_model(model))
    if os.path.isdir(model):  # False for a name that no file can have, too
        return model
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(
            f"{model}: no such folder: give a model folder, a hub id or one of {', '.join(EMBEDDED_MODELS)}"
        )
    return model


def load_tokenizer(location: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a token to pad with."""
    tokenizer = _from_pretrained(AutoTokenizer, location)
    if tokenizer.pad_token_id is None:
        # Padding is masked out everywhere, so any token serves.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    try:
        tokenizer("a word")
    except Exception as error:  # of settings that are looked at with the first text alone
        raise _odd(location, error) from None
    return tokenizer


def context_length(location: str) -> int:
    """Longest sequence in tokens that the model takes."""
    config = _from_pretrained(AutoConfig, location)
    return int(getattr(config, "max_position_embeddings", None) or 2**31 - 1)


def load_model(location: str, config: RunConfig) -> nn.Module:
    """The model in the run's dtype, on the CPU, with the run's adapters."""
    transformers_logging.disable_progress_bar()  # one bar a rank would garble the terminal
    dtype = getattr(torch, config.dtype)
    _check_stays_inside(location)
    for attention in _attentions(_from_pretrained(AutoConfig, location)):
        if "/" in attention:  # a kernel of the hub: code that is downloaded and run
            raise UserError(f"model {location}: its config.json has attention from {attention}: remove that setting")
    model, loaded = _from_pretrained(AutoModelForCausalLM, location, dtype=dtype, output_loading_info=True)
    if loaded["missing_keys"]:
        # They would be random numbers, with a warning that scrolls by.
        raise UserError(f"model {location} lacks weights ({min(loaded['missing_keys'])}): give a complete causal model")
    if model.config.model_type in ENCODERS and not getattr(model.config, "is_decoder", False):
        raise UserError(f"model {location} is an encoder, which sees the answer it is to predict: give a decoder")
    if config.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(f"{type(model).__name__} cannot checkpoint activations: set activation_checkpointing=false")
        checkpoint_activations(model)
    if config.adapter is not None:
        return adapt(model, config.adapter, config.adapter_weights, config.seed)
    return model


def _check_stays_inside(location: str) -> None:
    """Raises `UserError` where an index of weights, or adapters, lead out of the model's folder."""
    if (Path(location) / "adapter_config.json").exists():
        raise UserError(f"model {location} holds adapters: give their backbone, and the folder as adapter_weights")
    for index in sorted(Path(location).glob("*.index.json")):
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
            leading_out = sorted(name for name in names if Path(name).is_absolute() or ".." in Path(name).parts)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(f"model {location}: {index.name} is damaged: restore it") from None
        if leading_out:
            raise UserError(f"model {location}: {index.name} leads out of the folder, to {leading_out[0]}: mend it")


def _attentions(config: Any) -> Iterator[str]:
    """The implementations of attention that a model's configuration and its parts ask for."""
    yield str(config._attn_implementation)
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _attentions(part)


def checkpoint_activations(model: Any) -> None:
    """Have a model of transformers keep one hidden state per block for the backward, and recompute the rest."""
    # Renamed in the middle of transformers 5.
    renamed = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _from_pretrained(kind: Any, location: str, **options: Any) -> Any:
    try:
        # Code that comes with a model is never run, and nobody is asked whether it may.
        return kind.from_pretrained(location, trust_remote_code=False, **options)
    except (pickle.UnpicklingError, EOFError):
        raise UserError(
            f"model {location} cannot be loaded: its weights are a pickle that is damaged or holds more than tensors, "
            "which is never read: give safetensors"
        ) from None
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model {location} cannot be loaded: {first_line}") from None
    except Exception as error:  # the libraries take what stands in a model's JSON files on trust
        raise _odd(location, error) from None


def _odd(location: str, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {textwrap.shorten(str(error), 200, placeholder='...')}"
    return UserError(
        f"model {location} cannot be loaded, one of its JSON files is odd or damaged ({reason}): restore it"
    )


def accepted(model: nn.Module) -> frozenset[str]:
    """Names of the inputs that the model's forward takes."""
    if not hasattr(model, "get_base_model"):
        return frozenset(inspect.signature(model.forward).parameters)
    # peft's forward takes anything, and counts positions itself behind a prefix.
    names = frozenset(inspect.signature(model.get_base_model().forward).parameters)  # type: ignore[operator]
    return names - {"position_ids"} if hasattr(model, "prompt_encoder") else names


def read_ds_config(config: RunConfig) -> dict[str, Any]:
    """The run's DeepSpeed configuration, with the run's hyper-parameters for Addax and its dtype."""
    path = config.ds_config or ""
    try:
        ds_config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"ds_config {path}: {error.strerror}: give the path of a DeepSpeed configuration") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"ds_config {path}: not JSON: {error}") from None
    if not isinstance(ds_config, dict):
        raise UserError(f"ds_config {path}: a DeepSpeed configuration is an object in braces")
    for key in ("optimizer", "bf16", "fp16", "zero_optimization"):
        if not isinstance(ds_config.get(key, {}), dict):
            raise UserError(f"ds_config {path}: {key} is {ds_config[key]!r}: it must be an object in braces")
    kind = ds_config.get("optimizer", {}).get("type", "Addax")
    if kind != "Addax":
        raise UserError(f'ds_config {path}: optimizer type is {kind}: set it to "Addax" or remove it')
    if "scheduler" in ds_config:
        raise UserError(f"ds_config {path}: a run has its own schedule: remove scheduler, set schedule")
    if ds_config.get("fp16", {}).get("enabled"):
        raise UserError(f"ds_config {path}: fp16 would need a loss scale: use bf16, with dtype=bfloat16")
    wants_bf16 = bool(ds_config.get("bf16", {}).get("enabled", config.dtype == "bfloat16"))
    if wants_bf16 != (config.dtype == "bfloat16"):
        raise UserError(f"ds_config {path}: bf16.enabled is {wants_bf16} but dtype is {config.dtype}: make them agree")
    return {
        **ds_config,
        "optimizer": {"type": "Addax", "params": hyperparameters(config)},
        "bf16": {"enabled": wants_bf16},
    }


def hyperparameters(config: RunConfig) -> dict[str, Any]:
    """The settings of the method alone."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(AddaxConfig)}


def build_optimizer(model: nn.Module, config: RunConfig, world: World) -> Optimizer:
    """Put the model on the run's engine and return its optimizer."""
    if config.engine == "deepspeed":
        # Imported here: DeepSpeed is an extra, and its import takes seconds.
        try:
            import deepspeed
        except ImportError:
            raise UserError("engine: deepspeed needs DeepSpeed: pip install 'addax-ds[deepspeed]'") from None
        deepspeed.utils.logger.setLevel(logging.WARNING)
        ds_config = read_ds_config(config)
        if world.local_rank == 0:
            build_cpu_op()
        dist.barrier()
        # Its faults come as assertions and validation errors, told from a crash only here.
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        try:
            deepspeed.DeepSpeedConfig(ds_config)
        except Exception as error:
            raise UserError(f"ds_config {config.ds_config}: DeepSpeed does not take it: {error}") from None
        _, optimizer, _, _ = deepspeed.initialize(model=model, config=ds_config)
        return optimizer
    if config.engine == "fsdp":
        if world.size % config.replicas:
            raise UserError(f"replicas={config.replicas} does not divide the {world.size} ranks: choose a divisor")
        shape: tuple[int, ...] = (world.size,)
        names: tuple[str, ...] = ("shard",)
        if config.replicas > 1:
            shape, names = (config.replicas, world.size // config.replicas), ("replicate", "shard")
        shard(model, init_device_mesh(world.device.type, shape, mesh_dim_names=names))
    else:
        model.to(world.device)
        for parameter in model.parameters():  # out of the file that is mapped, at which each guest would copy them
            parameter.data = aligned(parameter.data)
    return Addax(model, **hyperparameters(config))
