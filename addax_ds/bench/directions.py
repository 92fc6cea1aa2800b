"""How much the zeroth-order update spreads on fixed weights and one batch, by how its directions are drawn."""

import math
import statistics
from typing import Any

import torch

from addax_ds.bench.engines import MODEL, on_engine
from addax_ds.bench.table import Bench
from addax_ds.config import RunConfig
from addax_ds.data.partition import partition
from addax_ds.engines.base import Engine
from addax_ds.engines.choose import choose_engine
from addax_ds.loss import choice_loss
from addax_ds.optimizer import Addax
from addax_ds.training.models import accepted, load_model, locate_model
from addax_ds.training.run import prepare_inputs, step_batches, step_samples

CONFIG = RunConfig(method="mezo", model=MODEL, k0=8)


def bench_directions(draws: int = 64, micro_batches: tuple[int, ...] = (4, 2, 1), config: RunConfig = CONFIG) -> Bench:
    """Variance of the update, summed over weights, in units of that with one direction for the whole batch.

    micro_batches: samples in each, where each has a direction of its own. The peer is n-SPSA with two
    directions for the whole batch, at twice the forwards. `±` is one standard error of the variance.
    """
    bench = Bench("directions", f"{config.model} on {config.data}, {config.k0} samples, {draws} draws of each")
    prepared = prepare_inputs(config)
    pools = partition([example.length for example in prepared.train], config.lt)
    model = load_model(locate_model(config.model), config).to("cuda" if torch.cuda.is_available() else "cpu")
    engine, inputs = choose_engine(model), accepted(model)
    samples = step_samples(config, pools, 0)
    kinds: list[tuple[str, int, int]] = [("shared", config.k0, 1), ("shared", config.k0, 2)]
    kinds += [("per-micro-batch", size, 1) for size in micro_batches]
    for directions, size, queries in kinds:
        own: Any = {"directions": directions, "zo_micro_batch": size, "queries": queries}
        cut = RunConfig(**{**vars(config), **own})
        batches, _ = step_batches(cut, prepared, samples, inputs, engine.device)
        optimizer = on_engine(Addax, engine, alpha=1.0, lr=1.0, eps=config.eps, **own)
        variance, error = _variance(optimizer, engine, batches, draws)
        optimizer.detach()
        count = queries if directions == "shared" else queries * math.ceil(config.k0 / size)
        bench.rows.append(
            {
                "directions": directions,
                "of a step": count,
                "samples of each": size,
                "forwards of a sample": 2 * queries,
                "variance": variance,
                "±": error,
            }
        )
    for row in bench.rows:
        row["of shared"] = row["variance"] / bench.rows[0]["variance"]
    return bench


@torch.no_grad()
def _variance(optimizer: Addax, engine: Engine, batches: Any, draws: int) -> tuple[float, float]:
    """Of the update at learning rate 1, and its standard error; the weights end as they began."""
    weights = {name: engine.shard(name).local for name in engine.names}
    begun = {name: weight.clone() for name, weight in weights.items()}
    mean = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    squares = []
    for _ in range(draws):
        optimizer.train_step(batches, None, choice_loss)
        square = 0.0
        for name, weight in weights.items():
            update = begun[name] - weight
            square += float(update.double().square().sum())
            mean[name].add_(update, alpha=1 / draws)
            weight.copy_(begun[name])
        squares.append(square)
    square_of_mean = sum(float(update.double().square().sum()) for update in mean.values())
    unbiased = draws / (draws - 1)
    error = unbiased * statistics.stdev(squares) / math.sqrt(draws)
    return unbiased * (statistics.fmean(squares) - square_of_mean), error
