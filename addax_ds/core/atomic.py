"""Modules whose forward reads the weights of modules within it: guests hold those all together."""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from addax_ds.core.skeleton import owned_weights
from addax_ds.errors import UserError

# torch's own that do so: for their fused kernels, and out_proj.
_KNOWN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class Owner:
    """A module that owns weights: {local name: parameter name}."""

    path: str
    module: nn.Module
    owned: dict[str, str]


def held_together(skeleton: nn.Module, atomic: tuple[str, ...]) -> Iterator[tuple[str, nn.Module, list[Owner]]]:
    """(path, module, owners) of every module at whose forward guests fetch weights.

    A module fetches its own, and one that is atomic, by its type or as a pattern of paths names it,
    those of all modules within it too. Raises `UserError` for a pattern that matches nothing.
    """
    modules = dict(skeleton.named_modules())
    for pattern in atomic:
        if not fnmatch.filter(modules, pattern):
            raise UserError(f"atomic: {pattern} matches no module of the model")
    outermost: list[str] = []
    for path, module in modules.items():
        named = any(fnmatch.fnmatchcase(path, pattern) for pattern in atomic)
        if (named or isinstance(module, _KNOWN)) and not any(_is_within(path, other) for other in outermost):
            outermost.append(path)
    groups: dict[str, list[Owner]] = {}
    for path, module, owned in owned_weights(skeleton):
        together = next((other for other in outermost if path == other or _is_within(path, other)), path)
        groups.setdefault(together, []).append(Owner(path, module, owned))
    for path, owners in groups.items():
        yield path, modules[path], owners


def _is_within(path: str, other: str) -> bool:
    return path != other and (path.startswith(f"{other}.") or not other)
