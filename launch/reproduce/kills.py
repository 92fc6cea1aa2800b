"""A run that is killed again and again ends with the weights of one that was left alone.

    python launch/reproduce/kills.py launch/reproduce/mixed.yaml steps=200 checkpoint_every=5 engine=fsdp --kills 20

After each kill -9, of one rank or of all, at a random instant, torchrun starts the ranks anew; with
--launcher deepspeed the same command is given again. Two in three kills meet a run that has got further
than at the kill before, the third comes whenever it likes, in start-up too. Needs psutil, which DeepSpeed
brings.
"""

import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import psutil
import typer

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "launch" / "train.py")


def torchrun(ranks: int, restarts: int) -> list[str]:
    options = ["--standalone", "--nproc_per_node", str(ranks), "--max-restarts", str(restarts)]
    return ["torchrun", *options, "--monitor-interval", "0.2"]


def deepspeed(ranks: int, _: int) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    return ["deepspeed", "--num_accelerators", str(ranks), "--no_local_rank", "--master_port", port]


LAUNCHERS = {"torchrun": torchrun, "deepspeed": deepspeed}


def main(
    run_file: Path,
    settings: Annotated[list[str] | None, typer.Argument(help="key=value on top of the run file.")] = None,
    kills: Annotated[int, typer.Option(help="How often ranks are killed.")] = 20,
    ranks: int = 2,
    launcher: Annotated[str, typer.Option(help=f"Among {', '.join(LAUNCHERS)}.")] = "torchrun",
    seed: int = 0,
    output: Path = Path("runs/kills"),
) -> None:
    """Run once untouched and once under kills; status 1 where the final digests differ."""
    words = [str(run_file), *(settings or [])]
    untouched, killed = output / "untouched", output / "killed"
    if untouched.exists() or killed.exists():
        print(f"{output} holds runs already: give another --output, or remove it", file=sys.stderr)
        sys.exit(2)

    def command(folder: Path) -> list[str]:
        return [*LAUNCHERS[launcher](ranks, kills + 1), TRAIN, *words, f"output={folder}"]

    if subprocess.run(command(untouched), stdout=subprocess.DEVNULL).returncode:
        sys.exit("the untouched run failed")
    draw, log, done = random.Random(seed), (output / "killed.log").open("wb"), Counter()

    def start() -> subprocess.Popen:
        return subprocess.Popen(command(killed), stdout=log, stderr=log)

    run, steps, end = start(), 0, time.monotonic() + 120.0 * (kills + 1)
    while sum(done.values()) < kills and not (killed / "summary.json").exists():
        if run.poll() is not None:
            if launcher == "torchrun":
                break
            run = start()
        if time.monotonic() > end:
            run.terminate()
            sys.exit(f"no end in sight after {sum(done.values())} kills: see {output / 'killed.log'}")
        anywhere = sum(done.values()) % 3 == 2
        further = steps_of(killed) > steps
        time.sleep(draw.uniform(0, 6 if anywhere else 3) if anywhere or further else 0.2)
        victims = processes_of(run.pid)
        if len(victims) < ranks or not (anywhere or further):
            continue
        one = draw.random() < 0.7
        try:
            for process in [draw.choice(victims)] if one else victims:
                process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:  # it has just ended by itself
            continue
        done["one rank" if one else "all ranks"] += 1
        steps = steps_of(killed)
        print(f"kill {sum(done.values())}: {'one rank' if one else 'all ranks'} at step {steps}", flush=True)
        time.sleep(2)
    again = 3  # what the last kill has left may be in the way for a moment
    while run.wait() and not (killed / "summary.json").exists() and launcher != "torchrun" and again:
        run, again = start(), again - 1
    if not (killed / "summary.json").exists():
        sys.exit(f"the killed run failed: see {output / 'killed.log'}")
    digests = [json.loads((folder / "summary.json").read_text())["final_digest"] for folder in (untouched, killed)]
    survived = "survived" if digests[0] == digests[1] else "NOT survived"
    print(f"{sum(done.values())} kills {dict(done)} {survived}: untouched {digests[0][:12]}, killed {digests[1][:12]}")
    sys.exit(survived != "survived" or sum(done.values()) < kills)


def steps_of(folder: Path) -> int:
    """Steps noted so far."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def processes_of(launcher: int) -> list[psutil.Process]:
    """The ranks that a launcher runs: python, its options, and the script."""
    try:
        children = psutil.Process(launcher).children(recursive=True)
        return [child for child in children if TRAIN in child.cmdline()[:3]]
    except psutil.NoSuchProcess:  # it has just ended
        return []


if __name__ == "__main__":
    typer.run(main)
