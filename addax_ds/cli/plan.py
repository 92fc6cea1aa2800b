"""`addax-ds plan`."""

import re
from pathlib import Path

from addax_ds.bench.table import Bench
from addax_ds.errors import UserError
from addax_ds.plan.compare import Layout, rows
from addax_ds.shapes import shape_of

_UNITS = {"": 1, "GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}


def plan(model: str, layout: Layout, all_layers: bool, json: Path | None) -> None:
    """Print what a step takes of each GPU under every method; write it as JSON where a path is given."""
    shape = shape_of(model)
    if json is not None and not json.parent.is_dir():
        raise UserError(f"--json {json}: no folder {json.parent}: make it or choose another")
    zo, fo = f"{layout.zo_micro_batch} x {layout.long} tokens", f"{layout.fo_micro_batch} x {layout.lt}"
    where = f"{model}, FSDP2 on {layout.ranks} GPUs"
    table = Bench("plan", f"GiB per GPU, {where}; each takes {zo} zeroth-order and {fo} first-order")
    table.rows.extend(rows(shape, layout, all_layers))
    table.show()
    if json is not None:
        table.write(json)


def bytes_of(text: str) -> float:
    """ "80GiB" as a number; raises `UserError` for what is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    if match is None or match[2] not in _UNITS:
        raise UserError(f"{text}: give a size such as 80GiB")
    return float(match[1]) * _UNITS[match[2]]
