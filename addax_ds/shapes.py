"""Shapes of well-known models, by the ids of their hub, so that they can be measured and planned without weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from addax_ds.config.checks import nearest
from addax_ds.data.embedded import EMBEDDED_MODELS, prepare_model
from addax_ds.errors import UserError

_Sizes = dict[str, Any]


def _llama(hidden: int, inner: int, layers: int, heads: int, key_value_heads: int, **more: Any) -> _Sizes:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        **more,
    }


def _opt(hidden: int, layers: int, heads: int) -> _Sizes:
    return {
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    }


_LLAMA_3: _Sizes = {"vocab_size": 128256, "max_position_embeddings": 8192}
_MISTRAL: _Sizes = {"max_position_embeddings": 32768}
_QWEN: _Sizes = {"max_position_embeddings": 32768}
_SMOL: _Sizes = {"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}

SHAPES: dict[str, tuple[str, _Sizes]] = {
    "meta-llama/Llama-2-7b-hf": ("llama", _llama(4096, 11008, 32, 32, 32)),
    "meta-llama/Llama-2-13b-hf": ("llama", _llama(5120, 13824, 40, 40, 40)),
    "meta-llama/Llama-2-70b-hf": ("llama", _llama(8192, 28672, 80, 64, 8)),
    "meta-llama/Meta-Llama-3-8B": ("llama", _llama(4096, 14336, 32, 32, 8, **_LLAMA_3)),
    "meta-llama/Meta-Llama-3-70B": ("llama", _llama(8192, 28672, 80, 64, 8, **_LLAMA_3)),
    "HuggingFaceTB/SmolLM2-135M": ("llama", _llama(576, 1536, 30, 9, 3, **_SMOL)),
    "facebook/opt-1.3b": ("opt", _opt(2048, 24, 32)),
    "facebook/opt-6.7b": ("opt", _opt(4096, 32, 32)),
    "facebook/opt-13b": ("opt", _opt(5120, 40, 40)),
    "facebook/opt-30b": ("opt", _opt(7168, 48, 56)),
    "facebook/opt-66b": ("opt", _opt(9216, 64, 72)),
    "mistralai/Mistral-7B-v0.1": ("mistral", _llama(4096, 14336, 32, 32, 8, **_MISTRAL)),
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", _llama(4096, 14336, 32, 32, 8, num_local_experts=8, **_MISTRAL)),
    "Qwen/Qwen2.5-0.5B": (
        "qwen2",
        _llama(896, 4864, 24, 14, 2, vocab_size=151936, tie_word_embeddings=True, **_QWEN),
    ),
    "Qwen/Qwen2.5-7B": ("qwen2", _llama(3584, 18944, 28, 28, 4, vocab_size=152064, **_QWEN)),
}
"""By id: the type of the model and what its config.json says of sizes."""


def shape_of(model: str) -> PretrainedConfig:
    """The configuration of a model: a built-in shape or an embedded model by name, a folder or file with a
    config.json, or what the hub has by that id.

    Raises `UserError` where there is none of them.
    """
    if model in SHAPES:
        kind, sizes = SHAPES[model]
        return CONFIG_MAPPING[kind](**sizes)
    location = prepare_model(model) if model in EMBEDDED_MODELS else Path(model)
    is_here = location.exists()
    known = nearest(model, [*SHAPES, *EMBEDDED_MODELS])
    if not is_here and model.count("/") != 1:  # no id of the hub
        raise UserError(f"no shape is known by {model}{known}, and no file or folder")
    try:
        return AutoConfig.from_pretrained(location if is_here else model, trust_remote_code=False)
    except Exception as error:  # transformers take what stands in a config.json on trust
        if is_here:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{model}: no model's config.json: {reason:.200}") from None
        raise UserError(f"no shape is known by {model}{known}, no file or folder, and the hub gives none") from None


def weightless(shape: PretrainedConfig) -> nn.Module:
    """The causal language model on the meta device."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(shape)
    return model


def sizes_of(shape: PretrainedConfig) -> dict[str, torch.Size]:
    """Of each parameter of the causal language model, tied ones once."""
    return {name: parameter.shape for name, parameter in weightless(shape).named_parameters()}


def count_of(shape: PretrainedConfig) -> int:
    """Parameters of the causal language model, tied ones once."""
    return sum(size.numel() for size in sizes_of(shape).values())
