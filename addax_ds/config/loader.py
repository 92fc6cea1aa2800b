"""YAML as people mean it: numbers of YAML 1.2, nothing said twice, nothing that grows when it is read."""

import re
from typing import Any

import yaml

NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)
"""What reading text that is not YAML can raise: PyYAML passes on some of its own."""

_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, without its octal 010, its 1:30 in base 60, and its 1e-3 that is a text."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            # A few hundred bytes of them can stand for more than any memory holds.
            alias = self.peek_event()
            raise yaml.YAMLError(f"line {alias.start_mark.line + 1}: *{alias.anchor} is not taken: write out its value")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value} stands there twice: keep one")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def parse(text: str) -> Any:
    """What a YAML document holds. Raises one of `NOT_YAML`."""
    return yaml.load(text, _Loader)
