"""GPUs that a run is planned for, and what joins them."""

import dataclasses
import re
from dataclasses import dataclass

from addax_ds.config import nearest, require
from addax_ds.errors import UserError

RESERVED = 2 * 2**30
"""Bytes of a GPU that torch does not count: the driver's, NCCL's, and gaps between tensors."""


@dataclass(frozen=True)
class Gpu:
    """What the datasheet says of a kind of GPU and of the usual node of 8; speeds are per second and one way."""

    memory: float
    """Bytes."""
    flops: float
    """In bfloat16 with float32 sums, without sparsity."""
    float32_flops: float
    """In float32, as torch multiplies unless told otherwise."""
    bandwidth: float
    """Bytes of its own memory."""
    gpu_link: float
    """Bytes that it receives from the GPUs of its node."""
    node_link: float
    """Bytes that its node receives from others."""


GPUS = {
    # NVIDIA A100 datasheet (SXM4), DGX A100 datasheet: 8 x 200 Gbit/s.
    "a100": Gpu(80 * 2**30, 312e12, 19.5e12, 2.039e12, 300e9, 200e9),
    # NVIDIA H100 and H200 datasheets (SXM5), DGX H100/H200 datasheet: 8 x 400 Gbit/s.
    "h100": Gpu(80 * 2**30, 989e12, 67e12, 3.35e12, 450e9, 400e9),
    "h200": Gpu(141e9, 989e12, 67e12, 4.8e12, 450e9, 400e9),
    # NVIDIA DGX B200 and HGX B200 datasheets, an eighth of them.
    "b200": Gpu(180e9, 2250e12, 75e12, 8e12, 900e9, 400e9),
    # NVIDIA L40S datasheet: no NVLink, PCIe 4.0 x16; a network card of 200 Gbit/s.
    "l40s": Gpu(48e9, 362e12, 91.6e12, 0.864e12, 32e9, 25e9),
}


def gpu_of(kind: str, **given: str | None) -> Gpu:
    """A kind of GPU by its name, with what is given, by field, in place of its own.

    Raises `UserError` for an unknown kind, and for what is no size or speed.
    """
    if kind.lower() not in GPUS:
        raise UserError(f"gpu {kind}{nearest(kind.lower(), [*GPUS])}")
    read = {"memory": bytes_of, "flops": flops_of}
    values = {name: read.get(name, speed_of)(text) for name, text in given.items() if text is not None}
    if "flops" in values:  # of whichever dtype the run has
        values["float32_flops"] = values["flops"]
    return dataclasses.replace(GPUS[kind.lower()], **values)


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be 1 or more")
        memory = self.gpu.memory
        require(memory > RESERVED, f"gpu_memory is {memory / 2**30:g} GiB: it must be above 2 GiB")
        for name, value in dataclasses.asdict(self.gpu).items():
            require(value > 0, f"{name} is {value:g}: it must be above 0")

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node

    def fits(self, peak: float) -> bool:
        """Whether so many bytes of torch's fit a GPU."""
        return peak + RESERVED <= self.gpu.memory

    def __str__(self) -> str:
        each = f"{self.gpus_per_node} GPUs of {self.gpu.memory / 2**30:.3g} GiB"
        return each if self.nodes == 1 else f"{self.nodes} nodes of {each}"


_SIZES = {"": 1, "GB": 1e9, "GiB": 2**30, "MB": 1e6, "MiB": 2**20}
_SPEEDS = {"GB/s": 1e9, "GiB/s": 2**30, "TB/s": 1e12, "MB/s": 1e6, "Gbit/s": 1e9 / 8, "Mbit/s": 1e6 / 8}
_FLOPS = {"TFLOP/s": 1e12, "PFLOP/s": 1e15}


def bytes_of(text: str) -> float:
    """ "80GiB" as a number; raises `UserError` for what is none."""
    return _number(text, _SIZES, "a size such as 80GiB")


def speed_of(text: str) -> float:
    """ "400Gbit/s" in bytes per second; raises `UserError` for what is none."""
    return _number(text, _SPEEDS, "a speed such as 400Gbit/s or 50GB/s")


def flops_of(text: str) -> float:
    """ "989TFLOP/s" as a number; raises `UserError` for what is none."""
    return _number(text, _FLOPS, "a speed such as 989TFLOP/s")


def _number(text: str, units: dict[str, float], wanted: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z/]*)", text)
    if match is None or match[2] not in units:
        raise UserError(f"{text}: give {wanted}")
    return float(match[1]) * units[match[2]]
