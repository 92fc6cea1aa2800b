"""`addax-ds bench`: the tables of addax_ds/bench."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

from addax_ds.bench.table import Bench
from addax_ds.errors import UserError


def bench(table: str, engine: str, ranks: int, link: float | None, model: str, json: Path | None) -> None:
    """Measure one table, print it and write it as JSON where a path is given."""
    from addax_ds.bench.contraction import bench_contraction
    from addax_ds.bench.directions import bench_directions
    from addax_ds.bench.memory import bench_memory
    from addax_ds.bench.noise import bench_noise
    from addax_ds.bench.scale import bench_scale
    from addax_ds.bench.step import bench_step
    from addax_ds.bench.wire import bench_wire

    tables: dict[str, Callable[[], Bench]] = {
        "noise": bench_noise,
        "wire": bench_wire,
        "step": lambda: bench_step(engine, ranks, gigabits=link),
        "memory": lambda: bench_memory(ranks),
        "contraction": bench_contraction,
        "directions": bench_directions,
        "scale": lambda: bench_scale(model, ranks, engine),
    }
    if table not in tables:
        raise UserError(f"bench {table}: no such table: give one of {', '.join(tables)}")
    if link is not None and (table != "step" or link <= 0):
        raise UserError(f"--link {link:g}: give the speed in Gbit/s, above 0, for step")
    if json is not None and not json.parent.is_dir():
        raise UserError(f"--json {json}: no folder {json.parent}: make it or choose another")
    # What is cleaned up at an error, ranks and network namespaces, is so when asked to end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    result = tables[table]()
    result.show()
    if json is not None:
        result.write(json)
