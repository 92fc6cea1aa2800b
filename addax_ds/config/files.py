"""Settings from YAML and from the command line."""

import dataclasses
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from addax_ds.config.adapters import ADAPTERS, AdapterConfig
from addax_ds.config.checks import nearest
from addax_ds.config.loader import NOT_YAML, parse
from addax_ds.config.method import QuerySchedule, for_method
from addax_ds.config.run import RunConfig
from addax_ds.config.task import TaskConfig
from addax_ds.errors import UserError


def load_run(path: str | None, overrides: list[str]) -> RunConfig:
    """The run that a YAML file describes, with `key=value` overrides on top.

    `task.prompt=...` reaches into the task; `method=...` takes the place of what the file says of the settings
    that it sets. Raises `UserError` for a missing or unreadable file,
    an unknown key (naming the nearest) and every value out of range.
    """
    values = read_yaml(Path(path), "a run file") if path is not None else {}
    given = [_parsed(override) for override in overrides]
    for method in (value for key, value in given if key == "method"):
        values = for_method(values, str(method))
    for key, value in given:
        outer, dot, inner = key.partition(".")
        if dot:
            group = values.get(outer) or {}
            if not isinstance(group, dict):
                raise UserError(f"{key}={value}: {outer} is no group of settings")
            values[outer] = {**group, inner: value}
        else:
            values[key] = value
    return build(RunConfig, values, path or "command line")


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; raises `UserError` where there is none."""
    try:
        loaded = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: give the path of {what}") from None
    except NOT_YAML as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict | None):
        raise UserError(f"{path}: {what} is a mapping of settings")
    return loaded or {}


def build(cls: type, values: dict[str, Any], where: str) -> Any:
    """`cls(**values)`, with the first thing that is wrong as a one-line `UserError`."""
    known = {field.name: field.type for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {str(key)[:100]}{nearest(str(key)[:100], [*known])}")
        # It would count as 1 or 0.
        if isinstance(value, bool) and bool not in (known[key], *get_args(known[key])):
            raise UserError(f"{where}: {key} is {str(value).lower()}: give a value, not yes or no")
    if isinstance(values.get("adapter"), dict):
        values = {**values, "adapter": _build_adapter(values["adapter"], f"{where}: adapter")}
    for name, group in (("task", TaskConfig), ("query_schedule", QuerySchedule)):
        if isinstance(values.get(name), dict):
            values = {**values, name: build(group, values[name], f"{where}: {name}")}
    try:
        return cls(**values)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            raise UserError(f"{where}: {cause}") from None
        setting = first["loc"][0]
        # A setting of several types has one complaint for each.
        complaints = " or ".join(e["msg"].lower() for e in error.errors() if e["loc"][0] == setting)
        raise UserError(f"{where}: {setting} is {first.get('input')!r:.200}: {complaints}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def values_of(config: RunConfig) -> dict[str, Any]:
    """The settings of a run that differ from its defaults, as `build` and YAML take them."""
    given, usual = (
        {field.name: getattr(run, field.name) for field in dataclasses.fields(run)} for run in (config, RunConfig())
    )
    usual |= {**RunConfig.usual_with(given), "adapter": None}
    values = dataclasses.asdict(config)
    return {name: values[name] for name in given if given[name] != usual[name]}


def _build_adapter(values: dict[str, Any], where: str) -> AdapterConfig:
    """The adapters that a mapping describes, told apart by its kind."""
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in ADAPTERS:
        raise UserError(f"{where}: kind is {kind!s:.200}: give one of {', '.join(ADAPTERS)}")
    return build(ADAPTERS[kind], values, where)


def _parsed(override: str) -> tuple[str, Any]:
    """Key and value of `key=value`."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"{override}: overrides are written key=value")
    try:
        return key, parse_value(text)
    except NOT_YAML:
        raise UserError(f"{override}: the value is not YAML: quote it, as in {key}='\"...\"'") from None


def parse_value(text: str) -> Any:
    """A YAML scalar, with inf and nan as the numbers that Python takes them for."""
    value = parse(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
