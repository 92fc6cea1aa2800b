"""LoRA and prefix parameters, through peft."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from addax_ds.adapters.files import WEIGHTS
from addax_ds.config import LoraConfig, PrefixConfig
from addax_ds.errors import UserError

_PREFIX = "prompt_encoder.default.embedding.weight"


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
    wrapped = peft.get_peft_model(model, settings)
    embedding = wrapped.get_parameter(_PREFIX)
    if embedding.shape != words.shape:
        raise UserError(
            f"this prefix does not fit {type(model).__name__}: it needs {embedding.shape[1]} numbers a token"
        )
    embedding.data.copy_(words)
    return wrapped


@torch.no_grad()
def _keys_and_values(model: Any, tokens: int) -> torch.Tensor:
    """What attention keeps of random words."""
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, tokens))
    cache = model(input_ids=ids, use_cache=True).past_key_values
    parts = [part[0] for layer in cache.layers for part in (layer.keys, layer.values)]  # [heads, tokens, size]
    return torch.stack(parts).permute(2, 0, 1, 3).reshape(tokens, -1)


def write(folder: Path, skeleton: Any, weights: dict[str, torch.Tensor], base_model: str) -> None:
    """Write adapters as `PeftModel.from_pretrained` reads them. weights: all that are trained, whole."""
    settings = skeleton.peft_config["default"]
    if _PREFIX in weights:
        kept = {"prompt_embeddings": weights[_PREFIX]}
    else:
        kept = _peft().get_peft_model_state_dict(skeleton, state_dict=weights)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in kept.items()}, folder / WEIGHTS)
    settings.base_model_name_or_path, settings.inference_mode = base_model, True
    settings.save_pretrained(folder)


def load(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the adapters of a folder, to be trained or evaluated."""
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} holds no {WEIGHTS}: give a folder with adapters")
    try:
        settings = _peft().PeftConfig.from_pretrained(str(folder))
        if settings.peft_type == "PREFIX_TUNING":
            # peft trains no prefix that it has loaded.
            return _with_prefix(model, load_file(folder / WEIGHTS)["prompt_embeddings"])
        return _peft().PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except UserError:
        raise
    except (ValueError, RuntimeError, KeyError, OSError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: these adapters do not fit the model: {reason}") from None


def _peft() -> Any:
    # Imported here: an extra, and its import takes seconds.
    try:
        import peft
    except ImportError:
        raise UserError("lora and prefix need peft: pip install 'addax-ds[train]'") from None
    return peft
