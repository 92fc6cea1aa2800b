"""Tensor-train adapters (AdaZeta, Yang et al., EMNLP 2024). Stands apart from engines and training."""

from addax_ds.adapters.adapter import TensorTrainAdapter
from addax_ds.adapters.attach import add_adapters, merge
from addax_ds.adapters.files import load_adapters
from addax_ds.adapters.tensor_train import TensorTrainLinear, balanced_factors

__all__ = ["TensorTrainAdapter", "TensorTrainLinear", "add_adapters", "balanced_factors", "load_adapters", "merge"]
