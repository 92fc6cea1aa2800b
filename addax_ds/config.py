"""Settings: frozen dataclasses, validated on construction.

`AddaxConfig` is the method alone and is what the optimizer holds; `RunConfig` adds what one
fine-tuning run needs and is what a YAML file describes. Names are the paper's where it has one.
"""

import dataclasses
import difflib
import math
import re
import string
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import yaml
from pydantic import BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from addax_ds.errors import UserError

_STRICT = ConfigDict(extra="forbid")
_LONGEST_WAIT = 1e6  # minutes, two years; clocks of collectives overflow at some more
_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)  # PyYAML passes on some of them


def require(condition: bool, message: str) -> None:
    """Raises `UserError` unless the condition holds."""
    if not condition:
        raise UserError(message)


def as_tuple(value: Any) -> Any:
    """A list as a tuple: YAML and JSON know lists alone."""
    return tuple(value) if isinstance(value, list) else value


_Item = TypeVar("_Item")
_Tuple = Annotated[tuple[_Item, ...] | None, BeforeValidator(as_tuple)]


def _text_keys(labels: Any) -> Any:
    """YAML reads the class 0 as a number; records are matched by text."""
    return {str(key): word for key, word in labels.items()} if isinstance(labels, dict) else labels


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AddaxConfig:
    """Hyper-parameters of the Addax step (Li et al., ICLR 2025, algorithm 1).

    theta <- theta - lr * (alpha * mean_q(g0_q z_q) + (1 - alpha) * g1 + weight_decay * theta)
    """

    lr: float = 1e-3
    """Learning rate (eta), 0 or more."""
    alpha: float = 1e-3
    """Weight of the zeroth-order part, in [0, 1]: 1 is MeZO, 0 is in-place SGD."""
    eps: float = 1e-3
    """Perturbation scale of the two-sided difference, above 0."""
    queries: int = 1
    """Directions that each zeroth-order sample is measured along (Q of n-SPSA), averaged."""
    directions: Literal["shared", "per-micro-batch"] = "shared"
    """Whether all zeroth-order micro-batches of a step have the same directions, or each its own."""
    weight_decay: float = 0.0
    """Decoupled weight decay, as a multiple of lr."""
    distribution: Literal["normal", "rademacher"] = "normal"
    """Distribution of the perturbation z."""
    perturb: Literal["gathered", "shard", "auto"] = "gathered"
    """Where the noise is added: to gathered weights, which one gather serves; to each rank's shard on
    the way into a gather for every point, which draws less; or whichever a trial finds to cost less."""
    atomic: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Paths of modules whose forward reads weights of modules within it, * stands for any text: zeroth-order
    forwards hold those weights together. Torch's own such modules need not be named."""
    max_loss: float = math.inf
    """A step with a mean loss above this writes nothing on any rank, like one with a loss that is not finite."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How an update is rounded to bfloat16 weights; float32 weights need none."""
    seed: int = 0
    """Root seed of the run; every step derives its own."""
    dropout: bool = False
    """Dropout in the first-order forward. Zeroth-order forwards never have any."""
    zo_micro_batch: int = 1
    """Samples in one zeroth-order micro-batch: the unit that is dealt to ranks."""
    fo_micro_batch: int = 1
    """Samples in one first-order micro-batch. A rank that gets more than one a step needs one
    float32 buffer of the size of its shard."""

    def __post_init__(self) -> None:
        require(0 <= self.lr < math.inf, f"lr is {self.lr}: it must be 0 or more, and finite")
        require(0 <= self.alpha <= 1, f"alpha is {self.alpha}: it must lie in [0, 1]")
        require(0 < self.eps < math.inf, f"eps is {self.eps}: it must be above 0, and finite")
        require(self.max_loss > 0, f"max_loss is {self.max_loss}: it must be above 0")
        require(self.queries >= 1, f"queries is {self.queries}: it must be 1 or more")
        require(
            0 <= self.weight_decay < math.inf,
            f"weight_decay is {self.weight_decay}: it must be 0 or more, and finite",
        )
        require(0 <= self.seed < 2**53, f"seed is {self.seed}: it must lie in [0, 2**53)")
        require(
            self.directions == "shared" or self.perturb != "shard",
            "perturb: shard gathers for each direction anew, and here each micro-batch has its own: "
            "set perturb: gathered, or directions: shared",
        )
        require(self.zo_micro_batch >= 1, f"zo_micro_batch is {self.zo_micro_batch}: it must be 1 or more")
        require(self.fo_micro_batch >= 1, f"fo_micro_batch is {self.fo_micro_batch}: it must be 1 or more")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TaskConfig:
    """How a record becomes a prompt and what counts as a right answer.

    One of `labels` (classification: field value -> label word), `choices` (multiple choice: the field that
    lists what may follow) and `completion` (generation: the field that holds the text to produce) is given.
    """

    prompt: str
    """Python format string over the record's fields, for example "{text} It was"."""
    label: str | None = None
    """Field that holds the class; of choices the number of the right one, from 0, or a list of right ones."""
    labels: Annotated[dict[str, str] | None, BeforeValidator(_text_keys)] = None
    """Label words by class, with their leading space, for example {"0": " terrible"}."""
    choices: str | None = None
    """Field that lists continuations of the prompt, with their leading space; it is trained on the right one
    alone, and the likeliest per token is the answer."""
    completion: str | None = None
    """Field that holds the answer to generate (a string or a list of accepted strings)."""
    max_new_tokens: int = 32
    """Longest answer generated."""

    def __post_init__(self) -> None:
        kinds = [kind for kind in ("labels", "choices", "completion") if getattr(self, kind) is not None]
        if not kinds:
            raise UserError("a task needs label with labels or choices, or completion: set one of them")
        require(len(kinds) == 1, f"a task has either {' or '.join(kinds)}: remove one of them")
        needs_label = self.completion is None
        require(
            bool(self.label) == needs_label, f"task.{kinds[0]} goes {'with' if needs_label else 'without'} task.label"
        )
        require(self.labels is None or len(self.labels) >= 2, "task.labels needs two classes or more")
        require(self.max_new_tokens >= 1, "task.max_new_tokens must be 1 or more")
        try:
            specs = [spec or "" for _, _, spec, _ in string.Formatter().parse(self.prompt)]
        except ValueError:
            specs = []  # no template, which is told with the data
        # Each record would be padded to gigabytes.
        require(not re.search(r"\d{5}", " ".join(specs)), "task.prompt pads a field to 10,000 characters or more")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TensorTrainConfig:
    """Tensor-train adapters (AdaZeta, Yang et al., EMNLP 2024), after attention and feed-forward of every block."""

    kind: Literal["tensor-train"] = "tensor-train"
    bottleneck: int = 64
    """Width between the two layers of an adapter."""
    rank: int = 5
    """Rank of every bond between cores."""
    hidden_modes: _Tuple[int] = None
    """Modes that multiply to the hidden size; without them balanced factors of it."""
    bottleneck_modes: _Tuple[int] = None
    """Modes that multiply to the bottleneck, the same way."""
    groups: Literal[2, 3, 4] = 2
    """Chains into which the cores of a layer are contracted apart from each other."""
    activation: Literal["gelu", "relu", "none"] = "gelu"
    """Between the two layers; with none an adapter is linear, and can be merged."""
    bias: bool = True
    """Whether both layers have one."""
    modules: _Tuple[str] = None
    """Paths of the projections that adapters follow, * stands for any text; without them the last ones of
    attention and of the feed-forward part of every block, for models whose names are known."""

    def __post_init__(self) -> None:
        for name in ("bottleneck", "rank"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be 1 or more")
        require(self.modules != (), "modules is empty: name projections, or leave it out")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LoraConfig:
    """Low-rank adapters (Hu et al., 2022), through peft."""

    kind: Literal["lora"] = "lora"
    rank: int = 8
    alpha: int = 16
    """The product of both matrices is multiplied by alpha / rank."""
    modules: _Tuple[str] = None
    """Names of the modules that have them; peft's for the model (queries and values) without any."""

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be 1 or more")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PrefixConfig:
    """Trainable keys and values before the prompt (Li & Liang, 2021), through peft."""

    kind: Literal["prefix"] = "prefix"
    tokens: int = 5
    """Positions of the prefix; they begin as those of the words that a tokenizer knows first."""

    def __post_init__(self) -> None:
        require(self.tokens >= 1, f"tokens is {self.tokens}: it must be 1 or more")


AdapterConfig: TypeAlias = TensorTrainConfig | LoraConfig | PrefixConfig
_ADAPTERS: dict[str, type] = {"tensor-train": TensorTrainConfig, "lora": LoraConfig, "prefix": PrefixConfig}


def build_adapter(values: dict[str, Any], where: str) -> AdapterConfig:
    """The adapters that a mapping describes, told apart by its kind."""
    kind = values.get("kind")
    if kind not in _ADAPTERS:
        raise UserError(f"{where}: kind is {kind}: give one of {', '.join(_ADAPTERS)}")
    return build(_ADAPTERS[kind], values, where)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class QuerySchedule:
    """Directions that grow with the epoch (AdaZeta, Yang et al., 2024, equation 7): min(alpha e^beta, maximum).

    Rounded down, at least 1; e counts epochs of the zeroth-order pool from 0.
    """

    alpha: float = 0.85
    beta: float = 0.45
    maximum: int = 20

    def __post_init__(self) -> None:
        require(0 < self.alpha < math.inf, f"alpha is {self.alpha}: it must be above 0, and finite")
        require(0 <= self.beta <= 10, f"beta is {self.beta}: it must lie in [0, 10]")
        require(self.maximum >= 1, f"maximum is {self.maximum}: it must be 1 or more")

    def queries(self, epoch: int) -> int:
        """Directions of a step in this epoch."""
        return max(int(min(self.alpha * epoch**self.beta, self.maximum)), 1)


BASELINES = ("sgd", "adamw")
"""Methods with an optimizer of torch's or DeepSpeed's."""

_ALL_DATA: dict[str, Any] = {"lt": "none"}
_USUAL = {**_ALL_DATA, "schedule": "linear", "checkpoint_every": 0}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "addax": ({}, {}),
    "addax-wa": ({"lt": "none"}, {}),
    "mezo": ({"alpha": 1.0}, _ALL_DATA),
    "ip-sgd": ({"alpha": 0.0}, _ALL_DATA),
    "sgd": ({"alpha": 0.0}, _USUAL),
    "adamw": ({"alpha": 0.0}, _USUAL),
    "zero-shot": ({"steps": 0}, {**_ALL_DATA, "save": False}),
}
"""What each method says of other settings, and their defaults with it."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RunConfig(AddaxConfig):
    """One fine-tuning run: what the YAML file of `addax-ds train` holds."""

    method: str | None = None
    """addax, addax-wa, mezo, ip-sgd; sgd and adamw, of torch (FSDP2, replicated) or of DeepSpeed; zero-shot, which
    measures the model as it is. It sets alpha, lt and schedule; without it they say what the method is."""
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
    """Held-out samples, measured before and after."""
    dev_samples: int = 0
    """Further samples held out of `data`, on which settings are chosen: `eval_every` measures those, where there
    are any, and so does the end."""
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
    """Steps between checkpoints, written to OUTPUT/checkpoints beside the steps that follow; 0 writes none."""
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
        says, defaults = METHODS.get(str(values.get("method")), ({}, {}))
        for name, value in says.items():
            if name in values and values[name] != value:
                raise UserError(f"method {values['method']} means {name}: {value}, and {name} is {values[name]}")
        return {**defaults, **values, **says}

    @property
    def method_name(self) -> str:
        """The papers' name of what the settings amount to."""
        if self.method is not None:
            return self.method
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
        require(self.replicas == 1 or self.engine == "fsdp", "replicas above 1 needs engine: fsdp")
        if self.method in ("addax", "addax-wa"):
            require(0 < self.alpha < 1, f"method {self.method} takes alpha between 0 and 1, and it is {self.alpha}")
        require(
            self.method != "addax" or self.lt != "none", "method addax without lt is addax-wa: name that, or set lt"
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


def nearest(word: str, known: list[str]) -> str:
    """A hint ", did you mean X?" with the known word nearest to `word`; empty when none is near."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {match[0]}?" if match else f"; known: {', '.join(known)}"


def build(cls: type, values: dict[str, Any], where: str) -> Any:
    """`cls(**values)`, with the first thing that is wrong as a one-line `UserError`."""
    known = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key {key}{nearest(str(key), known)}")
    if isinstance(values.get("adapter"), dict):
        values = {**values, "adapter": build_adapter(values["adapter"], f"{where}: adapter")}
    for name, group in (("task", TaskConfig), ("query_schedule", QuerySchedule)):
        if isinstance(values.get(name), dict):
            values = {**values, name: build(group, values[name], f"{where}: {name}")}
    try:
        return cls(**values)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            raise UserError(f"{where}: {cause}") from None
        setting = first["loc"][0]
        # A setting of several types has one complaint for each.
        complaints = " or ".join(e["msg"].lower() for e in error.errors() if e["loc"][0] == setting)
        raise UserError(f"{where}: {setting} is {first.get('input')!r}: {complaints}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def load_run(path: str | None, overrides: list[str]) -> RunConfig:
    """The run that a YAML file describes, with `key=value` overrides on top.

    `task.prompt=...` reaches into the task; `method=...` takes the place of what the file says of the settings
    that it sets. Raises `UserError` for a missing or unreadable file,
    an unknown key (naming the nearest) and every value out of range.
    """
    values = read_yaml(Path(path), "a run file") if path is not None else {}
    given = [_parsed(override) for override in overrides]
    for method in (value for key, value in given if key == "method"):
        values = for_method(values, str(method))
    for key, value in given:
        outer, dot, inner = key.partition(".")
        if dot:
            group = values.get(outer) or {}
            if not isinstance(group, dict):
                raise UserError(f"{key}={value}: {outer} is no group of settings")
            values[outer] = {**group, inner: value}
        else:
            values[key] = value
    return build(RunConfig, values, path or "command line")


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; raises `UserError` where there is none."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: give the path of {what}") from None
    except _NOT_YAML as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict | None):
        raise UserError(f"{path}: {what} is a mapping of settings")
    return loaded or {}


def for_method(values: dict[str, Any], method: str) -> dict[str, Any]:
    """Settings that were made for another method, without those that this one sets."""
    of_method = {name for settings in METHODS.get(method, ()) for name in settings}
    return {name: value for name, value in values.items() if name not in of_method}


def _parsed(override: str) -> tuple[str, Any]:
    """Key and value of `key=value`."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"{override}: overrides are written key=value")
    try:
        return key, parse_value(text)
    except _NOT_YAML:
        raise UserError(f"{override}: the value is not YAML: quote it, as in {key}='\"...\"'") from None


def parse_value(text: str) -> Any:
    """A YAML scalar, with 1e-3 read as the number it plainly is (YAML 1.1 reads a string)."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
