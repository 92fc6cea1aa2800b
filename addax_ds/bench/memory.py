"""Peak memory per rank of Addax and of what one would use in its place, each in fresh processes."""

import itertools
import sys
from dataclasses import replace
from typing import Any

import torch

from addax_ds.bench.engines import MODEL, check, on_engine, sharded_engine
from addax_ds.bench.ranks import on_ranks
from addax_ds.bench.table import Bench
from addax_ds.config import RunConfig, TensorTrainConfig
from addax_ds.data.partition import partition
from addax_ds.errors import UserError
from addax_ds.loss import choice_loss
from addax_ds.micro_batches import Batch
from addax_ds.optimizer import Addax
from addax_ds.training.memory import read_peak, reset_peak, resident
from addax_ds.training.models import accepted
from addax_ds.training.run import prepare_inputs, step_batches, step_samples
from addax_ds.training.world import World

STEPS = 2
METHODS = ("mezo", "addax", "ip-sgd", "sgd", "adamw", "adazeta", "adazeta, bfloat16")
# Gradients of one micro-batch wait for the next one's: what a third would hold, the second holds.
ACCUMULATED = 2
# Else the C library keeps freed tensors of up to 32 MB, and peaks come out two to three times too high.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "2"}
# Whole product reviews of up to 1,400 tokens. Without activations a micro-batch of 16 of them fits where a
# backward takes one short one, and at two ranks each takes one micro-batch of both kinds.
CONFIG = RunConfig(
    model=MODEL,
    data="amazon",
    train_samples=200,
    eval_samples=1,
    lt=60,
    k0=32,
    k1=2,
    zo_micro_batch=16,
    fo_micro_batch=1,
)


def bench_memory(
    ranks: int = 2,
    config: RunConfig = CONFIG,
    methods: tuple[str, ...] = METHODS,
    checkpointing: tuple[bool, ...] = (False, True),
) -> Bench:
    """MB per rank, of FSDP2 shards in float32, with and without activation checkpointing.

    All take the same batch of documents longer than L_T, mezo and addax zeroth-order; addax adds its
    first-order batch of the rest. ip-sgd, sgd and adamw take that batch in micro-batches of
    `fo_micro_batch`, of which each rank runs only the two of the longest documents: the peak is theirs.
    adazeta takes it zeroth-order in micro-batches of that size; its backbone is frozen.
    """
    check("fsdp", ranks, config)
    if not torch.cuda.is_available() and sys.platform != "linux":
        raise UserError("peak memory is read from Linux or from a GPU: run this table on one of them")
    bench = Bench("memory", f"MB per rank, {config.model} on {config.data}, FSDP2, {ranks} ranks")
    for recompute, method in itertools.product(checkpointing, methods):
        figures = on_ranks(measure, ranks, variables=_MALLOC, method=method, config=_of(method, config, recompute))
        bench.rows.append(
            {
                "method": method,
                "activation checkpointing": "yes" if recompute else "no",
                **{name: max(figure[name] for figure in figures) / 1e6 for name in figures[0]},
            }
        )
    for row in bench.rows:
        peers = {
            other["method"]: other
            for other in bench.rows
            if other["activation checkpointing"] == row["activation checkpointing"]
        }
        row["peak of mezo's"] = row["peak"] / peers["mezo"]["peak"]
        row["weights and states of addax's"] = row["weights and states"] / peers["addax"]["weights and states"]
    return bench


def _of(method: str, config: RunConfig, checkpointing: bool) -> RunConfig:
    config = replace(config, activation_checkpointing=checkpointing)
    if method.startswith("adazeta"):
        config = replace(config, alpha=1.0, adapter=TensorTrainConfig(), zo_micro_batch=config.fo_micro_batch)
    return replace(config, dtype="bfloat16") if method.endswith("bfloat16") else config


def measure(world: World, method: str, config: RunConfig) -> dict[str, int]:
    """Bytes on this rank: weights, gradients and states kept after a step, and the peak with the weights."""
    prepared = prepare_inputs(config)
    pools = partition([example.length for example in prepared.train], config.lt)
    engine = sharded_engine(world, "fsdp", config)
    model: Any = engine.model
    inputs = accepted(model)
    alpha = {"mezo": 1.0, "ip-sgd": 0.0}.get(method, config.alpha)
    optimizer: Any
    if method in ("sgd", "adamw"):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, 1e-5) if method == "sgd" else torch.optim.AdamW(parameters, 1e-5)
    else:
        hyper = {"lr": 1e-5, "zo_micro_batch": config.zo_micro_batch, "fo_micro_batch": config.fo_micro_batch}
        optimizer = on_engine(Addax, engine, alpha=alpha, **hyper)
    weights = _bytes(list(model.parameters()))
    reset_peak()
    before = held_now()
    for step in range(STEPS):
        samples = step_samples(config, pools, step)
        if method in ("ip-sgd", "sgd", "adamw"):
            longest = sorted(samples[0], key=lambda number: prepared.train[number].length, reverse=True)
            samples = [], longest[: ACCUMULATED * world.size * config.fo_micro_batch]
        zo, fo = step_batches(config, prepared, samples, inputs, engine.device)
        if isinstance(optimizer, Addax):
            optimizer.train_step(zo, fo, choice_loss)
        else:
            assert fo is not None  # samples were given
            _torch_step(optimizer, model, fo, world)
    held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    held += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    # What the process holds besides its tensors, Python and its libraries, is in both readings.
    return {"weights and states": _bytes(held), "peak": weights + max(read_peak() - before, 0)}


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of these tensors on this rank."""
    local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def _torch_step(optimizer: torch.optim.Optimizer, model: Any, batches: list[Batch], world: World) -> None:
    """A step of a torch optimizer on this rank's micro-batches; gradients are kept, as training loops do."""
    model.train()
    optimizer.zero_grad()
    for batch in batches[world.rank :: world.size]:
        choice_loss(model, batch).mean().backward()
    optimizer.step()


def held_now() -> int:
    """Bytes that tensors hold on the GPU, or this process without one."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return resident()
