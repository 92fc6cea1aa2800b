"""A step of the project's own code for a planned layout, without its weights, ranks and data.

The process group is fake and of the real size, tensors are fake, and everything else is what a run
does: wrapping, lanes, hooks, updates, DeepSpeed's engine. `stand_ins` has what cannot be so.
"""

import contextlib
import gc
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from addax_ds.adapters.choose import adapt
from addax_ds.baselines import Baseline
from addax_ds.config import RunConfig
from addax_ds.errors import UserError
from addax_ds.optimizer import Addax
from addax_ds.plan.batches import LAST_TOKEN, Targets
from addax_ds.plan.evaluated import Evaluated
from addax_ds.plan.parts import PARTS, by_part
from addax_ds.plan.stand_ins import fake_ranks, without_numbers
from addax_ds.plan.tracker import HOST, Tracker
from addax_ds.shapes import count_of
from addax_ds.training.evaluation import placed
from addax_ds.training.models import Optimizer, accepted, build_optimizer, checkpoint_activations
from addax_ds.training.world import World

_FEW_LAYERS = 3
"""Traffic, and memory at one kind of moment, are affine in the number of layers from here on."""


@dataclass(frozen=True)
class Rehearsal:
    """A step as it is for one rank."""

    moments: dict[str, dict[str, float]]
    """By what was allocated, bytes of all parts when they were most in all then: see `Tracker.peaks`."""
    collectives: dict[str, float]
    """How many of each kind."""
    received: dict[str, float]
    """Bytes that the rank receives, by kind."""
    flops: float
    """Of products of matrices, an addition and a multiplication as two."""
    host: float = 0.0
    """Bytes at most in the host's memory, of weights that are offloaded to it; the moments have none of them."""

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by part when they were most in all."""
        return max(self.moments.values(), key=lambda parts: sum(parts.values()))

    @property
    def peak(self) -> float:
        """Bytes at most."""
        return sum(self.parts.values())


def rehearse(
    shape: PretrainedConfig,
    config: RunConfig,
    ranks: int,
    long: int,
    short: int,
    all_layers: bool = False,
    *,
    targets: Targets = LAST_TOKEN,
    evaluated: Evaluated | None = None,
) -> Rehearsal:
    """A step of a run on `ranks` ranks, whose batches are `long` and `short` tokens wide, with such targets.

    Rehearsed with few layers, and extrapolated, unless with `all_layers`. evaluated: what is evaluated, in place of a
    step. Raises `UserError` for what cannot be rehearsed.
    """
    _refuse(config)
    layers, few = shape.num_hidden_layers, _few_layers(shape, config, evaluated)
    if all_layers or layers <= few + 1:
        return _rehearse(shape, config, ranks, long, short, targets, evaluated)
    first, second = (
        _rehearse(with_layers(shape, n), config, ranks, long, short, targets, evaluated) for n in (few, few + 1)
    )

    def at_all(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
        return {key: a.get(key, 0) + (b.get(key, 0) - a.get(key, 0)) * (layers - few) for key in {**a, **b}}

    return Rehearsal(
        # Which moment is the peak may be another one with more layers. Of a part as a whole the line through two
        # numbers of layers lies below it, where its fullest moment changes: so it never says too much.
        {
            moment: at_all(first.moments[moment], second.moments[moment])
            for moment in first.moments.keys() & second.moments
        },
        at_all(first.collectives, second.collectives),
        at_all(first.received, second.received),
        at_all({"": first.flops}, {"": second.flops})[""],
        at_all({HOST: first.host}, {HOST: second.host})[HOST],
    )


def _refuse(config: RunConfig) -> None:
    if config.perturb == "auto":
        raise UserError("perturb: auto measures the GPUs of a run: plan perturb=gathered or perturb=shard")
    if config.engine == "replicated":
        raise UserError("engine replicated cannot be rehearsed: set engine: fsdp or deepspeed")
    if config.engine == "deepspeed":
        try:
            from addax_ds.plan import zero3
        except ImportError:
            raise UserError("engine: deepspeed needs DeepSpeed: pip install 'addax-ds[deepspeed]'") from None
        zero3.refuse(config)


def _few_layers(shape: PretrainedConfig, config: RunConfig, evaluated: Evaluated | None) -> int:
    """A number of layers from which on each one more adds the same."""
    if not _is_gathered_ahead(config, evaluated):
        return _FEW_LAYERS
    from addax_ds.plan import zero3

    one, two = (count_of(with_layers(shape, n)) for n in (1, 2))
    return _FEW_LAYERS + math.ceil(zero3.horizon(config) / (two - one))


def _is_gathered_ahead(config: RunConfig, evaluated: Evaluated | None) -> bool:
    """Whether DeepSpeed decides what is gathered, as it does where its engine's own forward runs."""
    return config.engine == "deepspeed" and config.alpha < 1 and evaluated is None


def blocks_are_alike(shape: PretrainedConfig) -> bool:
    """Whether all are of one kind, by what is listed for each of them and by their weights: a few tell of all then."""
    listed = [value for value in shape.to_dict().values() if isinstance(value, list)]
    kinds = [values for values in listed if len(values) == shape.num_hidden_layers]
    one, two, whole = map(count_of, (with_layers(shape, 1), with_layers(shape, 2), shape))
    as_many = whole == one + (two - one) * (shape.num_hidden_layers - 1)
    return as_many and all(value == values[0] for values in kinds for value in values)


def with_layers(shape: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with another number of blocks."""
    cut = {
        name: (value * layers)[:layers]  # one for each layer
        for name, value in shape.to_dict().items()
        if isinstance(value, list) and len(value) == shape.num_hidden_layers
    }
    return type(shape)(**{**shape.to_dict(), **cut, "num_hidden_layers": layers})


def _rehearse(
    shape: PretrainedConfig,
    config: RunConfig,
    ranks: int,
    long: int,
    short: int,
    targets: Targets,
    evaluated: Evaluated | None,
) -> Rehearsal:
    at = None if evaluated is None else evaluated.columns(config)
    columns = targets.columns if at is None else lambda *_: at
    fake, tracker, world = FakeTensorMode(), Tracker("weights"), World(0, 0, ranks, torch.device("cpu"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_ranks(ranks))
        stack.enter_context(without_numbers(columns))
        if config.engine == "deepspeed":
            from addax_ds.plan import zero3

            stack.enter_context(zero3.rehearsed())
        stack.enter_context(by_part(tracker, config, fake))
        stack.enter_context(fake)
        stack.enter_context(tracker)
        # The first step builds what later ones keep, and the second gathers ahead by what DeepSpeed has noted of it.
        # Evaluations keep nothing.
        warm = 0 if evaluated is not None else 2 if _is_gathered_ahead(config, evaluated) else 1
        return a_step(shape, config, world, long, short, tracker, targets, evaluated, warm=warm)


def a_step(
    shape: PretrainedConfig,
    config: RunConfig,
    world: World,
    long: int,
    short: int,
    tracker: Tracker,
    targets: Targets,
    evaluated: Evaluated | None = None,
    *,
    warm: int,
) -> Rehearsal:
    """What the tracker sees of a step, or of an evaluation, of a run with random weights, after `warm` others."""
    model = _model(shape, config)
    inputs = accepted(model)
    taking = build_optimizer(model, config, world)
    del model  # as it was before its weights were sharded
    zo = targets.micro_batches(config.k0, config.zo_micro_batch, long, shape.vocab_size)
    fo = targets.micro_batches(config.k1, config.fo_micro_batch, short, shape.vocab_size)
    zo, fo = ([placed(batch, inputs, world.device) for batch in batches] for batches in (zo, fo))
    with tracker.within("first-order forward"):
        for _ in range(warm + 1):
            gc.collect()
            tracker.begin()
            if evaluated is None:
                taking.train_step(zo, fo, targets.loss_fn)
            else:
                evaluated.run(taking, config, inputs)
    _let_go(taking)
    moments = {moment: {part: float(held.get(part, 0)) for part in PARTS} for moment, held in tracker.peaks.items()}
    return Rehearsal(moments, {**tracker.collectives}, {**tracker.received}, tracker.flops, tracker.most_on_host)


def _let_go(taking: Optimizer) -> None:
    """Remove Addax's hooks, and end its guests' threads."""
    if not isinstance(taking, Baseline):
        (taking if isinstance(taking, Addax) else taking.optimizer).detach()


def _model(shape: PretrainedConfig, config: RunConfig) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.weights_dtype))
    if config.activation_checkpointing:
        checkpoint_activations(model)
    return model if config.adapter is None else adapt(model, config.adapter, None, config.seed)
