"""One fine-tuning run: every setting of a run file."""

import math
from typing import Any, Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from addax_ds.config.adapters import EPS, AdapterConfig, PrefixConfig, TensorTrainConfig
from addax_ds.config.addax import AddaxConfig
from addax_ds.config.checks import STRICT, nearest, require
from addax_ds.config.method import BASELINES, METHODS, QuerySchedule
from addax_ds.config.task import SPLITS, TaskConfig
from addax_ds.errors import UserError

_LONGEST_WAIT = 1e6  # minutes, two years; clocks of collectives overflow at some more


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig(AddaxConfig):
    """One fine-tuning run: what the YAML file of `addax-ds train` holds."""

    method: str | None = None
    """addax, addax-wa, mezo, ip-sgd; adazeta, which trains tensor-train adapters; sgd and adamw, of torch (FSDP2,
    replicated) or of DeepSpeed; zero-shot, which measures the model as it is. It sets alpha, lt and schedule, and
    adazeta's adapter and query_schedule; without it they say what the method is."""
    momentum: float = 0.9
    """Of method sgd."""
    max_grad_norm: float = 1.0
    """Global norm to which sgd and adamw clip gradients; 0 clips none."""
    model: str = "smollm2-135m"
    """Embedded model by name, local folder, or hub id."""
    adapter: AdapterConfig | None = None
    """What is trained in place of the model's weights, which then stay as they are."""
    adapter_weights: str | None = None
    """Folder of adapters to begin with, as a run writes it; without it they are new."""
    data: str = "movies"
    """Embedded data or a task by name, local .jsonl or .csv file, or a dataset id of the hub."""
    eval_data: str | None = None
    """Held-out data; without it a named task's validation split, or the last `eval_samples` of the shuffled `data`."""
    task: TaskConfig | str | None = None
    """Template and labels, or the name of a task whose records the data are; data known by name bring their own."""
    train_samples: int | None = 1000
    """Training samples drawn from the data; null takes all."""
    eval_samples: int = 500
    """Held-out samples, measured before and after; 1,000 of a task by name."""
    dev_samples: int = 0
    """Further samples held out of `data`, on which settings are chosen: `eval_every` measures those, where there
    are any, and so does the end. 500 of a task by name, 100 of the small ones cb, copa and wsc."""
    query_schedule: QuerySchedule | None = None
    """How `queries` grows from epoch to epoch; without it stays what it is."""
    k0: int = 6
    """Global zeroth-order batch size K^0."""
    k1: int = 4
    """Global first-order batch size K^1."""
    lt: int | Literal["auto", "none"] = "auto"
    """Length threshold L_T in tokens: longer samples are zeroth-order, the rest first-order.
    "auto" is the median length; "none" is Addax-WA, both batches from all samples."""
    steps: int = 60
    """Steps of the run."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate schedule."""
    warmup_steps: int = 0
    """Steps over which lr rises from 0."""
    padding: Literal["left", "right"] = "right"
    """Side of the padding."""
    engine: Literal["replicated", "fsdp", "deepspeed"] = "replicated"
    """What shards the model; "deepspeed" reads `ds_config`."""
    ds_config: str | None = None
    """DeepSpeed configuration, for example ds_configs/zero3.json."""
    replicas: int = 1
    """FSDP: copies of the sharded model; above 1 is HSDP."""
    offload: bool = False
    """FSDP: shards lie in the node's memory, are updated there, and go to the GPU as they are gathered. DeepSpeed's
    offload_param stands in `ds_config`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights; sgd and adamw compute in it and keep float32 weights beside."""
    activation_checkpointing: bool = False
    """Recompute activations of each block in the first-order backward."""
    eval_every: int = 0
    """Steps between evaluations inside the run; 0 evaluates before and after only."""
    eval_micro_batch: int = 8
    """Sequences in one evaluation forward."""
    output: str | None = None
    """Run folder; without it runs/DATE-TIME. Where it holds an unfinished run of these settings, that goes on."""
    save: bool = True
    """Write the fine-tuned model to OUTPUT/model."""
    checkpoint_every: int = 100
    """Steps between checkpoints, written to OUTPUT/checkpoints beside the steps that follow, with one of the last
    step; 0 writes none."""
    checkpoints_kept: int = 2
    """How many of the newest checkpoints remain."""
    max_skipped: int = 10
    """Steps in a row with losses or gradients that are not finite, after which the run stops."""
    timeout_minutes: float = 10.0
    """How long ranks wait for one that does not answer before the run ends. Longer than the longest step or save."""

    @model_validator(mode="before")
    @classmethod
    def _expand_method(cls, given: Any) -> Any:
        values = dict((given.kwargs if isinstance(given, ArgsKwargs) else given) or {})
        says, _ = METHODS.get(str(values.get("method")), ({}, {}))
        for name, value in says.items():
            if name in values and values[name] != value:
                raise UserError(f"method {values['method']} means {name}: {value}, and {name} is {values[name]}")
        return {**cls.usual_with(values), **values, **says}

    @staticmethod
    def usual_with(values: dict[str, Any]) -> dict[str, Any]:
        """Defaults that depend on other settings: on data, method and adapter."""
        _, defaults = METHODS.get(str(values.get("method")), ({}, {}))
        adapter = values.get("adapter", defaults.get("adapter"))
        kind = adapter.get("kind") if isinstance(adapter, dict) else getattr(adapter, "kind", None)
        eps = {"eps": EPS[kind]} if kind in EPS else {}
        return {**SPLITS.get(str(values.get("data")), {}), **eps, **defaults}

    @property
    def method_name(self) -> str:
        """The papers' name of what the settings amount to."""
        if self.method is not None:
            return self.method
        if self.alpha == 1 and isinstance(self.adapter, TensorTrainConfig) and self.query_schedule is not None:
            return "adazeta"
        if self.alpha in (0, 1):
            return "mezo" if self.alpha else "ip-sgd"
        return "addax-wa" if self.lt == "none" else "addax"

    @property
    def weights_dtype(self) -> str:
        """Type in which the model is loaded: torch's mixed precision casts float32 weights as they are gathered."""
        is_cast = self.method in BASELINES and self.adapter is None and self.engine != "deepspeed"
        return "float32" if is_cast else self.dtype

    @property
    def zo_sizes(self) -> tuple[int, ...]:
        """Samples of each zeroth-order micro-batch of a step."""
        return tuple(min(self.zo_micro_batch, self.k0 - first) for first in range(0, self.k0, self.zo_micro_batch))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method is not None and self.method not in METHODS:
            raise UserError(f"method is {self.method}{nearest(self.method, [*METHODS])}")
        counts = ["k0", "k1", "eval_samples", "replicas", "eval_micro_batch", "checkpoints_kept", "max_skipped"]
        for name in counts if self.method == "zero-shot" else [*counts, "steps"]:
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be 1 or more")
        for name in ("warmup_steps", "eval_every", "checkpoint_every", "dev_samples"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}: it must be 0 or more")
        for name in ("model", "adapter_weights", "data", "eval_data", "ds_config", "output"):
            require("\0" not in (getattr(self, name) or ""), f"{name} holds a NUL character: remove it")
        require(
            0 < self.timeout_minutes <= _LONGEST_WAIT,
            f"timeout_minutes is {self.timeout_minutes}: it must be above 0, and at most {_LONGEST_WAIT:g}",
        )
        require(self.train_samples is None or self.train_samples >= 1, "train_samples must be 1 or more, or null")
        require(isinstance(self.lt, str) or self.lt >= 1, f"lt is {self.lt}: give tokens, auto or none")
        require(
            (self.engine == "deepspeed") == (self.ds_config is not None),
            "engine: deepspeed and ds_config go together: set both, for example ds_config=ds_configs/zero3.json",
        )
        require(self.query_schedule is None or self.queries == 1, "query_schedule and queries: set one of them")
        require(
            self.adapter_weights is None or self.adapter is not None,
            "adapter_weights without adapter: say of what kind they are, for example adapter.kind=lora",
        )
        require(
            not (isinstance(self.adapter, PrefixConfig) and self.activation_checkpointing),
            "a prefix is not passed on to blocks that are recomputed: leave activation_checkpointing out, or take lora",
        )
        require(self.replicas == 1 or self.engine == "fsdp", "replicas above 1 needs engine: fsdp")
        require(
            not self.offload or self.engine == "fsdp",
            "offload needs engine: fsdp; DeepSpeed's is offload_param in ds_config",
        )
        if self.method in ("addax", "addax-wa"):
            require(0 < self.alpha < 1, f"method {self.method} takes alpha between 0 and 1, and it is {self.alpha}")
        require(
            self.method != "addax" or self.lt != "none", "method addax without lt is addax-wa: name that, or set lt"
        )
        require(
            self.method != "adazeta" or isinstance(self.adapter, TensorTrainConfig),
            "method adazeta trains tensor-train adapters: leave adapter out, or take method: mezo",
        )
        require(
            self.method not in (*BASELINES, "ip-sgd")
            or (self.queries == 1 and self.directions == "shared" and self.query_schedule is None),
            f"method {self.method} probes no directions: leave queries, directions and query_schedule out",
        )
        require(
            self.method not in BASELINES or self.max_loss == math.inf,
            f"method {self.method} skips no steps: leave max_loss out",
        )
        require(0 <= self.momentum < 1, f"momentum is {self.momentum}: it must lie in [0, 1)")
        require(
            0 <= self.max_grad_norm < math.inf,
            f"max_grad_norm is {self.max_grad_norm}: it must be 0 or more, and finite",
        )
        require(
            self.method not in BASELINES or self.checkpoint_every == 0,
            f"method {self.method} keeps no checkpoints: set checkpoint_every: 0",
        )
