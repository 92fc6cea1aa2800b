"""What is compared: methods, the grid of each, and seeds, as a YAML file describes them."""

import dataclasses
import hashlib
import itertools
import re
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from addax_ds.config import Items, PrefixConfig, RunConfig, build, for_method, read_yaml, require
from addax_ds.errors import UserError
from addax_ds.training.models import read_ds_config
from addax_ds.training.run import Prepared, pools_of, prepare_inputs

_SETTINGS = ConfigDict(extra="forbid")
_OF_DATA = (
    *("model", "data", "eval_data", "task", "train_samples", "dev_samples", "eval_samples"),
    "seed",
)
"""What a run's inputs depend on, and on the places that a prefix takes."""


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class Comparison:
    """The file of `addax-ds compare`."""

    run: dict[str, Any]
    """Settings that all runs share, with `dev_samples`, on which grids are compared."""
    methods: dict[str, dict[str, Any]]
    """By name, what a method sets beyond them; `grid` lists the values that are tried, all with all."""
    seeds: Items[int] = (0, 1, 2)
    """The first is that of the grids; each method's best point is run with all."""
    targets: Items[float | str] = ()
    """Scores on the dev samples, to which seconds and samples are counted; a method's name stands for its best."""
    ranks: int = 1
    """Processes of each run."""

    def __post_init__(self) -> None:
        require(bool(self.methods), "methods is empty: name some")
        for name in self.methods:
            # They name folders.
            require(bool(re.fullmatch(r"\w[\w .-]*", name)), f"methods: {name}: use letters, digits, spaces, . _ and -")
        require(len(self.seeds) >= 3, f"seeds has {len(self.seeds)}: a spread needs 3 or more")
        require(len(set(self.seeds)) == len(self.seeds), "seeds holds one twice: each is a run of its own")
        for target in self.targets:
            named = isinstance(target, str)
            require(not named or target in self.methods, f"targets: {target} is no method: name one, or give a score")
        require(self.ranks >= 1, f"ranks is {self.ranks}: it must be 1 or more")
        grids = [values["grid"] for values in self.methods.values() if isinstance(values.get("grid"), dict)]
        taken = {"seed", "output"} & {*self.run, *itertools.chain(*self.methods.values(), *grids)}
        require(not taken, f"{min(taken, default='')} is set by the comparison: leave it out")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run: a point of a method's grid, with a seed."""

    method: str
    point: dict[str, Any]
    values: dict[str, Any]
    ranks: int
    config: RunConfig

    @property
    def name(self) -> str:
        """Of the run's folder; other settings give another."""
        words = [f"{key}-{value}" for key, value in self.point.items()]  # with = it would be taken for a setting
        digest = hashlib.sha256(repr((self.config, self.ranks)).encode()).hexdigest()[:8]
        name = "_".join([*words, f"seed-{self.config.seed}", digest])
        return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)[-120:]


def load_comparison(path: Path) -> Comparison:
    """Raises `UserError` for what is wrong with the file, in one line."""
    return build(Comparison, read_yaml(path, "a comparison"), str(path))


def points_of(comparison: Comparison, method: str) -> list[dict[str, Any]]:
    """The points of a method's grid."""
    grid = comparison.methods[method].get("grid") or {}
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise UserError(f"methods: {method}: grid gives each setting a list of values: mend it")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    require(
        all(points.count(point) == 1 for point in points), f"methods: {method}: grid has a point twice: leave one out"
    )
    return points


def trial(comparison: Comparison, method: str, point: dict[str, Any], seed: int) -> Trial:
    """The run of a point; raises `UserError` for settings that are wrong."""
    own = {name: value for name, value in comparison.methods[method].items() if name != "grid"}
    own |= {**point, "seed": seed}
    values = {**for_method(comparison.run, str(own.get("method"))), **own}
    return Trial(method, point, values, comparison.ranks, build(RunConfig, values, f"methods: {method}"))


def check(comparison: Comparison) -> None:
    """Raises `UserError` for any run's settings and data, before the first starts, and where grids differ in size."""
    planned: dict[str, list[RunConfig]] = {}
    sizes: dict[str, int] = {}
    for method in comparison.methods:
        points = points_of(comparison, method)
        configs = [trial(comparison, method, point, seed).config for point in points for seed in comparison.seeds]
        for config in configs:
            require(config.dev_samples > 0, "grids are compared on samples of their own: set dev_samples in run")
        planned[method] = configs
        if configs[0].method_name != "zero-shot":
            sizes[method] = len(points)
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{method} {size}" for method, size in sizes.items())
        raise UserError(f"grids differ in size ({told} points): give every method as many")
    inputs: dict[str, Prepared] = {}
    for method, config in ((method, config) for method, configs in planned.items() for config in configs):
        try:
            if config.engine == "deepspeed":
                read_ds_config(config)
            prefix = config.adapter if isinstance(config.adapter, PrefixConfig) else None
            # Which most runs have in common.
            of_data = repr((prefix, *(getattr(config, name) for name in _OF_DATA)))
            if of_data not in inputs:
                inputs[of_data] = prepare_inputs(config)
            pools_of(inputs[of_data], config)
        except UserError as error:
            raise UserError(f"methods: {method}: {error}") from None
