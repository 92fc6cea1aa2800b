"""The host's forward as the other ranks see it: gathers, which a rank owes them even where it fails."""

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from addax_ds.errors import of_another_rank


class HostForwardError(Exception):
    """Raised from the error of a forward of the host, once this rank has taken part in all of its gathers."""


@contextmanager
def ungathered() -> Iterator[None]:
    """Around a forward of the host that gathers nothing."""
    try:
        yield
    except Exception as error:
        raise HostForwardError from error


class _FailedElsewhereError(RuntimeError):
    """Raised where ranks agree that a forward has failed on another one."""


class HostForward:
    """Notes in which order forwards of the host enter and leave the modules that the engine has hooked.

    A forward that fails is finished by calling the engine's hooks alone, in the order of the last forward
    that came to its end. Until one has, nobody knows that order: ranks agree before each gather that none
    of them has failed. hooks: of every `forward` that the engine gathers or releases weights around.
    gathered: called after the hooks before a forward. failed_on: tells whether this rank has failed and
    returns those that have (a collective).
    """

    def __init__(
        self,
        model: nn.Module,
        hooks: Iterable[RemovableHandle],
        gathered: Callable[[], None],
        failed_on: Callable[[bool], list[int]],
    ) -> None:
        self._gathered, self._failed_on = gathered, failed_on
        self._hooks = {hook.id for hook in hooks}
        self._modules = {
            path: module for path, module in model.named_modules() if self._hooks & module._forward_pre_hooks.keys()
        }
        self._seen: list[tuple[str, bool]] | None = None  # (path, whether it is entered), in the forward under way
        self._whole: list[tuple[str, bool]] = []  # the same of the last forward that came to its end
        self._handles: list[RemovableHandle] = []
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._note(path, True)))
            self._handles.append(module.register_forward_hook(self._note(path, False)))
            self._handles.append(module.register_forward_pre_hook(self._agree, prepend=True))

    def _note(self, path: str, entered: bool) -> Callable[..., None]:
        @torch.compiler.disable
        def hook(*_: Any) -> None:
            if self._seen is not None:
                self._seen.append((path, entered))

        return hook

    @torch.compiler.disable
    def _agree(self, *_: Any) -> None:
        """Before the hooks of the first forward: raises where a rank has failed.

        At modules without weights, too: DeepSpeed notes the order in which a forward enters all of them, and
        takes no other from any rank.
        """
        if self._seen is not None and not self._whole and (ranks := self._failed_on(False)):
            raise _FailedElsewhereError(f"a forward failed on rank {ranks[0]}, which says why: no rank takes this step")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See `Engine.host_forward`."""
        seen: list[tuple[str, bool]] = []
        self._seen = seen
        try:
            yield
            self._agree()  # what comes after the last gather may have failed, too
            self._whole = seen
        except _FailedElsewhereError:
            raise
        except Exception as error:
            self._seen = None
            if of_another_rank(error):
                raise
            if not self._whole:
                self._failed_on(True)
                raise
            if self._whole[: len(seen)] != seen:
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the activations, and guests go on
            self._finish(self._whole[len(seen) :])
            raise HostForwardError from error
        finally:
            self._seen = None

    @torch.no_grad()
    def _finish(self, rest: list[tuple[str, bool]]) -> None:
        self._gathered()  # what is gathered now may have been for modules further inside
        for path, entered in rest:
            module = self._modules[path]
            registered = module._forward_pre_hooks if entered else module._forward_hooks
            for number in [number for number in registered if number in self._hooks]:
                if not entered:
                    registered[number](module, (), None)
                elif number in module._forward_pre_hooks_with_kwargs:
                    registered[number](module, (), {})
                else:
                    registered[number](module, ())
            if entered:
                self._gathered()

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
