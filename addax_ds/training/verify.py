"""What every rank of a cluster must have in common before a job is trusted to it."""

import hashlib
import json
import os
import platform
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import cached_file

from addax_ds.config import RunConfig
from addax_ds.core.kernels import noise
from addax_ds.data.partition import partition
from addax_ds.digest import weights_digest
from addax_ds.errors import UserError
from addax_ds.optimizer import Addax
from addax_ds.training.folder import versions
from addax_ds.training.models import hyperparameters, locate_model, read_ds_config
from addax_ds.training.run import prepare_inputs, step_batches, step_samples
from addax_ds.training.world import under_mpi

_BATCHES = 3
_FAILED = "failed:"
_LEAVING = 10.0  # seconds
_LONGEST_REPORT = 1 << 20  # bytes
# Settings that say where things are: what is there is compared by its content.
_PLACES = ("model", "data", "eval_data", "adapter_weights", "output", "ds_config")


@dataclass(frozen=True)
class Report:
    """What one rank has."""

    rank: int
    node: str
    items: dict[str, str]


def gather(report_of: Callable[[int, int], Report], minutes: float) -> list[Report]:
    """The reports of all ranks, on every rank, without torch's process groups.

    report_of: (rank, local rank) -> this rank's; minutes: how long to wait for the others'. Under mpirun
    reports travel by mpi4py, under torchrun through the launcher's store; a plain process is alone.
    """
    if "RANK" in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return _through_store(report_of(rank, int(os.environ["LOCAL_RANK"])), size, minutes)
    if not under_mpi():
        return [report_of(0, 0)]
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError("verify needs mpi4py under mpirun: pip install 'addax-ds[mpi]'") from None
    everyone = MPI.COMM_WORLD
    local_rank = everyone.Split_type(MPI.COMM_TYPE_SHARED).Get_rank()
    try:
        return _through_mpi(everyone, lambda: report_of(everyone.Get_rank(), local_rank), minutes)
    except BaseException:
        traceback.print_exc()
        everyone.Abort(1)  # else the others would wait for this rank for ever
        raise


def _through_mpi(everyone: Any, report: Callable[[], Report], minutes: float) -> list[Report]:
    """Ends all ranks where one has not reported in time."""
    rank, size = everyone.Get_rank(), everyone.Get_size()
    nodes = everyone.allgather(socket.gethostname())
    reports = {rank: report()}
    others = [other for other in range(size) if other != rank]
    sent = [everyone.isend(reports[rank], other) for other in others]
    waiting = {other: everyone.irecv(bytearray(_LONGEST_REPORT), other) for other in others}
    end = time.monotonic() + minutes * 60
    while waiting and time.monotonic() < end:
        for other in list(waiting):
            done, theirs = waiting[other].test()
            if done:
                reports[other] = theirs
                del waiting[other]
        time.sleep(0.02)
    if waiting:
        if rank == min(reports):
            late = min(waiting)
            print(
                f"addax-ds: rank {late} on {nodes[late]} did not report within {minutes:g} minutes: look at its node",
                file=sys.stderr,
                flush=True,
            )
        else:
            time.sleep(_LEAVING)  # its end would be that of the rank that says why
        everyone.Abort(2)
    for request in sent:
        request.wait()
    return [reports[other] for other in range(size)]


def _through_store(report: Report, size: int, minutes: float) -> list[Report]:
    # torchrun serves a store of its own at that port, and every other launcher leaves it to rank 0.
    serving = report.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    key = f"addax_ds/verify/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    rank = report.rank
    try:
        store = torch.distributed.TCPStore(address, port, None, serving, timedelta(minutes=minutes))
        store.set(f"{key}/{rank}", json.dumps(asdict(report)))
        reports = []
        for rank in range(size):
            reports.append(Report(**json.loads(store.get(f"{key}/{rank}"))))
    except torch.distributed.DistError as error:
        raise UserError(
            f"rank {rank} did not report ({' '.join(str(error).split())[:100]}): look at its node"
        ) from None
    # Rank 0 may serve the store: it leaves last.
    left, end = store.add(f"{key}/left", 1), time.monotonic() + _LEAVING
    while serving and left < size and time.monotonic() < end:
        time.sleep(0.05)
        left = store.add(f"{key}/left", 0)
    return reports


def report_of(load: Callable[[], RunConfig], rank: int, local_rank: int) -> Report:
    """This rank's report; an item that cannot be had says why in its place. load: reads the settings."""
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    measured: dict[str, Callable[[], str]] = {
        "device": lambda: _device(device),
        "noise, normal": lambda: _noise(device, "normal"),
        "noise, rademacher": lambda: _noise(device, "rademacher"),
        "settings": lambda: settings_of(load()),
        "weights": lambda: weights_of(load()),
        "adapters": lambda: adapters_of(load()),
        "batches": lambda: _batches(load()),
        "step": lambda: known_step(load(), device),
    }
    items = {**versions(), **{name: _said(item) for name, item in measured.items()}}
    return Report(rank, socket.gethostname(), items)


def _said(item: Callable[[], str]) -> str:
    try:
        return item()
    except Exception as error:  # whatever is wrong with a rank is what the table is for
        return f"{_FAILED} {type(error).__name__}: {' '.join(str(error).split())}"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"


def _noise(device: torch.device, distribution: Any) -> str:
    pieces = [
        noise(seed, "verify", start, start + 4099, distribution=distribution, device=device)
        for seed, start in ((0, 0), (2**52 + 1, 2**40 + 3))
    ]
    return hashlib.sha256(torch.cat(pieces).cpu().numpy().tobytes()).hexdigest()[:16]


def settings_of(config: RunConfig) -> str:
    """Digest of a run's settings, with the content of its DeepSpeed configuration, but for what names places."""
    values = {name: value for name, value in asdict(config).items() if name not in _PLACES}
    values["ds_config"] = read_ds_config(config) if config.ds_config is not None else None
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def adapters_of(config: RunConfig) -> str:
    """Digest of the adapters that a run begins with."""
    if config.adapter_weights is None:
        return "none" if config.adapter is None else "new"
    return _digest_of(sorted(Path(config.adapter_weights).glob("adapter_*")))


def weights_of(config: RunConfig) -> str:
    """Digest of a model's config.json and of the safetensors files that hold its weights, by name and content."""
    settings = Path(str(cached_file(locate_model(config.model), "config.json")))
    files = sorted(settings.parent.glob("*.safetensors"))
    if not files:
        raise UserError(f"{settings.parent} holds no safetensors files: download the model, or give one that has them")
    return _digest_of([settings, *files])


def _digest_of(files: list[Path]) -> str:
    """Of names and content."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _batches(config: RunConfig) -> str:
    prepared = prepare_inputs(config)
    pools = partition([example.length for example in prepared.train], config.lt)
    digest = hashlib.sha256()
    for step in range(_BATCHES):
        samples = step_samples(config, pools, step)
        inputs = frozenset(("input_ids", "attention_mask"))
        for batches in step_batches(config, prepared, samples, inputs, torch.device("cpu")):
            for batch in batches or []:
                for name in sorted(batch):
                    digest.update(f"{name} {tuple(batch[name].shape)}".encode() + batch[name].numpy().tobytes())
    return digest.hexdigest()[:16]


def known_step(config: RunConfig, device: torch.device) -> str:
    """Digest of the weights of a tiny known model after one step with the run's hyper-parameters, its g0 and loss."""
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.05 * noise(7, name, 0, parameter.numel()).view(parameter.shape))
    optimizer = Addax(
        model.to(device, getattr(torch, config.dtype)), **{**hyperparameters(config), "perturb": "gathered"}
    )
    ids = (torch.arange(4 * 24, device=device).view(4, 24) * 37) % 512
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    metrics = optimizer.train_step(batch, batch)
    scalars = [*metrics["g0"], *([metrics["loss_fo"]] if metrics["loss_fo"] is not None else [])]
    return f"{weights_digest(optimizer.engine)[:16]} " + " ".join(f"{scalar:.6g}" for scalar in scalars)


def usual(reports: list[Report], item: str) -> tuple[str, int]:
    """What most ranks have, and how many; rank 0 breaks a tie."""
    held = [report.items.get(item, "missing") for report in reports]
    value = max(dict.fromkeys(held), key=held.count)
    return value, held.count(value)


def disagreements(reports: list[Report]) -> list[str]:
    """A line for each item and rank that failed or differs from what most ranks have."""
    lines = []
    for item in dict.fromkeys(item for report in reports for item in report.items):
        expected, _ = usual(reports, item)
        first = next(report for report in reports if report.items.get(item, "missing") == expected)
        for report in reports:
            value = report.items.get(item, "missing")
            if value.startswith(_FAILED):
                lines.append(f"rank {report.rank} on {report.node}: {item} {value}")
            elif value != expected:
                lines.append(
                    f"rank {report.rank} on {report.node}: {item} is {value}, "
                    f"and on rank {first.rank} on {first.node} it is {expected}"
                )
    return lines
