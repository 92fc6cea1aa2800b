"""What a benchmark returns: named rows of figures, printed and written as JSON."""

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from addax_ds.terminal import show_whole


@dataclass
class Bench:
    """One table: its name, what was measured, and a row for each figure."""

    name: str
    about: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    machine: str = field(default_factory=lambda: machine())

    def show(self) -> None:
        """Print the table; its columns are the keys of its rows."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        table = Table(title=f"{self.name}: {self.about}", caption=self.machine, title_justify="left")
        for column in columns:
            text = any(isinstance(row.get(column), str) for row in self.rows)
            table.add_column(column.replace("_", " "), justify="left" if text else "right")
        for row in self.rows:
            table.add_row(*(_format(row.get(column)) for column in columns))
        show_whole(table)

    def write(self, path: Path) -> None:
        """Write the table as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def machine() -> str:
    """The processor or GPU, and the versions that matter."""
    device = f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{device}, torch {torch.__version__}, Python {platform.python_version()}"


def _format(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else (f"{value:,.0f}" if isinstance(value, float | int) else str(value))
    )
