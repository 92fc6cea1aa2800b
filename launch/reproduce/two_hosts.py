"""A job of two nodes with two ranks each, rehearsed on this machine: two network namespaces, joined by a slow link.

    python launch/reproduce/two_hosts.py launch/reproduce/mixed.yaml

Under torchrun (FSDP2) and under deepspeed --no_ssh (ZeRO-3) it prints seconds per step with all lanes in one gather
and with a gather for each forward. Then the link goes down in the middle of a zeroth-order run: both nodes end with a
cause. With the link up again the same commands end with the digest of a run that was left alone. Needs Linux, root
and iproute2; status 2 where the machine does not allow it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from addax_ds.bench.link import Host, linked
from addax_ds.errors import UserError

LAUNCH = Path(__file__).parents[1]
LAUNCHERS = {
    "torchrun": ("torchrun.sh", ["engine=fsdp", "ds_config=null"]),
    "deepspeed --no_ssh": (
        "deepspeed.sh",
        ["engine=deepspeed", f"ds_config={LAUNCH.parent / 'ds_configs' / 'zero3.json'}"],
    ),
}
ZEROTH_ORDER = ["method=mezo", "lr=1e-6"]  # ends with the same bits, however often it is started again
RANKS = 2  # of each node
SECONDS = 1800.0  # for a run


def main(
    run_file: Path,
    settings: Annotated[list[str] | None, typer.Argument(help="key=value on top of the run file.")] = None,
    link: Annotated[float, typer.Option(help="Gbit/s between the nodes.")] = 1.0,
    output: Path = Path("runs/two_hosts"),
) -> None:
    """Rehearse a two-node job; status 1 where a run does not end as it should, 2 where none can be tried."""
    if output.exists():
        print(f"{output} holds runs already: give another --output, or remove it", file=sys.stderr)
        sys.exit(2)
    words = [str(run_file), "steps=6", "save=false", "timeout_minutes=1", *(settings or [])]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and leave no namespaces behind
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(linked(link))
            for host in hosts:
                give_up_soon(host)
        except UserError as error:
            print(f"two hosts cannot be rehearsed here: {error}", file=sys.stderr)
            sys.exit(2)
        output.mkdir(parents=True)
        (output / "hostfile").write_text("".join(f"{host.address} slots={RANKS}\n" for host in hosts))
        expected = None
        for launcher in LAUNCHERS:
            jobs = Jobs(launcher, hosts, words, output)
            try:
                compare_gathers(jobs, link)
                expected = expected or undisturbed(jobs)
                lose_the_link(jobs, expected)
            finally:
                jobs.end()


def give_up_soon(host: Host) -> None:
    """Have TCP of a host end connections that are dead in half a minute: torchrun waits for that, Linux for 15."""
    command = ["ip", "netns", "exec", host.namespace, "sysctl", "-qw", "net.ipv4.tcp_retries2=6"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"TCP cannot be set ({done.stderr.strip()}): run as root, outside of a container")


class Jobs:
    """Runs of one launcher, one after the other."""

    def __init__(self, launcher: str, hosts: Sequence[Host], words: list[str], output: Path) -> None:
        self.launcher, self.hosts = launcher, hosts
        self._words, self._output = words, output
        self._processes: list[subprocess.Popen] = []

    def folder(self, name: str) -> Path:
        """Where the run of this name writes."""
        return self._output / f"{self.launcher.split()[0]}-{name}"

    def log(self, name: str, node: int) -> str:
        """All that a node has said."""
        return self.folder(name).with_suffix(f".node-{node}.log").read_text(errors="replace")

    def start(self, name: str, *settings: str) -> None:
        """Give each node its command."""
        script, engine = LAUNCHERS[self.launcher]
        self._processes = []
        for rank, host in enumerate(self.hosts):
            variables = {
                "NODES": str(len(self.hosts)),
                "GPUS_PER_NODE": str(RANKS),
                "HEAD": self.hosts[0].address,
                "HOSTFILE": str(self._output / "hostfile"),
                "LAUNCHER": "no_ssh",
                "NODE_RANK": str(rank),
                # These hosts have addresses, but no names that torchrun could look up.
                "PET_LOCAL_ADDR": host.address,
                "PET_RDZV_CONF": f"is_host={rank == 0}",
                "GLOO_SOCKET_IFNAME": host.interface,
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "CUDA_VISIBLE_DEVICES": "",  # GPUs of one machine do not use its network
                "HF_HUB_OFFLINE": "1",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            }
            command = ["ip", "netns", "exec", host.namespace, "bash", str(LAUNCH / script)]
            command += [*self._words, *engine, *settings, f"output={self.folder(name)}"]
            with self.folder(name).with_suffix(f".node-{rank}.log").open("ab") as log:
                process = subprocess.Popen(command, env={**os.environ, **variables}, stdout=log, stderr=log)
            self._processes.append(process)

    def wait(self, name: str, until: Callable[[], bool] | None = None) -> list[int | None]:
        """The nodes' exit statuses once all have ended, or where `until` comes first."""
        deadline = time.monotonic() + SECONDS
        while not (until and until()) and any(process.poll() is None for process in self._processes):
            if time.monotonic() > deadline:
                sys.exit(f"{self.launcher}: {name} did not end within {SECONDS:.0f} s: see {self.folder(name)}.*.log")
            time.sleep(0.05)
        return [process.poll() for process in self._processes]

    def summary(self, name: str) -> dict:
        """Of a run that ends well."""
        if any(self.wait(name)):
            sys.exit(f"{self.launcher}: {name} failed: see {self.folder(name)}.*.log")
        return json.loads((self.folder(name) / "summary.json").read_text())

    def steps(self, name: str) -> int:
        """Noted so far."""
        metrics = self.folder(name) / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def end(self) -> None:
        """Leave no process on the hosts, ranks of a launcher that was ended among them."""
        for host in self.hosts:
            pids = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True).stdout
            for pid in pids.split():
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(int(pid), signal.SIGKILL)


def compare_gathers(jobs: Jobs, link: float) -> None:
    """Print what a gather for each forward costs on the link."""
    seconds = []
    for perturb in ("gathered", "shard"):
        jobs.start(perturb, f"perturb={perturb}")
        seconds.append(jobs.summary(perturb)["seconds_per_step"])
    print(
        f"{jobs.launcher}, link of {link:g} Gbit/s: {seconds[0]:.3g} s a step with all lanes in one gather, "
        f"{seconds[1]:.3g} s with a gather for each forward ({seconds[1] / seconds[0]:.2f} times)",
        flush=True,
    )


def undisturbed(jobs: Jobs) -> str:
    """The digest of a zeroth-order run that is left alone, the same under every launcher."""
    jobs.start("undisturbed", *ZEROTH_ORDER)
    return jobs.summary("undisturbed")["final_digest"]


def lose_the_link(jobs: Jobs, expected: str) -> None:
    """Take the link away in the middle of a run, and have the run go on; exits where that goes wrong."""
    jobs.start("cut", *ZEROTH_ORDER)
    if any(status is not None for status in jobs.wait("cut", until=lambda: jobs.steps("cut") >= 2)):
        sys.exit(f"{jobs.launcher}: cut ended before its link did: see {jobs.folder('cut')}.*.log, or set more steps")
    down = time.monotonic()
    jobs.hosts[1].plug("down")
    statuses, step = jobs.wait("cut"), jobs.steps("cut")
    print(f"{jobs.launcher}, link down at step {step}: both nodes have ended after {time.monotonic() - down:.0f} s")
    for node, status in enumerate(statuses):
        told = [line for line in jobs.log("cut", node).splitlines() if line.startswith("addax-ds: ")]
        if not status or not told:
            sys.exit(f"node {node} ended with status {status} and no cause: see {jobs.folder('cut')}.*.log")
        print(f"  node {node}, status {status}: {told[0]}", flush=True)

    jobs.hosts[1].plug("up")
    jobs.start("cut", *ZEROTH_ORDER)
    digest = jobs.summary("cut")["final_digest"]
    same = "the same" if digest == expected else "NOT the same"
    print(f"{jobs.launcher}, link up again: digest {digest[:12]}, undisturbed {expected[:12]}: {same}", flush=True)
    if digest != expected:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
