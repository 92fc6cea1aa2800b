"""Lanes: several forwards that share one gather of every weight.

A **guest** is a no-grad forward of a skeleton on a thread of its own, with strict hand-over: one
thread runs at a time. Before a module whose weights are not gathered a guest parks. Where they are,
the first guest of a direction builds W + c z and W - c z, which the others find; it goes on for a
**stretch** of modules, as many as there is memory for such copies, and then the others follow.
Gathered weights and shards are only read, so there is nothing to restore.

The **host** is the user's model itself and knows nothing of all this: `Lanes.advance`, called
when a unit of the host is gathered, runs every guest as far as the gathered weights reach.
Without a host `Lanes.drive` gathers unit by unit what the guests ask for.
"""

import contextlib
import itertools
import numbers
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from addax_ds.core.atomic import Owner, held_together
from addax_ds.core.guest import Guest, HostSettings, Job
from addax_ds.core.kernels import perturb
from addax_ds.core.moved import Moved, is_made_where_read
from addax_ds.core.plain import Perturbation
from addax_ds.core.rows import Rows
from addax_ds.core.scratch import Scratch, aligned
from addax_ds.core.skeleton import duplicate, link_buffers, owned_weights

# Copies at hand at a time, in multiples of the largest module's: with more, guests hand over less often.
_STRETCH = 2


class Weights(Protocol):
    """What guests need of an engine."""

    def trainable(self, name: str) -> bool:
        """Whether the parameter is perturbed and updated."""
        ...

    def is_gathered(self, path: str) -> bool:
        """Whether every weight that the module at `path` owns is whole in memory."""
        ...

    def weight(self, path: str, local: str) -> torch.Tensor:
        """The gathered weight `local` of the module at `path`, to be read only."""
        ...

    def gather(self, path: str) -> contextlib.AbstractContextManager[None]:
        """Gather the unit of the module at `path` for the length of the context (a collective)."""
        ...

    def agree(self, path: str, failed: bool) -> tuple[str, bool]:
        """One of the paths that ranks give, empty where none gives one, and whether any has failed (a collective)."""
        ...

    def prefetch(self, path: str) -> None:
        """Begin the gather of the unit of the module at `path`, which the next `gather` asks for."""
        ...

    def drop_prefetched(self) -> None:
        """End a `prefetch` that no `gather` has asked for."""
        ...


_Weights = dict[str, torch.Tensor]
"""Of a module, by their names in it."""


class Lanes:
    """The guests of one model; their threads and skeletons are kept between steps."""

    def __init__(self, model: nn.Module, skeleton: nn.Module, weights: Weights, atomic: tuple[str, ...] = ()) -> None:
        self._model = model
        self._atomic = atomic
        # By the first of its owners' paths, all those that a guest needs together; raises for unknown patterns.
        self._together = {
            owners[0].path: [owner.path for owner in owners] for _, _, owners in held_together(skeleton, atomic)
        }
        self._skeleton = skeleton
        self._weights = weights
        self._idle: list[Guest] = []
        self._running: list[Guest] = []
        self._jobs: list[Job] = []
        owners = {id(module): path for path, module, _ in owned_weights(skeleton)}
        # Modules whose forward gathers other modules, during which their own weights may be freed.
        self._enclosing = {
            path
            for path, module, _ in owned_weights(skeleton)
            if any(id(inner) in owners for inner in module.modules() if inner is not module)
        }
        self._in_blocks = {
            f"{blocks}.{path}" if blocks else path
            for blocks, repeated in skeleton.named_modules()
            if isinstance(repeated, nn.ModuleList)
            for path, _ in repeated.named_modules()
        }
        self.entered: set[str] = set()  # paths of the modules that guests have ever fetched weights for
        # What moves of each module along a direction, by sign, of the stretch at hand.
        self._copies: dict[tuple[str, int], dict[int, list[_Weights]]] = {}
        self._kept = 0  # elements of one of the two points in them
        self._sizes: dict[str, int] = {}  # by path of a module, the elements that are copied of it in this step
        largest = max(map(self._copied, (owners for _, _, owners in held_together(skeleton, atomic))), default=0)
        self._stretch = _STRETCH * largest
        self._scratch = Scratch()
        self._orders: dict[str, list[str]] = {}  # what drives of a name gather, module by module, once known

    def start(self, jobs: list[Job]) -> None:
        """Begin every job; each runs up to the first weight it needs."""
        settings = HostSettings()
        self._jobs, self._sizes = jobs, {}
        try:
            for job in jobs:
                if not self._idle:
                    skeleton = duplicate(self._skeleton)
                    self._idle.append(Guest(skeleton, self._atomic, self._goes_on, self._fetch, self._left))
                guest = self._idle.pop()
                link_buffers(guest.skeleton, self._model)
                self._running.append(guest)
                guest.begin(job, settings)
            self._collect()
        except BaseException:
            self.abandon()
            raise

    def advance(self) -> None:
        """Run the guests until each is done or waits for a weight that is not gathered.

        Those that wait for copies at hand go first, then the one that is furthest behind: so all guests
        take a stretch of modules one after the other, and its noise is drawn once a direction.
        """
        while ready := [guest for guest in self._running if self._is_ready(guest)]:
            guest = min(ready, key=lambda guest: (guest.asks_for() not in self._copies, guest.visited))
            guest.resume()
            self._collect()
        self._drop_copies()

    def drive(self, alike: str = "") -> None:
        """Finish the guests by gathering what they ask for, unit by unit (collectives).

        alike: a name for drives in which every rank is to gather the same, whatever its guests ask for. In
        the first of a name ranks agree on each gather. The others repeat that order, and the gather of the
        next unit begins before the guests take this one; a guest that needs another fails, and `forget`
        is due on every rank. Without a name ranks have to ask alike.
        """
        try:
            if not alike:
                self._drive_as_asked()
            elif alike in self._orders:
                self._drive_by_order(self._orders[alike])
            else:
                self._drive_in_agreement(alike)
        finally:
            self._weights.drop_prefetched()
            self._jobs = []  # they hold batches, results and, by their errors, activations

    def forget(self) -> None:
        """Have the next drive of each name begin in agreement: after a failure, on every rank."""
        self._orders = {}

    def _drive_as_asked(self) -> None:
        while self._running:
            self._gather_for(self._asked())

    def _drive_in_agreement(self, alike: str) -> None:
        """Gather what any rank asks for, until none does; remember it where no guest of any rank has failed."""
        order: list[str] = []
        while True:
            failed = any(job.error for job in self._jobs)
            path, failed = self._weights.agree(self._asked(), failed)
            if not path:
                break
            order.append(path)
            self._gather_for(path)
        if not failed:
            self._orders[alike] = order

    def _drive_by_order(self, order: list[str]) -> None:
        for path, following in itertools.zip_longest(order, order[1:]):
            self._gather_for(path, following)
        waiting, self._running = self._running, []
        for guest in waiting:
            job = guest.job
            guest.stop()
            if job is not None:
                job.error = RuntimeError(
                    f"{guest.need} is needed by zeroth-order forwards at a place where no step before has gathered it: "
                    "no rank takes this step, and the next one is prepared for it"
                )
        self._idle += waiting
        self._collect()

    def _asked(self) -> str:
        """The first of the modules whose weights the guest furthest behind waits for; empty where none waits."""
        behind = min(self._running, key=lambda guest: guest.visited, default=None)
        return behind.owners[0].path if behind else ""

    def _gather_for(self, first: str, following: str | None = None) -> None:
        """Gather what a guest needs together, begin the following gather, and run the guests as far as that reaches."""
        with contextlib.ExitStack() as gathered:
            gathered.enter_context(self._weights.gather(first))
            for path in self._together[first][1:]:
                if not self._weights.is_gathered(path):
                    gathered.enter_context(self._weights.gather(path))
            if following is not None:
                self._weights.prefetch(following)
            for path in self._together[first]:
                if not self._weights.is_gathered(path):
                    raise RuntimeError(f"{path} was gathered, and its weights are not there")
            self.advance()

    def run(self, jobs: list[Job], weights: Weights | None = None, alike: str = "") -> None:
        """Start guests and drive them to their end, reading `weights` in place of the engine's own.

        An error of a guest is left in its job: its rank still takes part in all gathers.
        """
        own = self._weights
        self._weights = weights or own
        try:
            self.start(jobs)
            self.drive(alike)
        except BaseException:
            self.abandon()
            raise
        finally:
            self._weights = own

    def abandon(self) -> None:
        """Unwind every guest that is not done, after a failure."""
        for guest in self._running:
            if guest.parked:
                guest.stop()
        self._idle += self._running
        self._running, self._jobs = [], []
        self._drop_copies()
        self._scratch.release()

    def close(self) -> None:
        """End the guests' threads."""
        self.abandon()
        for guest in self._idle:
            guest.close()
        self._idle = []

    def _is_ready(self, guest: Guest) -> bool:
        return all(self._weights.is_gathered(owner.path) for owner in guest.owners)

    def _goes_on(self, guest: Guest) -> bool:
        """Whether a guest takes the module that it is about to enter without a hand-over.

        It does within the stretch at hand: as many modules as there is memory for copies of.
        """
        if not self._is_ready(guest):
            return False
        return not guest.perturbation.sign or guest.asks_for() in self._copies or self._has_room(guest.owners)

    def _has_room(self, owners: list[Owner]) -> bool:
        """Whether copies of these modules fit beside those at hand."""
        path = owners[0].path
        if path not in self._sizes:
            self._sizes[path] = self._copied(owners, self._weights.trainable)
        return self._kept + self._sizes[path] <= self._stretch

    def _copied(self, owners: list[Owner], moves: Callable[[str], bool] = lambda _: True) -> int:
        """Elements of these modules that are copied for a point."""
        return sum(
            weight.numel()
            for owner in owners
            for local, weight in owner.module._parameters.items()
            if weight is not None and moves(owner.owned[local]) and not self._is_made_where_read(owner, local, weight)
        )

    def _is_made_where_read(self, owner: Owner, local: str, weight: torch.Tensor) -> bool:
        return is_made_where_read(owner.module, local, weight, owner.path in self._in_blocks)

    def _collect(self) -> None:
        """Retire guests that are done, or have failed."""
        self._idle += [guest for guest in self._running if not guest.parked]
        self._running = [guest for guest in self._running if guest.parked]
        if not self._running:
            self._drop_copies()
            self._scratch.release()

    def _fetch(self, point: Perturbation, path: str, owners: list[Owner]) -> list[_Weights]:
        """Weights of each owner at the guest's point: the gathered ones, or moved by sign * scale * z.

        path: of the module that is entered, which holds those of all owners together.
        """
        moved: list[_Weights] = [{} for _ in owners]
        if point.sign:
            of = path, point.query
            if of not in self._copies:
                self._make_room(owners)
                self._copies[of] = self._moved(point, owners)
            moved = self._copies[of][point.sign]
        return [
            weights if len(weights) == len(owner.owned) else {**self._unmoved(owner, weights), **weights}
            for owner, weights in zip(owners, moved, strict=True)
        ]

    def _unmoved(self, owner: Owner, moved: _Weights) -> _Weights:
        """The other weights of a module, as they are."""
        self.entered.add(owner.path)
        weights: _Weights = {}
        for local, name in owner.owned.items():
            if local in moved:
                continue
            weight = self._weights.weight(owner.path, local).detach()
            if self._is_made_where_read(owner, local, weight):
                weights[local] = Moved(weight, name, Perturbation(), None)
            elif owner.path in self._enclosing:
                weights[local] = weight.clone()
            else:
                weights[local] = aligned(weight)
        return weights

    def _moved(self, point: Perturbation, owners: list[Owner]) -> dict[int, list[_Weights]]:
        """What moves of these modules, by sign: W + scale z and W - scale z."""
        above, below = replace(point, sign=1), replace(point, sign=-1)
        moved: dict[int, list[_Weights]] = {sign: [{} for _ in owners] for sign in (1, -1)}
        copied: dict[str, torch.Tensor] = {}  # by parameter name
        rows: dict[str, Rows] = {}
        places = []
        for owner, plus, minus in zip(owners, moved[1], moved[-1], strict=True):
            self.entered.add(owner.path)
            for local, name in owner.owned.items():
                if not self._weights.trainable(name):
                    continue
                weight = self._weights.weight(owner.path, local).detach()
                if self._is_made_where_read(owner, local, weight):
                    looked_up = rows[name] = rows.get(name) or Rows(weight, name, point)
                    plus[local] = Moved(weight, name, above, looked_up)
                    minus[local] = Moved(weight, name, below, looked_up)
                else:
                    copied[name] = weight
                    places.append((plus, minus, local, name))
        pairs = dict(zip(copied, self._scratch.pairs([*copied.values()]), strict=True))
        for name, weight in copied.items():
            perturb(weight, 0, *pairs[name], name, point)
            self._kept += weight.numel()
        for plus, minus, local, name in places:
            plus[local], minus[local] = pairs[name]
        return moved

    def _make_room(self, owners: list[Owner]) -> None:
        """Where copies of these modules do not fit beside those at hand, a new stretch begins."""
        if not self._has_room(owners):
            self._drop_copies()

    def _drop_copies(self) -> None:
        self._copies, self._kept = {}, 0
        # A module that is about to call another still needs its own.
        self._scratch.begin(afresh=any(guest.open for guest in self._running))

    def _left(self, output: Any) -> Any:
        """What a module returned, made to outlive the module's weights."""
        leaves = [output] if type(output) is torch.Tensor else tree_leaves(output)
        if any(self._may_hold_copies(leaf) for leaf in leaves):
            self._scratch.release()
        if any(isinstance(leaf, Moved) for leaf in leaves):
            return tree_map(lambda leaf: leaf.whole() if isinstance(leaf, Moved) else leaf, output)
        return output

    def _may_hold_copies(self, leaf: Any) -> bool:
        """Whether a part of an output lies in the scratch, or is an object that may keep what does."""
        if isinstance(leaf, torch.Tensor):
            return type(leaf) is not Moved and self._scratch.holds(leaf)
        return not isinstance(leaf, str | bytes | numbers.Number | None)
