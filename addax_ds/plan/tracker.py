"""Bytes that tensors hold, by what they are for, and collectives: counted from torch's operations as they run."""

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from addax_ds.core.moved import Moved
from addax_ds.training.wire import WireCounter

HOST = "host"
"""The part of what lies in the host's memory: no part of any sum of a GPU's."""


def _attention(query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> float:
    """Two products; a causal mask saves nothing, as torch counts."""
    return 4.0 * query.numel() * key.shape[-2]


def _attention_backward(_: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *__: Any, **___: Any) -> float:
    """Five products."""
    return 10.0 * query.numel() * key.shape[-2]


def _grouped_product(first: torch.Tensor, second: torch.Tensor, *_: Any, **__: Any) -> float:
    """Of experts: each row, or column, of the first takes part in the product of one of them alone."""
    return 2.0 * first.numel() * second.shape[-1]


_FLOPS: dict[Any, Callable[..., float]] = {
    **flop_registry,
    # What a CPU has in place of a GPU's kernels, of which the registry knows.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten._grouped_mm: _grouped_product,
}


class Tracker(TorchDispatchMode):
    """While active on a thread, notes every storage that its operations make, until it is freed.

    A storage counts with its bytes from its first appearance on, for the part that `within` names
    then, and what it is resized to. Real tensors and fake ones count alike.
    """

    def __init__(self, part: str) -> None:
        super().__init__()
        self._default = part
        self._thread = threading.local()
        self._held: dict[int, tuple[str, int]] = {}  # by address of the storage, its part and bytes
        self.now: Counter[str] = Counter()
        self.peaks: dict[str, dict[str, int]] = {}
        """By the part that something was allocated for, and by that and its bytes, as blocks have them in common:
        all parts when their sum was then largest since `begin`."""
        self.most_on_host = 0
        """Bytes on the host when they were most since `begin`."""
        self._sum = 0
        self._most: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        """By collective: how many since `begin`, and bytes that this rank receives."""
        self.flops = 0.0
        """Of products of matrices since `begin`, an addition and a multiplication as two."""
        self._wire = WireCounter()
        self._in_flight: dict[dist.Work, tuple] = {}

    def begin(self) -> None:
        """Forget peak and collectives so far."""
        self.peaks, self._most = {}, Counter()
        self.most_on_host = self.now[HOST]
        self.collectives.clear()
        self.flops = 0.0
        self._in_flight.clear()
        self._wire.received.clear()
        self.received = self._wire.received

    @property
    def part(self) -> str:
        """What this thread allocates for."""
        return getattr(self._thread, "part", self._default)

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What this thread allocates in the context is for `part`."""
        before = self.part
        self._thread.part = part
        try:
            yield
        finally:
            self._thread.part = before

    @contextlib.contextmanager
    def lifetimes(self) -> Iterator[None]:
        """Notes on every thread what no operation tells.

        Storages are resized in place, as FSDP2 frees and fills them. What a collective works on lives until
        somebody has waited for it, as NCCL keeps it.
        """
        resize = torch.UntypedStorage.resize_

        def resize_noted(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resized = resize(storage, size)
            if storage._cdata in self._held:
                part, before = self._held[storage._cdata]
                self._held[storage._cdata] = part, size
                self._add(part, size - before)
            return resized

        def noted(wait: Callable[..., bool]) -> Callable[..., bool]:
            def run(work: dist.Work, *args: Any) -> bool:
                waited = wait(work, *args)
                self._in_flight.pop(work, None)
                return waited

            return run

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resize_noted))
            for kind in (dist.Work, FakeWork):
                stack.enter_context(mock.patch.object(kind, "wait", noted(kind.wait)))
            yield

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to keep it from being takes longer than what is done below

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:  # three of five calls under fake tensors
            return args[0].fake_device
        is_collective = function.namespace == "c10d"
        run = partial(self.collective, function) if is_collective else function
        out = run(*args, **(kwargs or {}))
        for leaf in [out] if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        if is_collective:
            name = function._schema.name.removeprefix("c10d::")
            self.collectives[name] += 1
            self._wire.count(name, args)
            self._in_flight[work_of(out)] = args
        elif function.overloadpacket in _FLOPS:
            self.flops += _FLOPS[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    def collective(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """One operation of c10d."""
        return function(*args, **kwargs)

    def part_of(self, tensor: torch.Tensor) -> str | None:
        """What the tensor's storage is for; None for what the tracker has not seen."""
        return self._held.get(tensor.untyped_storage()._cdata, (None, 0))[0]

    def move(self, tensor: torch.Tensor, part: str) -> None:
        """The tensor's storage is for `part` from now on."""
        key = tensor.untyped_storage()._cdata
        before, size = self._held[key]
        self._held[key] = part, size
        self._add(before, -size)
        self._add(part, size)

    def _note(self, tensor: torch.Tensor) -> None:
        if is_traceable_wrapper_subclass(tensor):  # such as a DTensor, whose own storage is nowhere
            for inner in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]):
                if isinstance(inner, torch.Tensor):
                    self._note(inner)
            return
        if type(tensor) is Moved:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._held:
            self._held[key] = self.part, storage.nbytes()
            self._add(self.part, storage.nbytes())
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        part, size = self._held.pop(key)
        self._add(part, -size)

    def _add(self, part: str, size: int) -> None:
        self.now[part] += size
        if part == HOST:
            self.most_on_host = max(self.most_on_host, self.now[HOST])
            return
        self._sum += size
        for moment in (part, f"{part}, {size} bytes") if size > 0 else ():
            if self._sum > self._most[moment]:
                self._most[moment], self.peaks[moment] = self._sum, dict(self.now)


def work_of(out: Any) -> dist.Work:
    """What to wait for, of what an operation of c10d has returned."""
    return dist.Work.unbox(out[-1] if isinstance(out, tuple) else out)
