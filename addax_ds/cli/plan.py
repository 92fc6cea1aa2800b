"""`addax-ds plan`."""

import dataclasses
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addax_ds.bench.table import Bench
from addax_ds.config import RunConfig
from addax_ds.errors import UserError
from addax_ds.plan import links, methods, ready
from addax_ds.plan.choose import Batch, Choice, choose
from addax_ds.plan.cluster import Cluster
from addax_ds.plan.memory import Curve
from addax_ds.plan.methods import Steps
from addax_ds.plan.padding import padding_of
from addax_ds.plan.plot import PLOT, draw
from addax_ds.plan.rehearsals import Rehearsals
from addax_ds.plan.shardings import settings_of
from addax_ds.shapes import shape_of
from addax_ds.training.metrics import write_json
from addax_ds.training.run import prepare_inputs

TABLES = "plan.json"
_APART = 0.05
"""Share that a rehearsal may differ by from what was planned."""
_WORTH_TELLING = 1.02


@dataclass(frozen=True)
class Asked:
    """Where a run is to take place, and what it takes: see the options of the command."""

    cluster: Cluster
    sharding: str
    batch: Batch
    long: int
    lt: int
    tokenizer: str | None
    rehearse: bool
    output: Path | None


def plan(asked: Asked, config: RunConfig, has_data: bool) -> None:
    """Print what a step takes of each GPU under every method; with data, choose L_T and write a run that is ready.

    config: the run, whose engine, batches and L_T are planned. Raises `UserError` for what cannot be planned.
    """
    shape = shape_of(config.model)
    lengths = _lengths(config, asked.tokenizer) if has_data else []
    with ExitStack() as stack:
        folder = asked.output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        sharding = settings_of(asked.sharding, asked.cluster, shape, folder)
        rehearsals = stack.enter_context(Rehearsals(shape, sharding["engine"] == "deepspeed"))
        steps = Steps(shape, rehearsals, asked.cluster, sharding, asked.batch, max(lengths, default=asked.long))
        lt, choice = asked.lt, None
        if lengths:
            choice = choose(lengths, asked.cluster, lambda batch: _curve(steps, batch, min(lengths)), asked.batch)
            steps, lt = dataclasses.replace(steps, batch=choice.batch), choice.longest_first_order
            print(choice)
        tables = [_of_methods(config.model, asked, steps, lt), _of_links(steps, lt)]
        if asked.rehearse:
            tables.append(_rehearsed(steps, lt))
        shown = [table for table in tables if table.rows]
        for table in shown:
            table.show()
        padding = padding_of(shape, steps.shards(asked.cluster.ranks))
        if sharding["engine"] == "fsdp" and padding.share > _WORTH_TELLING:
            print(padding)
        if asked.output is not None:
            write_json(folder / TABLES, {table.name: table.rows for table in shown})
            if choice is not None:
                _write_run(choice, steps, config, folder)
        if asked.rehearse:
            _check(tables[-1])


def _lengths(config: RunConfig, tokenizer: str | None) -> list[int]:
    """Tokens of each training sample, by the model's tokenizer or another."""
    try:
        prepared = prepare_inputs(dataclasses.replace(config, model=tokenizer or config.model))
    except UserError as error:
        if tokenizer is None and "cannot be loaded" in str(error):
            raise UserError(f"{error}: give --tokenizer, a folder, a hub id or smollm2-135m") from None
        raise
    return [example.length for example in prepared.train]


def _curve(steps: Steps, batch: Batch, shortest: int) -> Curve:
    """Addax's memory against L_T."""
    taking = dataclasses.replace(steps, batch=batch)
    return Curve(lambda length: taking.begin("addax", length), shortest, steps.long)


def _of_methods(model: str, asked: Asked, steps: Steps, lt: int) -> Bench:
    batch = steps.batch
    zo, fo = f"{batch.zo_micro_batch} x {steps.long} tokens", f"{batch.fo_micro_batch} x {lt}"
    about = f"GiB per GPU, {model}, {asked.sharding} on {asked.cluster}; each takes {zo} zeroth-order, {fo} first-order"
    return Bench("methods", about, [*methods.rows(steps, lt)])


def _of_links(steps: Steps, lt: int) -> Bench:
    return Bench("links", "seconds of Addax's step, estimated, by what joins the nodes", [*links.rows(steps, lt)])


def _rehearsed(steps: Steps, lt: int) -> Bench:
    """Addax's step as planned from a few layers and as the method has it, and as it is with all layers."""
    begun = [steps.begin("addax", lt), steps.begin("addax", lt, all_layers=True)]
    few, whole = (future.result() for future in begun)
    shards = steps.shards(steps.cluster.ranks)
    moved = sum(size for kind, size in whole.received.items() if kind != "all_reduce")
    figures = {
        "peak, GiB": (few.peak / 2**30, whole.peak / 2**30),
        "received, GiB": (sum(few.received.values()) / 2**30, sum(whole.received.values()) / 2**30),
        **{name: (few.collectives[name], count) for name, count in whole.collectives.items()},
    }
    if shards > 1:
        size = steps.weights * (shards - 1) / shards
        figures["model sizes received"] = 3 * padding_of(steps.shape, shards).share, moved / size
    rows = [
        {"figure": name, "planned": one, "rehearsed": other, "apart": f"{one / other - 1:+.2%}"}
        for name, (one, other) in figures.items()
    ]
    return Bench("rehearsal", "Addax's step, planned from a few layers and rehearsed with all", rows)


def _check(rehearsal: Bench) -> None:
    for row in rehearsal.rows:
        if abs(row["planned"] - row["rehearsed"]) > _APART * row["rehearsed"]:
            raise UserError(f"{row['figure']}: planned {row['planned']:.4g}, rehearsed {row['rehearsed']:.4g}")


def _write_run(choice: Choice, steps: Steps, config: RunConfig, folder: Path) -> None:
    draw(choice, methods.curves(steps, min(choice.lengths)), steps.cluster, folder / PLOT)
    sizes: dict[str, Any] = dataclasses.asdict(choice.batch) | {"k0": choice.k0, "k1": choice.k1}
    method = "addax-wa" if choice.lt == "none" else "addax"
    run = dataclasses.replace(config, method=method, lt=choice.lt, **steps.sharding, **sizes)
    commands = ready.write(run, str(choice), steps.cluster, folder)
    print(f"\n{folder / PLOT}: memory against length\n{folder / ready.RUN}: the run, which any of these starts:")
    print(*(f"  {command}" for command in commands), sep="\n")
