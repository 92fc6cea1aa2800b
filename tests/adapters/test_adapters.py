"""Adapters go where they should, train alone, come back from disk, and merge where that is possible."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from addax_ds import UserError
from addax_ds.adapters import TensorTrainAdapter, add_adapters, merge, through_peft
from addax_ds.adapters.attach import adapted
from addax_ds.adapters.files import adapter_weights, load_adapters, whole_backbone_digest, write_adapters
from addax_ds.config import LoraConfig, TensorTrainConfig, build

LIKE_LLAMA = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 8,
}
LIKE_BERT = {key: LIKE_LLAMA[key] for key in list(LIKE_LLAMA)[:5]}
CONFIGS = {
    "llama": LlamaConfig(**LIKE_LLAMA),
    "qwen2": Qwen2Config(**LIKE_LLAMA),
    "qwen3": Qwen3Config(**LIKE_LLAMA),
    "opt": OPTConfig(
        vocab_size=97, hidden_size=24, word_embed_proj_dim=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=3
    ),
    "gpt2": GPT2Config(vocab_size=97, n_embd=24, n_layer=2, n_head=3),
    "bert": BertConfig(**LIKE_BERT),
    "roberta": RobertaConfig(**LIKE_BERT),
}
CONFIG = TensorTrainConfig(bottleneck=8, rank=2)
IDS = torch.arange(12).view(2, 6)


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    auto = AutoModel if kind in ("bert", "roberta") else AutoModelForCausalLM
    return auto.from_config(CONFIGS[kind]).eval()


def forward(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS)[0].detach()


def moved(model: nn.Module) -> nn.Module:
    """The model with every parameter of its adapters away from where it began."""
    torch.manual_seed(1)
    for parameter in adapter_weights(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_two_adapters_a_block_and_a_model_that_is_what_it_was(kind):
    model = make(kind)
    before = forward(model)
    add_adapters(model, CONFIG)
    assert len(list(adapted(model))) == 2 * 2
    assert torch.equal(forward(model), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapter_weights(model))
    assert not torch.equal(forward(moved(model)), before)


def test_patterns_place_them_in_a_model_of_any_make():
    model = AutoModelForCausalLM.from_config(
        PhiConfig(**{k: v for k, v in LIKE_LLAMA.items() if k != "head_dim"})
    ).eval()
    with pytest.raises(UserError, match="where adapters go in a phi is not known: name projections in modules"):
        add_adapters(model, CONFIG)
    before = forward(model)
    add_adapters(model, TensorTrainConfig(bottleneck=8, rank=2, modules=("*.self_attn.dense", "*.mlp.fc2")))
    paths = {f"model.layers.{layer}.{name}" for layer in range(2) for name in ("self_attn.dense", "mlp.fc2")}
    assert {path for path, _ in adapted(model)} == paths
    assert torch.equal(forward(model), before) and not torch.equal(forward(moved(model)), before)


def test_an_adapter_is_what_the_paper_says():
    torch.manual_seed(0)
    adapter = TensorTrainAdapter(4096, TensorTrainConfig(hidden_modes=(16, 16, 16), bottleneck_modes=(4, 4, 4)))
    sizes = {name: p.numel() for name, p in adapter.named_parameters()}
    # Llama-2-7B at rank 5 (facts of AdaZeta): 2,200 parameters in cores, 4,160 in biases.
    assert sum(size for name, size in sizes.items() if "core" in name) == 2200
    assert sum(size for name, size in sizes.items() if "bias" in name) == 4160
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 4096)
    down, up = adapter.down, adapter.up
    expected = x + nn.functional.gelu(x @ down.matrix() + down.bias) @ up.matrix() + up.bias
    torch.testing.assert_close(adapter(x), expected, rtol=1e-4, atol=1e-4)


def test_a_bfloat16_backbone_keeps_float32_adapters():
    model = make("llama").bfloat16()
    add_adapters(model, CONFIG)
    assert {p.dtype for p in adapter_weights(model).values()} == {torch.float32}
    assert forward(moved(model)).dtype == torch.bfloat16


def test_every_core_gets_a_gradient_once_the_last_has_moved():
    adapter = TensorTrainAdapter(24, CONFIG)
    x = torch.randn(5, 24)
    for step in range(2):
        adapter.zero_grad()
        adapter(x).square().sum().backward()
        reached = {name for name, p in adapter.named_parameters() if p.grad.abs().sum() > 0}
        if step == 0:
            assert reached == {"up.core_5", "up.bias"}
            with torch.no_grad():
                adapter.up.cores[-1].sub_(0.1 * adapter.up.cores[-1].grad)
    assert reached == {name for name, _ in adapter.named_parameters()}


def test_chosen_projections_alone():
    model = make("llama")
    add_adapters(model, TensorTrainConfig(bottleneck=8, rank=2, modules=("*.layers.1.mlp.up_proj", "lm_head")))
    assert [path for path, _ in adapted(model)] == ["model.layers.1.mlp.up_proj", "lm_head"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"bottleneck": 0}, "bottleneck is 0"),
        ({"groups": 5}, "groups is 5"),
        ({"modules": ()}, "modules is empty"),
        (
            {"modules": ("*.o_prj",)},
            r"modules: \*\.o_prj matches no projection of the model, did you mean \*\.o_proj\?",
        ),
        ({"modules": ("*.input_layernorm",)}, "adapters follow linear layers, and .* is a LlamaRMSNorm"),
        ({"hidden_modes": (5, 5)}, "multiply to 25, and the layer has 24 inputs"),
    ],
)
def test_what_fits_no_model_is_refused_and_leaves_it_as_it_was(settings, words):
    model = make("llama")
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError, match=words):
        add_adapters(model, build(TensorTrainConfig, settings, "adapter"))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names


def test_models_of_unknown_make_need_modules():
    with pytest.raises(UserError, match="where adapters go in a Sequential is not known: name projections in modules"):
        add_adapters(nn.Sequential(nn.Linear(4, 4)), CONFIG)


def test_adapters_are_added_once():
    model = make("llama")
    add_adapters(model, CONFIG)
    with pytest.raises(UserError, match="has adapters already"):
        add_adapters(model, CONFIG)


# -- disk ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    model = make("llama")
    digest = whole_backbone_digest(model)
    add_adapters(model, CONFIG)
    assert whole_backbone_digest(model) == digest, "adapters are not of the backbone"
    write_adapters(tmp_path / "adapter", CONFIG, adapter_weights(moved(model)), "tiny", digest)
    return tmp_path / "adapter"


def test_adapters_come_back_from_disk(folder):
    model = make("llama")
    assert load_adapters(model, folder) == CONFIG
    other = make("llama")
    add_adapters(other, CONFIG)
    assert torch.equal(forward(model), forward(moved(other)))
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["peft_type"] == "TENSOR_TRAIN" and settings["base_model_name_or_path"] == "tiny"


def test_a_backbone_in_another_type_is_the_same_backbone(folder):
    load_adapters(make("llama").bfloat16(), folder)


def test_another_backbone_is_refused(folder):
    other = make("llama")
    other.model.layers[1].mlp.up_proj.weight.data[3, 3] += 1
    for model in (other, make("qwen2")):
        with pytest.raises(UserError, match="belong to the backbone tiny, and this model has other weights"):
            load_adapters(model, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "tiny\n" * 200}))
    with pytest.raises(UserError, match=r"belong to the backbone tiny tiny .*, and this model") as refused:
        load_adapters(other, folder)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("adapter_config.json", None, "No such file or directory: give a folder with adapters"),
        ("adapter_config.json", b"{", "not JSON"),
        ("adapter_config.json", b"[]", "does not describe adapters"),
        ("adapter_config.json", b'{"peft_type": "LORA"}', "these are no tensor-train adapters: load them with peft"),
        ("adapter_model.safetensors", None, "cannot be read"),
        ("adapter_model.safetensors", b"\x80\x04pickle", "cannot be read"),
    ],
)
def test_damaged_adapters_are_one_line(folder, name, content, words):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_adapters(make("llama"), folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"rank": 3}, "does not hold the weights"), ({"rnk": 3}, "unknown key rnk, did you mean rank?")],
)
def test_a_changed_configuration_is_one_line(folder, change, words):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    model = make("llama")
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError, match=words):
        load_adapters(model, folder)
    assert [name for name, _ in model.named_parameters()] == before


# -- size ---------------------------------------------------------------------------------------

LLAMA_2_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


def test_adapters_are_at_least_80_percent_smaller_than_lora_of_rank_8():
    pytest.importorskip("peft")

    def trained(wrap) -> int:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LLAMA_2_7B)
            return sum(p.numel() for p in wrap(model).parameters() if p.requires_grad)

    def adapted_model(model: nn.Module) -> nn.Module:
        add_adapters(model, TensorTrainConfig())
        return model

    lora = trained(lambda model: through_peft.add(model, LoraConfig(rank=8)))
    assert lora == 32 * 2 * 2 * 8 * 4096  # blocks, queries and values, two matrices
    assert trained(adapted_model) <= 0.2 * lora


# -- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_linear_adapters_merge(kind):
    model = make(kind)
    names = [name for name, _ in model.named_parameters()]
    bias = kind not in ("llama", "qwen2", "qwen3")
    add_adapters(model, TensorTrainConfig(bottleneck=8, rank=2, activation="none", bias=bias))
    with torch.no_grad():
        expected = forward(moved(model))
    merged = copy.deepcopy(model)
    merge(merged)
    assert [name for name, _ in merged.named_parameters()] == names
    torch.testing.assert_close(forward(merged), expected, rtol=1e-4, atol=1e-5)


def test_weights_of_two_modules_are_not_merged_into():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**LIKE_LLAMA, tie_word_embeddings=True)).eval()
    settings = {"bottleneck": 8, "rank": 2, "activation": "none", "bias": False}
    add_adapters(model, TensorTrainConfig(modules=("lm_head",), **settings))
    before = forward(moved(model))
    with pytest.raises(UserError, match="lm_head shares its weights with another module"):
        merge(model)
    assert torch.equal(forward(model), before)


def test_what_cannot_be_merged_is_refused():
    model = make("llama")
    with pytest.raises(UserError, match="no adapters"):
        merge(model)
    add_adapters(model, CONFIG)
    with pytest.raises(UserError, match="has gelu between its layers, and no weight is equal to that"):
        merge(model)
    model = make("llama")
    add_adapters(model, TensorTrainConfig(bottleneck=8, rank=2, activation="none"))
    with pytest.raises(UserError, match=r"o_proj has no bias to take that of its adapter: train with bias false"):
        merge(model)
