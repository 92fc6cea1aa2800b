"""LoRA and prefix parameters, through peft."""

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from addax_ds.adapters.files import CONFIG, WEIGHTS, another_backbone, read_adapter_config, whole_backbone_digest
from addax_ds.config import LoraConfig, PrefixConfig
from addax_ds.core.shard import Shard
from addax_ds.errors import UserError

_PREFIX = "prompt_encoder.default.embedding.weight"
_DIGEST = "backbone_digest"
# Settings of peft that do not say what loaded adapters compute.
_OF_NO_EFFECT = {
    *("base_model_name_or_path", "inference_mode", "init_lora_weights", "peft_version", "revision"),
    *("auto_mapping", "lora_dropout", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "runtime_config"),
    "task_type",
}


def add(model: nn.Module, config: LoraConfig | PrefixConfig) -> nn.Module:
    """The model with new parameters, everything else frozen; draws from torch's generator.

    LoRA begins as nothing, a prefix as the keys and values of random words (Malladi et al., 2023).
    """
    peft = _peft()
    if isinstance(config, PrefixConfig):
        return _with_prefix(model, _keys_and_values(model, config.tokens))
    modules = list(config.modules) if config.modules else None
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=config.rank, lora_alpha=config.alpha, target_modules=modules)
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"adapter: {error}") from None


def _with_prefix(model: nn.Module, words: torch.Tensor) -> nn.Module:
    """words: keys and values [tokens, layers * 2 * heads * head size], as peft orders them."""
    peft = _peft()
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(words))
    try:
        wrapped = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"adapter: {error}") from None
    embedding = wrapped.get_parameter(_PREFIX)
    if embedding.shape != words.shape:
        raise UserError(
            f"this prefix does not fit {type(model).__name__}: it needs {embedding.shape[1]} numbers a token"
        )
    embedding.data.copy_(words)
    if "position_ids" in inspect.signature(model.forward).parameters:
        model.register_forward_pre_hook(_count_positions, with_kwargs=True)
    return wrapped


def _count_positions(_: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Positions of the words behind a prefix, of which peft's forward gives none: padding, wherever it stands, is not
    counted. attention_mask: of prefix and words."""
    if (mask := inputs.get("attention_mask")) is not None:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        inputs = {**inputs, "position_ids": positions[:, -inputs["input_ids"].shape[1] :]}
    return args, inputs


@torch.no_grad()
def _keys_and_values(model: Any, tokens: int) -> torch.Tensor:
    """What attention keeps of random words."""
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, tokens))
    cache = model(input_ids=ids, use_cache=True).past_key_values
    parts = [part[0] for layer in cache.layers for part in (layer.keys, layer.values)]  # [heads, tokens, size]
    return torch.stack(parts).permute(2, 0, 1, 3).reshape(tokens, -1)


def backbone(model: Any, shards: Iterable[Shard]) -> Iterator[Shard]:
    """Those shards that are not of adapters, as `files.backbone` gives them for adapters of our own."""
    prefix = "base_model." if _settings(model).peft_type == "PREFIX_TUNING" else "base_model.model."
    for shard in shards:
        if not shard.name.startswith("prompt_encoder.") and ".lora_" not in shard.name:
            name = shard.name.removeprefix(prefix).replace(".base_layer.", ".")
            yield Shard(name, shard.numel, shard.start, shard.local.bfloat16())


def write(folder: Path, skeleton: Any, weights: dict[str, torch.Tensor], base_model: str, digest: str) -> None:
    """Write adapters as `PeftModel.from_pretrained` reads them. weights: all that are trained, whole; digest: of the
    backbone, kept where peft does not look."""
    settings = _settings(skeleton)
    kept = _stored(skeleton, weights)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in kept.items()}
    save_file(contiguous, folder / WEIGHTS, {"format": "pt", _DIGEST: digest})
    settings.base_model_name_or_path, settings.inference_mode = base_model, True
    settings.save_pretrained(folder)


def load(model: nn.Module, config: LoraConfig | PrefixConfig, folder: Path) -> nn.Module:
    """The model with the adapters of a folder, to be trained or evaluated; draws from torch's generator.

    Nothing in the folder is followed: its tensors go into adapters of `config`. Raises `UserError`
    where it holds others, or another backbone's, or damaged ones.
    """
    there = read_adapter_config(folder)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            digest = (file.metadata() or {}).get(_DIGEST)
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read ({error}): restore it") from None
    if digest not in (None, whole_backbone_digest(model)):  # none where peft itself has written them
        raise UserError(another_backbone(folder, there.get("base_model_name_or_path")))
    wrapped: Any = add(model, config)
    _check_settings(there, _settings(wrapped).to_dict(), folder)
    trained = {name: p.detach() for name, p in wrapped.named_parameters() if p.requires_grad}
    own = _stored(wrapped, trained)
    if {name: p.shape for name, p in own.items()} != {name: tensor.shape for name, tensor in tensors.items()}:
        raise UserError(f"{folder / WEIGHTS} does not hold the weights that {CONFIG} describes: restore both")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return wrapped


def _stored(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Trained weights under the names that peft stores them by."""
    if _PREFIX in weights:
        return {"prompt_embeddings": weights[_PREFIX]}
    return _peft().get_peft_model_state_dict(model, state_dict=weights)


def _settings(model: Any) -> Any:
    return model.peft_config["default"]


def _check_settings(there: dict[str, Any], here: dict[str, Any], folder: Path) -> None:
    """Raises `UserError` where adapters of the settings `there` compute otherwise than those of `here`."""
    for name in sorted(there.keys() - _OF_NO_EFFECT):
        value, own = (_comparable(settings.get(name)) for settings in (there, here))
        if value != own:
            raise UserError(
                f"{folder / CONFIG}: {name} is {value!r:.100}, and adapters of this run have {own!r:.100}: set adapter "
                "to theirs"
            )


def _comparable(value: Any) -> Any:
    """A setting as JSON has it, without order where it names modules, and nothing for what is off."""
    if isinstance(value, list | set | tuple):
        return sorted(map(str, value)) or None
    return getattr(value, "value", value) or None


def _peft() -> Any:
    # Imported here: an extra, and its import takes seconds.
    try:
        import peft
    except ImportError:
        raise UserError("lora and prefix need peft: pip install 'addax-ds[train]'") from None
    return peft
