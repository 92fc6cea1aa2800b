"""What all settings share: how they are checked, and how a wrong one is told."""

import difflib
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BeforeValidator, ConfigDict

from addax_ds.errors import UserError

STRICT = ConfigDict(extra="forbid")


def require(condition: bool, message: str) -> None:
    """Raises `UserError` unless the condition holds."""
    if not condition:
        raise UserError(message)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def nearest(word: str, known: list[str]) -> str:
    """A hint ", did you mean X?" with the known word nearest to `word`; empty when none is near."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {match[0]}?" if match else f"; known: {', '.join(known)}"


_Item = TypeVar("_Item")
Items: TypeAlias = Annotated[tuple[_Item, ...], BeforeValidator(_as_tuple)]
"""A tuple, which YAML and JSON know as a list alone."""
