"""Tiny models, batches and engines that the engine tests share.

Hidden and vocabulary sizes are odd, so that no world size above 1 divides them: shards are uneven,
ZeRO-3 pads, and some ranks own nothing of small parameters.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import addax_ds
from addax_ds.digest import weights_digest
from addax_ds.engines.choose import choose_engine
from addax_ds.optimizer import Addax
from tests.forkserver import DEVICE

VOCABULARY, HIDDEN, LAYERS = 97, 15, 2

ENGINES = (
    "replicated",
    "zero0",
    "zero1",
    "zero2",
    "fsdp",
    "fsdp-offload",
    "hsdp",
    "zero3",
    "zero3-evicting",
    "zero3-offload",
    "zero3-hpz",
)
"""Every engine. zero3 has DeepSpeed's defaults, under which models this small stay gathered through
a step; zero3-evicting releases every module after its use."""

TWO_BY_TWO = ("hsdp", "zero3-hpz")
"""Engines that run on 4 ranks only."""
EVICTING = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}
HYPER = {"lr": 0.1, "alpha": 0.3, "eps": 1e-3, "zo_micro_batch": 2, "fo_micro_batch": 2}


_LIKE_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 21,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
}


def _llama(tied: bool) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**_LIKE_LLAMA, tie_word_embeddings=tied))


def _opt(**changes: Any) -> nn.Module:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": 21,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 3,
        "max_position_embeddings": 33,
        "dropout": 0.0,
        **changes,
    }
    return OPTForCausalLM(OPTConfig(**settings))


_LIKE_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 21,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "max_position_embeddings": 33,
    "num_labels": 2,
}
CLASSIFIERS = ("bert", "roberta")


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=3,
            n_positions=33,
            n_inner=21,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama-tied": lambda: _llama(tied=True),
    "llama-untied": lambda: _llama(tied=False),
    "opt": _opt,
    "opt-dropout": lambda: _opt(dropout=0.5, attention_dropout=0.3),
    "bert": lambda: BertForSequenceClassification(BertConfig(**_LIKE_BERT)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**_LIKE_BERT)),
    "gpt2": _gpt2,
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_LIKE_LLAMA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_LIKE_LLAMA)),
    # Its grouped products need rows of 16 bytes.
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**{**_LIKE_LLAMA, "hidden_size": 16, "intermediate_size": 24}, num_local_experts=4)
    ),
}


def build_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights on every rank, none of them zero: a zero bias would hide what moves it."""
    torch.manual_seed(7)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(DEVICE, dtype)


def built_under_zero_init(name: str, engine: str) -> nn.Module:
    """The weights of `build_model`, in a model whose weights were partitioned as they were made."""
    import deepspeed

    plain = dict(build_model(name).named_parameters())
    # Without transformers' own beginnings: it looks for the rows of padding in weights that are partitioned.
    own = mock.patch.object(PreTrainedModel, "_initialize_weights")
    with own, deepspeed.zero.Init(config_dict_or_path=deepspeed_config(engine)):
        model = MODELS[name]()
    for parameter_name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(plain[parameter_name].data)
    return model


def batch_for(name: str, samples: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch with padding on the right; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (samples, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[samples // 2 :, tokens - 2 :] = 0
    if name in CLASSIFIERS:
        labels = torch.randint(0, 2, (samples,), generator=generator)
    else:
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : tokens // 2] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def class_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of a sequence's class: [batch]."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return cross_entropy(model(**inputs).logits.float(), batch["labels"], reduction="none")


def loss_for(name: str) -> Callable:
    """The per-sample loss of a model."""
    return class_loss if name in CLASSIFIERS else addax_ds.token_loss


@dataclass
class Running:
    """An optimizer at work on a model."""

    optimizer: Any
    """What the user holds: `Addax`, or what deepspeed.initialize returned."""
    engine: Any
    """addax_ds's engine."""
    model: nn.Module
    deepspeed: Any = None
    """DeepSpeed's engine where there is one."""

    def train_step(self, *args: Any) -> dict[str, Any]:
        return self.optimizer.train_step(*args)

    def digest(self) -> str:
        """Of all weights, whatever their sharding (a collective)."""
        return weights_digest(self.engine)

    def weights(self) -> dict[str, torch.Tensor]:
        """Every weight, whole (collectives)."""
        return {name: self.engine.whole(name) for name in self.engine.names}


def deepspeed_config(engine: str, hyper: dict | None = None, **zero: Any) -> dict[str, Any]:
    """A ds_config for zero0 .. zero3-hpz; without `hyper` it names no optimizer."""
    stage = {"stage": int(engine[4]), **zero}
    if engine.endswith(("evicting", "hpz")):
        stage = {**EVICTING, **stage}
    if engine.endswith("offload"):
        stage["offload_param"] = {"device": "cpu"}
    if engine.endswith("hpz"):
        stage.setdefault("zero_hpz_partition_size", 2)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage}
    return config if hyper is None else {**config, "optimizer": {"type": "Addax", "params": hyper}}


@contextlib.contextmanager
def running(
    engine: str,
    model: nn.Module,
    *,
    groups: Callable[[nn.Module], list[dict]] | None = None,
    zero: dict[str, Any] | None = None,
    **hyper: Any,
) -> Iterator[Running]:
    """Addax on `model` under the named engine.

    groups: makes parameter groups of the model; zero: further settings of zero_optimization.
    """
    hyper = {**HYPER, **hyper}
    if engine.startswith("zero"):
        import deepspeed

        if groups is None:
            wrapped, optimizer, _, _ = deepspeed.initialize(
                model=model, config=deepspeed_config(engine, hyper, **zero or {})
            )
        else:
            wrapped, optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=Addax(groups(model), **hyper), config=deepspeed_config(engine, **zero or {})
            )
        try:
            yield Running(optimizer, optimizer.engine, model, wrapped)
        finally:
            optimizer.optimizer.detach()
            wrapped.destroy()
        return
    if engine.startswith("fsdp"):
        options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if engine.endswith("offload") else {}
        addax_ds.shard(model, init_device_mesh(DEVICE, (dist.get_world_size(),)), **options)
    elif engine == "hsdp":
        addax_ds.shard(model, init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("replicate", "shard")))
    if groups is None:
        optimizer = Addax(model, **hyper)
    else:
        optimizer = Addax(groups(model), **hyper)
        optimizer.attach(choose_engine(model))
    try:
        yield Running(optimizer, optimizer.engine, model)
    finally:
        optimizer.detach()
