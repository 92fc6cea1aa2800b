"""Settings: frozen dataclasses, validated on construction."""

from addax_ds.config.adapters import AdapterConfig, LoraConfig, PrefixConfig, TensorTrainConfig
from addax_ds.config.addax import AddaxConfig
from addax_ds.config.checks import Items, nearest, require
from addax_ds.config.files import build, load_run, parse_value, read_yaml, values_of
from addax_ds.config.method import BASELINES, METHODS, QuerySchedule, for_method
from addax_ds.config.run import RunConfig
from addax_ds.config.task import TaskConfig

__all__ = [
    "BASELINES",
    "METHODS",
    "AdapterConfig",
    "AddaxConfig",
    "Items",
    "LoraConfig",
    "PrefixConfig",
    "QuerySchedule",
    "RunConfig",
    "TaskConfig",
    "TensorTrainConfig",
    "build",
    "for_method",
    "load_run",
    "nearest",
    "parse_value",
    "read_yaml",
    "require",
    "values_of",
]
