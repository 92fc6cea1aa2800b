"""One fine-tuning run: data, model, evaluation, steps, files."""

import contextlib
import dataclasses
import hashlib
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from addax_ds.baselines import Baseline
from addax_ds.config import PrefixConfig, RunConfig, TaskConfig
from addax_ds.data.batches import Batch, batch_indices, micro_batches
from addax_ds.data.named_tasks import named_task
from addax_ds.data.partition import Partition, check_pools, partition
from addax_ds.data.sources import held_out_beside, load_records, split_records
from addax_ds.data.tasks import Example, encode
from addax_ds.digest import weights_digest
from addax_ds.errors import PreemptedError, UserError
from addax_ds.loss import choice_loss, token_loss
from addax_ds.training.agreement import from_main
from addax_ds.training.evaluation import EvaluationStoppedError, evaluate, metric_name, placed
from addax_ds.training.export import export, export_adapter
from addax_ds.training.finite import check_model
from addax_ds.training.folder import SUMMARY, can_resume, finished, open_folder
from addax_ds.training.memory import PeakMemory
from addax_ds.training.metrics import read_metrics, write_json
from addax_ds.training.models import (
    accepted,
    build_addax,
    build_optimizer,
    context_length,
    load_tokenizer,
    locate_model,
    open_model,
    read_ds_config,
)
from addax_ds.training.preemption import Request, requests
from addax_ds.training.state import RunState
from addax_ds.training.unsaved import UnsavedState
from addax_ds.training.wire import WireCounter
from addax_ds.training.world import World, joined, limit_waiting


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run needs and every rank builds alike, checked before anything is written."""

    location: str
    tokenizer: PreTrainedTokenizerBase
    task: TaskConfig
    train: list[Example]
    dev: list[Example]
    held_out: list[Example]

    @property
    def cut(self) -> int:
        """Samples with less than their whole prompt."""
        return sum(example.cut for example in (*self.train, *self.dev, *self.held_out))


def prepare_inputs(config: RunConfig, context: int | None = None) -> Prepared:
    """Data and tokenizer of a run; every fault in them is a `UserError`.

    context: tokens that the model takes, where `config.model` is a tokenizer alone.
    """
    if config.engine == "deepspeed":
        read_ds_config(config)
    records, brought = load_records(config.data)
    named = config.task or brought
    if named is None:
        raise UserError(
            f"data {config.data} brings no task: set task.prompt with task.label and task.labels, or task.completion"
        )
    task, records = _fitted(named, records)
    drawn = None if config.train_samples is None else config.train_samples + config.dev_samples
    beside = held_out_beside(config.data)
    if beside is not None and drawn is not None:
        drawn = min(drawn, len(records))  # of a task by name, what there is: some have a few hundred samples
    eval_data = config.eval_data or beside
    held_out_here = config.eval_samples if eval_data is None else 0
    train, held_out = split_records(records, drawn, held_out_here, config.seed)
    if eval_data is not None:
        _, apart = _fitted(named, load_records(eval_data)[0])
        asked = config.eval_samples if config.eval_data is not None else min(config.eval_samples, len(apart))
        _, held_out = split_records(apart, 0, asked, config.seed)
    if len(train) <= config.dev_samples:
        raise UserError(f"{len(train)} samples are too few for dev_samples={config.dev_samples}: lower it")
    first_dev = len(train) - config.dev_samples
    location = locate_model(config.model)
    tokenizer = load_tokenizer(location)
    # A prefix takes places of its own.
    taken = config.adapter.tokens if isinstance(config.adapter, PrefixConfig) else 0
    longest = (context or context_length(location)) - taken
    generated = task.max_new_tokens if task.completion is not None else 0
    return Prepared(
        location,
        tokenizer,
        task,
        encode(train[:first_dev], task, tokenizer, longest),
        encode(train[first_dev:], task, tokenizer, longest, generated) if config.dev_samples else [],
        encode(held_out, task, tokenizer, longest, generated),
    )


def _fitted(task: TaskConfig | str, records: list[dict[str, Any]]) -> tuple[TaskConfig, list[dict[str, Any]]]:
    """The task, and the records with the fields that it reads."""
    return named_task(task, records) if isinstance(task, str) else (task, records)


def pools_of(prepared: Prepared, config: RunConfig) -> Partition:
    """What the steps of a run draw from; raises `UserError` where that is too little."""
    pools = partition([example.length for example in prepared.train], config.lt)
    if config.steps:
        check_pools(pools, config.k0, config.k1, config.alpha)
    return pools


def train(config: RunConfig) -> dict[str, Any] | None:
    """Run `config` and return its summary on rank 0 (None elsewhere); `world.discover` comes first.

    An unfinished run of the same settings in `config.output` goes on where it was. Raises `PreemptedError`
    after SIGTERM, once the step under way is saved.
    """
    started = time.monotonic()
    prepared = prepare_inputs(config)
    pools = pools_of(prepared, config)
    if summary := finished(config, pools):
        if os.environ["RANK"] != "0":
            return None
        print(f"the run in {summary['folder']} is finished: nothing is left to do")
        return summary
    resuming = can_resume(config, pools)
    # SIGTERM is noted until the group is left, too: a launcher that ends the ranks beside one that is lost must not
    # keep them from saying so.
    with contextlib.ExitStack() as noted, joined(config.timeout_minutes, config.offload) as world:
        return _train(config, prepared, pools, world, resuming, noted.enter_context(requests()), started)


def _train(
    config: RunConfig,
    prepared: Prepared,
    pools: Partition,
    world: World,
    resuming: bool,
    request: Request,
    started: float,
) -> dict | None:
    _check_folder_is_shared(resuming)
    model, unread = open_model(prepared.location, config)
    inputs = accepted(model)
    optimizer = build_optimizer(model, config, world, unread)
    engine = optimizer.engine
    folder = open_folder(config, pools, world)
    say = print if world.is_main else lambda *_: None
    say(pools.describe())
    if cut := prepared.cut:
        say(f"The model takes no more tokens: {cut} samples lose the beginning of their prompts.")

    def score_of(examples: list[Example]) -> dict[str, float]:
        task, asked = prepared.task, lambda: request.received
        return evaluate(
            optimizer, examples, prepared.tokenizer, config, inputs, task.max_new_tokens, task.stop, asked_to_end=asked
        )

    metric = metric_name(prepared.held_out)
    loss_fn = choice_loss if prepared.task.labels else token_loss
    data = _digest_of(prepared.train)
    limit_waiting(config.timeout_minutes)
    state: RunState | UnsavedState
    if isinstance(optimizer, Baseline):
        state = UnsavedState(config, folder, optimizer, resuming, say)
    else:
        state = RunState(config, folder, optimizer, data, len(prepared.train), resuming, say)
    try:
        before = state.before or score_of(prepared.held_out)
    except EvaluationStoppedError:
        raise PreemptedError("asked to end before the first step: there is nothing to save") from None
    say(f"before: {metric} {before[metric]:.3f} on {len(prepared.held_out)} held-out samples")
    state.begin(before, lambda: score_of(prepared.dev or prepared.held_out))

    first, memory = state.steps, PeakMemory()
    progress = tqdm(total=config.steps, initial=first, disable=not world.is_main, unit="step", mininterval=0.5)
    for step in range(first, config.steps):
        begun = time.monotonic()
        memory.begin_step()
        samples = step_samples(config, pools, step)
        zo, fo = step_batches(config, prepared, samples, inputs, engine.device)
        optimizer.queries = queries_of(config, pools, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        # The second step: the first builds engines' caches, and one is enough, since counting slows it.
        if step == min(first + 1, config.steps - 1):
            with WireCounter() as wire:
                metrics = optimizer.train_step(zo, fo, loss_fn)
            metrics["wire_bytes"] = {**wire.received}
        else:
            metrics = optimizer.train_step(zo, fo, loss_fn)
        if step == first and config.perturb == "auto" and optimizer.placement:
            say(f"perturb: {optimizer.placement} ({optimizer.placement_reason})")
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)  # the backward is under way
        elapsed = time.monotonic() - begun
        tokens = _tokens(zo) * 2 * optimizer.queries + _tokens(fo)
        metrics.update(seconds=elapsed, tokens=tokens, memory_bytes=memory.end_step())
        progress.set_postfix(_postfix(metrics, tokens / elapsed), refresh=False)
        progress.update()
        state.took(metrics, samples, request.received)
    progress.close()
    state.steps_are_taken()

    try:
        after = score_of(prepared.held_out) if config.steps else before
        dev = score_of(prepared.dev) if prepared.dev else {}
    except EvaluationStoppedError:
        state.end_early()
    say(f"after: {metric} {after[metric]:.3f}")
    digest = weights_digest(engine)
    state.prepare_export(request)
    state.end(digest)
    if config.save:
        target = folder / ("model" if config.adapter is None else "adapter")
        say(f"saving the {target.name} to {target}")
        if config.adapter is None:
            export(engine, prepared.tokenizer, target)
        else:
            export_adapter(engine, config, target)
    peaks = [(0, 0)] * world.size
    dist.all_gather_object(peaks, (memory.in_all, memory.in_steps))

    def summarize() -> dict[str, Any]:
        records = read_metrics(folder)
        # Of rank 0 those of steps before the run went on, too.
        in_steps = [in_steps for _, in_steps in peaks]
        in_steps[0] = max(in_steps[0], *(record["memory_bytes"] for record in records), 0)
        counted = [record["wire_bytes"] for record in records if record.get("wire_bytes")]
        summary = {
            "method": config.method_name,
            "engine": engine.name,
            "world_size": world.size,
            "steps": config.steps,
            "metrics_lost": config.steps - len(records),
            "skipped_steps": sum(record["skipped"] for record in records),
            "gradients_left_out": sum(record["gradients_left_out"] for record in records),
            "model": config.model,
            "trained": "all" if config.adapter is None else config.adapter.kind,
            "trainable_parameters": sum(p.numel for p in engine.shards() if config.steps and engine.trainable(p.name)),
            "data": config.data,
            "metric_name": metric,
            **{f"{name}_before": value for name, value in before.items()},
            **{f"{name}_after": value for name, value in after.items()},
            **{f"dev_{name}": value for name, value in dev.items()},
            "seconds_per_step": statistics.median([record["seconds"] for record in records] or [math.nan]),
            "wire_bytes_per_step": counted[-1] if counted else {},
            "peak_memory_bytes": [in_all for in_all, _ in peaks],
            "step_memory_bytes": in_steps,
            "seconds_total": time.monotonic() - started,
            "final_digest": digest,
        }
        write_json(folder / SUMMARY, summary)
        return {**summary, "folder": str(folder)}

    summary = from_main(engine, summarize)
    return summary if world.is_main else None


def _check_folder_is_shared(resuming: bool) -> None:
    """Raises `UserError` where some ranks find a run to go on with and others none (a collective)."""
    answers = [False] * dist.get_world_size()
    dist.all_gather_object(answers, resuming)
    if len(set(answers)) > 1:
        raise UserError(
            f"rank {answers.index(not answers[0])} and rank 0 see different run folders: put output on a file system "
            "that all nodes share"
        )


def _digest_of(examples: list[Example]) -> str:
    """Digest of all tokens that training may see."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.prompt, example.target, example.choices, example.answer)).encode())
    return digest.hexdigest()[:16]


def step_samples(config: RunConfig, pools: Partition, step: int) -> tuple[list[int], list[int]]:
    """Numbers of the training samples of the step's zeroth-order and first-order batches."""
    zo = batch_indices(pools.zo, config.k0, config.seed, "zo", step) if config.alpha > 0 else []
    fo = batch_indices(pools.fo, config.k1, config.seed, "fo", step) if config.alpha < 1 else []
    return zo, fo


def step_batches(
    config: RunConfig,
    prepared: Prepared,
    samples: tuple[list[int], list[int]],
    inputs: frozenset[str],
    device: torch.device,
) -> tuple[list[Batch] | None, list[Batch] | None]:
    """Zeroth-order and first-order micro-batches of these samples, the same on every rank."""

    def micro_batches_of(numbers: list[int], size: int) -> list[Batch] | None:
        examples = [prepared.train[number] for number in numbers]
        if not examples:
            return None
        batches = micro_batches(examples, size, prepared.tokenizer.pad_token_id, config.padding)
        return [placed(batch, inputs, device) for batch in batches]

    zo, fo = samples
    return micro_batches_of(zo, config.zo_micro_batch), micro_batches_of(fo, config.fo_micro_batch)


def _tokens(batches: list[Batch] | None) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in batches or [])


def _postfix(metrics: dict[str, Any], tokens_per_second: float) -> dict[str, str]:
    shown = {}
    zo, fo = metrics["loss_zo"], metrics["loss_fo"]
    if fo is not None:
        shown["loss"] = f"{fo:.3f}"
    if zo is not None:
        shown["zo loss"] = f"{statistics.fmean(zo['plus'] + zo['minus']):.3f}"
        shown["g0"] = f"{statistics.fmean(metrics['g0']):+.2f}"
    return {**shown, "tok/s": f"{tokens_per_second:.0f}"}


def queries_of(config: RunConfig, pools: Partition, step: int) -> int:
    """Directions of step `step` (from 0): a pure function, so that a run resumes anywhere."""
    if config.query_schedule is None:
        return config.queries
    return config.query_schedule.queries(step // math.ceil(len(pools.zo) / config.k0))


def learning_rate(config: RunConfig, step: int) -> float:
    """Rate of step `step` (from 0): a pure function, so that a run resumes anywhere.

    Linear warm-up from 0 to lr over `warmup_steps`, then constant, or down to 0 at the end.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda _: 1.0,
        "linear": lambda x: 1.0 - x,
        "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    }
    return config.lr * shapes[config.schedule](progress)


def score_only(config: RunConfig) -> dict[str, Any] | None:
    """Scores of `config.model` on the run's held-out samples, on rank 0 (None elsewhere)."""
    prepared = prepare_inputs(config)
    with joined(config.timeout_minutes, config.offload) as world:
        model, unread = open_model(prepared.location, config)
        inputs = accepted(model)
        # In the run's own precision; DeepSpeed's optimizers, which have none of their own, would be compiled first.
        own = build_addax if config.engine == "deepspeed" else build_optimizer
        optimizer = own(model, config, world, unread)
        check_model(optimizer.engine, config)
        task = prepared.task
        scores = evaluate(
            optimizer, prepared.held_out, prepared.tokenizer, config, inputs, task.max_new_tokens, task.stop
        )
    return {"model": config.model, "samples": len(prepared.held_out), **scores} if world.is_main else None
