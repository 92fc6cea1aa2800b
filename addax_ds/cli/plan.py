"""`addax-ds plan`."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PretrainedConfig

from addax_ds.bench.table import Bench
from addax_ds.config import RunConfig, build, for_method, values_of
from addax_ds.errors import UserError
from addax_ds.plan import check, links, methods, ready
from addax_ds.plan.batches import LAST_TOKEN, Targets
from addax_ds.plan.choose import Batch, Choice, TooLargeError, choose
from addax_ds.plan.cluster import Cluster
from addax_ds.plan.evaluated import Evaluated
from addax_ds.plan.memory import Curve
from addax_ds.plan.methods import Steps
from addax_ds.plan.padding import padding_of
from addax_ds.plan.plot import PLOT, draw
from addax_ds.plan.rehearsals import Rehearsals
from addax_ds.plan.rehearse import with_layers
from addax_ds.plan.shardings import settings_of
from addax_ds.shapes import count_of, shape_of
from addax_ds.training.metrics import write_json
from addax_ds.training.run import Prepared, prepare_inputs

TABLES = "plan.json"
_WORTH_TELLING = 1.02  # of padding


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

    config: the run, whose sharding, batches and L_T are planned. Raises `UserError` for what cannot be planned.
    """
    shape = _shape(config.model)
    run = _addax(config)
    if asked.output is not None:
        _check_output(asked.output)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sharding = settings_of(asked.sharding, asked.cluster, shape, config.dtype, folder)
        rehearsals = stack.enter_context(Rehearsals(shape, sharding["engine"] == "deepspeed"))
        _plan(asked, *_steps(asked, config, run, has_data, shape, sharding, rehearsals))


def _steps(
    asked: Asked,
    config: RunConfig,
    run: RunConfig,
    has_data: bool,
    shape: PretrainedConfig,
    sharding: dict[str, Any],
    rehearsals: Rehearsals,
) -> tuple[Steps, list[int]]:
    """What is rehearsed, and the lengths of the data."""
    context = getattr(shape, "max_position_embeddings", None)
    prepared = _prepared(config, asked.tokenizer, context) if has_data else None
    examples = prepared.train if prepared is not None else []
    lengths = [example.length for example in examples]
    targets = Targets.of(examples, config.padding) if examples else LAST_TOKEN
    long = max(lengths, default=asked.long)
    if context is not None and long > context:
        raise UserError(
            f"samples of {long} tokens are longer than the {context} that {config.model} takes: shorten them"
        )
    if prepared is None:
        evaluated = Evaluated.words(long, run.eval_samples)
    else:
        evaluated = Evaluated.of([prepared.dev, prepared.held_out], prepared.task.max_new_tokens)
    return Steps(shape, run, rehearsals, asked.cluster, sharding, asked.batch, long, targets, evaluated), lengths


def _plan(asked: Asked, steps: Steps, lengths: list[int]) -> None:
    lt, choice, evaluates = asked.lt, None, True
    if lengths:
        try:
            with _waiting(steps.rehearsals):
                choice = choose(lengths, asked.cluster, lambda batch: _curve(steps, batch, min(lengths)), asked.batch)
        except TooLargeError:  # what it would take, and how many GPUs, is what is asked then
            _methods(asked, dataclasses.replace(steps, batch=Batch(1, 1)), min(lengths))
            raise
        steps, lt = dataclasses.replace(steps, batch=choice.batch), choice.longest_first_order
        print(choice)
        steps, evaluates = _evaluating(steps, lt)
    # To gather; a host draws noise of its own at another speed than is known.
    two_ways = steps.shards(asked.cluster.ranks) > 1 and steps.run.directions == "shared" and not steps.offloads
    if two_ways:
        links.begin(steps, lt)  # beside the methods
    tables = [_methods(asked, steps, lt)]
    if two_ways:
        tables.append(_shown(steps, "links", links.about(steps), links.rows(steps, lt)))
    if steps.padding(asked.cluster.ranks) > _WORTH_TELLING:
        print(padding_of(steps.sizes, steps.shards(asked.cluster.ranks)))
    if asked.rehearse:
        told = "Addax's step, planned from a few layers and rehearsed with all"
        tables.append(_shown(steps, "rehearsal", told, check.rows(steps, lt)))
    if asked.output is not None:
        asked.output.mkdir(parents=True, exist_ok=True)
        write_json(asked.output / TABLES, {table.name: table.rows for table in tables})
        if choice is not None and evaluates:
            _write_run(choice, asked, steps, asked.output)
    if not evaluates:
        raise UserError("evaluations do not fit, not even of one sample at once: plan more GPUs, or shorter samples")


def _check_output(folder: Path) -> None:
    """Before what takes a minute."""
    if (folder / ready.RUN).exists():
        raise UserError(f"{folder / ready.RUN} is there already: choose another --output, or remove it")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{there}: no folder that can be written: choose another --output")


def _methods(asked: Asked, steps: Steps, lt: int) -> Bench:
    """The table of all methods, shown."""
    zo, fo = f"{steps.batch.zo_micro_batch} x {steps.long} tokens", f"{steps.batch.fo_micro_batch} x {lt}"
    where = f"{steps.run.model}, {asked.sharding} on {asked.cluster}"
    told = f"GiB per GPU, {where}; each takes {zo} zeroth-order, {fo} first-order"
    return _shown(steps, "methods", told, methods.rows(steps, lt))


def _shape(model: str) -> PretrainedConfig:
    """The shape of a causal language model of blocks."""
    shape = shape_of(model)
    try:
        if shape.num_hidden_layers < 1:
            raise ValueError("num_hidden_layers is below 1")
        for whole in (shape, with_layers(shape, 1)):  # as it is rehearsed
            count_of(whole)
    except Exception as error:  # transformers take what stands in a config.json on trust
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{model}: no causal language model that can be planned: {reason:.200}") from None
    return shape


def _addax(config: RunConfig) -> RunConfig:
    """The run as one of Addax's; L_T is planned."""
    if config.method not in (None, "addax", "addax-wa") or not 0 < config.alpha < 1:
        raise UserError(
            f"a plan chooses for Addax, and shows the others beside it: leave method={config.method_name} out"
        )
    return build(RunConfig, {**values_of(config), "method": "addax", "lt": "auto"}, "plan")


def _prepared(config: RunConfig, tokenizer: str | None, context: int | None) -> Prepared:
    """The samples, in tokens of the model's tokenizer or another; context: tokens that the model takes."""
    replicated = {"engine": "replicated", "ds_config": None, "replicas": 1, "offload": False}
    read = {**values_of(config), **replicated, "model": tokenizer or config.model}
    try:
        return prepare_inputs(build(RunConfig, read, "plan"), context)
    except UserError as error:
        if tokenizer is None and config.model in str(error):
            raise UserError(f"{error}: or give --tokenizer, a folder, a hub id or smollm2-135m") from None
        raise


def _curve(steps: Steps, batch: Batch, shortest: int) -> Curve:
    """Addax's memory against L_T."""
    taking = dataclasses.replace(steps, batch=batch)
    kinks = steps.targets.kinks(batch.fo_micro_batch)
    return Curve(lambda length: taking.begin("addax", length), shortest, steps.long, kinks=kinks)


def _evaluating(steps: Steps, lt: int) -> tuple[Steps, bool]:
    """The same with as many sequences in an evaluation's forward, at most, as fit, and whether any do."""
    asked = steps.run.eval_micro_batch
    with _waiting(steps.rehearsals):
        fitting = methods.eval_micro_batch(steps, lt)
    if fitting in (None, asked):
        return steps, fitting is not None
    print(f"eval_micro_batch = {fitting}: evaluations with {asked} sequences at once do not fit.")
    run = build(RunConfig, {**values_of(steps.run), "eval_micro_batch": fitting}, "plan")
    return dataclasses.replace(steps, run=run), True


@contextlib.contextmanager
def _waiting(rehearsals: Rehearsals) -> Iterator[None]:
    """Tell a terminal how far rehearsals are, while nothing is printed."""
    with Console(stderr=True).status("") as status:
        rehearsals.told = status.update
        yield


def _shown(steps: Steps, name: str, about: str, rows: Iterable[dict[str, Any]]) -> Bench:
    """The table, printed, with the rows that there are before a fault, too."""
    table = Bench(name, about)
    try:
        with _waiting(steps.rehearsals):
            table.rows.extend(rows)
    finally:
        if table.rows:
            table.show()
    return table


def _write_run(choice: Choice, asked: Asked, steps: Steps, folder: Path) -> None:
    method = "addax-wa" if choice.lt == "none" else "addax"
    planned = {
        **settings_of(asked.sharding, steps.cluster, steps.shape, steps.run.dtype, folder),
        **dataclasses.asdict(choice.batch),
        **{"k0": choice.k0, "k1": choice.k1, "method": method, "lt": choice.lt},
    }
    run = build(RunConfig, {**for_method(values_of(steps.run), method), **planned}, "plan")
    commands = ready.write(run, str(choice), steps.cluster, folder)
    print(f"\n{folder / ready.RUN}: the run, which any of these starts, with")
    print("names of your own in place of node-0 and /shared/run, in the hostfile, too:")
    print(*(f"  {command}" for command in commands), sep="\n")
    with _waiting(steps.rehearsals):  # a curve takes longer than all else that is written
        others = methods.curves(steps, min(choice.lengths))
    draw(choice, others, steps.cluster, folder / PLOT)
    print(f"{folder / PLOT}: memory against length")
