"""Comparison of an engine's steps with `addax_ds.reference`, one step at a time."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from addax_ds.config import AddaxConfig
from addax_ds.micro_batches import cut
from addax_ds.reference import addax_step
from tests.engines.setups import Running

# Design: each step agrees with the reference, given its own g0, within this, in float32.
RELATIVE = 1e-6
# A loss is a float32 that may end a few roundings away from the reference's.
LOSS_ULPS = 4


def check_steps(
    running: Running,
    reference: nn.Module,
    batches: list[tuple[Any, Any]],
    loss_fn: Callable,
    lr_of: Callable[[str], float] | None = None,
) -> None:
    """Take a step per (zo, fo) and hold each against the reference's from the same weights.

    lr_of: the learning rate by name where groups differ.
    """
    config: AddaxConfig = running.optimizer.config
    for step, (zo, fo) in enumerate(batches, start=running.optimizer.steps):
        metrics = running.train_step(zo, fo, loss_fn)
        after = running.weights()
        assert not metrics["skipped"]
        assert metrics["step"] == step + 1
        if dist.get_rank() == 0:  # collectives are over, and one reference is enough
            _check_step(config, reference, step, zo, fo, loss_fn, metrics, after, lr_of)
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                parameter.copy_(after[name])


def _check_step(config, reference, step, zo, fo, loss_fn, metrics, after, lr_of) -> None:
    zo_batches = cut(zo, config.zo_micro_batch, "zo") if config.alpha > 0 else []
    fo_batches = cut(fo, config.fo_micro_batch, "fo") if config.alpha < 1 else []
    expected, g0 = addax_step(reference, zo_batches, fo_batches, loss_fn, config, step)
    per_batch = 1 if config.directions == "shared" else len(zo_batches)
    assert len(metrics["g0"]) == len(g0) == (config.queries * per_batch if config.alpha > 0 else 0)
    for query, (got, wanted) in enumerate(zip(metrics["g0"], g0, strict=True)):
        loss = max(metrics["loss_zo"]["plus"][query], metrics["loss_zo"]["minus"][query])
        # Two losses, each a few units in the last place off, and 1 / (2 eps) multiplies the difference.
        tolerance = 2 * LOSS_ULPS * torch.finfo(torch.float32).eps * loss / (2 * config.eps)
        assert abs(got - wanted) <= tolerance, f"step {step}: g0 {got}, reference {wanted}, tolerance {tolerance}"
    if metrics["g0"] != g0:
        expected, _ = addax_step(reference, zo_batches, fo_batches, loss_fn, config, step, g0=metrics["g0"])
    before = dict(reference.named_parameters())
    assert after.keys() == before.keys()
    for name, weight in after.items():
        if name not in expected:
            assert torch.equal(weight, before[name]), f"step {step}: {name} is frozen and moved"
            continue
        wanted = expected[name]
        if lr_of is not None:
            wanted = before[name] + (wanted.double() - before[name]) * (lr_of(name) / config.lr)
        error = ((weight - wanted).norm() / wanted.norm()).item()
        assert error <= RELATIVE, f"step {step}: {name} is {error:.1e} from the reference"
