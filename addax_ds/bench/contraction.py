"""Tensor-train layers at Llama-2-7B's shapes: contracted in parallel, core by core, and dense ones beside them."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from addax_ds.adapters.tensor_train import TensorTrainLinear
from addax_ds.bench.table import Bench
from addax_ds.bench.timing import least_seconds

Shape: TypeAlias = tuple[str, int, int, tuple[int, ...], tuple[int, ...]]
# Name, inputs, outputs and their modes of an adapter's two layers in Llama-2-7B (AdaZeta, Yang et al., 2024).
LLAMA_2_7B: tuple[Shape, ...] = (
    ("4096 -> 64", 4096, 64, (16, 16, 16), (4, 4, 4)),
    ("64 -> 4096", 64, 4096, (4, 4, 4), (16, 16, 16)),
)
_Call: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def bench_contraction(
    tokens: int = 2048, ranks: tuple[int, ...] = (5, 16), shapes: tuple[Shape, ...] = LLAMA_2_7B, repeats: int = 9
) -> Bench:
    """Milliseconds and memory of a layer on `tokens` hidden states, of a forward alone and with its backward.

    Memory is the most that torch holds at once beside the layer's weights and its input. The peer is a
    dense layer of the same size; the parallel contraction is tried with 2, 3 and 4 groups of cores.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench("contraction", f"adapter layers of Llama-2-7B, {tokens:,} tokens, least time of {repeats}")
    for name, inputs, outputs, in_modes, out_modes in shapes:
        dense = nn.Linear(inputs, outputs, device=device)
        kinds: dict[tuple[str, int | None], tuple[nn.Module, _Call]] = {("dense", None): (dense, dense)}
        for rank in ranks:
            for groups in (2, 3, 4):
                layer = TensorTrainLinear(inputs, outputs, rank, in_modes, out_modes, groups=groups).to(device)
                kinds[f"parallel {groups}", rank] = layer, layer
            kinds["sequential", rank] = layer, layer.sequential
        given = torch.randn(tokens, inputs, device=device), torch.randn(tokens, outputs, device=device)
        forward = least_seconds({kind: partial(_forward, *kinds[kind], *given) for kind in kinds}, repeats, device)
        both = least_seconds({kind: partial(_with_backward, *kinds[kind], *given) for kind in kinds}, repeats, device)
        for kind, (timed, call) in kinds.items():
            bench.rows.append(
                {
                    "layer": name,
                    "contraction": kind[0],
                    "rank": kind[1],
                    "weights": sum(p.numel() for p in timed.parameters()),
                    "ms": forward[kind] * 1e3,
                    "MB": _peak(_forward, timed, call, *given) / 1e6,
                    "ms with backward": both[kind] * 1e3,
                    "MB with backward": _peak(_with_backward, timed, call, *given) / 1e6,
                }
            )
    return bench


def _forward(layer: nn.Module, call: _Call, x: torch.Tensor, above: torch.Tensor) -> None:
    with torch.no_grad():
        call(x)


def _with_backward(layer: nn.Module, call: _Call, x: torch.Tensor, above: torch.Tensor) -> None:
    layer.zero_grad()
    call(x).backward(above)


def _peak(run: Callable[..., None], layer: nn.Module, call: _Call, *given: torch.Tensor) -> int:
    """Bytes held at once beside the layer's weights and what it is given, by torch's own tracker."""
    layer.zero_grad()
    tracker = MemTracker()
    tracker.track_external(layer, *given)
    with tracker:
        run(layer, call, *given)
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*layer.parameters(), *given))
    return tracker.get_tracker_snapshot("peak")[given[0].device]["Total"] - held
