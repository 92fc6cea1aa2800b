"""Bytes that tensors hold, by what they are for, and collectives: counted from torch's operations as they run."""

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from addax_ds.core.moved import Moved
from addax_ds.training.wire import WireCounter

HOST = "host"
"""The part of what lies in the host's memory: no part of any sum of a GPU's."""


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
        self.peaks: dict[str, Counter[str]] = {}
        """By the part that something was allocated for, all parts when their sum was then largest since `begin`."""
        self.most_on_host = 0
        """Bytes on the host when they were most since `begin`."""
        self._sum = 0
        self._most: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        """By collective: how many since `begin`, and bytes that this rank receives."""
        self._wire = WireCounter()

    def begin(self) -> None:
        """Forget peak and collectives so far."""
        self.peaks, self._most = {}, Counter()
        self.most_on_host = self.now[HOST]
        self.collectives.clear()
        self._wire.received.clear()
        self.received = self._wire.received

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What this thread allocates in the context is for `part`."""
        before = getattr(self._thread, "part", self._default)
        self._thread.part = part
        try:
            yield
        finally:
            self._thread.part = before

    @contextlib.contextmanager
    def resizes(self) -> Iterator[None]:
        """Storages that are resized in place are noted too, as FSDP2 frees and fills them, on every thread."""
        resize = torch.UntypedStorage.resize_

        def noted(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resized = resize(storage, size)
            if storage._cdata in self._held:
                part, before = self._held[storage._cdata]
                self._held[storage._cdata] = part, size
                self._add(part, size - before)
            return resized

        with mock.patch.object(torch.UntypedStorage, "resize_", noted):
            yield

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::")
            self.collectives[name] += 1
            self._wire.count(name, args)
        return out

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
            part = getattr(self._thread, "part", self._default)
            self._held[key] = part, storage.nbytes()
            self._add(part, storage.nbytes())
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
        if size > 0 and self._sum > self._most[part]:
            self._most[part], self.peaks[part] = self._sum, Counter(self.now)
