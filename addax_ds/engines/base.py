"""What the optimizer asks of whatever holds the weights.

An engine hands out shards, gathers weights, tells when a unit of the host is gathered, and brings
each reduced gradient to its shard. It knows nothing of the method, of data or of files.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from addax_ds.core.shard import Shard
from addax_ds.core.skeleton import own_forwards, owned_weights
from addax_ds.engines.host_forward import HostForward, ungathered
from addax_ds.engines.units import units_of
from addax_ds.errors import UserError

OnGradient = Callable[[str, torch.Tensor], None]
"""Called with a parameter's name and this rank's part [n] of its summed gradient."""


class Engine(ABC):
    """Common ground of the engines: names, ranks and the scalar all-reduce."""

    name: str

    def __init__(self, model: nn.Module, skeleton: nn.Module) -> None:
        if late := own_forwards(model) ^ own_forwards(skeleton):
            raise UserError(
                f"{min(late) or 'the model'}.forward was replaced after addax_ds.shard, which zeroth-order forwards "
                "would not see: wrap the model first"
            )
        self.model = model
        self.skeleton = skeleton
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._modules = dict(model.named_modules())
        self.owners = {path: owned for path, _, owned in owned_weights(skeleton)}
        self._shapes = {
            name: getattr(module, local).shape
            for _, module, owned in owned_weights(skeleton)
            for local, name in owned.items()
        }
        self.names = list(dict.fromkeys(name for owned in self.owners.values() for name in owned.values()))
        self.units = units_of(model)
        """Module paths of each part that is gathered together."""
        self.gathered_with = {owner: [owner] for owner in self.owners}
        """Modules that own weights, to all those of their unit."""
        for unit in self.units:
            members = self.owners_in(unit)
            self.gathered_with.update(dict.fromkeys(members, members))
        self.trainable_names: set[str] = set()

    def trainable(self, name: str) -> bool:
        """Whether the parameter is perturbed and updated."""
        return name in self.trainable_names

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where batches and activations live."""

    @abstractmethod
    def is_gathered(self, path: str) -> bool:
        """Whether every weight that the module at `path` owns is whole in memory."""

    @abstractmethod
    def weight(self, path: str, local: str) -> torch.Tensor:
        """The gathered weight `local` of the module at `path`, to be read only."""

    @abstractmethod
    def gather(self, path: str) -> contextlib.AbstractContextManager[None]:
        """Gather the unit of the module at `path` for the length of the context (a collective)."""

    def agree(self, path: str, failed: bool) -> tuple[str, bool]:
        """One of the paths that ranks give, empty where none gives one, and whether any has failed (one all-reduce)."""
        paths = list(self.owners)
        votes = torch.zeros(len(paths) + 1, dtype=torch.float64)
        if path:
            votes[paths.index(path)] = 1.0
        votes[-1] = float(failed)
        *asked, failures = self.sum(votes).tolist()
        return next((path for path, number in zip(paths, asked, strict=True) if number), ""), failures > 0

    def prefetch(self, path: str) -> None:  # noqa: B027 - nothing to begin where every rank holds all
        """Begin the gather of the unit of the module at `path`, which the next `gather` asks for."""

    def drop_prefetched(self) -> None:  # noqa: B027
        """End a `prefetch` that no `gather` has asked for."""

    @abstractmethod
    def shard(self, name: str) -> Shard:
        """This rank's range of a parameter, as memory that can be written."""

    def shape(self, name: str) -> torch.Size:
        """Shape of the whole parameter."""
        return self._shapes[name]

    @abstractmethod
    def whole(self, name: str) -> torch.Tensor:
        """A copy of the whole parameter in its shape, on every rank (a collective)."""

    @abstractmethod
    def attach(self, parameters: dict[str, nn.Parameter], gathered: Callable[[], None], on_gradient: OnGradient):
        """Install the hooks of the host.

        parameters: the trainable ones by name. gathered: called each time a unit of the host's
        forward is gathered. on_gradient: called in the backward as each gradient leaves its
        reduction, which sums over ranks; at most one more whole gradient is in memory by then.
        """

    @abstractmethod
    def detach(self) -> None:
        """Remove every hook."""

    def host_forward(self) -> contextlib.AbstractContextManager[None]:
        """Around a forward of the host.

        Where it fails, this rank takes part in the gathers that the other ranks still make, and raises
        `HostForwardError` from the error. Where no forward before has shown them, all ranks raise at once.
        """
        return ungathered()

    def before_step(self) -> None:  # noqa: B027 - most engines have nothing to do
        """Called before the forwards of a step; raises where a setting would spoil it."""

    def after_step(self, backward_ran: bool) -> None:  # noqa: B027
        """Called after the last write of a step: gathered copies of old weights must go."""

    def is_primary_copy(self) -> bool:
        """Whether this rank's shards are counted in sums over all ranks (false for further replicas)."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over ranks of a vector on the CPU (one all-reduce)."""
        if self.world_size == 1:
            return values
        moved = values.to(self.device)
        dist.all_reduce(moved)
        return moved.cpu()

    def shards(self) -> Iterator[Shard]:
        """This rank's range of every parameter, frozen ones included."""
        return (self.shard(name) for name in self.names)

    def owners_in(self, unit: list[str]) -> list[str]:
        """Paths of the modules of a unit that own weights."""
        return [owner for owner in self.owners if any(owner == path or owner.startswith(f"{path}.") for path in unit)]

    def check_reached(self, paths: set[str]) -> None:
        """Raises `UserError` where no forward of a step, on any rank, has entered a unit with trainable weights.

        paths: of the modules that this rank's have entered (one all-reduce). Perturbations of such
        weights change no loss, so every step would move them at random.
        """
        owners = [self.owners_in(unit) for unit in self.units]
        entered = self.sum(torch.tensor([float(not paths.isdisjoint(inside)) for inside in owners]))
        for unit, inside, number in zip(self.units, owners, entered.tolist(), strict=True):
            trained = any(self.trainable(name) for owner in inside for name in self.owners[owner].values())
            if trained and not number:
                raise UserError(
                    f"{unit[0]} is never reached by the forward: freeze it (requires_grad_(False)) or remove it"
                )


class ShardedEngine(Engine):
    """An engine of whose weights each rank holds a part."""

    _gathers: HostForward
    """Set by `attach`."""

    def host_forward(self) -> contextlib.AbstractContextManager[None]:
        return self._gathers.watched()

    def failed_on(self, failed: bool) -> list[int]:
        """Ranks that have failed; failed: whether this one has (one all-reduce)."""
        told = torch.zeros(self.world_size)
        told[self.rank] = float(failed)
        return self.sum(told).nonzero().view(-1).tolist()

    @abstractmethod
    def share(self, name: str) -> tuple[int, dist.ProcessGroup | None]:
        """Elements of a parameter that a rank holds, and the ranks that hold it together.

        The last ranks hold fewer where the number of elements is no multiple. None is all ranks.
        """
