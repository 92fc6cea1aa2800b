"""From the names in a run to a model on its engine."""

import dataclasses
import inspect
import json
import logging
import math
import os
import pickle
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from addax_ds.adapters.choose import adapt
from addax_ds.baselines import Baseline, DeepSpeedBaseline, TorchBaseline
from addax_ds.config import BASELINES, AddaxConfig, RunConfig
from addax_ds.core.scratch import aligned
from addax_ds.core.skeleton import strip
from addax_ds.data.embedded import EMBEDDED_MODELS, prepare_model
from addax_ds.engines.base import Engine
from addax_ds.engines.choose import choose_engine
from addax_ds.engines.fsdp import shards_of, wrap
from addax_ds.engines.ops import ADAM, COLLECTIVES, build_op
from addax_ds.engines.replicated import Replicated
from addax_ds.errors import UserError
from addax_ds.optimizer import Addax
from addax_ds.training.loading import NOTHING, Unread, by_name, fill, may_stay_in_files, open_weights
from addax_ds.training.world import World

if TYPE_CHECKING:
    from addax_ds.engines.deepspeed_plugin import DeepSpeedAddax

Optimizer: TypeAlias = "Addax | DeepSpeedAddax | Baseline"
"""What a run steps and evaluates with."""

_OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}  # DeepSpeed's names

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
    return _adapted(_loaded(location, config), config)


def open_model(location: str, config: RunConfig) -> tuple[nn.Module, Unread]:
    """The same for `build_optimizer`, its weights left in their files where the run allows it."""
    quantized = hasattr(_from_pretrained(AutoConfig, location), "quantization_config")
    ds_config = read_ds_config(config) if config.engine == "deepspeed" else {}
    if not quantized and may_stay_in_files(config, ds_config):
        opened = open_weights(location, partial(_loaded, location, config))
        if opened is not None:
            model, places = opened
            model = _adapted(model, config)
            return model, by_name(model, places)
    return load_model(location, config), NOTHING


def _loaded(location: str, config: RunConfig, **options: Any) -> Any:
    """The model without adapters, checked."""
    transformers_logging.disable_progress_bar()  # one bar a rank would garble the terminal
    dtype = getattr(torch, config.weights_dtype)
    _check_stays_inside(location)
    for attention in _attentions(_from_pretrained(AutoConfig, location)):
        if "/" in attention:  # a kernel of the hub: code that is downloaded and run
            raise UserError(f"model {location}: its config.json has attention from {attention}: remove that setting")
    model, loaded = _from_pretrained(AutoModelForCausalLM, location, dtype=dtype, output_loading_info=True, **options)
    if loaded["missing_keys"]:
        # They would be random numbers, with a warning that scrolls by.
        raise UserError(f"model {location} lacks weights ({min(loaded['missing_keys'])}): give a complete causal model")
    if model.config.model_type in ENCODERS and not getattr(model.config, "is_decoder", False):
        raise UserError(f"model {location} is an encoder, which sees the answer it is to predict: give a decoder")
    if config.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(f"{type(model).__name__} cannot checkpoint activations: set activation_checkpointing=false")
        checkpoint_activations(model)
    return model


def _adapted(model: nn.Module, config: RunConfig) -> nn.Module:
    if config.adapter is None:
        return model
    return adapt(model, config.adapter, config.adapter_weights, config.seed)


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
    # peft's forward takes anything but positions behind a prefix, which the adapter counts.
    names = frozenset(inspect.signature(model.get_base_model().forward).parameters)  # type: ignore[operator]
    return names - {"position_ids"} if hasattr(model, "prompt_encoder") else names


def read_ds_config(config: RunConfig, optimizer: str = "Addax") -> dict[str, Any]:
    """The run's DeepSpeed configuration, with the run's hyper-parameters for an optimizer and its dtype."""
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
    # A configuration for Addax serves its baselines, too.
    fitting = _OPTIMIZERS.get(config.method_name, "Addax")
    kind = ds_config.get("optimizer", {}).get("type", "Addax")
    if kind not in ("Addax", fitting):
        raise UserError(f'ds_config {path}: optimizer type is {kind}: set it to "{fitting}" or remove it')
    if "scheduler" in ds_config:
        raise UserError(f"ds_config {path}: a run has its own schedule: remove scheduler, set schedule")
    if ds_config.get("fp16", {}).get("enabled"):
        raise UserError(f"ds_config {path}: fp16 would need a loss scale: use bf16, with dtype=bfloat16")
    wants_bf16 = bool(ds_config.get("bf16", {}).get("enabled", config.dtype == "bfloat16"))
    if wants_bf16 != (config.dtype == "bfloat16"):
        raise UserError(f"ds_config {path}: bf16.enabled is {wants_bf16} but dtype is {config.dtype}: make them agree")
    # DeepSpeed would cast adapters with their backbone, beside which they are trained in float32.
    ds_config["bf16"] = {**ds_config.get("bf16", {}), "enabled": wants_bf16 and config.adapter is None}
    if optimizer == "Addax":
        return {**ds_config, "optimizer": {"type": optimizer, "params": hyperparameters(config)}}
    ds_config.pop("train_batch_size", None)  # which follows from what is set here
    rates = {"lr": config.lr, "weight_decay": config.weight_decay}
    if optimizer == "SGD":
        rates["momentum"] = config.momentum
    # What a run has no name for, such as betas, is the configuration's.
    own = ds_config.get("optimizer", {}).get("params", {}) if kind == optimizer else {}
    return {
        **ds_config,
        "optimizer": {"type": optimizer, "params": {**own, **rates}},
        "gradient_clipping": config.max_grad_norm,
        "train_micro_batch_size_per_gpu": config.fo_micro_batch,
        "zero_allow_untested_optimizer": True,
    }


def hyperparameters(config: RunConfig) -> dict[str, Any]:
    """The settings of the method alone."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(AddaxConfig)}


def build_optimizer(model: nn.Module, config: RunConfig, world: World, unread: Unread = NOTHING) -> Optimizer:
    """Put the model on the run's engine, read what is `unread`, and return the optimizer of its method."""
    if config.method is None or config.method not in BASELINES:
        return build_addax(model, config, world, unread)
    common = {
        **{"fo_micro_batch": config.fo_micro_batch, "seed": config.seed, "with_dropout": config.dropout},
        "atomic": config.atomic,
    }
    if config.engine == "deepspeed":
        skeleton = strip(model)
        rounds = math.ceil(math.ceil(config.k1 / config.fo_micro_batch) / world.size)
        ds_config = {**read_ds_config(config, _OPTIMIZERS[config.method]), "gradient_accumulation_steps": rounds}
        made = _initialize_deepspeed(model, ds_config, config, world, unread)
        return DeepSpeedBaseline(_held_by_deepspeed(made, skeleton), made, rounds, **common)
    computes_in_bfloat16 = config.dtype != config.weights_dtype
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    _place(model, config, world, unread, **({"mp_policy": policy} if computes_in_bfloat16 else {}))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if config.method == "sgd":
        # One weight after the other, and AdamW in one kernel: all at once would hold a further copy of them on a GPU.
        optimizer = torch.optim.SGD(
            parameters, config.lr, config.momentum, weight_decay=config.weight_decay, foreach=False
        )
    else:
        fused = world.device.type == "cuda"
        optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay, fused=fused)
    autocast = computes_in_bfloat16 and config.engine == "replicated"
    return TorchBaseline(choose_engine(model), optimizer, config.max_grad_norm, autocast, **common)


def build_addax(
    model: nn.Module, config: RunConfig, world: World, unread: Unread = NOTHING
) -> "Addax | DeepSpeedAddax":
    """Put the model on the run's engine and return Addax, which also scores what others have trained."""
    if config.engine == "deepspeed":
        return _initialize_deepspeed(model, read_ds_config(config), config, world, unread).optimizer
    _place(model, config, world, unread)
    return Addax(model, **hyperparameters(config))


def _place(model: nn.Module, config: RunConfig, world: World, unread: Unread, **options: Any) -> None:
    """Shard the model and read what is unread, or move it to the device."""
    if config.engine == "fsdp":
        if world.size % config.replicas:
            raise UserError(f"replicas={config.replicas} does not divide the {world.size} ranks: choose a divisor")
        shape: tuple[int, ...] = (world.size,)
        names: tuple[str, ...] = ("shard",)
        if config.replicas > 1:
            shape, names = (config.replicas, world.size // config.replicas), ("replicate", "shard")
        if config.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
        wrap(model, init_device_mesh(world.device.type, shape, mesh_dim_names=names), **options)
        fill(shards_of(model), unread)
        return
    model.to(world.device)
    for parameter in model.parameters():  # out of the file that is mapped, at which each guest would copy them
        parameter.data = aligned(parameter.data)


def _initialize_deepspeed(
    model: nn.Module, ds_config: dict[str, Any], config: RunConfig, world: World, unread: Unread
) -> Any:
    """The DeepSpeed engine around the model."""
    # Imported here: DeepSpeed is an extra, and its import takes seconds.
    try:
        import deepspeed
    except ImportError:
        raise UserError("engine: deepspeed needs DeepSpeed: pip install 'addax-ds[deepspeed]'") from None
    deepspeed.utils.logger.setLevel(logging.WARNING)
    optimizer = ds_config["optimizer"]
    fused = optimizer["type"] == "AdamW" and not optimizer["params"].get("torch_adam")
    for name in (COLLECTIVES, ADAM)[: 1 + fused] if world.local_rank == 0 else ():
        try:
            build_op(name)
        except Exception as error:  # of compilers, of what looks for them, of what loads the result
            hint = ": install its compiler, or have optimizer.params.torch_adam in ds_config" if name == ADAM else ""
            raise UserError(f"DeepSpeed's {name.removesuffix('Builder')} cannot be built ({error}){hint}") from None
    dist.barrier()
    # On CPUs its sum of inference, which nothing here calls, would leave 69 MB of shared memory behind for each rank.
    os.environ.pop("LOCAL_SIZE", None)
    # Its faults come as assertions and validation errors, told from a crash only here.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    try:
        deepspeed.DeepSpeedConfig(ds_config)
    except Exception as error:
        raise UserError(f"ds_config {config.ds_config}: DeepSpeed does not take it: {error}") from None
    if unread:
        from addax_ds.engines import zero3, zero_init

        zero_init.partition(model, ds_config)
        fill(zero3.shards_of(model), unread)
    engine, _, _, _ = deepspeed.initialize(model=model, config=ds_config)
    return engine


def _held_by_deepspeed(made: Any, skeleton: nn.Module) -> Engine:
    """What holds the weights of a DeepSpeed engine with an optimizer of its own."""
    if made.zero_optimization_stage() == 3:
        from addax_ds.engines.zero3 import Zero3

        return Zero3(made.module, skeleton, made.optimizer.parameter_offload, made.device)
    held = Replicated(made.module, skeleton)
    held.name = f"zero{int(made.zero_optimization_stage())}"
    return held
