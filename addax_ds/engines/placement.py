"""Where the noise is added: to gathered weights, or to each shard on its way into the gather.

`gathered` draws z for every weight on every rank and needs one gather for all guests. `shard` draws
1 / N of it on each of N ranks, and each point needs a gather of its own. Both give the same bits,
since z is named by element.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from addax_ds.config import AddaxConfig
from addax_ds.core.kernels import perturb
from addax_ds.core.noise import Distribution
from addax_ds.core.plain import Perturbation
from addax_ds.engines.base import Engine, ShardedEngine

_TRIAL = 1 << 22  # elements that are perturbed and gathered to measure both speeds


_Pending = tuple[torch.Tensor, dist.Work | None]
"""A gather under way: where the whole parameter will be, and what to wait for."""


class MovedShards:
    """What guests at one point read: weights gathered from copies of the shards that were moved.

    The shards themselves are only read. Implements `lanes.Weights`.
    """

    def __init__(self, engine: ShardedEngine, point: Perturbation) -> None:
        self._engine = engine
        self._point = point
        self._held: dict[str, torch.Tensor] = {}
        self._prefetched: dict[str, _Pending] = {}

    def trainable(self, name: str) -> bool:
        """False: what is gathered here has been moved already."""
        return False

    def is_gathered(self, path: str) -> bool:
        """See `lanes.Weights`."""
        return all(name in self._held for name in self._engine.owners[path].values())

    def weight(self, path: str, local: str) -> torch.Tensor:
        """See `lanes.Weights`."""
        return self._held[self._engine.owners[path][local]]

    @contextlib.contextmanager
    def gather(self, path: str) -> Iterator[None]:
        """See `lanes.Weights`."""
        names = self._names(path)
        if self._prefetched.keys() != names.keys():
            self.prefetch(path)
        for name, (whole, work) in self._prefetched.items():
            if work is not None:
                work.wait()
            self._held[name] = whole
        self._prefetched = {}
        try:
            yield
        finally:
            self._held = {}

    def agree(self, path: str, failed: bool) -> tuple[str, bool]:
        """See `lanes.Weights`."""
        return self._engine.agree(path, failed)

    def prefetch(self, path: str) -> None:
        """See `lanes.Weights`."""
        self._prefetched = {name: self._start(name) for name in self._names(path)}

    def drop_prefetched(self) -> None:
        """See `lanes.Weights`."""
        self._prefetched = {}

    def _names(self, path: str) -> dict[str, None]:
        engine = self._engine
        return dict.fromkeys(name for owner in engine.gathered_with[path] for name in engine.owners[owner].values())

    def _start(self, name: str) -> "_Pending":
        """Begin the gather of a parameter: its whole copy, complete once the work is done."""
        engine = self._engine
        shard, shape = engine.shard(name), engine.shape(name)
        share, group = engine.share(name)
        moved = shard.local.new_empty(share)
        mine = moved[: shard.local.numel()]
        if self._point.sign and engine.trainable(name):
            plus, minus = (mine, None) if self._point.sign > 0 else (None, mine)
            perturb(shard.local, shard.start, plus, minus, name, self._point)
        else:
            mine.copy_(shard.local)
        moved = moved.to(engine.device)
        ranks = dist.get_world_size(group)
        if ranks == 1:
            return moved[: shard.numel].view(shape), None
        out = moved.new_empty(ranks * share)
        work = dist.all_gather_into_tensor(out, moved, group=group, async_op=True)
        return out[: shard.numel].view(shape), work


def choose_placement(engine: Engine, config: AddaxConfig, directions: int) -> tuple[str, str]:
    """("gathered" or "shard", why), the same on every rank; for `perturb: auto` what costs a step less.

    directions: the most that a rank draws where weights are gathered. All three speeds are measured
    here, on the engine's own devices and links (collectives).
    """
    if config.perturb != "auto":
        return config.perturb, "as set"
    if not isinstance(engine, ShardedEngine):
        return "gathered", "every rank holds every weight"
    if config.directions != "shared":
        return "gathered", "each micro-batch has directions of its own"
    queries, distribution = config.queries, config.distribution
    _, group = engine.share(engine.names[0])
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return "gathered", "a shard is the whole weight"
    shards = list(engine.shards())
    trained = [shard for shard in shards if engine.trainable(shard.name)]
    numel = sum(shard.numel for shard in trained)
    size = sum(shard.numel * shard.local.element_size() for shard in shards)  # frozen weights are gathered too
    noise = _noise_speed(engine.device, distribution)
    noise_on_shards = _noise_speed(trained[0].local.device, distribution)  # with CPU offload, not the device
    link = _link_speed(engine.device, group)
    # z is drawn once for both signs of a gathered weight, by the ranks that need it, and of a shard once for
    # each sign, of all directions.
    gathered = directions * numel / noise
    shard = 2 * queries * (numel / ranks / noise_on_shards + size * (ranks - 1) / ranks / link)
    costs = torch.tensor([gathered, shard], dtype=torch.float64)
    gathered, shard = (engine.sum(costs) / engine.world_size).tolist()
    choice = "shard" if shard < gathered else "gathered"
    return choice, (
        f"noise {noise / 1e6:.0f} M elements/s, link {link / 1e9:.2f} GB/s, {ranks} shards: "
        f"gathered costs {gathered:.3f} s of noise a step, shard {shard:.3f} s of noise and gathers"
    )


def _noise_speed(device: torch.device, distribution: Distribution) -> float:
    """Elements perturbed per second, both signs."""
    weight = torch.zeros(_TRIAL, device=device)
    plus, minus = torch.empty_like(weight), torch.empty_like(weight)
    point = Perturbation(0, 0, 1, 1e-3, distribution)
    return _TRIAL / _seconds(device, lambda: perturb(weight, 0, plus, minus, "trial", point))


def _link_speed(device: torch.device, group: dist.ProcessGroup | None) -> float:
    """Bytes received per second in an all-gather."""
    ranks = dist.get_world_size(group)
    part = torch.zeros(_TRIAL // ranks, device=device)
    whole = part.new_empty(len(part) * ranks)
    received = (ranks - 1) * len(part) * part.element_size()
    return received / _seconds(device, lambda: dist.all_gather_into_tensor(whole, part, group=group))


def _seconds(device: torch.device, action: Callable[[], object]) -> float:
    """Least time of three, after one that warms up."""

    def once() -> float:
        begun = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    once()
    return min(once() for _ in range(3))
