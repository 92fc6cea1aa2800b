"""Trouble on one rank is trouble on all: they skip, or raise, together, and go on afterwards."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

import addax_ds
from addax_ds.errors import UserError
from tests.engines.agreement import check_steps
from tests.engines.setups import HYPER, batch_for, build_model, loss_for, running
from tests.world import World

MODEL = "llama-tied"
ENGINES = ("replicated", "fsdp", "zero3", "zero3-evicting")


def scaled_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss times a factor that comes with each sample."""
    batch = dict(batch)
    factor = batch.pop("factor")
    return loss_for(MODEL)(model, batch) * factor


def poisoned(samples: int, tokens: int, factor: float | None, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch whose last sample, of one rank only, has loss times `factor`."""
    batch = batch_for(MODEL, samples, tokens, seed)
    batch["factor"] = torch.ones(samples, device=batch["input_ids"].device)
    if factor is not None:
        batch["factor"][-1] = factor
    return batch


def skip_and_go_on(engine: str, where: str, factor: float) -> None:
    model, reference = build_model(MODEL), build_model(MODEL)
    alpha = 1.0 if where == "only guests" else 0.3
    with running(engine, model, alpha=alpha, max_loss=100.0) as run:
        before = run.digest()
        zo = poisoned(4, 12, None if where == "host" else factor)
        fo = poisoned(4, 6, factor if where == "host" else None)
        metrics = run.train_step(zo, fo, scaled_loss)
        assert metrics["skipped"] is True
        assert run.digest() == before
        good = [(poisoned(4, 12, None, i), poisoned(4, 6, None, i)) for i in (1, 2)]
        check_steps(run, reference, good, scaled_loss)


@pytest.mark.parametrize(
    ("where", "factor"),
    [
        ("guest", float("inf")),
        ("host", float("nan")),
        ("only guests", float("nan")),
        ("guest", 1e3),  # finite, and above max_loss
        ("host", 1e3),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world", [2], indirect=True)
def test_a_loss_that_is_not_finite_or_a_spike_on_one_rank_writes_nothing_anywhere(
    world: World, engine: str, where: str, factor: float
):
    world.run(skip_and_go_on, engine=engine, where=where, factor=factor)


def skip_among_micro_batches(engine: str) -> None:
    """The bad loss is in the first of two rounds: its gradient is in the buffer already."""
    model, reference = build_model(MODEL), build_model(MODEL)
    with running(engine, model, fo_micro_batch=1) as run:
        before = run.digest()
        fo = poisoned(4, 6, None)
        fo["factor"][0] = float("inf")
        assert run.train_step(poisoned(2, 12, None), fo, scaled_loss)["skipped"]
        assert run.digest() == before
        check_steps(run, reference, [(poisoned(2, 12, None, 1), poisoned(4, 6, None, 1))], scaled_loss)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
@pytest.mark.parametrize("world", [2], indirect=True)
def test_a_skipped_step_leaves_no_gradient_for_the_next(world: World, engine: str):
    world.run(skip_among_micro_batches, engine=engine)


def loss_with_a_gradient_of_nan(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Finite losses; with a factor of 0, the gradient of one element of the norm's output is not a number."""
    batch = dict(batch)
    factor = batch.pop("factor")
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    element = hidden[:, 0, 3]
    zero = element - element.detach()
    losses = hidden.float().square().mean(dim=(1, 2))
    return losses + zero.abs().sqrt() if (factor == 0).any() else losses


def leave_out(engine: str) -> int:
    model = build_model(MODEL)
    with running(engine, model) as run:
        before = run.weights()
        metrics = run.train_step(poisoned(4, 12, None), poisoned(4, 6, 0.0), loss_with_a_gradient_of_nan)
        assert not metrics["skipped"]
        left_out = run.optimizer.gradients_left_out
        after = run.weights()
        assert all(weight.isfinite().all() for weight in after.values())
        # The one element of the last norm's scale moves by its zeroth-order part alone, as do all below.
        for name, at in (("model.norm.weight", 3), ("model.layers.0.mlp.up_proj.weight", 0)):
            z = addax_ds.noise(metrics["seed"], name, at, at + 1)
            moved = (after[name] - before[name]).view(-1)[at]
            expected = -HYPER["lr"] * HYPER["alpha"] * metrics["g0"][0] * z[0]
            assert torch.isclose(moved, expected, rtol=1e-3, atol=1e-8), (name, moved, expected)
        others = (after["model.norm.weight"] - before["model.norm.weight"])[4:]
        assert (others != 0).all()
        run.train_step(poisoned(4, 12, None), poisoned(4, 6, None), loss_with_a_gradient_of_nan)
        assert run.optimizer.gradients_left_out == 0
    return left_out


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world", [2], indirect=True)
def test_gradient_elements_that_are_not_finite_are_left_out_and_counted(world: World, engine: str):
    counts = world.run(leave_out, engine=engine)
    below = sum(p.numel() for name, p in build_model(MODEL).named_parameters() if "layers" in name)
    # Of the whole model, however it is held: all below the norm but a bias of nothing, and one of its own elements.
    assert sum(counts) >= below // 2
    assert sum(counts) == sum(world.run(leave_out, engine="replicated"))


def probe_with_mixed_infinities(engine: str) -> None:
    """One rank's losses hold both infinities, which a plain exact sum refuses on that rank alone."""
    with running(engine, build_model(MODEL), alpha=1.0) as run:
        before = run.digest()
        zo = poisoned(2, 12, None)
        if dist.get_rank() == 1:
            zo["factor"][:] = torch.tensor([float("inf"), -float("inf")])
        assert run.optimizer.probe(lambda model: scaled_loss(model, zo))["skipped"]
        (run.deepspeed or run.optimizer).step()
        assert run.digest() == before


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
@pytest.mark.parametrize("world", [2], indirect=True)
def test_a_probe_that_is_not_finite_on_one_rank_skips_on_all(world: World, engine: str):
    world.run(probe_with_mixed_infinities, engine=engine)


def different_batches(engine: str, change: str, first: bool) -> None:
    model, reference = build_model(MODEL), build_model(MODEL)
    rank = dist.get_rank()
    with running(engine, model) as run:
        good = [(batch_for(MODEL, 4, 12, i), batch_for(MODEL, 4, 6, i)) for i in range(2)]
        if not first:
            check_steps(run, reference, good[:1], loss_for(MODEL))
        before = run.digest()
        zo, fo = batch_for(MODEL, 4, 12), batch_for(MODEL, 4, 6, 1)
        if change == "tokens":
            zo["input_ids"] = (zo["input_ids"] + rank) % 97
        elif change == "samples":
            fo = batch_for(MODEL, 3 + rank, 6, 1)
        elif change == "micro-batches":
            fo = batch_for(MODEL, 4 + 4 * rank, 6, 1)
        with pytest.raises(UserError, match="different batches"):
            run.train_step(zo, fo)
        assert run.digest() == before
        check_steps(run, reference, good[1:], loss_for(MODEL))


@pytest.mark.parametrize(
    ("change", "first"), [("tokens", True), ("tokens", False), ("samples", True), ("micro-batches", True)]
)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world", [2], indirect=True)
def test_ranks_with_different_batches_all_raise(world: World, engine: str, change: str, first: bool):
    world.run(different_batches, engine=engine, change=change, first=first)


class BrokenError(Exception):
    """Raised by a loss function."""


def failing_loss(where: str) -> Callable:
    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        losses = loss_for(MODEL)(model, batch)
        if torch.is_grad_enabled() == (where == "host"):
            raise BrokenError
        return losses

    return loss


def fail_and_go_on(engine: str) -> None:
    model, reference = build_model(MODEL), build_model(MODEL)
    zo, fo = batch_for(MODEL, 4, 12), batch_for(MODEL, 4, 6)
    with running(engine, model) as run:
        before = run.digest()
        for where in ("guest", "host"):
            with pytest.raises(BrokenError):
                run.train_step(zo, fo, failing_loss(where))
            assert run.digest() == before
        check_steps(run, reference, [(zo, fo)], loss_for(MODEL))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world", [2], indirect=True)
def test_after_an_error_in_a_loss_function_the_next_step_works(world: World, engine: str):
    world.run(fail_and_go_on, engine=engine)


def loss_that_fails_on_13(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The scaled loss; a guest that meets the factor 13 fails before its forward, others after it."""
    if torch.is_grad_enabled() or not (batch["factor"] > 12).any():
        return scaled_loss(model, batch)
    if (batch["factor"] == 13).any():
        raise BrokenError
    scaled_loss(model, batch)
    raise BrokenError


def one_rank_fails(engine: str, alpha: float, perturb: str, at_first: bool) -> None:
    model, reference = build_model(MODEL), build_model(MODEL)
    rank = dist.get_rank()
    good = [(poisoned(4, 12, None, i), poisoned(4, 6, None, i)) for i in range(2)]
    with running(engine, model, alpha=alpha, perturb=perturb) as run:
        if not at_first:
            check_steps(run, reference, good[:1], scaled_loss)
        before = run.digest()
        for sample, factor in ((0, 13), (2, 14)):  # of rank 0 and 1
            zo = poisoned(4, 12, None)
            zo["factor"][sample] = factor
            if factor == 14:  # an evaluation in between gathers in its own way
                run.optimizer.run_guests([lambda model: [loss_for(MODEL)(model, good[0][1]) for _ in range(3)]])
            culprit = sample // 2
            with pytest.raises(BrokenError if rank == culprit else RuntimeError) as raised:
                run.train_step(zo, good[0][1], scaled_loss if rank != culprit else loss_that_fails_on_13)
            assert rank == culprit or f"failed on rank {culprit}" in str(raised.value)
            assert run.digest() == before
        if alpha == 1:
            mine = good[0][0]
            probed = loss_that_fails_on_13 if rank == 1 else scaled_loss
            mine["factor"][0] = 13
            with pytest.raises(BrokenError if rank == 1 else RuntimeError):
                run.optimizer.probe(lambda model: probed(model, mine))
            assert run.digest() == before
        check_steps(run, reference, good[1:], scaled_loss)


@pytest.mark.parametrize("at_first", [False, True])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize(
    ("engine", "perturb"),
    [*((engine, "gathered") for engine in ENGINES), ("fsdp", "shard"), ("zero3-evicting", "shard")],
)
@pytest.mark.parametrize("world", [2], indirect=True)
def test_a_guest_that_fails_on_one_rank_fails_the_step_on_all(
    world: World, engine: str, alpha: float, perturb: str, at_first: bool
):
    world.run(one_rank_fails, engine=engine, alpha=alpha, perturb=perturb, at_first=at_first)


def failing_at(place: str, meant: Callable[[dict], bool], whole: Callable) -> Callable:
    """The loss `whole`, which fails in one place of the host's forward of the batches that are meant."""

    def fail(*_: object) -> None:
        if torch.is_grad_enabled():
            raise BrokenError

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if not meant(batch):
            return whole(model, batch)
        if place == "before":
            fail()
        inside = model.get_submodule("" if place in ("before", "after") else place)
        handle = inside.register_forward_pre_hook(fail) if inside is not model else None
        try:
            losses = whole(model, batch)
        finally:
            if handle is not None:
                handle.remove()
        fail()
        return losses

    return loss


def twice(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss that calls the model again: units are gathered for each call."""
    return scaled_loss(model, batch) + scaled_loss(model, {**batch, "input_ids": batch["input_ids"].flip(0)})


def the_host_fails_on_one_rank(
    engine: str, name: str, fo_micro_batch: int, calls: int, at_first: bool, **options
) -> None:
    loss = {1: scaled_loss, 2: twice}[calls]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    good = [(poisoned(4, 12, None, i), poisoned(4, 6, None, i)) for i in range(2)]
    digests = []
    for places in ((), ("before", "model.embed_tokens", "model.layers.0", "model.layers.1.mlp", "lm_head", "after")):
        with running(engine, build_model(name), fo_micro_batch=fo_micro_batch, **options) as run:
            if not at_first:  # what the forwards of the other ranks gather is known from a step before
                run.train_step(*good[0], loss)
            before = run.digest()
            for place in places:
                for sample in (0, 3):  # the first of its rounds, and the last
                    culprit = sample // fo_micro_batch % ranks
                    fo = poisoned(4, 6, None)
                    fo["factor"][sample] = 13

                    def meant(batch: dict[str, torch.Tensor]) -> bool:
                        return bool((batch["factor"] == 13).any())

                    with pytest.raises(BrokenError if rank == culprit else RuntimeError) as raised:
                        run.train_step(good[0][0], fo, failing_at(place, meant, loss))
                    assert rank == culprit or f"a forward failed on rank {culprit}" in str(raised.value)
                    assert run.digest() == before
            run.train_step(*good[1], loss)
            digests.append(run.digest())
    assert digests[0] == digests[1]


PREFETCHING = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 3000}


@pytest.mark.parametrize(
    ("world", "cell"),
    [
        *((2, {"engine": engine, "fo_micro_batch": size}) for engine in ENGINES for size in (2, 1)),
        *((2, {"engine": engine, "name": "mixtral"}) for engine in ("fsdp", "zero3", "zero3-evicting")),
        *((2, {"engine": engine, "calls": 2}) for engine in ("fsdp", "zero3", "zero3-evicting")),
        (2, {"engine": "zero3", "zero": PREFETCHING}),
        (2, {"engine": "zero3", "name": "llama-untied", "zero": PREFETCHING, "calls": 2}),
        *((4, {"engine": engine, "fo_micro_batch": 1}) for engine in ("hsdp", "zero3-hpz")),
    ],
    indirect=["world"],
    ids=str,
)
@pytest.mark.parametrize("at_first", [False, True])
def test_a_host_that_fails_on_one_rank_fails_the_step_on_all(world: World, cell: dict, at_first: bool):
    world.run(
        the_host_fails_on_one_rank, **{"name": MODEL, "fo_micro_batch": 2, "calls": 1, "at_first": at_first, **cell}
    )


def loss_with_a_broken_backward(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The scaled loss; the backward of a batch with the factor 13 fails in the first block."""

    def break_backward(gradient: torch.Tensor) -> None:
        raise BrokenError

    def watch(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if output.requires_grad and (batch["factor"] == 13).any():
            output.register_hook(break_backward)

    handle = model.model.layers[0].register_forward_hook(watch)
    try:
        return scaled_loss(model, batch)
    finally:
        handle.remove()


def fail_in_the_backward_and_go_on(engine: str) -> None:
    model, reference = build_model(MODEL), build_model(MODEL)
    with running(engine, model, fo_micro_batch=1) as run:
        before = run.digest()
        fo = poisoned(4, 6, None)
        fo["factor"][:2] = 13  # the first round, whose gradients are only added up
        with pytest.raises(BrokenError):
            run.train_step(poisoned(2, 12, None), fo, loss_with_a_broken_backward)
        assert run.digest() == before
        check_steps(run, reference, [(poisoned(2, 12, None, 1), poisoned(4, 6, None, 1))], scaled_loss)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world", [2], indirect=True)
def test_gradients_of_a_backward_that_failed_are_forgotten(world: World, engine: str):
    world.run(fail_in_the_backward_and_go_on, engine=engine)
