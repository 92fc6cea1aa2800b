"""Bytes that tensors hold, by what they are for, and collectives: counted from torch's operations as they run."""

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from addax_ds.core.moved import Moved
from addax_ds.training.wire import WireCounter


def _attention(query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> float:
    """Two products; a causal mask saves nothing, as torch counts."""
    return 4.0 * query.numel() * key.shape[-2]


def _attention_backward(_: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *__: Any, **___: Any) -> float:
    """Five products."""
    return 10.0 * query.numel() * key.shape[-2]


_FLOPS: dict[Any, Callable[..., float]] = {
    **flop_registry,
    # What a CPU has in place of a GPU's kernels, of which the registry knows.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
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
        self.peaks: dict[str, Counter[str]] = {}
        """By the part that something was allocated for, all parts when their sum was then largest since `begin`."""
        self._sum = 0
        self._most: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        """By collective: how many since `begin`, and bytes that this rank receives."""
        self.flops = 0.0
        """Of products of matrices since `begin`, an addition and a multiplication as two."""
        self._wire = WireCounter()

    def begin(self) -> None:
        """Forget peak and collectives so far."""
        self.peaks, self._most = {}, Counter()
        self.collectives.clear()
        self.flops = 0.0
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
        elif function.overloadpacket in _FLOPS:
            self.flops += _FLOPS[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

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
        self._sum += size
        if size > 0 and self._sum > self._most[part]:
            self._most[part], self.peaks[part] = self._sum, Counter(self.now)
