"""Seconds and memory of a step at the shapes of large models, with random weights: what fits a GPU, and how fast."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

from addax_ds.adapters.choose import adapt
from addax_ds.bench.engines import on_engine
from addax_ds.bench.memory import held_now
from addax_ds.bench.ranks import on_ranks
from addax_ds.bench.step import Floor, Textbook
from addax_ds.bench.table import Bench
from addax_ds.config import RunConfig, build
from addax_ds.engines.base import Engine
from addax_ds.errors import UserError
from addax_ds.loss import IGNORED, token_loss
from addax_ds.micro_batches import Batch
from addax_ds.shapes import shape_of
from addax_ds.training.memory import read_peak, reset_peak
from addax_ds.training.models import build_optimizer
from addax_ds.training.world import World

LONG, SHORT = (6, 512), (4, 170)
"""Samples and tokens of the zeroth-order and the first-order batch; K^0, K^1 and L_T are the paper's for OPT-13B."""


@dataclass(frozen=True)
class Kind:
    """A kind of step: settings of the run, and what takes the place of its optimizer on the engine."""

    settings: dict[str, Any]
    instead: Callable[[Engine], Any] | None = None

    @property
    def config(self) -> RunConfig:
        """The run."""
        sizes = {"k0": LONG[0], "k1": SHORT[0], "zo_micro_batch": LONG[0], "fo_micro_batch": SHORT[0]}
        common = {"dtype": "bfloat16", "lr": 1e-5, "checkpoint_every": 0}
        return build(RunConfig, {**common, **sizes, **self.settings}, "bench scale")


_ADDAX: dict[str, Any] = {"method": "addax", "alpha": 1e-3}
KINDS: dict[str, Kind] = {
    "floor": Kind(_ADDAX, lambda engine: on_engine(Floor, engine, zo_micro_batch=LONG[0], fo_micro_batch=SHORT[0])),
    "addax": Kind(_ADDAX),
    "addax, rademacher": Kind({**_ADDAX, "distribution": "rademacher"}),
    "textbook": Kind(_ADDAX, lambda engine: Textbook(engine, lr=1e-5, alpha=1e-3, eps=1e-3, local_noise=False)),
    "mezo": Kind({"method": "mezo"}),
    "mezo, rademacher": Kind({"method": "mezo", "distribution": "rademacher"}),
    "adazeta": Kind({"method": "adazeta"}),
    "ip-sgd": Kind({"method": "ip-sgd"}),
    "sgd": Kind({"method": "sgd"}),
    "adamw": Kind({"method": "adamw"}),
    "lora, adamw": Kind({"method": "adamw", "adapter": {"kind": "lora"}}),
}


def bench_scale(model: str, ranks: int = 1, engine: str = "fsdp", kinds: tuple[str, ...] = (*KINDS,)) -> Bench:
    """Seconds, tokens per second and GiB per rank of every kind of step, in bfloat16.

    model: see `shape_of`. Zeroth-order parts take LONG, Addax's first-order part SHORT, and what is
    first-order alone takes as many samples of LONG's length. sgd and adamw keep float32 weights
    beside, as torch's mixed precision does. The floor is Addax with neither perturbation nor update;
    the textbook draws its noise tensor by tensor and adds it in place.
    """
    shape_of(model)
    if engine not in ("fsdp", "replicated"):
        raise UserError(f"engine {engine}: give fsdp or replicated")
    bench = Bench("scale", f"{model}, {engine}, {ranks} ranks, random weights")
    for kind in kinds:
        # Each in fresh processes: none starts in the memory that another has left.
        figures = on_ranks(measure, ranks, model=model, engine=engine, kind=kind)
        # A step takes as long as its slowest rank, and fits where it fits on all.
        whole = next((figure for figure in figures if "seconds" not in figure), None)
        bench.rows.append({"step": kind, **(whole or {key: max(f[key] for f in figures) for key in figures[0]})})
    return bench


def measure(world: World, model: str, engine: str, kind: str, steps: int = 3) -> dict[str, Any]:
    """Figures of one rank; `fits` alone where memory ran out."""
    settings: dict[str, Any] = {"engine": engine}
    config = dataclasses.replace(KINDS[kind].config, **settings)
    zeroth_only, first_only = config.alpha == 1, config.alpha == 0
    short = SHORT[0], LONG[1] if first_only else SHORT[1]
    taken = (0 if first_only else 2 * LONG[0] * LONG[1]) + (0 if zeroth_only else short[0] * short[1])
    try:
        optimizer = _optimizer(world, model, kind, config)
        vocabulary = shape_of(model).vocab_size
        zo = None if first_only else [_batch(*LONG, vocabulary, world.device)]
        fo = None if zeroth_only else [_batch(*short, vocabulary, world.device)]
        optimizer.train_step(zo, fo, token_loss)  # builds what later steps keep
        reset_peak()
        seconds = min(_seconds(lambda: optimizer.train_step(zo, fo, token_loss), world) for _ in range(steps))
        peak, held = read_peak(), held_now()
    except torch.OutOfMemoryError:
        return {"fits": "out of memory"}
    tokens = {"seconds": seconds, "tokens/s": taken / seconds}
    return {"fits": "yes", **tokens, "peak GiB": peak / 2**30, "between steps GiB": held / 2**30}


def _optimizer(world: World, model: str, kind: str, config: RunConfig) -> Any:
    with world.device:
        made: nn.Module = AutoModelForCausalLM.from_config(shape_of(model), dtype=getattr(torch, config.weights_dtype))
    if config.adapter is not None:
        made = adapt(made, config.adapter, None, config.seed)
    optimizer: Any = build_optimizer(made, config, world)
    instead = KINDS[kind].instead
    if instead is None:
        return optimizer
    held = optimizer.engine
    optimizer.detach()
    return instead(held)


def _batch(samples: int, tokens: int, vocabulary: int, device: torch.device) -> Batch:
    """Random tokens, of which the last is to be predicted."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(vocabulary, (samples, tokens), generator=generator)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1] = ids[:, -1]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _seconds(step: Callable[[], Any], world: World) -> float:
    dist.barrier()
    begun = time.perf_counter()
    step()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - begun
