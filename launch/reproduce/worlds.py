"""One experiment on several engines and numbers of ranks, and one table of what came out.

    python launch/reproduce/worlds.py launch/reproduce/zeroth_order.yaml
    python launch/reproduce/worlds.py launch/reproduce/mixed.yaml steps=10 --ranks 1 --ranks 2

A zeroth-order run has the same digest in every row. A mixed run has one digest for each row, the
same whenever that row is run again, and losses that agree to rounding. Folders are runs/worlds/...
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]


def deepspeed(name: str) -> list[str]:
    return ["engine=deepspeed", f"ds_config={ROOT / 'ds_configs' / name}"]


ENGINES = {
    "replicated": ["engine=replicated", "ds_config=null"],
    "fsdp": ["engine=fsdp", "ds_config=null"],
    "hsdp": ["engine=fsdp", "ds_config=null", "replicas=2"],
    "fsdp-offload": ["engine=fsdp", "ds_config=null", "offload=true"],
    "zero2": deepspeed("zero2.json"),
    "zero3": deepspeed("zero3.json"),
    "zero3-offload": deepspeed("zero3_offload_param.json"),
}


def main(
    run_file: Path,
    settings: Annotated[list[str] | None, typer.Argument(help="key=value on top of the run file.")] = None,
    ranks: Annotated[list[int] | None, typer.Option(help="Numbers of ranks.")] = None,
    engines: Annotated[list[str] | None, typer.Option(help=f"Among {', '.join(ENGINES)}.")] = None,
    output: Path = Path("runs/worlds"),
) -> None:
    """Run every engine on every number of ranks and print a table.

    Status 1 where a run fails, and where zeroth-order runs end with different digests.
    """
    if (output / run_file.stem).exists():
        print(f"{output / run_file.stem} holds runs already: give another --output, or remove it", file=sys.stderr)
        sys.exit(2)
    table, digests = Table(title=str(run_file)), set()
    for column in ("engine", "ranks", "digest", "first loss", "last loss", "last g0", "metrics"):
        table.add_column(column)
    for engine in engines or ENGINES:
        for size in ranks or (1, 2, 4):
            if engine == "hsdp" and size % 2:
                continue  # two replicas
            folder = output / run_file.stem / f"{engine}-{size}"
            train(size, [str(run_file), *(settings or []), *ENGINES[engine], f"output={folder}"])
            table.add_row(engine, str(size), *described(folder))
            summary = json.loads((folder / "summary.json").read_text())
            digests.add(summary["final_digest"] if summary["method"] in ("mezo", "adazeta") else "")
    if not table.rows:
        sys.exit("hsdp needs an even number of ranks: give --ranks 2 or 4")
    Console(width=120).print(table)
    if len(digests) > 1:
        sys.exit("zeroth-order runs ended with different digests")


def train(ranks: int, words: list[str]) -> None:
    """One run of `addax-ds train` on `ranks` ranks; ends this script where it fails."""
    threads = str(max((os.cpu_count() or 1) // ranks, 1))
    command = ["torchrun", "--standalone", "--nproc_per_node", str(ranks), str(ROOT / "launch" / "train.py")]
    done = subprocess.run([*command, *words], env={"OMP_NUM_THREADS": threads, **os.environ}, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with status {done.returncode}")


def described(folder: Path) -> list[str]:
    """Digest, first and last loss, last g0 and a digest of the metrics but for times, of a finished run."""
    summary = json.loads((folder / "summary.json").read_text())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss_fo"] if step["loss_fo"] is not None else step["loss_zo"]["plus"][0] for step in steps]
    g0 = steps[-1]["g0"]
    return [
        summary["final_digest"][:12],
        f"{losses[0]:.9f}",
        f"{losses[-1]:.9f}",
        f"{g0[0]:+.6f}" if g0 else "-",
        hashlib.sha256(json.dumps([without_times(step) for step in steps]).encode()).hexdigest()[:12],
    ]


def without_times(step: dict) -> dict:
    """What the same run measures again to the last bit."""
    return {name: value for name, value in step.items() if name not in ("seconds", "memory_bytes", "wire_bytes")}


if __name__ == "__main__":
    typer.run(main)
