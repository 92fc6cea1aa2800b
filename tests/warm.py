"""Imported by the server that all test processes are forked from: what would cost each of them a second."""

import gc
import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from addax_ds.core import cpu
from addax_ds.core.plain import Perturbation, Step

for dtype in (torch.float32, torch.bfloat16):
    weight = torch.zeros(2, 3, dtype=dtype)
    gradient = torch.zeros(6)
    cpu.draw(0, "w", 0, 6, 0, "normal", weight.device)
    cpu.perturb(weight, 0, torch.empty_like(weight), torch.empty_like(weight), "w", Perturbation(sign=1))
    cpu.perturb_rows(weight, torch.tensor([0]), "w", Perturbation(sign=1))
    cpu.update(weight.view(-1), 0, gradient, "w", Step(0, 0.0, 0.0, 1.0, (0.0,), "normal", True))
    cpu.digest(weight.view(-1), 0)

sizes = {"num_hidden_layers": 1, "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "vocab_size": 4}
disable_progress_bar()
with tempfile.TemporaryDirectory() as folder:
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)
enable_progress_bar()
# What lives here lives for ever: no collection of a child need look at it.
gc.freeze()
