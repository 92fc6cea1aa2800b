"""A run repeated from its journal (zeroth-order), or audited against it (mixed). No data, no forward."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from addax_ds.config import RunConfig, load_run
from addax_ds.core.directions import Directions
from addax_ds.core.noise import step_seed
from addax_ds.core.scalars import projected_gradients
from addax_ds.data.partition import Partition, check_pools, partition
from addax_ds.digest import weights_digest
from addax_ds.errors import UserError
from addax_ds.optimizer import Addax
from addax_ds.training.checkpoint import Checkpoints, audited, complete
from addax_ds.training.export import export, export_adapter
from addax_ds.training.folder import CHECKPOINTS, CONFIG, JOURNAL, LENGTHS, SUMMARY
from addax_ds.training.journal import Entries, read_journal
from addax_ds.training.metrics import METRICS, Lengths, Step, Summary, check_kind, read_json, read_metrics
from addax_ds.training.models import hyperparameters, load_model, load_tokenizer, locate_model
from addax_ds.training.run import learning_rate, queries_of, step_samples
from addax_ds.training.state import check_header, recorded


@dataclass(frozen=True)
class Replay:
    """What a replay has found."""

    first: int
    """Steps that the weights had taken when it began."""
    last: int
    digest: str
    """Of the weights after step `last`, the same that the run noted where it noted one."""
    noted: bool
    """Whether it did."""
    journal_bytes: int
    """Of the repeated steps."""


def replay(folder: Path, start: int | None, stop: int | None, output: Path | None) -> Replay:
    """Rebuild the weights after step `stop` from those after step `start` and the journal alone.

    start: a checkpoint that is still there, or 0, the model that the run began with; the oldest
    checkpoint where it is not given. stop: the last step of the journal where it is not given.
    output: where to write the rebuilt model, or its adapters. Raises `UserError` for runs with first-order gradients,
    which no scalar tells, for damage, and where the weights differ from those of the run.
    """
    config, entries = load_run(str(folder / CONFIG), []), read_journal(folder / JOURNAL)
    check_header(entries.header, recorded(config))
    if config.alpha < 1:
        raise UserError(
            f"{folder}: alpha is {config.alpha}, and first-order gradients are not in the journal: "
            "only a run of alpha 1 can be repeated from it"
        )
    if output is not None and output.exists():
        raise UserError(f"{output} is there already: choose another folder")
    saved = {int(path.name.removeprefix("step-")): path for path in complete(folder / CHECKPOINTS)}
    start = min((step for step in saved if step >= entries.first), default=0) if start is None else start
    stop = entries.steps if stop is None else stop
    if start and start not in saved:
        there = ", ".join(map(str, sorted(saved))) or "none"
        raise UserError(f"{folder} has no checkpoint of step {start}, only {there}: give one of them, or 0")
    if start < entries.first:
        raise UserError(f"the journal begins after step {entries.first}: give a checkpoint from there on")
    if not start <= stop <= entries.steps:
        raise UserError(f"the journal ends with step {entries.steps}: give a last step from {start} to that")
    location = locate_model(config.model)
    model = load_model(location, config).to("cuda" if torch.cuda.is_available() else "cpu")
    # One process has no shards to move; the bits are the same.
    optimizer = Addax(model, **{**hyperparameters(config), "perturb": "gathered"})
    if start:
        manifest = Checkpoints(folder / CHECKPOINTS, optimizer.engine, len(saved)).load(saved[start])
        entries.line_of(start, str(manifest.run.get("journal")), manifest.digest)
    elif weights_digest(optimizer.engine) != entries.header["weights"]:
        raise UserError(f"model {config.model} is not the one that the run began with: restore it")
    repeated = entries.between(start, stop)
    optimizer.replay([(record.seed, record.g0 or (), record.lr) for record in repeated], config.zo_sizes)
    digest = weights_digest(optimizer.engine)
    noted = digests_of(entries).get(stop)
    if noted is not None and noted != digest:
        raise UserError(
            f"after step {stop} the weights have the digest {digest}, and the run noted {noted}: "
            "use the version and the kind of device that the run used"
        )
    if output is not None:
        if config.adapter is None:
            export(optimizer.engine, load_tokenizer(location), output)
        else:
            export_adapter(optimizer.engine, config, output)
    ends = {after: end for after, end, _ in reversed(entries.ends)}  # of the step itself, before later events
    return Replay(start, stop, digest, noted is not None, ends[stop] - ends[start])


def audit(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Hold every step of a run's journal against all that determines it.

    The seeds, samples, learning rates and numbers of directions that the settings give; the losses and
    g0 of metrics.jsonl; the weights of the checkpoints and the digest of the summary; and that this
    version draws the same noise. Returns how many of each item agree, and the files that are not there
    to compare with. Raises `UserError` that names the first step and item that disagree.
    """
    config, entries = load_run(str(folder / CONFIG), []), read_journal(folder / JOURNAL)
    check_header(entries.header, recorded(config))
    absent = [name for name in (LENGTHS, METRICS, SUMMARY) if not (folder / name).exists()]
    pools = None if LENGTHS in absent else _pools(folder, config, entries)
    metrics = {} if METRICS in absent else _metrics(folder)
    final_digest = None if SUMMARY in absent else _summary(folder)["final_digest"]
    agreed: Counter[str] = Counter()

    def agree(item: str, step: int, noted: Any, expected: Any) -> None:
        if noted != expected:
            raise UserError(f"step {step}: the journal has {item} {noted}, and it should be {expected}")
        agreed[item] += 1

    for record in entries.records:
        step = record.step
        agree("seed", step, record.seed, step_seed(config.seed, step - 1))
        if pools is not None:
            agree("samples", step, [list(record.zo), list(record.fo)], list(step_samples(config, pools, step - 1)))
        agree("lr", step, record.lr, learning_rate(config, step - 1))
        if record.g0 is not None and (pools is not None or config.query_schedule is None):
            queries = config.queries if pools is None else queries_of(config, pools, step - 1)
            owed = Directions(config.directions, queries, config.zo_sizes).count if config.alpha > 0 else 0
            agree("directions", step, len(record.g0), owed)
        measured = metrics.get(step)
        if measured is not None:
            agree("g0", step, record.g0, None if measured["skipped"] else tuple(measured["g0"]))
            if record.g0 and measured["loss_zo"]:
                plus, minus = (measured["loss_zo"][side] for side in ("plus", "minus"))
                agree("difference of losses", step, list(record.g0), projected_gradients(plus, minus, config.eps))
    noted, taken = digests_of(entries), entries.steps
    for path in complete(folder / CHECKPOINTS):
        manifest = audited(path)
        if manifest.step >= entries.first:
            agree("weights", manifest.step, noted.get(manifest.step), manifest.digest)
    if final_digest is not None:
        agree("weights", taken, noted.get(taken), final_digest)
    return dict(agreed), absent


def digests_of(entries: Entries) -> dict[int, str]:
    """The digests of weights that a run has noted, by the steps taken."""
    noted = {event["after"]: event["weights"] for event in entries.events if "weights" in event}
    return {entries.first: entries.header["weights"], **noted}


def _pools(folder: Path, config: RunConfig, entries: Entries) -> Partition:
    path = folder / LENGTHS
    content = read_json(path)
    check_kind(content, Lengths, str(path))
    lengths, samples = content["lengths"], entries.header["train_samples"]
    if len(lengths) != samples:
        raise UserError(f"{path}: lengths of {len(lengths)} samples, and the run had {samples}: restore it")
    pools = partition(lengths, config.lt)
    try:
        check_pools(pools, config.k0, config.k1, config.alpha)
    except UserError as error:
        raise UserError(f"{path} is not that of the run ({error}): restore it") from None
    return pools


def _metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """Records by their steps."""
    records = read_metrics(folder)
    for number, record in enumerate(records, start=1):
        check_kind(record, Step, f"{folder / METRICS}: line {number}")
    return {record["step"]: record for record in records}


def _summary(folder: Path) -> dict[str, Any]:
    summary = read_json(folder / SUMMARY)
    check_kind(summary, Summary, str(folder / SUMMARY))
    return summary
