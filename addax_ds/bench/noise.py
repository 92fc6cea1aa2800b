"""How fast weights are perturbed and updated, beside the plain torch operations of the same memory."""

from collections.abc import Callable
from functools import partial

import torch

from addax_ds.bench.table import Bench
from addax_ds.bench.timing import least_seconds
from addax_ds.core import kernels
from addax_ds.core.noise import Distribution
from addax_ds.core.plain import Perturbation, Step

ELEMENTS = 1 << 25


def bench_noise(elements: int = ELEMENTS, repeats: int = 7) -> Bench:
    """Elements per second on float32 and, on a GPU, bfloat16 weights; all figures in one run.

    The peers are what a step without counter-based noise would do: `x.add_(c)` touches the same
    memory without any noise, `out.copy_(x)` reads one tensor and writes another as perturbing into
    scratch does, `x.add_(torch.randn(...), alpha=c)` is the textbook's perturbation.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench("noise", f"{elements:,} elements, least time of {repeats}")
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        x = torch.randn(elements, device=device).to(dtype)
        out, gradient = torch.empty_like(x), torch.randn(elements, device=device)
        actions: dict[str, Callable[[], object]] = {
            "x.add_(c)": partial(x.add_, 1e-3),
            "out.copy_(x)": partial(out.copy_, x),
            "x.add_(torch.randn(...), alpha=c)": partial(_add_noise, x),
        }
        distributions: tuple[Distribution, ...] = ("normal", "rademacher")
        for distribution in distributions:
            point = Perturbation(1, 0, 1, 1e-3, distribution)
            step = Step(1, 1e-3, 0.0, 0.999, (1e-3,), distribution, True)
            for place, side in (("in place", x), ("into scratch", out)):
                actions[f"perturb {place}, {distribution}"] = partial(kernels.perturb, x, 0, side, None, "w", point)
            actions[f"fused update, {distribution}"] = partial(kernels.update, x, 0, gradient, "w", step)
        speeds = {name: elements / seconds for name, seconds in least_seconds(actions, repeats, device).items()}
        for name, speed in speeds.items():
            bench.rows.append(
                {
                    "operation": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "M elements/s": speed / 1e6,
                    "of x.add_(c)": speed / speeds["x.add_(c)"],
                    "of out.copy_(x)": speed / speeds["out.copy_(x)"],
                    "of x.add_(randn)": speed / speeds["x.add_(torch.randn(...), alpha=c)"],
                }
            )
    return bench


def _add_noise(x: torch.Tensor) -> None:
    x.add_(torch.randn_like(x), alpha=1e-3)
