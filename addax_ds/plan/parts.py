"""What bytes of a step are for, told by the function that allocates them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from addax_ds import loss
from addax_ds.config import RunConfig
from addax_ds.core import guest, kernels, lanes, moved
from addax_ds.core.scratch import Scratch
from addax_ds.plan import fsdp
from addax_ds.plan.stand_ins import replaced
from addax_ds.plan.tracker import HOST, Tracker

PARTS = (
    *("weights", "gathered", "perturbed copies", "zeroth-order forwards", "first-order forward", "logits"),
    *("backward", "reduced gradients"),
)
"""What bytes of a GPU are for. "weights" are the shards, with an optimizer's states; "logits" are theirs once they are
there, and what the loss makes of them; "reduced gradients" are reductions' own buffers and what they leave."""

Parts = dict[tuple[Any, str], str]
"""By owner and name of a function, what it allocates for."""

_PARTS: Parts = {
    (Scratch, "_reserve"): "perturbed copies",
    (lanes.Rows, "look_up"): "perturbed copies",
    (moved.Moved, "_memory"): "perturbed copies",
    (torch.Tensor, "backward"): "backward",
}


@contextlib.contextmanager
def by_part(tracker: Tracker, config: RunConfig, *modes: contextlib.AbstractContextManager) -> Iterator[None]:
    """Names for what a step allocates, and whether it lies on the host.

    modes: what guests' threads enter with the tracker, real runs' none.
    """

    def counted(part: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with tracker.within(part):
                return function(*args, **kwargs)

        return run

    def in_guest(settings: Any, forward: Callable[[], Any]) -> Any:
        with contextlib.ExitStack() as stack:
            for mode in (*modes, tracker, tracker.within("zeroth-order forwards")):
                stack.enter_context(mode)
            return run_guest(settings, forward)

    # On a CPU the GPU's memory is the host's, and what would be copied from one to the other is handed on.

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        there = move(tensor, *args, **kwargs)
        goes_to_gpu = there is tensor and tracker.part == "gathered" and tracker.part_of(tensor) == HOST
        return there.clone() if goes_to_gpu else there

    def update(local: torch.Tensor, start: int, gradient: torch.Tensor | None, *args: Any) -> None:
        if gradient is not None and tracker.part_of(local) == HOST:
            with tracker.within(HOST):
                there = gradient if tracker.part_of(gradient) == HOST else gradient.clone()
                gradient = there.float()  # as the CPU's kernel takes it
        run_update(local, start, gradient, *args)

    def logits_at(*args: Any) -> torch.Tensor:
        logits = run_logits_at(*args)
        tracker.move(logits, "logits")
        return logits

    def cross_entropy(scores: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tracker.move(scores, "logits")
        with tracker.within("logits"):
            return run_cross_entropy(scores, *args, **kwargs)

    run_logits_at, run_cross_entropy = loss._logits_at, loss.cross_entropy
    run_guest, move, run_update = guest.HostSettings.run, torch.Tensor.to, kernels.update
    if config.engine == "deepspeed":
        from addax_ds.plan import zero3

        of_engine, on_host = zero3.PARTS, zero3.on_host(tracker)
    else:
        of_engine, on_host = fsdp.parts(config.offload), fsdp.on_host(tracker)
    parts = {**_PARTS, **of_engine}
    named = [(owner, name, counted(part, getattr(owner, name))) for (owner, name), part in parts.items()]
    everywhere = [(guest.HostSettings, "run", in_guest), (torch.Tensor, "to", to), (kernels, "update", update)]
    everywhere += [(loss, "_logits_at", logits_at), (loss, "cross_entropy", cross_entropy)]
    with replaced([*named, *on_host, *everywhere]), tracker.lifetimes():
        yield
